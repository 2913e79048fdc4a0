"""InfoNCE against a negative queue, without the [N, K + 1] logits.

    loss_n = logsumexp([q_n . p_n, q_n . queue_1, ..., q_n . queue_K] / T) - q_n . p_n / T

q [N, D] queries, p [N, D] positives, queue [K, D] negatives, all unit vectors. Only q gets a gradient:

    dloss_n / dq_n = (sum_j softmax_j key_j - p_n) / T

The gradient is attention with the queue as keys and values, so the forward pass computes it along with
the loss and saves [N, D]; the backward pass multiplies by the incoming [N]. One block of the queue is in
memory at a time: at N = 1568 (32 images x 49 cells), K = 65536 the logits alone would be 411 MB.
"""

import torch
from torch import Tensor

BLOCK = 8192  # queue rows per block: [1568, 8192] float32 is 51 MB


def reference(q: Tensor, positive: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Return loss [N] the plain way, with all logits in memory: the definition of correct."""
    positive_logit = (q * positive).sum(1, keepdim=True)
    logits = torch.cat([positive_logit, q @ queue.T], dim=1) / temperature
    return torch.logsumexp(logits, dim=1) - logits[:, 0]


class _QueueInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: torch.autograd.function.FunctionCtx,
        q: Tensor,
        positive: Tensor,
        queue: Tensor,
        temperature: float,
    ) -> Tensor:
        logit = (q * positive).sum(1) / temperature  # [N]
        top = logit.clone()  # running maximum, so that no exponential overflows
        total = torch.ones_like(logit)  # sum of exp(logit - top)
        mixed = positive.clone()  # sum of exp(logit - top) * key, [N, D]
        for block in queue.split(BLOCK):
            logits = (q @ block.T).div_(temperature)
            new_top = torch.maximum(top, logits.amax(1))
            weights = logits.sub_(new_top[:, None]).exp_()
            shrink = torch.exp(top - new_top)
            total = total * shrink + weights.sum(1)
            mixed = mixed * shrink[:, None] + weights @ block
            top = new_top
        ctx.save_for_backward((mixed / total[:, None] - positive) / temperature)
        return top + torch.log(total) - logit

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        return grad[:, None] * gradient, None, None, None


def queue_info_nce(q: Tensor, positive: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Return the InfoNCE loss [N] of unit queries [N, D] with gradient to q only.

    Raises:
        ValueError: shapes do not fit, or a tensor is neither float32 nor float64.
    """
    if q.ndim != 2 or q.shape != positive.shape or queue.ndim != 2 or queue.shape[1] != q.shape[1]:
        raise ValueError(
            f"queue_info_nce: q [N, D], positive [N, D], queue [K, D] expected, got "
            f"{tuple(q.shape)}, {tuple(positive.shape)}, {tuple(queue.shape)}"
        )
    if q.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"queue_info_nce: float32 or float64 expected, got {q.dtype}")
    with torch.autocast(q.device.type, enabled=False):
        return _QueueInfoNCE.apply(q, positive, queue, temperature)  # pyright: ignore
