"""Photometry: formulas against independent references, draws against their distributions."""

import colorsys
import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image, ImageFilter

from dataprep.synthetic import coordinate_image, random_image
from dense_ssl import augment
from dense_ssl.augment import MEAN, STD, Photometry, _draw, _to_device
from dense_ssl.config import UserError
from dense_ssl.crops import Crops, MultiCropBatch
from dense_ssl.photometry import ops as ops
from dense_ssl.photometry.policies import POLICIES, ColorJitter, GaussianBlur, Policy, Solarize
from dense_ssl.rng import fold_np, key_of
from dense_ssl.views import ViewSpec

ORDERS = list(itertools.permutations(range(4)))


def batch_of(images, index=None, **views):
    """A batch whose views show `images` uint8 [B, 3, S, S], `count` times each."""
    count = len(images)
    crops = {
        name: Crops(
            images.expand(times, *images.shape).contiguous(),
            torch.zeros(times, count, 4),
            torch.zeros(times, count, dtype=torch.bool),
        )
        for name, times in views.items()
    }
    index = torch.arange(count) if index is None else index
    return MultiCropBatch(crops, index, torch.full((count,), -1))


def real_images(count, size, seed=0):
    images = [random_image(size, size, seed * 1000 + i).transpose(2, 0, 1) for i in range(count)]
    return torch.from_numpy(np.stack(images))


def denormalise(x):
    return x.double() * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


def jitter(x, order, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0):
    n = len(x)
    columns = (np.full(n, value) for value in (brightness, contrast, saturation))
    matrices, means = ops.jitter_steps(np.tile(order, (n, 1)), *columns)
    turn = torch.full((n,), hue, dtype=x.dtype)
    return ops.color_jitter(
        x, torch.from_numpy(matrices).to(x), torch.from_numpy(means).to(x), turn
    )


# --- formulas ---------------------------------------------------------------------------------


def numbers(text):
    return pytest.approx([float(word) for word in text.split()], abs=2e-6)


def test_published_values():
    """The worked example of the decoupling method's specification, one operation after the other."""
    x = torch.tensor(
        [[[0.2, 0.8], [0.5, 0.05]], [[0.4, 0.3], [0.55, 0.9]], [[0.6, 0.1], [0.45, 0.7]]]
    )[None]
    order = (0, 1, 2, 3)

    def flat(image):
        return image.reshape(-1).tolist()

    assert flat(ops.to_grey(x)[:, :1]) == numbers("0.363 0.4267 0.52365 0.62305")
    solarised = flat(ops.solarize(x, 0.5))
    assert solarised == numbers("0.2 0.2 0.5 0.05 0.4 0.3 0.45 0.1 0.4 0.1 0.45 0.3")
    x = jitter(x, order, brightness=1.2)
    assert flat(x) == numbers("0.24 0.96 0.6 0.06 0.48 0.36 0.66 1 0.72 0.12 0.54 0.84")
    x = jitter(x, order, contrast=0.8)
    assert flat(x) == numbers(
        "0.305836 0.881836 0.593836 0.161836 0.497836 0.401836 "
        "0.641836 0.913836 0.689836 0.209836 0.545836 0.785836"
    )
    x = jitter(x, order, saturation=1.1)
    assert flat(x) == numbers(
        "0.290188 0.917673 0.591566 0.11058 0.501388 0.389673 "
        "0.644366 0.93778 0.712588 0.178473 0.538766 0.79698"
    )
    assert flat(jitter(x, order, hue=0.05)) == numbers(
        "0.290188 0.917673 0.559886 0.11058 0.374668 0.611433 "
        "0.644366 0.83042 0.712588 0.178473 0.538766 0.93778"
    )
    assert flat(jitter(x, order, hue=-0.08)) == numbers(
        "0.290188 0.917673 0.642254 0.11058 0.70414 0.178473 "
        "0.644366 0.93778 0.712588 0.322089 0.538766 0.399924"
    )


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4, 3.0])
def test_single_operations_are_torchvisions(factor):
    x = torch.rand(5, 3, 17, 23, generator=torch.Generator().manual_seed(0))
    order = (3, 1, 0, 2)
    # torchvision's grey has the red weight 0.2989, ours 0.299: at most 1e-4 times the factor apart
    torch.testing.assert_close(
        jitter(x, order, brightness=factor), tv.adjust_brightness(x, factor), atol=2e-6, rtol=0
    )
    torch.testing.assert_close(
        jitter(x, order, contrast=factor), tv.adjust_contrast(x, factor), atol=3e-4, rtol=0
    )
    torch.testing.assert_close(
        jitter(x, order, saturation=factor), tv.adjust_saturation(x, factor), atol=3e-4, rtol=0
    )
    torch.testing.assert_close(ops.to_grey(x), tv.rgb_to_grayscale(x, 3), atol=1.1e-4, rtol=0)
    for threshold in (0.0, 0.3, 0.5, 1.0):
        assert torch.equal(ops.solarize(x, threshold), tv.solarize(x, threshold))


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_the_jitter(order):
    x = torch.rand(3, 3, 11, 13, generator=torch.Generator().manual_seed(1))
    ours = jitter(x, order, brightness=1.3, contrast=0.7, saturation=1.35, hue=0.09)
    steps = {
        0: lambda y: tv.adjust_brightness(y, 1.3),
        1: lambda y: tv.adjust_contrast(y, 0.7),
        2: lambda y: tv.adjust_saturation(y, 1.35),
        3: lambda y: tv.adjust_hue(y, 0.09),
    }
    for number in order:
        x = steps[number](x)
    torch.testing.assert_close(ours, x, atol=5e-4, rtol=0)


@pytest.mark.parametrize("turn", [-0.5, -0.37, -0.1, 0.0, 0.05, 0.1, 0.5])
def test_hue_is_that_of_the_hsv_cone(turn):
    """Against the standard library, pixel by pixel, in double precision, ties and greys included."""
    generator = np.random.default_rng(0)
    pixels = generator.random((300, 3))
    pixels[:60] = generator.integers(0, 3, (60, 3)) / 2  # ties, corners of the cube, greys
    expected = []
    for red, green, blue in pixels:
        hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
        expected.append(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value))
    x = torch.from_numpy(pixels.T.reshape(1, 3, 20, 15).copy())
    got = ops.adjust_hue(x, torch.tensor([turn], dtype=torch.float64))
    np.testing.assert_allclose(got.reshape(3, -1).T, expected, atol=1e-12)
    got = ops.adjust_hue(x.float(), torch.tensor([turn]))
    np.testing.assert_allclose(got.reshape(3, -1).T, expected, atol=3e-6)


def test_parameters_are_per_image():
    x = torch.rand(len(ORDERS), 3, 9, 9, generator=torch.Generator().manual_seed(2))
    generator = np.random.default_rng(3)
    factors = generator.uniform(0.6, 1.4, (3, len(x)))
    turns = generator.uniform(-0.1, 0.1, len(x)).astype(np.float32)
    matrices, means = ops.jitter_steps(np.array(ORDERS), *factors)
    together = ops.color_jitter(
        x, torch.from_numpy(matrices), torch.from_numpy(means), torch.from_numpy(turns)
    )
    for i, order in enumerate(ORDERS):
        alone = jitter(x[i : i + 1], order, *factors[:, i], float(turns[i]))
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.77, 1.0, 1.5, 2.0])
def test_blur_is_pillows(sigma):
    """Three rounded passes per axis leave Pillow within a few levels of the unrounded filter."""
    image = random_image(64, 80, 5)
    pillow = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)), np.float64)
    x = torch.from_numpy(image.transpose(2, 0, 1).copy())[None].float()
    kernel = torch.from_numpy(ops.blur_kernels(np.array([sigma]), ops.blur_radius(2.0)))
    difference = np.abs(ops.blur(x, kernel)[0].numpy().transpose(1, 2, 0) - pillow)
    assert difference[6:-6, 6:-6].max() < 2.5
    assert difference.mean() < 0.6


@pytest.mark.parametrize("sigma", [1.0, 1.5, 2.0, 4.0])
def test_blur_is_close_to_the_gaussian(sigma):
    """Below one pixel they differ: the sampled Gaussian has less variance than sigma asks for."""
    x = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    kernel = torch.from_numpy(ops.blur_kernels(np.array([sigma]), ops.blur_radius(sigma))).double()
    got = ops.blur(x, kernel).numpy()[0]
    reach = np.arange(-30, 31)
    gauss = np.exp(-(reach**2) / (2 * sigma**2))
    gauss /= gauss.sum()
    padded = np.pad(x.numpy()[0], ((0, 0), (30, 30), (30, 30)), mode="edge")
    rows = np.apply_along_axis(np.convolve, 1, padded, gauss, mode="valid")
    both = np.apply_along_axis(np.convolve, 2, rows, gauss, mode="valid")
    assert np.abs(got - both).max() < 0.06
    assert np.abs(got - both).mean() < 0.01


def test_blur_kernels_have_the_variance_asked_for():
    sigma = np.array([0.1, 0.5, 1.0, 1.7, 2.0])
    radius = ops.blur_radius(2.0)
    kernels = ops.blur_kernels(sigma, radius).astype(np.float64)
    taps = np.arange(-radius, radius + 1)
    np.testing.assert_allclose(kernels.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(kernels, kernels[:, ::-1], atol=1e-7)
    np.testing.assert_allclose(np.sqrt(kernels @ taps**2), sigma, rtol=1e-4)
    assert (kernels >= 0).all()
    assert radius == 6  # 3 sigma


# --- draws ------------------------------------------------------------------------------------


def steps_of(policy, count=4000, seed=0):
    keys = fold_np(key_of(seed, 1), np.arange(count))
    return list(_draw(policy.ops, keys, np.arange(count)))


def share(steps, kind, count=4000):
    rows = np.concatenate([step.rows for step in steps if isinstance(step.op, kind)])
    assert len(np.unique(rows)) == len(rows)
    return len(rows) / count


@pytest.mark.parametrize(
    ("name", "jittered", "blurred", "solarised"),
    [
        ("moco_v1", 1.0, 0, 0),
        ("moco_v2", 0.8, 0.5, 0),
        ("dino_1", 0.8, 1.0, 0),
        ("dino_2", 0.8, 0.1, 0.2),
        ("dino_local", 0.8, 0.5, 0),
        ("udi", 0.8, 0.425, 0.1),
    ],
)
def test_probabilities(name, jittered, blurred, solarised):
    steps = steps_of(POLICIES[name])
    for kind, expected in ((ColorJitter, jittered), (GaussianBlur, blurred), (Solarize, solarised)):
        if expected == 0:
            assert not any(isinstance(step.op, kind) for step in steps)
        else:
            error = 4 * np.sqrt(expected * (1 - expected) / 4000)
            assert share(steps, kind) == pytest.approx(expected, abs=error + 1e-9)
    grey = [step for step in steps if type(step.op).__name__ == "Grayscale"]
    assert len(grey[0].rows) / 4000 == pytest.approx(0.2, abs=0.026)


def test_operations_are_drawn_independently():
    steps = {type(step.op).__name__: step.rows for step in steps_of(POLICIES["moco_v2"])}
    both = len(np.intersect1d(steps["ColorJitter"], steps["GaussianBlur"])) / 4000
    assert both == pytest.approx(0.8 * 0.5, abs=0.032)


def test_ranges_and_orders_of_the_jitter():
    (step,) = steps_of(Policy((ColorJitter(0.4, 0.3, 0.2, 0.1),)), 20_000)
    matrices, means, hue = step.parameters
    assert np.abs(hue).max() <= 0.1
    assert np.abs(hue).mean() == pytest.approx(0.05, abs=1e-3)
    contrast = means.sum(0)  # 1 - f of the only step that uses the mean
    assert contrast.min() == pytest.approx(-0.3, abs=1e-3)
    assert contrast.max() == pytest.approx(0.3, abs=1e-3)
    off_diagonal = matrices[:, :, 0, 1].sum(0)  # (1 - s) times the luma weight of green
    assert np.abs(off_diagonal).max() == pytest.approx(0.2 * 0.587, abs=1e-3)
    is_step = (np.abs(matrices - np.eye(3)).sum((2, 3)) > 0).astype(int)
    before = is_step[:3].sum(0)  # how many of the three come before the hue
    np.testing.assert_allclose(np.bincount(before, minlength=4) / 20_000, 0.25, atol=0.013)
    orders = np.argsort(np.random.default_rng(0).random((20_000, 4)), axis=1)
    assert len(np.unique(orders, axis=0)) == 24


def test_sigma_is_uniform():
    (step,) = steps_of(Policy((GaussianBlur(p=1.0, sigma=(0.1, 2.0)),)), 20_000)
    (kernels,) = step.parameters
    sigma = np.sqrt(kernels.astype(np.float64) @ np.arange(-6, 7) ** 2)
    assert sigma.min() >= 0.1 - 1e-4
    assert sigma.max() <= 2.0 + 1e-4
    np.testing.assert_allclose(np.histogram(sigma, 10, (0.1, 2.0))[0] / 20_000, 0.1, atol=0.01)


# --- the module -------------------------------------------------------------------------------


RECIPE = (
    ViewSpec(name="global", count=2, size=32, photometric=("dino_1", "dino_2")),
    ViewSpec(name="local", count=3, size=24, photometric="moco_v2"),
    ViewSpec(name="query", count=2, size=24, photometric="moco_v2_autoaugment"),
)


def recipe_batch(count=12, index=None):
    views = {
        spec.name: batch_of(real_images(count, spec.size), **{spec.name: spec.count}).views[
            spec.name
        ]
        for spec in RECIPE
    }
    index = torch.arange(count) + 100 if index is None else index
    return MultiCropBatch(views, index, torch.zeros(count, dtype=torch.int64))


def rows_of(batch, rows):
    return MultiCropBatch(
        {name: crops.map(lambda x: x[:, rows]) for name, crops in batch.views.items()},
        batch.index[rows],
        batch.label[rows],
    )


def test_same_key_same_colours():
    batch, photometry = recipe_batch(), Photometry(RECIPE, seed=3)
    first, again = photometry(batch, 1), Photometry(RECIPE, seed=3)(batch, 1)
    other_epoch, other_seed = photometry(batch, 2), Photometry(RECIPE, seed=4)(batch, 1)
    for name, crops in first.views.items():
        assert torch.equal(crops.images, again.views[name].images)
        assert not torch.equal(crops.images, other_epoch.views[name].images)
        assert not torch.equal(crops.images, other_seed.views[name].images)
    two = first.views["local"].images
    assert not torch.equal(two[0], two[1])  # positions draw their own


def test_colours_do_not_depend_on_the_rest_of_the_batch(monkeypatch):
    batch, photometry = recipe_batch(), Photometry(RECIPE, seed=3)
    together = photometry(batch, 1)
    parts = [[5], [11, 0, 5], [0, 1, 2, 3, 4, 6, 7]]
    for chunk in (2**21, 2**14):
        monkeypatch.setitem(augment._CHUNK_BYTES, "cpu", chunk)
        for rows in parts:
            part = photometry(rows_of(batch, rows), 1)
            for name, crops in part.views.items():
                expected = together.views[name].images[:, rows]
                torch.testing.assert_close(crops.images, expected, atol=4e-6, rtol=0)


def test_a_twin_view_of_the_last_images_gets_colours_of_its_own():
    views = (
        ViewSpec(name="global", count=1, size=16, photometric="moco_v2"),
        ViewSpec(name="twin", count=1, size=16, photometric="moco_v2", twin_of="global", part=0.25),
    )
    images = real_images(8, 16)
    batch = batch_of(images, **{"global": 1})
    batch.views["twin"] = batch.views["global"].map(lambda x: x[:, 6:])
    out = Photometry(views, 0)(batch, 0)
    alone = Photometry(views, 0)(rows_of_twin(batch), 0)
    assert out.views["twin"].images.shape == (1, 2, 3, 16, 16)
    assert not torch.equal(out.views["twin"].images, out.views["global"].images[:, 6:])
    torch.testing.assert_close(
        out.views["twin"].images, alone.views["twin"].images, atol=4e-6, rtol=0
    )


def rows_of_twin(batch):
    views = {"global": batch.views["global"].map(lambda x: x[:, 6:]), "twin": batch.views["twin"]}
    return MultiCropBatch(views, batch.index[6:], batch.label[6:])


def test_boxes_flips_index_and_label_pass_through():
    batch = recipe_batch()
    out = Photometry(RECIPE, 0)(batch, 0)
    assert out.index is batch.index
    assert out.label is batch.label
    for name, crops in out.views.items():
        assert crops.boxes is batch.views[name].boxes
        assert crops.flipped is batch.views[name].flipped
        assert crops.images.dtype == torch.float32
        assert crops.images.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_none_only_normalises(dtype):
    images = real_images(3, 20)
    out = Photometry([ViewSpec(name="v", count=2, size=20)], 0, dtype)(batch_of(images, v=2), 0)
    expected = tv.normalize(images.float() / 255, list(MEAN), list(STD))
    assert out.views["v"].images.dtype == dtype
    torch.testing.assert_close(
        out.views["v"].images.float(), expected.to(dtype).float().expand(2, -1, -1, -1, -1)
    )


def test_autocast_does_not_reach_the_colours():
    batch, photometry = recipe_batch(4), Photometry(RECIPE, seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        inside = photometry(batch, 0)
    outside = photometry(batch, 0)
    for name, crops in inside.views.items():
        assert torch.equal(crops.images, outside.views[name].images)


@pytest.mark.parametrize("name", [n for n, policy in POLICIES.items() if not policy.moves_pixels])
def test_policies_move_no_pixel(name):
    """Mirroring and transposing commute with these policies, exactly pointwise ones with any shuffle."""
    image = torch.from_numpy(coordinate_image(40, 40).transpose(2, 0, 1).copy())
    images = torch.cat([image.expand(24, -1, -1, -1), real_images(24, 40)])
    photometry = Photometry([ViewSpec(name="v", count=1, size=40, photometric=name)], 1)

    def run(x):
        return photometry(batch_of(x.contiguous(), v=1), 0).views["v"].images[0]

    straight = run(images)
    for move in (lambda x: x.flip(-1), lambda x: x.flip(-2), lambda x: x.mT):
        torch.testing.assert_close(move(run(move(images))), straight, atol=3e-5, rtol=0)
    if not any(isinstance(step.op, GaussianBlur) for step in steps_of(POLICIES[name])):
        shuffle = torch.randperm(1600, generator=torch.Generator().manual_seed(0))
        shuffled = run(images.flatten(2)[:, :, shuffle].view(images.shape))
        expected = straight.flatten(2)[:, :, shuffle].view(images.shape)
        torch.testing.assert_close(shuffled, expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize("name", POLICIES)
def test_colours_of_extreme_images_stay_in_range(name):
    size = 16
    flat = [torch.full((3, size, size), value, dtype=torch.uint8) for value in (0, 1, 127, 255)]
    primaries = [torch.tensor(c, dtype=torch.uint8).view(3, 1, 1).expand(3, size, size)
                 for c in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))]  # fmt: skip
    noise = torch.randint(
        0, 2, (3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    images = torch.stack([*flat, *primaries, noise * 255]).repeat(8, 1, 1, 1)
    view = ViewSpec(name="v", count=1, size=size, photometric=name)
    x = denormalise(Photometry([view], 2)(batch_of(images, v=1), 0).views["v"].images)
    assert torch.isfinite(x).all()
    assert x.min() > -1e-6
    assert x.max() < 1 + 1e-6
    grey = x[0].view(8, 9, 3, size, size)[:, :4]
    assert (grey - grey[:, :, :1]).abs().max() < 1e-6  # a grey image stays grey
    if "2" not in name and name not in ("udi", "autoaugment"):  # these can make black brighter
        assert grey[:, 0].abs().max() < 1e-6


def test_unknown_policy_names_the_nearest():
    with pytest.raises(
        UserError, match="view 'v': no photometric policy 'mocov2'; did you mean moco_v2"
    ):
        Photometry([ViewSpec(name="v", count=1, size=8, photometric="mocov2")], 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_without_waiting():
    device = torch.device("cuda")
    batch, photometry = recipe_batch(), Photometry(RECIPE, seed=3)
    on_host = photometry(batch, 1)
    moved = MultiCropBatch(
        {name: crops.map(lambda x: x.to(device)) for name, crops in batch.views.items()},
        batch.index,
        batch.label,
    )
    there = Photometry(RECIPE, seed=3).to(device)
    there(moved, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = there(moved, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, crops in out.views.items():
        torch.testing.assert_close(
            crops.images.cpu(), on_host.views[name].images, atol=1e-2, rtol=0
        )


def test_host_arrays_survive_the_trip():
    arrays = [np.arange(5), np.random.default_rng(0).random((3, 2)).astype(np.float32), np.ones(0)]
    for array, tensor in zip(arrays, _to_device(arrays, torch.device("cpu"))):
        np.testing.assert_array_equal(tensor.numpy(), array)
