"""How the bench measures one provider of one kernel: milliseconds, peak memory, error.

On CUDA: `triton.testing.do_bench`, which overwrites a buffer larger than the L2 cache before every run,
and the caching allocator's peak. On a CPU: wall time, and the peak of what torch's allocator hands out
(seen by torch's profiler, so compiled code and scratch memory count as well). Memory is what is allocated
above the inputs, results and gradients included.
"""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kernels import launch
from kernels.spec import Arguments, KernelSpec, Shape, relative_error

QUANTILES = (0.2, 0.5, 0.8)
CPU_SECONDS = 0.2  # of repetitions at least, and at least CPU_RUNS of them
CPU_RUNS = 5
CPU_PATIENCE = 2.0  # seconds after which a slow provider is not repeated any more
SEED = 0

Quantiles = tuple[float, float, float]
# What a provider makes of a kernel's arguments: a call without arguments, ready to be repeated
Bound = Callable[[], Any]


@dataclass(frozen=True)
class Measured:
    """One provider on one shape. Milliseconds by mode: forward, and with gradients backward and full."""

    ms: dict[str, Quantiles] = field(default_factory=dict)
    peak: int | None = None  # bytes above the inputs, forward and backward
    error: float | None = None  # against the reference in float64
    absent: str | None = None  # why nothing was measured
    remark: str = ""  # how this measurement differs from the others

    @property
    def whole(self) -> float | None:
        """Median milliseconds of all there is to do: full, or forward where nothing has a gradient."""
        found = self.ms.get("full") or self.ms.get("forward")
        return found[1] if found else None


def arguments(spec: KernelSpec, shape: Shape, dtype: torch.dtype, device: str) -> Arguments:
    """Return the same random arguments for every provider, those with gradients asking for them."""
    torch.manual_seed(SEED)
    with torch.device(device):
        given = spec.inputs(shape, dtype)
    for name in spec.grads:
        given[name] = given[name].detach().requires_grad_()
    return given


def exact(spec: KernelSpec, given: Arguments) -> dict[str, list[Tensor]]:
    """Return in float64 what the kernel returns ("kernel") and what the eager sequence does ("eager").

    Floating-point results only; empty where they do not fit into memory.
    """
    widened = {name: _widened(x) for name, x in given.items()}
    try:
        with launch.chosen("torch"), torch.no_grad():
            result = spec.reference(**widened)
            found = {"kernel": result, "eager": spec.published(result, widened)}
    except torch.OutOfMemoryError:
        return {}
    return {
        name: [x.double() for x in tensors(of) if x.is_floating_point()]
        for name, of in found.items()
    }


def _widened(x: Any) -> Any:
    """Return floating-point tensors in float64, and so the name of such a type."""
    if isinstance(x, torch.dtype):
        return torch.float64 if x.is_floating_point else x
    return x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x


def measure(run: Bound, graded: list[Tensor], want: list[Tensor] | None) -> Measured:
    """Return times, memory and error of `run`, whose results have gradients to `graded`.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    out = run()  # compiles, tunes and fills caches
    error = None if want is None else _error(tensors(out), want)
    device = tensors(out)[0].device
    differentiable = bool(graded) and any(x.requires_grad for x in tensors(out))
    del out
    if not differentiable:
        graded = []
    remark = ""
    if device.type == "cuda":
        times, remark = _cuda_times(run, graded)
    else:
        times = _cpu_times(run, graded)
    return Measured(times, peak_bytes(lambda: _whole(run, graded), device), error, remark=remark)


def peak_bytes(run: Bound, device: torch.device) -> int:
    """Return the most bytes that torch's allocator has given out at a time during one run."""
    if device.type != "cuda":
        return _cpu_peak(run)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def tensors(result: Any) -> list[Tensor]:
    """Return the tensors of a result: itself, or those of a sequence."""
    if isinstance(result, Tensor):
        return [result]
    return [x for x in result if isinstance(x, Tensor)]


def _error(out: list[Tensor], want: list[Tensor]) -> float | None:
    """Return the largest relative error; a scalar is taken for the sum of the first result."""
    got = [x.detach() for x in out if x.is_floating_point()]
    if got and want and got[0].ndim == 0 and want[0].ndim:
        return relative_error(got[0], want[0].sum())
    if [x.shape for x in got] != [x.shape for x in want]:
        return None
    return max((relative_error(a, b) for a, b in zip(got, want, strict=True)), default=None)


def _losses(out: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return the results that have gradients, and the ones that come in for them."""
    losses = [x for x in tensors(out) if x.requires_grad]
    return losses, [torch.ones_like(x) for x in losses]


def _whole(run: Bound, graded: list[Tensor]) -> Any:
    """Run forward and, where there are gradients, backward; results live as long as those of both."""
    out = run()
    if graded:
        _backward(out, graded)
    return out


def _backward(out: Any, graded: Iterable[Tensor]) -> None:
    losses, ones = _losses(out)
    torch.autograd.grad(losses, list(graded), ones, allow_unused=True)


# CUDA


def _cuda_times(run: Bound, graded: list[Tensor]) -> tuple[dict[str, Quantiles], str]:
    """Return times by mode, and a remark where they were not measured alike."""
    from triton.testing import do_bench

    def timed(function: Callable[[], Any]) -> Quantiles:
        low, middle, high = do_bench(function, quantiles=list(QUANTILES))  # pyright: ignore
        return low, middle, high

    forward = timed(run)
    if not graded:
        return {"forward": forward}, ""
    full = timed(lambda: _backward(run(), graded))
    losses, ones = _losses(run())
    try:
        backward = timed(
            lambda: torch.autograd.grad(losses, graded, ones, retain_graph=True, allow_unused=True)
        )
        remark = ""
    except RuntimeError as problem:
        if isinstance(problem, torch.OutOfMemoryError):
            raise
        # Some overwrite what they saved: their backward pass runs only once.
        low, middle, high = (max(a - b, 0.0) for a, b in zip(full, forward, strict=True))
        backward, remark = (low, middle, high), "backward is full less forward: it runs only once"
    return {"forward": forward, "backward": backward, "full": full}, remark


# CPU


def _cpu_times(run: Bound, graded: list[Tensor]) -> dict[str, Quantiles]:
    forward: list[float] = []
    backward: list[float] = []
    if graded:
        _backward(run(), graded)  # compiles
    begin = time.perf_counter()

    def goes_on() -> bool:
        spent = time.perf_counter() - begin
        return spent < CPU_SECONDS or (len(forward) < CPU_RUNS and spent < CPU_PATIENCE)

    while not forward or goes_on():
        start = time.perf_counter()
        out = run()
        middle = time.perf_counter()
        if graded:
            _backward(out, graded)
            backward.append(1000 * (time.perf_counter() - middle))
        forward.append(1000 * (middle - start))
    found = {"forward": _quantiles(forward)}
    if graded:
        found["backward"] = _quantiles(backward)
        found["full"] = _quantiles([a + b for a, b in zip(forward, backward, strict=True)])
    return found


def _quantiles(values: list[float]) -> Quantiles:
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor(QUANTILES, dtype=torch.float64)
    )
    return float(low), float(middle), float(high)


def _cpu_peak(run: Bound) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    results: Any = seen.profiler and seen.profiler.kineto_results
    events = [e for e in results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
