"""J and F of video object segmentation (Perazzi et al. 2016; the rules of the DAVIS-2017 evaluation).

J is the intersection of two masks over their union. F compares outlines: the share of the predicted
outline within a tolerance of the true one (precision) and the reverse (recall), their harmonic mean.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

TOLERANCE = 0.008  # of the image's diagonal, rounded up to pixels
_BINS = 4  # quarters of a sequence, for the decay


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a series of per-frame values comes to."""

    mean: float
    recall: float  # share of frames above one half
    decay: float  # mean of the first quarter less that of the last


def region_similarity(truth: np.ndarray, said: np.ndarray) -> float:
    """Return J of two masks, bool [H, W]; 1 where both are empty."""
    union = np.count_nonzero(truth | said)
    return np.count_nonzero(truth & said) / union if union else 1.0


def contour_accuracy(truth: np.ndarray, said: np.ndarray) -> float:
    """Return F of two masks, bool [H, W]; 1 where neither has an outline, 0 where only one has."""
    radius = math.ceil(TOLERANCE * math.hypot(*truth.shape))
    true, own = outline(truth), outline(said)
    num_true, num_own = np.count_nonzero(true), np.count_nonzero(own)
    if not num_true or not num_own:
        return float(num_true == num_own)
    window = _around(true | own, radius)  # all else is empty
    true, own = true[window], own[window]
    precision = np.count_nonzero(own & within(true, radius)) / num_own
    recall = np.count_nonzero(true & within(own, radius)) / num_true
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def outline(mask: np.ndarray) -> np.ndarray:
    """Return the pixels that differ from the one below, right or both, bool [H, W].

    At the image's lower and right edge those neighbours that there are count; the mask's own end there
    is no outline.
    """
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, below, both = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (mask != right) | (mask != below) | (mask != both)


def within(mask: np.ndarray, radius: int) -> np.ndarray:
    """Return the pixels at most `radius` from one of the mask, bool [H, W]: its dilation by a disc."""
    height, width = mask.shape
    counts = np.zeros((height, width + 2 * radius + 1), np.int32)  # of pixels left of each place
    np.cumsum(np.pad(mask, ((0, 0), (radius, radius))), axis=1, out=counts[:, 1:])
    out = np.zeros_like(mask)
    for dy in range(min(radius, height - 1) + 1):
        half = math.isqrt(radius**2 - dy**2)
        first, last = radius - half, radius + half + 1
        row = counts[:, last : last + width] > counts[:, first : first + width]
        out[dy:] |= row[: height - dy]
        out[: height - dy] |= row[dy:]
    return out


def statistics(values: Sequence[float]) -> Statistics:
    """Return mean, recall and decay of the values of one object's frames.

    Quarters share the frames at their ends, as the official evaluation cuts them.
    """
    series = np.asarray(values, np.float64)
    assert len(series), "no frame to score"
    # The small number rounds halves up, as the official evaluation does.
    ends = np.round(np.linspace(1, len(series), _BINS + 1) + 1e-10).astype(int) - 1
    first, last = series[: ends[1] + 1], series[ends[-2] : ends[-1] + 1]
    return Statistics(
        float(series.mean()), float((series > 0.5).mean()), float(first.mean() - last.mean())
    )


def scores(regions: Iterable[Statistics], contours: Iterable[Statistics]) -> dict[str, float]:
    """Return J&F, and mean, recall and decay of J and F in percent, means over objects."""
    out: dict[str, float] = {}
    for name, every in (("J", list(regions)), ("F", list(contours))):
        out[name] = 100 * float(np.mean([s.mean for s in every]))
        out[f"{name}-recall"] = 100 * float(np.mean([s.recall for s in every]))
        out[f"{name}-decay"] = 100 * float(np.mean([s.decay for s in every]))
    return {"J&F": (out["J"] + out["F"]) / 2} | out


def _around(mask: np.ndarray, margin: int) -> tuple[slice, slice]:
    """The smallest window with all of a mask's pixels and a margin."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (
        slice(max(rows[0] - margin, 0), rows[-1] + margin + 1),
        slice(max(columns[0] - margin, 0), columns[-1] + margin + 1),
    )
