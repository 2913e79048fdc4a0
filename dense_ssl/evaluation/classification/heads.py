"""Linear classifiers trained side by side on the same features, each with its own optimiser."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dense_ssl.distributed import mean_over_ranks

_MOMENTUM = 0.9
_TRUST = 0.001  # of LARS (arXiv:1708.03888), as DINO's code has it


@dataclass(frozen=True, slots=True)
class Rule:
    """How one classifier is trained."""

    lr: float
    weight_decay: float = 0.0
    optimizer: Literal["sgd", "lars"] = "sgd"


class Heads:
    """L linear classifiers side by side, each with its own rule; one pass trains all."""

    def __init__(
        self, rules: Sequence[Rule], classes: int, dim: int, *, seed: int, device: torch.device
    ) -> None:
        """Start all from the same weights."""
        generator = torch.Generator().manual_seed(seed)
        weight = 0.01 * torch.randn(classes, dim, generator=generator)
        self.weight = weight.expand(len(rules), -1, -1).to(device).contiguous()  # [L, C, D]
        self.bias = torch.zeros(len(rules), classes, device=device)
        self._lr = torch.tensor([rule.lr for rule in rules], device=device)
        self._decay = torch.tensor([rule.weight_decay for rule in rules], device=device)
        self._lars = torch.tensor([rule.optimizer == "lars" for rule in rules], device=device)
        self._plain = not (self._decay.any() or self._lars.any())
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
            update = mean_over_ranks(gradient)
            if not self._plain:
                update = self._ruled(value, update)
            momentum.mul_(_MOMENTUM).add_(update)
            rates = factor * self._lr.view(-1, *(1,) * (value.dim() - 1))
            value.sub_(rates * momentum)

    def _ruled(self, value: Tensor, gradient: Tensor) -> Tensor:
        """The gradient with weight decay and, for LARS, in proportion to the weights.

        Neither is for biases under LARS; SGD decays them, as torch's does.
        """
        if value.dim() == 2:
            decay = self._decay.masked_fill(self._lars, 0)
            return gradient + decay[:, None] * value
        update = gradient + self._decay[:, None, None] * value
        norms = value.flatten(1).norm(dim=1), update.flatten(1).norm(dim=1)  # of each classifier
        usable = self._lars & (norms[0] > 0) & (norms[1] > 0)
        trust = torch.where(usable, _TRUST * norms[0] / norms[1], 1.0)
        return trust[:, None, None] * update

    def state(self) -> dict[str, Tensor]:
        """Return all that training goes on from."""
        names = ("weight", "bias", "weight_momentum", "bias_momentum")
        return dict(zip(names, (self.weight, self.bias, *self._momenta), strict=True))

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from `state`."""
        for name, value in self.state().items():
            value.copy_(state[name])
