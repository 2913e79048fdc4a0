"""k nearest neighbours on frozen features, weighted by similarity (Wu et al. 2018, arXiv:1805.01978).

Pooled features, L2-normalised; the score of a class is the sum of exp(similarity / T) over those of the k
nearest training images that are of the class. Class folders: resize the shorter side by 256/224, centre
crop. COCO: every object of 32 px or more, framed by its box.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional as F

from dense_ssl.backbones import Backbone, Features
from dense_ssl.config import Config as BaseConfig
from dense_ssl.evaluation.classify_data import (
    ClassifyData,
    LabelledPictures,
    open_class_folders,
    open_coco_objects,
    read_picture,
)
from dense_ssl.evaluation.coco import is_coco
from dense_ssl.evaluation.features import FeatureCache, check_size, content_key, extract

_CHUNK = 512  # validation images compared at once


class Config(BaseConfig):
    """Settings of the protocol; the defaults are ImageNet's."""

    size: Annotated[int, Field(ge=16)] = 224  # side of the network's input in pixels
    k: tuple[Annotated[int, Field(ge=1)], ...] = (10, 20, 100, 200)
    # neighbours; `k=20` and `k=10,20` are understood
    temperature: Annotated[float, Field(gt=0)] = 0.07
    pool: Literal["cls", "mean"] = (
        "cls"  # first class token (ResNets: pooled map), or mean of cells
    )
    batch_size: Annotated[int, Field(ge=1)] = 64
    max_train: Annotated[int, Field(ge=1)] | None = None  # evenly spaced share of a large split
    max_val: Annotated[int, Field(ge=1)] | None = None

    @field_validator("k", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        if isinstance(value, str):
            return value.split(",")
        return (value,) if isinstance(value, int) else value


def load(path: Path, config: Config) -> ClassifyData:
    """Return the data at `path`: class folders (`knn/v1`) or COCO objects (`knn-objects/v1`).

    Raises:
        UserError: it is neither, or nothing in it is usable.
    """
    limits = (config.max_train, config.max_val)
    return open_coco_objects(path, limits) if is_coco(path) else open_class_folders(path, limits)


def run(
    backbone: Backbone, data: ClassifyData, config: Config, cache: FeatureCache | None = None
) -> dict[str, float]:
    """Return `top1@k` and `top5@k` in percent, and `chance/top1`, `chance/top5`.

    k is clipped to the number of training images. Chance is the accuracy of always answering with the
    most frequent training classes.
    """
    check_size((config.size,), backbone.stride)
    train_f, train_y = _embedded(backbone, data, data.train, "train", config, cache)
    val_f, val_y = _embedded(backbone, data, data.val, "val", config, cache)
    classes = len(data.classes)
    values: dict[str, float] = {}
    for k in sorted({min(k, len(train_f)) for k in config.k}):
        scores = knn_scores(train_f, train_y, val_f, k, config.temperature, classes)
        values |= {f"{name}@{k}": value for name, value in _accuracies(scores, val_y).items()}
    frequencies = torch.bincount(train_y, minlength=classes).float().expand(len(val_y), -1)
    values |= {f"chance/{name}": v for name, v in _accuracies(frequencies, val_y).items()}
    return values


def knn_classify(
    train_f: Tensor, train_y: Tensor, test_f: Tensor, k: int, T: float = 0.07
) -> Tensor:
    """Return the predicted class of every test feature, int64 [m].

    train_f [n, D] and test_f [m, D] are unit vectors, train_y int64 [n].
    """
    return knn_scores(train_f, train_y, test_f, k, T, int(train_y.max()) + 1).argmax(1)


def knn_scores(
    train_f: Tensor, train_y: Tensor, test_f: Tensor, k: int, T: float, classes: int
) -> Tensor:
    """Return the vote for every class [m, classes]: sum of exp(similarity / T) over its neighbours.

    Votes are divided by the largest weight, exp(s_1 / T), which changes no order and cannot overflow.
    """
    votes = []
    for chunk in test_f.split(_CHUNK):
        similarity, nearest = (chunk.float() @ train_f.float().T).topk(min(k, len(train_f)), dim=1)
        weights = ((similarity - similarity[:, :1]) / T).exp()
        vote = torch.zeros(len(chunk), classes, device=weights.device)
        votes.append(vote.scatter_add_(1, train_y[nearest], weights))
    return torch.cat(votes)


def _embedded(
    backbone: Backbone,
    data: ClassifyData,
    split: LabelledPictures,
    name: str,
    config: Config,
    cache: FeatureCache | None,
) -> tuple[Tensor, Tensor]:
    """Unit features [n, D] and labels [n] of those pictures that can be read."""
    resize = round(config.size * 256 / 224)

    def reduce(features: Features) -> Tensor:
        tokens = features.cls[:, 0] if config.pool == "cls" else features.dense.mean(1)
        return tokens.float()

    extracted = extract(
        backbone,
        split.pictures,
        lambda picture: read_picture(picture, resize, config.size),
        reduce,
        batch_size=config.batch_size,
        key=content_key(data.protocol, name, config.size, resize, config.pool, data.content),
        cache=cache,
        omitted=data.omitted,
        label=name,
    )
    device = next(backbone.parameters()).device
    features = F.normalize(extracted.features.to(device), dim=1)
    return features, split.labels[extracted.kept].to(device)


def _accuracies(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 in percent."""
    best = scores.topk(min(5, scores.shape[1]), dim=1).indices
    hits = best == labels[:, None]
    return {
        "top1": 100 * hits[:, 0].float().mean().item(),
        "top5": 100 * hits.any(1).float().mean().item(),
    }
