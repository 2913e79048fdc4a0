"""The protocol: what one self-supervised method must say. Everything else is the trainer's.

All state moves in `after_step`, from what `forward` handed over in `Output.carry`. "EMA at the start of
the next forward" and "after this step" are the same sequence of weights; so are queues and centres.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dense_ssl.backbones import BackboneConfig
from dense_ssl.backbones.resnet import regroup
from dense_ssl.config import Config
from dense_ssl.crops import MultiCropBatch
from dense_ssl.schedule import Step
from dense_ssl.views import ViewSpec

__all__ = [
    "Method",
    "MethodConfig",
    "Output",
    "ParamGroup",
    "Step",
    "decay_groups",
    "ema_",
    "one_group",
    "teacher_of",
]


class MethodConfig(Config):
    """What every method's section has: its name, its views and its backbone."""

    views: tuple[ViewSpec, ...]
    backbone: BackboneConfig = BackboneConfig()


@dataclass(frozen=True, slots=True)
class Output:
    """What one forward gives the trainer."""

    loss: Tensor  # scalar, with gradient
    logs: dict[str, Tensor]  # detached scalars, by the paper's names
    carry: Any  # small detached tensors for after_step


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """Parameters that share how weight decay and learning rate apply to them."""

    params: list[nn.Parameter]
    decay: float = 1.0  # times the scheduled weight decay
    lr: float = 1.0  # times the scheduled learning rate
    frozen_epochs: float = 0.0  # no update before this epoch
    name: str = field(default="all")


class Method(nn.Module, ABC):
    """One self-supervised method."""

    Config: ClassVar[type[MethodConfig]]
    exports: ClassVar[Literal["student", "teacher"]]
    uses_boxes: ClassVar[bool] = False  # then no photometric policy may move a pixel
    config: Any  # of the type `Config`
    student: nn.ModuleDict  # trained; student["backbone"] is what evaluation may load
    teacher: nn.ModuleDict  # same names, no gradient, moved by `after_step`

    @abstractmethod
    def forward(self, batch: MultiCropBatch, step: Step) -> Output:
        """Return the loss of one micro-batch of normalised float views."""

    @abstractmethod
    def after_step(self, carries: Sequence[Any], step: Step) -> None:
        """Move teacher, queues and centres after the optimiser step; one carry per micro-batch."""

    def regroup(self, bn_groups: int) -> None:
        """Take BatchNorm's statistics over so many groups of a micro-batch from now on."""
        backbone = self.config.backbone.model_copy(update={"bn_groups": bn_groups})
        self.config = self.config.model_copy(update={"backbone": backbone})
        regroup(self, bn_groups)

    def param_groups(self) -> list[ParamGroup]:
        """Return every trained parameter in one group each; by default biases and norms do not decay."""
        return decay_groups(p for p in self.parameters() if p.requires_grad)


def one_group(method: nn.Module) -> list[ParamGroup]:
    """Return every trained parameter in one group, biases and norms too (MoCo, DenseCL)."""
    return [ParamGroup([p for p in method.parameters() if p.requires_grad])]


def decay_groups(params: Iterable[nn.Parameter]) -> list[ParamGroup]:
    """Return parameters that decay, and those with one axis, biases and norms, that do not."""
    params = list(params)
    return [
        ParamGroup([p for p in params if p.ndim > 1], name="decay"),
        ParamGroup([p for p in params if p.ndim <= 1], decay=0.0, name="no_decay"),
    ]


@torch.no_grad()
def ema_(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move teacher parameters to momentum * teacher + (1 - momentum) * student; buffers stay."""
    old: list[Tensor] = list(teacher.parameters())
    new: list[Tensor] = list(student.parameters())
    torch._foreach_lerp_(old, new, 1.0 - momentum)


def teacher_of(student: nn.ModuleDict, build: nn.ModuleDict) -> nn.ModuleDict:
    """Return `build` (same structure) with the student's parameters and buffers, and no gradient."""
    build.load_state_dict(student.state_dict())
    return build.requires_grad_(False)
