"""Frozen features of many images: decoded in threads, computed in batches, kept by the weights' hash."""

import hashlib
import logging
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from dense_ssl.augment import MEAN, STD
from dense_ssl.backbones import Backbone, Features
from dense_ssl.config import UserError
from dense_ssl.evaluation.omissions import Omissions
from dense_ssl.loaders import share_of_cores

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FeatureCache:
    """Features on disk, one file per (weights, data, settings)."""

    folder: Path
    weights: str  # sha256 of the backbone

    def path(self, key: str) -> Path:
        """Return the file for features of the content `key` describes."""
        digest = hashlib.sha256(f"{self.weights}\0{key}".encode()).hexdigest()
        return self.folder / f"{digest[:24]}.pt"


@dataclass(frozen=True, slots=True)
class Extracted:
    """Features of those images that could be read."""

    features: Tensor  # [n, ...] in the order of the images
    kept: Tensor  # int64 [n], position of each in the list of images


def extract(
    backbone: Backbone,
    images: Sequence[T],
    read: Callable[[T], Tensor],
    reduce: Callable[[Features], Tensor],
    *,
    batch_size: int,
    key: str,
    cache: FeatureCache | None,
    omitted: Omissions,
    label: str,
) -> Extracted:
    """Return `reduce(features)` of every image, on the CPU.

    `read` gives one image as uint8 [3, H, W], all of one size. Images it cannot read (OSError,
    ValueError) are left out and noted in `omitted`. `key` names the content: images, how they are read
    and reduced; with a cache the same key is computed once.

    Raises:
        UserError: none of the images can be read.
    """
    device = next(backbone.parameters()).device
    path = cache.path(f"{device.type}\0{key}") if cache else None
    stored = _load(path)
    if stored is None:
        stored = _compute(backbone, images, read, reduce, batch_size, label)
        if path is not None:
            _save(path, stored)
    for position, reason in zip(stored["lost"].tolist(), stored["reasons"]):
        omitted.add(f"{label}: image not readable", f"{images[position]}: {reason}")
    if not len(stored["kept"]):
        raise UserError(f"{label}: none of {len(images)} images can be read")
    return Extracted(stored["features"], stored["kept"])


def content_key(*parts: object) -> str:
    """Return a hash over the text of all parts, to be used as `key`."""
    return hashlib.sha256("\0".join(str(part) for part in parts).encode()).hexdigest()


def file_stamp(path: Path) -> str:
    """Return a file's path, size and time of change as text, for `content_key`."""
    stat = path.stat()
    return f"{path}:{stat.st_size}:{stat.st_mtime_ns}"


def thinned(items: Sequence[T], limit: int | None) -> tuple[T, ...]:
    """Return at most `limit` of the items, evenly spaced."""
    if limit is None or len(items) <= limit:
        return tuple(items)
    chosen = [round(i * (len(items) - 1) / max(limit - 1, 1)) for i in range(limit)]
    return tuple(items[i] for i in chosen)


def check_size(size: Iterable[int], stride: int) -> None:
    """Raise unless every side is a multiple of the backbone's stride.

    Raises:
        UserError: one is not; the message names the nearest that is.
    """
    for side in size:
        if side % stride:
            near = max(stride, round(side / stride) * stride)
            raise UserError(f"size: {side} is not a multiple of the stride {stride}; take {near}")


def in_order(
    function: Callable[[T], Tensor], items: Iterable[T], ahead: int = 64
) -> Iterator[Tensor]:
    """Yield function(item) of every item in order, computed in threads at most `ahead` items early."""
    items = iter(items)
    with ThreadPoolExecutor(min(16, share_of_cores())) as pool:
        waiting = [pool.submit(function, item) for item in islice(items, ahead)]
        while waiting:
            yield waiting.pop(0).result()
            waiting += [pool.submit(function, item) for item in islice(items, 1)]


def _compute(
    backbone: Backbone,
    images: Sequence[T],
    read: Callable[[T], Tensor],
    reduce: Callable[[Features], Tensor],
    batch_size: int,
    label: str,
) -> dict:
    kept: list[int] = []
    lost: dict[int, str] = {}

    def read_one(position: int) -> Tensor:
        try:
            return read(images[position])
        except (OSError, ValueError, SyntaxError) as error:  # Pillow's three ways to refuse a file
            lost[position] = str(error) or type(error).__name__
            return torch.empty(0)

    device = next(backbone.parameters()).device
    scale = 1 / (255 * torch.tensor(STD, device=device).view(3, 1, 1))
    shift = -(torch.tensor(MEAN) / torch.tensor(STD)).to(device).view(3, 1, 1)
    results: list[Tensor] = []
    batch: list[Tensor] = []

    def flush() -> None:
        if batch:
            x = torch.stack(batch).to(device, non_blocking=True)
            results.append(reduce(backbone(x * scale + shift)).cpu())
            batch.clear()

    training = backbone.training
    backbone.eval()
    progress = tqdm(total=len(images), desc=label, unit="img", leave=False, disable=None)
    with torch.inference_mode(), progress:
        for position, image in enumerate(in_order(read_one, range(len(images)), 2 * batch_size)):
            progress.update()
            if not image.numel():
                continue
            kept.append(position)
            batch.append(image)
            if len(batch) == batch_size:
                flush()
        flush()
    backbone.train(training)
    order = sorted(lost)
    return {
        "features": torch.cat(results).clone() if results else torch.empty(0),
        "kept": torch.tensor(kept, dtype=torch.int64),
        "lost": torch.tensor(order, dtype=torch.int64),
        "reasons": [lost[position] for position in order],
    }


def _load(path: Path | None) -> dict | None:
    if path is None or not path.is_file():
        return None
    try:
        return torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
        _log.warning("%s: not readable, the features are computed again", path)
        return None


def _save(path: Path, stored: dict) -> None:
    aside = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(stored, aside)
        aside.replace(path)
    except (OSError, RuntimeError) as error:  # a full disk costs the cache, not the evaluation
        aside.unlink(missing_ok=True)
        _log.warning("%s: features are not kept: %s", path, error)
