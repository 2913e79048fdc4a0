"""What surrounds the forward pass of a step, in training and wherever a step is repeated."""

import contextlib
import os
from typing import Any

import torch

from dense_ssl.rng import key_of
from dense_ssl.schedule import Step

_NOISE = 0x57  # stream of torch's own generator (drop path)


def seed_everything(seed: int, deterministic: bool) -> None:
    """Initialise all ranks alike; what is random later is keyed by step, rank or image."""
    torch.manual_seed(int(key_of(seed) >> 1))
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cuda.matmul.allow_tf32 = not deterministic
    torch.backends.cudnn.allow_tf32 = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def seed_noise(step: Step, rank: int) -> None:
    """Key torch's own generator by the micro-batch; called once its batch is there."""
    torch.manual_seed(int(key_of(step.seed, _NOISE, step.index, rank, step.micro) >> 1))


def autocast(device: torch.device, precision: str) -> Any:
    """Return the context in which the forward pass of a precision runs."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def moved_by_forward(name: str) -> bool:
    """Return whether a forward pass moves a buffer, by its name: the statistics of BatchNorm, no other."""
    return name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")
