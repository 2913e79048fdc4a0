"""How image retrieval and copy detection are scored (ROxford, RParis, Copydays; iBOT)."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor


def retrieval_precision(positions: np.ndarray, total: int | None = None) -> float:
    """Return the average precision of a ranking whose positives stand at `positions`, by trapezoids.

    positions int [n], ascending, counted from 0. Every positive adds the mean of the precision just
    before it and at it, over `total`: n, or more where some positives are not in the ranking. Before
    the first place the precision is 1.
    """
    found = np.arange(len(positions))
    before = np.where(positions == 0, 1.0, found / np.maximum(positions, 1))
    at = (found + 1) / (positions + 1)
    return float(((before + at) / 2).sum() / (len(positions) if total is None else total))


def rankings_scores(
    ranks: np.ndarray, truth: Sequence[Mapping[str, Sequence[int]]], kappas: Sequence[int] = ()
) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """Return mean average precision, that of each query, mean precision at each kappa, and that of each.

    Queries without a positive image are NaN and count in no mean.

    Args:
        ranks: int [n, Q], the database in descending similarity to each query.
        truth: per query the images `ok`, and maybe `junk`, which are taken out of its ranking.
        kappas: places; where fewer are needed to see all positives, so many count.
    """
    precisions = np.full(len(truth), np.nan)
    at_kappa = np.full((len(truth), len(kappas)), np.nan)
    for query, images in enumerate(truth):
        if not len(images["ok"]):
            continue
        column = ranks[:, query]
        column = column[~np.isin(column, np.asarray(images.get("junk", ()), column.dtype))]
        positions = np.flatnonzero(np.isin(column, np.asarray(images["ok"], column.dtype)))
        precisions[query] = retrieval_precision(positions)
        for number, kappa in enumerate(kappas):
            places = min(int(positions[-1]) + 1, kappa)
            at_kappa[query, number] = (positions < places).sum() / places
    usable = ~np.isnan(precisions)
    if not usable.any():
        return float("nan"), precisions, np.full(len(kappas), np.nan), at_kappa
    return float(precisions[usable].mean()), precisions, at_kappa[usable].mean(axis=0), at_kappa


def generalised_mean(cells: Tensor, power: float = 4.0, floor: float = 1e-6) -> Tensor:
    """Return (mean over cells of max(x, floor)^power)^(1 / power); cells [..., N, D] to [..., D]."""
    return cells.clamp(min=floor).pow(power).mean(-2).pow(1 / power)
