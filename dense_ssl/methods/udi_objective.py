"""The losses of UDI (arXiv:2407.17671) with their three centres.

    t*_v = alpha mean_k q_vk + (1 - alpha) c_v
    L = (L_cls + L_cls+ + L_patch) / 3

c and q are the teacher's logits of the class token and of sampled patches of a view v; their blend t* is
centred and sharpened like them. A student's class token follows c of each other global crop (DINO, eq. 3);
its second class token their t*, of patches that lie where its own crop's do; and its own patches the
teacher's at the same places of the other global crop.

Everything is linear in what leaves the head's MLP: t* are the logits of blended features, and centres move by
prototypes times mean features, which is the mean of logits. So logits are made of class tokens, and chunk by
chunk of blends and of the samples of global crops; of the many samples of local crops none are ever made.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dense_ssl.distributed import mean_over_ranks
from dense_ssl.methods.ibot_objective import PrototypeDistillationConfig
from dense_ssl.methods.method import Step
from dense_ssl.methods.prototype_head import PrototypeHead
from kernels.multicrop_cross_entropy import multicrop_cross_entropy
from kernels.prototype_cross_entropy import prototype_cross_entropy

NO_SAMPLES = 1e-5  # added to the number of samples, so that the mean of none is 0


class BlendedDistillationConfig(PrototypeDistillationConfig):
    """What UDI's losses add to DINO's."""

    blend: Annotated[float, Field(ge=0, le=1)] = 0.5  # alpha, the patches' share of a target
    patches: bool = True  # False, with one class token: DINO


class Samples(NamedTuple):
    """Features of sampled patches, and which of them count."""

    features: Tensor  # [..., S, d]
    weight: Tensor  # [..., S]  1, or 0 where there is nothing to compare with


class Student(NamedTuple):
    """The student's features of V crops of B images, the two global ones first."""

    prototypes: Tensor  # [K, d]
    cls: Tensor  # [V, B, d]
    plus: Tensor | None  # [V, B, d]  of the second class token
    samples: Samples | None  # [2, B, S, d]  patches of each global crop that the other one shows


class Teacher(NamedTuple):
    """The teacher's features of two global crops, without gradient."""

    prototypes: Tensor  # [K, d]
    cls: Tensor  # [2, B, d]
    samples: Samples | None  # [2, B, S, d]  at the places of the other one's patches
    local: Samples | None  # [2, B, L, R, d]  at the places of local crops' patches


class Blends(NamedTuple):
    """Features of the targets of second class tokens, by the teacher's crop."""

    of_global: Tensor  # [2, B, d]  for the other global crop
    of_local: Tensor | None  # [2, B, L, d]  for each local one


class Centers(NamedTuple):
    """Mean teacher logits [K], or None: of class tokens, of blends, of samples."""

    cls: Tensor
    plus: Tensor | None
    patch: Tensor | None


class Temperatures(NamedTuple):
    """What logits are divided by."""

    student: float
    teacher: float


class Levels(NamedTuple):
    """The losses of one micro-batch; of tokens by kind of crop: {"global", "local"}, or "global" alone."""

    cls: dict[str, Tensor]
    plus: dict[str, Tensor] | None
    patch: Tensor | None
    locals: int  # L

    def values(self) -> dict[str, Tensor]:
        """Return {"cls", "cls_plus", "patch"}, those there are."""
        levels = {"cls": level(self.cls, self.locals)}
        if self.plus is not None:
            levels["cls_plus"] = level(self.plus, self.locals)
        if self.patch is not None:
            levels["patch"] = self.patch
        return levels

    def total(self) -> Tensor:
        """Return the mean over levels."""
        return torch.stack(list(self.values().values())).mean()


def level(losses: Mapping[str, Tensor], locals_: int) -> Tensor:
    """Return the mean over all pairs of crops: two of global ones, two of each of L local ones."""
    if "local" not in losses:
        return losses["global"]
    return (losses["global"] + locals_ * losses["local"]) / (1 + locals_)


def udi_losses(
    student: Student, teacher: Teacher, centers: Centers, T: Temperatures, alpha: float
) -> tuple[Levels, Centers]:
    """Return the losses, and the means that centres are to move by once they have been used.

    Gradients flow to the student's side.
    """
    cls = cls_losses(student.cls, student.prototypes, teacher, centers.cls, T)
    plus = patch = None
    with torch.no_grad():
        blends = None if student.plus is None else blends_of(teacher, alpha)
        means = mean_centers(teacher, blends)
    if student.plus is not None and blends is not None and centers.plus is not None:
        plus = plus_losses(
            *(student.plus, student.prototypes, blends, teacher.prototypes, centers.plus, T)
        )
    if student.samples is not None and centers.patch is not None:
        patch = patch_loss(student.samples, student.prototypes, teacher, centers.patch, T)
    return Levels(cls, plus, patch, len(student.cls) - 2), means


def blend(cls: Tensor, samples: Samples, alpha: float) -> Tensor:
    """Return alpha * mean of samples [..., S, d] + (1 - alpha) * cls [..., d], in float32.

    The mean of no samples is 0. Of features or of logits: one has the other as its logits.
    """
    count = samples.weight.sum(-1, keepdim=True) + NO_SAMPLES
    return alpha * _weighted(samples).sum(-2) / count + (1 - alpha) * _wide(cls)


def blends_of(teacher: Teacher, alpha: float) -> Blends:
    """Return what each global crop teaches second class tokens."""
    assert teacher.samples is not None
    of_global = blend(teacher.cls, teacher.samples, alpha)
    if teacher.local is None:
        return Blends(of_global, None)
    return Blends(of_global, blend(teacher.cls[:, :, None], teacher.local, alpha))


def cls_losses(
    student: Tensor, prototypes: Tensor, teacher: Teacher, center: Tensor, T: Temperatures
) -> dict[str, Tensor]:
    """Return mean losses of class tokens [V, B, d] over crops of a kind, images and the teacher's crops."""
    own = F.linear(student, prototypes.to(student.dtype))
    target = F.linear(teacher.cls, teacher.prototypes.to(teacher.cls.dtype))
    losses = multicrop_cross_entropy(own, target, -center / T.teacher, *T)  # [V, B]
    if len(losses) == 2:
        return {"global": losses.mean()}
    return {"global": losses[:2].mean(), "local": losses[2:].mean() / 2}  # each against both


def plus_losses(
    student: Tensor,
    prototypes: Tensor,
    blends: Blends,
    teacher_prototypes: Tensor,
    center: Tensor,
    T: Temperatures,
) -> dict[str, Tensor]:
    """Return mean losses of second class tokens [V, B, d], as of first ones but each with its own targets."""
    bias = -center / T.teacher

    def compare(own: Tensor, target: Tensor) -> Tensor:
        own, target = own.flatten(0, -2), target.to(own.dtype).flatten(0, -2)
        return prototype_cross_entropy(own, prototypes, target, teacher_prototypes, bias, *T)

    losses = {"global": compare(student[:2], blends.of_global.flip(0))}
    if blends.of_local is not None:
        target = blends.of_local.permute(2, 1, 0, 3)  # [L, B, 2, d]
        losses["local"] = compare(student[2:, :, None].expand(target.shape), target)
    return losses


def patch_loss(
    student: Samples, prototypes: Tensor, teacher: Teacher, center: Tensor, T: Temperatures
) -> Tensor:
    """Return the mean loss of those patches of each global crop that the other one shows.

    The others are computed and weigh nothing: to leave them out, the host would have to know their number.
    """
    assert teacher.samples is not None
    own = student.features.flatten(0, 2)
    target = teacher.samples.features.flip(0).flatten(0, 2).to(own.dtype)
    weight = (student.weight / student.weight.sum().clamp(min=1)).flatten()
    bias = -center / T.teacher
    return prototype_cross_entropy(
        own, prototypes, target, teacher.prototypes, bias, T.student, T.teacher, weight
    )


def mean_centers(teacher: Teacher, blends: Blends | None) -> Centers:
    """Return the mean logits of a micro-batch: over crops; over all targets; over all samples that count."""
    means = {"cls": _wide(teacher.cls).mean((0, 1))}
    if blends is not None:
        of_all = [x.flatten(0, -2) for x in blends if x is not None]
        means["plus"] = torch.cat(of_all).mean(0)
    given = [x for x in (teacher.samples, teacher.local) if x is not None]
    if given:
        total = torch.stack([_weighted(x).flatten(0, -2).sum(0) for x in given]).sum(0)
        count = torch.stack([x.weight.sum() for x in given]).sum()
        means["patch"] = total / count.clamp(min=1)
    with torch.autocast(teacher.cls.device.type, enabled=False):
        logits = torch.stack(list(means.values())) @ _wide(teacher.prototypes).T
    named = dict(zip(means, logits, strict=True))
    return Centers(named["cls"], named.get("plus"), named.get("patch"))


def _weighted(samples: Samples) -> Tensor:
    return _wide(samples.features) * samples.weight[..., None]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class UdiObjective(nn.Module):
    """The losses with their temperatures and centres (its only state)."""

    center: Tensor  # [K]
    plus_center: Tensor | None  # [K], of blends: with a second class token
    patch_center: Tensor | None  # [K], with patches

    def __init__(self, config: BlendedDistillationConfig) -> None:
        super().__init__()
        self.config = config
        plus = config.backbone.class_tokens > 1
        self.register_buffer("center", torch.zeros(config.out_dim))
        self.register_buffer("plus_center", torch.zeros(config.out_dim) if plus else None)
        self.register_buffer(
            "patch_center", torch.zeros(config.out_dim) if config.patches else None
        )

    def make_head(self, dim: int) -> PrototypeHead:
        """Return a freshly initialised head for tokens of width `dim`, of all kinds."""
        cfg = self.config
        return PrototypeHead(
            dim,
            cfg.out_dim,
            hidden_dim=cfg.hidden_dim,
            bottleneck_dim=cfg.bottleneck_dim,
            train_norms=not cfg.norm_last_layer,
        )

    def losses(self, student: Student, teacher: Teacher, step: Step) -> tuple[Levels, Centers]:
        """Return the losses, and what `after_step` takes."""
        cfg = self.config
        T = Temperatures(cfg.student_temperature, cfg.teacher_temperature.at(step))
        centers = Centers(self.center, self.plus_center, self.patch_center)
        return udi_losses(student, teacher, centers, T, cfg.blend)

    @torch.no_grad()
    def after_step(self, carries: Sequence[Centers]) -> None:
        """Move each centre by the mean over micro-batches and ranks of their means."""
        for center, means in zip(
            self.buffers(), zip(*map(_given, carries), strict=True), strict=True
        ):
            mean = mean_over_ranks(torch.stack(means).mean(0))
            center.lerp_(mean, 1 - self.config.center_momentum)


def _given(means: Centers) -> list[Tensor]:
    return [mean for mean in means if mean is not None]
