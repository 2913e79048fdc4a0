"""What a kernel says about itself, so that one test file and one bench serve them all.

A shape is a dict of the axis lengths (and other numbers) that `inputs` needs. `small` shapes are for
correctness: ragged, tiny, empty. `real` shapes are those of the recipes, by name, for the bench and for
compiling ahead of time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Shape = Mapping[str, Any]
Arguments = dict[str, Any]
# (shape, dtype of the inputs) -> the keyword arguments of `call`, random, on the current default device
Inputs = Callable[[Shape, torch.dtype], Arguments]


@dataclass(frozen=True)
class KernelSpec:
    """One fused operation."""

    name: str
    call: Callable[..., Any]  # the public function
    reference: Callable[
        ..., Any
    ]  # the same, plainly, in any float dtype: the definition of correct
    eager: Callable[..., Any]  # the operations of the published code: what the bench compares with
    inputs: Inputs
    small: tuple[Shape, ...]
    real: Mapping[str, Shape]
    grads: tuple[str, ...] = ()  # arguments that get a gradient
    bytes_moved: Callable[[Shape, int], int] | None = None  # at least, given bytes an element
    flops: Callable[[Shape], int] | None = None  # of matrix products
    # (result, arguments) -> what `eager` returns, where that is not the result itself
    published: Callable[[Any, Arguments], Any] = lambda result, _: result
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    bench_dtype: torch.dtype = torch.bfloat16
    wide_loads: bool = True  # its launches can load 16 bytes at a time, and have to
    # Relative error against float64 of the same, already rounded, inputs that is allowed on top of
    # torch's own error: {dtype: (output, gradient)}.
    tolerance: Mapping[torch.dtype, tuple[float, float]] = field(
        default_factory=lambda: {
            torch.float32: (1e-6, 2e-6),
            torch.bfloat16: (1e-3, 3e-3),
            torch.float16: (1e-3, 1e-3),
        }
    )


def relative_error(out: Tensor, exact: Tensor) -> float:
    """Return ||out - exact|| / ||exact||, 0 where both are empty or equal."""
    difference = (out.double() - exact.double()).norm()
    return 0.0 if difference == 0 else float(difference / exact.double().norm().clamp_min(1e-30))
