"""Detections drawn over their images, beside the truth."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as rle

from dense_ssl.evaluation.coco import decode_mask
from dense_ssl.evaluation.detection.data import Scene
from dense_ssl.evaluation.detection.metrics import Found
from dense_ssl.pictures import open_image
from dense_ssl.visualise.sheets import BACKGROUND, INK, beside, crop_colour, stacked, tiles_sheet

_TILE_PX = 360  # longer side of an image
_SHOWN = 12  # detections at most, best first
_STRENGTH = 0.45  # of a mask's tint
_LEAST = 0.3  # score that is shown, where any is that high


def detection_sheet(
    rows: Sequence[tuple[Scene, Found]], classes: Sequence[str], title: str
) -> Image.Image:
    """Return images with their detections, scores and class names, each beside its truth.

    Crowds and difficult objects are grey in the truth, their names in brackets.
    """
    parts = []
    for scene, found in rows:
        with open_image(scene.path) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        shown = np.argsort(-found.scores, kind="stable")
        good = shown[found.scores[shown] >= _LEAST]
        shown = (good if len(good) else shown[:3])[:_SHOWN]
        said = [
            (
                found.boxes[at],
                f"{classes[int(found.labels[at]) - 1]} {100 * found.scores[at]:.0f}",
                int(found.labels[at]),
                _mask(found, at),
            )
            for at in shown[::-1].tolist()  # the best on top
        ]
        true = []
        for thing in sorted(scene.things, key=lambda thing: -thing.area):
            mask = None
            if thing.outline is not None:
                mask = decode_mask(thing.outline, scene.height, scene.width)
            label = 0 if thing.ignored else thing.label
            name = f"({classes[thing.label - 1]})" if thing.ignored else classes[thing.label - 1]
            true.append((np.array(thing.box), name, label, mask))
        tiles = [_drawn(pixels, things, len(classes)) for things in (said, true)]
        count = "nothing detected"
        if len(found.scores):
            count = f"{len(found.scores)} detected, best score {100 * found.scores.max():.0f}"
        names = [f"{scene.path.stem[:24]}: {count}", "truth"]
        parts.append(tiles_sheet(names, tiles, _TILE_PX))
    return stacked([beside(parts[at : at + 2]) for at in range(0, len(parts), 2)], title)


def _mask(found: Found, at: int) -> np.ndarray | None:
    return None if found.masks is None else rle.decode(found.masks[at]).astype(bool)  # pyright: ignore


def _drawn(
    pixels: np.ndarray,
    things: Sequence[tuple[np.ndarray, str, int, np.ndarray | None]],
    classes: int,
) -> np.ndarray:
    """The image at the size of a tile, with boxes, names and masks."""
    scale = _TILE_PX / max(pixels.shape[:2])
    tinted = pixels.astype(np.float64)
    for _, _, label, mask in things:
        if mask is not None:
            colour = np.array(_colour(label, classes))
            tinted[mask] = (1 - _STRENGTH) * tinted[mask] + _STRENGTH * colour
    size = (max(round(scale * pixels.shape[1]), 1), max(round(scale * pixels.shape[0]), 1))
    image = Image.fromarray(tinted.round().astype(np.uint8)).resize(size, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(11)
    for box, _, label, _ in things:
        x0, y0, x1, y1 = (float(side) * scale for side in box)
        x1, y1 = max(x1 - 1, x0 + 1), max(y1 - 1, y0 + 1)
        draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=BACKGROUND)
        draw.rectangle((x0, y0, x1, y1), outline=_colour(label, classes), width=2)
    for box, name, label, _ in things:  # above all boxes
        x, y = float(box[0]) * scale, float(box[1]) * scale
        width = font.getlength(name) + 6
        x, y = min(max(x, 0), max(size[0] - width, 0)), min(max(y, 0), max(size[1] - 15, 0))
        colour = _colour(label, classes)
        draw.rectangle((x, y, x + width, y + 14), fill=colour)
        bright = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] > 140
        draw.text((x + 3, y + 1), name, INK if bright else BACKGROUND, font=font)
    return np.asarray(image)


def _colour(label: int, classes: int) -> tuple[int, int, int]:
    """Of a class; grey of what counts neither way."""
    return (150, 150, 150) if label == 0 else crop_colour(label - 1, classes)
