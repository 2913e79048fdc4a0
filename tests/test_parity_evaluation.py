"""The evaluation's published functions: golden values, and slow loops over the definitions."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dense_ssl import parity


def fill(shape, s, a=1.0):
    """The specification's deterministic tensor: a sin(s + 0.37 j) in float64, cast to float32."""
    values = a * np.sin(s + 0.37 * np.arange(np.prod(shape)))
    return torch.from_numpy(values.reshape(shape).astype(np.float32))


@pytest.mark.parametrize(("k", "top1"), [(1, 14.0), (5, 10.0), (10, 10.0)])
def test_knn(k, top1):
    train, test = F.normalize(fill((40, 6), 0.3), dim=1), F.normalize(fill((200, 6), 1.7), dim=1)
    labels = torch.arange(200) % 7
    found = parity.knn(train, labels[:40], test, labels, k, 0.07, 7)
    assert found[0] == pytest.approx(top1, abs=1e-4)
    assert found[0] <= found[1] <= 100  # ties make top-5 the sort's affair


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("cls_token", 0), ("pos_embed", 0), ("patch_embed.proj.weight", 0),
        ("blocks.0.norm1.weight", 1), ("blocks.10.attn.qkv.bias", 11), ("blocks.11.mlp.fc2.bias", 12),
        ("norm.weight", 13), ("fc_norm.bias", 13), ("head.weight", 13),
    ],
)  # fmt: skip
def test_layer_decay_scale(name, layer):
    assert parity.layer_decay_scale(name, 12, 0.65) == pytest.approx(0.65 ** (13 - layer))


def average_precision_by_trapezoids(ranking, ok, junk):
    """The definition, place by place."""
    total, found, place = 0.0, 0, 0
    for image in ranking:
        if image in junk:
            continue
        if image in ok:
            before = 1.0 if place == 0 else found / place
            found += 1
            total += (before + found / (place + 1)) / 2 / len(ok)
        place += 1
    return total


def test_compute_map():
    rng = np.random.default_rng(0)
    ranks = np.stack([rng.permutation(30) for _ in range(5)], axis=1)
    truth = [
        {"ok": [3, 4, 9], "junk": [1, 2]},
        {"ok": [0], "junk": []},
        {"ok": [7, 8, 11, 12]},
        {"ok": [], "junk": [5]},
        {"ok": np.array([29, 28]), "junk": np.arange(20)},
    ]
    mean, each, at, each_at = parity.compute_map(ranks, truth, kappas=(1, 5))
    expected = [
        average_precision_by_trapezoids(ranks[:, q], list(t["ok"]), list(t.get("junk", [])))
        for q, t in enumerate(truth)
        if len(t["ok"])
    ]
    assert each[[0, 1, 2, 4]] == pytest.approx(expected)
    assert np.isnan(each[3]) and mean == pytest.approx(np.mean(expected))
    kept = [image for image in ranks[:, 2] if image in range(30)]
    last = max(kept.index(image) for image in truth[2]["ok"]) + 1
    hits = sum(image in truth[2]["ok"] for image in kept[: min(5, last)])
    assert each_at[2, 1] == pytest.approx(hits / min(5, last))
    assert at == pytest.approx(np.nanmean(each_at, axis=0))


def test_compute_map_of_perfect_and_reversed_rankings():
    perfect = np.arange(10)[:, None]
    assert parity.compute_map(perfect, [{"ok": [0, 1, 2]}])[0] == 1
    worst = parity.compute_map(perfect[::-1], [{"ok": [0]}])[0]
    assert worst == pytest.approx((0 + 1 / 10) / 2)
    assert np.isnan(parity.compute_map(perfect, [{"ok": []}])[0])


def test_gem_lies_between_mean_and_maximum():
    cells = fill((2, 5, 3), 0.4).abs()
    pooled = parity.gem(cells, 4)
    reference = ((cells.double() ** 4).sum(1) / 5) ** 0.25
    torch.testing.assert_close(pooled.double(), reference, rtol=1e-5, atol=1e-6)
    assert (pooled >= cells.mean(1) - 1e-6).all() and (pooled <= cells.amax(1) + 1e-6).all()
    torch.testing.assert_close(parity.gem(cells, 1), cells.mean(1))
    assert parity.gem(-cells, 4) == pytest.approx(1e-6)


def test_svm_fixed_c():
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    labels = np.where(np.arange(60)[:, None] % 3 == np.arange(3), 1, -1)
    features = rng.normal(0, 0.2, (60, 3)) + (labels == 1)
    labels[0, 0], labels[1, 0] = 0, 0  # difficult: as absent, in training and in testing
    precisions = parity.svm_fixed_c(features[:40], labels[:40], features[40:], labels[40:])
    assert precisions.shape == (3,) and precisions.min() > 0.95
    mixed = rng.permutation(labels)
    assert parity.svm_fixed_c(features[:40], mixed[:40], features[40:], mixed[40:]).mean() < 0.7
