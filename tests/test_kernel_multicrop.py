"""The device cutter against Pillow, and against the same filter in float64.

Plainly on a CPU these are tests of the reference, with TRITON_INTERPRET=1 and DENSE_SSL_KERNELS=triton of the
Triton code, on a CUDA machine of the compiled kernel.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from dataprep.synthetic import random_image
from kernels import launch
from kernels.language import INTERPRETED
from kernels.multicrop import SPEC, eager, multicrop, reference

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
GUARD = 64  # bytes of poison


def flat(images, gap=0, poison=0):
    """Decoded images as one buffer with `gap` bytes around each; (buffer, offsets, sizes)."""
    parts, offsets, end = [np.full(gap, poison, np.uint8)], [], gap
    for image in images:
        parts += [image.ravel(), np.full(gap, poison, np.uint8)]
        offsets.append(end)
        end += image.size + gap
    buffer = torch.from_numpy(np.concatenate(parts)).to(DEVICE)
    sizes = torch.tensor([image.shape[:2] for image in images], dtype=torch.int32, device=DEVICE)
    return (
        buffer,
        torch.tensor(offsets, dtype=torch.int64, device=DEVICE),
        sizes.view(len(images), 2),
    )


def plan(boxes, flipped=None):
    boxes = torch.tensor(boxes, dtype=torch.int16, device=DEVICE)
    if flipped is None:
        flipped = torch.zeros(boxes.shape[:2])
    return boxes, torch.as_tensor(flipped, dtype=torch.bool, device=DEVICE)


def cut(image, box, size, filter, flipped=False):
    """One crop by the kernel, int [S, S, 3]."""
    crops = multicrop(*flat([image]), *plan([[box]], [[flipped]]), size, filter)
    return crops[0, 0].permute(1, 2, 0).cpu().numpy().astype(int)


def exactly(image, box, size, filter):
    crops = reference(*flat([image]), *plan([[box]]), size, filter)
    return crops[0, 0].permute(1, 2, 0).cpu().numpy().astype(int)


def pillow(image, box, size, filter):
    crop = Image.fromarray(image).resize((size, size), FILTERS[filter], box=box, reducing_gap=None)
    return np.asarray(crop).astype(int)


# (height, width), box, side: reducing, enlarging, at all borders, one pixel, strips, several tiles each way
CASES = [
    ((20, 17), (0, 0, 17, 20), 8),
    ((20, 17), (3, 5, 12, 11), 8),
    ((20, 17), (3, 5, 6, 8), 8),
    ((20, 17), (0, 4, 5, 20), 8),
    ((20, 17), (12, 0, 17, 7), 8),
    ((20, 17), (9, 9, 10, 10), 8),
    ((20, 17), (0, 19, 1, 20), 5),
    ((20, 17), (4, 6, 12, 14), 8),  # of the output's size: copied
    ((1, 1), (0, 0, 1, 1), 3),
    ((3, 90), (5, 0, 88, 3), 9),
    ((7, 2), (1, 0, 2, 7), 1),
    ((60, 50), (2, 3, 45, 58), 40),
    ((60, 50), (0, 0, 50, 60), 2),  # as 3000 px to 100
]


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize(("extent", "box", "size"), CASES)
def test_crops_are_those_of_pillow(extent, box, size, filter):
    image = random_image(*extent, seed=1)
    error = np.abs(cut(image, box, size, filter) - pillow(image, box, size, filter))
    assert error.max() < 2
    assert error.sum() <= max(0.01 * error.size, 1)


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize(("extent", "box", "size"), CASES)
def test_crops_are_those_of_the_exact_filter(extent, box, size, filter):
    """Noise of black and white overshoots everywhere: what is clipped matters, and when."""
    image = np.random.default_rng(0).integers(0, 2, (*extent, 3), np.uint8) * 255
    error = np.abs(cut(image, box, size, filter) - exactly(image, box, size, filter))
    assert error.max() < 2
    assert error.sum() <= max(0.005 * error.size, 1)


@pytest.mark.parametrize("filter", FILTERS)
def test_flat_images_stay_flat(filter):
    for value in (0, 1, 127, 128, 254, 255):
        for extent, box, size in CASES[:3]:
            image = np.full((*extent, 3), value, np.uint8)
            assert (cut(image, box, size, filter) == value).all()


@pytest.mark.parametrize("filter", FILTERS)
def test_a_box_of_the_output_size_is_copied(filter):
    image = random_image(20, 17, seed=3)
    np.testing.assert_array_equal(cut(image, (4, 6, 12, 14), 8, filter), image[6:14, 4:12])


def test_a_mirrored_crop_is_the_crop_mirrored():
    image = random_image(20, 30, seed=4)
    for box in ((0, 0, 30, 20), (3, 5, 9, 11)):
        straight = cut(image, box, 11, "bilinear")
        np.testing.assert_array_equal(cut(image, box, 11, "bilinear", True), straight[:, ::-1])


def ragged():
    """Three images of different sizes, four crops of each, with every flip and border among them."""
    images = [
        random_image(*extent, seed=n) for n, extent in enumerate([(20, 17), (9, 31), (14, 14)])
    ]
    boxes = np.zeros((4, 3, 4), int)
    for b, image in enumerate(images):
        height, width = image.shape[:2]
        boxes[:, b] = [
            (0, 0, width, height),
            (1, 2, width - 3, height - 1),
            (width - 2, 0, width, 3),
            (0, height - 4, 5, height),
        ]
    flipped = np.arange(12).reshape(4, 3) % 2 == 1
    return images, boxes, flipped


@pytest.mark.parametrize("filter", FILTERS)
def test_every_crop_of_a_ragged_batch_is_its_own(filter):
    images, boxes, flipped = ragged()
    crops = multicrop(*flat(images), *plan(boxes, flipped), 8, filter)
    assert crops.shape == (4, 3, 3, 8, 8)
    assert crops.dtype == torch.uint8
    for v in range(4):
        for b, image in enumerate(images):
            alone = cut(image, tuple(boxes[v, b].tolist()), 8, filter, bool(flipped[v, b]))
            together = crops[v, b].permute(1, 2, 0).cpu().numpy()
            np.testing.assert_array_equal(together, alone)


def test_boxes_may_be_int32_and_arguments_strided():
    images, boxes, flipped = ragged()
    pixels, offsets, sizes = flat(images)
    boxes, flipped = plan(boxes, flipped)
    want = multicrop(pixels, offsets, sizes, boxes, flipped, 8)
    assert torch.equal(multicrop(pixels, offsets, sizes, boxes.int(), flipped, 8), want)
    got = multicrop(
        pixels.repeat_interleave(2)[::2],
        offsets.repeat_interleave(2)[::2],
        sizes.t().contiguous().t(),
        boxes.repeat_interleave(2, -1)[..., ::2],
        flipped.t().contiguous().t(),
        8,
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("filter", FILTERS)
def test_repeats_itself_to_the_bit_and_sees_nothing_beside_the_images(filter, monkeypatch):
    """The images in the middle of poison of two kinds, the result too, and nothing past its ends."""
    images, boxes, flipped = ragged()
    want = multicrop(*flat(images), *plan(boxes, flipped), 8, filter)
    made = []

    def guarded_empty(*shape, dtype, like):
        around = torch.full(
            (2 * GUARD + int(np.prod(shape)),), 0xA5, dtype=dtype, device=like.device
        )
        made.append(around)
        return around[GUARD:-GUARD].view(shape)

    monkeypatch.setattr(launch, "empty", guarded_empty)
    for poison in (0, 255):
        buffer, offsets, sizes = flat(images, GUARD, poison)
        before = buffer.clone()
        got = multicrop(buffer, offsets, sizes, *plan(boxes, flipped), 8, filter)
        assert torch.equal(got, want)
        assert torch.equal(buffer, before)
    for around in made:
        assert (around[:GUARD] == 0xA5).all()
        assert (around[-GUARD:] == 0xA5).all()


@pytest.mark.parametrize(("views", "batch"), [(2, 0), (0, 1), (0, 0)])
def test_no_images_or_no_views_are_no_crops(views, batch):
    images = [random_image(5, 6, seed=0)] * batch
    boxes = torch.zeros(views, batch, 4, dtype=torch.int16, device=DEVICE)
    flipped = torch.zeros(views, batch, dtype=torch.bool, device=DEVICE)
    assert multicrop(*flat(images), boxes, flipped, 4).shape == (views, batch, 3, 4, 4)


def test_it_is_a_good_operator():
    images, boxes, flipped = ragged()
    given = (*flat(images), *plan(boxes, flipped), 8)
    torch.library.opcheck(torch.ops.dense_ssl.multicrop, (*given, False))
    compiled = torch.compile(multicrop, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), multicrop(*given))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(multicrop(*given), multicrop(*given))


def test_wrong_arguments_are_one_sentence():
    images, boxes, flipped = ragged()
    pixels, offsets, sizes = flat(images)
    boxes, flipped = plan(boxes, flipped)
    with pytest.raises(
        ValueError, match=r"^multicrop: .*sizes \[B, 2\].* expected, got .*\(2, 2\)"
    ):
        multicrop(pixels, offsets, sizes[:2], boxes, flipped, 8)
    with pytest.raises(ValueError, match=r"^multicrop: .*flipped \[V, B\] expected, got"):
        multicrop(pixels, offsets, sizes, boxes, flipped[:1], 8)
    with pytest.raises(ValueError, match=r"^multicrop: uint8, .* expected, got float32, int64"):
        multicrop(pixels.float(), offsets, sizes, boxes, flipped, 8)
    with pytest.raises(
        ValueError, match=r"^multicrop: .* expected, got uint8, int64, int32, float32"
    ):
        multicrop(pixels, offsets, sizes, boxes.float(), flipped, 8)
    with pytest.raises(
        ValueError, match=r"^multicrop: all tensors on one device expected, got .*meta"
    ):
        multicrop(pixels, offsets.to("meta"), sizes, boxes, flipped, 8)
    with pytest.raises(
        ValueError, match=r"^multicrop: size 1 .. 16384 .* expected, got 0, bilinear"
    ):
        multicrop(pixels, offsets, sizes, boxes, flipped, 0)
    with pytest.raises(
        ValueError, match=r"^multicrop: .*bilinear or bicubic expected, got 8, lanczos"
    ):
        multicrop(pixels, offsets, sizes, boxes, flipped, 8, "lanczos")


def test_the_published_way_agrees_inside_the_border():
    """torchvision crops before it resizes: only what lies around the box makes a difference."""
    images = [random_image(40, 50, seed=n) for n in range(2)]
    whole = plan([[(0, 0, 50, 40)] * 2], [[True, False]])
    error = (
        eager(*flat(images), *whole, 16).int() - multicrop(*flat(images), *whole, 16).int()
    ).abs()
    assert error.max() < 2


@pytest.mark.skipif(INTERPRETED, reason="compiling needs a process without the interpreter")
@pytest.mark.parametrize("sm", [86, 90])
def test_real_shapes_compile_ahead_of_time_within_the_cards_limits(sm):
    pytest.importorskip("triton")
    from kernels.ahead import compile_only

    with compile_only(sm) as launches, torch.device("meta"):
        for shape in SPEC.real.values():
            SPEC.call(**SPEC.inputs(shape, torch.uint8))
    assert launches
    for found in launches:
        assert found.complaints(wide=SPEC.wide_loads) == []
        assert found.stack == 0


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("name", list(SPEC.real))
def test_real_shapes_on_a_gpu(name):
    shape = {**SPEC.real[name], "B": 8}
    with torch.device(DEVICE):
        given = SPEC.inputs(shape, torch.uint8)
    crops = multicrop(**given)
    assert torch.equal(crops, multicrop(**given))
    error = (crops.int() - reference(**given).int()).abs()
    assert error.max() < 2
    assert error.float().mean() < 0.005


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_buffers_beyond_two_gigabytes_and_large_reductions():
    height = width = 4000
    count = 2**31 // (height * width * 3) + 2
    images = torch.randint(256, (count * height * width * 3,), dtype=torch.uint8, device=DEVICE)
    offsets = torch.arange(count, device=DEVICE) * (height * width * 3)
    sizes = torch.tensor([[height, width]] * count, dtype=torch.int32, device=DEVICE)
    boxes, flipped = plan([[(0, 0, width, height)] * count])
    last = slice(count - 1, None)
    got = multicrop(images, offsets, sizes, boxes, flipped, 96, "bicubic")[:, last]
    want = reference(
        images, offsets[last], sizes[last], boxes[:, last], flipped[:, last], 96, "bicubic"
    )
    error = (got.int() - want.int()).abs()
    assert error.max() < 2
    assert error.float().mean() < 0.01
