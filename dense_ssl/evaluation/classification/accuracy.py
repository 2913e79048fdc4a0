"""Top-1 and top-5, what chance would reach, and the confusion matrix as a picture; without torch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_INK, _SOFT, _BACKGROUND = (28, 31, 36), (120, 128, 138), (255, 255, 255)
_NONE, _ALL = np.array([247, 249, 251]), np.array([20, 62, 130])  # colours of shares 0 and 1
_SHEET_PX, _NAMED = 720, 40  # side of the matrix; more classes than this get no names


def accuracies(scores: Any, labels: Any) -> dict[str, float]:
    """Return `top1` and `top5` in percent of scores [n, C] for labels [n]; arrays, or tensors on the CPU.

    Of equal scores the first class counts as the higher one, as argmax takes it. With fewer than five
    classes, top5 counts as many as there are.
    """
    return hits(places(np.asarray(scores), np.asarray(labels)))


def places(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return how many classes stand before the true one, int64 [n]; scores that are NaN stand before all."""
    own = scores[np.arange(len(labels)), labels][:, None]
    before = ~(scores <= own)
    before |= (scores == own) & (np.arange(scores.shape[1]) < labels[:, None])
    return before.sum(1)


def hits(found: np.ndarray) -> dict[str, float]:
    """Return `top1` and `top5` in percent of `places`."""
    return {f"top{count}": 100 * float((found < count).mean()) for count in (1, 5)}


def frequencies(labels: Any, classes: int) -> np.ndarray:
    """Return how many of labels [n] are of each class, int64 [classes]."""
    return np.bincount(np.asarray(labels).astype(np.int64), minlength=classes)


def chance(train_labels: Any, labels: Any, classes: int) -> dict[str, float]:
    """Return `chance/top1` and `chance/top5`: always answering the most frequent training classes."""
    return chance_of(frequencies(train_labels, classes), labels)


def chance_of(counts: np.ndarray, labels: Any) -> dict[str, float]:
    """Return the same from the training images of each class, int [C]."""
    found = places(np.broadcast_to(counts, (len(labels), len(counts))), np.asarray(labels))
    return {f"chance/{name}": value for name, value in hits(found).items()}


def confusion_sheet(labels: Any, predicted: Any, names: Sequence[str], title: str) -> Image.Image:
    """Return the confusion matrix: a row per true class, in shares of its images; darker is more.

    labels and predicted: int [n], arrays or tensors on the CPU. A class without images has an empty row.
    """
    classes = len(names)
    cells = np.asarray(labels).astype(np.int64) * classes + np.asarray(predicted)
    counts = frequencies(cells, classes * classes).reshape(classes, classes)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    # Square roots, so that rare mistakes can be seen at all.
    colours = _NONE + np.sqrt(shares)[..., None] * (_ALL - _NONE)
    side = max(1, min(28, _SHEET_PX // classes))
    matrix = Image.fromarray(colours.round().astype(np.uint8)).resize(
        (classes * side, classes * side), Image.Resampling.NEAREST
    )
    named = classes <= _NAMED
    small, large = ImageFont.load_default(11), ImageFont.load_default(15)
    margin = round(max(small.getlength(name) for name in names)) + 10 if named else 14
    width = max(margin + matrix.width + 60, round(large.getlength(title)) + 28)
    top = 62
    sheet = Image.new("RGB", (width, top + matrix.height + 40), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((14, 10), title, _INK, font=large)
    note = "rows: truth, columns: prediction, in the same order"
    draw.text((14, 34), note, _SOFT, font=small)
    sheet.paste(matrix, (margin, top))
    draw.rectangle((margin - 1, top - 1, margin + matrix.width, top + matrix.height), outline=_SOFT)
    if named:
        for row, name in enumerate(names):
            y = top + row * side + side // 2 - 7
            draw.text((margin - 6 - small.getlength(name), y), name, _INK, font=small)
            if counts[row].any():
                share = f"{100 * shares[row, row]:.0f} %"
                draw.text((margin + matrix.width + 6, y), share, _SOFT, font=small)
        draw.text((margin, top + matrix.height + 8), "right: share found", _SOFT, font=small)
    return sheet
