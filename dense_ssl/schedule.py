"""Every number that changes during training, as one kind of value: `Schedule.at(step)`.

In YAML a schedule is a plain number, or a mapping: `{start: 0.3, end: 0, shape: cosine, per: epoch}`.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dense_ssl.config import Config


@dataclass(frozen=True, slots=True)
class Step:
    """Where training stands: all that a schedule, and any keyed random draw, may depend on."""

    index: int  # optimiser steps taken so far
    steps_per_epoch: int
    epochs: float  # of the whole recipe, whether or not a cap stops it earlier
    seed: int = 0
    micro: int = 0  # micro-batch within the step (gradient accumulation)

    @property
    def epoch(self) -> float:
        """Epochs taken so far, with the fraction."""
        return self.index / self.steps_per_epoch

    def at_micro(self, micro: int) -> "Step":
        """Return the same step at another of its micro-batches."""
        return replace(self, micro=micro)


class Schedule(Config):
    """A value over training time, with an optional linear warm-up before it."""

    start: float
    end: float = 0.0
    shape: Literal["constant", "cosine", "linear", "multistep"] = "cosine"
    per: Literal["step", "epoch"] = "step"  # "epoch": the value moves at epoch boundaries only
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    warmup_start: float = 0.0
    warmup_closed: bool = False  # the last warm-up step has `start` already (DINO's tables)
    milestones: tuple[float, ...] = ()  # multistep: epochs after which `factor` applies once more
    factor: float = 0.1

    def at(self, step: Step) -> float:
        """Return the value for the optimiser step about to be taken."""
        epoch = math.floor(step.epoch) if self.per == "epoch" else step.epoch
        if epoch < self.warmup_epochs:
            return self.warmup_start + (self.start - self.warmup_start) * self._warmed(epoch, step)
        if self.shape == "multistep":
            return self.start * self.factor ** sum(epoch >= mark for mark in self.milestones)
        if self.shape == "constant":
            return self.start
        length = step.epochs - self.warmup_epochs
        share = min(max((epoch - self.warmup_epochs) / length, 0.0), 1.0) if length > 0 else 1.0
        if self.shape == "linear":
            return self.start + (self.end - self.start) * share
        return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * share))

    def _warmed(self, epoch: float, step: Step) -> float:
        """Return the share of the warm-up that is done at an epoch within it, 0 at its first value."""
        values = 1 if self.per == "epoch" else step.steps_per_epoch  # per epoch
        last = self.warmup_epochs * values - self.warmup_closed
        return min(epoch * values / last, 1.0) if last > 0 else 0.0


class Ramp(Config):
    """A value per epoch: `start` for some epochs, then evenly spaced values from start to end, then `end`.

    The temperatures of DINO's and iBOT's teachers: both ends are among the `warmup_epochs` spaced values.
    """

    start: float
    end: float
    warmup_epochs: Annotated[int, Field(ge=0)] = 0
    wait_epochs: Annotated[int, Field(ge=0)] = 0  # at `start` before the ramp begins

    def at(self, step: Step) -> float:
        """Return the value of the epoch that a step is in."""
        epoch = math.floor(step.epoch) - self.wait_epochs
        if epoch >= self.warmup_epochs:
            return self.end
        share = max(epoch, 0) / (self.warmup_epochs - 1) if self.warmup_epochs > 1 else 0.0
        return self.start + (self.end - self.start) * share


def _number_is_constant(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return value
    try:
        return {"start": float(value), "shape": "constant"}
    except ValueError:
        return value


Number = Annotated[Schedule, BeforeValidator(_number_is_constant)]
"""A field that takes a constant or a schedule."""


def cosine_lr(lr0: float, e: int, E: int) -> float:
    """Return the learning rate of epoch e of E, cosine per epoch (MoCo, arXiv:1911.05722)."""
    step = Step(index=e, steps_per_epoch=1, epochs=E)
    return Schedule(start=lr0, shape="cosine", per="epoch").at(step)
