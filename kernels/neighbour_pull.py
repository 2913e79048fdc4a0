"""InfoNCE and the pull towards neighbours, from one pass over the queue (arXiv:2106.05967, section 3).

    lse_n  = logsumexp_j  q_n . queue_j / T                        over the queue alone
    nce_n  = log(1 + exp(lse_n - q_n . p_n / T))                   InfoNCE: -log softmax of the positive
    pull_n = lse_n - mean over j in N_n of  q_n . queue_j / T      -mean log softmax of the neighbours

q [N, D] queries, p [N, D] positives, queue [K, D], N_n the neighbours int64 [N, k] of each query, as
`queue_neighbours` finds them. Only q gets a gradient.

lse is the InfoNCE of the queue's first row among the others, plus that row's logit: `queue_info_nce` makes
it and its gradient in its one pass, and neither logits [N, K] nor their log softmax are ever stored, of
which the published sequence of operations keeps about six (168 MB each at N = 640, K = 65536).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import launch
from kernels.queue_info_nce import queue_info_nce
from kernels.spec import KernelSpec


def neighbour_pull(
    q: Tensor, positive: Tensor, queue: Tensor, neighbours: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return InfoNCE and the neighbours' loss of unit queries [N, D], each float32 [N].

    positive is [N, D], queue [K, D] with K > 0, neighbours int64 [N, k]. Gradient to q only.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    fits = q.ndim == queue.ndim == 2 and q.shape == positive.shape
    fits = fits and q.shape[1] == queue.shape[1] and len(queue) > 0
    launch.check(
        "neighbour_pull", "q, positive [N, D] and queue [K, D] with K > 0", fits, q, positive, queue
    )
    right = neighbours.ndim == 2 and len(neighbours) == len(q) and neighbours.dtype == torch.int64
    if not right or neighbours.device != q.device:
        raise ValueError(
            f"neighbour_pull: neighbours int64 [{len(q)}, k] on {q.device} expected, got "
            f"{neighbours.dtype} {tuple(neighbours.shape)} on {neighbours.device}"
        )
    with launch.no_autocast(q):
        return _losses(q, positive.detach(), queue.detach(), neighbours, temperature)


def _losses(
    q: Tensor, positive: Tensor, queue: Tensor, neighbours: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    first = torch.zeros(len(q), dtype=torch.int64, device=q.device)
    rest = queue_info_nce(q, queue[:1], queue[1:], temperature, first)  # of row 0 among the queue
    q, positive, target = (x.to(rest.dtype) for x in (q, positive, queue[neighbours]))
    total = rest + q @ queue[0].to(rest.dtype) / temperature
    nce = F.softplus(total - (q * positive).sum(1) / temperature)
    return nce, total - (q * target.mean(1)).sum(1) / temperature


def reference(
    q: Tensor, positive: Tensor, queue: Tensor, neighbours: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return both losses the plain way, with all logits in memory: the definition of correct."""
    logits = q @ queue.T / temperature
    own = (q * positive).sum(1, keepdim=True) / temperature
    nce = torch.logsumexp(torch.cat([own, logits], dim=1), dim=1) - own[:, 0]
    pull = torch.logsumexp(logits, dim=1) - logits.gather(1, neighbours).mean(1)
    return nce, pull


def eager(
    q: Tensor, positive: Tensor, queue: Tensor, neighbours: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return both losses by the published sequence: logits once for each, log softmax, gather."""
    own = torch.einsum("nc,nc->n", q, positive)[:, None]
    negatives = torch.einsum("nc,kc->nk", q, queue.clone())
    logits = torch.cat([own, negatives], dim=1) / temperature
    target = torch.zeros(len(q), dtype=torch.int64, device=q.device)
    nce = F.cross_entropy(logits, target, reduction="none")
    log_softmax = F.log_softmax(negatives / temperature, dim=1)
    return nce, -torch.gather(log_softmax, 1, neighbours).mean(1)


def _inputs(shape: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    n, k, d = shape["N"], shape["K"], shape["D"]
    q, positive, queue = (F.normalize(torch.randn(rows, d), dim=1) for rows in (n, n, k))
    return {
        "q": (q * shape.get("scale", 1)).to(dtype),
        "positive": positive.to(dtype),
        "queue": queue.to(dtype),
        "neighbours": torch.randint(k, (n, shape["count"])),
        "temperature": shape.get("T", 0.2),
    }


def _bytes(shape: Mapping[str, Any], size: int) -> int:
    n, k, d, count = shape["N"], shape["K"], shape["D"], shape["count"]
    return size * d * (k + 4 * n + n * count) + 8 * n * count + 8 * n


SPEC = KernelSpec(
    name="neighbour_pull",
    call=neighbour_pull,
    reference=reference,
    eager=eager,
    inputs=_inputs,
    small=(
        {"N": 5, "K": 7, "D": 3, "count": 2},
        {"N": 1, "K": 1, "D": 1, "count": 1},
        {"N": 33, "K": 150, "D": 24, "count": 20},
        {"N": 4, "K": 100, "D": 32, "count": 5, "T": 0.01, "scale": 100},
        {"N": 0, "K": 5, "D": 4, "count": 3},
    ),
    real={
        "R50, 32 images, 5 views": {"N": 160, "K": 65536, "D": 128, "count": 20},
        "R50, 128 images, 5 views": {"N": 640, "K": 65536, "D": 128, "count": 20},
    },
    grads=("q",),
    bytes_moved=_bytes,
    flops=lambda shape: 4 * shape["N"] * shape["K"] * shape["D"],
)
