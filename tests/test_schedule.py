"""Schedules against their closed forms."""

import math

import pytest

from dense_ssl.config import validate
from dense_ssl.optim import OptimConfig
from dense_ssl.schedule import Ramp, Schedule, Step


def at(schedule, index, steps_per_epoch=10, epochs=100):
    return schedule.at(Step(index, steps_per_epoch, epochs))


def test_a_number_is_a_constant():
    config = validate(OptimConfig, {"lr": 0.1, "weight_decay": "1e-4"}, "x")
    assert {at(config.lr, i) for i in (0, 500, 999)} == {0.1}
    assert at(config.weight_decay, 7) == 1e-4


def test_cosine_per_step_and_per_epoch():
    by_step = Schedule(start=1.0, end=0.2)
    for i in (0, 1, 500, 999):
        want = 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * i / 1000))
        assert at(by_step, i) == pytest.approx(want, rel=1e-12)
    by_epoch = Schedule(start=1.0, end=0.2, per="epoch")
    assert at(by_epoch, 509) == at(by_epoch, 500) == at(by_step, 500)
    assert at(by_epoch, 510) < at(by_epoch, 509)


def test_warm_up_is_linear_and_joins_the_schedule():
    schedule = Schedule(start=1.0, warmup_epochs=10, warmup_start=0.1)
    assert at(schedule, 0) == pytest.approx(0.1)
    assert at(schedule, 50) == pytest.approx(0.55)
    assert at(schedule, 100) == 1.0
    # as a table of the remaining steps: 0.5 (1 + cos(pi i / n)), n steps after the warm-up
    assert at(schedule, 100 + 450) == pytest.approx(0.5)


def test_linear_and_multistep():
    assert at(Schedule(start=0.0, end=1.0, shape="linear"), 250) == pytest.approx(0.25)
    steps = Schedule(start=1.0, shape="multistep", milestones=(30, 60), factor=0.1)
    values = [at(steps, 10 * e) for e in (29, 30, 59, 60, 99)]
    assert values == pytest.approx([1, 0.1, 0.1, 0.01, 0.01])


def test_rising_momentum_ends_at_its_end():
    momentum = Schedule(start=0.996, end=1.0)
    assert at(momentum, 1000) == 1.0
    assert at(momentum, 0) == 0.996


def test_a_closed_warm_up_has_its_full_value_in_its_last_step():
    schedule = Schedule(start=1.0, warmup_epochs=10, warmup_start=0.1, warmup_closed=True)
    assert at(schedule, 0) == pytest.approx(0.1)
    assert at(schedule, 50) == pytest.approx(0.1 + 0.9 * 50 / 99)
    assert at(schedule, 99) == pytest.approx(1.0, rel=1e-12)
    assert at(schedule, 100) == 1.0
    by_epoch = Schedule(start=1.0, warmup_epochs=3, warmup_closed=True, per="epoch")
    assert [at(by_epoch, 10 * e + 7) for e in range(4)][:3] == [0.0, 0.5, 1.0]
    single = Schedule(start=1.0, warmup_epochs=0.1, warmup_closed=True)
    assert at(single, 0) == 0.0
    uneven = Schedule(start=1.0, warmup_epochs=0.25, warmup_closed=True)
    assert [at(uneven, i) for i in range(3)] == pytest.approx([0.0, 1 / 1.5, 1.0])


def test_a_ramp_moves_by_epochs_and_includes_both_ends():
    ramp = Ramp(start=0.0, end=1.0, warmup_epochs=5, wait_epochs=2)
    assert [at(ramp, 10 * e + 3) for e in range(9)] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert at(Ramp(start=0.0, end=1.0), 0) == 1.0
    assert [at(Ramp(start=0.0, end=1.0, warmup_epochs=1), i) for i in (0, 10)] == [0.0, 1.0]
