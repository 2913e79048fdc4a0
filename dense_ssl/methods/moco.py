"""MoCo-v2: momentum contrast with a queue (arXiv:1911.05722; v2: arXiv:2003.04297).

A query encoder q, trained, and a key encoder k, its moving average, see two views of an image. The positive
of a query is the key of the same image; the negatives are the K most recent keys (eq. 1). Keys are encoded
in another batch's BatchNorm statistics (shuffled BN, section 3.3).

Deviates: the moving average and the queue move after the optimiser step instead of inside the next
forward, which is the same sequence of weights and losses; shuffle permutations are keyed by (seed, step).
"""

import logging
from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from dense_ssl.backbones import BackboneConfig, make_backbone
from dense_ssl.crops import MultiCropBatch
from dense_ssl.distributed import BatchShuffle, cat_carries, world_size
from dense_ssl.methods.method import (
    Method,
    MethodConfig,
    Output,
    ParamGroup,
    Step,
    ema_,
    one_group,
    teacher_of,
)
from dense_ssl.methods.parts import HeadInit, KeyQueue, mlp_head, unit
from dense_ssl.schedule import Number, Schedule
from dense_ssl.views import ViewSpec
from kernels.queue_info_nce import queue_info_nce

logger = logging.getLogger("dense_ssl")

MOCO_V2_VIEWS = (
    ViewSpec(name="global", count=2, size=224, scale=(0.2, 1.0), photometric="moco_v2"),
)


class MoCoConfig(MethodConfig):
    """Numbers of MoCo-v2; defaults are the paper's."""

    name: Literal["moco"] = "moco"
    views: tuple[ViewSpec, ...] = MOCO_V2_VIEWS
    backbone: BackboneConfig = BackboneConfig(init="fan_out")
    hidden_dim: Annotated[int, Field(ge=1)] | None = None  # None: as wide as the backbone (v2)
    out_dim: Annotated[int, Field(ge=1)] = 128
    head_init: HeadInit = "torch"  # kaiming: as OpenSelfSup, and so the MoCo in DenseCL's tables
    queue_length: Annotated[int, Field(ge=1)] = 65536
    temperature: Annotated[float, Field(gt=0)] = 0.2
    momentum: Number = Schedule(start=0.999, shape="constant")


def info_nce(q: Tensor, positive: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy of picking the positive among it and the queue (arXiv:1911.05722, eq. 1).

    q and positive [N, D] and queue [K, D] are unit vectors. Gradients flow to q only.
    """
    q, positive, queue = as_autocast(q, positive, queue)
    return queue_info_nce(q, positive, queue, temperature).mean()


def as_autocast(*vectors: Tensor) -> list[Tensor]:
    """Return the vectors in the dtype of CUDA's autocast where it is on: rounded, as no product will be."""
    if vectors[0].is_cuda and torch.is_autocast_enabled("cuda"):
        return [x.to(torch.get_autocast_dtype("cuda")) for x in vectors]
    return list(vectors)


def encoder_pair(build: Callable[[], nn.ModuleDict]) -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """Return a trained encoder and its moving-average copy, both in train mode (their BN is local)."""
    student = build()
    return student, teacher_of(student, build())


def warn_if_nothing_to_shuffle(backbone: BackboneConfig) -> None:
    """Say once that shuffled BN does nothing: one rank and one BN group."""
    if world_size() == 1 and backbone.bn_groups == 1 and backbone.name.startswith("res"):
        logger.warning(
            "one rank and one BatchNorm group: statistics are not shuffled between query and key; set "
            "method.backbone.bn_images (32 is published) to train as several GPUs do"
        )


class Keys(NamedTuple):
    """What a micro-batch leaves for `after_step`."""

    k: Tensor  # [B, out_dim] unit keys, this rank's own


class MoCo(Method):
    """MoCo-v2 on a ResNet's pooled map or a ViT's class token."""

    Config: ClassVar[type[MethodConfig]] = MoCoConfig
    exports: ClassVar[Literal["student", "teacher"]] = "student"

    def __init__(self, config: MoCoConfig) -> None:
        super().__init__()
        self.config = config

        def build() -> nn.ModuleDict:
            backbone = make_backbone(config.backbone)
            hidden = config.hidden_dim or backbone.dim
            head = mlp_head(backbone.dim, hidden, config.out_dim, config.head_init)
            return nn.ModuleDict({"backbone": backbone, "global_head": head})

        self.student, self.teacher = encoder_pair(build)
        self.queue = KeyQueue(config.queue_length, config.out_dim)
        warn_if_nothing_to_shuffle(config.backbone)

    def forward(self, batch: MultiCropBatch, step: Step) -> Output:
        """Return the InfoNCE loss of view 0 as queries against view 1 as keys."""
        x_q, x_k = batch.views["global"].images  # each [B, 3, S, S]
        q = self._encode(self.student, x_q)
        groups = self.config.backbone.bn_groups
        with (
            torch.no_grad(),
            BatchShuffle(x_k, step.seed, step.index, step.micro, groups) as shuffle,
        ):
            (k,) = shuffle.restore(self._encode(self.teacher, shuffle.images))
        loss = info_nce(q, k, self.queue.keys, self.config.temperature)
        return Output(loss, {}, carry=Keys(k))

    def after_step(self, carries: Sequence[Keys], step: Step) -> None:
        """Move the key encoder and enqueue the keys of all ranks."""
        ema_(self.teacher, self.student, self.config.momentum.at(step))
        self.queue.push(cat_carries([carry.k for carry in carries]))

    def param_groups(self) -> list[ParamGroup]:
        """Return one group: MoCo decays biases and norms too."""
        return one_group(self)

    @staticmethod
    def _encode(encoder: nn.ModuleDict, images: Tensor) -> Tensor:
        features = encoder["backbone"](images)
        return unit(encoder["global_head"](features.cls[:, 0]))  # [B, out_dim]
