"""What features look like, without labels: their rank, how they fill the sphere, how crops agree.

Everything is computed in float64: a few thousand vectors cost milliseconds, and a rank is a question of small
singular values.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_EPSILON = 1e-7  # RankMe's, arXiv:2210.02885, eq. 1


def rankme(features: Tensor) -> float:
    """Return the effective rank of features [n, d], 1 .. min(n, d) (RankMe, arXiv:2210.02885, eq. 1-2).

    exp of the entropy of the singular values divided by their sum. It grows with n: compare equal n only.
    """
    x = features.double()
    gram = x.T @ x if x.shape[1] <= x.shape[0] else x @ x.T
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    total = singular.sum()
    if not total > 0:
        return 1.0  # nothing but zeros: a single direction at most
    p = singular / total + _EPSILON
    return float((-(p * p.log()).sum()).exp())


def uniformity(features: Tensor) -> float:
    """Return log of the mean over pairs of exp(-2 |x - y|^2), features [n, d] put on the unit sphere.

    Wang and Isola 2020, arXiv:2005.10242, section 4.1.2 with t = 2: 0 where all are one point, about -4
    where they are spread evenly.
    """
    x = F.normalize(features.double(), dim=1)
    return float(torch.pdist(x).square().mul(-2).exp().mean().log())


def alignment(first: Tensor, second: Tensor) -> float:
    """Return the mean squared distance of two crops' features [n, d] on the unit sphere, 0 .. 4.

    Wang and Isola 2020, arXiv:2005.10242, section 4.1.1 with alpha = 2. Collapsed features are perfectly
    aligned: read it beside the uniformity.
    """
    apart = F.normalize(first.double(), dim=1) - F.normalize(second.double(), dim=1)
    return float(apart.square().sum(1).mean())


def spread(features: Tensor) -> float:
    """Return the mean deviation of the coordinates of unit features [n, d], times sqrt(d): 0 .. 1.

    The measure of Chen and He 2021 (SimSiam, arXiv:2011.10566, section 4.1, figure 2): 0 where all features
    are one point, 1 where they are isotropic.
    """
    x = F.normalize(features.double(), dim=1)
    return float(x.std(dim=0, correction=0).mean() * math.sqrt(x.shape[1]))


def similarity(units: Tensor) -> float:
    """Return the mean cosine of different rows of unit vectors [n, d]: 1 where all are one point."""
    n = len(units)
    total = units.double().sum(0).square().sum()
    return float((total - n) / (n * (n - 1)))


def usage(probabilities: Tensor) -> tuple[float, float]:
    """Return how many classes are in use over all rows, and how many a single row hesitates between.

    probabilities [n, K]; exp of the entropy of the mean row, and exp of the mean entropy of the rows.
    The first near 1: everything falls to one class. Both equal: every image is answered alike. These are
    the two ways in which self-distillation collapses (DINO, arXiv:2104.14294, section 5.3).
    """
    p = probabilities.double()
    used = _entropy(p.mean(0, keepdim=True))
    each = _entropy(p)
    return float(used.mean().exp()), float(each.mean().exp())


def _entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(1)
