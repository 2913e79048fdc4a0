"""The machines of the linear SVM protocols: how one class is trained, tuned and scored.

scikit-learn's LinearSVC with squared hinge loss, l2, in the dual, weights 2 and 1 for positive and negative
images, tolerance 1e-4 and at most 2000 iterations, as OpenSelfSup and Van Gansbeke et al. use it.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from dense_ssl.evaluation.voc import average_precision, svm_cost_grid

FOLDS = 3
FIXED_COST = 0.5  # arXiv:2106.05967, released code
_ITERATIONS = 2000


@dataclass(frozen=True, slots=True)
class Problem:
    """One class: what is trained on, and which test images count."""

    name: str
    positive: np.ndarray  # bool [n] of the training images
    tested: np.ndarray  # bool [m]
    truth: np.ndarray  # bool [tested]


def fit(features: np.ndarray, positive: np.ndarray, cost: float, seed: int = 0) -> Any:
    """Return scikit-learn's LinearSVC fitted as both protocols do.

    Squared hinge, l2, dual, weights 2 and 1 for positive and negative, at most 2000 iterations.
    features float [n, D], positive bool [n].
    """
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # as published; large costs never do
        return _svc(cost, seed).fit(features, np.where(positive, 1, -1))


def cross_validated_cost(features: np.ndarray, positive: np.ndarray, seed: int = 0) -> float:
    """Return the cost of the grid with the best mean average precision over three folds, first on ties."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import cross_val_score

    grid = svm_cost_grid()
    labels = np.where(positive, 1, -1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        means = [
            cross_val_score(
                _svc(cost, seed), features, labels, cv=FOLDS, scoring="average_precision"
            ).mean()
            for cost in grid
        ]
    return grid[int(np.argmax(means))]


def precision(
    train: np.ndarray, test: np.ndarray, problem: Problem, cost: float, seed: int
) -> float:
    """Return the average precision in 0..1 of a class on its test images, after training on all rows."""
    machine = fit(train, problem.positive, cost, seed)
    scores = machine.decision_function(test[problem.tested])
    return average_precision(problem.truth.astype(int).tolist(), scores.tolist())


def fixed_precisions(
    train: np.ndarray, positive: np.ndarray, test: np.ndarray, truth: np.ndarray
) -> np.ndarray:
    """Return the average precision of every class with the fixed cost, float64 [C] in 0..1.

    train [n, D] and test [m, D] as they come from the network; positive [n, C] and truth [m, C] bool.
    """
    train, test = unit_rows(train, single=True), unit_rows(test, single=True)
    everything = np.ones(len(truth), bool)
    found = [
        precision(train, test, Problem("", said, everything, true), FIXED_COST, 0)
        for said, true in zip(positive.T, truth.T, strict=True)
    ]
    return np.array(found)


def unit_rows(features: np.ndarray, *, single: bool) -> np.ndarray:
    """Return rows over their norm plus 1e-5, in float64, or `single` precision (the fixed cost's)."""
    rows = features.astype(np.float32 if single else np.float64)
    return rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-5)


def _svc(cost: float, seed: int) -> Any:
    from sklearn.svm import LinearSVC

    return LinearSVC(
        C=cost,
        class_weight={1: 2, -1: 1},
        loss="squared_hinge",
        dual=True,  # pyright: ignore[reportArgumentType]  (its stubs know only "auto")
        tol=1e-4,
        max_iter=_ITERATIONS,
        random_state=seed,
    )
