"""What an evaluation had to leave out of its data, counted and named: never a silent zero."""

from collections.abc import Iterable

from dense_ssl.config import UserError

_NAMED = 3  # examples per reason


class Omissions:
    """Names of left-out things by reason."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """Count one thing."""
        self._names.setdefault(reason, []).append(name)

    def update(self, other: "Omissions", prefix: str = "") -> None:
        """Add all of another's."""
        for reason, names in other._names.items():
            for name in names:
                self.add(prefix + reason, name)

    def count(self, reason: str) -> int:
        """Return how many were left out for a reason."""
        return len(self._names.get(reason, []))

    def lines(self) -> list[str]:
        """Return one line per reason: `val: image file missing: 2 (a.jpg, b.jpg)`."""
        return [f"{reason}: {_listed(names)}" for reason, names in self._names.items()]


def require_some(what: Iterable[object], where: str, omitted: Omissions) -> None:
    """Raise when nothing is left to evaluate on, with the reasons.

    Raises:
        UserError: `what` is empty.
    """
    if not any(True for _ in what):
        reasons = "; ".join(omitted.lines()) or "there is nothing in it"
        raise UserError(f"{where}: nothing usable: {reasons}")


def _listed(names: list[str]) -> str:
    more = ", ..." if len(names) > _NAMED else ""
    return f"{len(names)} ({', '.join(names[:_NAMED])}{more})"
