"""The matrix as text for a terminal and as Markdown for `docs/reliability.md`."""

import platform
import time
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from dense_ssl.chaos import disks
from dense_ssl.chaos.faults import FAULTS, LOADERS, NO_LOADER, PLACES, Case, left_out
from dense_ssl.chaos.verdicts import Kind, Verdict

BEGIN, END = "<!-- the matrix: begin -->", "<!-- the matrix: end -->"
Results = Mapping[Case, Verdict]


def line(case: Case, verdict: Verdict) -> str:
    """Return one finished cell as a line."""
    cell = f"{case.fault.title:<24} {case.place:<17} {case.loader:<7}"
    why = f"  {verdict.why}" if verdict.why else ""
    return f"{cell} {verdict.kind.value:<8} {verdict.seconds:5.0f} s{why}"


def counts(results: Results, asked: int) -> str:
    """Return how many of the faults that were asked for were tried, and what became of them."""
    found = Counter(verdict.kind for verdict in results.values())
    words = {
        Kind.EQUAL: "equal to the undisturbed run",
        Kind.REFUSED: "refused in one sentence, equal once the cause was removed",
        Kind.WITHOUT: "went on without the step, record or image, and said so",
        Kind.HALVED: "went on in halved micro-batches",
        Kind.FAILED: "lost, hung or unexplained",
    }
    rows = [f"{found[kind]} {text}" for kind, text in words.items()]
    tried = f"{len(results)} of {asked}" if len(results) < asked else f"{asked}"
    return f"{tried} faults tried: {'; '.join(rows)}"


def markdown(results: Results, asked: int) -> str:
    """Return the table: a row per fault and place, a column per loader, with date and machine."""
    rows = [f"| fault | place | {' | '.join(LOADERS)} |", "| --- " * (2 + len(LOADERS)) + "|"]
    for fault in FAULTS:
        for place in PLACES:
            cells = [_cell(results, Case(fault, place, loader)) for loader in LOADERS]
            if any(cells):
                rows.append(f"| {fault.title} | {place} | {' | '.join(cells)} |")
            alone = _cell(results, Case(fault, place, NO_LOADER))
            if alone:
                rows.append(f"| {fault.title} | {place} | {alone} | | |")
    apart = [f"* {fault.title}, {place}: {why}." for fault, place, why in left_out()]
    for fault in FAULTS:
        others = sorted(set(LOADERS) - set(fault.loaders))
        if others:
            apart.append(f"* {fault.title}, {' and '.join(others)}: the loader plays no part.")
    apart.append("* Conversion and evaluation by loader: they read images by themselves.")
    return "\n".join([circumstances(), "", counts(results, asked) + ".", "", *rows, "",
                      "Does not apply:", "", *apart])  # fmt: skip


def circumstances() -> str:
    """Return date, machine, versions, and what stood in for disks."""
    names = ("torch", "numpy", "numba", "ffcv", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
    versions = ", ".join(f"{name} {found}" for name in names if (found := _version(name)))
    return (
        f"{time.strftime('%Y-%m-%d')}, {platform.system()} {platform.release()}, "
        f"{platform.machine()}, Python {platform.python_version()}, {versions}. "
        f"Disks: {disks.means()}."
    )


def write(page: Path, table: str) -> None:
    """Put the table between its two marks in a page.

    Raises:
        ValueError: the page has no such marks.
    """
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page}: no lines {BEGIN!r} and {END!r}")
    page.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


def _cell(results: Results, case: Case) -> str:
    verdict = results.get(case)
    if verdict is None:
        return ""
    return f"{verdict.kind.value}, {verdict.seconds:.0f} s"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
