"""The fused dense-contrastive loss: match, pick, InfoNCE (DenseCL, arXiv:2011.09157, eq. 1 to 3).

    m(b, p) = argmax_r cos(x_q,bp , x_k,br)        on backbone features x_q [B, P, C], x_k [B, R, C]
    loss_bp = InfoNCE(q_bp; k_b,m(b,p); queue)     on unit projections q [B, P, D], k [B, R, D]

`dense_match` finds m, `queue_info_nce` takes the positives by index: neither similarities, nor gathered
keys, nor logits are ever stored. Gradients go to q only.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import dense_match, launch, queue_info_nce
from kernels.spec import KernelSpec


def dense_contrastive(
    q_features: Tensor, k_features: Tensor, q: Tensor, k: Tensor, queue: Tensor, temperature: float
) -> Tensor:
    """Return the loss of every query cell, float32 [B, P].

    q_features [B, P, C] and k_features [B, R, C] are compared, of any length; q [B, P, D], k [B, R, D] and
    queue [K, D] are unit projections.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    given = (q_features, k_features, q, k)
    fits = all(x.ndim == 3 for x in given) and queue.ndim == 2
    fits = fits and q.shape[:2] == q_features.shape[:2] and k.shape[:2] == k_features.shape[:2]
    wanted = "features [B, P, C], [B, R, C] and projections [B, P, D], [B, R, D] with queue [K, D]"
    launch.check("dense_contrastive", wanted, fits, q_features, k_features)
    launch.check("dense_contrastive", wanted, fits, q, k, queue)
    match, _ = dense_match.dense_match(q_features, k_features)
    return matched_info_nce(q, k, match, queue, temperature)


def matched_info_nce(
    q: Tensor, k: Tensor, match: Tensor, queue: Tensor, temperature: float
) -> Tensor:
    """Return the loss [B, P] of query cells [B, P, D] whose key cells, of [B, R, D], are match [B, P]."""
    images, cells = k.shape[:2]
    first = torch.arange(images, device=match.device)[:, None] * cells  # of each image, flattened
    index = (match + first).flatten()
    flat = (q.flatten(0, 1), k.flatten(0, 1))
    loss = queue_info_nce.queue_info_nce(*flat, queue, temperature, index)
    return loss.view(match.shape)


def reference(
    q_features: Tensor, k_features: Tensor, q: Tensor, k: Tensor, queue: Tensor, temperature: float
) -> Tensor:
    """Return loss [B, P] the plain way."""
    match, _ = dense_match.reference(q_features, k_features)
    positive = k.gather(1, match[:, :, None].expand(-1, -1, k.shape[2]))
    flat = (q.flatten(0, 1), positive.flatten(0, 1))
    return queue_info_nce.reference(*flat, queue, temperature).view(match.shape)


def eager(
    q_features: Tensor, k_features: Tensor, q: Tensor, k: Tensor, queue: Tensor, temperature: float
) -> Tensor:
    """Return loss [B, P] by the published sequence: channels first, similarities, gather, logits."""
    match, _ = dense_match.eager(q_features, k_features)
    k = k.transpose(1, 2)  # [B, D, R]
    positive = torch.gather(k, 2, match[:, None].expand(-1, k.shape[1], -1)).transpose(1, 2)
    flat = (q.flatten(0, 1), positive.flatten(0, 1))
    return queue_info_nce.eager(*flat, queue, temperature).view(match.shape)


def _inputs(shape: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    b, p, c, d = shape["B"], shape["P"], shape["C"], shape["D"]
    q, k = (F.normalize(torch.randn(b, p, d), dim=2) for _ in range(2))
    return {
        "q_features": torch.randn(b, p, c).to(dtype),
        "k_features": torch.randn(b, p, c).to(dtype),
        "q": q.to(dtype),
        "k": k.to(dtype),
        "queue": F.normalize(torch.randn(shape["K"], d), dim=1).to(dtype),
        "temperature": 0.2,
    }


def _bytes(shape: Mapping[str, Any], size: int) -> int:
    cells = shape["B"] * shape["P"]
    return size * (2 * cells * shape["C"] + shape["D"] * (shape["K"] + 4 * cells)) + 16 * cells


SPEC = KernelSpec(
    name="dense_contrastive",
    call=dense_contrastive,
    reference=reference,
    eager=eager,
    inputs=_inputs,
    small=(
        {"B": 2, "P": 9, "C": 6, "D": 4, "K": 10},
        {"B": 1, "P": 1, "C": 2, "D": 2, "K": 1},
        {"B": 3, "P": 49, "C": 20, "D": 16, "K": 70},
    ),
    real={
        "DenseCL R50, 32 images": {"B": 32, "P": 49, "C": 2048, "D": 128, "K": 65536},
        "DenseCL R50, 256 images": {"B": 256, "P": 49, "C": 2048, "D": 128, "K": 65536},
    },
    grads=("q",),
    bytes_moved=_bytes,
    flops=lambda s: s["B"] * s["P"] * (2 * s["P"] * s["C"] + 4 * s["K"] * s["D"]),
)
