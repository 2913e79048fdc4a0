"""DenseCL: dense contrastive learning (arXiv:2011.09157), on top of MoCo-v2.

Beside the global head a dense head projects every cell. The positive of a query cell is the key cell of
the other view whose *backbone* features are most similar (eq. 3 of the paper's matching); negatives are
pooled dense keys of other images, in a second queue. L = (1 - lambda) L_global + lambda L_dense (eq. 2).

Names: x backbone cells, g global projection, d dense projection, p pooled dense projection.

Deviates: as `moco` does (state moves after the step). The 1 x 1 convolutions of the dense head are Linear
layers over cells, so that the same file runs on a ResNet's map and on a ViT's patch tokens.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from dense_ssl.backbones import BackboneConfig, make_backbone
from dense_ssl.crops import MultiCropBatch
from dense_ssl.distributed import BatchShuffle, cat_carries
from dense_ssl.methods.method import Method, MethodConfig, Output, ParamGroup, Step, ema_, one_group
from dense_ssl.methods.moco import (
    MOCO_V2_VIEWS,
    as_autocast,
    encoder_pair,
    info_nce,
    warn_if_nothing_to_shuffle,
)
from dense_ssl.methods.parts import KeyQueue, mlp_head, unit
from dense_ssl.schedule import Number, Schedule
from dense_ssl.views import ViewSpec
from kernels.dense_contrastive import matched_info_nce
from kernels.dense_match import dense_match


class DenseContrastConfig(MethodConfig):
    """What DenseCL and the methods built on it have in common; defaults are DenseCL's."""

    views: tuple[ViewSpec, ...] = MOCO_V2_VIEWS
    backbone: BackboneConfig = BackboneConfig(init="fan_in")  # as OpenSelfSup initialises
    hidden_dim: Annotated[int, Field(ge=1)] | None = None  # None: as wide as the backbone
    out_dim: Annotated[int, Field(ge=1)] = 128
    queue_length: Annotated[int, Field(ge=1)] = 65536
    temperature: Annotated[float, Field(gt=0)] = 0.2
    momentum: Number = Schedule(start=0.999, shape="constant")
    dense_weight: Annotated[float, Field(ge=0, le=1)] = 0.5  # lambda, section 3.3
    dense_start_step: Annotated[int, Field(ge=0)] = 0  # lambda is 0 before this step


class DenseCLConfig(DenseContrastConfig):
    """Numbers of DenseCL; defaults are the paper's."""

    name: Literal["densecl"] = "densecl"


def dense_info_nce(d_q: Tensor, d_k: Tensor, match: Tensor, queue: Tensor, T: float) -> Tensor:
    """Mean over all B * N query cells of InfoNCE against the matched key cell and the queue (eq. 1).

    d_q, d_k [B, N, D] and queue [K, D] are unit vectors, match [B, N] is the key cell of each query
    cell. Gradients flow to d_q only.
    """
    d_q, d_k, queue = as_autocast(d_q, d_k, queue)
    return matched_info_nce(d_q, d_k, match, queue, T).mean()


def lambda_at(iter: int, lam: float, start: int) -> float:
    """Return the weight of the dense loss at an iteration: 0 before `start`, then `lam`."""
    return 0.0 if iter < start else lam


class Encoded(NamedTuple):
    """One view through one encoder."""

    x: Tensor  # [B, N, C] backbone cells
    g: Tensor  # [B, D] unit
    d: Tensor  # [B, N, D] unit
    p: Tensor  # [B, D] unit: cells pooled before normalising


class Keys(NamedTuple):
    """What a micro-batch leaves for `after_step`: this rank's own unit keys."""

    g: Tensor  # [B, D]
    p: Tensor  # [B, D]


class DenseCL(Method):
    """DenseCL on a ResNet's last map or a ViT's patch tokens."""

    Config: ClassVar[type[MethodConfig]] = DenseCLConfig
    exports: ClassVar[Literal["student", "teacher"]] = "student"

    def __init__(self, config: DenseCLConfig) -> None:
        super().__init__()
        self.config = config
        self.student, self.teacher = dense_encoders(config)
        self.queue = KeyQueue(config.queue_length, config.out_dim)
        self.dense_queue = KeyQueue(config.queue_length, config.out_dim)

    def forward(self, batch: MultiCropBatch, step: Step) -> Output:
        """Return (1 - lambda) global + lambda dense InfoNCE, view 0 queries and view 1 keys."""
        cfg = self.config
        x_q, x_k = batch.views["global"].images  # each [B, 3, S, S]
        q = encode(self.student, x_q)
        k = encode_keys(self.teacher, x_k, step, cfg.backbone.bn_groups)
        losses = densecl_losses(q, k, self.queue.keys, self.dense_queue.keys, cfg.temperature)
        weight = lambda_at(step.index, cfg.dense_weight, cfg.dense_start_step)
        loss = (1 - weight) * losses["global"] + weight * losses["dense"]
        logs = {name: value.detach() for name, value in losses.items()}
        return Output(loss, logs, carry=Keys(k.g, k.p))

    def after_step(self, carries: Sequence[Keys], step: Step) -> None:
        """Move the key encoder and enqueue one global and one pooled dense key per image."""
        ema_(self.teacher, self.student, self.config.momentum.at(step))
        enqueue(self.queue, self.dense_queue, carries)

    def param_groups(self) -> list[ParamGroup]:
        """Return one group: DenseCL decays biases and norms too."""
        return one_group(self)


def enqueue(queue: KeyQueue, dense_queue: KeyQueue, carries: Sequence[Keys]) -> None:
    """Put the keys of all ranks' micro-batches in the queues: one global and one dense key an image."""
    queue.push(cat_carries([carry.g for carry in carries]))
    dense_queue.push(cat_carries([carry.p for carry in carries]))


def dense_encoders(config: DenseContrastConfig) -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """Return query and key encoder, equal: a backbone with a global and a dense head."""

    def build() -> nn.ModuleDict:
        backbone = make_backbone(config.backbone)
        hidden = config.hidden_dim or backbone.dim
        global_head = mlp_head(backbone.dim, hidden, config.out_dim, init="kaiming")
        # OpenSelfSup's initialiser skips convolutions, which the published dense head is made of.
        dense_head = mlp_head(backbone.dim, hidden, config.out_dim)
        return nn.ModuleDict(
            {"backbone": backbone, "global_head": global_head, "dense_head": dense_head}
        )

    pair = encoder_pair(build)
    warn_if_nothing_to_shuffle(config.backbone)
    return pair


def encode(encoder: nn.ModuleDict, images: Tensor) -> Encoded:
    """Return what an encoder says of images [B, 3, S, S]."""
    features = encoder["backbone"](images)
    g, d, p = densecl_neck(
        features.cls[:, 0], features.dense, encoder["global_head"], encoder["dense_head"]
    )
    return Encoded(features.dense.detach(), unit(g), unit(d), unit(p))


@torch.no_grad()
def encode_keys(teacher: nn.ModuleDict, images: Tensor, step: Step, bn_groups: int) -> Encoded:
    """Return keys of images [B, 3, S, S], encoded in another batch's statistics (shuffled BN)."""
    with BatchShuffle(images, step.seed, step.index, step.micro, bn_groups) as shuffle:
        return Encoded(*shuffle.restore(*encode(teacher, shuffle.images)))


def densecl_losses(
    q: Encoded, k: Encoded, queue: Tensor, dense_queue: Tensor, temperature: float
) -> dict[str, Tensor]:
    """Return {"global", "dense"}, unweighted, of queries q and keys k of the same images."""
    match, _ = dense_match(q.x, k.x)  # [B, N], eq. 3
    return {
        "global": info_nce(q.g, k.g, queue, temperature),
        "dense": dense_info_nce(q.d, k.d, match, dense_queue, temperature),
    }


def densecl_neck(
    pooled: Tensor, cells: Tensor, global_head: nn.Module, dense_head: nn.Module
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (g [B, D], d [B, N, D], p [B, D]) of backbone outputs, none normalised.

    pooled [B, C] is the mean cell of a ResNet or the class token of a ViT; cells [B, N, C].

    p pools the projected cells before any normalisation; because of the ReLU inside the head it differs
    from projecting the pooled cell.
    """
    d = dense_head(cells)
    return global_head(pooled), d, d.mean(1)
