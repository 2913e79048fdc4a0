"""Pictures of what a run sees, and of what its backbone makes of it.

    python -m dense_ssl.visualise --run runs/a --kind crops     # writes runs/a/crops.png

    crops            each source image with its crop boxes, beside the views
    masks            the views with the patches that are hidden from the student
    correspondence   which cells of two views are matched
    attention        where the class token looks, head by head (ResNets: the pooled feature)
    pca              the cells' first three principal components as colours
    neighbours       images and the ones most like them by pooled feature

The images are the first of the run's first batch (or of another epoch), in the colours training gave
them. Correspondence: DenseCL's matching (arXiv:2011.09157, section 3.3) between the student's cells of
the first view and the teacher's of the second; lines join mutual nearest cells, thick ones those of
similarity above 0.9. Green and red, which the method never knew, come from the crop boxes.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from dense_ssl.augment import MEAN, STD, Photometry
from dense_ssl.backbones import make_backbone
from dense_ssl.config import Config, UserError, validate
from dense_ssl.crops import MultiCropBatch
from dense_ssl.loaders import DataConfig, open_source
from dense_ssl.loaders.batch import assemble, check_recipe, cut_views
from dense_ssl.loaders.folder import cut_one
from dense_ssl.loaders.order import Order
from dense_ssl.loaders.source import decode
from dense_ssl.methods import METHODS, AnyMethodConfig, MethodConfig
from dense_ssl.pretrained import load_backbone
from dense_ssl.sheets import correspondence_sheet, crops_sheet, heated, stacked, tiles_sheet
from dense_ssl.views import ViewSpec, draw_epoch, positions
from dense_ssl.visualise_features import (
    attention_maps,
    component_maps,
    masks_of,
    whole_image,
    with_hidden,
)
from dense_ssl.visualise_neighbours import POOL, neighbour_rows

KINDS = ("crops", "masks", "correspondence", "attention", "pca", "neighbours")
WHOLE_PX = 320  # shorter side of whole images, for attention and pca
SIMILARITY = 0.9  # of matches worth a line: the authors' own picture (densecl.md 7.5)


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


def draw(run: Path, kind: str, out: Path, count: int, epoch: int, size: int | None) -> None:
    """Write a sheet of `count` images of a run as PNG.

    Args:
        run: a run folder.
        kind: one of KINDS.
        out: the file to write.
        count: images on the sheet, one below another.
        epoch: whose crops and colours.
        size: side of the first view in pixels, others in proportion; None: as trained. For
            attention and pca the shorter side of the whole image; None: 320. For neighbours the side
            of centre crops; None: as trained.

    Raises:
        UserError: the run or its data cannot be read, or `out` cannot be written.
    """
    if kind not in KINDS:
        raise UserError(f"KIND={kind}: choose from {', '.join(KINDS)}")
    config = _config_of(run)
    if kind == "neighbours":
        _save(_neighbour_sheet(run, config, count, epoch, size), out)
        return
    whole = kind in ("attention", "pca")
    sample = _sample(config, count, epoch, None if whole else size)
    if kind == "crops":
        rows = [_crops_row(sample, i) for i in range(len(sample.sources))]
    elif kind == "masks":
        rows = _mask_rows(sample, epoch)
    elif kind == "correspondence":
        rows = _correspondence_rows(run, sample)
    else:
        rows = _feature_rows(run, kind, sample.sources, size or WHOLE_PX)
    rows = rows[-count:]
    note = " (<> is mirrored)" if kind == "crops" else ""
    when = "" if whole else f", epoch {epoch}"
    title = f"{config['method']['name']}, {run.name}{when}: {kind}{note}"
    _save(stacked(rows, title), out)


def mutual_matches(x_q: Tensor, x_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (pairs [M, 2], their similarity [M], best [N]) for the cells [N, C] and [P, C] of two views.

    `best` is the most similar key cell of each query cell; `pairs` are those of which each is the
    other's most similar. Similarities are cosines; ties go to the lowest index.
    """
    q = torch.nn.functional.normalize(x_q.float(), dim=1)
    k = torch.nn.functional.normalize(x_k.float(), dim=1)
    similarity = q @ k.T  # [N, P]
    best, back = similarity.argmax(1), similarity.argmax(0)
    cells = torch.arange(len(best))
    kept = back[best] == cells
    pairs = torch.stack([cells[kept], best[kept]], dim=1)
    return pairs, similarity[pairs[:, 0], pairs[:, 1]], best


def expected_cells(
    boxes: np.ndarray, flipped: np.ndarray, grids: tuple[tuple[int, int], tuple[int, int]]
) -> np.ndarray:
    """Return where the centre of each query cell lies in the key view, float [N, 2] (row, column).

    Args:
        boxes: float [2, 4] of the query and the key crop, fractions of the source image.
        flipped: bool [2].
        grids: rows and columns of their cells. Positions are in key cells: the centre of the first
            cell is (0.5, 0.5). NaN where the key crop does not contain it.
    """
    rows, columns = grids[0]
    v, u = np.mgrid[0:rows, 0:columns].reshape(2, -1) + 0.5
    u, v = u / columns, v / rows
    u = np.where(flipped[0], 1 - u, u)
    x0, y0, x1, y1 = boxes[0]
    x, y = x0 + u * (x1 - x0), y0 + v * (y1 - y0)  # in the source image
    x0, y0, x1, y1 = boxes[1]
    u, v = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
    u = np.where(flipped[1], 1 - u, u)
    inside = (u >= 0) & (u <= 1) & (v >= 0) & (v <= 1)
    places = np.stack([v * grids[1][0], u * grids[1][1]], axis=1)
    places[~inside] = np.nan
    return places


def shown(images: Tensor) -> np.ndarray:
    """Return normalised float images [..., 3, S, S] as uint8 [..., S, S, 3]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    values = (images.float().cpu() * std + mean).mul(255).round().clamp(0, 255)
    return values.to(torch.uint8).movedim(-3, -1).numpy()


def _config_of(run: Path) -> dict[str, Any]:
    """Return the run's settings as stored; of all of them, method, data and seed are needed here."""
    try:
        config = yaml.safe_load((run / "config.yaml").read_text())
        return {
            "method": dict(config["method"]),
            "data": dict(config["data"]),
            "seed": int(config["train"]["seed"]),
        }
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        raise UserError(f"{run}: no usable config.yaml in it; is it a run folder?") from None


def _sample(config: dict[str, Any], count: int, epoch: int, size: int | None) -> Sample:
    """Cut the first images of an epoch with Pillow, whichever loader the run used."""
    method = _method_config(config["method"])
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


def _method_config(values: dict[str, Any]) -> MethodConfig:
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


def _crops_row(sample: Sample, row: int) -> Image.Image:
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


def _correspondence_rows(run: Path, sample: Sample) -> list[Image.Image]:
    """Match the first two crops of the first view of every image."""
    crops = sample.batch.views[sample.views[0].name]
    if crops.images.shape[0] < 2:
        raise UserError(
            f"{run}: its view {sample.views[0].name!r} has one crop, nothing to match with"
        )
    with torch.no_grad():
        query = load_backbone(str(run), which="student").backbone(crops.images[0])
        key = load_backbone(str(run), which="teacher").backbone(crops.images[1])
    rows = []
    for i in range(len(sample.sources)):
        pairs, similarity, best = mutual_matches(query.dense[i], key.dense[i])
        grids = (query.grid, key.grid)
        expected = expected_cells(crops.boxes[:2, i].numpy(), crops.flipped[:2, i].numpy(), grids)
        both = (shown(crops.images[0, i]), shown(crops.images[1, i]))
        strong = (similarity > SIMILARITY).numpy()
        matches = (best.numpy(), pairs.numpy(), strong, expected)
        rows.append(correspondence_sheet(both, grids, *matches))
    return rows


def _mask_rows(sample: Sample, epoch: int) -> list[Image.Image]:
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


def _feature_rows(
    run: Path, kind: str, sources: list[np.ndarray], shorter: int
) -> list[Image.Image]:
    """Draw what the run's backbone makes of whole images."""
    backbone = load_backbone(str(run)).backbone
    pairs = [whole_image(source, shorter, backbone.stride) for source in sources]
    if kind == "pca":
        maps = component_maps(backbone, [image for _, image in pairs])
        captions = ["image", "components 1, 2, 3 as red, green, blue"]
        both = [(pixels, colours) for (pixels, _), colours in zip(pairs, maps)]
        return [tiles_sheet(captions, tiles, side=WHOLE_PX) for tiles in both]
    rows = []
    for pixels, image in pairs:
        names, maps = attention_maps(backbone, image)
        heads = [heated(pixels, one) for one in maps]
        if len(maps) > 1:
            names, heads = ["all heads", *names], [heated(pixels, maps.mean(0)), *heads]
        rows.append(tiles_sheet(["image", *names], [pixels, *heads]))
    return rows


def _neighbour_sheet(
    run: Path, config: dict[str, Any], count: int, epoch: int, size: int | None
) -> Image.Image:
    """Draw the first images of an epoch, each beside the ones most like it among more of them."""
    source = open_source(validate(DataConfig, config["data"], "config.yaml"))
    total = len(source.sizes)
    pool = Order(total, min(POOL, total), seed=config["seed"]).batches(epoch)[0].tolist()
    side = size or _method_config(config["method"]).views[0].size
    rows = neighbour_rows(load_backbone(str(run)).backbone, source, pool, count, side)
    name = config["method"]["name"]
    return stacked(rows, f"{name}, {run.name}, epoch {epoch}: neighbours among {len(pool)} images")


def _save(sheet: Image.Image, out: Path) -> None:
    aside = out.with_name(f".{out.name}.writing")
    try:
        with aside.open("wb") as file:
            sheet.save(file, format="PNG", optimize=True)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(out)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from None


def main(argv: list[str]) -> int:
    """Parse the command line and draw; return the process's exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dense_ssl.visualise", description="Draw what a run sees."
    )
    parser.add_argument("--run", type=Path, required=True, help="a run folder")
    parser.add_argument("--kind", default="crops", help=" or ".join(KINDS))
    parser.add_argument("--out", type=Path, help="the PNG (default: RUN/KIND.png)")
    parser.add_argument("--images", type=int, default=4, help="how many (default 4)")
    parser.add_argument("--epoch", type=int, default=0, help="whose crops (default 0)")
    parser.add_argument(
        "--size", type=int, help="side of the views in pixels (default: as trained)"
    )
    args = parser.parse_args(argv)
    out = args.out or args.run / f"{args.kind}.png"
    try:
        draw(args.run, args.kind, out, max(args.images, 1), args.epoch, args.size)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
