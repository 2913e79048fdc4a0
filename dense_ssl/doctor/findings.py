"""What a check found, and how a page of such findings looks."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum


class Severity(IntEnum):
    """How bad it is; the worst one is the command's exit code."""

    GOOD = 0
    WARNING = 1  # works, but slower or less than it could
    BROKEN = 2  # what was asked for cannot run here


MARKS = {Severity.GOOD: "ok  ", Severity.WARNING: "warn", Severity.BROKEN: "FAIL"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the page."""

    name: str
    value: str
    severity: Severity = Severity.GOOD
    remedy: str = ""  # what to do; only where something is wrong


def attempt(name: str, check: Callable[[], str], severity: Severity, remedy: str) -> Finding:
    """Return what `check` says, or that it failed, why, and the remedy.

    Whatever the library under test throws is a finding, not an error of ours.
    """
    try:
        return Finding(name, check())
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0][:160]
        return Finding(name, f"{type(error).__name__}: {first}", severity, remedy)


def page(sections: Iterable[tuple[str, Sequence[Finding]]]) -> str:
    """Return titled, aligned lines; a remedy stands below its finding."""
    sections = [(title, findings) for title, findings in sections if findings]
    width = max((len(f.name) for _, findings in sections for f in findings), default=0)
    lines: list[str] = []
    for title, findings in sections:
        lines += ["", title]
        for finding in findings:
            lines.append(f"  {MARKS[finding.severity]}  {finding.name:{width}}  {finding.value}")
            if finding.remedy:
                lines.append(f"        {'':{width}}  -> {finding.remedy}")
    return "\n".join(lines[1:])


def worst(sections: Iterable[tuple[str, Sequence[Finding]]]) -> Severity:
    """Return the worst severity of all findings."""
    found = (finding.severity for _, findings in sections for finding in findings)
    return max(found, default=Severity.GOOD)


def summary(sections: Iterable[tuple[str, Sequence[Finding]]]) -> str:
    """Return in one sentence what there is to do."""
    found = [finding for _, findings in sections for finding in findings]
    broken = [finding.name for finding in found if finding.severity is Severity.BROKEN]
    warned = [finding.name for finding in found if finding.severity is Severity.WARNING]
    if broken:
        return f"This cannot run here before {' and '.join(broken)} is seen to."
    if warned:
        return f"It works; {', '.join(warned)} could be better."
    return "All is well."
