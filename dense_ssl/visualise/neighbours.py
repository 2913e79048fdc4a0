"""The images that a run's backbone finds most alike: queries and their nearest neighbours, as a sheet.

The neighbours of "Revisiting Contrastive Methods" (arXiv:2106.05967) are found by pooled backbone features in
a queue that does not remember whose they are; here they are found the same way among the first images of an
epoch. Any method's backbone can be looked at.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dense_ssl.backbones import Backbone
from dense_ssl.config import UserError
from dense_ssl.evaluation.features import normalised
from dense_ssl.loaders.source import ImageSource, decode
from dense_ssl.visualise.sheets import tiles_sheet
from kernels.queue_neighbours import queue_neighbours

POOL = 512  # images among which neighbours are looked for
SHOWN = 5  # neighbours beside each query
BATCH = 32


def neighbour_rows(
    backbone: Backbone, source: ImageSource, pool: Sequence[int], count: int, side: int
) -> list[Image.Image]:
    """Return one row for each of the first `count` images of the pool: it, then the ones most like it.

    Args:
        backbone: in eval mode.
        source: of the images.
        pool: records to look among; those that cannot be read are left out.
        count: rows.
        side: of the centre crops the backbone sees, in pixels.

    Raises:
        UserError: fewer than two of the images can be read.
    """
    pixels = list(centre_crops(source, pool, side))
    if len(pixels) < 2:
        raise UserError(f"{len(pixels)} of {len(pool)} images can be read: no neighbours to show")
    features = pooled_features(backbone, pixels)
    index, similarity = nearest_others(features, min(SHOWN, len(pixels) - 1))
    rows = []
    for query in range(min(count, len(pixels))):
        names = ["query", *(f"{value:.2f}" for value in similarity[query].tolist())]
        tiles = [pixels[query], *(pixels[i] for i in index[query].tolist())]
        rows.append(tiles_sheet(names, tiles))
    return rows


@torch.no_grad()
def pooled_features(backbone: Backbone, pixels: Sequence[np.ndarray]) -> Tensor:
    """Return unit features [n, D] of images uint8 [S, S, 3]: pooled maps, or first class tokens."""
    batches = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).split(BATCH)
    return F.normalize(torch.cat([backbone(normalised(x)).cls[:, 0] for x in batches]), dim=1)


def nearest_others(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` other rows most like each row of unit features [n, D], and how alike they are.

    int64 and float32 [n, count], most similar first.
    """
    index, similarity = queue_neighbours(features, features, count + 1)
    # A row is its own nearest, unless another one is its equal: then any of the equals may be missing.
    own = index == torch.arange(len(index))[:, None]
    own[:, -1] |= ~own.any(1)
    kept = ~own
    return index[kept].view(-1, count), similarity[kept].view(-1, count)


def centre_crops(source: ImageSource, records: Sequence[int], side: int) -> Iterator[np.ndarray]:
    """Yield the middle of each readable image, uint8 [side, side, 3], its shorter side made 8 / 7 of it."""
    for record in records:
        try:
            image = decode(source.read(int(record)))
        except (OSError, ValueError):
            continue
        edge = 7 / 8 * min(image.size)
        x, y = ((length - edge) / 2 for length in image.size)
        box = (x, y, x + edge, y + edge)
        yield np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box=box))
