"""Segments of images without labels: clusters of an image's own cells, each with a mean feature.

By scikit-learn's k-means, one image at a time.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dense_ssl.backbones import Features
from dense_ssl.evaluation.features import in_order

_STARTS, _ROUNDS = 3, 100  # of k-means: the best start is taken


@dataclass(frozen=True, slots=True)
class Segments:
    """The clusters of n images; an image with fewer distinct cells than clusters leaves the last empty."""

    prototypes: Tensor  # float32 [n, K, D], unit vectors; zero where a cluster is empty
    maps: Tensor  # uint8 [n, h, w], the cluster of each cell


def packed_segments(features: Features, clusters: int, seed: int) -> Tensor:
    """Return the segments of a batch as one row per image, float32 [B, K * D + h * w].

    Prototypes, then the map: what `unpacked` takes apart.
    """
    cells = F.normalize(features.dense.float(), dim=2).cpu()
    return torch.stack(
        list(in_order(lambda image: _clustered(image, clusters, seed), cells.unbind()))
    )


def unpacked(rows: Tensor, clusters: int, grid: tuple[int, int]) -> Segments:
    """Return the segments in rows [n, K * D + h * w]."""
    cells = grid[0] * grid[1]
    prototypes = rows[:, :-cells].unflatten(1, (clusters, -1))
    return Segments(prototypes, rows[:, -cells:].to(torch.uint8).unflatten(1, grid))


def _clustered(cells: Tensor, clusters: int, seed: int) -> Tensor:
    """One row of `packed_segments` from unit cells [N, D]."""
    from sklearn.cluster import k_means  # a dependency of some protocols alone

    points = cells.numpy()
    distinct = min(clusters, len(np.unique(points, axis=0)))
    starts: Any = _STARTS
    _, labels, *_ = k_means(points, distinct, n_init=starts, max_iter=_ROUNDS, random_state=seed)
    which = torch.from_numpy(np.asarray(labels, np.int64))
    sums = torch.zeros(clusters, cells.shape[1]).index_add_(0, which, cells)
    return torch.cat([F.normalize(sums, dim=1).flatten(), which.float()])
