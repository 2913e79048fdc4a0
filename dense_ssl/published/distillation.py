"""DINO and iBOT as published: every patch through the head, a loss for every pair of crops."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dense_ssl.backbones.features import grid_of
from dense_ssl.crops import MultiCropBatch
from dense_ssl.methods.masks import draw_masks
from dense_ssl.schedule import Step


def vit(
    trunk: Any, images: Tensor, mask: Tensor | None, token: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return tokens [B, 1 + N, D] before and after the final norm; masked patches are `token`."""
    maps = trunk.patch_embed.proj(images)  # [B, D, h, w]
    if mask is not None and token is not None:
        maps.permute(0, 2, 3, 1)[mask] = token.to(maps.dtype)
    height, width = maps.shape[-2:]
    table = trunk.pos_embed[:, 1:]
    side = int(table.shape[1] ** 0.5)
    if (height, width) != (side, side):
        square = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        factor = ((height + 0.1) / side, (width + 0.1) / side)
        square = F.interpolate(square, scale_factor=factor, mode="bicubic")
        table = square.permute(0, 2, 3, 1).reshape(1, -1, trunk.embed_dim)
    x = torch.cat([trunk.cls_token.expand(len(images), -1, -1), maps.flatten(2).transpose(1, 2)], 1)
    x = trunk.blocks(x + torch.cat([trunk.pos_embed[:, :1], table], 1))
    return x, trunk.norm(x)


def head_logits(head: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits of class tokens [B, K] and of all patches [B, N, K]."""
    x = F.normalize(head.mlp(tokens), dim=-1, p=2)

    def logits(layer: Any, x: Tensor) -> Tensor:
        norm = layer.weight_v.norm(dim=1, keepdim=True)
        return F.linear(x, layer.weight_v * (layer.weight_g / norm))

    return logits(head.last_layer, x[:, 0]), logits(head.last_layer2 or head.last_layer, x[:, 1:])


def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    """Return -sum target log softmax(logits) over the last axis."""
    return torch.sum(-target * F.log_softmax(logits, -1), -1)


class Tokens(NamedTuple):
    """What both networks said, as `ibot_losses` needs it and methods built on it."""

    teacher: tuple[Tensor, Tensor]  # of the global crops, before and after the norm
    student: tuple[Tensor, Tensor]
    local: tuple[Tensor, Tensor] | None  # of the student's local crops
    mask: Tensor | None  # bool [G * B, h, w]


def tokens_of(method: Any, batch: MultiCropBatch, step: Step) -> Tokens:
    """Return the tokens of all views, only the student's global crops masked."""
    images = batch.views["global"].images
    mask = token = None
    if method.masking is not None:
        grid = grid_of(images, method.student["backbone"].stride)
        drawn = draw_masks(method.config.mask, step, batch.index, len(images), grid)
        mask = torch.from_numpy(drawn).flatten(0, 1).to(images.device)
        token = method.masking.token
    flat, trunk = images.flatten(0, 1), method.student["backbone"].trunk
    with torch.no_grad():
        teacher = vit(method.teacher["backbone"].trunk, flat, None, None)
    student = vit(trunk, flat, mask, token)
    local = batch.views.get("local")
    of_local = None if local is None else vit(trunk, local.images.flatten(0, 1), None, None)
    return Tokens(teacher, student, of_local, mask)


def distillation_losses(
    method: Any, tokens: Tokens, batch_size: int, step: Step
) -> dict[str, Tensor]:
    """Return {"cls", "patch"}, without "patch" where nothing is masked, and the new centres."""
    cfg, objective, head = method.config, method.objective, method.student["head"]
    with torch.no_grad():
        t_cls, t_patch = head_logits(method.teacher["head"], tokens.teacher[1])
    s_cls, s_patch = head_logits(head, tokens.student[1])
    if tokens.local is not None:
        s_cls = torch.cat([s_cls, head_logits(head, tokens.local[1])[0]])
    students = [x / cfg.student_temperature for x in s_cls.split(batch_size)]
    tau = cfg.teacher_temperature.at(step)
    targets = [F.softmax((x - objective.center) / tau, -1) for x in t_cls.split(batch_size)]
    pairs = [
        cross_entropy(target, logits).mean()
        for q, target in enumerate(targets)
        for v, logits in enumerate(students)
        if v != q
    ]
    losses = {"cls": sum(pairs, torch.zeros_like(pairs[0])) / len(pairs)}
    losses["center"] = 0.9 * objective.center + 0.1 * t_cls.mean(0)
    if tokens.mask is None:
        return losses
    tau = cfg.patch_temperature.at(step)
    total = torch.zeros_like(losses["cls"])
    masks = tokens.mask.flatten(1).float().split(batch_size)
    for s, t, m in zip(s_patch.split(batch_size), t_patch.split(batch_size), masks, strict=True):
        target = F.softmax((t - objective.patch_center) / tau, -1)
        loss = cross_entropy(target, s / cfg.student_temperature)
        total = total + ((loss * m).sum(-1) / m.sum(-1).clamp(min=1)).mean()
    losses["patch"] = total / len(masks)
    losses["patch_center"] = 0.9 * objective.patch_center + 0.1 * t_patch.mean((0, 1))
    return losses


def ibot_total(method: Any, losses: dict[str, Tensor]) -> Tensor:
    """Return lambda1 cls + lambda2 patch."""
    total = method.config.cls_weight * losses["cls"]
    if "patch" in losses:
        total = total + method.config.patch_weight * losses["patch"]
    return total


def ibot_losses(method: Any, batch: MultiCropBatch, step: Step) -> dict[str, Tensor]:
    """Return iBOT's losses, or DINO's, the centres as they are after the step, and the total."""
    batch_size = batch.views["global"].images.shape[1]
    losses = distillation_losses(method, tokens_of(method, batch, step), batch_size, step)
    return {**losses, "loss": ibot_total(method, losses)}
