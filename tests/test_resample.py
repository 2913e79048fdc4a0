"""The host cutter against Pillow, and against the same filter in float64."""

import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataprep.synthetic import random_image
from dense_ssl.loaders.resample import crop_table, cut, layout
from dense_ssl.views import ViewSpec

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
CANARY = 0xA5


def resize(image, box, side, filter, flipped=False):
    """One crop by the cutter, [S, S, 3]; checks that nothing is written around it."""
    crops = crop_table([ViewSpec(name="a", count=1, size=side, filter=filter)])
    memory = layout(np.array([image.shape[:2]]), crops)
    scratch = np.full(memory.total, CANARY, np.uint8)
    scratch[memory.image :][: image.size] = image.ravel()
    guard = 4096
    written = np.full(3 * side * side + 2 * guard, CANARY, np.uint8)
    targets = np.array([written.ctypes.data + guard], np.int64)
    boxes, flips = np.array([box], np.int16), np.array([flipped])
    cut(*image.shape[:2], boxes, flips, crops, targets, 0, scratch.ctypes.data, memory)
    assert (written[:guard] == CANARY).all()
    assert (written[-guard:] == CANARY).all()
    return written[guard:-guard].reshape(3, side, side).transpose(1, 2, 0)


def test_scratch_memory_is_of_the_largest_image():
    crops = crop_table([ViewSpec(name="a", count=1, size=96)])
    wide, tall, both = (
        layout(np.array(sizes, np.int32), crops).total
        for sizes in ([(200, 30000)], [(30000, 200)], [(200, 30000), (30000, 200)])
    )
    assert max(wide, tall) <= both < wide + tall


def exactly(image, box, side, filter):
    """The same in float64, with 8 bits between the passes."""

    def kernel(x):
        x = np.abs(x)
        if filter == "bilinear":
            return np.maximum(1 - x, 0)
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        return np.where(x < 1, near, np.where(x < 2, far, 0))

    def matrix(low, high, extent):
        scale = (high - low) / side
        stretch = max(scale, 1)
        support = stretch * (1 if filter == "bilinear" else 2)
        centres = low + (np.arange(side) + 0.5) * scale
        pixels = np.arange(extent)
        first = np.maximum((centres - support + 0.5).astype(int), 0)[:, None]
        last = np.minimum((centres + support + 0.5).astype(int), extent)[:, None]
        weights = kernel((pixels + 0.5 - centres[:, None]) / stretch)
        weights = np.where((first <= pixels) & (pixels < last), weights, 0)
        return weights / weights.sum(axis=1, keepdims=True)

    def rounded(x):
        return np.clip(np.floor(x + 0.5), 0, 255)

    height, width = image.shape[:2]
    x, y = matrix(box[0], box[2], width), matrix(box[1], box[3], height)
    horizontal = rounded(np.einsum("ow,hwc->hoc", x, image.astype(float)))
    return rounded(np.einsum("oh,hwc->owc", y, horizontal))


def pillow(image, box, side, filter):
    return np.asarray(Image.fromarray(image).resize((side, side), FILTERS[filter], box=box))


# (height, width), box, side: enlarging, reducing, at the borders, odd sides, one pixel, narrow strips
CASES = [
    ((256, 340), (30, 20, 300, 230), 224),
    ((256, 340), (0, 0, 340, 256), 96),
    ((500, 375), (100, 200, 180, 290), 96),
    ((120, 90), (3, 5, 88, 117), 33),
    ((64, 64), (0, 0, 64, 64), 64),
    ((40, 50), (10, 10, 11, 12), 17),
    ((900, 1300), (0, 0, 1300, 900), 7),
    ((3, 700), (5, 0, 690, 3), 32),
    ((1, 1), (0, 0, 1, 1), 5),
    ((7, 2), (1, 0, 2, 7), 1),
]


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize(("size", "box", "side"), CASES)
def test_crops_are_those_of_the_exact_filter(size, box, side, filter):
    image = random_image(*size, seed=1)
    found = resize(image, box, side, filter).astype(int)
    error = np.abs(found - exactly(image, box, side, filter))
    assert error.max() <= (1 if filter == "bilinear" else 2)
    assert error.sum() <= max(0.06 * error.size, 1)


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize(("size", "box", "side"), CASES)
def test_crops_are_those_of_pillow(size, box, side, filter):
    image = random_image(*size, seed=2)
    error = np.abs(resize(image, box, side, filter).astype(int) - pillow(image, box, side, filter))
    assert error.max() <= 2
    assert error.sum() <= max(0.06 * error.size, 1)


@pytest.mark.parametrize("filter", FILTERS)
def test_harsh_contrasts_stay_close_to_pillow(filter):
    """Noise of black and white overshoots everywhere, and Pillow may clip it in another order."""
    image = np.random.default_rng(0).integers(0, 2, (150, 200, 3), np.uint8) * 255
    box = (20, 10, 180, 140)
    found = resize(image, box, 96, filter).astype(int)
    assert np.abs(found - exactly(image, box, 96, filter)).max() <= 2
    error = np.abs(found - pillow(image, box, 96, filter))
    assert error.mean() < (0.1 if filter == "bilinear" else 3)


@pytest.mark.parametrize("filter", FILTERS)
def test_flat_images_stay_flat(filter):
    for value in (0, 1, 127, 128, 254, 255):
        for size, box, side in CASES:
            image = np.full((*size, 3), value, np.uint8)
            assert (resize(image, box, side, filter) == value).all()


@pytest.mark.parametrize("filter", FILTERS)
def test_a_box_of_the_output_size_is_copied(filter):
    image = random_image(80, 100, seed=3)
    np.testing.assert_array_equal(resize(image, (11, 7, 75, 71), 64, filter), image[7:71, 11:75])


@pytest.mark.parametrize(("size", "box", "side"), CASES)
def test_a_mirrored_crop_is_the_crop_mirrored(size, box, side):
    image = random_image(*size, seed=4)
    mirrored = resize(image, box, side, "bilinear", flipped=True)
    np.testing.assert_array_equal(mirrored, resize(image, box, side, "bilinear")[:, ::-1])


def test_all_crops_of_a_batch_go_where_they_belong():
    views = [
        ViewSpec(name="global", count=2, size=40),
        ViewSpec(name="twin", count=2, size=40, twin_of="global"),
        ViewSpec(name="local", count=1, size=19, filter="bicubic"),
    ]
    image = random_image(70, 90, seed=5)
    boxes = np.array(
        [(0, 0, 80, 60), (5, 6, 50, 70), (1, 1, 2, 2), (1, 1, 2, 2), (30, 2, 66, 44)], np.int16
    )
    flips = np.zeros(5, bool)
    crops = crop_table(views)
    assert crops[:, 0].tolist() == [0, 1, 4]  # a twin is not cut
    memory = layout(np.array([image.shape[:2]]), crops)
    scratch = np.zeros(memory.total, np.uint8)
    scratch[memory.image :][: image.size] = image.ravel()
    batch = {
        side: np.zeros((count, 3, 3, side, side), np.uint8) for side, count in ((40, 2), (19, 1))
    }
    targets = np.array([part.ctypes.data for side in batch for part in batch[side]], np.int64)
    cut(*image.shape[:2], boxes, flips, crops, targets, 1, scratch.ctypes.data, memory)
    for crop, (position, side, cubic) in zip((batch[40][0], batch[40][1], batch[19][0]), crops):
        assert not crop[[0, 2]].any()
        wanted = resize(image, boxes[position], side, "bicubic" if cubic else "bilinear")
        np.testing.assert_array_equal(crop[1].transpose(1, 2, 0), wanted)


def digest():
    """A hash of crops of every kind: what all CPUs have to agree on."""
    found = hashlib.sha256()
    for filter in FILTERS:
        for size, box, side in CASES[:4]:
            found.update(resize(random_image(*size, seed=6), box, side, filter).tobytes())
    return found.hexdigest()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names an x86 CPU")
def test_an_older_cpu_gives_the_same_pixels():
    """The same code for a CPU without AVX, which every x86 can run."""
    root = Path(__file__).resolve().parent.parent
    printed = subprocess.run(
        [sys.executable, "-c", "import test_resample; print(test_resample.digest())"],
        env=os.environ
        | {"NUMBA_CPU_NAME": "nehalem", "NUMBA_CPU_FEATURES": ""}
        | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout.strip() == digest()
