"""Label propagation: golden values, a loop over the definition, exact cases, bounded memory."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dense_ssl import parity
from dense_ssl.evaluation import label_propagation
from dense_ssl.evaluation.label_propagation import DINO, REVISITING, Labelled, Rules, propagate


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
