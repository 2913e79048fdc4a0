"""The folder of a run: one process at a time, one recipe and one data set for its whole life."""

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dense_ssl.config import UserError
from dense_ssl.distributed import World, largest


@contextlib.contextmanager
def claimed(folder: Path, rank: int) -> Iterator[None]:
    """Make the run's folder and hold it, on rank 0, against a second process.

    The lock dies with the process, however it ends.
    """
    if rank != 0:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"run.dir: {folder} cannot be made ({error.strerror}); choose another RUN"
        ) from None
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"run.dir: another process is training in {folder}; wait for it, or take another RUN"
            ) from None
        yield


def data_fingerprint(sizes: np.ndarray) -> dict[str, Any]:
    """Return what tells one data set from another, wherever it lies."""
    digest = hashlib.sha256(sizes.tobytes()).hexdigest()
    return {"images": len(sizes), "sizes_sha256": digest}


def check_same_start(
    config: Mapping[str, Any], step: int, fingerprint: Mapping[str, Any], world: World
) -> None:
    """Refuse to train where ranks would start from different checkpoints, data or recipes.

    Each reads its own files, and on several machines they may differ: the ranks would go through different
    steps together, and nothing would say so.

    Raises:
        UserError: on every rank, naming what differs.
    """
    folder, path = config["run"]["dir"], config["data"]["path"]
    recipe = {k: v for k, v in _flatten(config).items() if not k.startswith(MAY_CHANGE)}
    one = "a shared file system, or the same copy on every machine"
    for number, sentence in (
        (step, f"{folder}: ranks find checkpoints of different steps in it, {{}} to {{}}: {one}"),
        (_number(fingerprint), f"{path}: ranks find different images there: {one}"),
        (_number(recipe), "the ranks have different recipes: give all machines the same command"),
    ):
        least, most = -largest(-number, world), largest(number, world)
        if least != most:
            raise UserError(sentence.format(least, most))


def _number(value: Mapping[str, Any]) -> int:
    """Return a number that stands for plain values, of 60 bits."""
    return int(hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:15], 16)


MAY_CHANGE = (
    "run.", "watch.", "train.steps", "train.accumulate", "train.micro_batch", "data.path", "data.workers"
)  # fmt: skip
"""Keys that a resumed run may set anew: they change results by rounding at most, or not at all.

All but two: with `train.accumulate` and `train.micro_batch` the same samples make up a step, but BatchNorm
may see other groups of them. They are what helps where memory is short, and what a run does by itself then.
"""


_NEEDED: dict[str, type] = {"step": int, "config": dict, "data": dict}  # of a checkpoint


def check_same_run(
    saved: Mapping[str, Any], config: Mapping[str, Any], fingerprint: Mapping[str, Any]
) -> None:
    """Refuse to continue a run with another recipe or on other data.

    Args:
        saved: the checkpoint's payload, with its "config" and "data".
        config: the resolved configuration asked for now, as plain values.
        fingerprint: `data_fingerprint` of the data asked for now.

    Raises:
        UserError: naming the keys that differ, or the two numbers of images.
    """
    folder = config["run"]["dir"]
    lacking = [key for key, kind in _NEEDED.items() if not isinstance(saved.get(key), kind)]
    if lacking:
        raise UserError(f"{folder}: its checkpoint lacks {', '.join(lacking)}; take another RUN")
    before, now = _flatten(saved["config"]), _flatten(config)
    changed = [
        f"{key} ({before.get(key)} there, {now.get(key)} now)"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if changed:
        raise UserError(
            f"{folder} holds a run with other settings: {'; '.join(changed[:4])}"
            f"{' and more' if len(changed) > 4 else ''}. Repeat them to resume, or take another RUN"
        )
    if saved["data"] != fingerprint:
        raise UserError(
            f"{folder} was trained on {saved['data']['images']} images, and {config['data']['path']} "
            f"holds {fingerprint['images']} others; give the same data, or take another RUN"
        )


def restore(
    saved: Mapping[str, Any], folder: str, parts: Mapping[str, Callable[[Any], Any]]
) -> None:
    """Load each part of a run from its checkpoint: {name in the checkpoint: what loads it}.

    Raises:
        UserError: one does not fit, though the recipe is the same: another version wrote it, or nobody did.
    """
    for name, load in parts.items():
        try:
            load(saved[name])
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{folder}: its checkpoint's {name} does not fit this recipe ({reason}); take another RUN"
            ) from None


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        items = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(i), v) for i, v in enumerate(value)]
    else:
        return {prefix.removesuffix("."): value}
    flat: dict[str, Any] = {}
    for key, child in items:
        flat |= _flatten(child, f"{prefix}{key}.")
    return flat
