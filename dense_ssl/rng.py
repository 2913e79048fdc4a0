"""Counter-based randomness: every draw is a pure function of its key, so nothing needs an RNG state.

Boxes and photometric parameters are keyed by (seed, stream, epoch, image index, view). Ranks, subsets,
loaders and resumed runs agree without talking to each other, and a checkpoint holds no generator.

The mixing function is splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
generators"). The numba functions serve the loops of `views`; the numpy ones serve whole arrays.
Both give the same bits.
"""

import numba as nb
import numpy as np

GAMMA = 0x9E3779B97F4A7C15
_M1 = 0xBF58476D1CE4E5B9
_M2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1
_TO_UNIT = 2.0**-53


@nb.njit(inline="always")
def mix(x):  # noqa: ANN001, ANN201  (numba: uint64 -> uint64)
    """Return the splitmix64 output function of a 64-bit state."""
    x = np.uint64(x + np.uint64(GAMMA))
    x = np.uint64((x ^ (x >> np.uint64(30))) * np.uint64(_M1))
    x = np.uint64((x ^ (x >> np.uint64(27))) * np.uint64(_M2))
    return np.uint64(x ^ (x >> np.uint64(31)))


@nb.njit(inline="always")
def fold(key, value):  # noqa: ANN001, ANN201  (numba: uint64, integer -> uint64)
    """Return the key of child `value` below `key`."""
    return mix(np.uint64(key ^ mix(np.uint64(value))))


@nb.njit(inline="always")
def uniform(key, counter):  # noqa: ANN001, ANN201  (numba: uint64, integer -> float64)
    """Return draw number `counter` of a key, uniform in [0, 1) with 53 bits."""
    bits = mix(np.uint64(key + np.uint64(counter) * np.uint64(GAMMA)))
    return np.float64(bits >> np.uint64(11)) * _TO_UNIT


def mix_np(x: np.ndarray) -> np.ndarray:
    """Return `mix` of every element of a uint64 array."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(GAMMA)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(_M1)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(_M2)
        return x ^ (x >> np.uint64(31))


def fold_np(key: np.ndarray | np.uint64, value: np.ndarray | int) -> np.ndarray:
    """Return `fold` for arrays of keys and values (broadcast)."""
    child = np.asarray(value).astype(np.int64).astype(np.uint64)
    return mix_np(np.asarray(key, dtype=np.uint64) ^ mix_np(child))


def uniform_np(key: np.ndarray, count: int) -> np.ndarray:
    """Return draws 0 .. count-1 of every key, float64 [..., count] in [0, 1)."""
    counters = np.arange(count, dtype=np.uint64) * np.uint64(GAMMA)
    with np.errstate(over="ignore"):
        bits = mix_np(np.asarray(key, dtype=np.uint64)[..., None] + counters)
    return (bits >> np.uint64(11)).astype(np.float64) * _TO_UNIT


def key_of(*parts: int) -> np.uint64:
    """Return the key below a sequence of integers, for example `key_of(seed, STREAM, epoch)`."""
    key = np.zeros((), dtype=np.uint64)
    for part in parts:
        key = fold_np(key, part)
    return np.uint64(key)
