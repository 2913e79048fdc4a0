"""Every kernel against float64 of its own reference, wherever it runs.

Plainly on a CPU this checks the references behind the operators; with TRITON_INTERPRET=1 and
DENSE_SSL_KERNELS=triton (`make test` does both) the Triton code, in the interpreter; on a CUDA machine the
compiled kernels.
"""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import launch
from kernels.catalogue import ALL
from kernels.language import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
GUARD = 64  # elements of NaN before and after every buffer

CASES = [
    pytest.param(spec, shape, dtype, id=f"{spec.name}-{number}-{str(dtype)[6:]}")
    for spec in ALL.values()
    for number, shape in enumerate(spec.small)
    for dtype in spec.dtypes
]
GRADED = [pytest.param(spec, id=spec.name) for spec in ALL.values() if spec.grads and spec.small]
EVERY = [pytest.param(spec, id=spec.name) for spec in ALL.values() if spec.small]


def arguments(spec, shape, dtype):
    with torch.device(DEVICE):
        return spec.inputs(shape, dtype)


def tensors(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def graded(spec, function, given):
    """Outputs, and gradients of a random but fixed mixture of the differentiable ones."""
    given = dict(given)
    for name in spec.grads:
        given[name] = given[name].detach().requires_grad_()
    out = tensors(function(**given))
    mixed = [x for x in out if x.requires_grad]
    if not mixed:
        return [x.detach() for x in out], []
    total = 0
    for x in mixed:
        weights = torch.linspace(0.5, 1.5, x.numel(), dtype=torch.float64, device=x.device)
        total = total + (x.double() * weights.view(x.shape)).sum()
    total.backward()
    return [x.detach() for x in out], [given[name].grad for name in spec.grads]


def in_dtype(given, dtype):
    return {
        name: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in given.items()
    }


def assert_close(got, torch_own, exact, tolerance, what):
    if not exact.is_floating_point():
        assert torch.equal(got, exact), what
        return
    assert got.isfinite().all() or not exact.isfinite().all(), f"{what}: not finite"
    error, own = (got.double() - exact).norm(), (torch_own.double() - exact).norm()
    own = own if own.isfinite() else torch.zeros_like(own)  # float16 overflows where we do not
    scale = max(float(exact.norm()), 1e-6 * exact.numel() ** 0.5)
    assert error <= own + tolerance * scale, f"{what}: {error / scale:.1e}, torch {own / scale:.1e}"


@pytest.mark.parametrize(("spec", "shape", "dtype"), CASES)
def test_errs_no_more_than_torch_in_the_same_dtype(spec, shape, dtype):
    given = arguments(spec, shape, dtype)
    exact, exact_grads = graded(spec, spec.reference, in_dtype(given, torch.float64))
    own, own_grads = graded(spec, spec.reference, given)
    got, got_grads = graded(spec, spec.call, given)
    forward, backward = spec.tolerance[dtype]
    for number, (a, b, c) in enumerate(zip(got, own, exact, strict=True)):
        assert_close(a, b, c, forward, f"output {number}")
    for name, a, b, c in zip(spec.grads, got_grads, own_grads, exact_grads):
        assert_close(a, b, c, backward, f"gradient of {name}")


@pytest.mark.parametrize("spec", EVERY)
def test_the_published_sequence_of_operations_gives_the_same(spec):
    given = in_dtype(arguments(spec, spec.small[0], torch.float32), torch.float64)
    ours = spec.published(spec.reference(**given), given)
    for a, b in zip(tensors(spec.eager(**given)), tensors(ours), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spec", EVERY)
def test_repeats_itself_to_the_bit_and_reads_nothing_beside_its_inputs(spec, monkeypatch):
    """Once plainly; once with inputs and results in the middle of NaN, and nothing past the ends."""
    shape = spec.small[min(3, len(spec.small) - 1)]
    given = arguments(spec, shape, torch.float32)
    want, want_grads = graded(spec, spec.call, given)
    made = []

    def guarded_empty(*shape, dtype, like):
        inner = guard(torch.zeros(shape, dtype=dtype, device=like.device), made)
        inner.view(torch.uint8).fill_(0xFF)  # NaN: what a kernel leaves unwritten is seen
        return inner

    monkeypatch.setattr(launch, "empty", guarded_empty)
    fenced = {
        name: guard(x, made) if isinstance(x, torch.Tensor) and x.ndim else x
        for name, x in given.items()
    }
    got, got_grads = graded(spec, spec.call, fenced)
    for a, b in zip([*got, *got_grads], [*want, *want_grads], strict=True):
        assert torch.equal(a, b)
    for around, filled in made:
        assert torch.equal(around[:GUARD], filled[:GUARD])
        assert torch.equal(around[-GUARD:], filled[-GUARD:])


def guard(x, made):
    """A copy of x with GUARD bytes of poison on both sides; `made` remembers them."""
    size = x.element_size()
    around = torch.full((2 * GUARD + x.numel() * size,), 0xFF, dtype=torch.uint8, device=x.device)
    made.append((around, around.clone()))
    inner = around[GUARD : GUARD + x.numel() * size].view(x.dtype).view(x.shape)
    inner.copy_(x)
    return inner


@pytest.mark.parametrize("spec", EVERY)
def test_strided_inputs_give_what_contiguous_ones_give(spec):
    given = arguments(spec, spec.small[0], torch.float32)
    want, want_grads = graded(spec, spec.call, given)
    strided = {
        name: x.repeat_interleave(2, -1)[..., ::2]
        if isinstance(x, torch.Tensor) and x.ndim > 1
        else x
        for name, x in given.items()
    }
    got, got_grads = graded(spec, spec.call, strided)
    for a, b in zip([*got, *got_grads], [*want, *want_grads], strict=True):
        # Rounding: without AVX2 a product of strided factors is summed in another order.
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6 * max(float(b.abs().max()), 0.1))


@pytest.mark.parametrize("spec", GRADED)
def test_every_choice_of_gradients(spec):
    """Each differentiable argument alone gets the gradient it gets along with the others."""
    given = arguments(spec, spec.small[0], torch.float32)
    _, want = graded(spec, spec.call, given)
    for name, whole in zip(spec.grads, want):
        only = dataclasses.replace(spec, grads=(name,))
        out, (got,) = graded(only, spec.call, given)
        assert torch.allclose(got, whole, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        quiet = tensors(spec.call(**given))
    for a, b in zip(quiet, out):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("spec", GRADED)
@pytest.mark.skipif(INTERPRETED, reason="float64 runs in the reference")
def test_gradients_are_those_of_finite_differences(spec):
    given = in_dtype(arguments(spec, spec.small[0], torch.float32), torch.float64)
    asked = [given[name].requires_grad_() for name in spec.grads]

    def call(*values):
        with launch.chosen("torch"):
            out = tensors(spec.call(**{**given, **dict(zip(spec.grads, values))}))
        return tuple(x for x in out if x.requires_grad)

    assert torch.autograd.gradcheck(call, asked)


class Recorder(TorchDispatchMode):
    """Remembers every call of an operator of ours."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "dense_ssl":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the checker's own
@pytest.mark.parametrize("spec", EVERY)
def test_the_operators_keep_their_contracts(spec):
    """Schema, fake results, autograd registration and compiled autograd, by torch's own checker."""
    given = arguments(spec, spec.small[0], torch.float32)
    with Recorder() as recorder:
        graded(spec, spec.call, given)
    assert recorder.calls, "no operator was called"
    graded_at = {given[name].data_ptr() for name in spec.grads}

    def fresh(x):
        if not isinstance(x, torch.Tensor):
            return x
        # Only what the forward operator differentiates: gradient operators have no second derivative
        forward = function is recorder.calls[0][0] and x.data_ptr() in graded_at
        return x.detach().clone().requires_grad_(forward)

    for function, args in recorder.calls:
        torch.library.opcheck(function, tuple(fresh(x) for x in args))


@pytest.mark.parametrize("spec", EVERY)
def test_compiles_into_one_graph(spec):
    given = arguments(spec, spec.small[0], torch.float32)
    want, want_grads = graded(spec, spec.call, given)
    compiled = torch.compile(spec.call, fullgraph=True, backend="aot_eager")
    got, got_grads = graded(spec, compiled, given)
    for a, b in zip([*got, *got_grads], [*want, *want_grads], strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("spec", EVERY)
def test_autocast_changes_nothing(spec):
    given = arguments(spec, spec.small[0], torch.float32)
    want, _ = graded(spec, spec.call, given)
    with torch.autocast(DEVICE, torch.bfloat16):
        got, _ = graded(spec, spec.call, given)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("spec", EVERY)
def test_wrong_arguments_are_one_sentence(spec):
    given = arguments(spec, spec.small[0], torch.float32)
    name, x = next((n, x) for n, x in given.items() if isinstance(x, torch.Tensor))
    with pytest.raises(ValueError, match=f"^{spec.name}: .* expected, got"):
        spec.call(**{**given, name: x[None]})
    with pytest.raises(ValueError, match=f"^{spec.name}: .* expected, got"):
        spec.call(**{**given, name: x.to(torch.complex64)})
