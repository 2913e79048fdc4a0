"""Golden values of UDI: numbers the official code gave on deterministic inputs."""

import random

import numpy as np
import pytest
import torch

from dense_ssl import parity
from dense_ssl.parity.udi import StudentLogits, TeacherLogits

RTOL, ATOL = 1e-5, 1.5e-6
HEIGHT, WIDTH = 375, 500
RATIO = (3 / 4, 4 / 3)


def f(shape, a=0.37, b=0.11):
    """The specification's deterministic tensor: sin(a i + b i^2 / n) in float64, cast to float32."""
    i = np.arange(np.prod(shape), dtype=np.float64)
    return torch.from_numpy(np.sin(a * i + b * i**2 / len(i)).reshape(shape).astype(np.float32))


def close(got, want):
    torch.testing.assert_close(got, torch.tensor(want), rtol=RTOL, atol=ATOL)


# --- crops -----------------------------------------------------------------------------------------


def test_free_crops_and_their_coordinates():
    rng = random.Random(0)
    crops = [parity.crop_params((HEIGHT, WIDTH), (0.25, 1), RATIO, rng) for _ in range(2)]
    assert crops == [(16, 124, 349, 304), (38, 122, 297, 350)]
    coord = parity.crop_coord(*crops[0], HEIGHT, WIDTH)
    close(coord, [0.0427807, 0.2484970, 0.9732620, 0.8557114])
    assert torch.equal(parity.flip_coord(coord), coord[[0, 3, 2, 1]])


REFERENCED = [
    (0, (0.05, 0.25), (0.1, 0.9, 0.5, 0.6),
     [(107, 95, 188, 218), (103, 281, 138, 139), (55, 295, 223, 205), (24, 391, 134, 109)]),
    (3, (0.25, 1), (0, 0, 0.5, 0.5),
     [(47, 29, 280, 287), (38, 3, 329, 345), (2, 59, 363, 342), (33, 49, 332, 410)]),
]  # fmt: skip


@pytest.mark.parametrize(("seed", "scale", "ref", "golden"), REFERENCED)
def test_referenced_crops(seed, scale, ref, golden):
    rng = random.Random(seed)
    crops = [parity.crop_params_ref((HEIGHT, WIDTH), scale, RATIO, ref, rng) for _ in golden]
    assert crops == golden


def test_without_the_exchanged_index_rows_and_sizes_stay_and_columns_are_pulled_like_rows():
    size, scale, ref = (300, 300), (0.05, 0.25), (0.6, 0.1, 0.9, 0.4)
    turned = (ref[1], ref[0], ref[3], ref[2])
    moved = 0
    for seed in range(60):
        crops = [
            parity.crop_params_ref(size, scale, (1.0, 1.0), ref, random.Random(seed), published)
            for published in (False, True)
        ]
        (i, j, h, w), other = crops
        assert (i, h, w) == (other[0], *other[2:])
        moved += j != other[1]
        # Columns of a crop are rows of the transposed problem from the same start.
        free = parity.crop_params(size, scale, (1.0, 1.0), random.Random(seed))
        fake = _Turned(free, size, scale, seed)
        assert parity.crop_params_ref(size, scale, (1.0, 1.0), turned, fake, False) == (j, i, w, h)
    assert moved > 0


class _Turned(random.Random):
    """The same draws, but row and column of the crop exchanged."""

    def __new__(cls, *_):
        return super().__new__(cls)

    def __init__(self, free, size, scale, seed):
        super().__init__(seed)
        self._places = [free[1], free[0]]

    def randrange(self, count):
        return self._places.pop(0)


def test_reference_boxes():
    close(parity.reference_box((0.1, 0.2, 0.7, 0.8), (0.3, 0.9, 0.9, 0.4)), [0.1, 0.2, 0.9, 0.8])
    close(parity.reference_box((0.1, 0.8, 0.7, 0.2), (0.3, 0.9, 0.9, 0.4)), [0.1, 0.8, 0.9, 0.4])


# --- samples ---------------------------------------------------------------------------------------


def test_sampled_cells():
    torch.manual_seed(0)
    random.seed(0)
    assert parity.srs_mask(14, 3).nonzero().flatten().tolist() == [
        33, 38, 60, 67, 82, 101, 103, 107, 115, 117, 125, 150, 163, 167, 173, 184,
    ]  # fmt: skip
    mask = parity.srs_mask(6, 2)
    assert mask.shape == (36,) and mask.dtype == torch.bool
    assert mask.nonzero().flatten().tolist() == [0, 2, 10, 13, 20, 23, 28, 31, 32]


def test_maps_of_a_crop_in_a_mirrored_one():
    mask = torch.zeros(36, dtype=torch.bool)
    mask[[0, 3, 4, 12, 14, 17, 24, 27, 29]] = True
    src, tgt = parity.create_map((0.2, 0.3, 0.6, 0.7), (0.1, 0.9, 0.9, 0.4), mask)
    assert src.shape == (9, 36) and tgt.shape == (9, 196)
    assert src[:6].argmax(1).tolist() == [3, 4, 14, 17, 27, 29]
    assert torch.equal(src.sum(1), torch.tensor([1.0] * 6 + [0] * 3))
    assert torch.all(src[6:] == 0) and torch.all(tgt[6:] == 0)
    golden = [
        {(1, 9): 0.24, (1, 10): 0.135, (2, 9): 0.4, (2, 10): 0.225},
        {(1, 7): 0.27, (1, 8): 0.105, (2, 7): 0.45, (2, 8): 0.175},
        {(4, 11): 0.433999, (4, 12): 0.341, (5, 11): 0.126, (5, 12): 0.099},
    ]
    for row, weights in enumerate(golden):
        want = torch.zeros(14, 14)
        for place, value in weights.items():
            want[place] = value
        torch.testing.assert_close(tgt[row].view(14, 14), want, rtol=1e-5, atol=3e-6)


# --- attention -------------------------------------------------------------------------------------


def test_attention_at_points():
    module = parity.srs_module(
        {
            "qkv.weight": 0.5 * f((36, 12)),
            "qkv.bias": 0.1 * f((36,)),
            "proj.weight": 0.5 * f((12, 12), a=0.23),
            "proj.bias": 0.1 * f((12,), a=0.5),
        }
    )
    maps = torch.zeros(1, 2, 3, 4)
    maps[0, 0, :2] = torch.tensor([[1.0, 0, 0, 0], [0, 0.25, 0.75, 0]])
    maps[0, 1, :2] = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0, 0, 0, 1]])
    with torch.no_grad():
        out, attention = parity.srs(f((2, 4, 12), a=0.91), maps, module)
    assert out.shape == (1, 2, 3, 12) and attention.shape == (1, 2, 6, 3, 4)
    close(out[0, 0, 1], [
        -1.132298, -0.304164, -0.894709, 0.845606, 0.954467, -0.047812, 0.522900, -1.202487,
        -1.662697, 0.268883, 1.574032, 1.078280,
    ])  # fmt: skip
    close(out[0, 1, 2], [
        1.335368, -1.097472, 1.728660, -0.659503, 1.353507, -0.031078, -0.887668, 0.338222,
        -0.541995, -1.383981, -0.639323, 0.485263,
    ])  # fmt: skip
    close(attention[0, 0, 0], [
        [0.224336, 0.246065, 0.267718, 0.261880], [0.264746, 0.251652, 0.238917, 0.244685],
        [0.0, 0, 0, 0],
    ])  # fmt: skip


# --- losses ----------------------------------------------------------------------------------------

CENTER = 0.01 * f((3, 5))


@pytest.fixture
def student():
    return StudentLogits(
        cls=f((4, 1, 5), a=0.3),
        plus=f((4, 1, 5), a=0.41),
        patch=f((1, 4, 16, 5), a=0.53),
        mask=(torch.arange(64) % 3 != 0).float().view(1, 4, 16, 1),
        local_cls=f((4, 1, 5), a=0.61),
        local_plus=f((4, 1, 5), a=0.71),
    )


@pytest.fixture
def teacher():
    weight = (torch.arange(2 * 4 * 9) % 4 != 0).float().view(2, 4, 9, 1)
    weight[0, 0] = 0
    return TeacherLogits(
        cls=f((4, 1, 5), a=0.83),
        patch=f((1, 4, 16, 5), a=0.97),
        weight=(torch.arange(64) % 3 != 0).float().view(1, 4, 16, 1),
        local=f((2, 4, 9, 5), a=1.03),
        local_weight=weight,
    )


def test_blended_targets(teacher):
    cls = teacher.cls[:, 0]
    t = parity.udi_target(cls, teacher.patch[0], teacher.weight[0, :, :, 0])
    close(t[0], [-0.013403, 0.385121, 0.522865, 0.297087, -0.139437])
    # Local crop 0 of image 0: view 0 is row 0, view 1 row 2 of the teacher's [B; A].
    t = parity.udi_target(cls, teacher.local[0], teacher.local_weight[0, :, :, 0])
    close(t[0], [0, 0.370816, 0.496912, 0.283184, -0.131634])
    close(t[2], [0.340432, -0.117300, -0.495034, -0.445298, 0.012401])


def test_losses(student, teacher):
    total, (of_global, of_local) = parity.udi_loss(student, teacher, CENTER, 0.05)
    assert [x.item() for x in of_global] == pytest.approx([7.122112, 8.827572, 7.972152], rel=RTOL)
    assert [x.item() for x in of_local] == pytest.approx([4.950566, 9.333267], rel=RTOL)
    assert total.item() == pytest.approx(7.603756, rel=RTOL)


def test_centres(teacher):
    close(parity.update_centre(CENTER, teacher), [
        [0.013329, 0.011763, 0.001999, -0.001214, 0.008437],
        [0.016177, 0.005982, -0.004537, -0.006390, -0.001798],
        [-0.005127, -0.015668, -0.014936, -0.001060, 0.012395],
    ])  # fmt: skip


def test_masked_cross_entropy_is_one_ratio_over_the_whole_batch(student, teacher):
    target = ((teacher.patch - CENTER[2]) / 0.05).softmax(-1)
    log_share = (student.patch / 0.1).log_softmax(-1)
    got = parity.masked_ce(log_share, target, student.mask[..., 0])
    assert got.item() == pytest.approx(7.972152, rel=RTOL)
    assert parity.masked_ce(log_share, target, torch.zeros(1, 4, 16)) == 0


def test_levels_are_dropped_with_their_share(student, teacher):
    """One class token: two levels; and no patches: DINO."""
    one = student._replace(plus=None, local_plus=None)
    total, (of_global, of_local) = parity.udi_loss(one, teacher, CENTER, 0.05)
    level_cls = (2 * 7.122112 + 4 * 4.950566) / 6
    assert total.item() == pytest.approx((level_cls + 7.972152) / 2, rel=RTOL)
    assert (len(of_global), len(of_local)) == (2, 1)
    dino = one._replace(patch=None, mask=None)
    bare = teacher._replace(patch=None, weight=None, local=None, local_weight=None)
    total, _ = parity.udi_loss(dino, bare, CENTER, 0.05)
    assert total.item() == pytest.approx(level_cls, rel=RTOL)
    crops = [torch.cat([x[:, 0] for x in (one.cls, one.local_cls)]), teacher.cls[:, 0]]
    crops[1] = crops[1].view(2, 2, 5).flip(0).reshape(4, 5)  # DINO's teacher has [A; B]
    want = parity.dino_loss(*crops, CENTER[:1], 0.05)
    torch.testing.assert_close(total, want)
