"""Top-1 and top-5, what chance would reach, and the confusion matrix as a picture."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_INK, _SOFT, _BACKGROUND = (28, 31, 36), (120, 128, 138), (255, 255, 255)
_NONE, _ALL = np.array([247, 249, 251]), np.array([20, 62, 130])  # colours of shares 0 and 1
_SHEET_PX, _NAMED = 720, 40  # side of the matrix; more classes than this get no names


def accuracies(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Return `top1` and `top5` in percent of scores [n, C] for labels int64 [n].

    With fewer than five classes, top5 counts as many as there are.
    """
    best = scores.topk(min(5, scores.shape[1]), dim=1).indices
    hits = best == labels[:, None]
    return {
        "top1": 100 * hits[:, 0].float().mean().item(),
        "top5": 100 * hits.any(1).float().mean().item(),
    }


def chance(train_labels: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """Return `chance/top1` and `chance/top5`: always answering the most frequent training classes."""
    frequencies = torch.bincount(train_labels, minlength=classes).float().expand(len(labels), -1)
    return {f"chance/{name}": value for name, value in accuracies(frequencies, labels).items()}


def confusion_sheet(
    labels: Tensor, predicted: Tensor, names: Sequence[str], title: str
) -> Image.Image:
    """Return the confusion matrix: a row per true class, in shares of its images; darker is more.

    labels and predicted int64 [n]. A class without images has an empty row.
    """
    classes = len(names)
    cells = labels.cpu() * classes + predicted.cpu()
    counts = torch.bincount(cells, minlength=classes * classes).view(classes, classes).numpy()
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
