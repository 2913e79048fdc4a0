"""SERE (arXiv:2206.05184): iBOT, and self-relations of the student that follow the teacher's.

    L = (4 - alpha - beta) / 2 L_iBOT + alpha L_spatial + beta L_channel

L_iBOT is `ibot_objective`'s loss, L_spatial and L_channel are in `sere_relations`. Relations are made of the
last block's patch tokens before the final norm: the teacher's of whole global crops, the student's of the
masked ones and of local crops, which have heads of their own. Where two crops show the same is computed
from the boxes they were cut by. Weight decay is on biases too, off for the scales of norms only.

Deviates: heads are chosen by the kind of crop (the published code sends one or two local crops through the
heads of global ones); the teacher's predictors, whose results nobody uses, do not run; teacher sums of
micro-batches that make no full step at an epoch's end do not reach the centres.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dense_ssl.config import UserError
from dense_ssl.crops import MultiCropBatch
from dense_ssl.methods.ibot import (
    Encoded,
    check_views,
    dino_views,
    distillation_pair,
    encode_views,
    head_of,
    require_vit,
)
from dense_ssl.methods.ibot_objective import Count, IBotObjective, Means, PatchDistillationConfig
from dense_ssl.methods.masks import PatchMasking
from dense_ssl.methods.method import Method, MethodConfig, Output, ParamGroup, Step, ema_
from dense_ssl.methods.sere_relations import (
    Grids,
    Maps,
    RelationHead,
    channel_loss,
    spatial_loss,
)
from dense_ssl.views import ViewSpec

Temperature = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]

HEADS = ("pixel_sere", "channel_sere")  # by their official names; local crops' end in _local


class SereConfig(PatchDistillationConfig):
    """Numbers of SERE; defaults are the published ones of ViT-S/16, 100 epochs."""

    name: Literal["sere"] = "sere"
    views: tuple[ViewSpec, ...] = dino_views((0.4, 1.0), (0.05, 0.4), 10)
    spatial_weight: Weight = 0.2  # alpha
    channel_weight: Weight = 0.5  # beta
    spatial_temperature: Temperature = 0.5  # of the teacher; the student's is 1
    channel_temperature: Temperature = 0.1
    overlap_size: tuple[Count, Count] = (13, 13)  # points on a side, of queries and of keys
    local_overlap_size: Count = 6


def total_loss(ibot: Tensor, spatial: Tensor, channel: Tensor, alpha: float, beta: float) -> Tensor:
    """Return (4 - alpha - beta) / 2 ibot + alpha spatial + beta channel."""
    return (4 - alpha - beta) / 2 * ibot + alpha * spatial + beta * channel


class Sere(Method):
    """SERE on a ViT, with or without local crops."""

    Config: ClassVar[type[MethodConfig]] = SereConfig
    exports: ClassVar[Literal["student", "teacher"]] = "teacher"
    uses_boxes: ClassVar[bool] = True

    def __init__(self, config: SereConfig) -> None:
        super().__init__()
        self.config = config
        self.objective = IBotObjective(config)
        self.student, self.teacher = distillation_pair(config.backbone, self.objective)
        backbone: Any = self.student["backbone"]
        check_views(config, backbone)
        _check_kinds(config)
        require_vit(backbone, config.name)
        self.masking = PatchMasking(config.mask, backbone.dim)
        self.heads = int(backbone.trunk.blocks[0].attn.num_heads)  # of the spatial relation, too
        local = len(config.views) > 1
        for name in (*HEADS, *(f"{name}_local" for name in HEADS if local)):
            self.student[name] = RelationHead(backbone.dim)
            self.teacher[name] = copy.deepcopy(self.student[name]).requires_grad_(False)

    def forward(self, batch: MultiCropBatch, step: Step) -> Output:
        """Return the loss of all views; only the student's global crops are masked."""
        cfg = self.config
        encoded = encode_views(self.student, self.teacher, self.masking, batch, step)
        targets = self.objective.targets(head_of(self.teacher), encoded.teacher, encoded.crops)
        losses = self.objective.losses(
            head_of(self.student), encoded.cls(), encoded.student.dense, encoded.rows, targets, step
        )
        grids = Grids.of(
            batch.views["global"],
            batch.views.get("local"),
            cfg.overlap_size,
            cfg.local_overlap_size,
        )
        maps = self._features("pixel_sere", encoded)
        spatial = spatial_loss(*maps, grids, self.heads, cfg.spatial_temperature)
        maps = self._features("channel_sere", encoded)
        channel = channel_loss(*maps, cfg.channel_temperature)
        loss = total_loss(
            self.objective.total(losses), spatial, channel, cfg.spatial_weight, cfg.channel_weight
        )
        logs = {**losses, "spatial": spatial, "channel": channel}
        return Output(loss, {k: value.detach() for k, value in logs.items()}, carry=targets.means)

    def _features(self, name: str, encoded: Encoded) -> tuple[Maps, Maps, Maps | None]:
        """Return what a relation is made of: student's, teacher's, and the local crops' if any."""
        student: Any = self.student
        teacher: Any = self.teacher
        with torch.no_grad():
            target = teacher[name].project(encoded.teacher.hidden)
        own = student[name](encoded.student.hidden)
        local = None
        if encoded.local:
            features = encoded.local[0]
            local = Maps(student[f"{name}_local"](features.hidden), features.grid)
        return Maps(own, encoded.student.grid), Maps(target, encoded.teacher.grid), local

    def after_step(self, carries: Sequence[Means], step: Step) -> None:
        """Move the teacher, relation heads and all, and the centres."""
        ema_(self.teacher, self.student, self.config.momentum.at(step))
        self.objective.after_step(carries)

    def param_groups(self) -> list[ParamGroup]:
        """Return decayed and not decayed parameters, and the last layers, frozen at first."""
        last = head_of(self.student).last_layers()
        resting = {id(p) for p in last}
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        groups = bias_decaying_groups((name, p) for name, p in trained if id(p) not in resting)
        frozen = ParamGroup(last, frozen_epochs=self.config.freeze_last_layer, name="last_layer")
        return [*groups, frozen]


def bias_decaying_groups(named: Iterable[tuple[str, nn.Parameter]]) -> list[ParamGroup]:
    """Return parameters that decay, biases among them, and those that do not: the scales of norms."""
    named = list(named)
    scales = [p for name, p in named if p.ndim == 1 and not name.endswith(".bias")]
    spared = {id(p) for p in scales}
    return [
        ParamGroup([p for _, p in named if id(p) not in spared], name="decay"),
        ParamGroup(scales, decay=0.0, name="no_decay"),
    ]


def _check_kinds(config: SereConfig) -> None:
    """Raise UserError unless views are two crops named global and, or not, some named local."""
    counts = {view.name: view.count for view in config.views}
    if counts["global"] != 2 or not set(counts) <= {"global", "local"}:
        given = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise UserError(
            f"method.views: sere relates two global crops to each other and to local ones; {given} "
            "given: name them global (count 2) and local"
        )
