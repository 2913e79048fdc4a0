"""Pictures of what a run sees, and of what its backbone makes of it.

    python -m dense_ssl.visualise --run runs/a --kind crops     # writes runs/a/crops.png
    python -m dense_ssl.visualise --run runs/a --kind crops,pca # and runs/a/pca.png

    crops            each source image with its crop boxes, beside the views
    masks            the views with the patches that are hidden from the student
    correspondence   which cells of two views are matched
    attention        where each class token looks, head by head (ResNets: the pooled feature)
    pca              the cells' first three principal components as colours
    neighbours       images and the ones most like them by pooled feature
    queue            images and the key crops in the run's queue most like them (Revisiting)
    places           patches sampled in one crop and their places in another (UDI)

The images are the first of the run's first batch (or of another epoch), in the colours training gave
them. Correspondence: DenseCL's matching (arXiv:2011.09157, section 3.3) between the student's cells of
the first view and the teacher's of the second; lines join mutual nearest cells, thick ones those of
similarity above 0.9. Green and red, which the method never knew, come from the crop boxes.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dense_ssl.backbones import ViTBackbone
from dense_ssl.config import UserError, validate
from dense_ssl.loaders import DataConfig, open_source
from dense_ssl.loaders.order import Order
from dense_ssl.visualise.features import (
    attention_maps,
    component_maps,
    whole_image,
)
from dense_ssl.visualise.neighbours import POOL, neighbour_rows
from dense_ssl.visualise.places import place_rows
from dense_ssl.visualise.queue import queue_rows
from dense_ssl.visualise.samples import (
    Sample,
    config_of,
    crops_row,
    mask_rows,
    method_config,
    sample_of,
    shown,
)
from dense_ssl.visualise.sheets import below, correspondence_sheet, heated, stacked, tiles_sheet
from dense_ssl.weights.pretrained import load_backbone

KINDS = ("crops", "masks", "correspondence", "attention", "pca", "neighbours", "queue", "places")
WHOLE_PX = 320  # shorter side of whole images, for attention and pca
SIMILARITY = 0.9  # of matches worth a line: the authors' own picture (DenseCL)


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
    config = config_of(run)
    if kind in ("neighbours", "queue"):
        sheet = _queue_sheet(run, config, count, size) if kind == "queue" else None
        _save(sheet or _neighbour_sheet(run, config, count, epoch, size), out)
        return
    whole = kind in ("attention", "pca")
    sample = sample_of(config, count, epoch, None if whole else size)
    if kind == "crops":
        rows = [crops_row(sample, i) for i in range(len(sample.sources))]
    elif kind == "masks":
        rows = mask_rows(sample, epoch)
    elif kind == "correspondence":
        rows = _correspondence_rows(run, sample)
    elif kind == "places":
        rows = place_rows(sample, epoch)
    else:
        rows = _feature_rows(run, kind, sample.sources, size or WHOLE_PX)
    rows = rows[-count:]
    notes = {"crops": " (<> is mirrored)", "places": " (hollow: not in the other crop)"}
    when = "" if whole else f", epoch {epoch}"
    title = f"{config['method']['name']}, {run.name}{when}: {kind}{notes.get(kind, '')}"
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
        tokens = backbone.prefix if isinstance(backbone, ViTBackbone) else 1
        of_each = zip(np.split(np.array(names), tokens), np.split(maps, tokens), strict=True)
        rows.append(below([_heads_row(pixels, own, heat) for own, heat in of_each]))
    return rows


def _heads_row(pixels: np.ndarray, names: np.ndarray, maps: np.ndarray) -> Image.Image:
    """Draw an image, and where each head of one class token looks, [M, h, w], all of them first."""
    captions, tiles = ["image"], [pixels]
    if len(maps) > 1:
        captions.append(names[0].replace("head 0", "all heads"))
        tiles.append(heated(pixels, maps.mean(0)))
    return tiles_sheet([*captions, *names], [*tiles, *(heated(pixels, one) for one in maps)])


def _neighbour_sheet(
    run: Path, config: dict[str, Any], count: int, epoch: int, size: int | None
) -> Image.Image:
    """Draw the first images of an epoch, each beside the ones most like it among more of them."""
    source = open_source(validate(DataConfig, config["data"], "config.yaml"))
    total = len(source.sizes)
    pool = Order(total, min(POOL, total), seed=config["seed"]).batches(epoch)[0].tolist()
    side = size or method_config(config["method"]).views[0].size
    rows = neighbour_rows(load_backbone(str(run)).backbone, source, pool, count, side)
    name = config["method"]["name"]
    return stacked(rows, f"{name}, {run.name}, epoch {epoch}: neighbours among {len(pool)} images")


def _queue_sheet(run: Path, config: dict[str, Any], count: int, size: int | None) -> Image.Image:
    """Draw the images a run would see next, each beside the key crops in its queue most like it."""
    source = open_source(validate(DataConfig, config["data"], "config.yaml"))
    method = method_config(config["method"])
    rows = queue_rows(run, method, config["train"], source, count, size or method.views[0].size)
    return stacked(rows, f"{config['method']['name']}, {run.name}: neighbours in its queue")


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
    parser.add_argument("--kind", default="crops", help=f"one or several of {','.join(KINDS)}")
    parser.add_argument("--out", type=Path, help="the PNG (default: RUN/KIND.png)")
    parser.add_argument("--images", type=int, default=4, help="how many (default 4)")
    parser.add_argument("--epoch", type=int, default=0, help="whose crops (default 0)")
    parser.add_argument(
        "--size", type=int, help="side of the views in pixels (default: as trained)"
    )
    args = parser.parse_args(argv)
    kinds = args.kind.split(",")
    if args.out and len(kinds) > 1:
        sys.stderr.write(f"error: --out names one picture, --kind {len(kinds)}\n")
        return 2
    code = 0
    for kind in kinds:
        out = args.out or args.run / f"{kind}.png"
        try:
            draw(args.run, kind, out, max(args.images, 1), args.epoch, args.size)
        except UserError as error:
            sys.stderr.write(f"error: {error}\n")
            code = 2
        else:
            sys.stdout.write(f"{out}\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
