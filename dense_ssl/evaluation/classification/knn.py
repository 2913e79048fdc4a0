"""k nearest neighbours on frozen features, weighted by similarity (Wu et al. 2018, arXiv:1805.01978).

Pooled features, L2-normalised; the score of a class is the sum of exp(similarity / T) over those of the k
nearest training images that are of the class. Class folders: resize the shorter side by 256/224, centre
crop. COCO: every object of 32 px or more, framed by its box.

UDI (arXiv:2407.17671) has two class tokens: `pool=second` and `pool=both` read the other and both.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dense_ssl.backbones import Backbone
from dense_ssl.distributed import rank
from dense_ssl.evaluation.classification.accuracy import frequencies
from dense_ssl.evaluation.classification.data import (
    ClassifyData,
    LabelledPictures,
    open_classification,
    read_picture,
    shorter_side,
)
from dense_ssl.evaluation.classification.knn_again import confusion
from dense_ssl.evaluation.classification.knn_settings import VOTING, Config
from dense_ssl.evaluation.classification.votes import Neighbours, keep, kept, voted, votes
from dense_ssl.evaluation.features import FeatureCache, check_size, content_key, extract
from dense_ssl.evaluation.ranks import everyone
from dense_ssl.evaluation.readout import Readout

__all__ = [
    "Config", "knn_classify", "knn_scores", "load", "neighbours", "neighbours_file", "pictures", "run",
]  # fmt: skip

_CHUNK = 512  # validation images compared at once
_BANK_CHUNK = 131072  # with so many training images: 256 MB of similarities
_KEPT = 200  # neighbours that are kept at least: the most that is published


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
    return voted(_nearest(backbone, data, config, cache), config.k, config.temperature)


def pictures(
    backbone: Backbone, data: ClassifyData, config: Config, cache: FeatureCache | None = None
) -> dict[str, Image.Image]:
    """Return the confusion matrix of the middle k."""
    near = _nearest(backbone, data, config, cache)
    return confusion(near, config, data.classes, data.protocol)


def neighbours_file(data: ClassifyData, config: Config, cache: FeatureCache) -> Path:
    """Return where neighbours are kept: whatever is voted from them does not change the name."""
    key = content_key(
        "neighbours", data.protocol, data.content, config.model_dump_json(exclude=set(VOTING))
    )
    return cache.path(key).with_suffix(".safetensors")


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
    """Return the vote for every class, float64 [m, classes] on the CPU (votes.py)."""
    similarity, nearest = neighbours(train_f, test_f, k)
    found = votes(similarity.cpu().numpy(), train_y[nearest].cpu().numpy(), T, classes)
    return torch.from_numpy(found)


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


def _nearest(
    backbone: Backbone, data: ClassifyData, config: Config, cache: FeatureCache | None
) -> Neighbours:
    """The neighbours that votes are taken of; with a cache, looked for once."""
    file = neighbours_file(data, config, cache) if cache else None
    found = kept(file) if file else None
    enough = found is not None and found.answers(max(config.k))
    if all(everyone(enough)) and found is not None:  # of all ranks, so that they go the same way
        return found
    train_f, train_y, val_f, val_y = _splits(backbone, data, config, cache)
    similarity, nearest = neighbours(train_f, val_f, max(*config.k, _KEPT))
    found = Neighbours(
        similarity.cpu().numpy(),
        train_y[nearest].cpu().numpy().astype(np.int32),
        val_y.cpu().numpy().astype(np.int32),
        frequencies(train_y.cpu(), len(data.classes)),
    )
    # What could not be read is to be tried again the next time.
    whole = len(train_y) == len(data.train.pictures) and len(val_y) == len(data.val.pictures)
    if file is not None and whole and rank() == 0:
        keep(file, found)
    return found


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
    resize = shorter_side(config.size)
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
