"""DAVIS-2017 by label propagation: the first frame's masks carried along a video by frozen cells.

Two published settings. `dino` (DINO, iBOT, SERE, UDI; ibot.md 8.8): shorter side 480 and the other a
multiple of 64, the first and seven recent frames, a square neighbourhood of 12 cells, the five most similar,
temperature 0.1. `revisiting` (Jabri et al. 2020, Van Gansbeke et al. 2021; revisiting.md 7.4): native size,
the first frame whole and 20 recent ones, a disc of 12 cells, ten, 0.05. ViTs give their last patch tokens;
ResNets in both settings the third stage at stride 8. J and F by the official rules: per object, first and
last frame left out, mean over objects.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dense_ssl.augment import MEAN, STD
from dense_ssl.backbones import Backbone, ResNetBackbone
from dense_ssl.config import Config as BaseConfig
from dense_ssl.evaluation.davis_data import DavisData, Video, open_davis, read_frame
from dense_ssl.evaluation.davis_metrics import (
    contour_accuracy,
    region_similarity,
    scores,
    statistics,
)
from dense_ssl.evaluation.features import FeatureCache, check_size, content_key, in_order
from dense_ssl.evaluation.finer import ThirdStage
from dense_ssl.evaluation.label_propagation import DINO, REVISITING, Rules, propagate
from dense_ssl.evaluation.omissions import require_some

_DINO_STD = (0.228, 0.224, 0.225)  # as published; everywhere else red has 0.229
_LONG_MULTIPLE = 64  # of the longer side in pixels, with `dino`


class Config(BaseConfig):
    """Settings of the protocol; what is None is as published."""

    settings: Literal["dino", "revisiting"] = "dino"
    split: str = "val"
    resolution: str = "480p"  # folder below JPEGImages and Annotations
    size: Annotated[int, Field(ge=16)] | None = None  # shorter side of the input in pixels
    recent: Annotated[int, Field(ge=1)] | None = None  # frames before the target, besides the first
    radius: Annotated[int, Field(ge=1)] | None = None  # of the neighbourhood in cells
    topk: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(gt=0)] | None = None

    def rules(self) -> Rules:
        """Return the published rules of these settings, with what is given in their place."""
        given = self.model_dump(include={"recent", "radius", "topk", "temperature"})
        published = DINO if self.settings == "dino" else REVISITING
        return replace(published, **{k: v for k, v in given.items() if v is not None})


@dataclass(frozen=True, slots=True)
class Encoder:
    """What maps an image to the cells that this protocol compares."""

    encode: Callable[[Tensor], Tensor]  # normalised [1, 3, H, W] to [D, ceil(H / s), ceil(W / s)]
    stride: int  # s, in pixels
    whole: bool  # sides must be multiples of the stride


def load(path: Path, config: Config) -> DavisData:
    """Return the sequences at `path`, in DAVIS-2017's layout.

    Raises:
        UserError: the layout is another, or no sequence is usable.
    """
    protocol = f"davis-{config.settings}/v1"
    return open_davis(path, config.split, config.resolution, protocol)


def run(
    backbone: Backbone, data: DavisData, config: Config, cache: FeatureCache | None = None
) -> dict[str, float]:
    """Return `J&F`, `J`, `F` and the recall and decay of both in percent.

    `chance/...` is the first frame's mask in every frame. With a cache, finished sequences are kept: what
    was interrupted goes on with the next one.

    Raises:
        UserError: no sequence can be read, or the network cannot take the input's size.
    """
    encoder = encoder_of(backbone)
    regions, contours, still = [], [], ([], [])
    total = sum(len(video.frames) for video in data.videos)
    device = next(backbone.parameters()).device
    settings = config.model_dump_json()
    with tqdm(total=total, desc="frames", unit="img", leave=False, disable=None) as progress:
        for video in data.videos:
            key = content_key(data.protocol, settings, data.content, video.name, device.type)
            file = cache.path(key).with_suffix(".json") if cache else None
            found = _stored(file)
            if found is None:
                try:
                    found = _score(video, masks_of(encoder, video, config, device), progress)
                except (OSError, ValueError, SyntaxError) as error:
                    reason = f"{config.split}: sequence not readable"
                    data.omitted.add(reason, f"{video.name}: {error}")
                    continue
                _keep(file, found)
            else:
                progress.update(len(video.frames))
            for j, f, j_still, f_still in found:
                regions.append(statistics(j))
                contours.append(statistics(f))
                still[0].append(statistics(j_still))
                still[1].append(statistics(f_still))
    require_some(regions, config.split, data.omitted)
    chance = {f"chance/{name}": value for name, value in scores(*still).items()}
    return scores(regions, contours) | chance


def encoder_of(backbone: Backbone) -> Encoder:
    """Return a ResNet's third stage at stride 8, or any other network's dense cells.

    Raises:
        UserError: a ResNet that cannot be run at stride 8.
    """
    if isinstance(backbone, ResNetBackbone):
        trunk = ThirdStage(backbone).eval()
        return Encoder(lambda images: trunk(images)[0], ThirdStage.stride, whole=False)

    def patches(images: Tensor) -> Tensor:
        features = backbone(images)
        return features.dense[0].T.unflatten(1, features.grid)

    return Encoder(patches, backbone.stride, whole=True)


def masks_of(
    encoder: Encoder, video: Video, config: Config, device: torch.device
) -> Iterator[np.ndarray]:
    """Yield the predicted object numbers of every frame, uint8 [H, W]; the first ones as given.

    Raises:
        OSError, ValueError, SyntaxError: a frame or the first mask cannot be read.
        UserError: the network cannot take the input's size.
    """
    size = input_size(video.size, encoder, config)
    grid = (math.ceil(size[0] / encoder.stride), math.ceil(size[1] / encoder.stride))
    given = video.truth(0)
    dino = config.settings == "dino"
    first = _first_labels(given, grid, nearest=dino).to(device)

    def features() -> Iterator[Tensor]:
        frames = in_order(lambda path: read_frame(path, video.size), video.frames, ahead=8)
        with torch.inference_mode():
            for frame in frames:
                yield encoder.encode(_normalised(frame.to(device), size, dino)).float()

    for number, labels in enumerate(propagate(features(), first, config.rules())):
        if not number:
            yield given
            continue
        yield _painted(labels, size, video.size) if dino else _argmax(labels, video.size)


def input_size(native: tuple[int, int], encoder: Encoder, config: Config) -> tuple[int, int]:
    """Return height and width of the network's input for frames of a native size.

    Raises:
        UserError: a side is not a multiple of a ViT's patch.
    """
    stride, shorter, longer = encoder.stride, min(native), max(native)
    side = config.size or (480 if config.settings == "dino" else shorter)
    if config.settings == "dino":
        multiple = _LONG_MULTIPLE if _LONG_MULTIPLE % stride == 0 else stride
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


Series = tuple[list[float], list[float], list[float], list[float]]  # J, F; both of the still mask


def _score(video: Video, predicted: Iterator[np.ndarray], progress: tqdm) -> list[Series]:
    """Values of every object's frames but the first and the last."""
    found: list[Series] = [([], [], [], []) for _ in video.objects]
    first = np.zeros(video.size, np.uint8)
    for number, said in enumerate(predicted):
        progress.update()
        if not number:
            first = said
        if number in (0, len(video.frames) - 1):
            continue
        truth = video.truth(number)
        for values, one in zip(found, video.objects):
            masks = truth == one, said == one, first == one
            values[0].append(region_similarity(masks[0], masks[1]))
            values[1].append(contour_accuracy(masks[0], masks[1]))
            values[2].append(region_similarity(masks[0], masks[2]))
            values[3].append(contour_accuracy(masks[0], masks[2]))
    return found


def _stored(file: Path | None) -> list[Series] | None:
    if file is None or not file.is_file():
        return None
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None  # computed again


def _keep(file: Path | None, found: Sequence[Series]) -> None:
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(f".{os.getpid()}.part")
    aside.write_text(json.dumps(found))
    aside.replace(file)
