"""What the bench leaves behind: CSV in the schema of Liger-Kernel's benchmarks, and RESULTS.md."""

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from kernels.bench_paper import COUNTED
from kernels.bench_place import Place
from kernels.bench_report import Row

# Liger-Kernel's header to the letter, so that its visualiser reads the file as it is.
COLUMNS: tuple[str, ...] = (
    "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit",
    "x_name", "x_label", "x_value", "y_value_50", "y_value_20", "y_value_80",
    "extra_benchmark_config_str", "gpu_name", "timestamp", "liger_version",
)  # fmt: skip
LABELS = {"N": "rows", "M": "keys", "B": "images"}

RESULTS = Path(__file__).with_name("RESULTS.md")
NOT_YET = "not measured yet"
_BLOCK = re.compile(r"<!-- bench ([^/\n]+) / (\S+) -->\n.*?<!-- end -->\n", re.DOTALL)


def append_csv(path: Path, rows: Iterable[Row], place: Place) -> None:
    """Add the rows to a CSV file, which is made with its header if it is not there."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    before = path.read_text() if path.exists() else ""
    if not before:
        writer.writeheader()
    for row in rows:
        writer.writerows(_records(row, place))
    _write(path, before + text.getvalue())


def _records(row: Row, place: Place) -> list[dict[str, object]]:
    case, found = row.case, row.measured
    axis = next((name for name in COUNTED if name in case.shape), next(iter(case.shape)))
    extra = {**case.shape, "dtype": case.dtype, "shape": case.title, "error": found.error}
    if found.absent:
        extra["absent"] = found.absent
    common = {
        "kernel_name": case.kernel,
        "kernel_provider": row.provider,
        "x_name": axis,
        "x_label": LABELS.get(axis, axis),
        "x_value": case.shape[axis],
        "extra_benchmark_config_str": json.dumps(extra),
        "gpu_name": place.name if place.device == "cuda" else f"none ({place.name})",
        "timestamp": place.time,
        "liger_version": f"{place.versions}, commit {place.commit}",
    }

    def record(mode: str, metric: str, unit: str, y: tuple[object, ...]) -> dict[str, object]:
        low, middle, high = y
        values = {"y_value_20": low, "y_value_50": middle, "y_value_80": high}
        kind = {"kernel_operation_mode": mode, "metric_name": metric, "metric_unit": unit}
        return {**common, **kind, **values}

    if found.absent:
        return [record("full", "speed", "ms", ("", "", ""))]
    records = [record(mode, "speed", "ms", ms) for mode, ms in found.ms.items()]
    if found.peak is not None:
        mode = "full" if "full" in found.ms else "forward"
        records.append(record(mode, "memory", "MB", (found.peak / 1e6,) * 3))
    return records


def updated(text: str, blocks: Mapping[tuple[str, str], str]) -> str:
    """Return the text of RESULTS.md with these blocks, by (section, kernel), new or in place of old.

    Whatever stands outside of blocks stays as it is, and so do the other blocks.
    """
    for (section, kernel), content in blocks.items():
        block = f"<!-- bench {section} / {kernel} -->\n### {kernel}\n\n{content}\n<!-- end -->\n"
        old = next((m for m in _BLOCK.finditer(text) if m.groups() == (section, kernel)), None)
        if old:
            text = text[: old.start()] + block + text[old.end() :]
        else:
            text = _inserted(text, section, block)
    return text


def _inserted(text: str, section: str, block: str) -> str:
    """Return the text with a block at the end of its section, which is made if it is not there."""
    heading = f"## {section}\n"
    if f"\n{heading}" not in f"\n{text}":
        text = f"{text.rstrip()}\n\n{heading}"
    start = f"\n{text}".index(f"\n{heading}") + len(heading)
    following = text.find("\n## ", start)
    end = len(text) if following < 0 else following + 1
    return f"{text[:end].rstrip()}\n\n{block}" + ("" if following < 0 else f"\n{text[end:]}")


def measured_blocks() -> set[tuple[str, str]]:
    """Return section and kernel of the blocks of RESULTS.md that hold measurements."""
    text = RESULTS.read_text() if RESULTS.exists() else ""
    return {(m[1], m[2]) for m in _BLOCK.finditer(text) if NOT_YET not in m[0]}


def write_results(blocks: Mapping[tuple[str, str], str]) -> None:
    """Put the blocks into RESULTS.md."""
    text = RESULTS.read_text() if RESULTS.exists() else "# Kernels, measured\n"
    _write(RESULTS, updated(text, blocks))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
