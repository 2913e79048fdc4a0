"""Semantic segmentation by a linear probe on frozen cells, scored at full label resolution.

Every cell's features are standardised with the mean and deviation of the training cells (a BatchNorm
without its affine part), one linear layer gives class scores per cell, bilinear upsampling takes them to
the pixels. Scores and interpolation are both linear, so the layer is applied before upsampling. Trained
by AdamW on cross-entropy with a label per 8 x 8 input pixels; metrics are over the whole
validation split, every label map at its own size, void left out.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from dense_ssl import checkpoint
from dense_ssl.backbones import Backbone, Features
from dense_ssl.config import Config as BaseConfig
from dense_ssl.config import UserError
from dense_ssl.evaluation.choices import Size
from dense_ssl.evaluation.features import (
    Extracted,
    FeatureCache,
    check_size,
    content_key,
    extract,
    in_order,
    thinned,
)
from dense_ssl.evaluation.metrics import confusion, scores_beside_chance
from dense_ssl.evaluation.protocol_settings import marked
from dense_ssl.evaluation.segmentation.data import (
    PROTOCOL,
    VOID,
    LabelledImage,
    Labels,
    SegmentData,
    open_segmentation,
    read_image,
    read_labels,
)
from dense_ssl.evaluation.tinted import class_sheet

_DRAWN = 4  # images in the picture
_LABEL_STRIDE = 8  # training labels: one per this many input pixels


class Config(BaseConfig):
    """Settings of the protocol."""

    size: Size = (256, 256)
    # (height, width) of the input in pixels; `size=256` and `size=192,256` are understood
    labels: Labels = "category"  # COCO only; 80 classes need many images
    steps: Annotated[int, Field(ge=1)] = 1000
    batch_size: Annotated[int, Field(ge=1)] = 16
    lr: Annotated[float, Field(gt=0)] = 3e-2  # cosine to zero
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    seed: int = 0
    extract_batch: Annotated[int, Field(ge=1)] = 32
    max_train: Annotated[int, Field(ge=1)] | None = 5000  # features are held in memory
    max_val: Annotated[int, Field(ge=1)] | None = 5000


def load(path: Path, config: Config) -> SegmentData:
    """Return the data at `path`, in COCO's layout or one that `segment_layouts` lists.

    Raises:
        UserError: it is none of them, or nothing in it is usable.
    """
    return open_segmentation(path, config.labels, config.max_train, config.max_val)


def run(
    backbone: Backbone, data: SegmentData, config: Config, cache: FeatureCache | None = None
) -> dict[str, float]:
    """Return `mIoU`, `aAcc`, `mAcc` in percent, and `chance/...`: the commonest class everywhere."""
    probe, commonest = _fitted(backbone, data, config, cache)
    classes = len(data.classes)
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    for _, said, truth in _answers(backbone, probe, data, config, cache):
        matrix += confusion(truth, said, classes)
    if not matrix.any():
        raise UserError("val: every pixel is void")
    return scores_beside_chance(matrix, commonest)


def pictures(
    backbone: Backbone, data: SegmentData, config: Config, cache: FeatureCache | None = None
) -> dict[str, Image.Image]:
    """Return predictions beside the truth for a few images; features come from the cache."""
    probe, _ = _fitted(backbone, data, config, cache)
    rows = [
        (image, said.to(torch.uint8).numpy(), truth.numpy())
        for image, said, truth in _answers(backbone, probe, data, config, cache, limit=_DRAWN)
    ]
    return {
        "predictions": class_sheet(rows, data.classes, marked(data.protocol, "segment", config))
    }


def _fitted(
    backbone: Backbone, data: SegmentData, config: Config, cache: FeatureCache | None
) -> tuple["Probe", int]:
    """The trained probe, kept beside the features, and the class of most training pixels."""
    check_size(config.size, backbone.stride)
    device = next(backbone.parameters()).device
    key = content_key("probe", PROTOCOL, data.content, config.model_dump_json(), device.type)
    folder = cache.job(key) if cache else None
    grid = (config.size[0] // backbone.stride, config.size[1] // backbone.stride)
    saved = checkpoint.load_newest(folder) if folder else None
    if saved is not None:
        return Probe(grid, *(part.to(device) for part in saved["probe"])), saved["commonest"]
    train = _cells(backbone, data, data.train, "train", config, cache)
    rows, columns = (side // _LABEL_STRIDE for side in config.size)
    kept = [data.train[i] for i in train.kept.tolist()]

    def small_labels(image: LabelledImage) -> Tensor:
        return torch.from_numpy(read_labels(image, rows, columns))

    labels = torch.stack(list(in_order(small_labels, kept)))
    classes = len(data.classes)
    frequencies = torch.bincount(labels.flatten().long(), minlength=256)[:classes]
    if not frequencies.any():
        raise UserError("train: every pixel is void")
    probe = fit_probe(train.features, labels, grid, classes, config, device)
    commonest = int(frequencies.argmax())
    if folder:
        state = {"probe": [probe.mean, probe.scale, probe.weight, probe.bias]}
        checkpoint.save(folder, {"step": config.steps, "commonest": commonest, **state}, keep=1)
    return probe, commonest


def _answers(
    backbone: Backbone,
    probe: "Probe",
    data: SegmentData,
    config: Config,
    cache: FeatureCache | None,
    limit: int | None = None,
) -> Iterator[tuple[LabelledImage, Tensor, Tensor]]:
    """Validation images, at most `limit`, with their predicted and their true classes [H, W]."""
    device = next(backbone.parameters()).device
    val = _cells(backbone, data, data.val, "val", config, cache)
    chosen = thinned(range(len(val.kept)), limit)
    images = [data.val[int(val.kept[row])] for row in chosen]
    truths = in_order(lambda image: torch.from_numpy(image.read_labels()), images, 16)
    for row, image, truth in zip(chosen, images, truths):
        with torch.inference_mode(), _threads_for(0):
            scores = probe.scores(val.features[row][None].to(device), truth.shape)
            said = scores[0].max(0).indices.cpu()
        yield image, said, truth


@dataclass(frozen=True, slots=True)
class Probe:
    """A linear layer on standardised cells."""

    grid: tuple[int, int]
    mean: Tensor  # [D] of the training cells
    scale: Tensor  # [D] 1 / their deviation
    weight: Tensor  # [C, D]
    bias: Tensor  # [C]

    def scores(self, cells: Tensor, size: Sequence[int]) -> Tensor:
        """Return class scores [B, C, *size] of cells [B, N, D]."""
        scores = (cells.float() - self.mean) * self.scale @ self.weight.T + self.bias  # [B, N, C]
        maps = scores.transpose(1, 2).reshape(len(cells), len(self.bias), *self.grid)
        return _upsampled(maps, size)


@torch.enable_grad()
def fit_probe(
    features: Tensor,
    labels: Tensor,
    grid: tuple[int, int],
    classes: int,
    config: Config,
    device: torch.device,
) -> Probe:
    """Return the probe trained on cells [n, N, D] of a `grid` and labels uint8 [n, h, w] with VOID.

    The layer starts at zero and the order of images comes from `config.seed`: nothing else is random.
    """
    generator = torch.Generator().manual_seed(config.seed)
    mean, scale = (part.to(device) for part in _standardisation(features))
    weight = torch.zeros(classes, features.shape[2], device=device, requires_grad=True)
    bias = torch.zeros(classes, device=device, requires_grad=True)
    probe = Probe(grid, mean, scale, weight, bias)
    optimiser = torch.optim.AdamW([weight, bias], lr=config.lr, weight_decay=config.weight_decay)
    order: list[int] = []
    work = config.batch_size * classes * (features[0].numel() + labels[0].numel())
    with _threads_for(work):
        for step in range(config.steps):
            while len(order) < config.batch_size:
                order += torch.randperm(len(features), generator=generator).tolist()
            batch, order = order[: config.batch_size], order[config.batch_size :]
            target = labels[batch].to(device).long()
            scores = probe.scores(features[batch].to(device), target.shape[1:])
            labelled = (target != VOID).sum().clamp(min=1)  # a batch may be void everywhere
            loss = F.cross_entropy(scores, target, ignore_index=VOID, reduction="sum") / labelled
            for group in optimiser.param_groups:
                group["lr"] = config.lr * (1 + math.cos(math.pi * step / config.steps)) / 2
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
    return Probe(grid, mean, scale, weight.detach(), bias.detach())


@contextmanager
def _threads_for(work: int) -> Iterator[None]:
    """Give torch one CPU thread per 50 M multiplications of a step, at most those it has.

    Waking threads for small operations costs more than it saves: ten times where cores are shared.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, max(1, work // 50_000_000)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _upsampled(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps [B, C, h, w] at another size by bilinear interpolation (corners not aligned).

    As two small matrix products: the values of F.interpolate, several times faster on CPUs.
    """
    down, across = (
        _interpolation(cells, pixels).to(maps.device) for cells, pixels in zip(maps.shape[2:], size)
    )
    return down @ maps @ across.T


@lru_cache(maxsize=64)
def _interpolation(cells: int, pixels: int) -> Tensor:
    """Matrix [pixels, cells] of linear interpolation along one side."""
    unit = torch.eye(cells)[None]
    return F.interpolate(unit, size=pixels, mode="linear", align_corners=False)[0].T.contiguous()


def _cells(
    backbone: Backbone,
    data: SegmentData,
    images: tuple[LabelledImage, ...],
    name: str,
    config: Config,
    cache: FeatureCache | None,
) -> Extracted:
    """Dense features of every readable image, float16 [n, N, D]."""

    def reduce(features: Features) -> Tensor:
        return features.dense.half()

    return extract(
        backbone,
        images,
        lambda image: read_image(image, *config.size),
        reduce,
        batch_size=config.extract_batch,
        key=content_key("dense", name, config.size, len(images), data.content),
        cache=cache,
        omitted=data.omitted,
        label=name,
    )


def _standardisation(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation of every channel over all cells, summed in float64."""
    count = features.shape[0] * features.shape[1]
    total = torch.zeros(features.shape[2], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for part in features.split(256):
        part = part.double()
        total += part.sum((0, 1))
        squares += (part * part).sum((0, 1))
    mean = total / count
    variance = (squares / count - mean * mean).clamp(min=0)
    return mean.float(), (1 / (variance + 1e-5).sqrt()).float()  # BatchNorm's epsilon
