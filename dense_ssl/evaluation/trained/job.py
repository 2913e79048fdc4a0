"""The state of a long training on disk: what was interrupted goes on from there to the same weights."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dense_ssl import checkpoint
from dense_ssl.config import UserError
from dense_ssl.distributed import rank
from dense_ssl.evaluation.ranks import start_of_all

KEEP_SECONDS = 300.0  # between two states of a job


class Job:
    """The state of a run on disk, and the best of its epochs."""

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._kept = folder, time.monotonic()
        self.best: dict[str, Any] | None = None  # score, and the model's state

    def resume(self, model: nn.Module, optimizer: Optimizer) -> int:
        """Load the newest state, where there is one; return the step to go on with.

        Raises:
            UserError: not all ranks see the same one.
        """
        saved = checkpoint.load_newest(self._folder) if self._folder else None
        start_of_all(int(saved["step"]) if saved else 0, self._folder)
        if saved is None:
            return 0
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        self.best = saved["best"]
        return int(saved["step"])

    def compare(self, model: nn.Module, score: float) -> None:
        """Keep the model's state if no epoch was better."""
        if self.best is None or score > self.best["score"]:
            state = {name: x.detach().cpu().clone() for name, x in model.state_dict().items()}
            self.best = {"score": score, "model": state}

    def due(self) -> bool:
        """Return whether the last state is old enough; ranks need not agree, as rank 0 alone writes."""
        return self._folder is not None and time.monotonic() - self._kept >= KEEP_SECONDS

    def keep(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        """Write the state after `step` steps."""
        if self._folder is not None and rank() == 0:
            state: Mapping[str, Any] = {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "best": self.best
            }  # fmt: skip
            checkpoint.save(self._folder, {"step": step, **state}, keep=1)
        self._kept = time.monotonic()


def synchronise_norms(module: nn.Module | None) -> None:
    """Give all BatchNorms below a module the batch statistics of all ranks."""
    for name, child in module.named_children() if module is not None else ():
        setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))


def require_finite(model: nn.Module, step: int) -> None:
    """Refuse weights that would replace good ones in the job's folder."""
    norms = torch._foreach_norm([parameter.detach() for parameter in model.parameters()])
    if not torch.stack(norms).isfinite().all():
        raise UserError(
            f"training diverged before step {step}: weights are not finite; lower lr, or precision=fp32"
        )
