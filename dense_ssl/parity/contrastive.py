"""Functions of MoCo and DenseCL.

Conventions are the official codes': channels before cells ([B, C, P]), queues as columns ([D, K]), raw
inputs that the function normalises.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dense_ssl.backbones.features import tokens_from_map
from dense_ssl.methods import densecl, moco
from dense_ssl.methods.parts import KeyQueue, mlp_head, unit
from kernels.dense_match import dense_match as dense_match_kernel


def moco_logits(q: Tensor, k: Tensor, queue: Tensor, T: float) -> tuple[Tensor, Tensor]:
    """Return logits [B, 1 + K] (column 0 the positive) over T, and labels [B] of zeros.

    q, k [B, D] raw; queue [D, K] with unit columns. Training never builds this matrix; its loss is
    `global_info_nce`, whose value is the cross-entropy of these logits.
    """
    q, k = unit(q), unit(k)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue], dim=1) / T
    return logits, torch.zeros(len(q), dtype=torch.int64, device=q.device)


def global_info_nce(g_q: Tensor, g_k: Tensor, queue: Tensor, T: float) -> Tensor:
    """Return the unweighted global loss of raw g_q, g_k [B, D] against queue [D, K]."""
    return moco.info_nce(unit(g_q), unit(g_k), queue.T.contiguous(), T)


def dense_match(x_q: Tensor, x_k: Tensor) -> Tensor:
    """Return int64 [B, P]: for every query cell of x_q [B, C, P] the most similar cell of x_k."""
    return dense_match_kernel(x_q.transpose(1, 2), x_k.transpose(1, 2))[0]


def dense_info_nce(d_q: Tensor, d_k: Tensor, match: Tensor, queue2: Tensor, T: float) -> Tensor:
    """Return the unweighted dense loss of raw d_q, d_k [B, D, P] against queue2 [D, K]."""
    cells_q, cells_k = unit(d_q.transpose(1, 2)), unit(d_k.transpose(1, 2))
    return densecl.dense_info_nce(cells_q, cells_k, match, queue2.T.contiguous(), T)


def densecl_losses(
    x_q: Tensor, x_k: Tensor, g_q: Tensor, g_k: Tensor, d_q: Tensor, d_k: Tensor,
    queue: Tensor, queue2: Tensor, T: float, lam: float,
) -> dict[str, Tensor]:  # fmt: skip
    """Return {"single", "dense"}: both losses already weighted; training minimises their sum."""
    x_q, x_k, d_q, d_k = (t.flatten(2) for t in (x_q, x_k, d_q, d_k))
    dense = dense_info_nce(d_q, d_k, dense_match(x_q, x_k), queue2, T)
    return {"single": (1 - lam) * global_info_nce(g_q, g_k, queue, T), "dense": lam * dense}


def densecl_neck(X: Tensor, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return g [B, D], d [B, D, H * W] and p [B, D] of a map X [B, C, H, W], none normalised.

    weights: `mlp.{0,2}.{weight,bias}` and `mlp2.{0,2}.{weight,bias}`, the latter linear or 1 x 1
    convolutions.
    """
    heads = [_head(weights, "mlp."), _head(weights, "mlp2.")]
    cells = tokens_from_map(X)
    g, d, p = densecl.densecl_neck(F.adaptive_avg_pool2d(X, 1).flatten(1), cells, *heads)
    return g, d.transpose(1, 2), p


def _head(weights: Mapping[str, Tensor], prefix: str) -> nn.Sequential:
    first, last = (weights[f"{prefix}{i}.weight"].flatten(1) for i in (0, 2))
    head = mlp_head(first.shape[1], first.shape[0], last.shape[0]).to(first)
    head.load_state_dict(
        {
            "0.weight": first,
            "0.bias": weights[f"{prefix}0.bias"],
            "2.weight": last,
            "2.bias": weights[f"{prefix}2.bias"],
        }
    )
    return head


def enqueue(queue: Tensor, ptr: int, keys: Tensor) -> int:
    """Write unit keys [M, D] into the columns of queue [D, K] from ptr on; return the new ptr."""
    rows = KeyQueue(1, 1)
    rows.keys, rows.pointer = (
        queue.T,
        torch.tensor(ptr, device=queue.device),
    )  # columns are its rows
    rows.push(keys)
    return int(rows.pointer)
