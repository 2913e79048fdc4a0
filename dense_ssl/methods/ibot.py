"""DINO (arXiv:2104.14294) and iBOT (arXiv:2111.07832): self-distillation of class and patch tokens.

A student predicts the centred, sharpened prototype distribution of a teacher, its moving average: from the
class token of every crop that of the other global crops (DINO, eq. 2 and 3), and from each masked patch of
a global crop that of the same patch of the same crop, which the teacher sees whole (iBOT, eq. 2).

    L = lambda1 L_cls + lambda2 L_patch

DINO is the same without masks and patches. The losses are in `ibot_objective`; here are the two
published methods, and what others built on them share.

Deviates: only masked patches go through the last layer, and centres move by prototypes times mean features,
which is the same mean of logits; masks are drawn per (seed, epoch, image, crop), and for global crops only.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dense_ssl.backbones import Backbone, BackboneConfig, Features, ViTBackbone, make_backbone
from dense_ssl.config import UserError
from dense_ssl.crops import MultiCropBatch
from dense_ssl.methods.ibot_objective import (
    Count,
    IBotObjective,
    Means,
    PatchDistillationConfig,
    SelfDistillationConfig,
)
from dense_ssl.methods.masks import PatchMasking, PatchRows
from dense_ssl.methods.method import (
    Method,
    MethodConfig,
    Output,
    ParamGroup,
    Step,
    decay_groups,
    ema_,
    teacher_of,
)
from dense_ssl.methods.prototype_head import PrototypeHead
from dense_ssl.schedule import Ramp
from dense_ssl.views import ViewSpec


def dino_views(
    scale: tuple[float, float], local_scale: tuple[float, float], locals_: int
) -> tuple[ViewSpec, ...]:
    """Return two global crops of 224 px and small ones of 96 px, with DINO's colours."""
    return (
        ViewSpec(
            name="global",
            count=2,
            size=224,
            scale=scale,
            filter="bicubic",
            photometric=("dino_1", "dino_2"),
        ),
        ViewSpec(
            name="local",
            count=locals_,
            size=96,
            scale=local_scale,
            filter="bicubic",
            photometric="dino_local",
        ),
    )


class DinoConfig(SelfDistillationConfig):
    """Numbers of DINO; defaults are the paper's for 100 epochs of ViT-S/16."""

    name: Literal["dino"] = "dino"
    views: tuple[ViewSpec, ...] = dino_views((0.4, 1.0), (0.05, 0.4), 8)
    out_dim: Count = 65536
    norm_last_layer: bool = True
    teacher_temperature: Ramp = Ramp(start=0.04, end=0.04)


class IBotConfig(PatchDistillationConfig):
    """Numbers of iBOT; defaults are the published ones of ViT-S/16."""

    name: Literal["ibot"] = "ibot"
    views: tuple[ViewSpec, ...] = dino_views((0.25, 1.0), (0.05, 0.25), 10)


class IBot(Method):
    """iBOT on a ViT; with a `DinoConfig` DINO, on a ViT or a ResNet."""

    Config: ClassVar[type[MethodConfig]] = IBotConfig
    exports: ClassVar[Literal["student", "teacher"]] = "teacher"

    def __init__(self, config: IBotConfig | DinoConfig) -> None:
        super().__init__()
        self.config = config
        self.objective = IBotObjective(config)
        self.student, self.teacher = distillation_pair(config.backbone, self.objective)
        backbone: Any = self.student["backbone"]
        check_views(config, backbone)
        self.masking = None
        if isinstance(config, IBotConfig):
            require_vit(backbone, config.name)
            self.masking = PatchMasking(config.mask, backbone.dim)

    def forward(self, batch: MultiCropBatch, step: Step) -> Output:
        """Return the loss of all views; only the student's global crops are masked."""
        encoded = encode_views(self.student, self.teacher, self.masking, batch, step)
        targets = self.objective.targets(head_of(self.teacher), encoded.teacher, encoded.crops)
        losses = self.objective.losses(
            head_of(self.student), encoded.cls(), encoded.student.dense, encoded.rows, targets, step
        )
        logs = {name: loss.detach() for name, loss in losses.items()}
        return Output(self.objective.total(losses), logs, carry=targets.means)

    def after_step(self, carries: Sequence[Means], step: Step) -> None:
        """Move the teacher and the centres."""
        ema_(self.teacher, self.student, self.config.momentum.at(step))
        self.objective.after_step(carries)

    def param_groups(self) -> list[ParamGroup]:
        """Return decayed and not decayed parameters, and the last layers, frozen at first."""
        return groups_with_frozen_last_layers(self, self.config.freeze_last_layer)


class MakesHeads(Protocol):
    """An objective, as far as networks are concerned."""

    def make_head(self, dim: int) -> PrototypeHead:
        """Return a freshly initialised head for tokens of width `dim`."""
        ...


def distillation_pair(
    backbone: BackboneConfig, objective: MakesHeads
) -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """Return student and teacher, equal but that the teacher drops no path."""

    def build(config: BackboneConfig) -> nn.ModuleDict:
        trunk = make_backbone(config)
        return nn.ModuleDict({"backbone": trunk, "head": objective.make_head(trunk.dim)})

    student = build(backbone)
    return student, teacher_of(student, build(backbone.model_copy(update={"drop_path": 0.0})))


def head_of(network: nn.ModuleDict) -> PrototypeHead:
    """Return the prototype head of a student or a teacher."""
    head = network["head"]
    assert isinstance(head, PrototypeHead)
    return head


class Encoded(NamedTuple):
    """One micro-batch through both networks; G global crops of B images, crop-major."""

    crops: int  # G
    teacher: Features  # of the global crops, [G * B, ...], without gradient
    student: Features  # of the same, some patches masked
    rows: PatchRows | None  # which
    local: tuple[Features, ...]  # the student's of every further view, [V * B, ...], unmasked

    def cls(self) -> Tensor:
        """Return the student's class tokens of all crops, [V, B, D], the global ones first."""
        batch = len(self.student.cls) // self.crops
        tokens = [features.cls[:, 0] for features in (self.student, *self.local)]
        return torch.cat(tokens).unflatten(0, (-1, batch))


def encode_views(
    student: nn.ModuleDict,
    teacher: nn.ModuleDict,
    masking: PatchMasking | None,
    batch: MultiCropBatch,
    step: Step,
) -> Encoded:
    """Return features of all views, the crops of a view (all of one size) as one batch.

    The teacher sees global crops as they are; no masking: so does the student.
    """
    views = dict(batch.views)
    images = views.pop("global").images  # [G, B, 3, S, S]
    crops, flat = len(images), images.flatten(0, 1)
    with torch.no_grad():
        targets = teacher["backbone"](flat)
    backbone: Any = student["backbone"]
    if masking is None:
        features, rows = backbone(flat), None
    else:
        patches, rows = masking(backbone.embed(flat), batch.index, step, crops)
        features = backbone.encode(patches)
    local = tuple(backbone(view.images.flatten(0, 1)) for view in views.values())
    return Encoded(crops, targets, features, rows, local)


def groups_with_frozen_last_layers(method: Method, epochs: float) -> list[ParamGroup]:
    """Return biases and norms, all else, and the student's prototypes, which rest for some epochs."""
    last = head_of(method.student).last_layers()
    resting = {id(p) for p in last}
    trained = (p for p in method.parameters() if p.requires_grad and id(p) not in resting)
    return [*decay_groups(trained), ParamGroup(last, frozen_epochs=epochs, name="last_layer")]


def check_views(config: MethodConfig, backbone: Backbone) -> None:
    """Refuse views that cannot be distilled.

    Raises:
        UserError: there are no two global crops, or a size is no multiple of the patch.
    """
    if not any(view.name == "global" and view.count > 1 for view in config.views):
        raise UserError("method.views: a view named global with two crops is what the teacher sees")
    for view in config.views:
        if isinstance(backbone, ViTBackbone) and view.size % backbone.stride:
            raise UserError(
                f"method.views: {view.name} is {view.size} px, no multiple of the patch of "
                f"{backbone.stride} px"
            )


def require_vit(backbone: Backbone, method: str) -> None:
    """Raise UserError unless the backbone has patches to mask."""
    if not isinstance(backbone, ViTBackbone):
        raise UserError(
            f"method.backbone.name: {method} masks patch tokens, which {backbone.config.name} has "
            "not; take a ViT (vit_small_patch16_224, ...)"
        )
