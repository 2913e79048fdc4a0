"""InfoNCE against a negative queue, without the [N, K + 1] logits (MoCo, arXiv:1911.05722, eq. 1).

    loss_n = logsumexp([q_n . p_n, q_n . queue_1, ..., q_n . queue_K] / T) - q_n . p_n / T

q [N, D] queries, queue [K, D] negatives, p_n the positive of n: row n, or row `index[n]`, of positive
[M, D]. Only q gets a gradient:

    dloss_n / dq_n = (sum_j softmax_nj key_j - p_n) / T

The gradient is attention with the queue as keys and values, so the forward pass computes it along with
the loss and saves [N, D]; the backward pass multiplies by the incoming [N].

Moved: q, queue, positives and two [N, D] results once; at N = 1568 (32 images x 49 cells), K = 65536 the
logits alone would be 411 MB, and the published sequence of operations moves several times that.

Numbers: products of bf16 inputs are summed in float32, probabilities are rounded to the inputs' dtype for
the second product. Each row block meets the splits of the queue in a fixed order: bitwise repeatable.
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
from kernels.spec import KernelSpec

BLOCK = 8192  # queue rows per block of the streamed reference: [1568, 8192] float32 is 51 MB
LARGEST_D = 512  # of Triton's tiles
PROGRAMS = 512  # enough of them to fill any card; their number never depends on the card
MERGED = 16  # maxima, of rows times splits, that a program of the merge meets at a time


def queue_info_nce(
    q: Tensor,
    positive: Tensor,
    queue: Tensor,
    temperature: float,
    index: Tensor | None = None,
) -> Tensor:
    """Return the InfoNCE loss, float32 [N], of unit queries [N, D], with gradient to q only.

    positive is [N, D], or [M, D] with index int64 [N]; queue is [K, D].

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    fits = (
        q.ndim == positive.ndim == queue.ndim == 2
        and q.shape[1] == positive.shape[1] == queue.shape[1]
        and (len(q) == len(positive) if index is None else index.shape == q.shape[:1])
    )
    wanted = "q [N, D], positive [N, D] (or [M, D] with index [N]), queue [K, D]"
    launch.check("queue_info_nce", wanted, fits, q, positive, queue)
    if index is not None and (index.dtype != torch.int64 or index.device != q.device):
        raise ValueError(f"queue_info_nce: index int64 on {q.device} expected, got {index.dtype}")
    if launch.on_triton(q) and q.shape[1] > LARGEST_D:
        raise ValueError(
            f"queue_info_nce: D <= {LARGEST_D} expected, got {q.shape[1]} (run.kernels=torch takes any)"
        )
    wants = q.requires_grad and torch.is_grad_enabled()
    with launch.no_autocast(q):
        loss, _ = _forward(q, positive.detach(), queue.detach(), index, temperature, wants)
    return loss


def reference(
    q: Tensor, positive: Tensor, queue: Tensor, temperature: float, index: Tensor | None = None
) -> Tensor:
    """Return loss [N] the plain way, with all logits in memory: the definition of correct."""
    positive = positive if index is None else positive[index]
    positive_logit = (q * positive).sum(1, keepdim=True)
    logits = torch.cat([positive_logit, q @ queue.T], dim=1) / temperature
    return torch.logsumexp(logits, dim=1) - logits[:, 0]


def streamed(
    q: Tensor, positive: Tensor, queue: Tensor, temperature: float, wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return loss [N] and its gradient [N, D] with one block of the queue's logits in memory."""
    logit = (q * positive).sum(1) / temperature  # [N]
    top = logit.clone()  # running maximum, so that no exponential overflows
    total = torch.ones_like(logit)  # sum of exp(logit - top)
    mixed = positive.clone()  # sum of exp(logit - top) * key, [N, D]
    for block in queue.split(BLOCK) if len(queue) else ():
        logits = (q @ block.T).div_(temperature)
        new_top = torch.maximum(top, logits.amax(1))
        weights = logits.sub_(new_top[:, None]).exp_()
        shrink = torch.exp(top - new_top)
        total = total * shrink + weights.sum(1)
        if wants_gradient:
            mixed = mixed * shrink[:, None] + weights @ block
        top = new_top
    loss = top + torch.log(total) - logit
    return loss, (mixed / total[:, None] - positive) / temperature


# The operator: (loss [N] float32, its gradient to q [N, D] in q's dtype)


def _fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    precise = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(len(q), dtype=precise), q.new_empty(q.shape)


@launch.operator("queue_info_nce", _fake)
def _forward(
    q: Tensor,
    positive: Tensor,
    queue: Tensor,
    index: Tensor | None,
    temperature: float,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor]:
    if len(q) and launch.on_triton(q):
        return _launch(q, positive, queue, index, temperature, wants_gradient)
    precise = torch.float64 if q.dtype == torch.float64 else torch.float32
    chosen = positive if index is None else positive[index]
    loss, gradient = streamed(
        q.to(precise), chosen.to(precise), queue.to(precise), temperature, wants_gradient
    )
    return loss, gradient.to(q.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return (grad[:, None] * gradient).to(gradient.dtype), None, None, None, None, None


_forward.register_autograd(_backward, setup_context=_save)


# Triton


def _launch(
    q: Tensor,
    positive: Tensor,
    queue: Tensor,
    index: Tensor | None,
    temperature: float,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor]:
    q, positive, queue = (x if x.stride(1) == 1 else x.contiguous() for x in (q, positive, queue))
    n, d = q.shape
    k = len(queue)
    block_d = power_of_two(d, 16)
    block, warps, stages = _tile(block_d, q.dtype)
    row_blocks, key_blocks = ceil_div(n, block), ceil_div(k, block)
    per_split = max(ceil_div(key_blocks, max(1, PROGRAMS // row_blocks)), 1)
    splits = max(ceil_div(key_blocks, per_split), 1)
    top = launch.empty(splits, n, dtype=torch.float32, like=q)
    total = launch.empty(splits, n, dtype=torch.float32, like=q)
    mixed = launch.empty(splits if wants_gradient else 1, n, d, dtype=torch.float32, like=q)
    loss = launch.empty(n, dtype=torch.float32, like=q)
    gradient = launch.empty(n, d, dtype=q.dtype, like=q)
    block_s = min(power_of_two(splits), MERGED)
    block_n = MERGED // block_s
    with launch.on_device_of(q):
        _attend[row_blocks, splits](
            *(q, queue, top, total, mixed, n, k, d, q.stride(0), queue.stride(0)),
            *(LOG2_E / temperature, per_split),
            BLOCK_N=block,
            BLOCK_K=block,
            BLOCK_D=block_d,
            WANTS_GRADIENT=wants_gradient,
            PRECISION=launch.float32_precision(),
            num_warps=warps,
            num_stages=stages,
        )
        _merge[(ceil_div(n, block_n),)](
            *(q, positive, q if index is None else index, top, total, mixed, loss, gradient),
            *(n, d, q.stride(0), positive.stride(0), LOG2_E / temperature, 1 / temperature, splits),
            BLOCK_N=block_n,
            BLOCK_S=block_s,
            BLOCK_D=block_d,
            INDEXED=index is not None,
            WANTS_GRADIENT=wants_gradient,
            num_warps=4,
        )
    return loss, gradient


def _tile(width: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Return rows of queries and of keys in a tile, warps and stages: what an sm_86 holds of such rows."""
    bytes_of_row = width * dtype.itemsize
    if bytes_of_row <= 512:
        return 64 if bytes_of_row <= 256 and dtype != torch.float32 else 32, 4, 2
    return (16, 4, 2) if bytes_of_row <= 1024 else (16, 8, 1)


@jit
def _attend(
    Q, QUEUE, TOP, TOTAL, MIXED, n, k, d, q_stride, queue_stride, scale, per_split,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    WANTS_GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend from BLOCK_N queries to one split of the queue; leave maximum, sum and mixture."""
    split = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    row_there, column_there = rows < n, columns < d
    q = load_rows(Q, tl.program_id(0) * BLOCK_N, n, q_stride, d, BLOCK_N, BLOCK_D)
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    mixed = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first = split * per_split * BLOCK_K
    end = tl.minimum(first + per_split * BLOCK_K, k)
    for start in range(first, end, BLOCK_K):
        key_there = start + tl.arange(0, BLOCK_K) < k
        key = load_rows(QUEUE, start, k, queue_stride, d, BLOCK_K, BLOCK_D)
        logits = dot(q, tl.trans(key), PRECISION) * scale  # [N, K], base 2
        logits = tl.where(key_there[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp2(logits - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        if WANTS_GRADIENT:
            mixed = mixed * shrink[:, None] + dot(
                rounded(weights, QUEUE.dtype.element_ty), key, PRECISION
            )
        top = new_top
    at = split.to(tl.int64) * n + rows
    tl.store(TOP + at, top, mask=row_there)
    tl.store(TOTAL + at, total, mask=row_there)
    if WANTS_GRADIENT:
        tl.store(
            MIXED + at[:, None] * d + columns[None, :],
            mixed,
            mask=row_there[:, None] & column_there[None, :],
        )


@jit
def _merge(
    Q, POSITIVE, INDEX, TOP, TOTAL, MIXED, LOSS, GRADIENT, n, d, q_stride, positive_stride,
    scale, inverse_temperature, splits,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    INDEXED: tl.constexpr, WANTS_GRADIENT: tl.constexpr,
):  # fmt: skip
    """Add the splits, BLOCK_S at a time in their order, to the positive; leave loss and gradient."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    row_there = rows < n
    there = row_there[:, None] & (columns < d)[None, :]
    rows = rows.to(tl.int64)
    q = tl.load(Q + rows[:, None] * q_stride + columns[None, :], mask=there, other=0.0)
    picked = rows
    if INDEXED:
        picked = tl.load(INDEX + rows, mask=row_there, other=0)
    at = POSITIVE + picked[:, None] * positive_stride + columns[None, :]
    positive = tl.load(at, mask=there, other=0.0).to(tl.float32)
    logit = tl.sum(q.to(tl.float32) * positive, 1) * scale
    top = logit
    total = tl.full([BLOCK_N], 1.0, tl.float32)
    mixed = positive
    for first in range(0, splits, BLOCK_S):
        parts = first + tl.arange(0, BLOCK_S)
        part_there = row_there[:, None] & (parts < splits)[None, :]  # [N, S]
        part = parts.to(tl.int64)[None, :] * n + rows[:, None]
        part_top = tl.load(TOP + part, mask=part_there, other=float("-inf"))
        part_total = tl.load(TOTAL + part, mask=part_there, other=0.0)
        new_top = tl.maximum(top, tl.max(part_top, 1))
        shrink = tl.exp2(top - new_top)
        grow = tl.exp2(part_top - new_top[:, None])
        total = total * shrink + tl.sum(part_total * grow, 1)
        if WANTS_GRADIENT:
            part_mixed = tl.load(
                MIXED + part[:, :, None] * d + columns[None, None, :],
                mask=part_there[:, :, None] & (columns < d)[None, None, :],
                other=0.0,
            )
            mixed = mixed * shrink[:, None] + tl.sum(part_mixed * grow[:, :, None], 1)
        top = new_top
    tl.store(LOSS + rows, (top - logit + tl.log2(total)) * TO_BASE_E, mask=row_there)
    if WANTS_GRADIENT:
        gradient = (mixed / total[:, None] - positive) * inverse_temperature
        tl.store(
            GRADIENT + rows[:, None] * d + columns[None, :],
            rounded(gradient, GRADIENT.dtype.element_ty),
            mask=there,
        )


# For tests and the bench


def eager(
    q: Tensor, positive: Tensor, queue: Tensor, temperature: float, index: Tensor | None = None
) -> Tensor:
    """Return loss [N] by the published sequence: gather, einsum, cat, divide, cross-entropy."""
    positive = positive if index is None else positive[index]
    positive_logit = torch.einsum("nd,nd->n", q, positive)[:, None]
    # The published code multiplies by a clone of the queue, which is updated before the backward pass.
    negative_logits = torch.einsum("nd,kd->nk", q, queue.clone())
    logits = torch.cat([positive_logit, negative_logits], dim=1) / temperature
    target = torch.zeros(len(q), dtype=torch.int64, device=q.device)
    return F.cross_entropy(logits, target, reduction="none")


def _inputs(shape: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    n, k, d, m = shape["N"], shape["K"], shape["D"], shape.get("M")
    q, positive, queue = (F.normalize(torch.randn(rows, d), dim=1) for rows in (n, m or n, k))
    return {
        "q": (q * shape.get("scale", 1)).to(dtype),
        "positive": positive.to(dtype),
        "queue": queue.to(dtype),
        "temperature": shape.get("T", 0.2),
        "index": torch.randint(m, (n,)) if m else None,
    }


def _bytes(shape: Mapping[str, Any], size: int) -> int:
    n, k, d = shape["N"], shape["K"], shape["D"]
    return size * d * (k + 4 * n) + 4 * n  # q, positive, gradient twice


SPEC = KernelSpec(
    name="queue_info_nce",
    call=queue_info_nce,
    reference=reference,
    eager=eager,
    inputs=_inputs,
    small=(
        {"N": 5, "K": 7, "D": 3},
        {"N": 1, "K": 1, "D": 1},
        {"N": 33, "K": 150, "D": 24},
        {"N": 70, "K": 130, "D": 128, "M": 9},
        {"N": 4, "K": 100, "D": 32, "T": 0.01, "scale": 100},
        {"N": 3, "K": 700, "D": 16},
        {"N": 5, "K": 40, "D": 300},
        {"N": 6, "K": 0, "D": 8},
        {"N": 0, "K": 5, "D": 4},
    ),
    real={
        "MoCo, 32 images": {"N": 32, "K": 65536, "D": 128},
        "DenseCL, 32 images": {"N": 1568, "K": 65536, "D": 128, "M": 1568},
        "DenseCL, 256 images": {"N": 12544, "K": 65536, "D": 128, "M": 12544},
    },
    grads=("q",),
    bytes_moved=_bytes,
    flops=lambda shape: 4 * shape["N"] * shape["K"] * shape["D"],
)
