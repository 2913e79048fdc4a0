"""Optimisers and clipping against loops that spell the formulas out."""

import pytest
import torch
from torch import nn

from dense_ssl.config import validate
from dense_ssl.methods.method import ParamGroup
from dense_ssl.optim import (
    ClipConfig,
    OptimConfig,
    apply_schedules,
    clip_gradients,
    freeze,
    make_optimizer,
)
from dense_ssl.schedule import Step


def params(*shapes):
    return [nn.Parameter(torch.randn(*shape)) for shape in shapes]


def give_gradients(weights, scale=1.0):
    for p in weights:
        p.grad = torch.randn_like(p) * scale


def optimizer_of(groups, **options):
    config = validate(OptimConfig, options, "x")
    return make_optimizer(groups, config), config


def test_sgd_is_the_formula_with_decay_on_every_tensor():
    weights = params((3, 2), (4,))
    optimizer, config = optimizer_of([ParamGroup(weights)], name="sgd", lr=0.1, weight_decay=0.01)
    want, momentum = [p.detach().double().clone() for p in weights], [0.0, 0.0]
    for i in range(3):
        give_gradients(weights)
        for j, p in enumerate(weights):
            momentum[j] = 0.9 * momentum[j] + p.grad.double() + 0.01 * want[j]
            want[j] = want[j] - 0.1 * momentum[j]
        apply_schedules(optimizer, config, Step(i, 10, 1), 256)
        optimizer.step()
    for p, w in zip(weights, want, strict=True):
        torch.testing.assert_close(p.detach().double(), w, rtol=1e-5, atol=1e-6)


def test_lars_scales_each_matrix_and_leaves_biases_plain():
    weights = params((3, 2), (4,))
    optimizer, config = optimizer_of(
        [ParamGroup(weights)], name="lars", lr=0.1, weight_decay=0.01, trust=0.002
    )
    want, momentum = [p.detach().double().clone() for p in weights], [0.0, 0.0]
    for i in range(3):
        give_gradients(weights)
        for j, p in enumerate(weights):
            g = p.grad.double() + 0.01 * want[j]
            if p.ndim > 1:
                g = g * 0.002 * want[j].norm() / g.norm()
            momentum[j] = 0.9 * momentum[j] + g
            want[j] = want[j] - 0.1 * momentum[j]
        apply_schedules(optimizer, config, Step(i, 10, 1), 256)
        optimizer.step()
    for p, w in zip(weights, want, strict=True):
        torch.testing.assert_close(p.detach().double(), w, rtol=1e-5, atol=1e-6)


def test_lars_takes_a_plain_step_for_a_zero_weight():
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer, config = optimizer_of([ParamGroup([weight])], name="lars", lr=1.0, weight_decay=0.0)
    weight.grad = torch.ones(2, 2)
    apply_schedules(optimizer, config, Step(0, 10, 1), 256)
    optimizer.step()
    assert torch.equal(weight.detach(), -torch.ones(2, 2))


def test_groups_scale_learning_rate_and_decay_and_the_batch_scales_the_rate():
    a, b = params((2, 2)), params((2,))
    optimizer, config = optimizer_of(
        [ParamGroup(a), ParamGroup(b, decay=0.0, lr=0.5)],
        name="adamw", lr=5e-4, lr_for_batch=256, weight_decay=0.04,
    )  # fmt: skip
    values = apply_schedules(optimizer, config, Step(0, 10, 1), batch_size=1024)
    assert values == {"lr": pytest.approx(2e-3), "weight_decay": pytest.approx(0.04)}
    first, second = optimizer.param_groups
    assert (first["lr"], first["weight_decay"]) == (pytest.approx(2e-3), pytest.approx(0.04))
    assert (second["lr"], second["weight_decay"]) == (pytest.approx(1e-3), 0.0)


def test_clipping_per_tensor_and_global():
    weights = params((3, 3), (5,), (2,))
    optimizer, _ = optimizer_of([ParamGroup(weights)], name="sgd")
    for kind in ("per_tensor", "global"):
        give_gradients(weights, scale=3.0)
        weights[2].grad.mul_(1e-3)
        before = [p.grad.clone() for p in weights]
        clip_gradients(optimizer, ClipConfig(kind=kind, norm=1.0))
        total = torch.cat([g.flatten() for g in before]).norm()
        for p, g in zip(weights, before, strict=True):
            norm = g.norm() if kind == "per_tensor" else total
            torch.testing.assert_close(p.grad, g * min(1.0, 1.0 / (norm.item() + 1e-6)))


def test_frozen_groups_do_not_move_until_their_epoch():
    weights = params((2, 2))
    group = ParamGroup(weights, frozen_epochs=1)
    optimizer, config = optimizer_of([group], name="sgd", lr=0.1, weight_decay=0.5)
    start = weights[0].detach().clone()
    for index in (0, 9, 10):
        give_gradients(weights)
        step = Step(index, 10, 2)
        apply_schedules(optimizer, config, step, 1)
        freeze(optimizer, step)
        optimizer.step()
        assert torch.equal(weights[0].detach(), start) == (index < 10)


def test_the_batch_scales_what_a_schedule_starts_from_but_not_its_end():
    (weight,) = params((2, 2))
    optimizer, config = optimizer_of(
        [ParamGroup([weight])], name="adamw", lr_for_batch=256,
        lr={"start": 5e-4, "end": 1e-6, "warmup_epochs": 2, "warmup_closed": True},
    )  # fmt: skip
    rates = [apply_schedules(optimizer, config, Step(i, 5, 10), 1024)["lr"] for i in (0, 1, 9, 49)]
    assert rates == pytest.approx([0, 2.22222222e-4, 0.002, 4.08112493e-6], rel=1e-8)
    assert config.lr.start == 5e-4
