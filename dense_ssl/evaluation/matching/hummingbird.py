"""Semantic segmentation by looking up cells: no layer is trained (Balazevic et al. 2023, arXiv:2306.01667).

A memory holds cells of training images with the share of each class among their pixels. A validation cell
takes the mean of what its k nearest memory cells hold, weighted by softmax(cosine / temperature); the maps
are enlarged bilinearly to the labels' own size, and mIoU is over the whole split. Where the memory is smaller
than the training set every image gives the same number of cells, those with rare classes first: a cell's
score is how many cells of the image its classes occur in, times a number drawn from 0..1; the lowest stay.
Deviates: void pixels are in no cell's shares and cells without others are not kept; ResNets are dilated
to stride 16, the cells of a ViT/16.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from dense_ssl.backbones import Backbone, Features
from dense_ssl.config import Config as BaseConfig
from dense_ssl.config import UserError
from dense_ssl.evaluation.choices import Size
from dense_ssl.evaluation.classification.knn import neighbours
from dense_ssl.evaluation.features import (
    Extracted,
    FeatureCache,
    check_size,
    content_key,
    extract,
    in_order,
    thinned,
)
from dense_ssl.evaluation.matching.finer import dilated
from dense_ssl.evaluation.metrics import confusion, scores_beside_chance
from dense_ssl.evaluation.protocol_settings import marked
from dense_ssl.evaluation.segmentation.data import (
    LabelledImage,
    Labels,
    SegmentData,
    open_segmentation,
    read_image,
    read_labels,
)
from dense_ssl.evaluation.tinted import class_sheet

PROTOCOL = "hummingbird/v1"
_STRIDE = 16  # of ResNets, dilated
_CHUNK = 64  # training images whose cells are held before some are chosen
_DRAWN = 6  # validation images in the picture


class Config(BaseConfig):
    """Settings of the protocol."""

    size: Size = (512, 512)
    # (height, width) of the input in pixels; `size=256` and `size=192,256` are understood
    labels: Labels = "category"  # COCO only
    train_split: str | None = (
        None  # of VOC: `train`, or `trainaug`, which is taken where it is there
    )
    k: Annotated[int, Field(ge=1)] = 30  # the paper's
    temperature: Annotated[float, Field(gt=0)] = 0.02  # the paper's
    memory_size: Annotated[int, Field(ge=1)] | None = 1_024_000  # cells; None: all
    batch_size: Annotated[int, Field(ge=1)] = 16
    seed: int = 0  # of the choice of cells
    max_train: Annotated[int, Field(ge=1)] | None = None  # evenly spaced share of a large split
    max_val: Annotated[int, Field(ge=1)] | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """Cells of training images and what they show."""

    cells: Tensor  # float16 [M, D], unit vectors
    labels: Tensor  # float16 [M, C], the share of each class among the labelled pixels


def load(path: Path, config: Config) -> SegmentData:
    """Return the data at `path`, in a layout that `segment_data` knows.

    Raises:
        UserError: it is none of them, or nothing in it is usable.
    """
    data = open_segmentation(
        path, config.labels, config.max_train, config.max_val, config.train_split
    )
    return replace(data, protocol=PROTOCOL)


def run(
    backbone: Backbone, data: SegmentData, config: Config, cache: FeatureCache | None = None
) -> dict[str, float]:
    """Return `mIoU`, `aAcc`, `mAcc` in percent, and `chance/...`: the commonest class everywhere.

    Raises:
        UserError: the network cannot take the size, or a split is void everywhere.
    """
    network = _network(backbone, config)
    memory = _memory(network, data, config, cache)
    commonest = int(memory.labels.float().sum(0).argmax())
    classes = len(data.classes)
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    for scores, truth, _ in _answers(network, memory, data, data.val, config, cache):
        matrix += confusion(truth, scores.argmax(0), classes)
    if not matrix.any():
        raise UserError("val: every pixel is void")
    return scores_beside_chance(matrix, commonest)


def pictures(
    backbone: Backbone, data: SegmentData, config: Config, cache: FeatureCache | None = None
) -> dict[str, Image.Image]:
    """Return a sheet of a few validation images: what was looked up, beside the truth."""
    network = _network(backbone, config)
    memory = _memory(network, data, config, cache)
    few = thinned(data.val, _DRAWN)
    rows = [
        (image, scores.argmax(0).to(torch.uint8).cpu().numpy(), truth.numpy())
        for scores, truth, image in _answers(network, memory, data, few, config, None)
    ]
    named = marked(data.protocol, "hummingbird", config)
    title = f"{named}: {len(memory.cells)} cells in memory, k = {config.k}"
    return {"predictions": class_sheet(rows, data.classes, title)}


def look_up(cells: Tensor, memory: Memory, k: int, temperature: float) -> Tensor:
    """Return the class shares [n, C] that unit cells [n, D] find among their k nearest of the memory."""
    similarity, nearest = neighbours(memory.cells, cells, k)
    weights = (similarity / temperature).softmax(1)
    return (weights[:, None] @ memory.labels[nearest].float())[:, 0]


def class_shares(labels: np.ndarray, grid: tuple[int, int], classes: int) -> np.ndarray:
    """Return the share of each class among the labelled pixels of every cell, float32 [N, C].

    labels: uint8 [H, W], sides multiples of the grid's; rows of cells that are void everywhere are zero.
    """
    height, width = labels.shape
    rows, columns = np.arange(height) * grid[0] // height, np.arange(width) * grid[1] // width
    cell = rows[:, None] * grid[1] + columns
    known = labels < classes
    flat = cell[known] * classes + labels[known]
    counts = np.bincount(flat, minlength=grid[0] * grid[1] * classes).reshape(-1, classes)
    return (counts / counts.sum(1, keepdims=True).clip(min=1)).astype(np.float32)


def chosen(shares: np.ndarray, count: int | None, random: np.random.Generator) -> np.ndarray:
    """Return which cells of an image go into the memory, ascending, at most `count` of them.

    shares: [N, C] as `class_shares` gives them; cells without a labelled pixel never go.
    """
    labelled = np.flatnonzero(shares.any(1))
    if count is None or len(labelled) <= count:
        return labelled
    present = shares[labelled] > 0
    score = (present @ present.sum(0)) * random.random(len(labelled))
    return np.sort(labelled[np.argsort(score, kind="stable")[:count]])


def _network(backbone: Backbone, config: Config) -> Backbone:
    network = dilated(backbone, _STRIDE)
    check_size(config.size, network.stride)
    return network


def _memory(
    network: Backbone, data: SegmentData, config: Config, cache: FeatureCache | None
) -> Memory:
    """The memory of the training images, on the network's device; with a cache, computed once."""
    device = next(network.parameters()).device
    settings = (config.size, config.memory_size, config.seed, network.stride, device.type)
    key = content_key(PROTOCOL, settings, data.content)
    file = cache.job(key) / "memory.safetensors" if cache else None
    memory = _stored(file)
    if memory is None:
        cells, labels = zip(*_training_cells(network, data, config), strict=True)
        memory = Memory(torch.cat(cells), torch.cat(labels))
        if not len(memory.cells):
            raise UserError("train: every pixel is void")
        if cache is not None and cache.has_room_for(memory.cells):
            _keep(file, memory)
    return Memory(memory.cells.to(device), memory.labels.to(device))


def _training_cells(
    network: Backbone, data: SegmentData, config: Config
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the chosen cells of every training image with their class shares, both float16."""
    images, size = data.train, config.size
    grid = (size[0] // network.stride, size[1] // network.stride)
    count = None if config.memory_size is None else max(config.memory_size // len(images), 1)
    parts = np.array_split(np.arange(len(images)), -(-len(images) // _CHUNK))
    for part in parts:
        some = [images[i] for i in part]
        extracted = _cells(network, data, some, "train", config, None)

        def shares(image: LabelledImage) -> Tensor:
            labels = read_labels(image, *size)
            return torch.from_numpy(class_shares(labels, grid, len(data.classes)))

        kept = extracted.kept.tolist()
        for position, cells, share in zip(
            kept, extracted.features, in_order(shares, [some[i] for i in kept])
        ):
            random = np.random.default_rng((config.seed, int(part[position])))
            these = torch.from_numpy(chosen(share.numpy(), count, random))
            yield cells[these], share[these].half()


def _answers(
    network: Backbone,
    memory: Memory,
    data: SegmentData,
    images: Sequence[LabelledImage],
    config: Config,
    cache: FeatureCache | None,
) -> Iterator[tuple[Tensor, Tensor, LabelledImage]]:
    """Yield class scores [C, H, W], the truth uint8 [H, W] and the image, for every readable one."""
    device = memory.cells.device
    grid = (config.size[0] // network.stride, config.size[1] // network.stride)
    extracted = _cells(network, data, images, "val", config, cache)
    some = [images[i] for i in extracted.kept.tolist()]
    truths = in_order(lambda image: torch.from_numpy(image.read_labels()), some, 16)
    with torch.inference_mode():
        for cells, truth, image in zip(extracted.features, truths, some):
            found = look_up(cells.to(device), memory, config.k, config.temperature)
            maps = found.T.unflatten(1, grid)[None]
            size = (truth.shape[0], truth.shape[1])
            yield F.interpolate(maps, size, mode="bilinear", align_corners=False)[0], truth, image


def _cells(
    network: Backbone,
    data: SegmentData,
    images: Sequence[LabelledImage],
    name: str,
    config: Config,
    cache: FeatureCache | None,
) -> Extracted:
    """Unit cells of every readable image, float16 [n, N, D]."""

    def reduce(features: Features) -> Tensor:
        return F.normalize(features.dense.float(), dim=2).half()

    return extract(
        network,
        images,
        lambda image: read_image(image, *config.size),
        reduce,
        batch_size=config.batch_size,
        key=content_key("unit cells", name, config.size, network.stride, len(images), data.content),
        cache=cache,
        omitted=data.omitted,
        label=name,
    )


def _stored(file: Path | None) -> Memory | None:
    if file is None or not file.is_file():
        return None
    try:
        return Memory(**load_file(file))
    except (OSError, SafetensorError, TypeError):
        return None  # computed again


def _keep(file: Path | None, memory: Memory) -> None:
    if file is None:
        return
    aside = file.with_suffix(f".{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"cells": memory.cells, "labels": memory.labels}, aside)
        aside.replace(file)
    except (OSError, SafetensorError):  # a full disk costs the copy, not the evaluation
        aside.unlink(missing_ok=True)
