"""SERE as published: relations of whole crops, then sampled on one axis after the other, pair by pair."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dense_ssl.crops import MultiCropBatch
from dense_ssl.methods.sere import total_loss
from dense_ssl.methods.sere_relations import Grids
from dense_ssl.published.distillation import (
    cross_entropy,
    distillation_losses,
    ibot_total,
    tokens_of,
)
from dense_ssl.schedule import Step


def spatial_relation(y: Tensor, heads: int) -> Tensor:
    """Return relations of positions [B, M, N, N] of features [B, N, C], per head."""
    parts = y.transpose(1, 2).unflatten(1, (heads, -1))
    return torch.einsum("bmci,bmcj->bmij", parts, parts) / math.sqrt(parts.shape[2])


def channel_relation(y: Tensor) -> Tensor:
    """Return relations of channels [B, C, C] of features [B, N, C]."""
    return torch.einsum("bnc,bnd->bcd", y, y) / y.shape[1]


def aligned(relation: Tensor, grid_q: Tensor, grid_k: Tensor) -> Tensor:
    """Return relations [B, M, N, N] sampled at keys [B, R, R, 2], then at queries [B, S, S, 2].

    Each query's relations are an image to sample keys in, then each key's one to sample queries in.
    """
    b, m, n, _ = relation.shape
    s, q, k = math.isqrt(n), grid_q.shape[1] ** 2, grid_k.shape[1] ** 2
    x = F.grid_sample(relation.reshape(b, m * n, s, s), grid_k, align_corners=False)
    x = x.reshape(b, m, n, k).transpose(2, 3).reshape(b, m * k, s, s)
    x = F.grid_sample(x, grid_q, align_corners=False)
    return x.reshape(b, m, k, q).transpose(2, 3)


def relation_term(teacher: Tensor, student: Tensor, T: float) -> Tensor:
    """Return the mean cross-entropy of rows."""
    return cross_entropy((teacher / T).softmax(-1), student).mean()


def spatial_loss(
    student: Tensor, teacher: Tensor, local: Tensor | None, grids: Grids, heads: int, T: float
) -> Tensor:
    """Return the mean over pairs of crops; features are [V * B, N, C], crop-major."""

    def at_overlap(y: Tensor, g: int) -> Tensor:
        return aligned(spatial_relation(y.chunk(2)[g], heads), grids.queries[g], grids.keys[g])

    terms = [relation_term(at_overlap(teacher, g), at_overlap(student, 1 - g), T) for g in range(2)]
    if local is not None:
        assert grids.local is not None
        assert grids.of_local is not None
        crops = len(grids.local)
        for g in range(2):
            target = spatial_relation(teacher.chunk(2)[g], heads)
            for i, y in enumerate(local.chunk(crops)):
                here, there = grids.local[i, :, g], grids.of_local[g, :, i]
                own = aligned(spatial_relation(y, heads), here, here)
                terms.append(relation_term(aligned(target, there, there), own, T))
    return torch.stack(terms).mean()


def channel_loss(
    student: Tensor, teacher: Tensor, local: Tensor | None, crops: int, T: float
) -> Tensor:
    """Return the mean over pairs of crops; features are [V * B, N, C], crop-major."""
    (s1, s2), targets = channel_relation(student).chunk(2), channel_relation(teacher).chunk(2)
    terms = [relation_term(targets[0], s2, T), relation_term(targets[1], s1, T)]
    if local is not None:
        for target in targets:
            terms += [relation_term(target, y, T) for y in channel_relation(local).chunk(crops)]
    return torch.stack(terms).mean()


def sere_losses(method: Any, batch: MultiCropBatch, step: Step) -> dict[str, Tensor]:
    """Return {"cls", "patch", "spatial", "channel"}, the centres after the step, and the total."""
    cfg, crops, local = method.config, batch.views["global"], batch.views.get("local")
    tokens = tokens_of(method, batch, step)
    losses = distillation_losses(method, tokens, crops.images.shape[1], step)
    grids = Grids.of(crops, local, cfg.overlap_size, cfg.local_overlap_size)

    def features(name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        student, of_local = method.student, tokens.local
        with torch.no_grad():  # the published teacher runs its predictor, too, for nothing
            target = method.teacher[name].project(tokens.teacher[0][:, 1:])
            method.teacher[name].predictor(target.flatten(0, 1))
        own = student[name](tokens.student[0][:, 1:])
        there = None if of_local is None else student[f"{name}_local"](of_local[0][:, 1:])
        return own, target, there

    losses["spatial"] = spatial_loss(
        *features("pixel_sere"), grids, method.heads, cfg.spatial_temperature
    )
    count = 0 if local is None else len(local.images)
    losses["channel"] = channel_loss(*features("channel_sere"), count, cfg.channel_temperature)
    losses["loss"] = total_loss(
        ibot_total(method, losses), losses["spatial"], losses["channel"],
        cfg.spatial_weight, cfg.channel_weight,
    )  # fmt: skip
    return losses
