"""Segment retrieval (MaskContrast, arXiv:2102.06191, as Van Gansbeke et al. 2021 use it).

Every image is cut into segments, each stands for its mean feature. A validation segment gets the class of
its nearest training segment (cosine), and mIoU is over the pixels of the whole split, all at one size. The
published protocol takes salient masks as segments; a trunk alone has none, so this is the reading for trunks:
k-means with five clusters on an image's own cells, background allowed as a class. A training segment's
class is that of most of its labelled pixels. ResNets are dilated to stride 8, ViTs keep their patches.

On VOC's classes two scores are given: over all 21, and over the 7 of MaskContrast (aeroplane, bottle, bus,
car, cat, cow, person), for which the other 13 are void beforehand in both splits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from dense_ssl.backbones import Backbone
from dense_ssl.config import Config as BaseConfig
from dense_ssl.config import UserError
from dense_ssl.evaluation.choices import Size
from dense_ssl.evaluation.features import (
    FeatureCache,
    check_size,
    content_key,
    extract,
    in_order,
    thinned,
)
from dense_ssl.evaluation.matching.finer import dilated
from dense_ssl.evaluation.matching.segments import Segments, packed_segments, unpacked
from dense_ssl.evaluation.protocol_settings import marked
from dense_ssl.evaluation.segmentation.data import (
    LabelledImage,
    Labels,
    SegmentData,
    open_segmentation,
    read_image,
    read_labels,
)
from dense_ssl.evaluation.segmentation.layouts import VOC_CLASSES
from dense_ssl.evaluation.tinted import label_colours, tinted
from dense_ssl.pictures import open_image
from dense_ssl.visualise.sheets import stacked, tiles_sheet

PROTOCOL = "retrieve-kmeans/v1"
SEVEN = ("aeroplane", "bottle", "bus", "car", "cat", "cow", "person")
_STRIDE = 8  # of ResNets, dilated
_DRAWN, _NEAREST, _TILE_PX = 5, 5, 200  # queries and neighbours in the picture


class Config(BaseConfig):
    """Settings of the protocol."""

    size: Size = (512, 512)
    # (height, width) of images and of label maps; `size=256` and `size=192,256` are understood
    labels: Labels = "category"  # COCO only
    train_split: str = "train"  # of VOC: `train` or `trainaug`
    clusters: Annotated[int, Field(ge=1, le=255)] = 5  # segments of an image
    batch_size: Annotated[int, Field(ge=1)] = 8
    seed: int = 0  # of k-means
    max_train: Annotated[int, Field(ge=1)] | None = None  # evenly spaced share of a large split
    max_val: Annotated[int, Field(ge=1)] | None = None


@dataclass(frozen=True, slots=True)
class Split:
    """The segments of a split's readable images, with the pixels of each class in them."""

    images: tuple[LabelledImage, ...]
    segments: Segments
    pixels: Tensor  # int64 [n, K, C], labelled pixels by cluster and class


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
    """Return `mIoU` in percent, on VOC's classes `mIoU-21` and `mIoU-7`; and `chance/...` of each.

    Chance is the commonest class of the training pixels everywhere.

    Raises:
        UserError: the network cannot take the size, or a split is void everywhere.
    """
    memory, queries = _splits(backbone, data, config, cache)
    values: dict[str, float] = {}
    for name, (classes, first) in _scored(data.classes).items():
        kept = torch.tensor(classes)
        train, val = memory.pixels[..., kept], queries.pixels[..., kept]
        answers = retrieved(memory.segments.prototypes, train, queries.segments.prototypes)
        commonest = torch.full_like(answers, int(train.sum((0, 1)).argmax()))
        values[name] = mean_iou(answers, val, first)
        values[f"chance/{name}"] = mean_iou(commonest, val, first)
    return values


def retrieved(memory: Tensor, pixels: Tensor, queries: Tensor) -> Tensor:
    """Return the class that every query segment takes from its nearest in memory, int64 [m, K].

    memory, queries: prototypes [n, K, D] and [m, K, D]; pixels: int64 [n, K, C] of memory's segments.
    Segments without a labelled pixel are not in memory.

    Raises:
        UserError: none is.
    """
    bank, votes = memory.flatten(0, 1), pixels.flatten(0, 1)
    usable = votes.sum(1) > 0
    if not usable.any():
        raise UserError("train: every pixel is void")
    bank, classes = bank[usable], votes[usable].argmax(1)
    return torch.stack([classes[(one @ bank.T).argmax(1)] for one in queries])


def mean_iou(answers: Tensor, pixels: Tensor, first: int = 0) -> float:
    """Return the mean IoU in percent over the classes from `first` on that occur in truth or answer.

    answers: int64 [m, K], the class of each segment; pixels: int64 [m, K, C], what it shows.

    Raises:
        UserError: there is no labelled pixel.
    """
    count = pixels.shape[2]
    flat = pixels.flatten(0, 1)
    if not flat.any():
        raise UserError("val: every pixel is void")
    matrix = torch.zeros(count, count, dtype=torch.int64).index_add_(0, answers.flatten(), flat).T
    hit = matrix.diagonal()
    union = matrix.sum(0) + matrix.sum(1) - hit
    scored = (union > 0) & (torch.arange(count) >= first)
    return 100 * float((hit[scored] / union[scored]).mean()) if scored.any() else 0.0


def pictures(
    backbone: Backbone, data: SegmentData, config: Config, cache: FeatureCache | None = None
) -> dict[str, Image.Image]:
    """Return a sheet of a few validation segments, each beside its nearest training segments."""
    memory, queries = _splits(backbone, data, config, cache)
    usable = memory.pixels.sum(2) > 0
    bank = memory.segments.prototypes.masked_fill(~usable[..., None], 0)
    rows = []
    for number in thinned(range(len(queries.images)), _DRAWN):
        own = _shown(queries.pixels[number], data.classes)
        similarity = torch.einsum("nkd,d->nk", bank, queries.segments.prototypes[number, own])
        order = similarity.flatten().topk(min(_NEAREST, similarity.numel()))
        names = [f"query: {_named(queries.pixels[number, own], data.classes)}"]
        tiles = [_outlined(queries, number, own)]
        for value, place in zip(order.values.tolist(), order.indices.tolist()):
            image, segment = divmod(place, config.clusters)
            names.append(f"{value:.3f} {_named(memory.pixels[image, segment], data.classes)}")
            tiles.append(_outlined(memory, image, segment))
        rows.append(tiles_sheet(names, tiles, _TILE_PX))
    named = marked(data.protocol, "retrieve", config)
    return {"nearest": stacked(rows, f"{named}: segments, their nearest and its cosine")}


def _scored(classes: Sequence[str]) -> dict[str, tuple[list[int], int]]:
    """The scores: which classes are not void, and the first of them that counts."""
    if tuple(classes) != VOC_CLASSES:
        return {"mIoU": (list(range(len(classes))), 0)}
    seven = [0, *(VOC_CLASSES.index(name) for name in SEVEN)]  # background is a possible answer
    return {"mIoU-21": (list(range(len(classes))), 0), "mIoU-7": (seven, 1)}


def _splits(
    backbone: Backbone, data: SegmentData, config: Config, cache: FeatureCache | None
) -> tuple[Split, Split]:
    network = dilated(backbone, _STRIDE)
    check_size(config.size, network.stride)
    train = _split(network, data, data.train, "train", config, cache)
    return train, _split(network, data, data.val, "val", config, cache)


def _split(
    network: Backbone,
    data: SegmentData,
    images: Sequence[LabelledImage],
    name: str,
    config: Config,
    cache: FeatureCache | None,
) -> Split:
    extracted = extract(
        network,
        images,
        lambda image: read_image(image, *config.size),
        lambda features: packed_segments(features, config.clusters, config.seed),
        batch_size=config.batch_size,
        key=content_key(
            *(PROTOCOL, name, config.size, config.clusters, config.seed, network.stride),
            *(len(images), data.content),
        ),
        cache=cache,
        omitted=data.omitted,
        label=name,
    )
    grid = (config.size[0] // network.stride, config.size[1] // network.stride)
    segments = unpacked(extracted.features, config.clusters, grid)
    kept = tuple(images[i] for i in extracted.kept.tolist())

    def counted(number: int) -> Tensor:
        clusters, labels = segments.maps[number].numpy(), read_labels(kept[number], *config.size)
        return class_pixels(clusters, labels, config.clusters, len(data.classes))

    pixels = torch.stack(list(in_order(counted, range(len(kept)))))
    return Split(kept, segments, pixels)


def class_pixels(clusters: np.ndarray, labels: np.ndarray, num: int, classes: int) -> Tensor:
    """Return how many pixels of each class lie in each cluster, int64 [num, C]; void counts nowhere.

    clusters: uint8 [h, w], enlarged to the labels uint8 [H, W] by nearest neighbour.
    """
    size = (labels.shape[1], labels.shape[0])
    which = np.asarray(Image.fromarray(clusters).resize(size, Image.Resampling.NEAREST))
    known = labels < classes
    flat = which[known].astype(np.int64) * classes + labels[known]
    return torch.from_numpy(np.bincount(flat, minlength=num * classes)).view(num, classes)


def _shown(pixels: Tensor, classes: Sequence[str]) -> int:
    """The segment of an image with the most pixels that are not background."""
    seen = pixels[:, 1:] if classes[0] == "background" else pixels
    return int(seen.sum(1).argmax())


def _named(pixels: Tensor, classes: Sequence[str]) -> str:
    return classes[int(pixels.argmax())] if pixels.any() else "void"


def _outlined(split: Split, image: int, segment: int) -> np.ndarray:
    """An image with one segment tinted."""
    with open_image(split.images[image].path) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    mask = (split.segments.maps[image].numpy() == segment).astype(np.uint8)
    return tinted(pixels, mask, label_colours(1))
