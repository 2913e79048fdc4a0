"""Label maps drawn over their images, for the pictures of dense protocols."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from dense_ssl.evaluation.segmentation.data import VOID, LabelledImage
from dense_ssl.pictures import open_image
from dense_ssl.visualise.sheets import beside, crop_colour, stacked, tiles_sheet

_TILE_PX, _SWATCH_PX = 220, 110
_STRENGTH = 0.55  # of the tint
_INSIDE = 2  # pixels of an outline, to either side


def label_colours(count: int) -> np.ndarray:
    """Return a colour for each of `count` labels from 1 on, uint8 [count + 1, 3]; that of 0 is black."""
    colours = [crop_colour(number, count) for number in range(count)]
    return np.array([(0, 0, 0), *colours], np.uint8)


def tinted(image: np.ndarray, labels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Return an image uint8 [H, W, 3] with labels [H, W] tinted and outlined; 0 and VOID stay clear.

    labels of another size are enlarged by nearest neighbour.
    """
    if labels.shape != image.shape[:2]:
        size = (image.shape[1], image.shape[0])
        labels = np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
    shown = (labels > 0) & (labels != VOID)
    colour = colours[np.where(shown, labels, 0)].astype(np.float64)
    mixed = np.where(
        shown[..., None], (1 - _STRENGTH) * image + _STRENGTH * colour, image.astype(np.float64)
    )
    mixed[_edges(labels) & shown] = 255
    return mixed.round().astype(np.uint8)


def beside_truth(
    images: Sequence[np.ndarray],
    said: Sequence[np.ndarray],
    truth: Sequence[np.ndarray],
    colours: np.ndarray,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the images tinted by what was said, and the same tinted by the truth."""
    rows = [
        [tinted(image, labels, colours) for image, labels in zip(images, maps, strict=True)]
        for maps in (said, truth)
    ]
    return rows[0], rows[1]


def class_sheet(
    rows: Sequence[tuple[LabelledImage, np.ndarray, np.ndarray]], classes: Sequence[str], title: str
) -> Image.Image:
    """Return images, with predicted and true classes [H, W] tinted, and the colours' names.

    A class called background is left clear.
    """
    clear = classes[0] == "background"
    first = int(not clear)  # the number that the first class is drawn as
    colours = label_colours(len(classes) - int(clear))
    triples = []
    occurring: set[int] = set()
    for image, said, truth in rows:
        with open_image(image.path) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        maps = [np.where(labels == VOID, VOID, labels + first) for labels in (said, truth)]
        maps = [labels.astype(np.uint8) for labels in maps]
        occurring.update(*(np.unique(labels).tolist() for labels in maps))
        tiles = [pixels, *(tinted(pixels, labels, colours) for labels in maps)]
        triples.append(tiles_sheet([image.path.stem[:24], "predicted", "truth"], tiles, _TILE_PX))
    swatches = [
        (classes[number - first], np.full((12, 36, 3), colours[number], np.uint8))
        for number in sorted(occurring - {0, VOID})
    ]
    legend = tiles_sheet([name for name, _ in swatches], [tile for _, tile in swatches], _SWATCH_PX)
    pairs = [beside(triples[i : i + 2]) for i in range(0, len(triples), 2)]
    return stacked([*pairs, legend], title)


def _edges(labels: np.ndarray) -> np.ndarray:
    """Pixels near another label, bool [H, W]."""
    edges = np.zeros(labels.shape, bool)
    for step in range(1, _INSIDE + 1):
        down, across = labels[step:] != labels[:-step], labels[:, step:] != labels[:, :-step]
        edges[step:] |= down
        edges[:-step] |= down
        edges[:, step:] |= across
        edges[:, :-step] |= across
    return edges
