"""Functions of the evaluation protocols: k-NN, support vector machines, layer decay, retrieval."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from dense_ssl.evaluation.classification.accuracy import accuracies
from dense_ssl.evaluation.classification.knn import knn_scores
from dense_ssl.evaluation.classification.svm_fit import fixed_precisions
from dense_ssl.evaluation.retrieval.ranking import generalised_mean, rankings_scores
from dense_ssl.evaluation.trained.layer_decay import layer_decay_scale

__all__ = ["compute_map", "gem", "knn", "layer_decay_scale", "svm_fixed_c"]


def knn(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    k: int,
    T: float = 0.07,
    C: int = 1000,
) -> tuple[float, float]:
    """Return top-1 and top-5 in percent; train [n, D] and test [m, D] are unit vectors, C classes.

    Which of two classes with equal votes comes first is left to the sort.
    """
    found = accuracies(knn_scores(train, train_labels, test, k, T, C), test_labels)
    return found["top1"], found["top5"]


def svm_fixed_c(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> np.ndarray:
    """Return the average precision of every class, float64 [C] in 0..1, by the protocol with C = 0.5.

    Features [n, D] are normalised inside; labels int [n, C] of 1, 0 (difficult: as absent) and -1.
    """
    return fixed_precisions(train, train_labels == 1, test, test_labels == 1)


def compute_map(
    ranks: np.ndarray, gnd: Sequence[Mapping[str, Sequence[int]]], kappas: Sequence[int] = ()
) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """Return (map, aps, mean precision at kappas, precisions at kappas); ranks int [n, Q].

    gnd has `ok` and maybe `junk` for every query.
    """
    return rankings_scores(ranks, gnd, kappas)


def gem(feats: Tensor, p: float = 4.0) -> Tensor:
    """Return the generalised mean of cells [..., N, D] over N, [..., D]."""
    return generalised_mean(feats, p)
