"""Predicted masks of a video: frames to cells, cells to labels, labels to pixels, as published."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dense_ssl.augment import MEAN, STD
from dense_ssl.backbones import Backbone, ResNetBackbone
from dense_ssl.evaluation.features import check_size, in_order
from dense_ssl.evaluation.matching.davis_data import Video, read_frame
from dense_ssl.evaluation.matching.finer import ThirdStage
from dense_ssl.evaluation.matching.label_propagation import Rules, propagate

_DINO_STD = (0.228, 0.224, 0.225)  # as published; everywhere else red has 0.229
_DINO_SHORTER = 480  # side of the input in pixels
_DINO_MULTIPLE = 64  # of the longer side


@dataclass(frozen=True, slots=True)
class Recipe:
    """One of the published ways from frames to masks."""

    name: Literal["dino", "revisiting"]
    shorter: int | None  # side of the input in pixels; None: as published
    rules: Rules


@dataclass(frozen=True, slots=True)
class Encoder:
    """What maps an image to the cells that this protocol compares."""

    encode: Callable[[Tensor], Tensor]  # normalised [1, 3, H, W] to [D, ceil(H / s), ceil(W / s)]
    stride: int  # s, in pixels
    whole: bool  # sides must be multiples of the stride


def encoder_of(backbone: Backbone) -> Encoder:
    """Return a ResNet's third stage at stride 8, or any other network's dense cells.

    Raises:
        UserError: a ResNet that cannot be run at stride 8.
    """
    if isinstance(backbone, ResNetBackbone):
        trunk = ThirdStage(backbone)
        return Encoder(lambda images: trunk(images)[0], ThirdStage.stride, whole=False)

    def patches(images: Tensor) -> Tensor:
        features = backbone(images)
        return features.dense[0].T.unflatten(1, features.grid)

    return Encoder(patches, backbone.stride, whole=True)


def masks_of(
    encoder: Encoder, video: Video, recipe: Recipe, device: torch.device
) -> Iterator[np.ndarray]:
    """Yield the predicted object numbers of every frame, uint8 [H, W]; the first ones as given.

    Raises:
        OSError, ValueError, SyntaxError: a frame or the first mask cannot be read.
        UserError: the network cannot take the input's size.
    """
    size = input_size(video.size, encoder, recipe)
    grid = (math.ceil(size[0] / encoder.stride), math.ceil(size[1] / encoder.stride))
    given = video.truth(0)
    dino = recipe.name == "dino"
    first = _first_labels(given, grid, nearest=dino).to(device)

    def features() -> Iterator[Tensor]:
        frames = in_order(lambda path: read_frame(path, video.size), video.frames, ahead=8)
        with torch.inference_mode():
            for frame in frames:
                yield encoder.encode(_normalised(frame.to(device), size, dino)).float()

    for number, labels in enumerate(propagate(features(), first, recipe.rules)):
        if not number:
            yield given
            continue
        yield _painted(labels, size, video.size) if dino else _argmax(labels, video.size)


def input_size(native: tuple[int, int], encoder: Encoder, recipe: Recipe) -> tuple[int, int]:
    """Return height and width of the network's input for frames of a native size.

    Raises:
        UserError: a side is not a multiple of a ViT's patch.
    """
    stride, shorter, longer = encoder.stride, min(native), max(native)
    side = recipe.shorter or (_DINO_SHORTER if recipe.name == "dino" else shorter)
    if recipe.name == "dino":
        multiple = _DINO_MULTIPLE if _DINO_MULTIPLE % stride == 0 else stride
        other = max(int(side * longer / shorter) // multiple, 1) * multiple
    else:
        other = longer if side == shorter else round(side * longer / shorter)
    if encoder.whole:
        check_size((side, other), stride)
    return (side, other) if native[0] <= native[1] else (other, side)


def _first_labels(mask: np.ndarray, grid: tuple[int, int], *, nearest: bool) -> Tensor:
    """One-hot labels of a mask for cells, float [C, h, w]; C counts from 0 to the last object."""
    if nearest:
        small = Image.fromarray(mask).resize((grid[1], grid[0]), Image.Resampling.NEAREST)
        mask = np.asarray(small)
    classes = int(mask.max()) + 1
    one_hot = F.one_hot(torch.from_numpy(mask.astype(np.int64)), classes)
    maps = one_hot.permute(2, 0, 1).float()
    return maps if nearest else _resized(maps, grid)


def _normalised(frame: Tensor, size: tuple[int, int], dino: bool) -> Tensor:
    """A frame uint8 [3, H, W] as the network's input [1, 3, *size], resized without antialiasing."""
    pixels = frame.float()
    if tuple(frame.shape[1:]) != size:
        pixels = _resized(pixels, size).round()  # published codes resize integers
    std = _DINO_STD if dino else STD
    mean, std = (torch.tensor(v, device=frame.device).view(3, 1, 1) for v in (MEAN, std))
    return ((pixels / 255 - mean) / std)[None]


def _painted(labels: Tensor, size: tuple[int, int], native: tuple[int, int]) -> np.ndarray:
    """Object numbers uint8 [*native]: every class stretched to 0..1, the largest at the input's size."""
    maps = _resized(labels, size)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    stretched = (maps - low) / (high - low).clamp(min=1e-12)
    best = torch.where(high > 0, stretched, maps).argmax(0).to(torch.uint8).cpu().numpy()
    return np.asarray(
        Image.fromarray(best).resize((native[1], native[0]), Image.Resampling.NEAREST)
    )


def _argmax(labels: Tensor, native: tuple[int, int]) -> np.ndarray:
    return _resized(labels, native).argmax(0).to(torch.uint8).cpu().numpy()


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]
