"""Logistic regression on frozen features, from 1 % or 10 % of the labels (iBOT's, DINO's, UDI's).

L2-normalised class tokens; multinomial logistic loss, no intercept, penalty lambda / (2 n) on the squared
weights with lambda of 0.01, 0.1 and 1, at most 100 iterations. scikit-learn's C is 1 / lambda.

Which lambda counts is decided on a fifth of the few labelled images, and the regression fitted again on all
of them (`select=held-out`); `select=val` takes the best on the reported images, as published, and calls its
metrics `top1@best-on-val`. `subset` is a share of every class, a number of images per class, or a list file
(see `subsets.py`); with `samplings` above 1 the metrics are means, and the deviation is noted.
"""

import warnings
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from dense_ssl.backbones import Backbone
from dense_ssl.config import Config as BaseConfig
from dense_ssl.config import UserError
from dense_ssl.evaluation.choices import Filter, Pool, Several
from dense_ssl.evaluation.classification.accuracy import accuracies, chance
from dense_ssl.evaluation.classification.data import (
    ClassifyData,
    LabelledPictures,
    held_out,
    open_classification,
    read_picture,
    shorter_side,
)
from dense_ssl.evaluation.classification.subsets import draw_subset, is_list
from dense_ssl.evaluation.features import FeatureCache, check_size, content_key, extract
from dense_ssl.evaluation.readout import Readout

_SHARE = 0.2  # of the labelled images kept apart to choose lambda


class Config(BaseConfig):
    """Settings of the protocol."""

    subset: str = "1%"  # 10%, 8/class, or a list file
    samplings: Annotated[int, Field(ge=1)] = 1  # of a drawn subset
    lambdas: Several[Annotated[float, Field(gt=0)]] = (0.01, 0.1, 1.0)
    select: Literal["held-out", "val"] = "held-out"
    size: Annotated[int, Field(ge=16)] = 224
    resampling: Filter = "bicubic"
    pool: Pool = "cls"
    iterations: Annotated[int, Field(ge=1)] = 100
    seed: int = 0
    batch_size: Annotated[int, Field(ge=1)] = 64
    max_val: Annotated[int, Field(ge=1)] | None = None


def load(path: Path, config: Config) -> ClassifyData:
    """Return the data at `path`: class folders or COCO's objects, with all their training images.

    Raises:
        UserError: it is neither, nothing in it is usable, or the subset is not understood.
    """
    is_list(config.subset)
    return open_classification(path, (None, config.max_val), "semi-supervised")


def run(
    backbone: Backbone, data: ClassifyData, config: Config, cache: FeatureCache | None = None
) -> dict[str, float]:
    """Return `top1` and `top5` in percent, and their chance levels.

    A class of which no labelled image can be read is never answered.
    """
    check_size((config.size,), backbone.stride)
    reader = Readout(backbone, config.pool)
    val, val_labels = _embedded(reader, data.val, "val", data, config, cache)
    samplings = 1 if is_list(config.subset) else config.samplings
    found: list[dict[str, float]] = []
    chosen: list[float] = []
    count = 0
    for sampling in range(samplings):
        few = draw_subset(data.train, config.subset, config.seed + sampling, data.omitted)
        features, labels = _embedded(reader, few, "labelled", data, config, cache)
        count = len(labels)
        strength, scores = _best(features, labels, val, val_labels, len(data.classes), config)
        found.append(accuracies(scores, val_labels))
        chosen.append(strength)
    named = "@best-on-val" if config.select == "val" and len(config.lambdas) > 1 else ""
    values: dict[str, float] = {}
    for name in found[0]:
        numbers = [row[name] for row in found]
        values[f"{name}{named}"] = float(np.mean(numbers))
        if samplings > 1:
            values[f"note/{name} deviation"] = float(np.std(numbers, ddof=1))
    values |= chance(data.train.labels, val_labels, len(data.classes))
    return values | {"note/labelled images": float(count), "note/lambda": float(np.mean(chosen))}


def fit_logistic(
    features: Tensor, labels: Tensor, strength: float, classes: int, iterations: int = 100
) -> Tensor:
    """Return weights [C, D] that minimise mean cross-entropy + strength / (2 n) |W|^2.

    features float [n, D], labels int64 [n]. Rows of classes without a sample are zero; `class_scores`
    never chooses them.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    present = labels.unique()
    weights = torch.zeros(classes, features.shape[1], dtype=torch.float64)
    if len(present) == 1:
        return weights
    # scikit-learn fits two classes by one row of weights, whose penalty is twice that of two rows.
    cost = (2 if len(present) == 2 else 1) / strength
    model = LogisticRegression(
        C=cost, fit_intercept=False, max_iter=iterations, tol=1e-3, solver="lbfgs"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 100 iterations are the protocol
        model.fit(features.double().numpy(), labels.numpy())
    found = torch.from_numpy(model.coef_)
    if len(present) == 2:
        found = torch.cat([-found / 2, found / 2])
    weights[present] = found
    return weights


def class_scores(features: Tensor, weights: Tensor, seen: Tensor) -> Tensor:
    """Return scores [n, C]; classes that are not `seen` (bool [C]) get -inf."""
    return (features.double() @ weights.T).masked_fill(~seen, -torch.inf)


def _best(
    features: Tensor, labels: Tensor, val: Tensor, val_labels: Tensor, classes: int, config: Config
) -> tuple[float, Tensor]:
    """The chosen lambda, and the validation scores of the regression on all labelled images."""

    def scores(x: Tensor, y: Tensor, strength: float, judged: Tensor) -> Tensor:
        weights = fit_logistic(x, y, strength, classes, config.iterations)
        seen = torch.bincount(y, minlength=classes) > 0
        return class_scores(judged, weights, seen)

    def best_of(x: Tensor, y: Tensor, judged: Tensor, truth: Tensor) -> float:
        hits = [(scores(x, y, s, judged).argmax(1) == truth).sum() for s in config.lambdas]
        return config.lambdas[int(torch.stack(hits).argmax())]

    if len(config.lambdas) == 1:
        strength = config.lambdas[0]
    elif config.select == "val":
        strength = best_of(features, labels, val, val_labels)
    else:
        apart = held_out(labels, _SHARE, config.seed)
        if not apart.any():
            raise UserError(
                f"semi-supervised: {len(labels)} labelled images leave none to choose lambda on; give "
                "one (lambdas=0.1), or select=val"
            )
        strength = best_of(features[~apart], labels[~apart], features[apart], labels[apart])
    return strength, scores(features, labels, strength, val)


def _embedded(
    reader: Readout,
    split: LabelledPictures,
    name: str,
    data: ClassifyData,
    config: Config,
    cache: FeatureCache | None,
) -> tuple[Tensor, Tensor]:
    """Unit features [n, D] and labels [n] of those pictures that can be read, on the CPU."""
    resize = shorter_side(config.size)
    extracted = extract(
        reader,
        split.pictures,
        lambda picture: read_picture(picture, resize, config.size, config.resampling),
        lambda features: F.normalize(features, dim=1),
        batch_size=config.batch_size,
        key=content_key(
            *("semi", name, config.size, resize, config.pool, config.resampling, data.content),
            *((picture.path, picture.box, picture.row) for picture in split.pictures),
        ),
        cache=cache,
        omitted=data.omitted,
        label=name,
    )
    return extracted.features, split.labels[extracted.kept]
