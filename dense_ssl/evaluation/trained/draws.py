"""Numbers drawn from a counter: a training sample depends on its key alone."""

import numpy as np

from dense_ssl.rng import fold_np, uniform_np

_BLOCK = 64  # draws made at a time


class Draws:
    """Numbers of one key, one after the other."""

    def __init__(self, key: np.uint64) -> None:
        self._key, self._blocks = key, 0
        self._left: list[float] = []

    def uniform(self, low: float, high: float) -> float:
        """Return a number in [low, high)."""
        if not self._left:
            block = uniform_np(fold_np(self._key, self._blocks), _BLOCK)
            self._left, self._blocks = block[::-1].tolist(), self._blocks + 1
        return low + (high - low) * self._left.pop()

    def below(self, count: int) -> int:
        """Return one of 0 ... count - 1."""
        return int(self.uniform(0, count))

    def chance(self, probability: float) -> bool:
        """Return true with a probability."""
        return self.uniform(0, 1) < probability
