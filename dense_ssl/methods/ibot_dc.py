"""iBOT with de-coupling ("Mind Your Augmentation", ICLR 2024; iBOT: arXiv:2111.07832).

iBOT, its masks cut from regions (`rcc`), and beside it a loss on extras: images that come once more, with the
patches of some regions from other images (`decoupling`).

    L = lambda1 L_cls + lambda2 (L_patch + w L_dc)

L_dc is the patch loss over the patches that an extra kept, against the teacher's of the whole image. Extras
take no part in L_cls and L_patch, but centres move by the teacher's logits of all images, extras included.

Which colours extras get, `dc_photometric`: "shared", as the published code does, the teacher sees the very
pixels that the student keeps; "independent", as it was meant, the teacher sees them in their first colours.

Deviates: extras are blurred anew with their second colours, where the published code blurs before it copies.
Where ranks have different numbers of extras, which only masks that happen to be empty bring about, centres
move by the mean over ranks of their means.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor

from dense_ssl.backbones.features import grid_of
from dense_ssl.crops import MultiCropBatch
from dense_ssl.methods.decoupling import (
    LARGEST_SHARE,
    SHARE,
    check_regions,
    exchange_regions,
    foreign_regions,
    last,
    region_masks,
)
from dense_ssl.methods.ibot import (
    check_views,
    distillation_pair,
    groups_with_frozen_last_layers,
    head_of,
    require_vit,
)
from dense_ssl.methods.ibot_objective import (
    IBotObjective,
    Means,
    PatchDistillationConfig,
    Weight,
)
from dense_ssl.methods.masks import (
    MaskConfig,
    PatchMasking,
    PatchRows,
    draw_masks,
    masked_patches,
    on_device,
)
from dense_ssl.methods.method import Method, MethodConfig, Output, ParamGroup, Step, ema_
from dense_ssl.schedule import Ramp
from dense_ssl.views import ViewSpec

DC_COLOURS = ("dc_1", "dc_2")
DC_VIEWS = (
    ViewSpec(
        name="global",
        count=2,
        size=224,
        scale=(0.14, 1.0),
        filter="bicubic",
        photometric=DC_COLOURS,
    ),
    ViewSpec(
        name="extra",
        count=2,
        size=224,
        filter="bicubic",
        photometric=DC_COLOURS,
        twin_of="global",
        part=SHARE,
    ),
)


class IBotDCConfig(PatchDistillationConfig):
    """Numbers of iBOT with de-coupling; defaults are the published ones of ViT-S/16 on COCO."""

    name: Literal["ibot_dc"] = "ibot_dc"
    views: tuple[ViewSpec, ...] = DC_VIEWS
    teacher_temperature: Ramp = Ramp(start=0.04, end=0.07, warmup_epochs=80)
    patch_temperature: Ramp = Ramp(start=0.04, end=0.07, warmup_epochs=80)
    mask: MaskConfig = region_masks()
    dc_weight: Weight = 0.3  # w
    dc_photometric: Literal["shared", "independent"] = "shared"

    @model_validator(mode="after")
    def _check_decoupling(self) -> "IBotDCConfig":
        check_regions(self.mask)
        if len(self.views) != 2 or self.views[0].name != "global" or self.views[0].count != 2:
            raise ValueError(
                "views: de-coupling takes `global`, two crops, and one twin of it, no more"
            )
        if self.views[1].twin_of != "global" or self.extras.part > LARGEST_SHARE:
            raise ValueError(
                f"views: {self.views[1].name!r} must have twin_of global, and as its part the share of "
                f"images to exchange regions in, at most {LARGEST_SHARE}"
            )
        return self

    @property
    def extras(self) -> ViewSpec:
        """The view that shows the last images of a batch again."""
        return self.views[1]


class IBotDC(Method):
    """iBOT with de-coupling, on a ViT."""

    Config: ClassVar[type[MethodConfig]] = IBotDCConfig
    exports: ClassVar[Literal["student", "teacher"]] = "teacher"

    def __init__(self, config: IBotDCConfig) -> None:
        super().__init__()
        self.config = config
        self.objective = IBotObjective(config)
        self.student, self.teacher = distillation_pair(config.backbone, self.objective)
        backbone: Any = self.student["backbone"]
        require_vit(backbone, config.name)
        check_views(config, backbone)
        self.masking = PatchMasking(config.mask, backbone.dim)

    def forward(self, batch: MultiCropBatch, step: Step) -> Output:
        """Return the loss of two crops of B images and, appended to them, of E extras."""
        images = batch.views["global"].images  # [2, B, 3, S, S]
        again = batch.views[self.config.extras.name].images
        backbone: Any = self.student["backbone"]
        grid = grid_of(images, backbone.stride)
        masks = draw_masks(self.config.mask, step, batch.index, len(images), grid)
        foreign = foreign_regions(masks, self.config.extras.part)  # [2, E, h, w]
        own, extras = masks.shape[1], foreign.shape[1]

        student, teacher = recoloured(images, again, extras, self.config.dc_photometric)
        with torch.no_grad():
            features = self.teacher["backbone"](teacher.flatten(0, 1))
            targets = self.objective.targets(head_of(self.teacher), features, len(images))
        targets = targets._replace(cls=targets.cls[:, :own])  # extras count in its means, not here

        def with_extras(of_own: np.ndarray, of_extras: np.ndarray) -> np.ndarray:
            return np.concatenate([of_own, of_extras], axis=1)  # [2, B + E, h, w]

        none, none_extra = np.zeros_like(masks), np.zeros_like(foreign)
        masked = with_extras(masks, none_extra)
        mixed = on_device(with_extras(none, foreign), images.device).flatten(0, 1)
        patches = exchange_regions(backbone.embed(student.flatten(0, 1)), mixed)
        hidden = on_device(masked, images.device).flatten(0, 1)
        features = backbone.encode(masked_patches(patches, hidden, self.masking.token))

        losses = self.objective.losses(
            head_of(self.student),
            features.cls[:, 0].unflatten(0, (len(images), -1))[:, :own],
            features.dense,
            PatchRows.of(masked, images.device, own),
            targets,
            step,
            kept=PatchRows.of(with_extras(none, ~foreign), images.device, extras),
        )
        logs = {name: loss.detach() for name, loss in losses.items()}
        weight = self.config.patch_weight * self.config.dc_weight
        loss = self.objective.total(losses) + weight * losses["dc"]
        return Output(loss, logs, carry=targets.means)

    def after_step(self, carries: Sequence[Means], step: Step) -> None:
        """Move the teacher and the centres."""
        ema_(self.teacher, self.student, self.config.momentum.at(step))
        self.objective.after_step(carries)

    def param_groups(self) -> list[ParamGroup]:
        """Return decayed and not decayed parameters, and the last layers, frozen at first."""
        return groups_with_frozen_last_layers(self, self.config.freeze_last_layer)


def recoloured(
    images: Tensor, again: Tensor, extras: int, mode: Literal["shared", "independent"]
) -> tuple[Tensor, Tensor]:
    """Return what student and teacher see, each [V, B + extras, 3, S, S].

    images [V, B, ...]; `again` the last of them in other colours, `extras` or more. The student sees
    its extras in those; so does a teacher that shares them, an independent one in their first colours.
    """
    student = torch.cat([images, last(again, extras)], dim=1)
    if mode == "shared":
        return student, student
    return student, torch.cat([images, last(images, extras)], dim=1)
