"""Functions of UDI: crops, sampling, attention, losses.

Conventions are the official code's: coordinates (i0, j0, i1, j1), row first, from the centre of an image's
first pixel to that of its last, with j0 > j1 in a mirrored crop; logits where training has features and
prototypes; the student's global crops stacked as [A; B], the teacher's as [B; A], local crops crop-major;
centres as rows of [3, K]. Randomness is Python's and torch's, in the official order of draws.
"""

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dense_ssl.box_sampling import free_box, pulled_box
from dense_ssl.methods import udi_maps, udi_objective
from dense_ssl.methods.udi_attention import PointAttention, sample
from dense_ssl.methods.udi_objective import Centers, Samples, Student, Teacher, Temperatures
from kernels.soft_cross_entropy import soft_cross_entropy

Coord = Sequence[float] | Tensor
Box = tuple[int, int, int, int]  # (i, j, h, w)


def crop_params(
    size_hw: Sequence[int], scale: Sequence[float], ratio: Sequence[float], rng: random.Random
) -> Box:
    """Return a free crop (i, j, h, w) of an image of `size_hw`."""
    return free_box(size_hw, scale, ratio, rng)


def crop_params_ref(
    size_hw: Sequence[int],
    scale: Sequence[float],
    ratio: Sequence[float],
    ref: Coord,
    rng: random.Random,
    published: bool = True,
) -> Box:
    """Return a crop (i, j, h, w) pulled towards the coordinates `ref`.

    published: with the official code's exchanged index; False: as training's `pull` is without it.
    """
    i0, j0, i1, j1 = (float(x) for x in ref)
    top, bottom = sorted(round(i * (size_hw[0] - 1)) for i in (i0, i1))
    left, right = sorted(round(j * (size_hw[1] - 1)) for j in (j0, j1))
    anchor = (left, top, right + 1, bottom + 1)
    return pulled_box(size_hw, scale, ratio, anchor, rng, published)


def crop_coord(i: int, j: int, h: int, w: int, H: int, W: int) -> Tensor:
    """Return the coordinates of a crop of an image of H x W pixels."""
    return torch.tensor([i / (H - 1), j / (W - 1), (i + h - 1) / (H - 1), (j + w - 1) / (W - 1)])


def flip_coord(coord: Tensor) -> Tensor:
    """Return the coordinates of a crop that is mirrored left-right."""
    return coord[..., [0, 3, 2, 1]]


def reference_box(coord_a: Coord, coord_b: Coord) -> Tensor:
    """Return what local crops are pulled to: the `mirrored_hull` of plans, in coordinates."""
    a, b = torch.as_tensor(coord_a), torch.as_tensor(coord_b)
    return torch.cat(
        [torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])], -1
    )


def srs_mask(g: int, w: int) -> Tensor:
    """Return the sampled cells of a g x g grid, bool [g * g], from torch's and Python's global generators."""
    windows = (g // w) ** 2
    picks = torch.randint(w * w, (windows,)).numpy()
    corner = np.array(random.random() if g % w else 0.0)
    mask = torch.zeros(g * g, dtype=torch.bool)
    mask[torch.from_numpy(udi_maps.stratified_cells(picks, corner, g, w))] = True
    return mask


def create_map(src: Coord, tgt: Coord, mask: Tensor, side: int = 14) -> tuple[Tensor, Tensor]:
    """Return (src_map [S, g * g], tgt_map [S, side * side]) of a mask with S cells; rows that count first."""
    (boxes, flipped), (others, other_flipped) = _box(src), _box(tgt)
    grid = round(mask.numel() ** 0.5)
    cells = mask.flatten().nonzero()[:, 0]
    own, other = udi_maps.find_samples(cells, grid, boxes, flipped, others, other_flipped, side)
    order = torch.argsort(own.sum(1), descending=True, stable=True)
    return own[order], other[order]


def _box(coord: Coord) -> tuple[Tensor, Tensor]:
    """Return coordinates as a box (x0, y0, x1, y1) and whether it is mirrored."""
    i0, j0, i1, j1 = torch.as_tensor(coord, dtype=torch.float32).unbind(-1)
    return torch.stack([torch.minimum(j0, j1), i0, torch.maximum(j0, j1), i1], -1), j0 > j1


def srs_module(weights: Mapping[str, Tensor], heads: int = 6) -> PointAttention:
    """Return the attention module with the official tensors; norms that are not given stay as they start."""
    module = PointAttention(len(weights["proj.bias"]), heads)
    module.load_state_dict(module.state_dict() | dict(weights))
    return module


def srs(x: Tensor, maps: Tensor, module: PointAttention) -> tuple[Tensor, Tensor]:
    """Return features [m, B, s, D] of normalised tokens x [B, N, D] at maps [m, B, s, N], and attention.

    Attention [m, B, heads, s, N] is 0 in rows of nothing. Training does without it.
    """
    together = maps.transpose(0, 1).flatten(1, 2)  # [B, m * s, N]
    features = module(x, together)
    q, k, _ = module.heads_of(x, sample(x, together), together)
    weights = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(3)
    weights = weights * (together.sum(2) > 0)[:, None, :, None]
    shape = maps.shape[0], maps.shape[2]
    return (
        features.unflatten(1, shape).transpose(0, 1),
        weights.unflatten(2, shape).permute(2, 0, 1, 3, 4),
    )


def udi_target(cls: Tensor, patch: Tensor, weight: Tensor, alpha: float = 0.5) -> Tensor:
    """Return the blended logits [..., K] of cls [..., K] and patch [..., S, K] by weight [..., S]."""
    return udi_objective.blend(cls, Samples(patch, weight), alpha)


def masked_ce(s: Tensor, t: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over mask [...] of cross-entropies: s log-probabilities, t probabilities [..., K]."""
    own, target = (x.reshape(-1, x.shape[-1]) for x in (s, t.log()))
    weight = mask.flatten() / mask.sum().clamp(min=1)
    return soft_cross_entropy(own, target, None, 1.0, 1.0, weight).sum()


class StudentLogits(NamedTuple):
    """What the official student gives; local ones are None without local crops."""

    cls: Tensor  # [2 * B, 1, K]
    plus: Tensor | None  # [2 * B, 1, K]; None with one class token
    patch: Tensor | None  # [1, 2 * B, S, K]; None without patches
    mask: Tensor | None  # [1, 2 * B, S, 1]
    local_cls: Tensor | None  # [L * B, 1, K]
    local_plus: Tensor | None  # [L * B, 1, K]


class TeacherLogits(NamedTuple):
    """What the official teacher gives."""

    cls: Tensor  # [2 * B, 1, K]
    patch: Tensor | None  # [1, 2 * B, S, K]
    weight: Tensor | None  # [1, 2 * B, S, 1]
    local: Tensor | None  # [L, 2 * B, R, K]
    local_weight: Tensor | None  # [L, 2 * B, R, 1]


def udi_loss(
    student: StudentLogits,
    teacher: TeacherLogits,
    center: Tensor,
    tau_t: float,
    alpha: float = 0.5,
    tau_s: float = 0.1,
) -> tuple[Tensor, list[list[Tensor]]]:
    """Return (total, [[G_cls, G_cls+, G_patch], [L_cls, L_cls+]]), those that are; center is [3, K]."""
    own, target = _student(student), _teacher(teacher)
    centers = Centers(*center)
    levels, _ = udi_objective.udi_losses(own, target, centers, Temperatures(tau_s, tau_t), alpha)
    tokens = [levels.cls, *([] if levels.plus is None else [levels.plus])]
    patch = [] if levels.patch is None else [levels.patch]
    of_local = [losses["local"] for losses in tokens if "local" in losses]
    return levels.total(), [[*(losses["global"] for losses in tokens), *patch], of_local]


def update_centre(
    center: Tensor, teacher: TeacherLogits, alpha: float = 0.5, momentum: float = 0.9
) -> Tensor:
    """Return the centres [3, K] after a step of one process."""
    target = _teacher(teacher)
    means = udi_objective.mean_centers(target, udi_objective.blends_of(target, alpha))
    return center.lerp(torch.stack([m for m in means if m is not None]), 1 - momentum)


def _student(logits: StudentLogits) -> Student:
    batch = len(logits.cls) // 2
    cls, plus = (
        None if tokens is None else torch.cat([t for t in (tokens, local) if t is not None])
        for tokens, local in ((logits.cls, logits.local_cls), (logits.plus, logits.local_plus))
    )
    assert cls is not None
    samples = None
    if logits.patch is not None and logits.mask is not None:
        features, weight = logits.patch[0], logits.mask[0, :, :, 0]
        samples = Samples(features.unflatten(0, (2, -1)), weight.unflatten(0, (2, -1)))
    by_crop = (-1, batch)
    own = None if plus is None else plus[:, 0].unflatten(0, by_crop)
    return Student(_unit_matrix(cls), cls[:, 0].unflatten(0, by_crop), own, samples)


def _teacher(logits: TeacherLogits) -> Teacher:
    def by_crop(rows: Tensor) -> Tensor:
        """[B; A] rows of the axis before the last two, first of all axes and A first."""
        return rows.unflatten(1, (2, -1)).flip(1).transpose(0, 1).transpose(1, 2)  # [2, B, m, ...]

    samples = local = None
    if logits.patch is not None and logits.weight is not None:
        samples = Samples(by_crop(logits.patch)[:, :, 0], by_crop(logits.weight)[:, :, 0, :, 0])
    if logits.local is not None and logits.local_weight is not None:
        local = Samples(by_crop(logits.local), by_crop(logits.local_weight)[..., 0])
    cls = logits.cls[:, 0].unflatten(0, (2, -1)).flip(0)
    return Teacher(_unit_matrix(cls), cls, samples, local)


def _unit_matrix(logits: Tensor) -> Tensor:
    return torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)
