"""The streamed InfoNCE against its plain definition in float64."""

import pytest
import torch
from torch.nn import functional as F

from kernels import queue_info_nce as kernel


def inputs(n, k, d, dtype=torch.float32):
    q, positive, queue = (F.normalize(torch.randn(m, d), dim=1).to(dtype) for m in (n, n, k))
    return q, positive, queue


@pytest.mark.parametrize(
    ("n", "k", "d"), [(5, 7, 3), (1, 1, 1), (33, 20, 8), (4, 16, 128), (0, 5, 4)]
)
@pytest.mark.parametrize("temperature", [0.2, 0.01])
def test_loss_and_gradient_err_no_more_than_the_plain_form(n, k, d, temperature, monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", 6)  # several ragged blocks
    q, positive, queue = inputs(n, k, d)
    exact = q.double().requires_grad_()
    want = kernel.reference(exact, positive.double(), queue.double(), temperature)
    want.sum().backward()
    plain, ours = q.clone().requires_grad_(), q.clone().requires_grad_()
    in_float32 = kernel.reference(plain, positive, queue, temperature)
    in_float32.sum().backward()
    got = kernel.queue_info_nce(ours, positive, queue, temperature)
    got.sum().backward()
    allowed = (in_float32 - want).abs().max() if n else 0
    assert n == 0 or (got - want).abs().max() <= allowed + 1e-5
    if n:
        worst = (plain.grad - exact.grad).abs().max()
        assert (ours.grad - exact.grad).abs().max() <= worst + 1e-5 / temperature


def test_gradcheck_and_row_weights():
    q, positive, queue = inputs(4, 9, 3, torch.float64)
    q.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kernel.queue_info_nce(x, positive, queue, 0.3), (q,))


def test_only_queries_get_a_gradient():
    q, positive, queue = (x.requires_grad_() for x in inputs(4, 9, 3))
    kernel.queue_info_nce(q, positive, queue, 0.2).sum().backward()
    assert q.grad is not None
    assert positive.grad is None
    assert queue.grad is None


def test_wrong_shapes_and_types_are_one_sentence():
    q, positive, queue = inputs(4, 9, 3)
    with pytest.raises(ValueError, match=r"positive \[N, D\].*got"):
        kernel.queue_info_nce(q, positive[:2], queue, 0.2)
    with pytest.raises(ValueError, match="one dtype expected, got bfloat16, float32"):
        kernel.queue_info_nce(q.bfloat16(), positive, queue, 0.2)
    with pytest.raises(ValueError, match="index int64 on cpu expected"):
        kernel.queue_info_nce(q, positive, queue, 0.2, index=torch.zeros(4))


def test_autocast_does_not_lower_its_precision():
    q, positive, queue = inputs(16, 50, 8)
    want = kernel.queue_info_nce(q, positive, queue, 0.2)
    with torch.autocast("cpu", torch.bfloat16):
        got = kernel.queue_info_nce(q, positive, queue, 0.2)
    assert torch.equal(got, want)
