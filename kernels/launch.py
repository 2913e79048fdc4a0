"""Where a kernel runs, and what it may be given.

One call, three places: a CUDA tensor goes to Triton, a CPU tensor to the plain reference, and in tests a
CPU tensor goes to Triton's interpreter. `choose`, or the environment variable DENSE_SSL_KERNELS, says

    auto     Triton on CUDA, the reference on the CPU (the default)
    torch    the reference everywhere
    triton   Triton everywhere: CPU tensors need TRITON_INTERPRET=1, meta tensors are for compiling only
"""

import contextlib
import logging
import os
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.library import CustomOpDef

from kernels.language import INTERPRETED, PRESENT

logger = logging.getLogger("dense_ssl")

Choice = Literal["auto", "torch", "triton"]
VARIABLE = "DENSE_SSL_KERNELS"

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class ChoiceError(ValueError):
    """Kernels were asked to run where they cannot."""


_choice: Choice | None = None  # nobody has chosen or asked yet
_told = False


def choose(choice: Choice, device: torch.device | None = None) -> None:
    """Run the kernels there from now on, in this process; "auto": where the environment says.

    Raises:
        ChoiceError: the environment says something unknown, or Triton cannot run on `device`.
    """
    global _choice
    _choice = _from_environment() if choice == "auto" else choice
    if device is not None and _choice == "triton":
        _require_triton(device)


def _from_environment() -> Choice:
    value = os.environ.get(VARIABLE, "auto")
    if value not in get_args(Choice):
        raise ChoiceError(f"{VARIABLE}={value}: expected one of {', '.join(get_args(Choice))}")
    return value  # pyright: ignore[reportReturnType]


def _current() -> Choice:
    if _choice is None:
        choose("auto")
    assert _choice is not None
    return _choice


def _require_triton(device: torch.device) -> None:
    if not PRESENT:
        raise ChoiceError("run.kernels=triton: triton is not installed; run `make setup`")
    if device.type == "cpu" and not INTERPRETED:
        raise ChoiceError(
            "run.kernels=triton: on a CPU there is only Triton's interpreter, which wants "
            "TRITON_INTERPRET=1 in the environment; or choose run.kernels=auto"
        )


@contextlib.contextmanager
def chosen(choice: Choice) -> Generator[None]:
    """Run the kernels there within the block."""
    before = _current()
    choose(choice)
    try:
        yield
    finally:
        choose(before)


def on_triton(x: Tensor) -> bool:
    """Return whether kernels of x run in Triton. Says once when they cannot although x is on CUDA.

    Raises:
        ChoiceError: they were told to, and cannot.
    """
    global _told
    choice = _current()
    if choice == "torch":
        return False
    if choice == "triton":
        _require_triton(x.device)
        return True
    if x.is_cuda:
        if not PRESENT and not _told:
            _told = True
            logger.warning("triton is not installed: kernels run as plain torch (`make setup`)")
        return PRESENT
    return False


def operator(
    name: str, fake: Callable[..., Any], mutates: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Return a decorator that makes a function of tensors the operator `dense_ssl::name`.

    `fake` returns empty results of the right shapes and dtypes, for torch.compile. Meta tensors reach
    the function itself only where kernels are compiled for a card that is not there.
    """

    def decorate(function: Callable[..., Any]) -> CustomOpDef:
        made = torch.library.custom_op(f"dense_ssl::{name}", function, mutates_args=mutates)

        def shapes(*args: Any) -> Any:
            compiling = _current() == "triton" and not INTERPRETED
            if compiling and any(isinstance(x, Tensor) and x.is_meta for x in args):
                return function(*args)
            return fake(*args)

        made.register_fake(shapes)
        return made

    return decorate


def empty(*shape: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """Return memory for a result beside `like`. Everything a kernel writes comes from here."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which launches go to the GPU of x, whichever is current."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which operations on x keep the dtype of their inputs."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def float32_precision() -> str:
    """Return how tl.dot multiplies float32: as torch was told to by set_float32_matmul_precision."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def check(name: str, shapes: str, good: bool, *tensors: Tensor) -> None:
    """Raise ValueError unless `good` and all tensors share one device and one float dtype.

    Args:
        name: of the kernel.
        shapes: what it expects, for the message.
        good: whether the shapes are right.
        tensors: the floating-point arguments.
    """
    first = tensors[0]
    if not good:
        got = ", ".join(str(tuple(x.shape)) for x in tensors)
        raise ValueError(f"{name}: {shapes} expected, got {got}")
    if any(x.device != first.device for x in tensors):
        got = ", ".join(str(x.device) for x in tensors)
        raise ValueError(f"{name}: all tensors on one device expected, got {got}")
    if any(x.dtype != first.dtype for x in tensors):
        got = ", ".join(str(x.dtype).removeprefix("torch.") for x in tensors)
        raise ValueError(f"{name}: one dtype expected, got {got}")
    if first.dtype not in _FLOATS and (first.dtype != torch.float64 or on_triton(first)):
        raise ValueError(
            f"{name}: float32, bfloat16 or float16 expected, got {first.dtype} "
            "(float64 only by the reference: DENSE_SSL_KERNELS=torch)"
        )


def check_vector(name: str, argument: str, x: Tensor | None, length: int, beside: Tensor) -> None:
    """Raise ValueError unless x is None or [length] in float32 (or the dtype of `beside`) there."""
    if x is None:
        return
    if x.shape != (length,):
        raise ValueError(f"{name}: {argument} [{length}] expected, got {tuple(x.shape)}")
    if x.device != beside.device:
        raise ValueError(f"{name}: {argument} on {beside.device} expected, got {x.device}")
    if x.dtype not in (torch.float32, beside.dtype):
        raise ValueError(f"{name}: {argument} in float32 expected, got {x.dtype}")
