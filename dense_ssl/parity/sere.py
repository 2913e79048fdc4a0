"""Functions of SERE: heads, relations, grids, losses.

Conventions are the official code's: features as [B, C, N], crops as rectangles [x, y, w, h, flip] in pixels
of the source, batches stacked view-major or crop-major, lists of grids indexed g * L + l for global crop g
and local crop l. Relations are whole matrices here; training has them of channels only.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dense_ssl.methods import sere, sere_relations
from dense_ssl.methods.method import ParamGroup
from dense_ssl.methods.sere_relations import RelationHead, sampling_matrix
from kernels.soft_cross_entropy import soft_cross_entropy

Rectangle = Sequence[float] | Tensor


def overlap_grid(rect_a: Rectangle, rect_b: Rectangle, size: int) -> tuple[Tensor, Tensor]:
    """Return the points of what both rectangles share, in each, [..., size, size, 2] as (x, y)."""
    boxes, flips = zip(*(_box(rect) for rect in (rect_a, rect_b)), strict=True)
    return sere_relations.overlap_grids(boxes[0], flips[0], boxes[1], flips[1], size)


def _box(rect: Rectangle) -> tuple[Tensor, Tensor]:
    values = torch.as_tensor(rect, dtype=torch.float32)
    low = values[..., :2]
    return torch.cat([low, low + values[..., 2:4]], dim=-1), values[..., 4] == 1


def relation_head(weights: Mapping[str, Tensor]) -> RelationHead:
    """Return a head in training mode with the official tensors: predictor.0.weight, and what is given."""
    given = {k: v.flatten(1) if v.ndim == 4 else v for k, v in weights.items()}
    convolution = given["predictor.0.weight"]
    head = RelationHead(len(convolution)).to(convolution)
    head.load_state_dict(head.state_dict() | given)
    return head


def relation_features(x: Tensor, head: RelationHead, predictor: bool) -> Tensor:
    """Return z, or with the predictor p, [B, C, N] of tokens x [B, N, C]; moves running statistics."""
    return (head(x) if predictor else head.project(x)).transpose(1, 2)


def spatial_self_relation(y: Tensor, heads: int) -> Tensor:
    """Return the relations of positions [B, M, N, N] of features y [B, C, N], one per head."""
    parts = y.unflatten(1, (heads, -1))
    return parts.transpose(2, 3) @ parts * parts.shape[2] ** -0.5


def channel_self_relation(y: Tensor, size: int | None = None) -> Tensor:
    """Return the relations of channels [B, C, C] of features y [B, C, N], divided by size squared.

    size: None for the side of N's square, which is what training takes.
    """
    relation = sere_relations.channel_relation(y.transpose(1, 2))
    return relation if size is None else relation * (y.shape[2] / size**2)


def spatial_head_forward(x: Tensor, head: RelationHead, heads: int) -> tuple[Tensor, Tensor]:
    """Return the relations of positions of z and of p, [B, M, N, N], of tokens x [B, N, C]."""
    z, p = _both(x, head)
    return spatial_self_relation(z, heads), spatial_self_relation(p, heads)


def channel_head_forward(x: Tensor, head: RelationHead, size: int = 14) -> tuple[Tensor, Tensor]:
    """Return the relations of channels of z and of p, [B, C, C], of tokens x [B, N, C]."""
    z, p = _both(x, head)
    return channel_self_relation(z, size), channel_self_relation(p, size)


def _both(x: Tensor, head: RelationHead) -> tuple[Tensor, Tensor]:
    z = head.project(x)
    p = head.predictor(z.flatten(0, 1)).view(z.shape)
    return z.transpose(1, 2), p.transpose(1, 2)


def align_relation(R: Tensor, grid_q: Tensor, grid_k: Tensor) -> Tensor:
    """Return R [B, M, N, N] sampled at grid_q on its first axis and grid_k on its second."""
    side = math.isqrt(R.shape[2])
    queries, keys = (
        sampling_matrix(grid, (side, side))[:, None].to(R) for grid in (grid_q, grid_k)
    )
    return queries @ R @ keys.transpose(2, 3)


def align_overlap(feat: Tensor, rect_a: Rectangle, rect_b: Rectangle, size: int) -> Tensor:
    """Return feat [B, C, s, s] of crops a where they overlap crops b, [B, C, size * size]."""
    grid, _ = overlap_grid(rect_a, rect_b, size)
    matrix = sampling_matrix(grid, (feat.shape[2], feat.shape[3])).expand(len(feat), -1, -1)
    return sere_relations.sample(feat.flatten(2).transpose(1, 2), matrix).transpose(1, 2)


def relation_loss(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """Return the mean over rows of the cross-entropy of relations [..., K], the teacher's over tau."""
    own, target = (x.reshape(-1, x.shape[-1]) for x in (student, teacher))
    return soft_cross_entropy(own, target, None, 1.0, tau).mean()


def sere_spatial_loss(
    stu: Tensor,
    tea: Tensor,
    stu_local: Tensor | None = None,
    tea_full: Tensor | None = None,
    grid_local: Sequence[Tensor] = (),
    grid_global: Sequence[Tensor] = (),
    tau: float = 0.5,
) -> Tensor:
    """Return the spatial loss of relations: stu, tea [2 * B, M, P, P] aligned, the others not.

    stu_local [L * B, M, n, n], tea_full [2 * B, M, N, N]; each grid [B, S, S, 2]. Training has
    `sere_relations.spatial_loss`, of features, instead.
    """
    (t1, t2), (s1, s2) = tea.chunk(2), stu.chunk(2)
    terms = [relation_loss(s2, t1, tau), relation_loss(s1, t2, tau)]
    if stu_local is not None and tea_full is not None:
        locals_ = stu_local.split(len(t1))
        for g, teacher in enumerate(tea_full.chunk(2)):
            for at, student in enumerate(locals_, start=g * len(locals_)):
                target = align_relation(teacher, grid_global[at], grid_global[at])
                own = align_relation(student, grid_local[at], grid_local[at])
                terms.append(relation_loss(own, target, tau))
    return torch.stack(terms).mean()


def sere_channel_loss(
    stu: Tensor, tea: Tensor, stu_local: Tensor | None = None, tau: float = 0.1
) -> Tensor:
    """Return the channel loss of relations: stu, tea [2 * B, C, C], stu_local [L * B, C, C]."""
    return sere_relations.channel_relations_loss(stu, tea, stu_local, tau)


def sere_total(ibot: Tensor, lp: Tensor, lc: Tensor, alpha: float, beta: float) -> Tensor:
    """Return (4 - alpha - beta) / 2 ibot + alpha lp + beta lc."""
    return sere.total_loss(ibot, lp, lc, alpha, beta)


def sere_param_groups(named_params: Iterable[tuple[str, nn.Parameter]]) -> list[ParamGroup]:
    """Return the parameters that decay, biases among them, and those that do not."""
    return sere.bias_decaying_groups(named_params)
