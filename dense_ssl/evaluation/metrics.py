"""Segmentation metrics from a confusion matrix."""

import numpy as np
import torch
from torch import Tensor

_BETA = 0.3  # weight of precision in ImageNet-S's F-measure (Gao et al., arXiv:2106.03149)


def confusion(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Return int64 [classes, classes]: pixels of class row predicted as column.

    labels and predicted are integers of one shape; labels outside 0 .. classes-1 (void) count nowhere.
    """
    truth = labels.cpu().numpy().astype(np.int64).ravel()
    said = predicted.cpu().numpy().astype(np.int64).ravel()
    valid = (truth >= 0) & (truth < classes)
    cells = truth[valid] * classes + said[valid]
    counts = np.bincount(cells, minlength=classes * classes)
    return torch.from_numpy(counts).view(classes, classes)


def segmentation_scores(matrix: Tensor) -> dict[str, float]:
    """Return `mIoU`, `aAcc` (pixels) and `mAcc` (mean over classes of recall) in percent.

    Means are over the classes that occur: for IoU in truth or prediction, for accuracy in truth. A
    class that occurs and is never hit counts as zero.

    Raises:
        ValueError: the matrix is empty (no pixel had a label).
    """
    counts = matrix.cpu().numpy().astype(np.float64)
    if not counts.sum():
        raise ValueError("no labelled pixel to score")
    hit, truth, said = np.diag(counts), counts.sum(1), counts.sum(0)
    union = truth + said - hit
    iou = hit[union > 0] / union[union > 0]
    recall = hit[truth > 0] / truth[truth > 0]
    return {
        "mIoU": 100 * float(iou.mean()),
        "aAcc": 100 * float(hit.sum() / counts.sum()),
        "mAcc": 100 * float(recall.mean()),
    }


def scores_beside_chance(matrix: Tensor, commonest: int) -> dict[str, float]:
    """Return the scores of a matrix, and as `chance/...` those of one class everywhere."""
    chance = torch.zeros_like(matrix)
    chance[:, commonest] = matrix.sum(1)
    by_chance = segmentation_scores(chance)
    return segmentation_scores(matrix) | {f"chance/{name}": v for name, v in by_chance.items()}


def foreground_f(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Return the F-measure of one image's foreground, 0..1: (1 + b) P R / (b P + R) with b = 0.3.

    Foreground are all classes but 0; labels below 0 (void) count nowhere. Without true or predicted
    foreground it is 0, as ImageNet-S's evaluation has it. labels and predicted: int [H, W].
    """
    known = labels >= 0
    true, said = labels[known] > 0, predicted[known] > 0
    both = np.count_nonzero(true & said)
    if not both:
        return 0.0
    precision, recall = both / np.count_nonzero(said), both / np.count_nonzero(true)
    return (1 + _BETA) * precision * recall / (_BETA * precision + recall)
