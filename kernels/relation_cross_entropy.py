"""Spatial self-relation of a student against its teacher's (SERE, arXiv:2206.05184, eq. 2-5).

Within each head of each image, every query position has a distribution over the key positions:

    r = softmax_j(scale zq_i . zk_j)        loss_i = -sum_j r^teacher_ij log r^student_ij

zq [B, H, P, D] queries, zk [B, H, R, D] keys, of teacher and of student. Where the published code samples
relation matrices bilinearly on both axes to bring two crops to one grid, the features are sampled instead,
before the call: S1 (Z Z^T) S2^T = (S1 Z)(S2 Z)^T. Gradients go to the student's queries and keys:

    dloss_i / dzq_i = scale (sum_j r^s_ij zk_j - sum_j r^t_ij zk_j)      (from the forward pass, as attention)
    dloss / dzk_j = scale sum_i g_i (r^s_ij - r^t_ij) zq_i

Moved: the four feature tensors, once forward and once backward, and their gradients; no [P, R] matrix.
Numbers: float32 sums, probabilities rounded to the inputs' dtype for products; no atomics.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import launch
from kernels.language import (
    LOG2_E,
    TO_BASE_E,
    ceil_div,
    dot,
    jit,
    load_rows,
    power_of_two,
    rounded,
    tl,
)
from kernels.row_softmax import exp_, log_softmax_
from kernels.spec import KernelSpec

LARGEST_D = 256  # of Triton's tiles
WANTED = "queries [B, H, P, D] and keys [B, H, R, D] of teacher and of student"


def relation_cross_entropy(
    teacher_queries: Tensor,
    teacher_keys: Tensor,
    student_queries: Tensor,
    student_keys: Tensor,
    teacher_scale: float,
    student_scale: float,
) -> Tensor:
    """Return the loss of every query position, float32 [B, H, P].

    Queries are [B, H, P, D], keys [B, H, R, D]; teacher and student may have different D. Gradients
    flow to the student's two tensors only.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    given = (teacher_queries, teacher_keys, student_queries, student_keys)
    fits = all(x.ndim == 4 for x in given)
    fits = fits and all(x.shape[:2] == student_queries.shape[:2] for x in given)
    fits = fits and teacher_queries.shape[2] == student_queries.shape[2]
    fits = fits and teacher_keys.shape[2] == student_keys.shape[2] > 0
    fits = fits and teacher_queries.shape[3] == teacher_keys.shape[3] > 0
    fits = fits and student_queries.shape[3] == student_keys.shape[3] > 0
    launch.check("relation_cross_entropy", WANTED, fits, *given)
    widest = max(teacher_queries.shape[3], student_queries.shape[3])
    if launch.on_triton(student_queries) and widest > LARGEST_D:
        raise ValueError(
            f"relation_cross_entropy: D <= {LARGEST_D} expected, got {widest} "
            "(run.kernels=torch takes any)"
        )
    with launch.no_autocast(student_queries):
        teacher = teacher_queries.detach(), teacher_keys.detach()
        scales = teacher_scale, student_scale
        loss, _, _ = _forward(*teacher, student_queries, student_keys, *scales)
    return loss


def reference(
    teacher_queries: Tensor,
    teacher_keys: Tensor,
    student_queries: Tensor,
    student_keys: Tensor,
    teacher_scale: float,
    student_scale: float,
) -> Tensor:
    """Return loss [B, H, P] with both relation matrices in memory."""
    teacher = teacher_queries @ teacher_keys.transpose(2, 3) * teacher_scale
    student = student_queries @ student_keys.transpose(2, 3) * student_scale
    return -(teacher.softmax(3) * student.log_softmax(3)).sum(3)


def eager(
    teacher_queries: Tensor,
    teacher_keys: Tensor,
    student_queries: Tensor,
    student_keys: Tensor,
    teacher_scale: float,
    student_scale: float,
) -> Tensor:
    """Return loss [B, H, P] in float32, as autocast runs the published softmaxes."""
    wide = torch.promote_types(student_queries.dtype, torch.float32)
    teacher = torch.matmul(teacher_queries, teacher_keys.transpose(-2, -1)).to(wide) * teacher_scale
    student = torch.matmul(student_queries, student_keys.transpose(-2, -1)).to(wide) * student_scale
    target = F.softmax(teacher, dim=-1).detach()
    return torch.sum(-target * F.log_softmax(student, dim=-1), dim=-1)


# The operators: loss [B, H, P], statistics [4, B, H, P] (largest logit and log of the sum relative to it, of
# teacher and student) and the unweighted gradient to the student's queries; then the gradient to its keys


def _precise(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake(tq: Tensor, tk: Tensor, sq: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss = sq.new_empty(sq.shape[:3], dtype=_precise(sq))
    return loss, loss.new_empty((4, *loss.shape)), sq.new_empty(sq.shape)


@launch.operator("relation_cross_entropy", _fake)
def _forward(
    tq: Tensor, tk: Tensor, sq: Tensor, sk: Tensor, teacher_scale: float, student_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if sq.numel() and launch.on_triton(sq):
        return _launch_forward(tq, tk, sq, sk, teacher_scale, student_scale)
    t, t_top, t_log = _log_softmax(tq, tk, teacher_scale)
    s, s_top, s_log = _log_softmax(sq, sk, student_scale)
    target = exp_(t)
    loss = -(target * s).sum(3)
    gradient = (exp_(s).sub_(target) @ sk.to(s.dtype)).mul_(student_scale)
    return loss, torch.stack([t_top, t_log, s_top, s_log]), gradient.to(sq.dtype)


@launch.operator("relation_cross_entropy_keys", lambda tq, tk, sq, sk, *_: sk.new_empty(sk.shape))
def _to_keys(
    tq: Tensor,
    tk: Tensor,
    sq: Tensor,
    sk: Tensor,
    statistics: Tensor,
    grad: Tensor,
    teacher_scale: float,
    student_scale: float,
) -> Tensor:
    """Return the gradient to the student's keys [B, H, R, D]."""
    if sq.numel() and launch.on_triton(sq):
        return _launch_keys(tq, tk, sq, sk, statistics, grad, teacher_scale, student_scale)
    t, _, _ = _log_softmax(tq, tk, teacher_scale)
    s, _, _ = _log_softmax(sq, sk, student_scale)
    difference = exp_(s).sub_(exp_(t)).mul_(grad[..., None])
    return (difference.transpose(2, 3) @ sq.to(s.dtype)).mul_(student_scale).to(sk.dtype)


def _log_softmax(queries: Tensor, keys: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return log relations [B, H, P, R], and their largest logits and logs of sums [B, H, P]."""
    precise = _precise(queries)
    return log_softmax_((queries.to(precise) @ keys.to(precise).transpose(2, 3)).mul_(scale))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, teacher_scale, student_scale = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.scales = teacher_scale, student_scale


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, statistics, gradient = ctx.saved_tensors
    queries = keys = None
    if ctx.needs_input_grad[2]:
        queries = (grad[..., None] * gradient).to(gradient.dtype)
    if ctx.needs_input_grad[3]:
        keys = _to_keys(*tensors, statistics, grad, *ctx.scales)
    return None, None, queries, keys, None, None


_forward.register_autograd(_backward, setup_context=_save)


# Triton


class _Launch:
    """What both launches share: aligned features, numbers and tile sizes."""

    def __init__(
        self, features: tuple[Tensor, ...], teacher_scale: float, student_scale: float
    ) -> None:
        self.features = [x if x.stride(3) == 1 else x.contiguous() for x in features]
        teacher, _, student, keys = self.features
        self.shape = b, h, p, d = student.shape
        self.keys = keys.shape[2]
        strides = [stride for x in self.features for stride in x.stride()[:3]]
        scales = (teacher_scale * LOG2_E, student_scale * LOG2_E, student_scale)
        self.numbers = (b * h, h, p, self.keys, teacher.shape[3], d, *strides, *scales)
        widest = max(d, teacher.shape[3])
        narrow = widest <= 64
        if student.dtype == torch.float32:
            self.tile = (32, 16) if narrow else (16, 16)
        else:
            self.tile = (64, 32) if narrow else (32, 32)
        self.options = {
            "TEACHER_D": power_of_two(teacher.shape[3], 16),
            "STUDENT_D": power_of_two(d, 16),
            "PRECISION": launch.float32_precision(),
            "num_warps": 4 if widest <= 128 else 8,
            "num_stages": 2,
        }


def _launch_forward(
    tq: Tensor, tk: Tensor, sq: Tensor, sk: Tensor, teacher_scale: float, student_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    it = _Launch((tq, tk, sq, sk), teacher_scale, student_scale)
    b, h, p, d = it.shape
    loss = launch.empty(b, h, p, dtype=torch.float32, like=sq)
    statistics = launch.empty(4, b, h, p, dtype=torch.float32, like=sq)
    gradient = launch.empty(b, h, p, d, dtype=sq.dtype, like=sq)
    block_p, block_r = it.tile
    with launch.on_device_of(sq):
        _relate[b * h, ceil_div(p, block_p)](
            *(*it.features, loss, statistics, gradient, *it.numbers),
            BLOCK_P=block_p,
            BLOCK_R=block_r,
            **it.options,
        )
    return loss, statistics, gradient


def _launch_keys(
    tq: Tensor,
    tk: Tensor,
    sq: Tensor,
    sk: Tensor,
    statistics: Tensor,
    grad: Tensor,
    teacher_scale: float,
    student_scale: float,
) -> Tensor:
    it = _Launch((tq, tk, sq, sk), teacher_scale, student_scale)
    b, h, _, d = it.shape
    out = launch.empty(b, h, it.keys, d, dtype=sk.dtype, like=sk)
    block_r, block_p = it.tile
    with launch.on_device_of(sq):
        _relate_back[b * h, ceil_div(it.keys, block_r)](
            *(*it.features, statistics, grad.contiguous(), out, *it.numbers),
            BLOCK_P=block_p,
            BLOCK_R=block_r,
            **it.options,
        )
    return out


@jit
def _relate(
    TQ, TK, SQ, SK, LOSS, STATISTICS, GRADIENT, pairs, heads, p, r, td, sd,
    tq_b, tq_h, tq_p, tk_b, tk_h, tk_r, sq_b, sq_h, sq_p, sk_b, sk_h, sk_r,
    t_scale, s_scale, scale,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, TEACHER_D: tl.constexpr, STUDENT_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Leave loss, statistics and the queries' gradient of BLOCK_P queries of one head."""
    pair = tl.program_id(0).to(tl.int64)
    image, head = pair // heads, pair % heads
    tq_head, tk_head = TQ + image * tq_b + head * tq_h, TK + image * tk_b + head * tk_h
    sq_head, sk_head = SQ + image * sq_b + head * sq_h, SK + image * sk_b + head * sk_h
    first = tl.program_id(1) * BLOCK_P
    tq = load_rows(tq_head, first, p, tq_p, td, BLOCK_P, TEACHER_D)
    sq = load_rows(sq_head, first, p, sq_p, sd, BLOCK_P, STUDENT_D)
    t_top = tl.full([BLOCK_P], float("-inf"), tl.float32)
    s_top = tl.full([BLOCK_P], float("-inf"), tl.float32)
    t_sum = tl.zeros([BLOCK_P], tl.float32)
    s_sum = tl.zeros([BLOCK_P], tl.float32)
    both = tl.zeros([BLOCK_P], tl.float32)  # sum of teacher shares times student logits
    of_teacher = tl.zeros([BLOCK_P, STUDENT_D], tl.float32)  # student keys mixed by teacher
    of_student = tl.zeros([BLOCK_P, STUDENT_D], tl.float32)  # and by student
    for start in range(0, r, BLOCK_R):
        there = (start + tl.arange(0, BLOCK_R) < r)[None, :]
        tk = load_rows(tk_head, start, r, tk_r, td, BLOCK_R, TEACHER_D)
        sk = load_rows(sk_head, start, r, sk_r, sd, BLOCK_R, STUDENT_D)
        t = tl.where(there, dot(tq, tl.trans(tk), PRECISION) * t_scale, float("-inf"))
        s = tl.where(there, dot(sq, tl.trans(sk), PRECISION) * s_scale, float("-inf"))
        new_t, new_s = tl.maximum(t_top, tl.max(t, 1)), tl.maximum(s_top, tl.max(s, 1))
        t_share, s_share = tl.exp2(t - new_t[:, None]), tl.exp2(s - new_s[:, None])
        t_shrink, s_shrink = tl.exp2(t_top - new_t), tl.exp2(s_top - new_s)
        t_sum = t_sum * t_shrink + tl.sum(t_share, 1)
        s_sum = s_sum * s_shrink + tl.sum(s_share, 1)
        both = both * t_shrink + tl.sum(t_share * tl.where(there, s, 0.0), 1)
        dtype = SK.dtype.element_ty
        of_teacher = of_teacher * t_shrink[:, None] + dot(rounded(t_share, dtype), sk, PRECISION)
        of_student = of_student * s_shrink[:, None] + dot(rounded(s_share, dtype), sk, PRECISION)
        t_top, s_top = new_t, new_s
    rows = first + tl.arange(0, BLOCK_P)
    row_there = rows < p
    at = pair * p + rows
    s_log = tl.log2(s_sum)
    loss = (s_log + s_top - both / t_sum) * TO_BASE_E
    tl.store(LOSS + at, loss, mask=row_there)
    size = pairs.to(tl.int64) * p
    tl.store(STATISTICS + at, t_top, mask=row_there)
    tl.store(STATISTICS + size + at, tl.log2(t_sum), mask=row_there)
    tl.store(STATISTICS + 2 * size + at, s_top, mask=row_there)
    tl.store(STATISTICS + 3 * size + at, s_log, mask=row_there)
    gradient = (of_student / s_sum[:, None] - of_teacher / t_sum[:, None]) * scale
    columns = tl.arange(0, STUDENT_D)
    tl.store(
        GRADIENT + at[:, None] * sd + columns[None, :],
        rounded(gradient, GRADIENT.dtype.element_ty),
        mask=row_there[:, None] & (columns < sd)[None, :],
    )


@jit
def _relate_back(
    TQ, TK, SQ, SK, STATISTICS, GRAD, OUT, pairs, heads, p, r, td, sd,
    tq_b, tq_h, tq_p, tk_b, tk_h, tk_r, sq_b, sq_h, sq_p, sk_b, sk_h, sk_r,
    t_scale, s_scale, scale,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, TEACHER_D: tl.constexpr, STUDENT_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Leave the gradient of BLOCK_R keys of one head, from all its queries in their order."""
    pair = tl.program_id(0).to(tl.int64)
    image, head = pair // heads, pair % heads
    tq_head, tk_head = TQ + image * tq_b + head * tq_h, TK + image * tk_b + head * tk_h
    sq_head, sk_head = SQ + image * sq_b + head * sq_h, SK + image * sk_b + head * sk_h
    first = tl.program_id(1) * BLOCK_R
    tk = load_rows(tk_head, first, r, tk_r, td, BLOCK_R, TEACHER_D)
    sk = load_rows(sk_head, first, r, sk_r, sd, BLOCK_R, STUDENT_D)
    total = tl.zeros([BLOCK_R, STUDENT_D], tl.float32)
    size = pairs.to(tl.int64) * p
    for start in range(0, p, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        there = rows < p
        at = pair * p + rows
        tq = load_rows(tq_head, start, p, tq_p, td, BLOCK_P, TEACHER_D)
        sq = load_rows(sq_head, start, p, sq_p, sd, BLOCK_P, STUDENT_D)
        t_top = tl.load(STATISTICS + at, mask=there, other=0.0)
        t_log = tl.load(STATISTICS + size + at, mask=there, other=0.0)
        s_top = tl.load(STATISTICS + 2 * size + at, mask=there, other=0.0)
        s_log = tl.load(STATISTICS + 3 * size + at, mask=there, other=0.0)
        grad = tl.load(GRAD + at, mask=there, other=0.0).to(tl.float32)
        t = dot(tk, tl.trans(tq), PRECISION) * t_scale - t_top[None, :]  # [R, P]
        s = dot(sk, tl.trans(sq), PRECISION) * s_scale - s_top[None, :]
        difference = tl.exp2(s - s_log[None, :]) - tl.exp2(t - t_log[None, :])
        difference = tl.where(there[None, :], difference * grad[None, :], 0.0)
        total += dot(rounded(difference, SQ.dtype.element_ty), sq, PRECISION)
    keys = first + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, STUDENT_D)
    tl.store(
        OUT + (pair * r + keys)[:, None] * sd + columns[None, :],
        rounded(total * scale, OUT.dtype.element_ty),
        mask=(keys < r)[:, None] & (columns < sd)[None, :],
    )


def _inputs(shape: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    b, h, p, r, d = (shape[axis] for axis in "BHPRD")

    def features(rows: int) -> Tensor:  # large ones are whole numbers: no order of sums rounds
        x = F.normalize(torch.randn(b, h, rows, d), dim=3) * shape.get("scale", 1)
        return (x.round() if "scale" in shape else x).to(dtype)

    return {
        "teacher_queries": features(p),
        "teacher_keys": features(r),
        "student_queries": features(p),
        "student_keys": features(r),
        "teacher_scale": shape.get("teacher_scale", 10.0),
        "student_scale": 5.0,
    }


SPEC = KernelSpec(
    name="relation_cross_entropy",
    call=relation_cross_entropy,
    reference=reference,
    eager=eager,
    inputs=_inputs,
    small=(
        {"B": 1, "H": 2, "P": 5, "R": 6, "D": 4},
        {"B": 1, "H": 1, "P": 1, "R": 1, "D": 1},
        {"B": 2, "H": 2, "P": 36, "R": 36, "D": 16},
        {"B": 1, "H": 1, "P": 70, "R": 40, "D": 24},
        {"B": 1, "H": 1, "P": 9, "R": 9, "D": 8, "scale": 10},
        {"B": 0, "H": 2, "P": 4, "R": 4, "D": 8},
    ),
    real={
        "ViT-S, 128 images, 6 heads, 13 x 13": {"B": 128, "H": 6, "P": 169, "R": 169, "D": 64},
        "ViT-B, 64 images, 12 heads, 13 x 13": {"B": 64, "H": 12, "P": 169, "R": 169, "D": 64},
        "ViT-S, 1280 local, 6 heads, 6 x 6": {"B": 1280, "H": 6, "P": 36, "R": 36, "D": 64},
    },
    grads=("student_queries", "student_keys"),
    bytes_moved=lambda s, size: size * s["B"] * s["H"] * s["D"] * (s["P"] + s["R"]) * 5,
    flops=lambda s: 14 * s["B"] * s["H"] * s["P"] * s["R"] * s["D"],
)
