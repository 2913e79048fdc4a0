"""k nearest neighbours on frozen features, weighted by similarity (Wu et al. 2018, arXiv:1805.01978).

Pooled features, L2-normalised; the score of a class is the sum of exp(similarity / T) over those of the k
nearest training images that are of the class. Class folders: resize the shorter side by 256/224, centre
crop. COCO: every object of 32 px or more, framed by its box.

UDI (arXiv:2407.17671) has two class tokens: `pool=second` and `pool=both` read the other and both.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional as F

from dense_ssl.backbones import Backbone
from dense_ssl.config import Config as BaseConfig
from dense_ssl.evaluation.classification.accuracy import accuracies, chance, confusion_sheet
from dense_ssl.evaluation.classification.data import (
    ClassifyData,
    Filter,
    LabelledPictures,
    open_classification,
    read_picture,
)
from dense_ssl.evaluation.features import FeatureCache, check_size, content_key, extract
from dense_ssl.evaluation.readout import Pool, Readout

_CHUNK = 512  # validation images compared at once
_BANK_CHUNK = 131072  # with so many training images: 256 MB of similarities


class Config(BaseConfig):
    """Settings of the protocol; the defaults are ImageNet's."""

    size: Annotated[int, Field(ge=16)] = 224  # side of the network's input in pixels
    k: tuple[Annotated[int, Field(ge=1)], ...] = (10, 20, 100, 200)
    # neighbours; `k=20` and `k=10,20` are understood
    temperature: Annotated[float, Field(gt=0)] = 0.07
    pool: Pool = "cls"
    resampling: Filter = "bilinear"  # MoCo's and DenseCL's; DINO, iBOT and UDI: bicubic
    bank: Literal["fp32", "fp16"] = "fp32"  # how features are kept; similarities are float32
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
    return open_classification(path, (config.max_train, config.max_val), "knn")


def run(
    backbone: Backbone, data: ClassifyData, config: Config, cache: FeatureCache | None = None
) -> dict[str, float]:
    """Return `top1@k` and `top5@k` in percent, and `chance/top1`, `chance/top5`.

    k is clipped to the number of training images. Chance is the accuracy of always answering with the
    most frequent training classes.
    """
    train_f, train_y, val_f, val_y = _splits(backbone, data, config, cache)
    classes = len(data.classes)
    values: dict[str, float] = {}
    ks = sorted({min(k, len(train_f)) for k in config.k})
    similarity, nearest = neighbours(train_f, val_f, max(ks))
    for k in ks:
        scores = _votes(similarity[:, :k], train_y[nearest[:, :k]], config.temperature, classes)
        values |= {f"{name}@{k}": value for name, value in accuracies(scores, val_y).items()}
    return values | chance(train_y, val_y, classes)


def pictures(
    backbone: Backbone, data: ClassifyData, config: Config, cache: FeatureCache | None = None
) -> dict[str, Image.Image]:
    """Return the confusion matrix of the middle k."""
    train_f, train_y, val_f, val_y = _splits(backbone, data, config, cache)
    ks = sorted({min(k, len(train_f)) for k in config.k})
    k = ks[(len(ks) - 1) // 2]
    scores = knn_scores(train_f, train_y, val_f, k, config.temperature, len(data.classes))
    top1 = accuracies(scores, val_y)["top1"]
    title = f"{data.protocol}: k = {k}, top-1 {top1:.1f} %"
    return {"confusion": confusion_sheet(val_y, scores.argmax(1), data.classes, title)}


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
    similarity, nearest = neighbours(train_f, test_f, k)
    return _votes(similarity, train_y[nearest], T, classes)


def neighbours(train_f: Tensor, test_f: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest similarities of every test feature, descending, and whose they are.

    float32 [m, k] and int64 [m, k]; k is clipped to n. Both sides are taken in chunks, so that memory
    stays bounded; features of any type are compared in float32.
    """
    k = min(k, len(train_f))
    rows = []
    for chunk in test_f.split(_CHUNK):
        chunk = chunk.float()
        best = torch.empty(len(chunk), 0, device=chunk.device)
        whose = torch.empty(len(chunk), 0, dtype=torch.int64, device=chunk.device)
        for start in range(0, len(train_f), _BANK_CHUNK):
            part = train_f[start : start + _BANK_CHUNK].float()
            similarity, nearest = (chunk @ part.T).topk(min(k, len(part)), dim=1)
            best, kept = torch.cat([best, similarity], 1).topk(
                min(k, best.shape[1] + similarity.shape[1]), dim=1
            )
            whose = torch.cat([whose, nearest + start], 1).gather(1, kept)
        rows.append((best, whose))
    return torch.cat([best for best, _ in rows]), torch.cat([whose for _, whose in rows])


def _votes(similarity: Tensor, labels: Tensor, T: float, classes: int) -> Tensor:
    """Votes [m, classes] of neighbours with similarities [m, k], descending, and labels [m, k]."""
    weights = ((similarity - similarity[:, :1]) / T).exp()
    votes = torch.zeros(len(weights), classes, device=weights.device)
    return votes.scatter_add_(1, labels, weights)


def _splits(
    backbone: Backbone, data: ClassifyData, config: Config, cache: FeatureCache | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and labels of train, then of val."""
    check_size((config.size,), backbone.stride)
    train = _embedded(backbone, data, data.train, "train", config, cache)
    return *train, *_embedded(backbone, data, data.val, "val", config, cache)


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
    kept = torch.float16 if config.bank == "fp16" else torch.float32
    extracted = extract(
        Readout(backbone, config.pool),
        split.pictures,
        lambda picture: read_picture(picture, resize, config.size, config.resampling),
        lambda features: F.normalize(features.float(), dim=1).to(kept),
        batch_size=config.batch_size,
        key=content_key(
            *(data.protocol, name, config.size, resize, config.pool, config.resampling),
            *(config.bank, data.content),
        ),
        cache=cache,
        omitted=data.omitted,
        label=name,
    )
    device = next(backbone.parameters()).device
    return extracted.features.to(device), split.labels[extracted.kept].to(device)
