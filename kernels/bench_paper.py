"""What the bench knows without running a kernel: traffic, the time it implies, resources, predictions.

Traffic is counted operation by operation: what each reads and writes, views for nothing, as a GPU without
caches would move it. A kernel's own floor is `KernelSpec.bytes_moved`: every operand once.
"""

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.bench_measure import tensors
from kernels.bench_place import CARDS
from kernels.language import PRESENT
from kernels.spec import Arguments, KernelSpec, Shape

if TYPE_CHECKING:
    from kernels.ahead import Resources

PREDICTIONS = Path(__file__).with_name("predictions.csv")

# What a reduced shape may cost the eager sequence on a CPU: well under a second of one core.
CPU_BYTES = 500_000_000
CPU_FLOPS = 2_000_000_000
SEQUENCE = 20  # times the bytes of a kernel, where its eager sequence cannot be counted
COUNTED = ("N", "M", "B", "blurred")  # axes that count rows or images: the ones to shorten


@dataclass(frozen=True)
class Prediction:
    """Milliseconds of one provider, reckoned before anything was measured."""

    kernel: str
    shape: str
    card: str
    provider: str
    at_peaks_ms: float
    likely_ms: float | None


def predictions() -> list[Prediction]:
    """Return the rows of predictions.csv."""
    with PREDICTIONS.open() as file:
        rows = list(csv.reader(line for line in file if not line.startswith("#")))
    return [
        Prediction(kernel, shape, card, provider, float(peaks), float(likely) if likely else None)
        for kernel, shape, card, provider, peaks, likely in rows[1:]
    ]


# Traffic


class _Traffic(TorchDispatchMode):
    """Adds up what every operation reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        views = any(x.alias_info and not x.alias_info.is_write for x in func._schema.returns)
        if not views and not name.startswith("aten::empty"):
            self.operations += 1
            self.bytes += sum(_size(x) for x in tree_leaves((args, kwargs, out)))
        return out


def _size(x: object) -> int:
    if not isinstance(x, Tensor):
        return 0
    whole = x.untyped_storage().nbytes()
    return min(x.numel() * x.element_size(), whole)  # of an expanded tensor what is there


def traffic(
    spec: KernelSpec, shape: Shape, dtype: torch.dtype, function: Callable[..., Any] | None = None
) -> tuple[int, int] | None:
    """Return bytes and operations of the eager sequence, or of `function`, backward pass included.

    Nothing is computed: the tensors are on the meta device. None where the sequence looks at values.
    """
    given = meta_arguments(spec, shape, dtype)
    try:
        with _Traffic() as seen:
            pass_over(function or spec.eager, spec, given)
    except (RuntimeError, NotImplementedError):
        return None
    return seen.bytes, seen.operations


def meta_arguments(spec: KernelSpec, shape: Shape, dtype: torch.dtype) -> Arguments:
    """Return arguments without values, at no cost whatever the shape."""
    with torch.device("meta"):
        given = spec.inputs(shape, dtype)
    for name in spec.grads:
        given[name] = given[name].detach().requires_grad_()
    return given


def pass_over(function: Callable[..., Any], spec: KernelSpec, given: Arguments) -> None:
    """Run forward and, where something has a gradient, backward."""
    losses = [x for x in tensors(function(**given)) if x.requires_grad]
    if losses:
        graded = [given[name] for name in spec.grads]
        torch.autograd.grad(losses, graded, [torch.ones_like(x) for x in losses], allow_unused=True)


def reduced(spec: KernelSpec, shape: Shape, dtype: torch.dtype) -> Shape:
    """Return the shape with rows and images halved until a CPU does the eager sequence quickly."""

    def cost(shape: Shape) -> int:
        counted = traffic(spec, shape, dtype)
        return counted[0] if counted else SEQUENCE * moved_by(spec, shape, dtype)

    while cost(shape) > CPU_BYTES or flops_of(spec, shape) > CPU_FLOPS:
        halved = {k: max(v // 2, 1) if k in COUNTED else v for k, v in shape.items()}
        lighter = cost(shape) > CPU_BYTES and cost(halved) <= 0.75 * cost(shape)
        quicker = flops_of(spec, shape) > CPU_FLOPS and flops_of(spec, halved) < flops_of(
            spec, shape
        )
        if not (lighter or quicker):  # what is left does not depend on the number of rows
            break
        shape = halved
    return shape


def moved_by(spec: KernelSpec, shape: Shape, dtype: torch.dtype) -> int:
    """Return the bytes the kernel must move, 0 where its spec does not say."""
    return spec.bytes_moved(shape, dtype.itemsize) if spec.bytes_moved else 0


def flops_of(spec: KernelSpec, shape: Shape) -> int:
    """Return the operations of its matrix products."""
    return spec.flops(shape) if spec.flops else 0


# Resources


def resources(specs: Iterable[KernelSpec]) -> list[tuple[str, "Resources"]]:
    """Return what every launch of every real shape, forward and backward, takes on the two cards.

    Empty where Triton is not installed.
    """
    if not PRESENT:
        return []
    from kernels.ahead import compile_only

    found: list[tuple[str, Resources]] = []
    for spec in specs:
        for card in CARDS:
            with compile_only(card.sm) as launches:
                for shape in spec.real.values():
                    given = meta_arguments(spec, shape, spec.bench_dtype)
                    pass_over(spec.call, spec, given)
            found += [(spec.name, launch) for launch in launches]
    return found
