"""Small modules that more than one method has."""

import contextlib
from collections.abc import Generator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dense_ssl.config import UserError

# How linear layers of a head start: as torch's do (MoCo), or Kaiming normal with biases of 0 (OpenSelfSup)
HeadInit = Literal["torch", "kaiming"]


def mlp_head(dim: int, hidden: int, out: int, init: HeadInit = "torch") -> nn.Sequential:
    """Return Linear, ReLU, Linear, all with bias (MoCo-v2's head; on cells it is a 1 x 1 convolution)."""
    head = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out))
    if init == "kaiming":
        for layer in (m for m in head if isinstance(m, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return head


def unit(x: Tensor) -> Tensor:
    """Return x / max(|x|, 1e-12) along the last axis, in float32 whatever the autocast."""
    return F.normalize(x.float(), dim=-1)


class KeyQueue(nn.Module):
    """The K most recent keys, first in first out (MoCo, arXiv:1911.05722, section 3.2).

    Keys are rows [K, D] of unit vectors, kept in `dtype`; at the start they are normalised Gaussian noise.
    """

    keys: Tensor
    pointer: Tensor

    def __init__(self, length: int, dim: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(length, dim), dim=1).to(dtype))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Write keys [M, D] over the oldest ones, wrapping around; M must not exceed K."""
        length = self.keys.shape[0]
        if keys.shape[0] > length:
            raise UserError(
                f"method.queue_length: {length} is shorter than the {keys.shape[0]} keys of one step; "
                "make it at least train.batch_size"
            )
        at = self._places(len(keys))
        self.keys.index_copy_(0, at, keys.to(self.keys.dtype))
        self.pointer.copy_((self.pointer + len(keys)) % length)

    @contextlib.contextmanager
    def as_after(self, keys: Tensor) -> Generator[None]:
        """Hold keys [M, D] within the block as if they had been pushed; leave everything as it was."""
        at = self._places(len(keys))
        before = self.keys[at]
        self.keys.index_copy_(0, at, keys.to(self.keys.dtype))
        try:
            yield
        finally:
            self.keys.index_copy_(0, at, before)

    def _places(self, count: int) -> Tensor:
        """Return where the next `count` keys go, int64."""
        # Computed on the device: reading the pointer back would stall the step.
        return (self.pointer + torch.arange(count, device=self.keys.device)) % len(self.keys)
