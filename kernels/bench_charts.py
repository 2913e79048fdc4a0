"""Two charts of a bench run: milliseconds and megabytes, a panel per case, a bar per provider."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kernels.bench_place import Place
from kernels.bench_report import Row, short

COLOURS = {
    "ours": "#c8442f",
    "torch-eager": "#5b6770",
    "torch-compile": "#2f6f9f",
    "reference": "#b5bcc1",
}
RIVAL_COLOUR = "#d9a441"
COLUMNS = 3
HEADER_INCHES, PANEL_INCHES, BAR_INCHES = 0.7, 1.05, 0.26


def draw(rows: Sequence[Row], place: Place, folder: Path) -> list[Path]:
    """Write speed.png and memory.png into the folder; return their paths.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    where = place.name if place.device == "cuda" else f"CPU ({place.driver}), reduced shapes"
    kinds: tuple[tuple[str, str, Callable[[Row], float | None]], ...] = (
        ("speed", "milliseconds, forward and backward", lambda row: row.measured.whole),
        ("memory", "peak megabytes above the inputs", _megabytes),
    )
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for name, label, value in kinds:
        path = folder / f"{name}.png"
        _chart(rows, value, f"Kernels: {label}", f"{where}; shorter is better", path)
        paths.append(path)
    return paths


def _megabytes(row: Row) -> float | None:
    return None if row.measured.peak is None else row.measured.peak / 1e6


def _chart(
    rows: Sequence[Row], value: Callable[[Row], float | None], title: str, below: str, path: Path
) -> None:
    import matplotlib.pyplot as plt

    panels = [
        (case, [(r.provider, v) for r in group if (v := value(r)) is not None])
        for case, group in itertools.groupby(rows, key=lambda row: row.case)
    ]
    panels = [(case, bars) for case, bars in panels if bars]
    if not panels:
        return
    columns = min(COLUMNS, len(panels))
    lines = [panels[at : at + columns] for at in range(0, len(panels), columns)]
    heights = [PANEL_INCHES + BAR_INCHES * max(len(bars) for _, bars in line) for line in lines]
    inches = HEADER_INCHES + sum(heights)
    figure, axes = plt.subplots(
        *(len(lines), columns),
        figsize=(5.6 * columns, inches),
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )
    for line, row in zip(axes, lines):
        most = max(len(bars) for _, bars in row)
        for axis, (case, bars) in zip(line, row):
            _panel(axis, case.kernel, f"{case.title}\n{case.axes}; {case.dtype}", bars, most)
        for axis in line[len(row) :]:
            axis.axis("off")
    figure.text(0.012, 1 - 0.12 / inches, title, va="top", fontsize=15, weight="bold")
    figure.text(0.012, 1 - 0.42 / inches, below, va="top", fontsize=10, color="#555")
    figure.tight_layout(rect=(0, 0, 1, 1 - HEADER_INCHES / inches), h_pad=1.2, w_pad=2.0)
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)


def _panel(
    axis: Any, kernel: str, shape: str, bars: Sequence[tuple[str, float]], most: int
) -> None:
    names = [name for name, _ in bars]
    values = [value for _, value in bars]
    colours = [COLOURS.get(name, RIVAL_COLOUR) for name in names]
    axis.barh(range(len(bars)), values, color=colours, height=0.68)
    for place, (name, value) in enumerate(bars):
        weight = "bold" if name == "ours" else "normal"
        axis.annotate(
            short(value), (value, place), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=9, weight=weight,
        )  # fmt: skip
    axis.set_yticks(range(len(bars)), names, fontsize=9)
    for label in axis.get_yticklabels():
        label.set_weight("bold" if label.get_text() == "ours" else "normal")
    axis.set_ylim(most - 0.5, -0.5)
    axis.set_xlim(0, max(max(values) * 1.14, 1e-9))
    axis.set_title(kernel, loc="left", fontsize=11, weight="bold", pad=32)
    axis.text(0, 1.02, shape, transform=axis.transAxes, fontsize=8.5, color="#555", va="bottom")
    axis.tick_params(axis="x", labelsize=8, colors="#777")
    axis.tick_params(axis="y", length=0)
    axis.xaxis.set_major_locator(_ticks())
    axis.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color("#ccc")


def _ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5)
