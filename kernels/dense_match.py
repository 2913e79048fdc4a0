"""The most similar cell of another view's grid, for each of one's (DenseCL, arXiv:2011.09157, eq. 3).

    index_bp = argmax_r  q_bp . k_br / (|q_bp| |k_br|)

q [B, P, C], k [B, R, C] -> index int64 [B, P], cosine similarity float32 [B, P]. No gradient. Of equally
similar positions the lowest index is taken.

With `queue_info_nce(..., index=index + b R)` this is the fused dense-contrastive loss: neither the
similarities nor the matched projections nor the logits are ever stored.

Moved: q and k once each and 12 bytes a position; the published sequence stores both normalised copies
and the [B, P, R] similarities. Key norms are summed along with the products, query norms only scale.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import launch
from kernels.language import ceil_div, dot, jit, power_of_two, tl
from kernels.spec import KernelSpec

LEAST_SQUARE = 1e-24  # of a norm: as F.normalize, which divides by at least 1e-12


@torch.no_grad()
def dense_match(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each cell of q [B, P, C] its most similar cell of k [B, R, C], and how similar it is.

    int64 [B, P] and float32 [B, P]; cells need not be unit vectors, zero vectors are similar to none (0).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or there is no key cell.
    """
    fits = q.ndim == k.ndim == 3 and q.shape[0] == k.shape[0] and q.shape[2] == k.shape[2]
    fits = fits and k.shape[1] > 0
    launch.check("dense_match", "q [B, P, C] and k [B, R, C] with R > 0", fits, q, k)
    with launch.no_autocast(q):
        return _match(q, k)


def reference(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return index and similarity the plain way."""
    similarity = torch.bmm(F.normalize(q, dim=2), F.normalize(k, dim=2).transpose(1, 2))
    best = similarity.amax(2, keepdim=True)
    # argmax leaves open which of several maxima it takes
    index = (similarity == best).to(torch.uint8).argmax(2)
    return index, best[..., 0]


def eager(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return index and similarity by the published sequence: normalise, matmul over cells, max."""
    q, k = F.normalize(q.transpose(1, 2), dim=1), F.normalize(k.transpose(1, 2), dim=1)
    best, index = torch.matmul(q.transpose(1, 2), k).max(dim=2)
    return index, best


def _fake(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    precise = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape[:2], dtype=torch.int64), q.new_empty(q.shape[:2], dtype=precise)


@launch.operator("dense_match", _fake)
def _match(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    if q.shape[0] and q.shape[1] and launch.on_triton(q):
        return _launch(q, k)
    precise = torch.float64 if q.dtype == torch.float64 else torch.float32
    return reference(q.to(precise), k.to(precise))


def _launch(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    b, p, c = q.shape
    r = k.shape[1]
    index = launch.empty(b, p, dtype=torch.int64, like=q)
    similarity = launch.empty(b, p, dtype=torch.float32, like=q)
    block_p = 64 if p > 32 else power_of_two(p, 16)
    block_r = 64 if r > 32 else power_of_two(r, 16)
    block_c = 32 if q.dtype == torch.float32 else 64
    with launch.on_device_of(q):
        _best[b, ceil_div(p, block_p)](
            *(q, k, index, similarity, p, r, c),
            *(q.stride(0), q.stride(1), k.stride(0), k.stride(1), LEAST_SQUARE),
            BLOCK_P=block_p,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            PRECISION=launch.float32_precision(),
            num_warps=4,
            num_stages=3,
        )
    return index, similarity


@jit
def _best(
    Q, K, INDEX, SIMILARITY, p, r, c, q_image, q_cell, k_image, k_cell, least_square,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Find the best key cell of BLOCK_P query cells of one image."""
    image = tl.program_id(0).to(tl.int64)
    cells = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    q_there = cells < p
    q_at = Q + image * q_image + cells.to(tl.int64)[:, None] * q_cell
    best = tl.full([BLOCK_P], float("-inf"), tl.float32)
    best_index = tl.zeros([BLOCK_P], tl.int32)
    q_square = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, r, BLOCK_R):
        keys = start + tl.arange(0, BLOCK_R)
        k_there = keys < r
        k_at = K + image * k_image + keys.to(tl.int64)[:, None] * k_cell
        product = tl.zeros([BLOCK_P, BLOCK_R], tl.float32)
        k_square = tl.zeros([BLOCK_R], tl.float32)
        q_square = tl.zeros([BLOCK_P], tl.float32)
        for first in range(0, c, BLOCK_C):
            channels = first + tl.arange(0, BLOCK_C)
            there = channels < c
            q = tl.load(q_at + channels[None, :], mask=q_there[:, None] & there[None, :], other=0.0)
            k = tl.load(k_at + channels[None, :], mask=k_there[:, None] & there[None, :], other=0.0)
            product += dot(q, tl.trans(k), PRECISION)
            k = k.to(tl.float32)
            q = q.to(tl.float32)
            k_square += tl.sum(k * k, 1)
            q_square += tl.sum(q * q, 1)
        similarity = product * tl.rsqrt(tl.maximum(k_square, least_square))[None, :]
        similarity = tl.where(k_there[None, :], similarity, float("-inf"))
        here = tl.max(similarity, 1)
        among = tl.where(similarity == here[:, None], keys[None, :], 2147483647)  # pyright: ignore
        better = here > best
        best_index = tl.where(better, tl.min(among, 1), best_index)
        best = tl.where(better, here, best)
    at = image * p + cells
    tl.store(INDEX + at, best_index.to(tl.int64), mask=q_there)
    best = best * tl.rsqrt(tl.maximum(q_square, least_square))
    tl.store(SIMILARITY + at, best, mask=q_there)


def _inputs(shape: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    b, p, r, c = shape["B"], shape["P"], shape["R"], shape["C"]
    q, k = torch.randn(b, p, c), torch.randn(b, r, c)
    if shape.get("ties"):
        # Signs of 16 channels have norm 4: no order of summing them rounds, so ties are ties everywhere
        q, k = q.sign(), k[:, :1].sign().expand(b, r, c).contiguous()
    if shape.get("zero"):
        k = k * 0
    return {"q": q.to(dtype), "k": k.to(dtype)}


SPEC = KernelSpec(
    name="dense_match",
    call=dense_match,
    reference=reference,
    eager=eager,
    inputs=_inputs,
    small=(
        {"B": 2, "P": 9, "R": 9, "C": 5},
        {"B": 1, "P": 1, "R": 1, "C": 1},
        {"B": 3, "P": 49, "R": 49, "C": 80},
        {"B": 2, "P": 70, "R": 100, "C": 33},
        {"B": 2, "P": 5, "R": 70, "C": 16, "ties": True},
        {"B": 1, "P": 4, "R": 6, "C": 8, "zero": True},
        {"B": 0, "P": 4, "R": 4, "C": 8},
    ),
    real={
        "ResNet-50, 32 images, 7 x 7": {"B": 32, "P": 49, "R": 49, "C": 2048},
        "ResNet-50, 256 images, 7 x 7": {"B": 256, "P": 49, "R": 49, "C": 2048},
        "ViT-S/16, 64 images, 14 x 14": {"B": 64, "P": 196, "R": 196, "C": 384},
        "ViT-S, 64 images, 32 x 32": {"B": 64, "P": 1024, "R": 1024, "C": 384},
    },
    bytes_moved=lambda s, size: s["B"] * (size * s["C"] * (s["P"] + s["R"]) + 12 * s["P"]),
    flops=lambda s: 2 * s["B"] * s["P"] * s["R"] * s["C"],
)
