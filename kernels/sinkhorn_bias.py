"""Sinkhorn-Knopp assignment as one bias per prototype (SwAV, arXiv:2006.09882, section 3.1).

Sinkhorn-Knopp scales exp(t / Tt) [N, K] in turn so that all prototypes (columns) get the same mass and all
samples (rows) have mass 1. After the last iteration

    Q_nk = softmax(t_n / Tt + u)_k,     u_k = -log of the sum of the column before its last scaling, at fixed
                                              row scales

so the assignment needs no [N, K] matrix of its own: u goes where a centre would, as the `teacher_bias` of
the cross-entropies. With row scales v_n = -logsumexp_k(t_nk / Tt + u_k), v = 0 at first:

    repeat:  u_k = -logsumexp_n(t_nk / Tt + v_n);  v_n = -logsumexp_k(t_nk / Tt + u_k)

(the last v is part of the softmax). u is free up to a constant, which the softmax ignores.

Moved: 2 x iterations - 1 reads of the logits, of which none is copied or rewritten; the published sequence
rewrites a float32 copy four times per iteration. No gradient.

With a process group the columns' sums run over all its ranks: [K] floats are exchanged per iteration.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed

from kernels import launch
from kernels.language import LOG2_E, TO_BASE_2, TO_BASE_E, ceil_div, jit, power_of_two, tl
from kernels.spec import KernelSpec

ROW_BLOCK = 128  # rows that one program of the column pass goes through
ELEMENTS_AT_ONCE = 2**22  # of the reference behind the operators


@torch.no_grad()
def sinkhorn_bias(
    teacher: Tensor,
    teacher_temperature: float,
    iterations: int = 3,
    group: distributed.ProcessGroup | None = None,
) -> Tensor:
    """Return the prototypes' log scales u, float32 [K]; softmax(teacher / Tt + u) is the assignment.

    teacher is logits [N, K], N > 0. With `group` the N of all its ranks count as one batch (each rank
    must call, and gets the same u).

    Raises:
        ValueError: shape or dtype do not fit, or iterations < 1.
    """
    fits = teacher.ndim == 2 and teacher.numel() > 0
    launch.check("sinkhorn_bias", "teacher [N, K] with N, K > 0", fits, teacher)
    if iterations < 1:
        raise ValueError(f"sinkhorn_bias: iterations >= 1 expected, got {iterations}")
    scale = 1 / teacher_temperature
    with launch.no_autocast(teacher):
        bias = -_over_ranks(_columns(teacher, None, scale), group)
        for _ in range(iterations - 1):
            rows = _rows(teacher, bias, scale)
            bias = -_over_ranks(_columns(teacher, rows, scale), group)
    return bias


def _over_ranks(part: Tensor, group: distributed.ProcessGroup | None) -> Tensor:
    """Return the logsumexp [K] over the ranks' parts, in the order of the ranks."""
    if group is None:
        return part
    parts = [torch.empty_like(part) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, part.contiguous(), group=group)
    return torch.logsumexp(torch.stack(parts), 0)


def reference(
    teacher: Tensor, teacher_temperature: float, iterations: int = 3, group: None = None
) -> Tensor:
    """Return u [K] in the log domain."""
    logits = teacher / teacher_temperature
    rows = torch.zeros_like(logits[:, :1])
    bias = -torch.logsumexp(logits, 0)
    for _ in range(iterations - 1):
        rows = -torch.logsumexp(logits + bias, 1, keepdim=True)
        bias = -torch.logsumexp(logits + rows, 0)
    return bias


def eager(
    teacher: Tensor, teacher_temperature: float, iterations: int = 3, group: None = None
) -> Tensor:
    """Return the assignment Q [N, K] by the published sequence, which rewrites the matrix."""
    wide = torch.promote_types(teacher.dtype, torch.float32)
    q = torch.exp(teacher.to(wide) / teacher_temperature).T  # [K, N]
    prototypes, samples = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(dim=1, keepdim=True)
        q = q / prototypes
        q = q / q.sum(dim=0, keepdim=True)
        q = q / samples
    return (q * samples).T


# The operators: logsumexp over rows [K], minus logsumexp over columns [N]


def _precise(teacher: Tensor) -> torch.dtype:
    return torch.float64 if teacher.dtype == torch.float64 else torch.float32


def _fake_columns(teacher: Tensor, *_: Any) -> Tensor:
    return teacher.new_empty(teacher.shape[1], dtype=_precise(teacher))


@launch.operator("sinkhorn_columns", _fake_columns)
def _columns(teacher: Tensor, rows: Tensor | None, scale: float) -> Tensor:
    """Return logsumexp_n(scale t_nk + v_n), [K]."""
    if launch.on_triton(teacher):
        return _launch_columns(teacher, rows, scale)
    size = max(1, ELEMENTS_AT_ONCE // len(teacher))
    parts: list[Tensor] = []
    for block in teacher.split(size, dim=1):
        logits = block.to(_precise(teacher)) * scale
        parts.append(torch.logsumexp(logits if rows is None else logits.add_(rows[:, None]), 0))
    return torch.cat(parts)


def _fake_rows(teacher: Tensor, *_: Any) -> Tensor:
    return teacher.new_empty(len(teacher), dtype=_precise(teacher))


@launch.operator("sinkhorn_rows", _fake_rows)
def _rows(teacher: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Return -logsumexp_k(scale t_nk + u_k), [N]."""
    if launch.on_triton(teacher):
        return _launch_rows(teacher, bias, scale)
    size = max(1, ELEMENTS_AT_ONCE // teacher.shape[1])
    return torch.cat(
        [
            -torch.logsumexp((block.to(_precise(teacher)) * scale).add_(bias), 1)
            for block in teacher.split(size)
        ]
    )


# Triton


def _launch_columns(teacher: Tensor, rows: Tensor | None, scale: float) -> Tensor:
    teacher = teacher if teacher.stride(1) == 1 else teacher.contiguous()
    n, k = teacher.shape
    block_k = min(256, power_of_two(k, 16))
    parts = ceil_div(n, ROW_BLOCK)
    top, total = (launch.empty(parts, k, dtype=torch.float32, like=teacher) for _ in range(2))
    out = launch.empty(k, dtype=torch.float32, like=teacher)
    with launch.on_device_of(teacher):
        _column_part[ceil_div(k, block_k), parts](
            *(teacher, teacher if rows is None else rows, top, total),
            *(n, k, teacher.stride(0), scale * LOG2_E),
            ROWS=ROW_BLOCK,
            STEP=16,
            BLOCK=block_k,
            SHIFTED=rows is not None,
            num_warps=4,
        )
        merge = min(128, power_of_two(k, 16))
        _column_merge[(ceil_div(k, merge),)](top, total, out, parts, k, BLOCK=merge, num_warps=1)
    return out


def _launch_rows(teacher: Tensor, bias: Tensor, scale: float) -> Tensor:
    teacher = teacher if teacher.stride(1) == 1 else teacher.contiguous()
    n, k = teacher.shape
    out = launch.empty(n, dtype=torch.float32, like=teacher)
    with launch.on_device_of(teacher):
        _row[(n,)](
            *(teacher, bias, out, k, teacher.stride(0), scale * LOG2_E),
            BLOCK=min(1024, power_of_two(k, 16)),
            num_warps=4,
        )
    return out


@jit
def _column_part(
    TEACHER, SHIFT, TOP, TOTAL, n, k, stride, scale,
    ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Leave maximum and sum, base 2, of BLOCK columns over ROWS rows."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(1)
    column_there = at < k
    top = tl.full([STEP, BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([STEP, BLOCK], tl.float32)
    for start in range(part * ROWS, part * ROWS + ROWS, STEP):
        row = start + tl.arange(0, STEP)
        there = (row < n)[:, None] & column_there[None, :]
        logits = tl.load(
            TEACHER + row.to(tl.int64)[:, None] * stride + at[None, :],
            mask=there,
            other=float("-inf"),
        )
        logits = logits.to(tl.float32) * scale
        if SHIFTED:
            shift = tl.load(SHIFT + row, mask=row < n, other=0.0).to(tl.float32)
            logits += shift[:, None] * TO_BASE_2
        new = tl.maximum(top, logits)
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - safe) + tl.exp2(logits - safe)
        top = new
    whole = tl.max(top, 0)
    safe = tl.where(whole == float("-inf"), 0.0, whole)
    total = tl.sum(total * tl.exp2(top - safe[None, :]), 0)
    where = part.to(tl.int64) * k + at
    tl.store(TOP + where, whole, mask=column_there)
    tl.store(TOTAL + where, total, mask=column_there)


@jit
def _column_merge(TOP, TOTAL, OUT, parts, k, BLOCK: tl.constexpr):
    """Add the parts of BLOCK columns in their order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < k
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(0, parts):
        where = tl.cast(part, tl.int64) * k + at
        part_top = tl.load(TOP + where, mask=there, other=float("-inf"))
        part_total = tl.load(TOTAL + where, mask=there, other=0.0)
        new = tl.maximum(top, part_top)
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - safe) + part_total * tl.exp2(part_top - safe)
        top = new
    tl.store(OUT + at, (top + tl.log2(tl.where(there, total, 1.0))) * TO_BASE_E, mask=there)


@jit
def _row(TEACHER, BIAS, OUT, k, stride, scale, BLOCK: tl.constexpr):
    """Leave minus the logsumexp of one row."""
    row = tl.program_id(0).to(tl.int64)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, k, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < k
        logits = tl.load(TEACHER + row * stride + at, mask=there, other=float("-inf"))
        bias = tl.load(BIAS + at, mask=there, other=0.0)
        logits = logits.to(tl.float32) * scale + bias.to(tl.float32) * TO_BASE_2
        new = tl.maximum(top, logits)
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - safe) + tl.exp2(logits - safe)
        top = new
    whole = tl.max(top, 0)
    total = tl.sum(total * tl.exp2(top - whole), 0)
    tl.store(OUT + row, -(whole + tl.log2(total)) * TO_BASE_E)  # pyright: ignore


# For tests and the bench


def _inputs(shape: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    logits = torch.randn(shape["N"], shape["K"]) * shape.get("scale", 0.1)
    return {
        "teacher": logits.to(dtype),
        "teacher_temperature": 0.05,
        "iterations": shape.get("iterations", 3),
    }


SPEC = KernelSpec(
    name="sinkhorn_bias",
    call=sinkhorn_bias,
    reference=reference,
    eager=eager,
    published=lambda bias, given: torch.softmax(
        given["teacher"] / given["teacher_temperature"] + bias, 1
    ),
    inputs=_inputs,
    small=(
        {"N": 6, "K": 7},
        {"N": 1, "K": 1},
        {"N": 130, "K": 40},
        {"N": 20, "K": 300, "iterations": 1},
        {"N": 9, "K": 33, "scale": 10},
    ),
    real={
        "masked patches, K 8192": {"N": 15053, "K": 8192},
        "[CLS], 256 rows, K 8192": {"N": 256, "K": 8192},
        "masked patches, K 65536": {"N": 15053, "K": 65536},
    },
    bytes_moved=lambda s, size: size * s["N"] * s["K"] * (2 * s.get("iterations", 3) - 1),
)
