"""Checkpoints: written aside and renamed, with a checksum, rotated, and never unpickled with code.

`runs/a/checkpoints/step-00001234.pt` with `step-00001234.json` (its sha256) beside it; `last.pt` is a
symbolic link that is replaced in one go, so it names a complete file at every moment.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataprep import plain_json
from dense_ssl import plain_torch
from dense_ssl.config import UserError

logger = logging.getLogger("dense_ssl")

FORMAT = "dense_ssl/1"


def save(folder: Path, payload: dict[str, Any], keep: int, keep_every: int | None = None) -> Path:
    """Write `payload` (with its "step") as the newest checkpoint of a folder and rotate the old ones.

    Args:
        folder: the run's checkpoint folder; made if missing.
        payload: tensors, containers and plain values only.
        keep: how many of the newest stay.
        keep_every: checkpoints whose step is a multiple of this stay for good.

    Raises:
        UserError: the disk is full or the folder cannot be written; the older checkpoints are intact.
    """
    step = int(payload["step"])
    target = folder / f"step-{step:08d}.pt"
    aside = folder / f".{target.name}.writing"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            torch.save({"format": FORMAT, **payload}, file)
            file.flush()
            os.fsync(file.fileno())
        record = {"step": step, "sha256": file_sha256(aside), "bytes": aside.stat().st_size}
        write_atomically(target.with_suffix(".json"), json.dumps(record).encode())
        aside.replace(target)
        _point_last(folder, target)
        _sync_folder(folder)
    except (OSError, RuntimeError) as error:
        aside.unlink(missing_ok=True)
        # torch reports a short write as RuntimeError; anything else of that kind is a bug, not a disk.
        if isinstance(error, RuntimeError) and "write" not in str(error):
            raise
        raise UserError(
            f"{target}: checkpoint could not be written ({_reason(error)}); free space or choose another "
            "RUN; earlier checkpoints are intact"
        ) from None
    _rotate(folder, step, keep, keep_every)
    return target


def require_finite(weights: Iterable[Tensor], step: int) -> None:
    """Refuse weights that are not finite: a checkpoint of them would replace a good one.

    Raises:
        UserError: training diverged.
    """
    norms = torch._foreach_norm([w.detach() for w in weights])
    if not torch.stack(norms).isfinite().all():
        raise UserError(
            f"weights are not finite at step {step}: training diverged. The checkpoints before it are "
            "intact; lower optim.lr, or train.precision=fp32"
        )


def load_newest(folder: Path) -> dict[str, Any] | None:
    """Return the newest checkpoint whose bytes match its checksum, or None when there is none at all.

    A damaged one is named and passed over in favour of the one before it.

    Raises:
        UserError: checkpoints exist, and none of them is intact.
    """
    if not folder.is_dir():
        return None
    candidates = sorted(folder.glob("step-*.pt"), reverse=True)
    for path in candidates:
        problem = check(path)
        if problem is None:
            return read(path)
        logger.warning("%s: %s; going back to the checkpoint before it", path, problem)
    if candidates:
        raise UserError(
            f"{folder}: none of {len(candidates)} checkpoints is intact; start another RUN"
        )
    return None


def check(path: Path) -> str | None:
    """Return what is wrong with a checkpoint file, or None."""
    try:
        record = plain_json.read(path.with_suffix(".json"))
        expected = record["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return "its checksum file is missing or unreadable"
    if file_sha256(path) != expected:
        return "its bytes do not match its checksum (damaged)"
    return None


def damage_of(path: Path) -> str | None:
    """Return what is wrong with any checkpoint file, or None: also where no checksum of ours is beside it."""
    path = path.resolve()  # of `last.pt`
    ours = path.name.startswith("step-") and path.with_suffix(".json").is_file()
    return check(path) if ours else None


def read(path: Path) -> dict[str, Any]:
    """Return the payload of one of our checkpoint files, on the CPU, with code refused.

    Raises:
        UserError: not a checkpoint of this project, or damaged.
    """
    try:
        payload = plain_torch.load(path)
    except (OSError, plain_torch.NotPlain) as error:
        raise UserError(f"{path}: not readable as a checkpoint ({_reason(error)})") from None
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of this project (no format {FORMAT!r})")
    return payload


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that its name always holds either the old or the new bytes."""
    aside = path.with_name(f".{path.name}.writing")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _point_last(folder: Path, target: Path) -> None:
    link = folder / ".last.pt.writing"
    link.unlink(missing_ok=True)
    link.symlink_to(target.name)
    link.replace(folder / "last.pt")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _rotate(folder: Path, step: int, keep: int, keep_every: int | None) -> None:
    """Remove all but the newest up to `step`; what is newer is damaged, and takes nobody's place."""
    found = {path: path.stem.removeprefix("step-") for path in folder.glob("step-*.pt")}
    steps = {path: int(number) for path, number in found.items() if number.isdecimal()}
    for path in sorted(path for path, of in steps.items() if of <= step)[:-keep]:
        if keep_every and steps[path] % keep_every == 0:
            continue
        path.unlink(missing_ok=True)
        path.with_suffix(".json").unlink(missing_ok=True)
    for leftover in folder.glob(".step-*.writing"):  # of a process that was killed while writing
        leftover.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0][:150]
