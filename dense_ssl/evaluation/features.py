"""Frozen features of many images: decoded in threads, computed in batches, kept by the weights' hash.

Under torchrun every rank computes its share of the images and gets all features.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from tqdm import tqdm

from dense_ssl import plain_torch
from dense_ssl.augment import MEAN, STD
from dense_ssl.config import UserError
from dense_ssl.distributed import rank, world_size
from dense_ssl.evaluation.omissions import Omissions
from dense_ssl.evaluation.ranks import everyone
from dense_ssl.loaders import share_of_cores

_log = logging.getLogger(__name__)
T = TypeVar("T")
_STORED = ("features", "kept", "lost", "reasons")  # what a cache file holds
# Pillow's ways to refuse a file, where it is not opened by `pictures.open_image`.
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True, slots=True)
class FeatureCache:
    """Features on disk, one file per (weights, data, settings)."""

    folder: Path
    weights: str  # what tells the network, and the program that reads it, from others
    most_bytes: int | None = None  # of one file of features; larger ones are not kept

    def path(self, key: str) -> Path:
        """Return the file for features of the content `key` describes."""
        digest = hashlib.sha256(f"{self.weights}\0{key}".encode()).hexdigest()
        return self.folder / f"{digest[:24]}.pt"

    def job(self, key: str) -> Path:
        """Return the folder of a long job's own checkpoints, made by whoever writes to it."""
        return self.path(key).with_suffix(".job")

    def has_room_for(self, features: Tensor) -> bool:
        """Return whether features are small enough to be kept."""
        size = features.numel() * features.element_size()
        return self.most_bytes is None or size <= self.most_bytes


@dataclass(frozen=True, slots=True)
class Extracted:
    """Features of those images that could be read."""

    features: Tensor  # [n, ...] in the order of the images
    kept: Tensor  # int64 [n], position of each in the list of images


def extract(
    backbone: nn.Module,
    images: Sequence[T],
    read: Callable[[T], Tensor],
    reduce: Callable[[Any], Tensor],
    *,
    batch_size: int,
    key: str,
    cache: FeatureCache | None,
    omitted: Omissions,
    label: str,
    precision: Literal["fp32", "bf16"] = "fp32",
    beside: Callable[[T], Tensor] | None = None,
) -> Extracted:
    """Return `reduce(backbone(x))` of every image, on the CPU; x is normalised, float [B, 3, H, W].

    With `beside`, `reduce(backbone(x, y))`, where y stacks what it says of each image.

    `read` gives one image as uint8 [3, H, W], all of one size. Images it cannot read (OSError,
    ValueError) are left out and noted in `omitted`. `key` names the content: images, how they are read
    and reduced; with a cache the same key is computed once.

    Raises:
        UserError: none of the images can be read.
    """
    device = next(backbone.parameters()).device
    path = cache.path(f"{device.type}\0{precision}\0{key}") if cache else None
    stored = _load(path)
    if stored is not None and any(_readable(read, images[at]) for at in stored["lost"].tolist()):
        stored = None  # what could not be read then has come back
    known = everyone(stored is not None)  # of all ranks, so that they go the same way
    if stored is None or not all(known):
        share = range(rank(), len(images), world_size())
        computed = _compute(
            backbone, images, share, read, reduce, batch_size, label, precision, beside
        )
        stored = _merged(everyone(computed))
        if path is not None and rank() == 0 and cache and cache.has_room_for(stored["features"]):
            _save(path, stored)
    for position, reason in zip(stored["lost"].tolist(), stored["reasons"]):
        omitted.add(f"{label}: image not readable", f"{images[position]}: {reason}")
    if not len(stored["kept"]):
        raise UserError(f"{label}: none of {len(images)} images can be read")
    return Extracted(stored["features"], stored["kept"])


def normalised(images: Tensor) -> Tensor:
    """Return uint8 images [B, 3, H, W] as floats with ImageNet's mean and deviation taken out."""
    std = torch.tensor(STD, device=images.device).view(3, 1, 1)
    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    return images * (1 / (255 * std)) - mean / std


def content_key(*parts: object) -> str:
    """Return a hash over the text of all parts, to be used as `key`."""
    return hashlib.sha256("\0".join(str(part) for part in parts).encode()).hexdigest()


def file_stamp(path: Path) -> str:
    """Return a file's path, size and times of change as text, for `content_key`.

    The second time (of the inode) cannot be set back: a file written anew is never taken for the old one.
    """
    stat = path.stat()
    return f"{path}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


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
    backbone: nn.Module,
    images: Sequence[T],
    share: Sequence[int],
    read: Callable[[T], Tensor],
    reduce: Callable[[Any], Tensor],
    batch_size: int,
    label: str,
    precision: str,
    beside: Callable[[T], Tensor] | None,
) -> dict:
    """Features of the images at the positions `share`."""
    kept: list[int] = []
    lost: dict[int, str] = {}

    def read_one(position: int) -> Tensor:
        try:
            return read(images[position])
        except _UNREADABLE as error:
            lost[position] = _reason(error)
            return torch.empty(0)

    device = next(backbone.parameters()).device
    results: list[Tensor] = []
    batch: list[Tensor] = []

    def flush() -> None:
        if batch:
            given = [normalised(torch.stack(batch).to(device, non_blocking=True))]
            if beside is not None:
                own = [beside(images[position]) for position in kept[-len(batch) :]]
                given.append(torch.stack(own).to(device))
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                results.append(reduce(backbone(*given)).cpu())
            batch.clear()

    training = backbone.training
    backbone.eval()
    progress = tqdm(total=len(share), desc=label, unit="img", leave=False, disable=None)
    with torch.inference_mode(), progress:
        for position, image in zip(share, in_order(read_one, share, 2 * batch_size)):
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


def _reason(error: Exception) -> str:
    """Why an image cannot be read, in a line."""
    if isinstance(error, UnidentifiedImageError):  # says where an object lies in memory
        return "no image format that is known"
    return " ".join(str(error).split()) or type(error).__name__


def _readable(read: Callable[[T], Tensor], image: T) -> bool:
    try:
        read(image)
    except _UNREADABLE:
        return False
    return True


def _merged(parts: Sequence[dict]) -> dict:
    """One record from those of all ranks, in the order of the images."""
    if len(parts) == 1:
        return parts[0]
    some = [part for part in parts if len(part["kept"])] or parts[:1]
    kept = torch.cat([part["kept"] for part in some])
    order = kept.argsort()
    lost = sorted(
        pair for part in parts for pair in zip(part["lost"].tolist(), part["reasons"], strict=True)
    )
    return {
        "features": torch.cat([part["features"] for part in some])[order],
        "kept": kept[order],
        "lost": torch.tensor([position for position, _ in lost], dtype=torch.int64),
        "reasons": [reason for _, reason in lost],
    }


def _load(path: Path | None) -> dict | None:
    if path is None or not path.is_file():
        return None
    try:
        stored = plain_torch.load(path)
        if isinstance(stored, dict) and all(key in stored for key in _STORED):
            return stored
        raise plain_torch.NotPlain(f"lacks one of {', '.join(_STORED)}")
    except (OSError, plain_torch.NotPlain):
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
