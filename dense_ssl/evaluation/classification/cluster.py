"""Classes found without labels: the prototypes that a network was trained with, as clusters of images (iBOT).

Each validation image belongs to the prototype with the largest logit of its class token, by the head the
network was trained under. No label is used but to score: `accuracy` under the best one-to-one assignment of
clusters to classes (Hungarian method; Kuhn 1955), normalised mutual information (arithmetic mean), adjusted
Rand index and Fowlkes-Mallows index, as scikit-learn computes them. The published numbers are of heads with
as many prototypes as there are classes; with more, most clusters are no class's and the accuracy says little.

Chance keeps the sizes of the clusters and deals the images out at random.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from dense_ssl.backbones import Backbone
from dense_ssl.config import Config as BaseConfig
from dense_ssl.config import UserError
from dense_ssl.evaluation.choices import Filter
from dense_ssl.evaluation.classification.accuracy import confusion_sheet
from dense_ssl.evaluation.classification.data import (
    ClassifyData,
    open_classification,
    read_picture,
)
from dense_ssl.evaluation.features import FeatureCache, check_size, content_key, extract
from dense_ssl.evaluation.protocol_settings import marked
from dense_ssl.weights.fingerprint import weights_sha256

_DEALS = 5  # random ones, whose mean is chance


class Config(BaseConfig):
    """Settings of the protocol; the defaults are iBOT's on ImageNet."""

    size: Annotated[int, Field(ge=16)] = 224
    resampling: Filter = "bicubic"
    batch_size: Annotated[int, Field(ge=1)] = 64
    seed: int = 0  # of chance
    max_val: Annotated[int, Field(ge=1)] | None = None


class Prototypes(nn.Module):
    """A backbone and the head it was trained under: images [B, 3, H, W] to prototypes int64 [B]."""

    def __init__(self, backbone: Backbone) -> None:
        """Read the first class token.

        Raises:
            UserError: no head is known.
        """
        super().__init__()
        if backbone.class_head is None:
            raise UserError(
                f"cluster: no head over class tokens is known of this {backbone.config.name}; give a run of "
                "dino, ibot, sere or udi, or their full training file (not a backbone alone)"
            )
        self.backbone, self.head = backbone, backbone.class_head

    def forward(self, images: Tensor) -> Tensor:
        """Return the number of the nearest prototype."""
        return self.head.logits(self.backbone(images).cls[:, 0]).argmax(1)


def load(path: Path, config: Config) -> ClassifyData:
    """Return the data at `path`: class folders, or COCO's objects; training images are not used.

    Raises:
        UserError: it is neither, or nothing in it is usable.
    """
    return open_classification(path, (1, config.max_val), "cluster")


def run(
    backbone: Backbone, data: ClassifyData, config: Config, cache: FeatureCache | None = None
) -> dict[str, float]:
    """Return `accuracy`, `NMI`, `ARI` and `FMI` in percent, and chance of each.

    Notes tell how many prototypes there are, and how many have an image.

    Raises:
        UserError: no head is known of the network, or no image can be read.
    """
    said, truth, count = _assigned(backbone, data, config, cache)
    values = agreement(said, truth)
    random = np.random.default_rng(config.seed)
    dealt = [agreement(random.permutation(said), truth) for _ in range(_DEALS)]
    for name in values.copy():
        values[f"chance/{name}"] = float(np.mean([each[name] for each in dealt]))
    used = float(len(np.unique(said)))
    return values | {"note/prototypes": float(count), "note/prototypes used": used}


def pictures(
    backbone: Backbone, data: ClassifyData, config: Config, cache: FeatureCache | None = None
) -> dict[str, Image.Image]:
    """Return the confusion matrix of the assigned clusters; images of the others are in the last column."""
    said, truth, _ = _assigned(backbone, data, config, cache)
    numbers, places = np.unique(said, return_inverse=True)
    classes = len(data.classes)
    answers = np.full(len(numbers), classes)
    for cluster, label in matched(_counts(places, truth, classes)):
        answers[cluster] = label
    accuracy = 100 * float((answers[places] == truth).mean())
    named = marked(data.protocol, "cluster", config)
    title = f"{named}: {len(numbers)} clusters, accuracy {accuracy:.1f} %"
    names = (*data.classes, "no class")
    return {"confusion": confusion_sheet(truth, answers[places], names, title)}


def agreement(said: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return the scores in percent of clusters int [n] against classes int [n], whatever their numbers."""
    from sklearn import metrics

    places = np.unique(said, return_inverse=True)[1]
    counts = _counts(places, truth, int(truth.max()) + 1)
    found = sum(int(counts[cluster, label]) for cluster, label in matched(counts))
    return {
        "accuracy": 100 * found / len(truth),
        "NMI": 100 * float(metrics.normalized_mutual_info_score(truth, said)),
        "ARI": 100 * float(metrics.adjusted_rand_score(truth, said)),
        "FMI": 100 * float(metrics.fowlkes_mallows_score(truth, said)),
    }


def matched(counts: np.ndarray) -> list[tuple[int, int]]:
    """Return (cluster, class) of the one-to-one assignment that most images agree with.

    counts: int [clusters, C], images of each class in each cluster; of the larger side some stay alone.
    """
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(counts, maximize=True)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def _counts(clusters: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """Images of each class in each cluster, int64 [clusters, C]."""
    shape = (int(clusters.max()) + 1, classes)
    return np.bincount(clusters * classes + truth, minlength=shape[0] * shape[1]).reshape(shape)


def _assigned(
    backbone: Backbone, data: ClassifyData, config: Config, cache: FeatureCache | None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Prototype and class of every readable image, int64 [n] each, and how many prototypes there are."""
    check_size((config.size,), backbone.stride)
    network = Prototypes(backbone)
    resize = round(config.size * 256 / 224)
    extracted = extract(
        network,
        data.val.pictures,
        lambda picture: read_picture(picture, resize, config.size, config.resampling),
        lambda assigned: assigned,
        batch_size=config.batch_size,
        key=content_key(
            *("cluster", config.size, resize, config.resampling),
            *(data.content, weights_sha256(network.head.tensors())),
        ),
        cache=cache,
        omitted=data.omitted,
        label="val",
    )
    truth = data.val.labels[extracted.kept]
    return extracted.features.numpy(), truth.numpy(), len(network.head.prototypes)
