"""The bench's tables, as text for people."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernels.bench_measure import Measured, Quantiles
from kernels.bench_paper import predictions
from kernels.bench_place import CARDS, Card
from kernels.spec import KernelSpec, Shape

if TYPE_CHECKING:
    from kernels.ahead import Resources


@dataclass(frozen=True)
class Case:
    """One kernel on one shape, as measured."""

    kernel: str
    titles: tuple[str, ...]  # of the real shapes it stands for: several may be reduced to the same
    shape: Shape
    wholes: tuple[Shape, ...]  # those real shapes
    dtype: str
    moved: int  # bytes a kernel must move, 0 if not known
    flops: int

    @property
    def title(self) -> str:
        """The real shapes' names."""
        return "; ".join(self.titles)

    @property
    def axes(self) -> str:
        """The shape in words: `N 49 of 1568, K 65536, D 128`."""
        parts: list[str] = []
        for name, value in self.shape.items():
            if isinstance(value, int) and not isinstance(value, bool):
                full = dict.fromkeys(str(whole[name]) for whole in self.wholes)
                reduced = list(full) != [str(value)]
                parts.append(f"{name} {value}" + (f" of {' / '.join(full)}" if reduced else ""))
        return ", ".join(parts)


@dataclass(frozen=True)
class Row:
    """One provider's measurement of a case."""

    case: Case
    provider: str
    measured: Measured
    note: str = ""  # what the provider does otherwise than the kernel


@dataclass(frozen=True)
class Counted:
    """What a real shape moves, on paper."""

    kernel: str
    title: str
    eager: tuple[int, int] | None  # bytes and operations of the eager sequence
    moved: int  # bytes of the kernel, 0 if not known
    flops: int


def case_table(case: Case, rows: Sequence[Row], card: Card | None) -> str:
    """Return one case: a line per provider, losing ones too, and a reason for each that is absent.

    With a card: achieved bandwidth and matrix rate, and the share of the time its ceilings imply.
    """
    eager = next((r.measured.whole for r in rows if r.provider == "torch-eager"), None)
    lines = [["", "forward ms", "backward ms", "full ms", "x eager", "peak MB", "error"]]
    if card:
        lines[0] += ["GB/s", "TFLOP/s", "of ceiling"]
    said: list[str] = []
    for row in rows:
        if row.measured.absent is None:
            lines.append([row.provider, *_cells(row, eager, card)])
        remarks = [row.measured.absent or row.note, row.measured.remark]
        said += [f"  {row.provider}: {remark}" for remark in remarks if remark]
    text = _aligned(_without_empty_columns(lines))
    return "\n".join([f"{case.kernel}: {case.title}", f"  {case.axes}; {case.dtype}", *text, *said])


def _cells(row: Row, eager: float | None, card: Card | None) -> list[str]:
    found, whole = row.measured, row.measured.whole
    cells = [_spread(found.ms.get(mode)) for mode in ("forward", "backward", "full")]
    cells.append(f"{eager / whole:.2f}" if eager and whole else "")
    cells.append("" if found.peak is None else short(found.peak / 1e6))
    cells.append("" if found.error is None else f"{found.error:.0e}")
    if card and whole:
        moved, flops = row.case.moved, row.case.flops
        cells += [short(moved / whole / 1e6), short(flops / whole / 1e9)]
        cells.append(f"{card.milliseconds(moved, flops) / whole:.0%}")
    return cells


def counted_table(rows: Iterable[Counted]) -> str:
    """Return bytes moved, and the time they and the products imply on each card."""
    lines = [["", "GFLOP", "eager GB", "operations", "kernel GB"]]
    lines[0] += [f"{card.name} {who}" for card in CARDS for who in ("eager ms", "kernel ms")]
    for row in rows:
        eager = row.eager
        line = [f"{row.kernel}: {row.title}", short(row.flops / 1e9)]
        line += [short(eager[0] / 1e9), str(eager[1])] if eager else ["-", "-"]
        line.append(short(row.moved / 1e9))
        for card in CARDS:
            line.append(short(card.milliseconds(eager[0], row.flops)) if eager else "-")
            line.append(short(card.milliseconds(row.moved, row.flops)))
        lines.append(line)
    return "\n".join(_aligned(lines))


def resource_table(specs: Iterable[KernelSpec], found: Iterable[tuple[str, "Resources"]]) -> str:
    """Return what every compiled launch takes from a card that is not there."""
    wide = {spec.name: spec.wide_loads for spec in specs}
    lines = [
        ["", "sm", "registers", "stack B", "shared B", "warps/SM", "matrix ops", "16 B loads", ""]
    ]
    for kernel, r in found:
        numbers = (r.sm, r.registers, r.stack, r.shared, r.resident_warps)
        line = [f"{kernel} {r.kernel}", *map(str, numbers), str(r.tensor_cores), str(r.wide_loads)]
        lines.append([*line, "; ".join(r.complaints(wide=wide[kernel])) or "fits"])
    return "\n".join(_aligned(lines))


def prediction_table(kernel: str, card: str, rows: Iterable[Row]) -> str:
    """Return predicted beside measured milliseconds of a kernel on a card; "-": not measured yet.

    Empty where nothing was predicted.
    """
    seen = {(row.case.title, row.provider): row.measured.whole for row in rows}
    lines = [["predicted ms, forward and backward", "", "at peaks", "likely", "measured"]]
    for said in predictions():
        if (said.kernel, said.card) == (kernel, card):
            measured = seen.get((said.shape, said.provider))
            numbers = (said.at_peaks_ms, said.likely_ms, measured)
            lines.append([said.shape, said.provider, *map(_maybe, numbers)])
    return "\n".join(_aligned(lines)) if len(lines) > 1 else ""


def _spread(ms: Quantiles | None) -> str:
    return "" if ms is None else f"{short(ms[1])} ({short(ms[0])}-{short(ms[2])})"


def _maybe(value: float | None) -> str:
    return "-" if value is None else short(value)


def short(value: float) -> str:
    """Return three significant digits, never with an exponent."""
    if value == 0:
        return "0"
    steps = (100, 10, 1, 0.1, 0.01, 0.001)
    digits = next((n for n, least in enumerate(steps) if value >= least), len(steps))
    return f"{value:.{digits}f}"


def _without_empty_columns(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the lines less the columns in which no line but the first says anything."""
    filled = [i == 0 or any(line[i] for line in lines[1:]) for i in range(len(lines[0]))]
    return [[cell for cell, keep in zip(line, filled) if keep] for line in lines]


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of cells as text: first column to the left, the others to the right."""
    count = max(len(line) for line in lines)
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(count)]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    ]
