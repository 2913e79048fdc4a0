"""What only a CUDA device shows: real shapes, offsets past 2^31, peak memory, repeated launches."""

import pytest
import torch

from kernels.catalogue import ALL
from kernels.language import INTERPRETED
from kernels.prototype_cross_entropy import prototype_cross_entropy
from kernels.queue_info_nce import queue_info_nce
from kernels.soft_cross_entropy import soft_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED, reason="the interpreter is on"),
]


def at(spec, shape, dtype):
    torch.manual_seed(0)
    with torch.device("cuda"):
        given = spec.inputs(shape, dtype)
    for name in spec.grads:
        given[name].requires_grad_()
    return given


@pytest.mark.parametrize("name", ALL)
def test_two_launches_at_real_shapes_are_equal_to_the_bit(name):
    spec = ALL[name]
    shape = next(iter(spec.real.values()))
    results = []
    for _ in range(2):
        given = at(spec, {**shape, "inplace": False}, spec.bench_dtype)
        out = spec.call(**given)
        out = [out] if isinstance(out, torch.Tensor) else list(out)
        if spec.grads:
            out[0].sum().backward()
        results.append([*out, *(given[name].grad for name in spec.grads)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_offsets_past_two_to_the_31():
    n, k = 2**15 + 8, 2**16 + 64
    student = torch.zeros(n, k, dtype=torch.bfloat16, device="cuda")
    student[-1, -1] = 5
    teacher = torch.zeros_like(student)
    teacher[-1, -1] = 5
    student.requires_grad_()
    loss = soft_cross_entropy(student, teacher, None, 1.0, 1.0)
    uniform = torch.log(torch.tensor(float(k)))
    assert torch.allclose(loss[:-1].cpu(), uniform.expand(n - 1), rtol=1e-4)
    rest = torch.log(k - 1 + torch.exp(torch.tensor(5.0)))
    share = torch.exp(5 - rest)
    assert torch.allclose(loss[-1].cpu(), rest - 5 * share, rtol=1e-4)


def test_what_must_not_exist_does_not():
    q, keys = (torch.nn.functional.normalize(torch.randn(m, 128, device="cuda"), dim=1)
               for m in (12544, 65536))  # fmt: skip
    q = q.bfloat16().requires_grad_()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    queue_info_nce(q, q.detach(), keys.bfloat16(), 0.2).sum().backward()
    logits = 12544 * 65536 * 2
    assert torch.cuda.max_memory_allocated() - before < logits / 8


def test_prototypes_of_65536_fit_one_gigabyte():
    x, w = torch.randn(15053, 256, device="cuda"), torch.randn(65536, 256, device="cuda")
    x, w = x.bfloat16().requires_grad_(), w.requires_grad_()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    prototype_cross_entropy(x, w, x.detach(), w.detach(), None, 0.1, 0.04).backward()
    assert torch.cuda.max_memory_allocated() - before < 1e9
