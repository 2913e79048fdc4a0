"""Results as JSON lines and as a table beside random initialisation and chance."""

import json
import os
import resource
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dataprep import plain_json
from dense_ssl.config import UserError

RESULTS = "eval.jsonl"
BASELINES = "eval_baselines.jsonl"  # of the same network at random initialisation, computed once


@dataclass(frozen=True, slots=True)
class Result:
    """One number; in percent."""

    task: str
    protocol: str
    metric: str
    value: float
    random_init: float | None  # of the same network, untrained
    chance: float | None  # of an answer that ignores the image
    checkpoint: str
    weights: str  # sha256
    data: str
    settings: Mapping[str, Any]
    omitted: Sequence[str]  # what of the data was left out
    notes: Mapping[str, float] = field(default_factory=dict)  # facts that are no metric, `note/x`
    seconds: float | None = None  # wall time of the protocol, features included
    memory_gb: float | None = None  # peak: of the GPU, or of the process so far


def results_of(
    values: Mapping[str, float], baseline: Mapping[str, float], **about: Any
) -> list[Result]:
    """Return the metrics of one protocol.

    `chance/x` in `values` goes beside `x` and `x@k`; `note/x` is a fact such as a chosen learning rate,
    kept with every metric and no percentage.
    """
    notes = {
        name.removeprefix("note/"): value
        for name, value in values.items()
        if name.startswith("note/")
    }
    return [
        Result(
            metric=metric,
            value=value,
            random_init=baseline.get(metric),
            chance=values.get("chance/" + metric.partition("@")[0]),
            notes=notes,
            **about,
        )
        for metric, value in values.items()
        if not metric.startswith(("chance/", "note/"))
    ]


def append(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append JSON lines and see them onto the disk.

    A line that an earlier run broke off is ended first, so that it cannot swallow a new one.

    Raises:
        UserError: the file cannot be written.
    """
    text = "".join(json.dumps(dict(record)) + "\n" for record in records)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            if file.tell() and not _ends_a_line(path):
                text = "\n" + text
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def append_results(folder: Path, results: Sequence[Result], question: str = "") -> None:
    """Append the results of a task to `folder/eval.jsonl`, with the time and what they answer (kept.py)."""
    about: dict[str, Any] = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    if question:
        about |= {"question": question, "rows": len(results)}
    append(folder / RESULTS, [asdict(result) | about for result in results])


def peak_memory_gb() -> float:
    """Return the peak of this process's memory since it began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def stored_baseline(folder: Path, key: str) -> dict[str, float] | None:
    """Return the metrics kept under `key` in a run's baselines, if they are there."""
    path = folder / BASELINES
    if not path.is_file():
        return None
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = plain_json.parse(line)
        except ValueError:  # broken off
            continue
        if isinstance(record, dict) and record.get("key") == key:
            return record.get("values")
    return None


def table(results: Sequence[Result]) -> str:
    """Return the results as aligned text, a row per metric."""
    rows = [("protocol", "metric", "value", "random init", "change", "chance")]
    for result in results:
        change = None if result.random_init is None else result.value - result.random_init
        rows.append(
            (
                result.protocol,
                result.metric,
                f"{result.value:.2f}",
                "-" if result.random_init is None else f"{result.random_init:.2f}",
                "-" if change is None else f"{change:+.2f}",
                "-" if result.chance is None else f"{result.chance:.2f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
