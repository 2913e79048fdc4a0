"""Scenes resized, mirrored and cut with their boxes and masks, as the detection protocols train on them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as rle

from dense_ssl.evaluation.coco import decode_mask
from dense_ssl.evaluation.detection.data import Scene, Thing
from dense_ssl.evaluation.detection.protocols import DetectConfig
from dense_ssl.evaluation.segmentation.augment import fitted, resized, resized_labels
from dense_ssl.evaluation.trained.draws import Draws
from dense_ssl.pictures import open_image


@dataclass(frozen=True, slots=True)
class Example:
    """An image as the network sees it, and what is in it."""

    image: np.ndarray  # uint8 [h, w, 3]
    boxes: np.ndarray  # float32 [n, 4] of x0, y0, x1, y1 in its pixels
    labels: np.ndarray  # int64 [n], from 1
    masks: np.ndarray | None  # uint8 [n, h, w]


@dataclass(frozen=True, slots=True)
class _Geometry:
    """From the file's pixels to the example's: scaled, then cut, then scaled again, then mirrored."""

    size: tuple[int, int]  # of the file
    scaled: tuple[int, int]
    window: tuple[int, int, int, int]  # top, left, height, width of the cut
    final: tuple[int, int]
    mirrored: bool

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes [n, 4] within the example; what lies outside has no size."""
        (height, width), (top, left, rows, columns) = self.size, self.window
        boxes = boxes * np.tile([self.scaled[1] / width, self.scaled[0] / height], 2)
        boxes = np.clip(boxes - np.tile([left, top], 2), 0, np.tile([columns, rows], 2))
        boxes = boxes * np.tile([self.final[1] / columns, self.final[0] / rows], 2)
        if self.mirrored:
            boxes = boxes[:, [2, 1, 0, 3]] * (-1, 1, -1, 1) + (self.final[1], 0, self.final[1], 0)
        return boxes

    def image(self, image: np.ndarray, how: str) -> np.ndarray:
        """The pixels of the example."""
        top, left, rows, columns = self.window
        image = resized(image, self.scaled, how)[top : top + rows, left : left + columns]  # pyright: ignore
        image = resized(image, self.final, how)  # pyright: ignore[reportArgumentType]
        return np.ascontiguousarray(image[:, ::-1] if self.mirrored else image)

    def mask(self, thing: Thing) -> np.ndarray:
        """The object in the example, uint8 [h, w]: polygons are scaled, run lengths sampled."""
        (height, width), (top, left, rows, columns) = self.size, self.window
        if isinstance(thing.outline, list):
            factor = (self.scaled[1] / width, self.scaled[0] / height)
            again = (self.final[1] / columns, self.final[0] / rows)
            outlines = []
            for polygon in thing.outline:
                points = (np.reshape(polygon, (-1, 2)) * factor - (left, top)) * again
                outlines.append(points.ravel().tolist())
            # COCO's own rasteriser, which takes points outside the image as they are.
            mask = rle.decode(rle.merge(rle.frPyObjects(outlines, *self.final)))
        else:
            assert thing.outline is not None
            whole = decode_mask(thing.outline, height, width).astype(np.uint8)
            cut = resized_labels(whole, self.scaled)[top : top + rows, left : left + columns]
            mask = resized_labels(cut, self.final)
        return mask[:, ::-1] if self.mirrored else mask


def read_image(scene: Scene) -> np.ndarray:
    """Return the pixels, uint8 [H, W, 3].

    Raises:
        OSError, ValueError: they cannot be read, or are not of the size that is said.
    """
    with open_image(scene.path) as opened:
        pixels = np.array(opened.convert("RGB"))
    if pixels.shape[:2] != (scene.height, scene.width):
        raise ValueError(f"{pixels.shape[:2]} px, annotated as {(scene.height, scene.width)}")
    return pixels


class TrainingExamples:
    """Makes the example of a scene by a protocol's draws."""

    def __init__(self, config: DetectConfig) -> None:
        self._config = config

    def __call__(self, scene: Scene, draws: Draws) -> Example:
        """Return the example of a scene; all its objects are learnt."""
        config = self._config
        pixels = read_image(scene)
        geometry = drawn_geometry((scene.height, scene.width), config, draws)
        image = geometry.image(pixels, config.resampling)
        boxes = geometry.boxes(np.array([thing.box for thing in scene.things], np.float64))
        kept = np.all(boxes[:, 2:] - boxes[:, :2] > 1e-3, axis=1)  # what the cut left
        things = [thing for thing, there in zip(scene.things, kept.tolist()) if there]
        masks = None
        if config.masks:
            masks = np.zeros((len(things), *geometry.final), np.uint8)
            for row, thing in enumerate(things):
                masks[row] = geometry.mask(thing)
        labels = np.array([thing.label for thing in things], np.int64)
        return Example(image, boxes[kept].astype(np.float32), labels, masks)


def drawn_geometry(size: tuple[int, int], config: DetectConfig, draws: Draws) -> _Geometry:
    """Return how an image of (height, width) is changed in training.

    Mirrored every other time; then a shorter side of the list, the longer one at most `longest`. With
    `crop`, every other image is first brought to one of the shorter sides `crop_short` and cut to a
    window of random sides (Carion et al. 2020, as iBOT and UDI train).
    """
    mirrored = draws.chance(0.5)
    scaled, window = size, (0, 0, *size)
    if config.crop is not None and draws.chance(0.5):
        scaled = fitted(size, (float("inf"), _one(config.crop_short, draws)))
        low, high = config.crop
        rows, columns = (
            min(side, low) + draws.below(min(side, high) - min(side, low) + 1) for side in scaled
        )
        top, left = (draws.below(s - w + 1) for s, w in zip(scaled, (rows, columns)))
        window = (top, left, rows, columns)
    final = fitted(window[2:], (config.longest, _one(config.short, draws)))
    return _Geometry(size, scaled, window, final, mirrored)


def at_test_size(image: np.ndarray, config: DetectConfig) -> np.ndarray:
    """Return an image uint8 [H, W, 3] at the size it is tested at."""
    size = fitted(image.shape[:2], (config.longest, config.test_short))  # pyright: ignore
    return resized(image, size, config.resampling)


def _one(values: Sequence[int], draws: Draws) -> int:
    return values[draws.below(len(values))]
