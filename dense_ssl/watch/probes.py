"""Labelled images beside one another: k nearest neighbours, and a linear probe solved in one go."""

import warnings

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from dense_ssl.evaluation.classification.accuracy import accuracies, chance
from dense_ssl.evaluation.classification.knn import knn_scores

NEIGHBOURS, TEMPERATURE = 20, 0.07  # DINO's k-NN, arXiv:2104.14294, appendix F.1
_ALPHAS = np.logspace(-3, 3, 7)  # of which leave-one-out chooses


def probe(
    bank: Tensor, bank_labels: Tensor, asked: Tensor, asked_labels: Tensor, classes: int
) -> dict[str, float]:
    """Return `knn` and `linear`, top-1 in percent, and `class_chance`; features [m, d] and [k, d].

    The linear probe is a ridge regression on the classes, its penalty chosen by leave-one-out over the bank
    (scikit-learn's RidgeClassifierCV): no learning rate, nothing random, milliseconds. It is lower than
    what the linear protocol of the evaluation gives, and moves with it.
    """
    from sklearn.linear_model import RidgeClassifierCV  # half a second to import

    units, questions = F.normalize(bank.float(), dim=1), F.normalize(asked.float(), dim=1)
    scores = knn_scores(units, bank_labels, questions, NEIGHBOURS, TEMPERATURE, classes)
    found = {"knn": accuracies(scores, asked_labels)["top1"]}
    if len(bank_labels.unique()) > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes with few members, or ill-conditioned
            ridge = RidgeClassifierCV(_ALPHAS).fit(units.double().numpy(), bank_labels.numpy())
        found["linear"] = 100 * ridge.score(questions.double().numpy(), asked_labels.numpy())
    return found | {"class_chance": chance(bank_labels, asked_labels, classes)["chance/top1"]}
