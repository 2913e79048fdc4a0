"""Line plots as inline SVG: no script, no font, no library. Colours come from the page's style sheet.

Lines carry the classes `line s0`, `line s1`, ...; grid, axes and text carry `grid`, `axis` and `tick`.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 560, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 24, 12, 46  # margins around the plotted area
_MOST_POINTS = 400  # more than that are averaged: there are not more pixels to see


@dataclass(frozen=True, slots=True)
class Line:
    """One series."""

    label: str
    points: Sequence[tuple[float, float]]  # (x, y), x ascending


@dataclass(frozen=True, slots=True)
class Band:
    """What lies between two curves."""

    label: str
    points: Sequence[tuple[float, float, float]]  # (x, low, high), x ascending


def line_plot(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    from_zero: bool = False,
    band: Band | None = None,
) -> str:
    """Return an SVG element with axes, ticks and one polyline per series; x runs from 0.

    `y_label` is for who cannot see the picture; who can reads it in the caption. Points that are not finite
    are left out. `from_zero` makes the y axis start at 0; a band lies behind.
    """
    series = [_thinned([p for p in line.points if all(map(math.isfinite, p))]) for line in lines]
    edges = [p for p in (band.points if band else ()) if all(map(math.isfinite, p))]
    xs = [x for points in series for x, _ in points] + [x for x, *_ in edges] or [0.0]
    ys = [y for points in series for _, y in points] + [y for _, *y2 in edges for y in y2] or [0.0]
    x_ticks = ticks(0.0, max(xs), 8)
    y_ticks = ticks(min(0.0, *ys) if from_zero else min(ys), max(ys), 5)
    x_span = (0.0, max(*xs, 1e-9))
    y_span = (min(y_ticks[0], *ys), max(y_ticks[-1], *ys))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_span[0]) / (x_span[1] - x_span[0])
        up = (y - y_span[0]) / (y_span[1] - y_span[0])
        return (
            _LEFT + across * (WIDTH - _LEFT - _RIGHT),
            HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM),
        )

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(y_label)} by {html.escape(x_label)}">'
    ]
    for value in y_ticks:
        _, y = at(x_span[0], value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 7, y + 4, tick_text(value, y_ticks), "end"))
    for value in x_ticks:
        if not x_span[0] <= value <= x_span[1]:
            continue
        x, _ = at(value, y_span[0])
        parts.append(f'<path class="axis" d="M{x:.1f} {HEIGHT - _BOTTOM}v4"/>')
        parts.append(_text(x, HEIGHT - _BOTTOM + 19, tick_text(value, x_ticks), "middle"))
    parts.append(f'<path class="axis" d="M{_LEFT} {HEIGHT - _BOTTOM}H{WIDTH - _RIGHT}"/>')
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 6, x_label, "middle"))
    if band and edges:
        around = [at(x, high) for x, _, high in edges] + [at(x, low) for x, low, _ in edges[::-1]]
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in around)
        title = f"<title>{html.escape(band.label)}</title>"
        parts.append(f'<polygon class="band" points="{corners}">{title}</polygon>')
    for number, (line, points) in enumerate(zip(lines, series, strict=True)):
        parts.append(_drawn(number, line.label, [at(x, y) for x, y in points]))
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float, about: int) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten) that enclose [low, high]."""
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        margin = abs(high) / 10 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def tick_text(value: float, all_ticks: Sequence[float]) -> str:
    """Return a tick's number with as many digits as its neighbours need, without trailing noise."""
    step = all_ticks[1] - all_ticks[0]
    largest = max(map(abs, all_ticks))
    if largest >= 1e6 or largest < 1e-3:
        return f"{0 if abs(value) < step / 2 else value:.3g}"
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{digits}f}" if abs(value) > step / 2 else "0"


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most `_MOST_POINTS` points, each the mean of neighbours; the last one stays exact."""
    size = math.ceil(len(points) / _MOST_POINTS)
    if size <= 1:
        return list(points)
    groups = [points[i : i + size] for i in range(0, len(points) - 1, size)]
    means = [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]
    return [*means, points[-1]]


def _drawn(number: int, label: str, places: Sequence[tuple[float, float]]) -> str:
    title = f"<title>{html.escape(label)}</title>"
    if len(places) == 1:
        ((x, y),) = places
        return f'<circle class="dot s{number}" cx="{x:.1f}" cy="{y:.1f}" r="3">{title}</circle>'
    coordinates = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline class="line s{number}" points="{coordinates}">{title}</polyline>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return (
        f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{html.escape(text)}</text>"
    )
