"""Label propagation: golden values, a loop over the definition, exact cases, bounded memory."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dense_ssl import parity
from dense_ssl.evaluation.matching import label_propagation
from dense_ssl.evaluation.matching.label_propagation import (
    DINO,
    REVISITING,
    Labelled,
    Rules,
    propagate,
)


def filled(shape, step, start):
    """The specifications' deterministic tensor: sin(step * i + start) in float64, cast to float32."""
    values = np.sin(step * np.arange(np.prod(shape)) + start)
    return torch.from_numpy(values.reshape(shape).astype(np.float32))


# --- numbers that the published codes gave

FRAMES = filled((4, 5, 4, 5), 0.37, 0.1)
LEFT_AND_RIGHT = torch.tensor([0, 0, 1, 1, 1]).expand(4, 5)


@pytest.mark.parametrize(
    ("radius", "mass"),
    [(2, (8, 8.12479, 7.46529, 9.04332, 7.26113)), (12, (8, 7, 7, 8, 6))],
)
def test_walks_golden_values(radius, mass):
    labels = parity.label_propagate(FRAMES, LEFT_AND_RIGHT, 2, radius, 0.05, 3)
    assert labels.shape == (5, 2, 4, 5)
    assert labels[:, 0].sum((1, 2)).tolist() == pytest.approx(mass, rel=1e-5)
    if radius == 2:
        rows = (
            (0, 0, 0.2297, 1, 0.7873),
            (0.4434, 0.4432, 0, 0.0124, 0.3648),
            (0.9418, 0.7284, 0.0764, 0, 0.1888),
            (0.879, 0.8215, 0.0929, 0, 0.2514),
        )
        torch.testing.assert_close(labels[4, 0], torch.tensor(rows), rtol=0, atol=5.1e-5)


def test_dinos_golden_values():
    target = filled((20, 6), 0.37, 0.2)
    context = [filled((20, 6), 0.37, start).T for start in (1.1, 2.3)]
    y, x = torch.meshgrid(torch.arange(4), torch.arange(5), indexing="ij")
    labels = [F.one_hot(c % 3, 3).permute(2, 0, 1)[None].float() for c in (y + x, 2 * y + x)]
    out = parity.propagate_labels(target, context, labels, radius=2, topk=3)
    torch.testing.assert_close(
        out[:, 0, 0], torch.tensor([0.426777, 0, 0.573223]), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        out[:, 2, 3], torch.tensor([0.684314, 0.315686, 0]), rtol=1e-5, atol=1e-6
    )


# --- the definition


def by_the_definition(cells, first, recent, rules):
    """Labels of target cells by loops in float64, from lists of (cells [D, h, w], labels [C, h, w])."""
    _, height, width = cells.shape
    out = torch.zeros(first[1].shape, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            found = []
            for number, (theirs, labels) in enumerate([first, *recent]):
                for v in range(height):
                    for u in range(width):
                        dy, dx = abs(v - y), abs(u - x)
                        near = dy <= rules.radius and dx <= rules.radius
                        if rules.shape == "disc":
                            near = dy * dy + dx * dx < rules.radius**2
                        if near or (rules.whole_first and number == 0):
                            cosine = float(cells[:, y, x] @ theirs[:, v, u])
                            found.append((cosine, labels[:, v, u]))
            found.sort(key=lambda pair: -pair[0])
            count = min(rules.topk, len(found))
            if rules.ties:
                count = sum(value >= found[count - 1][0] for value, _ in found)
            weights = np.exp([value / rules.temperature for value, _ in found[:count]])
            for weight, (_, label) in zip(weights / weights.sum(), found):
                out[:, y, x] += weight * label
    return out


RULES = {
    "walk": Rules(3, True, "disc", 4, True, 6, False, 0.05),
    "square": Rules(3, False, "square", 2, False, 5, True, 0.1),
    "disc of one": Rules(2, False, "disc", 1, False, 3, False, 0.1),
    "few neighbours": Rules(1, True, "square", 1, False, 40, True, 0.2),
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_labels_follow_the_definition(rules):
    generator = torch.Generator().manual_seed(0)
    frames = F.normalize(torch.randn(4, 6, 9, 19, generator=generator).double(), dim=1)
    labels = torch.rand(4, 3, 9, 19, generator=generator).double()
    pairs = list(zip(frames, labels))
    known = [Labelled(*pair) for pair in pairs]
    got = label_propagation.carried(frames[3], known[0], known[1:3], rules)
    torch.testing.assert_close(got, by_the_definition(frames[3], pairs[0], pairs[1:3], rules))


def test_scores_as_large_as_the_last_one_kept_count_by_dinos_rules_alone():
    cells = torch.ones(1, 1, 4)
    first = Labelled(cells, torch.tensor([[[1.0, 2, 3, 4]]]))
    rules = Rules(1, False, "square", 9, False, 2, True, 0.1)
    assert label_propagation.carried(cells, first, [], rules)[0, 0].tolist() == [2.5] * 4
    without = label_propagation.carried(cells, first, [], replace(rules, ties=False))
    taken = {1.5, 2, 2.5, 3, 3.5}  # means of two of the four
    assert set(without[0, 0].tolist()) <= taken


# --- what must hold


def one_hot_cells(height, width):
    return torch.eye(height * width).unflatten(1, (height, width))


def some_labels(height, width, classes=3):
    values = torch.randint(0, classes, (height, width), generator=torch.Generator().manual_seed(1))
    return F.one_hot(values, classes).permute(2, 0, 1).float()


def test_identical_frames_propagate_exactly():
    generator = torch.Generator().manual_seed(0)
    labels = some_labels(10, 13)
    frames = [torch.randn(16, 10, 13, generator=generator)] * 6
    for rules in (REVISITING, replace(DINO, topk=1)):
        for carried in propagate(frames, labels, rules):
            torch.testing.assert_close(carried, labels, rtol=0, atol=1e-6)
    for carried in propagate([one_hot_cells(10, 13)] * 6, labels, DINO):
        assert (carried.argmax(0) == labels.argmax(0)).all()


@pytest.mark.parametrize("rules", [DINO, REVISITING], ids=["dino", "revisiting"])
def test_labels_follow_cells_that_move(rules):
    cells, labels = one_hot_cells(9, 12), some_labels(9, 12)
    frames = [cells.roll((t, -2 * t), (1, 2)) for t in range(5)]
    for t, carried in enumerate(propagate(frames, labels, replace(rules, temperature=0.02))):
        expected = labels.roll((t, -2 * t), (1, 2)).argmax(0)
        assert (carried.argmax(0) == expected).all(), t


def test_beyond_the_neighbourhood_only_the_whole_first_frame_is_found():
    cells, labels = one_hot_cells(4, 30), some_labels(4, 30)
    frames = [cells, cells.roll(15, 2)]  # 15 columns to the right, and round the end
    rules = replace(REVISITING, radius=3, recent=1, topk=1)
    right = labels.roll(15, 2)
    assert torch.equal(list(propagate(frames, labels, rules))[1], right)
    near_alone = list(propagate(frames, labels, replace(rules, whole_first=False)))[1]
    assert (near_alone.argmax(0) == right.argmax(0)).float().mean() < 0.6


@pytest.mark.parametrize("rules", [DINO, REVISITING], ids=["dino", "revisiting"])
def test_labels_stay_a_distribution_and_noise_tells_nothing(rules):
    generator = torch.Generator().manual_seed(0)
    labels = some_labels(16, 20, classes=2)
    frames = torch.randn(5, 8, 16, 20, generator=generator)
    *_, last = propagate(frames, labels, rules)
    torch.testing.assert_close(last.sum(0), torch.ones(16, 20), rtol=0, atol=1e-5)
    assert 0.35 < (last.argmax(0) == labels.argmax(0)).float().mean() < 0.65


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            # A view of few numbers may be wide: what counts is the memory behind it.
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // 4)
        return out


@pytest.mark.parametrize("rules", [DINO, REVISITING], ids=["dino", "revisiting"])
def test_memory_grows_with_the_window_and_not_with_the_square_of_a_frame(rules):
    few = replace(rules, recent=2, radius=3)
    largest = []
    for height in (40, 80):
        frames = torch.randn(3, 4, height, 50)
        with Largest() as watch:
            list(propagate(frames, some_labels(height, 50), few))
        largest.append(watch.numel)
    cells = 80 * 50
    assert largest[1] < cells**2 / 5
    assert largest[1] <= (2.1 if rules.whole_first else 1) * largest[0]
