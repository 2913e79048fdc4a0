"""The first images of an epoch, as a recipe or a run shows them to its network: what pictures are made of."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dense_ssl.augment import MEAN, STD, Photometry
from dense_ssl.backbones import make_backbone
from dense_ssl.config import Config, UserError, read_yaml, validate
from dense_ssl.crops import MultiCropBatch
from dense_ssl.loaders import DataConfig, open_source
from dense_ssl.loaders.batch import assemble, check_recipe, cut_views
from dense_ssl.loaders.folder import cut_one
from dense_ssl.loaders.order import Order
from dense_ssl.loaders.source import decode
from dense_ssl.methods import METHODS, AnyMethodConfig, MethodConfig
from dense_ssl.views import ViewSpec, draw_epoch, positions
from dense_ssl.visualise.features import masks_of, with_hidden
from dense_ssl.visualise.sheets import crops_sheet, tiles_sheet


class AnyMethod(Config):
    """The section of a run's settings that says what it saw."""

    method: AnyMethodConfig


@dataclass(frozen=True, slots=True)
class Sample:
    """The first images of an epoch of a run, with what the network saw of them."""

    sources: list[np.ndarray]  # B images uint8 [H, W, 3]
    batch: MultiCropBatch  # float, normalised
    views: tuple[ViewSpec, ...]
    method: MethodConfig
    seed: int


def shown(images: Tensor) -> np.ndarray:
    """Return normalised float images [..., 3, S, S] as uint8 [..., S, S, 3]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    values = (images.float().cpu() * std + mean).mul(255).round().clamp(0, 255)
    return values.to(torch.uint8).movedim(-3, -1).numpy()


def config_of(run: Path) -> dict[str, Any]:
    """Return the run's settings as stored; of all of them, method, data, train and seed are needed here."""
    try:
        config = read_yaml(run / "config.yaml")
        return {
            "method": dict(config["method"]),
            "data": dict(config["data"]),
            "train": dict(config["train"]),
            "seed": int(config["train"]["seed"]),
        }
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{run}: no usable config.yaml in it; is it a run folder?") from None


def sample_of(config: dict[str, Any], count: int, epoch: int, size: int | None) -> Sample:
    """Cut the first images of an epoch with Pillow, whichever loader the run used."""
    method = method_config(config["method"])
    views = _scaled(method.views, size)
    source = open_source(validate(DataConfig, config["data"], "config.yaml"))
    seed = config["seed"]
    total = len(source.sizes)
    # A twin holds the last share of a batch: with fewer images than this it would hold none.
    fewest = max(math.ceil(1 / view.part) for view in views)
    index = Order(total, min(max(count, fewest), total), seed=seed).batches(epoch)[0]
    check_recipe(views, len(index))
    plan = draw_epoch(views, source.sizes, seed, epoch, index)
    pictures = [decode(source.read(int(i))) for i in index]
    where = positions(views)
    crops = {
        view.name: torch.stack(
            [
                torch.stack(
                    [
                        cut_one(picture, plan.boxes[b, v], bool(plan.flipped[b, v]), view)
                        for b, picture in enumerate(pictures)
                    ]
                )
                for v in range(where[view.name].start, where[view.name].stop)
            ]
        )
        for view in cut_views(views)
    }
    batch = assemble(views, crops, plan, source.sizes[index], index, source.labels[index])
    shown_as = Photometry(views, seed)(batch, epoch)
    return Sample([np.asarray(p) for p in pictures], shown_as, views, method, seed)


def method_config(values: dict[str, Any]) -> MethodConfig:
    """Return the method section of a run, whichever method it is."""
    name = values.get("name")
    if name not in METHODS:
        raise UserError(f"method.name: {name!r} is none of {', '.join(METHODS)}")
    return validate(AnyMethod, {"method": values}, "config.yaml").method


def _scaled(views: Sequence[ViewSpec], size: int | None) -> tuple[ViewSpec, ...]:
    if size is None:
        return tuple(views)
    factor = size / views[0].size
    return tuple(view.model_copy(update={"size": round(factor * view.size)}) for view in views)


def crops_row(sample: Sample, row: int) -> Image.Image:
    """Draw all crops of image number `row` of the sample."""
    names, boxes, flipped, views = [], [], [], []
    for name, crops in sample.batch.views.items():
        # A view may hold the last images of the batch only.
        place = row - (len(sample.sources) - crops.images.shape[1])
        if place < 0:
            continue
        for v in range(crops.images.shape[0]):
            names.append(f"{name}[{v}]")
            boxes.append(crops.boxes[v, place].numpy())
            flipped.append(bool(crops.flipped[v, place]))
            views.append(shown(crops.images[v, place]))
    return crops_sheet(sample.sources[row], np.stack(boxes), np.array(flipped), names, views)


def mask_rows(sample: Sample, epoch: int) -> list[Image.Image]:
    """Draw the global crops of every image, whole and as the student gets them."""
    crops = sample.batch.views["global"]
    stride = make_backbone(sample.method.backbone).stride
    side = crops.images.shape[-1] // stride
    grid, count = (side, side), len(crops.images)
    hidden = masks_of(sample.method, sample.batch.index, epoch, sample.seed, grid, count)
    rows = []
    for i in range(crops.images.shape[1]):
        names, tiles = [], []
        for v in range(count):
            view = shown(crops.images[v, i])
            share = hidden[v, i].mean()
            names += [f"global[{v}]", f"{share:.0%} hidden" if share else "nothing hidden"]
            tiles += [view, with_hidden(view, hidden[v, i])]
        rows.append(tiles_sheet(names, tiles))
    return rows
