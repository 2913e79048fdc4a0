"""Pictures of the patches that UDI compares: sampled in one crop, and at the same places in another."""

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dense_ssl.backbones import make_backbone
from dense_ssl.config import UserError
from dense_ssl.methods.udi import UdiConfig, strata_of
from dense_ssl.methods.udi_maps import draw_cells, make_maps
from dense_ssl.schedule import Step
from dense_ssl.visualise.samples import Sample, shown
from dense_ssl.visualise.sheets import BACKGROUND, INK, cell_colours, tiles_sheet

TILE_PX = 260
_LOCALS = 1  # local crops on a sheet


def place_rows(sample: Sample, epoch: int) -> list[Image.Image]:
    """Draw pairs of crops of every image: samples of one, and their places in the other.

    The same colour is the same place of the image; hollow samples are not in the other crop.

    Raises:
        UserError: the run's method compares no sampled patches.
    """
    config = sample.method
    if not isinstance(config, UdiConfig) or not config.patches:
        raise UserError(f"KIND=places: {dict(config)['name']} compares no sampled patches")
    drawn_at = config.model_copy(update={"views": sample.views})
    strata = strata_of(drawn_at, make_backbone(config.backbone))
    views, index = sample.batch.views, sample.batch.index
    crops, local = views["global"], views.get("local")
    step = Step(epoch, 1, epoch + 1, sample.seed)
    maps = make_maps(crops, local, index, step, strata)
    side, window = strata.of_global
    cells = torch.from_numpy(draw_cells(step, index, 0, side, window))
    small_cells = None
    if strata.of_local is not None:
        small_cells = torch.from_numpy(draw_cells(step, index, 1, *strata.of_local))
    rows = []
    for i in range(len(index)):
        images = [shown(crops.images[v, i]) for v in (0, 1)]
        names, tiles = [], []
        for v in (0, 1):
            pair = _pair(images[v], cells[i], side, images[1 - v], maps.of_global[1 - v, i], side)
            names += [f"global[{v}]", f"in global[{1 - v}]: {pair[2]} of {len(cells[i])}"]
            tiles += pair[:2]
        if local is not None and small_cells is not None and maps.of_local is not None:
            assert strata.of_local is not None
            for at in range(min(_LOCALS, len(local.images))):
                small = shown(local.images[at, i])
                pair = _pair(
                    *(small, small_cells[i], strata.of_local[0]),
                    *(images[0], maps.of_local[0, i, at], side),
                )
                names += [f"local[{at}]", f"in global[0]: {pair[2]} of {len(small_cells[i])}"]
                tiles += pair[:2]
        rows.append(tiles_sheet(names, tiles, side=TILE_PX))
    return rows


def _pair(
    image: np.ndarray, cells: Tensor, side: int, other: np.ndarray, places: Tensor, other_side: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return both crops with their points, and how many are in both; places are weights [S, N]."""
    points = torch.stack([cells % side, cells // side], 1) / (side - 1)
    grid = torch.arange(other_side**2)
    corners = torch.stack([grid % other_side, grid // other_side], 1) / (other_side - 1)
    found = places.sum(1) > 0
    colours = cell_colours(side, side)[cells.numpy()]
    here = _dotted(image, points.numpy(), colours, found.numpy())
    there = _dotted(other, (places @ corners)[found].numpy(), colours[found.numpy()], None)
    return here, there, int(found.sum())


def _dotted(
    image: np.ndarray, points: np.ndarray, colours: np.ndarray, filled: np.ndarray | None
) -> np.ndarray:
    """Return an image with dots at points [S, 2] in fractions of it, filled or, where not, hollow."""
    big = Image.fromarray(image).resize((TILE_PX, TILE_PX), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(big)
    for number, ((x, y), colour) in enumerate(zip(points, colours, strict=True)):
        # Patches on the border are by definition on its last pixels: moved in, to be seen whole.
        x, y = (min(max(float(v) * TILE_PX, 7), TILE_PX - 7) for v in (x, y))
        inside = tuple(int(c) for c in colour) if filled is None or filled[number] else None
        draw.ellipse((x - 7, y - 7, x + 7, y + 7), outline=INK)
        draw.ellipse((x - 6, y - 6, x + 6, y + 6), outline=BACKGROUND, width=2, fill=inside)
    return np.asarray(big)
