"""Golden values of the published methods: numbers their official codes gave on deterministic inputs."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dense_ssl import parity

RTOL = 1e-5


def S(shape, a, b):
    """The specifications' deterministic tensor: sin(a * i + b) in float64, cast to float32."""
    values = np.sin(a * np.arange(np.prod(shape)) + b)
    return torch.from_numpy(values.reshape(shape).astype(np.float32))


def colnorm(x):
    return F.normalize(x, dim=0)


QUEUE = colnorm(S((4, 16), 1.7, 0.9))
QUEUE2 = colnorm(S((4, 16), 1.9, 1.0))
G_Q, G_K = S((4, 4), 0.7, 0.3), S((4, 4), 0.9, 0.4)
X_Q, X_K = S((4, 8, 3, 3), 0.37, 0.1), S((4, 8, 3, 3), 0.41, 0.2)
D_Q, D_K = S((4, 4, 9), 0.53, 0.5), S((4, 4, 9), 0.59, 0.6)
P_K = S((4, 4), 1.3, 0.8)
MATCH = [
    [0, 0, 0, 0, 0, 0, 2, 3, 5],
    [4, 5, 7, 8, 8, 8, 8, 8, 0],
    [0, 0, 0, 0, 1, 2, 3, 4, 6],
    [6, 6, 8, 8, 8, 8, 0, 0, 0],
]


def test_moco_logits_and_their_cross_entropy():
    logits, labels = parity.moco_logits(G_Q, G_K, QUEUE, 0.2)
    assert logits.shape == (4, 17)
    assert F.cross_entropy(logits, labels).item() == pytest.approx(3.7801008, rel=RTOL)
    assert parity.global_info_nce(G_Q, G_K, QUEUE, 0.2).item() == pytest.approx(3.7801008, rel=RTOL)


def test_densecl_match_losses_and_gradients():
    assert parity.dense_match(X_Q.flatten(2), X_K.flatten(2)).tolist() == MATCH
    g_q, d_q = G_Q.clone().requires_grad_(), D_Q.clone().requires_grad_()
    x_q = X_Q.clone().requires_grad_()
    losses = parity.densecl_losses(x_q, X_K, g_q, G_K, d_q, D_K, QUEUE, QUEUE2, 0.2, 0.5)
    total = losses["single"] + losses["dense"]
    assert losses["single"].item() == pytest.approx(1.8900504, rel=RTOL)
    assert losses["dense"].item() == pytest.approx(2.8013215, rel=RTOL)
    assert total.item() == pytest.approx(4.6913719, rel=RTOL)
    total.backward()
    assert g_q.grad.norm().item() == pytest.approx(0.7446783, rel=RTOL)
    assert d_q.grad.norm().item() == pytest.approx(0.2828492, rel=RTOL)
    assert x_q.grad is None


@pytest.mark.parametrize(
    ("variant", "value"),
    [("identity", 5.0717068), ("projected", 1.7023747), ("transposed", 4.9846296)],
)
def test_wrong_matches_give_their_own_known_values(variant, value):
    """The matching is discriminating: three plausible mistakes have three other losses."""
    x_q, x_k = X_Q.flatten(2), X_K.flatten(2)
    match = {
        "identity": torch.arange(9).expand(4, 9),
        "projected": parity.dense_match(D_Q, D_K),
        "transposed": parity.dense_match(x_k, x_q),
    }[variant]
    loss = parity.dense_info_nce(D_Q, D_K, match, QUEUE2, 0.2).item()
    assert loss == pytest.approx(value, rel=RTOL)


def test_enqueue_wraps_and_matches_the_official_sums():
    queue, queue2 = QUEUE.clone(), QUEUE2.clone()
    g, p = F.normalize(G_K, dim=1), F.normalize(P_K, dim=1)
    assert parity.enqueue(queue, 12, g) == 0
    assert parity.enqueue(queue2, 12, p) == 0
    assert torch.equal(queue[:, 12:], g.T)
    assert queue.sum().item() == pytest.approx(1.5096538, rel=RTOL)
    assert queue2.sum().item() == pytest.approx(1.8036885, rel=RTOL)
    assert parity.enqueue(queue, 14, g) == 2
    assert torch.equal(queue[:, [14, 15, 0, 1]], g.T)


def test_cosine_lr():
    golden = {
        0: 0.3, 1: 0.29999884340722055, 100: 0.288581929876693, 400: 0.15, 799: 1.1565927794165986e-06,
    }  # fmt: skip
    for epoch, value in golden.items():
        assert parity.cosine_lr(0.3, epoch, 800) == pytest.approx(value, rel=1e-9)


def test_ema_update_is_the_formula_in_place():
    old, new = [torch.randn(3, 2), torch.randn(4)], [torch.randn(3, 2), torch.randn(4)]
    expected = [0.99 * a.double() + 0.01 * b.double() for a, b in zip(old, new, strict=True)]
    parity.ema_update(old, new, 0.99)
    for got, want in zip(old, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-7, atol=2e-7)


def test_shuffle_indices_of_two_ranks():
    perm = torch.tensor([2, 0, 3, 1])
    assert [r.tolist() for r in parity.shuffle_indices(perm, 2)] == [[2, 0], [3, 1]]
    # Y is in shuffled order; rank 0 finds its samples 0 and 1 at positions 1 and 3.
    assert [r.tolist() for r in parity.unshuffle_indices(perm, 2)] == [[1, 3], [0, 2]]


def test_lambda_warm_up():
    assert [parity.lambda_at(i, 0.5, 1000) for i in (0, 999, 1000)] == [0.0, 0.0, 0.5]
    assert parity.lambda_at(0, 0.5, 0) == 0.5


def test_densecl_neck_pools_before_normalising_and_after_projecting():
    weights = {
        "mlp.0.weight": S((6, 8), 0.3, 0.1), "mlp.0.bias": S((6,), 0.2, 0.0),
        "mlp.2.weight": S((4, 6), 0.5, 0.2), "mlp.2.bias": S((4,), 0.1, 0.3),
        "mlp2.0.weight": S((6, 8, 1, 1), 0.7, 0.4), "mlp2.0.bias": S((6,), 0.6, 0.1),
        "mlp2.2.weight": S((4, 6, 1, 1), 0.9, 0.5), "mlp2.2.bias": S((4,), 0.8, 0.2),
    }  # fmt: skip
    with torch.no_grad():
        g, d, p = parity.densecl_neck(X_Q, weights)
    hidden = F.relu(F.conv2d(X_Q, weights["mlp2.0.weight"], weights["mlp2.0.bias"]))
    dense = F.conv2d(hidden, weights["mlp2.2.weight"], weights["mlp2.2.bias"])
    torch.testing.assert_close(d, dense.flatten(2))
    torch.testing.assert_close(p, dense.mean((2, 3)))
    hidden = F.relu(F.linear(X_Q.mean((2, 3)), weights["mlp.0.weight"], weights["mlp.0.bias"]))
    torch.testing.assert_close(g, F.linear(hidden, weights["mlp.2.weight"], weights["mlp.2.bias"]))


def test_voc_rules():
    labels, scores = (1, 0, 1, 1, 0, 0, 1, 0), (0.9, 0.8, 0.7, 0.6, 0.55, 0.54, 0.53, 0.1)
    assert parity.average_precision(labels, scores) == pytest.approx(0.7678571428571428, rel=1e-12)
    assert parity.average_precision((1, -1, 0), (0.5, 0.9, 0.1)) == 1.0
    grid = parity.svm_cost_grid()
    assert len(grid) == 19
    assert min(grid) == 1.9073486328125e-06
    assert max(grid) == 100
    assert parity.voc_ap_11point(np.array([0.5, 1.0]), np.array([1.0, 0.5])) == pytest.approx(
        (6 * 1.0 + 5 * 0.5) / 11
    )
    assert parity.voc_ap_11point(np.array([]), np.array([])) == 0.0


def test_specified_pool_shapes():
    maps = [
        torch.ones(1, c, s, s) for c, s in ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))
    ]
    pooled = parity.specified_pool(maps)
    assert [p.shape[1] for p in pooled] == [9216, 9216, 8192, 9216, 8192]
    assert pooled[0].min() < 1  # padding counts as zeros in feat1
    assert all(torch.all(p == 1) for p in pooled[1:])


def test_detectron2_names():
    examples = {
        "conv1.weight": "stem.conv1.weight",
        "bn1.running_var": "stem.conv1.norm.running_var",
        "layer3.0.downsample.1.bias": "res4.0.shortcut.norm.bias",
        "layer4.2.conv3.weight": "res5.2.conv3.weight",
    }
    assert {k: parity.to_detectron2_name(k) for k in examples} == examples


def test_knn_classify_votes_by_similarity():
    train = F.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), dim=1)
    labels = torch.tensor([0, 0, 1])
    test = F.normalize(torch.tensor([[1.0, 0.05], [0.1, 1.0]]), dim=1)
    assert parity.knn_classify(train, labels, test, k=1).tolist() == [0, 1]
