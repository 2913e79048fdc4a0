"""Triton as the kernels use it: its names, installed or not, and what it does not do alike everywhere.

Where Triton is not installed, `tl` is a stand-in that lets the files be imported; the references run.

The interpreter (TRITON_INTERPRET=1, set before the first import) runs kernels on CPU tensors through
numpy. It has no bf16 arithmetic: a bf16 value is its raw bits there, and rounding to bf16 cuts them off.
`dot` and `rounded` hide the difference; all other arithmetic is done on values loaded as float32.
"""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    triton = None
    tl = SimpleNamespace(constexpr=lambda value: value)  # pyright: ignore

PRESENT = triton is not None
INTERPRETED = PRESENT and os.environ.get("TRITON_INTERPRET") == "1"
LOG2_E = 1.4426950408889634  # exponentials are taken in base 2: exp(x) = exp2(x log2(e))

# For kernels, which may read no other globals
TO_BASE_2 = tl.constexpr(LOG2_E)
TO_BASE_E = tl.constexpr(0.6931471805599453)
_INTERPRETED = tl.constexpr(INTERPRETED)


def jit(function: Callable[..., Any]) -> Any:
    """Return the function as a Triton kernel, or as it is where Triton is not installed."""
    return function if triton is None else triton.jit(function)


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def power_of_two(n: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least n and at least `least`."""
    return max(least, 1 << max(n - 1, 0).bit_length())


@jit
def dot(a, b, PRECISION: tl.constexpr):  # pyright: ignore
    """Return a @ b accumulated in float32; PRECISION is for float32 inputs: "ieee" or "tf32"."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@jit
def rounded(x, dtype: tl.constexpr):  # pyright: ignore
    """Return float32 x in `dtype`, rounded to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        # Not for NaN, whose bits may carry over into the sign: cutting them off keeps it a NaN.
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@jit
def load_rows(X, first, count, stride, d, BLOCK: tl.constexpr, WIDTH: tl.constexpr):  # pyright: ignore
    """Return rows first .. first + BLOCK of X [count, d], [BLOCK, WIDTH]; 0 where there is nothing."""
    rows = first + tl.arange(0, BLOCK)
    columns = tl.arange(0, WIDTH)
    return tl.load(
        X + rows.to(tl.int64)[:, None] * stride + columns[None, :],
        mask=(rows < count)[:, None] & (columns < d)[None, :],
        other=0.0,
    )
