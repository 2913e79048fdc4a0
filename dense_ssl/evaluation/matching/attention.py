"""Attention maps as segmentations (DINO, arXiv:2104.14294, figure 4; iBOT's mass masks).

Of each head's attention from the class token to the patches in the last block, the strongest cells that hold
60 % of the mass are a mask. Every object of an image, all pixels of one class, is compared with the masks of
all heads; the best Jaccard index is its own. Means are over the objects of an image, then over images. The
image is squashed to 480 x 480; masks are enlarged to the labels' own size by nearest neighbour.

Nothing is trained, and nothing of the truth but the choice of a head per object is used: `head@i` says what
each head reaches alone. A second class token (UDI) is read like the first. A ResNet has one map, the cosine
similarity of each cell (dilated to stride 16) to the pooled feature, from 0 up.

Void pixels count as outside of every object, as published; `void=ignored` leaves them out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dense_ssl.backbones import Backbone, ViTBackbone
from dense_ssl.config import Config as BaseConfig
from dense_ssl.config import UserError
from dense_ssl.evaluation.features import (
    Extracted,
    FeatureCache,
    check_size,
    content_key,
    extract,
    in_order,
    thinned,
)
from dense_ssl.evaluation.label_maps import LabelledImage, signed
from dense_ssl.evaluation.matching.finer import dilated
from dense_ssl.evaluation.omissions import Omissions, require_some
from dense_ssl.evaluation.protocol_settings import marked
from dense_ssl.evaluation.segmentation.data import (
    Labels,
    SegmentData,
    open_segmentation,
    read_image,
)
from dense_ssl.evaluation.tinted import label_colours, tinted
from dense_ssl.pictures import open_image
from dense_ssl.visualise.sheets import heated, stacked, tiles_sheet

PROTOCOL = "attention/v1"
_BACKGROUNDS = frozenset({"background", "other"})  # a first class of this name is no object
_STRIDE = 16  # of ResNets, dilated: the cells of a ViT/16
_CENTRE = 0.25  # deviation of a map that looks at the middle, in sides of the image
_DRAWN = 4
_TILE_PX = 160


class Config(BaseConfig):
    """Settings of the protocol; the defaults are the published ones."""

    size: Annotated[int, Field(ge=16)] = 480  # both sides of the input in pixels
    mass: Annotated[float, Field(gt=0, lt=1)] = 0.6  # share of a head's attention in its mask
    void: Literal["background", "ignored"] = "background"
    labels: Labels = "category"  # COCO only
    batch_size: Annotated[int, Field(ge=1)] = 16
    seed: int = 0  # of the random masks that are called chance
    max_val: Annotated[int, Field(ge=1)] | None = None


class Attention(nn.Module):
    """From images to the attention of each class token's heads: [B, T, heads, N], sums at most 1."""

    def __init__(self, backbone: Backbone) -> None:
        """Read a ViT as it is, a ResNet dilated to stride 16."""
        super().__init__()
        self.backbone = dilated(backbone, _STRIDE)
        self.stride = self.backbone.stride

    def forward(self, images: Tensor) -> Tensor:
        """Return the weights of normalised images [B, 3, H, W] over N cells, row-major."""
        if isinstance(self.backbone, ViTBackbone):
            return self.backbone.last_attention(images).transpose(1, 2)
        features = self.backbone(images)
        likeness = F.cosine_similarity(features.dense, features.cls, dim=2).clamp(min=0)
        return likeness[:, None, None]


def load(path: Path, config: Config) -> SegmentData:
    """Return the validation split at `path`, in a layout that `segment_data` knows; train stays empty.

    Raises:
        UserError: it is none of them, or nothing in it is usable.
    """
    data = open_segmentation(path, config.labels, None, config.max_val, splits=("val",))
    return replace(data, protocol=PROTOCOL)


def run(
    backbone: Backbone, data: SegmentData, config: Config, cache: FeatureCache | None = None
) -> dict[str, float]:
    """Return `jaccard` in percent, and `head@i` where there are several heads; of both class tokens.

    `jaccard-second` and `jaccard-both` are the second token's and the best of all heads of both.
    `chance/jaccard` takes as many masks of cells drawn at random, as attention that is equal everywhere
    would give; `note/centre` is what a single map gets that looks at the middle of every image.

    Raises:
        UserError: the network cannot take the size, or no image shows an object.
    """
    network = Attention(backbone)
    check_size((config.size,), network.stride)
    side = config.size // network.stride
    extracted = _attention(network, data, data.val, config, cache)
    objects = Omissions()
    rows: list[np.ndarray] = []  # per image the means over objects
    heads = extracted.features.shape[2]
    centre = mass_masks(_central(side), config.mass)[None]
    for number, weights, labels in _beside_labels(extracted, data.val):
        masks = mass_masks(weights, config.mass)  # [T, heads, N]
        draws = np.random.default_rng((config.seed, number)).random((heads, side * side))
        random = draws.argsort(1).argsort(1) >= np.floor((1 - config.mass) * side * side)
        both = np.concatenate([masks.reshape(-1, side * side), random, centre])
        ratios = jaccard(both, (side, side), labels, _first(data.classes), config.void)
        if not len(ratios):
            objects.add("val: no object in it, not scored", str(data.val[number]))
            continue
        rows.append(_means(ratios, masks.shape[0], heads))
    data.omitted.update(objects)
    require_some(rows, "val", data.omitted)
    means = 100 * np.mean(rows, axis=0)
    return _named(means.tolist(), extracted.features.shape[1], heads)


def pictures(
    backbone: Backbone, data: SegmentData, config: Config, cache: FeatureCache | None = None
) -> dict[str, Image.Image]:
    """Return a few images with the truth, the strongest head of each cell, and the map of every head."""
    network = Attention(backbone)
    side = config.size // network.stride
    few = thinned(data.val, _DRAWN)
    extracted = _attention(network, data, few, config, None)
    rows = []
    colours = label_colours(len(data.classes))
    shift = int(_first(data.classes) == 0)  # label 0 is drawn clear
    for number, weights, labels in _beside_labels(extracted, few):
        with open_image(few[number].path) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        shown = np.where(labels < 0, 0, labels + shift).astype(np.uint8)
        for token, of_heads in enumerate(weights):
            names, tiles = ["image", "truth"], [pixels, tinted(pixels, shown, colours)]
            names.append("strongest head" + (f", token {token}" if len(weights) > 1 else ""))
            strongest = strongest_heads(of_heads, config.mass).reshape(side, side)
            tiles.append(tinted(pixels, strongest, label_colours(len(of_heads))))
            for head, weight in enumerate(of_heads):
                names.append(f"head {head}")
                heat = (weight / max(float(weight.max()), 1e-12)).reshape(side, side)
                tiles.append(heated(pixels, heat))
            rows.append(tiles_sheet(names, tiles, _TILE_PX))
    named = marked(data.protocol, "attention", config)
    return {"maps": stacked(rows, f"{named}: attention of the last block")} if rows else {}


def mass_masks(weights: np.ndarray, mass: float) -> np.ndarray:
    """Return which cells hold the upper `mass` of each map's weight; both [..., N], the first not negative.

    Cells are added up from the weakest; those that take the sum beyond 1 - mass are kept. A map without
    weight keeps nothing.
    """
    weights = weights.astype(np.float64)
    order = weights.argsort(axis=-1, kind="stable")
    share = np.take_along_axis(weights, order, -1).cumsum(-1)
    total = share[..., -1:]
    kept = share > (1 - mass) * total
    masks = np.zeros(weights.shape, bool)
    np.put_along_axis(masks, order, kept & (total > 0), -1)
    return masks


def jaccard(
    masks: np.ndarray,
    grid: tuple[int, int],
    labels: np.ndarray,
    first: int,
    void: Literal["background", "ignored"],
) -> np.ndarray:
    """Return the Jaccard index of every object with every mask, float64 [objects, M].

    Args:
        masks: bool [M, N], of the cells of a `grid`.
        grid: rows and columns.
        labels: int [H, W], negative where void; masks are enlarged to it by nearest neighbour.
        first: the first class that is an object.
        void: whether void pixels are part of no object, or of nothing.
    """
    height, width = labels.shape
    rows, columns = np.arange(height) * grid[0] // height, np.arange(width) * grid[1] // width
    cell = rows[:, None] * grid[1] + columns
    numbers = np.where(labels < first, -1, labels).astype(np.int64)
    present = np.unique(numbers[numbers >= 0])
    if not len(present):
        return np.zeros((0, len(masks)))
    counted = labels >= 0 if void == "ignored" else np.ones(labels.shape, bool)
    cells = grid[0] * grid[1]
    pixels = np.bincount(cell[counted], minlength=cells)
    of_object = np.stack([np.bincount(cell[numbers == n], minlength=cells) for n in present])
    shared = of_object @ masks.T.astype(np.int64)  # [objects, M]
    union = of_object.sum(1)[:, None] + (pixels @ masks.T.astype(np.int64)) - shared
    return shared / union


def strongest_heads(weights: np.ndarray, mass: float) -> np.ndarray:
    """Return for every cell 1 + the head with most attention there, 0 where no head's mask has it.

    weights: float [heads, N]; uint8 [N].
    """
    kept = np.where(mass_masks(weights, mass), weights, 0)
    return np.where(kept.any(0), kept.argmax(0) + 1, 0).astype(np.uint8)


def _means(ratios: np.ndarray, tokens: int, heads: int) -> np.ndarray:
    """An image's numbers, means over its objects, in the order `_named` reads them."""
    own, rest = ratios[:, : tokens * heads], ratios[:, tokens * heads :]
    of_token = own.reshape(-1, tokens, heads)
    random, centre = rest[:, :heads], rest[:, heads]
    best = [of_token.max(2), own.max(1, keepdims=True), own, random.max(1, keepdims=True)]
    return np.concatenate([*best, random.mean(1, keepdims=True), centre[:, None]], axis=1).mean(0)


def _named(means: Sequence[float], tokens: int, heads: int) -> dict[str, float]:
    """The metrics of `_means`."""
    first, *others = means[:tokens]
    both, own = means[tokens], means[tokens + 1 : tokens + 1 + tokens * heads]
    values = {"jaccard": first}
    if others:
        values |= {"jaccard-second": others[0], "jaccard-both": both}
    names = ["head", "second-head"][: tokens if heads > 1 else 0]
    for token, name in enumerate(names):
        values |= {f"{name}@{head}": own[token * heads + head] for head in range(heads)}
    random, random_head, centre = means[-3:]
    values |= {"chance/jaccard": random, "note/centre": centre}
    values |= {f"chance/{name}": random_head for name in names}
    return values | ({"chance/jaccard-second": random} if others else {})


def _first(classes: Sequence[str]) -> int:
    return int(classes[0] in _BACKGROUNDS)


def _central(side: int) -> np.ndarray:
    """A Gaussian around the middle of a grid, float64 [side * side]."""
    along = np.exp(-0.5 * (((np.arange(side) + 0.5) / side - 0.5) / _CENTRE) ** 2)
    return np.outer(along, along).ravel()


def _attention(
    network: Attention,
    data: SegmentData,
    images: Sequence[LabelledImage],
    config: Config,
    cache: FeatureCache | None,
) -> Extracted:
    """The weights of every readable image, float32 [n, T, heads, N]."""
    return extract(
        network,
        images,
        lambda image: read_image(image, config.size, config.size),
        lambda weights: weights.float(),
        batch_size=config.batch_size,
        key=content_key(PROTOCOL, config.size, network.stride, len(images), data.content),
        cache=cache,
        omitted=data.omitted,
        label="val",
    )


def _beside_labels(
    extracted: Extracted, images: Sequence[LabelledImage]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Each image's position, its weights [T, heads, N] and its labels int16 [H, W], -1 where void."""
    kept = extracted.kept.tolist()
    truths = in_order(
        lambda number: torch.from_numpy(signed(images[number].read_labels())), kept, 16
    )
    for number, weights, truth in zip(kept, extracted.features, truths):
        if not weights.isfinite().all():
            raise UserError(f"{images[number]}: attention is not finite; are the weights?")
        yield number, weights.numpy(), truth.numpy()
