"""Verdicts kept as they come, so that a matrix that was stopped goes on where it was.

A verdict is good for the code it was passed on: each line names a hash of all of it, and what was passed on
other code is left aside.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from dense_ssl.chaos.faults import Case
from dense_ssl.chaos.verdicts import Kind, Verdict

SOURCES = ("dataprep", "dense_ssl", "kernels")


class Ledger:
    """One line of JSON a verdict; the newest of a cell counts."""

    def __init__(self, path: Path, code: str) -> None:
        self._path, self._code = path, code

    def known(self, cases: Iterable[Case], any_code: bool = False) -> dict[Case, Verdict]:
        """Return those of the cases that have a verdict on this code, or on any.

        A failure on this code is no verdict to rest on; of any code the newest one is given, whatever it is.
        """
        try:
            lines = self._path.read_text().splitlines()
        except FileNotFoundError:
            return {}
        found: dict[str, Verdict] = {}
        for line in lines:
            try:
                entry = json.loads(line)
                verdict = Verdict(Kind(entry["kind"]), entry["why"], entry["seconds"])
                if any_code or entry["code"] == self._code:
                    found[entry["case"]] = verdict
            except (ValueError, KeyError, TypeError):  # cut off by what stopped it
                continue
        return {
            case: found[case.name]
            for case in cases
            if case.name in found and (any_code or found[case.name].kind is not Kind.FAILED)
        }

    def add(self, case: Case, verdict: Verdict) -> None:
        """Keep a verdict."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        entry = {
            "case": case.name, "kind": verdict.kind.value, "why": verdict.why,
            "seconds": round(verdict.seconds, 1), "code": self._code,
        }  # fmt: skip
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def hash_of_code(root: Path) -> str:
    """Return a hash of every Python file of the project but its tests."""
    digest = hashlib.sha256()
    for path in sorted(path for part in SOURCES for path in (root / part).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
