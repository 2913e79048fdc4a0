"""Revisiting contrastive methods: MoCo-v2 with three more invariances (arXiv:2106.05967).

Scale: beside the large query, small crops that overlap the *key's* crop are queries (the views' `near`).
Appearance: queries, never the key, take AutoAugment half of the time (the views' `photometric`). Other
images: each query is pulled to the projections of its nearest neighbours in the queue, found with pooled
backbone features in a second queue whose rows belong to the same images (`aux_weight`). Each is switched
on its own; without all three this is MoCo-v2.

L = L_nce + 0.4 L_knn; every query of an image has the image's one key as its positive.

Names: z projected queries, b their backbone features, k and kb those of the keys.

Deviates: as `moco` does (state moves after the step); neighbours are searched and logits summed without
storing either; while the pull is off (`aux_warmup_epochs`) it is not computed.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dense_ssl.backbones import BackboneConfig, make_backbone
from dense_ssl.crops import Crops, MultiCropBatch
from dense_ssl.distributed import BatchShuffle, all_gather, cat_carries
from dense_ssl.methods.method import Method, MethodConfig, Output, ParamGroup, Step, ema_, one_group
from dense_ssl.methods.moco import (
    as_autocast,
    encoder_pair,
    info_nce,
    warn_if_nothing_to_shuffle,
)
from dense_ssl.methods.parts import KeyQueue, mlp_head, unit
from dense_ssl.schedule import Number, Schedule
from dense_ssl.views import Near, ViewSpec
from kernels.neighbour_pull import neighbour_pull
from kernels.queue_neighbours import queue_neighbours

QUERY = "moco_v2_autoaugment"
REVISITING_VIEWS = (
    ViewSpec(name="global", count=2, size=160, scale=(0.2, 1.0), photometric=(QUERY, "moco_v2")),
    ViewSpec(
        name="small",
        count=4,
        size=96,
        scale=(0.05, 0.14),
        photometric=QUERY,
        near=Near(kind="overlap", of="global[1]", amount=0.1),  # the key's crop
    ),
)

Order = Literal["aligned", "official"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class RevisitingConfig(MethodConfig):
    """Numbers of the full method; defaults are the published ones, with the two queues aligned."""

    name: Literal["revisiting"] = "revisiting"
    views: tuple[ViewSpec, ...] = REVISITING_VIEWS
    backbone: BackboneConfig = BackboneConfig(init="fan_out")
    hidden_dim: Annotated[int, Field(ge=1)] | None = None  # None: as wide as the backbone
    out_dim: Annotated[int, Field(ge=1)] = 128
    queue_length: Annotated[int, Field(ge=1)] = 65536
    temperature: Annotated[float, Field(gt=0)] = 0.2
    momentum: Number = Schedule(start=0.995, shape="constant")
    aux_weight: Annotated[float, Field(ge=0)] = 0.4  # of the pull to neighbours; 0: no second queue
    aux_neighbours: Annotated[int, Field(ge=1)] = 20
    aux_queue_order: Order = "aligned"  # official: neighbours among this step's keys, too
    aux_warmup_epochs: Annotated[float, Field(ge=0)] = 0.0  # without the pull
    queue_backbone_dtype: Literal["fp32", "bf16"] = "fp32"  # of the second queue

    @model_validator(mode="after")
    def _check(self) -> "RevisitingConfig":
        names = [view.name for view in self.views]
        if names not in (["global"], ["global", "small"]) or self.views[0].count != 2:
            raise ValueError(
                "views: `global`, two crops of which the second is the key, and at most `small` after it"
            )
        if self.aux_weight and self.aux_neighbours > self.queue_length:
            raise ValueError(
                f"aux_neighbours: {self.aux_neighbours} of a queue of {self.queue_length}; lower it"
            )
        return self


class Encoded(NamedTuple):
    """Views through one encoder."""

    z: Tensor  # [N, D] unit projections
    b: Tensor  # [N, C] unit backbone features, without gradient


class Keys(NamedTuple):
    """What a micro-batch leaves for `after_step`: this rank's own unit keys."""

    k: Tensor  # [B, D]
    kb: Tensor  # [B, C]


def image_major(large: Tensor, small: Tensor | None) -> Tensor:
    """Return one large row [B, D] and V small ones [B V, D] of each image, side by side: [B (1 + V), D]."""
    if small is None:
        return large
    rows = small.unflatten(0, (len(large), -1))
    return torch.cat([large[:, None], rows], dim=1).flatten(0, 1)


def pull_losses(
    z: Tensor, k: Tensor, queue: Tensor, neighbours: Tensor, temperature: float
) -> dict[str, Tensor]:
    """Return {"nce", "knn"}, unweighted means over all queries z [R, D] of images with keys k [B, D].

    nce: the cross-entropy of picking the image's key among it and the queue. knn: minus the mean
    log softmax, over the queue alone, of the neighbours int64 [R, count]. All vectors are unit; gradients
    flow to z only.
    """
    positive = k.repeat_interleave(len(z) // len(k), dim=0)
    z, positive, queue = as_autocast(z, positive, queue)
    nce, knn = neighbour_pull(z, positive, queue, neighbours, temperature)
    return {"nce": nce.mean(), "knn": knn.mean()}


@torch.no_grad()
def nearest(b: Tensor, kb: Tensor, backbone_queue: KeyQueue, count: int, order: Order) -> Tensor:
    """Return int64 [R, count]: the places in the queues of the neighbours of features b [R, C].

    aligned: in the queue as it is. official: in the queue as it will be after this step, with the keys
    kb [B, C] of all ranks in it. An image then mostly finds its own fresh key, at a place where the other
    queue still has an unrelated one: the published training does so.
    """
    b = b.to(backbone_queue.keys.dtype)
    if order == "aligned":
        return queue_neighbours(b, backbone_queue.keys, count)[0]
    with backbone_queue.as_after(all_gather(kb)):
        return queue_neighbours(b, backbone_queue.keys, count)[0]


class Revisiting(Method):
    """MoCo-v2 with small queries, neighbours, or both, on a ResNet's pooled map or a ViT's class token."""

    Config: ClassVar[type[MethodConfig]] = RevisitingConfig
    exports: ClassVar[Literal["student", "teacher"]] = "student"

    def __init__(self, config: RevisitingConfig) -> None:
        super().__init__()
        self.config = config

        def build() -> nn.ModuleDict:
            backbone = make_backbone(config.backbone)
            head = mlp_head(backbone.dim, config.hidden_dim or backbone.dim, config.out_dim)
            return nn.ModuleDict({"backbone": backbone, "global_head": head})

        self.student, self.teacher = encoder_pair(build)
        self.queue = KeyQueue(config.queue_length, config.out_dim)
        if config.aux_weight:
            dtype = _DTYPES[config.queue_backbone_dtype]
            width = int(self.student["backbone"].dim)  # pyright: ignore[reportArgumentType]
            self.backbone_queue = KeyQueue(config.queue_length, width, dtype)
        warn_if_nothing_to_shuffle(config.backbone)

    def forward(self, batch: MultiCropBatch, step: Step) -> Output:
        """Return L_nce + aux_weight L_knn of the large and the small queries against the key view."""
        cfg = self.config
        x_q, x_k = batch.views["global"].images  # each [B, 3, S, S]
        queries = self._queries(x_q, batch.views.get("small"))
        keys = self._keys(x_k, step)
        if cfg.aux_weight and step.epoch >= cfg.aux_warmup_epochs:
            places = nearest(
                queries.b, keys.kb, self.backbone_queue, cfg.aux_neighbours, cfg.aux_queue_order
            )
            losses = pull_losses(queries.z, keys.k, self.queue.keys, places, cfg.temperature)
            loss = losses["nce"] + cfg.aux_weight * losses["knn"]
        else:
            positive = keys.k.repeat_interleave(len(queries.z) // len(keys.k), dim=0)
            loss = info_nce(queries.z, positive, self.queue.keys, cfg.temperature)
            losses = {"nce": loss, "knn": torch.zeros_like(loss)}
        logs = {name: value.detach() for name, value in losses.items()}
        return Output(loss, logs, carry=keys)

    def after_step(self, carries: Sequence[Keys], step: Step) -> None:
        """Move the key encoder; enqueue both keys of every image, at one place in the two queues."""
        ema_(self.teacher, self.student, self.config.momentum.at(step))
        self.queue.push(cat_carries([carry.k for carry in carries]))
        if self.config.aux_weight:
            self.backbone_queue.push(cat_carries([carry.kb for carry in carries]))

    def param_groups(self) -> list[ParamGroup]:
        """Return one group: biases and norms decay too."""
        return one_group(self)

    def _queries(self, large: Tensor, small: Crops | None) -> Encoded:
        """Return the queries [B (1 + V), ...], image-major: two passes, each with its batch statistics."""
        first = self._encode(self.student, large)
        if small is None:
            return first
        images = small.images.transpose(0, 1).flatten(0, 1)  # [B V, 3, s, s]
        second = self._encode(self.student, images)
        return Encoded(image_major(first.z, second.z), image_major(first.b, second.b))

    @torch.no_grad()
    def _keys(self, images: Tensor, step: Step) -> Keys:
        """Return keys of images [B, 3, S, S], encoded in another batch's statistics (shuffled BN)."""
        groups = self.config.backbone.bn_groups
        with BatchShuffle(images, step.seed, step.index, step.micro, groups) as shuffle:
            return Keys(*shuffle.restore(*self._encode(self.teacher, shuffle.images)))

    @staticmethod
    def _encode(encoder: nn.ModuleDict, images: Tensor) -> Encoded:
        pooled = encoder["backbone"](images).cls[:, 0]
        return Encoded(unit(encoder["global_head"](pooled)), unit(pooled.detach()))
