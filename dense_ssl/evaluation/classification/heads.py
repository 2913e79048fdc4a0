"""Linear classifiers trained side by side on the same features, each with its own learning rate."""

import torch
from torch import Tensor
from torch.nn import functional as F

from dense_ssl.distributed import mean_over_ranks

_MOMENTUM = 0.9


class Heads:
    """L linear classifiers side by side, each with its own learning rate; one pass trains all."""

    def __init__(self, lr: Tensor, classes: int, dim: int, seed: int) -> None:
        """Start all from the same weights; `lr` [L]."""
        generator = torch.Generator().manual_seed(seed)
        weight = 0.01 * torch.randn(classes, dim, generator=generator)
        self.weight = weight.expand(len(lr), -1, -1).to(lr.device).contiguous()  # [L, C, D]
        self.bias = torch.zeros(len(lr), classes, device=lr.device)
        self._lr = lr
        self._momenta = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]

    def scores(self, x: Tensor) -> Tensor:
        """Return class scores [L, B, C] of features [B, D]."""
        return torch.baddbmm(
            self.bias[:, None], x.expand(len(self._lr), -1, -1), self.weight.transpose(1, 2)
        )

    @torch.no_grad()
    def step(self, x: Tensor, labels: Tensor, factor: float) -> None:
        """Take one step of SGD on the mean cross-entropy over all ranks, with `factor` times each rate.

        The gradient of cross-entropy by the scores is softmax - one-hot, so none is recorded.
        """
        errors = self.scores(x).softmax(2)
        errors -= F.one_hot(labels, errors.shape[2])
        errors /= len(x)
        gradients = [errors.transpose(1, 2) @ x, errors.sum(1)]  # [L, C, D], [L, C]
        for value, gradient, momentum in zip((self.weight, self.bias), gradients, self._momenta):
            momentum.mul_(_MOMENTUM).add_(mean_over_ranks(gradient))
            rates = factor * self._lr.view(-1, *(1,) * (value.dim() - 1))
            value.sub_(rates * momentum)

    def state(self) -> dict[str, Tensor]:
        """Return all that training goes on from."""
        names = ("weight", "bias", "weight_momentum", "bias_momentum")
        return dict(zip(names, (self.weight, self.bias, *self._momenta), strict=True))

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from `state`."""
        for name, value in self.state().items():
            value.copy_(state[name])
