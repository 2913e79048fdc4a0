"""The bench's tables for people, and the same rows as CSV in the schema of Liger-Kernel's benchmarks."""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kernels.bench_measure import Measured, Quantiles
from kernels.bench_paper import CARDS, COUNTED, Card, Prediction
from kernels.bench_place import Place
from kernels.spec import Shape

if TYPE_CHECKING:
    from kernels.ahead import Resources

# Liger-Kernel's header to the letter: its visualiser reads the file as it is.
COLUMNS = (
    "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit",
    "x_name", "x_label", "x_value", "y_value_50", "y_value_20", "y_value_80",
    "extra_benchmark_config_str", "gpu_name", "timestamp", "liger_version",
)  # fmt: skip
AXES = {"N": "rows", "M": "keys", "B": "images"}


@dataclass(frozen=True)
class Case:
    """One kernel on one of its real shapes, as measured."""

    kernel: str
    title: str  # of the real shape; of several that are reduced to the same, all of them
    shape: Shape
    full: Shape  # before it was reduced for a CPU
    dtype: str
    moved: int  # bytes a kernel must move, 0 if not known
    flops: int

    @property
    def axes(self) -> str:
        """The shape in words: `N 49 of 1568, K 65536, D 128`."""
        parts = []
        for name, value in self.shape.items():
            whole = self.full[name]
            parts.append(f"{name} {value}" + (f" of {whole}" if whole != value else ""))
        return ", ".join(parts)


@dataclass(frozen=True)
class Row:
    """One provider's measurement of a case."""

    case: Case
    provider: str
    measured: Measured
    note: str = ""  # what the provider does otherwise


# Tables


def table(case: Case, rows: Sequence[Row], place: Place) -> str:
    """Return one case as text: a line per provider, in the order measured; losing ones stay."""
    head = f"{case.kernel}: {case.title}"
    columns = ["", "forward ms", "backward ms", "full ms", "x eager", "peak MB", "error"]
    if place.card:
        columns += ["GB/s", "TFLOP/s", "of roof"]
    eager = next((r.measured.whole for r in rows if r.provider == "torch-eager"), None)
    lines = [columns]
    for row in rows:
        if row.measured.absent is None:
            lines.append([row.provider, *_cells(row, eager, place)])
    text = _aligned(lines)
    text += [f"  {r.provider}: {r.measured.absent}" for r in rows if r.measured.absent]
    text += [f"  {r.provider}: {r.note}" for r in rows if r.note and not r.measured.absent]
    return "\n".join([head, f"  {case.axes}, {case.dtype}", *text])


def _cells(row: Row, eager: float | None, place: Place) -> list[str]:
    found = row.measured
    whole = found.whole
    cells = [_spread(found.ms.get(mode)) for mode in ("forward", "backward", "full")]
    cells.append(f"{eager / whole:.2f}" if eager and whole else "")
    cells.append("" if found.peak is None else _short(found.peak / 1e6))
    cells.append("" if found.error is None else f"{found.error:.0e}")
    if place.card and whole:
        cells += [_short(row.case.moved / whole / 1e6), _short(row.case.flops / whole / 1e9)]
        cells.append(f"{place.card.milliseconds(row.case.moved, row.case.flops) / whole:.0%}")
    return cells


def _spread(ms: Quantiles | None) -> str:
    return "" if ms is None else f"{_short(ms[1])} ({_short(ms[0])}-{_short(ms[2])})"


def _short(value: float) -> str:
    """Return three significant digits, never in exponents."""
    if value == 0:
        return "0"
    digits = next((n for n, least in enumerate((100, 10, 1, 0.1, 0.01)) if value >= least), 5)
    return f"{value:.{digits}f}"


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines with the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(len(lines[0]))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    ]


@dataclass(frozen=True)
class Counted:
    """What a real shape moves, on paper."""

    kernel: str
    title: str
    eager: tuple[int, int] | None  # bytes and operations of the eager sequence
    moved: int  # bytes of the kernel, 0 if not known
    flops: int


def counted_table(rows: Iterable[Counted]) -> str:
    """Return bytes moved and the time they imply on each card."""
    lines = [["", "eager GB", "operations", "kernel GB", "GFLOP"]]
    lines[0] += [f"{card.name} {who} ms" for card in CARDS for who in ("eager", "kernel")]
    for row in rows:
        eager = ["-", "-"] if row.eager is None else [_short(row.eager[0] / 1e9), f"{row.eager[1]}"]
        line = [f"{row.kernel}: {row.title}", *eager, _short(row.moved / 1e9)]
        line.append(_short(row.flops / 1e9))
        for card in CARDS:
            before = card.milliseconds(row.eager[0], row.flops) if row.eager else None
            line.append("-" if before is None else _short(before))
            line.append(_short(card.milliseconds(row.moved, row.flops)))
        lines.append(line)
    return "\n".join(_aligned(lines))


def resource_table(found: Iterable[tuple[str, "Resources"]]) -> str:
    """Return what every compiled launch takes from a card that is not there."""
    lines = [
        ["", "sm", "registers", "stack B", "shared B", "warps/SM", "matrix ops", "16 B loads", ""]
    ]
    for kernel, r in found:
        numbers = (r.sm, r.registers, r.stack, r.shared, r.resident_warps)
        line = [f"{kernel} {r.kernel}", *map(str, numbers), str(r.tensor_cores), str(r.wide_loads)]
        lines.append([*line, "; ".join(r.complaints(wide=False)) or "fits"])
    return "\n".join(_aligned(lines))


def prediction_table(rows: Sequence[Row], predicted: Iterable[Prediction], card: Card) -> str:
    """Return predicted beside measured milliseconds of what was measured on this card."""
    whole = {(r.case.kernel, r.case.title, r.provider): r.measured.whole for r in rows}
    lines = [["", *(f"{who} {what}" for who in ("eager", "compile", "ours") for what in ("predicted", "measured"))]]  # fmt: skip
    for p in predicted:
        key = (p.kernel, p.shape)
        if p.card != card.name or not any(case == key for *case_, _ in whole for case in [tuple(case_)]):
            continue
        line = [f"{p.kernel}: {p.shape}"]
        ours = p.likely_ms or p.floor_ms
        for said, who in ((p.eager_ms, "torch-eager"), (p.compile_ms, "torch-compile"), (ours, "ours")):
            seen = whole.get((*key, who))
            line += ["-" if ms is None else _short(ms) for ms in (said, seen)]
        lines.append(line)
    return "\n".join(_aligned(lines))
