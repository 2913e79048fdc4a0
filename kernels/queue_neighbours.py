"""The k rows of a queue most similar to each feature (arXiv:2106.05967, nearest neighbours in the queue).

    index_n = the k largest over j of  s_nj = b_n . queue_j

b [N, C] features, queue [K, C] -> index int64 [N, k], similarity float32 [N, k], most similar first. No
gradient. Which of equally similar rows are taken is left open, as torch.topk leaves it.

The similarities [N, K] are never stored (N = 640, K = 65536: 168 MB in float32, written and read several
times by a top-k). A product of matrices leaves the largest of every 8 columns only, [N, K / 8]. The k
largest similarities lie in the k groups with the largest maxima: were one of them in another group, k
groups would hold something larger. So a top-k over the maxima picks k groups a row, whose 8 k similarities
are computed once more and searched.

Moved: b and the queue once, maxima twice, 8 k rows of the queue per feature (most from the cache).
The products are summed in float32; a neighbour can differ from the full search's where two similarities
round to the same.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import launch
from kernels.language import ceil_div, dot, jit, tl
from kernels.spec import KernelSpec

BLOCK = 8192  # queue rows per block of the streamed search: [640, 8192] float32 is 21 MB
GROUP = 8  # columns that leave one maximum


@torch.no_grad()
def queue_neighbours(features: Tensor, queue: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` rows of queue [K, C] most similar to each of features [N, C], and how similar.

    int64 [N, count] and float32 [N, count]; similarity is the inner product.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or count is not in 1 .. K.
    """
    fits = features.ndim == queue.ndim == 2 and features.shape[1] == queue.shape[1]
    launch.check("queue_neighbours", "features [N, C] and queue [K, C]", fits, features, queue)
    if not 1 <= count <= len(queue):
        raise ValueError(f"queue_neighbours: count in 1 .. {len(queue)} expected, got {count}")
    with launch.no_autocast(features):
        return _search(features, queue, count)


def reference(features: Tensor, queue: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return index and similarity the plain way, with all similarities in memory."""
    best = (features @ queue.T).topk(count, dim=1)
    return best.indices, best.values


def streamed(features: Tensor, queue: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return index and similarity with one block's similarities in memory; the queue of any dtype."""
    index = torch.empty(len(features), 0, dtype=torch.int64, device=features.device)
    similarity = features.new_empty(len(features), 0)
    for number, block in enumerate(queue.split(BLOCK)):
        best = (features @ block.to(features.dtype).T).topk(min(count, len(block)), dim=1)
        index = torch.cat([index, best.indices + number * BLOCK], dim=1)
        similarity = torch.cat([similarity, best.values], dim=1)
        similarity, kept = similarity.topk(min(count, similarity.shape[1]), dim=1)
        index = index.gather(1, kept)
    return index, similarity


def _fake(features: Tensor, queue: Tensor, count: int) -> tuple[Tensor, Tensor]:
    precise = torch.float64 if features.dtype == torch.float64 else torch.float32
    shape = (len(features), count)
    return features.new_empty(shape, dtype=torch.int64), features.new_empty(shape, dtype=precise)


@launch.operator("queue_neighbours", _fake)
def _search(features: Tensor, queue: Tensor, count: int) -> tuple[Tensor, Tensor]:
    if len(features) and launch.on_triton(features):
        return _launch(features, queue, count)
    precise = torch.float64 if features.dtype == torch.float64 else torch.float32
    return streamed(features.to(precise), queue, count)


# Triton


def _launch(features: Tensor, queue: Tensor, count: int) -> tuple[Tensor, Tensor]:
    features, queue = (x if x.stride(1) == 1 else x.contiguous() for x in (features, queue))
    n, c = features.shape
    k = len(queue)
    wide = features.dtype == torch.float32
    block_n, block_k, block_c = (64, 64, 32) if wide else (128, 128, 32)
    groups = ceil_div(k, GROUP)
    maxima = launch.empty(n, groups, dtype=torch.float32, like=features)
    with launch.on_device_of(features):
        _group_maxima[ceil_div(n, block_n), ceil_div(k, block_k)](
            *(features, queue, maxima, n, k, c, groups, features.stride(0), queue.stride(0)),
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            BLOCK_C=block_c,
            GROUP=GROUP,
            PRECISION=launch.float32_precision(),
            num_warps=4 if wide else 8,
            num_stages=3,
        )
        taken = min(count, groups)
        chosen = maxima.topk(taken, dim=1, sorted=False).indices  # [N, taken] groups
        similarity = launch.empty(n, taken * GROUP, dtype=torch.float32, like=features)
        _similarities[n, ceil_div(taken * GROUP, 32)](
            *(features, queue, chosen, similarity, k, c, taken),
            *(features.stride(0), queue.stride(0)),
            BLOCK_K=32,
            BLOCK_C=128,
            GROUP=GROUP,
            num_warps=4,
        )
    best = similarity.topk(count, dim=1)
    index = chosen.gather(1, best.indices // GROUP) * GROUP + best.indices % GROUP
    return index, best.values


@jit
def _group_maxima(
    FEATURES, QUEUE, MAXIMA, n, k, c, groups, feature_stride, queue_stride,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Multiply BLOCK_N features by BLOCK_K rows of the queue; leave the largest of every GROUP of them."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    keys = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    row_there, key_there = rows < n, keys < k
    feature_at = FEATURES + rows.to(tl.int64)[:, None] * feature_stride
    key_at = QUEUE + keys.to(tl.int64)[:, None] * queue_stride
    product = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for first in range(0, c, BLOCK_C):
        channels = first + tl.arange(0, BLOCK_C)
        there = (channels < c)[None, :]
        feature = tl.load(
            feature_at + channels[None, :], mask=row_there[:, None] & there, other=0.0
        )
        key = tl.load(key_at + channels[None, :], mask=key_there[:, None] & there, other=0.0)
        product += dot(feature, tl.trans(key), PRECISION)
    product = tl.where(key_there[None, :], product, float("-inf"))
    best = tl.max(tl.reshape(product, [BLOCK_N, BLOCK_K // GROUP, GROUP]), 2)
    group = tl.program_id(1) * (BLOCK_K // GROUP) + tl.arange(0, BLOCK_K // GROUP)
    tl.store(
        MAXIMA + rows.to(tl.int64)[:, None] * groups + group[None, :],
        best,
        mask=row_there[:, None] & (group < groups)[None, :],
    )


@jit
def _similarities(
    FEATURES, QUEUE, CHOSEN, SIMILARITY, k, c, taken, feature_stride, queue_stride,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Multiply one feature by BLOCK_K rows of its chosen groups."""
    row = tl.program_id(0).to(tl.int64)
    slots = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    slot_there = slots < taken * GROUP
    group = tl.load(CHOSEN + row * taken + slots // GROUP, mask=slot_there, other=0)
    keys = group * GROUP + slots % GROUP
    there = slot_there & (keys < k)
    key_at = QUEUE + keys[:, None] * queue_stride
    total = tl.zeros([BLOCK_K], tl.float32)
    for first in range(0, c, BLOCK_C):
        channels = first + tl.arange(0, BLOCK_C)
        inside = channels < c
        feature = tl.load(FEATURES + row * feature_stride + channels, mask=inside, other=0.0)
        key = tl.load(key_at + channels[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        total += tl.sum(key.to(tl.float32) * feature.to(tl.float32)[None, :], 1)
    total = tl.where(there, total, float("-inf"))
    tl.store(SIMILARITY + row * taken * GROUP + slots, total, mask=slot_there)


# For tests and the bench


def eager(features: Tensor, queue: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return index and similarity by the published sequence: all similarities, then a top-k."""
    # The published code multiplies by a clone of the queue, as it does for its logits.
    best = torch.einsum("nc,kc->nk", features, queue.clone()).topk(count, dim=1)
    return best.indices, best.values


def _inputs(shape: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    n, k, c = shape["N"], shape["K"], shape["C"]
    features, queue = (F.normalize(torch.randn(rows, c), dim=1) for rows in (n, k))
    if shape.get("together"):  # the best ones side by side, in one group or two
        queue[3 : 3 + shape["count"]] = F.normalize(features[:1] + queue[3 : 3 + shape["count"]])
    return {"features": features.to(dtype), "queue": queue.to(dtype), "count": shape["count"]}


def _bytes(shape: Mapping[str, Any], size: int) -> int:
    n, k, c = shape["N"], shape["K"], shape["C"]
    return size * c * (n + k) + 12 * n * shape["count"]


SPEC = KernelSpec(
    name="queue_neighbours",
    call=queue_neighbours,
    reference=reference,
    eager=eager,
    inputs=_inputs,
    small=(
        {"N": 5, "K": 30, "C": 6, "count": 3},
        {"N": 1, "K": 1, "C": 1, "count": 1},
        {"N": 9, "K": 150, "C": 40, "count": 20},
        {"N": 3, "K": 133, "C": 33, "count": 9, "together": True},
        {"N": 2, "K": 12, "C": 16, "count": 12},
        {"N": 0, "K": 9, "C": 4, "count": 2},
    ),
    real={
        "ResNet-50, 32 images": {"N": 160, "K": 65536, "C": 2048, "count": 20},
        "ResNet-50, 128 images": {"N": 640, "K": 65536, "C": 2048, "count": 20},
        "ViT-S, 128 images": {"N": 640, "K": 65536, "C": 384, "count": 20},
    },
    bytes_moved=_bytes,
    flops=lambda shape: 2 * shape["N"] * shape["K"] * shape["C"],
)
