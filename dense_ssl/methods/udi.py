"""UDI (arXiv:2407.17671): DINO with a second class token, and with patches at the same places of two crops.

The backbone has two class tokens. The first is trained as DINO's; the second predicts a blend of what the
teacher says of a crop and of patches of it; patches predict the teacher's at the same places of the other
global crop. Patches are drawn from windows of the grid and located in other crops by the boxes they were cut
by (`udi_maps`); an attention module makes features of them (`udi_attention`); one head with one set of
prototypes serves all. The losses are in `udi_objective`.

Deviates: the teacher runs once, where the published code runs it again for the places of local crops, and the
attention module does not run on local crops, where its results are thrown away; samples are drawn per
(seed, epoch, image); the module has the width of the backbone, where the published one fits ViT-S only.
"""

import copy
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from dense_ssl.backbones import Backbone, BackboneConfig
from dense_ssl.config import UserError
from dense_ssl.crops import MultiCropBatch
from dense_ssl.methods.ibot import (
    Encoded,
    check_views,
    dino_views,
    distillation_pair,
    encode_views,
    groups_with_frozen_last_layers,
    head_of,
    require_vit,
)
from dense_ssl.methods.ibot_objective import DINO_BACKBONE, Count
from dense_ssl.methods.method import Method, MethodConfig, Output, ParamGroup, Step, ema_
from dense_ssl.methods.udi_attention import PointSampler
from dense_ssl.methods.udi_maps import Maps, Strata, make_maps
from dense_ssl.methods.udi_objective import (
    BlendedDistillationConfig,
    Centers,
    Samples,
    Student,
    Teacher,
    UdiObjective,
)
from dense_ssl.views import Near, ViewSpec


def udi_views(locals_: int) -> tuple[ViewSpec, ...]:
    """Return DINO's crops in UDI's colours: the second near the first, local ones near what both show."""
    anchors = ("global[0]", "shared(global)")
    return tuple(
        view.model_copy(
            update={"photometric": "udi", "near": Near(kind="pull", of=anchor, amount=0.5)}
        )
        for view, anchor in zip(
            dino_views((0.25, 1.0), (0.05, 0.25), locals_), anchors, strict=True
        )
    )


class UdiConfig(BlendedDistillationConfig):
    """Numbers of UDI; defaults are the published ones of ViT-S/16, 300 epochs."""

    name: Literal["udi"] = "udi"
    views: tuple[ViewSpec, ...] = udi_views(10)
    backbone: BackboneConfig = DINO_BACKBONE.model_copy(update={"class_tokens": 2})
    out_dim: Count = 65536
    global_window: Count = 3  # one patch is drawn of each window x window patches
    local_window: Count = 2
    attention_heads: Annotated[int, Field(ge=1)] = 6  # of the module, whatever the backbone's

    @model_validator(mode="after")
    def _check_variant(self) -> "UdiConfig":
        if self.backbone.class_tokens > 2:
            raise ValueError("backbone.class_tokens: udi trains one or two")
        if not self.patches and self.backbone.class_tokens > 1:
            raise ValueError(
                "patches: a second class token learns from patches; set backbone.class_tokens to 1"
            )
        return self


class Udi(Method):
    """UDI on a ViT, with or without local crops."""

    Config: ClassVar[type[MethodConfig]] = UdiConfig
    exports: ClassVar[Literal["student", "teacher"]] = "teacher"
    uses_boxes: ClassVar[bool] = True

    def __init__(self, config: UdiConfig) -> None:
        super().__init__()
        self.config = config
        self.objective = UdiObjective(config)
        self.student, self.teacher = distillation_pair(config.backbone, self.objective)
        backbone: Any = self.student["backbone"]
        check_views(config, backbone)
        _check_kinds(config)
        require_vit(backbone, config.name)
        self.strata = None
        if config.patches:
            self.strata = strata_of(config, backbone)
            self.student["sampler"] = PointSampler(backbone.dim, config.attention_heads)
            self.teacher["sampler"] = copy.deepcopy(self.student["sampler"]).requires_grad_(False)

    def forward(self, batch: MultiCropBatch, step: Step) -> Output:
        """Return the loss of all views."""
        encoded = encode_views(self.student, self.teacher, None, batch, step)
        maps = None
        if self.strata is not None:
            views = batch.views
            maps = make_maps(views["global"], views.get("local"), batch.index, step, self.strata)
        with torch.no_grad():
            teacher = teacher_side(self.teacher, encoded, maps)
        student = student_side(self.student, encoded, maps)
        levels, means = self.objective.losses(student, teacher, step)
        logs = {name: loss.detach() for name, loss in levels.values().items()}
        return Output(levels.total(), logs, carry=means)

    def after_step(self, carries: Sequence[Centers], step: Step) -> None:
        """Move the teacher and the centres."""
        ema_(self.teacher, self.student, self.config.momentum.at(step))
        self.objective.after_step(carries)

    def param_groups(self) -> list[ParamGroup]:
        """Return decayed and not decayed parameters, and the last layer, frozen at first."""
        return groups_with_frozen_last_layers(self, self.config.freeze_last_layer)


def student_side(network: nn.ModuleDict, encoded: Encoded, maps: Maps | None) -> Student:
    """Return features of class tokens of all crops, and of sampled patches of the global ones."""
    seen = (encoded.student, *encoded.local)
    batch = len(encoded.student.cls) // encoded.crops
    tokens = torch.cat([x.cls for x in seen]).unflatten(0, (-1, batch))  # [V, B, T, D]
    rows, shape = [tokens.flatten(0, 2)], tokens.shape[:3]
    if maps is not None:
        assert encoded.student.hidden is not None
        rows.append(
            network["sampler"](encoded.student.hidden, maps.own.flatten(0, 1)).flatten(0, 1)
        )
    # One pass of the MLP for all that goes through it.
    features = head_of(network).project(torch.cat(rows))
    of_tokens, *of_samples = features.split([len(x) for x in rows])
    cls, *plus = of_tokens.unflatten(0, shape).unbind(2)
    samples = None
    if maps is not None:
        weight = maps.own.sum(-1)
        samples = Samples(of_samples[0].unflatten(0, weight.shape), weight)
    return Student(head_of(network).prototypes(), cls, plus[0] if plus else None, samples)


def teacher_side(network: nn.ModuleDict, encoded: Encoded, maps: Maps | None) -> Teacher:
    """Return features of class tokens, and of patches at the places of the student's."""
    head = head_of(network)
    seen = encoded.teacher
    cls = head.project(seen.cls[:, 0]).unflatten(0, (encoded.crops, -1))
    if maps is None:
        return Teacher(head.prototypes(), cls, None, None)
    assert seen.hidden is not None
    wanted = [maps.of_global, *([] if maps.of_local is None else [maps.of_local.flatten(2, 3)])]
    places = torch.cat(wanted, dim=2)  # [2, B, S + L * R, N]
    points = network["sampler"](seen.hidden, places.flatten(0, 1))
    features = head.project(points).unflatten(0, places.shape[:2])
    of_global, *of_local = features.split([x.shape[2] for x in wanted], dim=2)
    samples, local = Samples(of_global, maps.of_global.sum(-1)), None
    if maps.of_local is not None:
        weight = maps.of_local.sum(-1)
        local = Samples(of_local[0].unflatten(2, weight.shape[2:]), weight)
    return Teacher(head.prototypes(), cls, samples, local)


def strata_of(config: UdiConfig, backbone: Backbone) -> Strata:
    """Return the grids that patches are sampled from.

    Raises:
        UserError: a window does not fit its grid.
    """
    windows = {"global": config.global_window, "local": config.local_window}
    grids = {view.name: (view.size // backbone.stride, windows[view.name]) for view in config.views}
    for name, (side, window) in grids.items():
        if not 2 <= side >= window:
            raise UserError(
                f"method.{name}_window: {window} x {window} patches do not fit into the {side} x {side} "
                f"of a {name} crop; make them fewer, or the view larger"
            )
    return Strata(grids["global"], grids.get("local"))


def _check_kinds(config: UdiConfig) -> None:
    """Raise UserError unless views are two crops named global and, or not, some named local."""
    counts = {view.name: view.count for view in config.views}
    if counts["global"] != 2 or not set(counts) <= {"global", "local"}:
        given = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise UserError(
            f"method.views: udi compares two global crops with each other and with local ones; {given} "
            "given: name them global (count 2) and local"
        )
