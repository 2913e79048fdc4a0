"""The counting rules of the PASCAL VOC protocols, as the dense papers use them.

Detection: 11-point average precision (VOC 2007). Linear SVM on VOC07: the cost grid, the
specified pooling and the interpolated average precision of the OpenSelfSup protocol (DenseCL).
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torch.nn import functional as F


def voc_ap_11point(rec: np.ndarray, prec: np.ndarray) -> float:
    """Return the mean over recalls 0, 0.1, ..., 1 of the best precision at that recall or more.

    rec and prec [n] are recall and precision after each detection in order of score.
    """
    rec, prec = np.asarray(rec, dtype=np.float64), np.asarray(prec, dtype=np.float64)
    best = [prec[rec >= t].max(initial=0.0) for t in np.arange(0.0, 1.1, 0.1)]
    return float(np.mean(best))


def svm_cost_grid() -> list[float]:
    """Return the 19 costs tried for every class: 1, 10, 100 and 0.5^n for n = 4 ... 19, ascending."""
    return sorted([1.0, 10.0, 100.0, *(0.5**n for n in range(4, 20))])


def average_precision(labels: Sequence[int], scores: Sequence[float]) -> float:
    """Return the area under the precision-recall curve made monotone from the right.

    labels: 1 present, 0 absent, -1 left out. Ties keep their order. Without a positive it is 0.
    """
    truth, value = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    kept = truth != -1
    truth, value = truth[kept] == 1, value[kept]
    positives = int(truth.sum())
    if positives == 0:
        return 0.0
    hits = truth[np.argsort(-value, kind="stable")]
    found = np.cumsum(hits)
    precision = found / np.arange(1, len(hits) + 1)
    monotone = np.maximum.accumulate(precision[::-1])[::-1]
    return float(monotone[hits].sum() / positives)


# Per feature: kernel, stride, padding; the padding of feat1 counts into its means.
_POOLS = ((10, 10, 4), (16, 8, 0), (13, 5, 0), (8, 3, 0), (6, 1, 0))


def specified_pool(maps: Sequence[Tensor]) -> list[Tensor]:
    """Return the five pooled and flattened features of a ResNet at 224 px (C, H, W order).

    maps: the stem after ReLU [B, 64, 112, 112], then the four stages; for ResNet-50 the results have
    9216, 9216, 8192, 9216 and 8192 columns.
    """
    assert len(maps) == len(_POOLS), f"five maps expected, got {len(maps)}"
    return [
        F.avg_pool2d(x, kernel, stride, padding, count_include_pad=True).flatten(1)
        for x, (kernel, stride, padding) in zip(maps, _POOLS, strict=True)
    ]
