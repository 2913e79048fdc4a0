"""Golden values of de-coupling: numbers its official code gave on deterministic inputs."""

import random

import numpy as np
import pytest
import torch

from dense_ssl import parity
from dense_ssl.photometry import ops as ops

RTOL = 1e-5


def fill(shape, s, a=1.0):
    """The specification's deterministic tensor: a sin(s + 0.37 j) in float64, cast to float32."""
    values = a * np.sin(s + 0.37 * np.arange(np.prod(shape)))
    return torch.from_numpy(values.reshape(shape).astype(np.float32))


def drawn(mask):
    return "/".join("".join(".#"[int(cell)] for cell in row) for row in mask)


# --- 1, 2, 3, 9: region masks ----------------------------------------------------------------------


def test_rcc_boxes():
    golden = [
        [0, 0, 0.465248, 0.344558], [0.331749, 0, 0.762851, 0.379801], [0.661038, 0, 1, 0.381529],
        [0, 0.285388, 0.433073, 0.631448], [0.179505, 0.376434, 0.923901, 0.757621],
        [0.65394, 0.351881, 1, 0.709447], [0, 0.553254, 0.32734, 1], [0.12774, 0.701276, 0.864597, 1],
        [0.589098, 0.587007, 1, 0.917674],
    ]  # fmt: skip
    boxes = parity.rcc_boxes(random.Random(0))
    np.testing.assert_allclose(boxes, golden, rtol=0, atol=5e-7)


@pytest.mark.parametrize(
    ("seed", "r", "cells", "golden"),
    [
        (
            0, 0.4, 88,
            "............../...######.###./...######.###./.....####.###./............../............../"
            ".###.#######../.###.#######../.###.###....../###..#######../###..#######../###..#######../"
            ".....#######../..............",
        ),
        (
            1, 0.3, 74,
            "......###...../...######..##./...######..##./......###..##./...........##./.########...../"
            ".########..##./.####......##./...........##./.###........../.###..###.##../.###..###.##../"
            "......###...../..............",
        ),
        (
            2, 0.6, 113,
            "............../.###########../.###########../.###########../....#######.../....#######.../"
            "....########../.########.##../.########.##../.########.###./.########.###./...######.###./"
            ".....####.###./..............",
        ),
    ],
)  # fmt: skip
def test_rcc_mask(seed, r, cells, golden):
    rng = random.Random(seed)
    mask = parity.rcc_mask(parity.rcc_boxes(rng), 14, r, rng)
    assert mask.sum() == cells
    assert drawn(mask) == golden


def test_sample_masks():
    masks = parity.sample_masks("rcc", (0, 0.4), (0, 0.2), random.Random(1))
    assert [mask.sum() for mask in masks] == [65, 87]
    assert [drawn(mask) for mask in masks] == [
        "............../.###.....####./.###.....####./.###..#..####./.###..#......./......#......./"
        ".....###..###./####......###./####........../####........../.#....###.###./.#....###.###./"
        "......###...../..............",
        "............../.###.######.../.###.######.../.###.######.../.##..#####..../.##.........../"
        ".##..####...../.##..#####..../.##.........../.###########../.###########../.###########../"
        "..........###./..............",
    ]
    (block,) = parity.sample_masks("block", (0.3,), (0,), random.Random(0), crops=1)
    assert block.sum() == 58


# The published masks, measured: mean and deviation of the share masked, over many draws at each ratio.
MEASURED = {0.2: (0.219, 0.031), 0.3: (0.323, 0.037), 0.4: (0.423, 0.040), 0.6: (0.598, 0.042)}


@pytest.mark.parametrize("r", MEASURED)
def test_share_masked_is_as_measured(r):
    rng = random.Random(3)
    masks = np.stack([parity.rcc_mask(parity.rcc_boxes(rng), 14, r, rng) for _ in range(3000)])
    share = masks.mean(axis=(1, 2))
    mean, deviation = MEASURED[r]
    error = deviation / 3000**0.5
    rounding = 5e-4  # of the printed values
    assert abs(share.mean() - mean) < 3 * 2**0.5 * error + rounding  # both were sampled
    assert abs(share.std() - deviation) < 3 * error + rounding
    assert not masks[:, 13].any()
    assert not masks[:, :, 13].any()


# --- 4, 5: extras ----------------------------------------------------------------------------------


def masks_of_hook_4():
    b, y, x = torch.meshgrid(torch.arange(8), torch.arange(3), torch.arange(3), indexing="ij")
    return (b % 2 == 1) & ((y + x + b) % 3 == 0), (b % 2 == 0) & ((y * x + b) % 2 == 1)


def test_build_dc():
    masks = masks_of_hook_4()
    masks0, masks1, n = parity.build_dc(*masks, 0.25)
    assert n == 1
    extras = [
        ["".join(map(str, row.flatten().tolist())) for row in m[8:]] for m in (masks0, masks1)
    ]
    assert extras == [["002020200", "022220202"], ["020200002", "220202022"]]
    for extended, mask in zip((masks0, masks1), masks, strict=True):
        assert extended.dtype == torch.int64
        assert torch.equal(extended[:8], mask.long())


def test_mix_tokens():
    masks0, masks1, _ = parity.build_dc(*masks_of_hook_4(), 0.25)
    mask = torch.cat([masks0, masks1])
    X = fill((20, 5, 3, 3), 0.2).requires_grad_()
    mixed, left = parity.mix_tokens(X, mask)
    assert torch.equal(left, torch.where(mask == 2, 0, mask))
    foreign = {8: (11, {2, 4, 6}), 9: (10, {1, 2, 3, 4, 6, 8}),
               18: (1, {1, 3, 8}), 19: (0, {0, 1, 3, 5, 7, 8})}  # fmt: skip
    grad = torch.autograd.grad(mixed.sum(), X)[0].flatten(2)
    for row, (cells, source) in enumerate(zip(mixed.flatten(2), X.flatten(2), strict=True)):
        other, taken = foreign.get(row, (row, set()))
        for cell in range(9):
            wanted = X.flatten(2)[other] if cell in taken else source
            assert torch.equal(cells[:, cell], wanted[:, cell])
            assert torch.all(
                grad[row, :, cell] == (cell not in taken)
            )  # sources get none through it


# --- 6, 7: the loss --------------------------------------------------------------------------------

LOGITS = [
    fill((20, 8), 0.1, 3),
    fill((20, 9, 8), 0.9, 3),
    fill((20, 8), 0.5, 3),
    fill((20, 9, 8), 1.3, 3),
]


def test_dc_loss():
    masks0, masks1, _ = parity.build_dc(*masks_of_hook_4(), 0.25)
    centers = torch.zeros(1, 8), torch.zeros(1, 1, 8)
    losses = parity.dc_loss(*LOGITS, masks0, masks1, *centers, 0.04, 0.04, 1, 1, 0.3)
    golden = {"cls": 17.714174, "patch": 0.653274, "dc": 1.029196, "loss": 18.676208}
    assert {k: losses[k].item() for k in golden} == pytest.approx(golden, rel=RTOL)
    for name, first in (
        ("center", [0.004951, 0.009587, 0.012926, 0.014515]),
        ("center2", [0.000723, 0.000428, 0.000075, -0.000288]),
    ):
        got = losses[name].flatten()[:4]
        torch.testing.assert_close(got, torch.tensor(first), rtol=0, atol=2e-6)


def test_dc_loss_without_extras_is_that_of_ibot_to_the_bit():
    masks = [torch.cat([mask, mask[:2]]) for mask in masks_of_hook_4()]
    rest = (torch.zeros(1, 8), torch.zeros(1, 1, 8), 0.04, 0.07, 1.5, 0.5)
    got = parity.dc_loss(*LOGITS, *(mask.long() for mask in masks), *rest)
    want = parity.ibot_loss(*LOGITS[:2], None, *LOGITS[2:], masks, *rest)
    for name, value in want.items():
        assert torch.equal(got[name], value), name
    assert got["dc"] == 0


# --- 8, 10: colours --------------------------------------------------------------------------------

IMAGE = torch.tensor(
    [[[[0.2, 0.8], [0.5, 0.05]], [[0.4, 0.3], [0.55, 0.9]], [[0.6, 0.1], [0.45, 0.7]]]]
)
AFTER = {
    "brightness": [0.24, 0.96, 0.6, 0.06, 0.48, 0.36, 0.66, 1, 0.72, 0.12, 0.54, 0.84],
    "contrast": [0.305836, 0.881836, 0.593836, 0.161836, 0.497836, 0.401836, 0.641836, 0.913836,
                 0.689836, 0.209836, 0.545836, 0.785836],
    "saturation": [0.290188, 0.917673, 0.591566, 0.11058, 0.501388, 0.389673, 0.644366, 0.93778,
                   0.712588, 0.178473, 0.538766, 0.79698],
    "hue +.05": [0.290188, 0.917673, 0.559886, 0.11058, 0.374668, 0.611433, 0.644366, 0.83042,
                 0.712588, 0.178473, 0.538766, 0.93778],
    "hue -.08": [0.290188, 0.917673, 0.642254, 0.11058, 0.70414, 0.178473, 0.644366, 0.93778,
                 0.712588, 0.322089, 0.538766, 0.399924],
}  # fmt: skip


@pytest.mark.parametrize(
    ("after", "factors"),
    [
        ("brightness", (1.2, 1.0, 1.0, 0.0)),
        ("contrast", (1.2, 0.8, 1.0, 0.0)),
        ("saturation", (1.2, 0.8, 1.1, 0.0)),
        ("hue +.05", (1.2, 0.8, 1.1, 0.05)),
        ("hue -.08", (1.2, 0.8, 1.1, -0.08)),
    ],
)
def test_colour_jitter(after, factors):
    numbers = np.array(factors)[:, None]
    steps = ops.jitter_steps(np.array([[0, 1, 2, 3]]), *numbers[:3])
    parameters = [torch.from_numpy(array) for array in (*steps, numbers[3].astype(np.float32))]
    got = ops.color_jitter(IMAGE, *parameters)
    torch.testing.assert_close(got.flatten(), torch.tensor(AFTER[after]), rtol=RTOL, atol=2e-6)


def test_grey_and_solarise():
    grey = torch.tensor([0.363, 0.4267, 0.52365, 0.62305]).expand(3, 4).flatten()
    torch.testing.assert_close(ops.to_grey(IMAGE).flatten(), grey, rtol=RTOL, atol=1e-6)
    solar = torch.tensor([0.2, 0.2, 0.5, 0.05, 0.4, 0.3, 0.45, 0.1, 0.4, 0.1, 0.45, 0.3])
    torch.testing.assert_close(ops.solarize(IMAGE, 0.5).flatten(), solar, rtol=RTOL, atol=1e-6)


@pytest.mark.parametrize("mode", ["shared", "independent"])
def test_photometric_dc(mode):
    images = [torch.rand(8, 3, 16, 16) for _ in range(2)]
    images = [torch.cat([x, x[-2:]]) for x in images]
    teacher, student = parity.photometric_dc(images, 1, mode)
    assert teacher.shape == student.shape == (2, 10, 3, 16, 16)
    assert torch.equal(teacher[:, :8], student[:, :8])
    assert torch.equal(teacher[:, 8:], student[:, 8:]) == (mode == "shared")
    for crop in range(2):
        for extra in (8, 9):
            assert not torch.allclose(student[crop, extra], student[crop, extra - 2], atol=1e-3)
    if mode == "independent":
        assert torch.equal(teacher[:, 8:], teacher[:, 6:8])  # the first pass
