"""The vote of nearest neighbours, from their similarities and labels alone; in numpy, without torch."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dense_ssl.evaluation.classification.accuracy import chance_of, hits, places

_CHUNK = 4096  # images whose votes for all classes are held at once


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The K training images nearest to each validation image, and what a vote needs besides."""

    similarity: np.ndarray  # float32 [m, K], descending
    labels: np.ndarray  # int32 [m, K]
    truth: np.ndarray  # int32 [m]
    counts: np.ndarray  # int64 [C], training images of each class

    def answers(self, most: int) -> bool:
        """Return whether a vote of `most` neighbours, or of all training images, can be taken."""
        return self.similarity.shape[1] >= min(most, int(self.counts.sum()))


def voted(near: Neighbours, ks: Sequence[int], temperature: float) -> dict[str, float]:
    """Return `top1@k` and `top5@k` in percent, and `chance/top1`, `chance/top5`.

    k is clipped to the number of training images. Chance always answers the most frequent training classes.
    """
    values: dict[str, float] = {}
    for k in sorted({min(k, int(near.counts.sum())) for k in ks}):
        found = np.concatenate(
            [places(scores, truth) for scores, truth in _parts(near, k, temperature)]
        )
        values |= {f"{name}@{k}": value for name, value in hits(found).items()}
    return values | chance_of(near.counts, near.truth)


def said(near: Neighbours, k: int, temperature: float) -> np.ndarray:
    """Return the class with most votes, the first one on ties, int64 [m]."""
    return np.concatenate([scores.argmax(1) for scores, _ in _parts(near, k, temperature)])


def votes(similarity: np.ndarray, labels: np.ndarray, T: float, classes: int) -> np.ndarray:
    """Return the vote for every class, float64 [m, classes]: sum of exp(similarity / T) over neighbours.

    Votes are divided by the largest weight, exp(s_1 / T), which changes no order and cannot overflow.

    Args:
        similarity: [m, k], descending.
        labels: int [m, k].
        T: temperature.
        classes: how many there are.
    """
    similarity = similarity.astype(np.float64)
    weights = np.exp((similarity - similarity[:, :1]) / T)
    cells = np.arange(len(labels))[:, None] * classes + labels
    flat = np.bincount(cells.ravel(), weights.ravel(), minlength=len(labels) * classes)
    return flat.reshape(len(labels), classes)


def keep(file: Path, near: Neighbours) -> None:
    """Write neighbours, whole or not at all; a full disk costs the copy, not the evaluation."""
    aside = file.with_suffix(f".{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: np.ascontiguousarray(a) for name, a in asdict(near).items()}, aside)
        aside.replace(file)
    except (OSError, SafetensorError):
        aside.unlink(missing_ok=True)


def kept(file: Path) -> Neighbours | None:
    """Return the neighbours in a file, None where there are none that can be read."""
    try:
        near = Neighbours(**load_file(file))
    except (OSError, SafetensorError, TypeError):
        return None
    m, shape = len(near.truth), near.similarity.shape
    fits = near.labels.shape == shape and shape[:1] == (m,) and near.counts.ndim == 1
    return near if fits else None


def _parts(near: Neighbours, k: int, temperature: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(near.truth), _CHUNK):
        rows = slice(start, start + _CHUNK)
        similarity, labels = near.similarity[rows, :k], near.labels[rows, :k]
        yield votes(similarity, labels, temperature, len(near.counts)), near.truth[rows]
