"""The losses of DINO (arXiv:2104.14294) and iBOT (arXiv:2111.07832), with their centres.

For every method that has a student and a teacher with prototype heads: it makes the heads, turns the
teacher's features into targets, and compares. Everything is linear in what leaves the head's MLP, so that
logits of patches are made for masked ones only, and centres move by prototypes times mean features, which
is the mean of logits.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dense_ssl.backbones import BackboneConfig, Features
from dense_ssl.distributed import mean_over_ranks
from dense_ssl.methods.masks import MaskConfig, PatchRows
from dense_ssl.methods.method import MethodConfig, Step
from dense_ssl.methods.prototype_head import PrototypeHead
from dense_ssl.schedule import Number, Ramp, Schedule
from kernels.multicrop_cross_entropy import multicrop_cross_entropy
from kernels.prototype_cross_entropy import mean_logits, prototype_cross_entropy

Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]

DINO_BACKBONE = BackboneConfig(
    name="vit_small_patch16_224", init="dino", positions="dino", drop_path=0.1
)


class PrototypeDistillationConfig(MethodConfig):
    """What all methods have in common that have a student, a teacher and prototypes."""

    backbone: BackboneConfig = DINO_BACKBONE
    out_dim: Count = 8192  # K, prototypes of class tokens
    hidden_dim: Count = 2048
    bottleneck_dim: Count = 256
    norm_last_layer: bool = False  # prototypes stay unit vectors
    freeze_last_layer: Annotated[float, Field(ge=0)] = 1  # epochs
    student_temperature: Annotated[float, Field(gt=0)] = 0.1
    teacher_temperature: Ramp = Ramp(start=0.04, end=0.07, warmup_epochs=30)
    center_momentum: Annotated[float, Field(ge=0, le=1)] = 0.9
    momentum: Number = Schedule(start=0.996, end=1.0)  # of the teacher


class SelfDistillationConfig(PrototypeDistillationConfig):
    """What DINO, iBOT and the methods built on it have in common."""

    cls_weight: Weight = 1.0  # lambda1


class PatchDistillationConfig(SelfDistillationConfig):
    """What iBOT adds to DINO, for it and the methods built on it."""

    patch_out_dim: Count | None = None  # None: patches share the prototypes of class tokens
    patch_temperature: Ramp = Ramp(start=0.04, end=0.07, warmup_epochs=30)  # of the teacher
    patch_weight: Weight = 1.0  # lambda2
    mask: MaskConfig = MaskConfig()


def cls_loss(
    student: Tensor, teacher: Tensor, center: Tensor, T: float, T_student: float
) -> Tensor:
    """Mean cross-entropy over pairs of different crops (DINO, eq. 3): student crop v, teacher crop q.

    student [V, B, K] and teacher [G, B, K] are logits; the first G crops are the teacher's; center [K].
    Gradients flow to the student only.
    """
    bias = -center / T
    losses = multicrop_cross_entropy(student, teacher, bias, T_student, T)  # [V, B]
    pairs = len(teacher) * (len(student) - 1)
    return losses.sum() / (pairs * student.shape[1])


def patch_loss(
    student: Tensor,
    prototypes: Tensor,
    teacher: Tensor,
    teacher_prototypes: Tensor,
    center: Tensor,
    weight: Tensor,
    T: float,
    T_student: float,
) -> Tensor:
    """Weighted sum of cross-entropies of patches (iBOT, eq. 2), each against itself in the teacher.

    student and teacher are features [R, D] of the same patches, prototypes [K, D], center [K], weight [R].
    Gradients flow to student and prototypes.
    """
    bias = -center / T
    return prototype_cross_entropy(
        student, prototypes, teacher, teacher_prototypes, bias, T_student, T, weight
    )


class Means(NamedTuple):
    """What a micro-batch leaves for the centres: mean teacher logits of this rank's crops."""

    cls: Tensor  # [K]
    patch: Tensor | None  # [K_patch]


class Targets(NamedTuple):
    """The teacher's side of a micro-batch, without gradient; G global crops, crop-major."""

    cls: Tensor  # [G, B, K] logits
    patches: Tensor | None  # [G * B * N, D] features
    patch_prototypes: Tensor | None  # [K_patch, D]
    means: Means


class IBotObjective(nn.Module):
    """The losses of DINO or iBOT with their temperatures and centres (its only state)."""

    center: Tensor  # [K]
    patch_center: Tensor  # [K_patch], iBOT only

    def __init__(self, config: SelfDistillationConfig) -> None:
        """Start with centres of zero; a PatchDistillationConfig makes it iBOT's, else it is DINO's."""
        super().__init__()
        self.config = config
        self.patch = config if isinstance(config, PatchDistillationConfig) else None
        self.register_buffer("center", torch.zeros(config.out_dim))
        if self.patch is not None:
            count = self.patch.patch_out_dim or config.out_dim
            self.register_buffer("patch_center", torch.zeros(count))

    def make_head(self, dim: int) -> PrototypeHead:
        """Return a freshly initialised head for tokens of width `dim`."""
        cfg = self.config
        return PrototypeHead(
            dim,
            cfg.out_dim,
            None if self.patch is None else self.patch.patch_out_dim,
            cfg.hidden_dim,
            cfg.bottleneck_dim,
            train_norms=not cfg.norm_last_layer,
        )

    @torch.no_grad()
    def targets(self, head: PrototypeHead, features: Features, crops: int) -> Targets:
        """Return the teacher's side of `crops` crops of B images, encoded as one batch [crops * B, ...].

        Every row counts in the means that centres move by.
        """
        prototypes = head.prototypes()
        cls = head.project(features.cls[:, 0])
        logits = F.linear(cls, prototypes.to(cls.dtype)).unflatten(0, (crops, -1))
        if self.patch is None:
            return Targets(logits, None, None, Means(mean_logits(cls, prototypes), None))
        patch_prototypes = head.patch_prototypes()
        patches = head.project(features.dense).flatten(0, 1)
        means = Means(mean_logits(cls, prototypes), mean_logits(patches, patch_prototypes))
        return Targets(logits, patches, patch_prototypes, means)

    def losses(
        self,
        head: PrototypeHead,
        cls: Tensor,
        dense: Tensor | None,
        rows: PatchRows | None,
        targets: Targets,
        step: Step,
        kept: PatchRows | None = None,
    ) -> dict[str, Tensor]:
        """Return {"cls", "patch"} (DINO: {"cls"}; with `kept` also "dc"), unweighted.

        cls [V, B, D] are the student's class tokens of all crops, the targets' first; dense [G * B, N, D]
        its patch tokens of those, and `rows` which of them count and how much. "dc" is the patch loss
        over other patches, `kept`.
        """
        crops = cls.shape[:2]
        wanted = {
            name: taken for name, taken in (("patch", rows), ("dc", kept)) if taken is not None
        }
        chosen = []
        if dense is not None:
            patches = dense.flatten(0, 1)
            chosen = [patches.index_select(0, taken.rows) for taken in wanted.values()]
        # One pass of the MLP for all that goes through it.
        features = head.project(torch.cat([cls.flatten(0, 1), *chosen]))
        of_cls, *of_patches = features.split([crops[0] * crops[1], *map(len, chosen)])
        prototypes = head.prototypes()
        logits = F.linear(of_cls, prototypes.to(of_cls.dtype)).unflatten(0, crops)
        result = {"cls": self.cls_loss(logits, targets.cls, step)}
        if of_patches:
            own = prototypes if head.last_layer2 is None else head.patch_prototypes()
            for (name, taken), student in zip(wanted.items(), of_patches, strict=True):
                result[name] = self.patch_loss(student, own, targets, taken, step)
        return result

    def cls_loss(self, student: Tensor, teacher: Tensor, step: Step) -> Tensor:
        """Return the mean over pairs of crops and over images, of logits [V, B, K] and [G, B, K]."""
        cfg = self.config
        T = cfg.teacher_temperature.at(step)
        return cls_loss(student, teacher, self.center, T, cfg.student_temperature)

    def patch_loss(
        self, student: Tensor, prototypes: Tensor, targets: Targets, rows: PatchRows, step: Step
    ) -> Tensor:
        """Return the weighted sum over `rows`, whose student features are `student` [R, D]."""
        assert self.patch is not None
        assert targets.patches is not None
        assert targets.patch_prototypes is not None
        return patch_loss(
            student,
            prototypes,
            targets.patches.index_select(0, rows.rows),
            targets.patch_prototypes,
            self.patch_center,
            rows.weight,
            self.patch.patch_temperature.at(step),
            self.config.student_temperature,
        )

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Return lambda1 cls + lambda2 patch."""
        loss = self.config.cls_weight * losses["cls"]
        return loss if self.patch is None else loss + self.patch.patch_weight * losses["patch"]

    @torch.no_grad()
    def after_step(self, carries: Sequence[Means]) -> None:
        """Move the centres by the mean over micro-batches and ranks (DINO, eq. 4)."""
        share = 1 - self.config.center_momentum
        self.center.lerp_(_mean([carry.cls for carry in carries]), share)
        patch = [carry.patch for carry in carries if carry.patch is not None]
        if patch:
            self.patch_center.lerp_(_mean(patch), share)


def _mean(of_micro_batches: Sequence[Tensor]) -> Tensor:
    return mean_over_ranks(torch.stack(list(of_micro_batches)).mean(0))
