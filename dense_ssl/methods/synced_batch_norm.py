"""BatchNorm of rows whose batch is that of all ranks.

torch's SyncBatchNorm does the same on CUDA only; this one runs wherever there is a process group, so that
its gradients can be tested without GPUs. On one rank it is torch's BatchNorm1d.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dense_ssl.distributed import all_gather, mean_over_ranks, world_size


class SyncedBatchNorm(nn.BatchNorm1d):
    """BatchNorm of rows [M, C], with batch statistics over the rows of every rank.

    All ranks have equally many rows. Running statistics stay equal on all ranks.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised rows [M, C], in their dtype."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        mean, var = batch_statistics(input)
        with torch.no_grad():
            count = input.shape[0] * world_size()
            self.running_mean.lerp_(mean, self.momentum)  # pyright: ignore
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)  # pyright: ignore
            self.num_batches_tracked.add_(1)  # pyright: ignore[reportOptionalMemberAccess]
        rows = _Normalise.apply(input, self.weight, self.bias, mean, (var + self.eps).rsqrt())
        assert isinstance(rows, Tensor)
        return rows


@torch.no_grad()
def batch_statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance [C] of the rows [M, C] of all ranks, in float32."""
    own = torch.var_mean(rows.float(), dim=0, unbiased=False)
    var, mean = all_gather(torch.stack(own)[None]).unbind(1)  # of each rank
    return mean.mean(0), var.mean(0) + mean.var(0, unbiased=False)


class _Normalise(torch.autograd.Function):
    """(x - mean) / deviation * weight + bias, where mean and deviation are functions of all ranks' x."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, mean, inverse)
        return ((rows.float() - mean) * (inverse * weight) + bias).to(rows.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        rows, weight, mean, inverse = ctx.saved_tensors
        unit, grad = (rows.float() - mean) * inverse, grad.float()
        to_bias, to_weight = grad.sum(0), (grad * unit).sum(0)
        # Of this rank's loss only; the trainer averages parameters' gradients. Those of x need every
        # rank's, since statistics are shared.
        shared = mean_over_ranks(torch.stack([to_bias, to_weight])) / len(rows)
        to_rows = (grad - shared[0] - unit * shared[1]) * (inverse * weight)
        return to_rows.to(rows.dtype), to_weight, to_bias, None, None
