"""Functions of DINO and iBOT: losses, masks, network.

Conventions are the official codes': crops stacked crop-major in one batch axis ([V * B, ...]), centres as
rows ([1, K]), logits where training has features and prototypes.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from dense_ssl.backbones import BackboneConfig, ViTBackbone
from dense_ssl.backbones.vit import interpolate_positions
from dense_ssl.methods import ibot_objective
from dense_ssl.methods.masks import PatchRows, masked_patches
from dense_ssl.methods.prototype_head import PrototypeHead


def dino_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: Tensor,
    tau_t: float,
    tau_s: float = 0.1,
) -> Tensor:
    """Return the loss over pairs of different crops; student [V * B, K], teacher [2 * B, K]."""
    batch = len(teacher_logits) // 2
    student, teacher = (x.unflatten(0, (-1, batch)) for x in (student_logits, teacher_logits))
    return ibot_objective.cls_loss(student, teacher, center.flatten(), tau_t, tau_s)


def update_center(center: Tensor, teacher_logits: Tensor, momentum: float = 0.9) -> Tensor:
    """Return momentum * center + (1 - momentum) * the mean of logits [..., K] over all but the last axis."""
    logits = teacher_logits.flatten(0, -2)
    return center.lerp(ibot_objective.mean_logits(logits, _unit_matrix(logits)), 1 - momentum)


def ibot_loss(
    s_cls: Tensor,
    s_patch: Tensor,
    s_local_cls: Tensor | None,
    t_cls: Tensor,
    t_patch: Tensor,
    masks: Sequence[Tensor],
    c: Tensor,
    c2: Tensor,
    tau_t: float,
    tau_p: float,
    lambda1: float = 1.0,
    lambda2: float = 1.0,
    tau_s: float = 0.1,
) -> dict[str, Tensor]:
    """Return {"cls", "patch", "loss"} weighted, and the centres after it, {"center", "center2"}.

    s_cls, t_cls [2 * B, K], s_patch, t_patch [2 * B, T, K_patch], s_local_cls [V_l * B, K], masks two of
    [B, h, w], c [1, K], c2 [1, 1, K_patch].
    """
    student = s_cls if s_local_cls is None else torch.cat([s_cls, s_local_cls])
    cls = lambda1 * dino_loss(student, t_cls, c, tau_t, tau_s)
    patch = lambda2 * patch_loss(s_patch, t_patch, torch.stack(list(masks)), c2, tau_p, tau_s)
    return {
        "cls": cls,
        "patch": patch,
        "loss": cls + patch,
        "center": update_center(c, t_cls),
        "center2": update_center(c2, t_patch),
    }


def patch_loss(
    s_patch: Tensor, t_patch: Tensor, taken: Tensor, c2: Tensor, tau_p: float, tau_s: float
) -> Tensor:
    """Return the mean over crops of that over `taken` patches, [2, B, h, w], of logits [2 * B, T, K]."""
    rows = PatchRows.of(taken.bool().cpu().numpy(), s_patch.device)
    student, teacher = (x.flatten(0, 1)[rows.rows] for x in (s_patch, t_patch))
    same = _unit_matrix(teacher)  # logits are features whose prototypes are the axes
    return ibot_objective.patch_loss(
        student, same, teacher, same, c2.flatten(), rows.weight, tau_p, tau_s
    )


def _unit_matrix(logits: Tensor) -> Tensor:
    return torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)


def interpolate_pos(table: Tensor, h: int, w: int) -> Tensor:
    """Return a position table resampled to a grid (h, w).

    table is a map [g, g] or [g, g, D], or a ViT's parameter [1, 1 + g * g, D], whose first entry stays.
    """
    if table.ndim == 3 and len(table) == 1:
        side = math.isqrt(table.shape[1] - 1)
        cells = interpolate_positions(table[:, 1:], side, (h, w))
        return torch.cat([table[:, :1], cells], dim=1)
    cells = table.reshape(1, len(table) ** 2, -1)
    return interpolate_positions(cells, len(table), (h, w)).reshape(h, w, *table.shape[2:])


def vit_forward(
    params: Mapping[str, Tensor], images: Tensor, mask: Tensor | None, heads: int | None = None
) -> Tensor:
    """Return the normalised tokens [B, 1 + T, D] of images [B, 3, H, W], masked by [B, h, w] bool.

    params has the official names, `masked_embed` [1, D] among them where there is a mask. heads: None
    for one per 64 channels and at least 3, as the published ones.
    """
    dim, _, patch, _ = params["patch_embed.proj.weight"].shape
    trunk = VisionTransformer(
        img_size=patch * math.isqrt(params["pos_embed"].shape[1] - 1),
        patch_size=patch,
        num_classes=0,
        embed_dim=dim,
        depth=len({name.split(".")[1] for name in params if name.startswith("blocks.")}),
        num_heads=heads or max(3, dim // 64),
        mlp_ratio=len(params["blocks.0.mlp.fc1.weight"]) / dim,
        dynamic_img_size=True,
    ).to(images)
    trunk.load_state_dict({k: v for k, v in params.items() if k != "masked_embed"})
    backbone = ViTBackbone(BackboneConfig(positions="dino"), trunk)
    patches = backbone.embed(images)
    if mask is not None:
        patches = masked_patches(patches, mask, params["masked_embed"])
    features = backbone.encode(patches)
    return torch.cat([features.cls, features.dense], dim=1)


def ibot_head(params: Mapping[str, Tensor], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits [B, K] of class tokens and [B, T, K_patch] of patches of tokens [B, 1 + T, D].

    params: mlp.{0,2,4}.{weight,bias}, last_layer.weight_v, and where it is not 1 last_layer.weight_g;
    last_layer2 likewise where patches have prototypes of their own.
    """
    last, last2 = params["last_layer.weight_v"], params.get("last_layer2.weight_v")
    hidden, dim = params["mlp.0.weight"].shape
    head = PrototypeHead(
        dim, len(last), None if last2 is None else len(last2), hidden, last.shape[1]
    ).to(tokens)
    head.load_state_dict(head.state_dict() | dict(params))
    return head(tokens)
