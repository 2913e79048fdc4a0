"""Golden values of SERE: numbers the official code gave on deterministic inputs."""

import numpy as np
import pytest
import torch
from torch import nn

from dense_ssl import parity
from dense_ssl.methods import sere_relations
from dense_ssl.methods.sere_relations import Grids, Maps

RTOL = 1e-5
FIRST = ((10, 20, 200, 150, 0), (60, 0, 180, 120, 1))
SECOND = ((0, 0, 90, 90, 1), (30, 45, 60, 60, 1))


def f(shape, a=0.37, b=0.11):
    """The specification's deterministic tensor: sin(a i + b i^2 / n) in float64, cast to float32."""
    i = np.arange(np.prod(shape), dtype=np.float64)
    return torch.from_numpy(np.sin(a * i + b * i**2 / len(i)).reshape(shape).astype(np.float32))


def near(value):
    return pytest.approx(value, rel=RTOL)


def close(got, want):
    torch.testing.assert_close(got, torch.tensor(want), rtol=RTOL, atol=1.5e-6)


X = f((2, 16, 4))
WEIGHTS = {"predictor.0.weight": torch.cos(4 * torch.arange(4.0)[:, None] + torch.arange(4))}


def head():
    return parity.relation_head({k: v[:, :, None, None] for k, v in WEIGHTS.items()})


@pytest.fixture
def relations():
    """Spatial relations of z and p [2, 2, 16, 16], channel relations of both [2, 4, 4]."""
    with torch.no_grad():
        return *parity.spatial_head_forward(X, head(), 2), *parity.channel_head_forward(
            X, head(), 4
        )


@pytest.fixture
def grids():
    """Grids of both crops of two samples, [2, 3, 3, 2] each."""
    return parity.overlap_grid(*(torch.tensor(pair) for pair in zip(FIRST, SECOND)), 3)


@pytest.mark.parametrize(
    ("a", "b", "here", "there"),
    [  # rectangles; x per column and y per row of both grids
        (
            *FIRST,
            ((-0.5, 0.25, 1), (-1, -0.333333, 0.333333)),
            ((1, 0.166667, -0.666667), (-0.666667, 0.166667, 1)),
        ),
        (
            (0, 0, 50, 50, 0),
            (49, 0, 50, 50, 1),
            ((0.96, 0.98, 1), (-1, 0, 1)),
            ((1, 0.98, 0.96), (-1, 0, 1)),
        ),
        ((0, 0, 50, 50, 0), (50, 0, 50, 50, 1), ((-2,) * 3, (-2,) * 3), ((-2,) * 3, (-2,) * 3)),
    ],
)
def test_overlap_grids(a, b, here, there):
    for grid, (x, y) in zip(parity.overlap_grid(a, b, 3), (here, there)):
        close(grid[..., 0], [[float(v) for v in x]] * 3)
        close(grid[..., 1].T.contiguous(), [[float(v) for v in y]] * 3)


def test_the_deterministic_input():
    close(X[0, 0], [0, 0.362417, 0.676822, 0.899111])
    assert X.sum().item() == near(2.877918)


def test_channel_relations(relations):
    _, _, z, p = relations
    close(z[0], [
        [0.449080, 0.425738, 0.345300, 0.212712], [0.425738, 0.499327, 0.485197, 0.390338],
        [0.345300, 0.485197, 0.546842, 0.512702], [0.212712, 0.390338, 0.512702, 0.562651],
    ])  # fmt: skip
    close(p[0], [
        [0.266318, 0.052461, 0.032206, 0.337219], [0.052461, 0.703429, 0, 0.143605],
        [0.032206, 0, 0.473643, 0], [0.337219, 0.143605, 0, 0.513087],
    ])  # fmt: skip
    assert z.sum().item() == near(11.541009)
    assert p.sum().item() == near(7.304563)


def test_spatial_relations(relations):
    z, p, _, _ = relations
    close(z[0, 0, :3, :3], [[0.162426, 0.450657, 0], [0.450657, 2.620229, 0.134584],
                            [0, 0.134584, 0.013222]])  # fmt: skip
    close(p[1, 1, :3, :3], [[1.058851, 0, 0], [0, 0.689627, 0], [0.0, 0, 0]])
    assert z.sum().item() == near(292.55563)
    assert p.sum().item() == near(278.00586)


def test_running_statistics_after_one_forward():
    module = head()
    parity.relation_features(X, module, predictor=True)
    norm = module.projection[0]
    close(norm.running_mean, [0.003138, 0.002841, 0.002023, 0.000992])
    close(norm.running_var, [0.949685, 0.950134, 0.951943, 0.953295])
    assert norm.num_batches_tracked == 1


def test_aligned_relations(relations, grids):
    z, p, _, _ = relations
    here, there = grids
    aligned = parity.align_relation(z, here, here)
    assert aligned.shape == (2, 2, 9, 9)
    assert aligned.sum().item() == near(36.753784)
    close(aligned[0, 0, :3, :3], [[0.230248, 0.016823, 0], [0.016823, 0.003306, 0], [0.0, 0, 0]])
    aligned = parity.align_relation(p, there, there)
    assert aligned.sum().item() == near(32.930473)
    close(aligned[1, 1, :2, :4], [[0.137835, 0, 0.095507, 0], [0, 0.043102, 0, 0.086203]])


def test_relating_aligned_features_is_aligning_relations(relations, grids):
    z, _, _, _ = relations
    with torch.no_grad():
        features = parity.relation_features(X, head(), predictor=False).unflatten(2, (4, 4))
    a, b = (torch.tensor(pair) for pair in zip(FIRST, SECOND))
    aligned = parity.align_overlap(features, a, b, 3)
    got = parity.spatial_self_relation(aligned, 2)
    torch.testing.assert_close(got, parity.align_relation(z, grids[0], grids[0]))


def test_spatial_loss(relations, grids):
    z, p, _, _ = relations
    teacher, student = (
        torch.cat([parity.align_relation(r, grid, grid) for grid in grids]) for r in (z, p)
    )
    assert parity.sere_spatial_loss(student, teacher).item() == near(2.208041)
    full = torch.cat([z, z.flip(0)])
    loss = parity.sere_spatial_loss(student, teacher, p, full, grids, grids[::-1])
    assert loss.item() == near(2.207707)


def test_spatial_loss_of_training_without_relations(grids):
    """What a step computes, from features alone."""
    here, there = grids
    with torch.no_grad():
        z, p = (parity.relation_features(X, head(), which).transpose(1, 2) for which in (0, 1))
    both = torch.stack(grids)
    student, teacher = Maps(torch.cat([p, p]), (4, 4)), Maps(torch.cat([z, z]), (4, 4))
    loss = sere_relations.spatial_loss(
        student, teacher, None, Grids(both, both, None, None), 2, 0.5
    )
    assert loss.item() == near(2.208041)
    # The teacher's second crop has its samples reversed for local pairs: two losses of one mean of four.
    in_local, in_global = (
        torch.stack([here, there], 1)[None],
        torch.stack([there, here])[:, :, None],
    )
    with_local = Grids(both, both, in_local, in_global)
    reversed_ = Maps(torch.cat([z, z.flip(0)]), (4, 4))
    pairs = sere_relations.spatial_loss(student, reversed_, Maps(p, (4, 4)), with_local, 2, 0.5)
    alone = sere_relations.spatial_loss(
        student, reversed_, None, Grids(both, both, None, None), 2, 0.5
    )
    assert (4 * pairs - 2 * alone + 2 * loss).item() / 4 == near(2.207707)


def test_channel_loss(relations):
    _, _, z, p = relations
    teacher, student = (torch.cat([r, r.flip(0)]) for r in (z, p))
    assert parity.sere_channel_loss(student, teacher).item() == near(1.359402)
    assert parity.sere_channel_loss(student, teacher, p).item() == near(1.352089)


def test_total():
    total = parity.sere_total(torch.tensor(2.0), torch.tensor(0.0), torch.tensor(0.0), 0.2, 0.5)
    assert total.item() == near(3.3)


def test_weight_decay_spares_the_scales_of_norms_only():
    net = nn.ModuleDict({"linear": nn.Linear(3, 2), "norm": nn.LayerNorm(2)})
    net.cls_token = nn.Parameter(torch.zeros(1, 1, 3))
    decayed, spared = parity.sere_param_groups(net.named_parameters())
    assert [p.shape for p in spared.params] == [(2,)]
    assert spared.params[0] is net["norm"].weight
    assert spared.decay == 0 and decayed.decay == 1
    assert len(decayed.params) == 4
