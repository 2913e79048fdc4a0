"""What training does to weights and numbers, alike in all methods: averages, schedules, clipping, groups."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dense_ssl.methods.method import ParamGroup, decay_groups, ema_
from dense_ssl.optim import OptimConfig, clip_each_, freeze, make_optimizer
from dense_ssl.schedule import Ramp, Schedule, Step


def ema_update(
    teacher: Sequence[Tensor] | Mapping[str, Tensor],
    student: Sequence[Tensor] | Mapping[str, Tensor],
    m: float,
) -> None:
    """Move every tensor of teacher to teacher * m + student * (1 - m), in place.

    Two sequences pair by position; two mappings by the names that are in both.
    """
    old, new = _by_name(teacher), _by_name(student)
    shared = [name for name in old if name in new]
    ema_(_bag([old[name] for name in shared]), _bag([new[name] for name in shared]), m)


def _by_name(tensors: Sequence[Tensor] | Mapping[str, Tensor]) -> Mapping[Any, Tensor]:
    return tensors if isinstance(tensors, Mapping) else dict(enumerate(tensors))


def _bag(tensors: Sequence[Tensor]) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(t.detach(), requires_grad=False) for t in tensors)


def cosine_schedule(
    base: float,
    final: float,
    epochs: int,
    steps: int,
    warmup_epochs: int = 0,
    start: float = 0.0,
) -> np.ndarray:
    """Return one value per step, float64 [epochs * steps]: linear from start to base, then a cosine."""
    schedule = Schedule(
        start=base,
        end=final,
        warmup_epochs=warmup_epochs,
        warmup_start=start,
        warmup_closed=True,
    )
    return np.array([schedule.at(Step(i, steps, epochs)) for i in range(epochs * steps)])


def teacher_temps(
    warm: float, final: float, warm_epochs: int, epochs: int, start_epoch: int = 0
) -> np.ndarray:
    """Return one teacher temperature per epoch, float64 [epochs]."""
    ramp = Ramp(start=warm, end=final, warmup_epochs=warm_epochs, wait_epochs=start_epoch)
    return np.array([ramp.at(Step(epoch, 1, epochs)) for epoch in range(epochs)])


def clip_per_tensor(grads: Sequence[Tensor], c: float) -> None:
    """Multiply each gradient by min(1, c / (its norm + 1e-6)), in place."""
    clip_each_(list(grads), c)


def param_groups(model: nn.Module) -> list[ParamGroup]:
    """Return the trained parameters that decay, and those that do not: biases and other 1-D ones."""
    return decay_groups(p for p in model.parameters() if p.requires_grad)


def cancel_last_layer(epoch: int, freeze_epochs: int) -> bool:
    """Return whether gradients of the last layers are dropped in an epoch, counted from 0."""
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.ones(1)
    group = ParamGroup([weight], frozen_epochs=freeze_epochs)
    freeze(make_optimizer([group], OptimConfig()), Step(epoch, 1, epoch + 1))
    return weight.grad is None
