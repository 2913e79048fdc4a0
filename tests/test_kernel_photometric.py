"""Colours and blur of whole batches: against torchvision, float64, and the policies' own arithmetic.

Plainly this checks the references behind the operators; with TRITON_INTERPRET=1 and
DENSE_SSL_KERNELS=triton the Triton code, in the interpreter; on a CUDA machine the compiled kernels.
"""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv

from dataprep.synthetic import coordinate_image, random_image
from dense_ssl import augment
from dense_ssl.crops import Crops, MultiCropBatch
from dense_ssl.photometry.policies import (
    POLICIES,
    ColorJitter,
    GaussianBlur,
    Grayscale,
    OneOf,
    Policy,
    Solarize,
)
from dense_ssl.views import ViewSpec
from kernels import gaussian_blur, launch, photometric
from kernels.colours import BRIGHTNESS, CONTRAST, HUE, NOTHING, SATURATION
from kernels.gaussian_blur import random_kernels
from kernels.language import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
GUARD = 64  # bytes of poison before and after every buffer
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ORDERS = list(itertools.permutations(range(4)))

# Largest error of values in [0, 1], against float64: float32 arithmetic, or what the dtype can hold
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.1e-3, torch.float16: 3e-4}


def arguments(n, height, width, steps=5, blurred=0, taps=5, **changes):
    """Random images with random steps, one contrast at most; the last `blurred` ones are blurred."""
    kinds = torch.rand(n, 5).argsort(1)[:, :steps]  # 4 does nothing
    given = {
        "images": torch.randint(256, (n, 3, height, width), dtype=torch.uint8),
        "kinds": kinds.to(torch.int32),
        "factors": torch.where(kinds == HUE, torch.rand(n, steps) - 0.5, torch.rand(n, steps) * 2),
        "threshold": torch.where(torch.rand(n) < 0.5, 0.5, torch.inf),
    }
    if blurred:
        rows = torch.arange(n, dtype=torch.int32) - (n - blurred)
        given |= {"blur": rows.clamp_min(-1), "kernels": random_kernels(blurred, taps)}
    given |= changes
    return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in given.items()}


def exactly(given):
    """The reference in float64."""
    return photometric.reference(**{**given, "dtype": torch.float64})


def worst(got, want):
    return float((got.double() - want).abs().max()) if want.numel() else 0.0


def program(kinds, factors, n=1):
    """The same steps for n images."""
    return {
        "kinds": torch.tensor([kinds], dtype=torch.int32, device=DEVICE).repeat(n, 1),
        "factors": torch.tensor([factors], dtype=torch.float32, device=DEVICE).repeat(n, 1),
        "threshold": torch.full((n,), torch.inf, device=DEVICE),
    }


def colours(n=1, height=5, width=7):
    return torch.randint(256, (n, 3, height, width), dtype=torch.uint8, device=DEVICE)


@pytest.fixture(autouse=True)
def _exact_convolutions(monkeypatch):
    """On a GPU, convolutions of the references round their inputs to TF32 otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


# --- photometric --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "shape",
    [
        {"n": 7, "height": 9, "width": 11},
        {"n": 1, "height": 1, "width": 1},
        {"n": 3, "height": 1, "width": 5, "blurred": 2},
        {"n": 2, "height": 33, "width": 47},  # two blocks of pixels, the second ragged
        {"n": 2, "height": 32, "width": 32, "steps": 1},
        {"n": 4, "height": 36, "width": 5, "blurred": 3},  # two tiles of the blur
        {"n": 2, "height": 3, "width": 4, "blurred": 2, "taps": 13},  # wider than the image
        {"n": 0, "height": 3, "width": 4},
        {"n": 2, "height": 3, "width": 4, "steps": 0},
    ],
)
def test_errs_no_more_than_its_dtype(shape, dtype):
    given = arguments(**shape, dtype=dtype)
    got, want = photometric.photometric(**given), exactly(given)
    assert got.dtype == dtype
    assert got.shape == given["images"].shape
    assert got.is_contiguous()
    assert worst(got, want) <= TOLERANCE[dtype]


def test_every_order_is_torchvisions():
    """Their luma has the red weight 0.2989, ours 0.299: at most 1e-4 apart, times the factors."""
    n = len(ORDERS)
    kinds = torch.tensor(ORDERS, dtype=torch.int32, device=DEVICE)
    strengths = torch.tensor([1.3, 0.7, 1.35, 0.09], device=DEVICE)
    given = {
        "images": colours(n),
        "kinds": kinds,
        "factors": strengths[kinds.long()],
        "threshold": torch.where(torch.arange(n, device=DEVICE) % 2 == 0, 0.3, torch.inf),
        "mean": MEAN,
        "std": STD,
    }
    got, want = photometric.photometric(**given), photometric.eager(**given)
    continuous = given["threshold"] > 1  # solarising tears apart what lies around the threshold
    torch.testing.assert_close(got[continuous], want[continuous], atol=2e-3, rtol=0)
    apart = (got - want).abs() > 2e-3
    assert apart.float().mean() < 2e-3


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 1.7])
def test_single_steps_are_torchvisions(factor):
    images = colours(2)
    x = images.float() / 255
    operations = {
        BRIGHTNESS: (tv.adjust_brightness, factor, 2e-6),
        CONTRAST: (tv.adjust_contrast, factor, 3e-4),
        SATURATION: (tv.adjust_saturation, factor, 3e-4),
        HUE: (tv.adjust_hue, factor / 2 - 0.35, 3e-6),
    }
    for kind, (operation, strength, allowed) in operations.items():
        got = photometric.photometric(images, **program([kind], [strength], 2))
        torch.testing.assert_close(got, operation(x, strength), atol=allowed, rtol=0)


def test_a_blurred_image_is_what_separate_operations_make_of_it():
    given = arguments(4, 12, 10, steps=4, blurred=2, mean=MEAN, std=STD)
    given["threshold"].fill_(0.5)
    given["kinds"][given["kinds"] == 4] = NOTHING
    got, want = photometric.photometric(**given), photometric.eager(**given)
    torch.testing.assert_close(got, want, atol=3e-3, rtol=0)
    jittered = photometric.photometric(
        given["images"], given["kinds"], given["factors"], torch.full_like(given["threshold"], 2.0)
    )
    blurred = gaussian_blur.gaussian_blur(jittered[2:], given["kernels"])
    alone = tv.normalize(tv.solarize(blurred, 0.5), list(MEAN), list(STD))
    torch.testing.assert_close(got[2:], alone, atol=1e-5, rtol=0)


def test_nothing_asked_is_normalisation():
    images = colours(3)
    nothing = program([NOTHING, 7], [0.3, 0.3], 3)
    got = photometric.photometric(images, **nothing, mean=MEAN, std=STD)
    want = tv.normalize(images.float() / 255, list(MEAN), list(STD))
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    got = photometric.photometric(images, **nothing)
    torch.testing.assert_close(got, images.float() / 255, atol=6e-8, rtol=0)


def test_grey_pixels_stay_grey_whatever_their_hue():
    images = colours(6)
    images[:] = images[:, :1]
    kinds, factors = [HUE, SATURATION, HUE], [0.3, 1.9, -0.5]
    got = photometric.photometric(images, **program(kinds, factors, 6))
    torch.testing.assert_close(got, images.float() / 255, atol=3e-7, rtol=0)
    assert (got.amax(1) - got.amin(1)).max() < 3e-7


def test_no_contrast_is_the_mean_luma_and_no_saturation_grey():
    images = colours(2, 40, 30)  # two blocks
    grey = tv.rgb_to_grayscale(images.double() / 255)
    got = photometric.photometric(images, **program([CONTRAST], [0.0], 2))
    assert worst(got, grey.mean((1, 2, 3), keepdim=True).expand_as(got)) < 1.1e-4
    assert got.flatten(1).std(1).max() < 1e-7
    got = photometric.photometric(images, **program([SATURATION], [0.0], 2))
    assert worst(got, grey.expand_as(got)) < 1.1e-4
    assert torch.equal(got[:, 0], got[:, 1])


@pytest.mark.parametrize("turn", [-0.5, -1 / 3, 0.0, 1 / 6, 0.5])
def test_hue_of_ties_and_corners_of_the_cube(turn):
    corners = torch.tensor(list(itertools.product((0, 128, 255), repeat=3)), dtype=torch.uint8)
    images = corners.T.reshape(1, 3, 3, 9).to(DEVICE)
    given = {"images": images, **program([HUE], [turn])}
    got = photometric.photometric(**given)
    assert worst(got, exactly(given)) < 1e-6
    torch.testing.assert_close(got, tv.adjust_hue(images.float() / 255, turn), atol=2e-6, rtol=0)


def test_values_on_the_threshold_are_inverted():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1).to(DEVICE)
    x = levels.float() * (1 / 255)
    for level in (0, 1, 128, 255):
        given = program([], [])
        given["threshold"] = x[:, 0].flatten()[level : level + 1].contiguous()
        got = photometric.photometric(levels, **given)
        want = torch.where(levels < level, x, 1 - x)
        torch.testing.assert_close(got, want, atol=1e-7, rtol=0)


def test_values_stay_in_range():
    given = arguments(12, 4, 6, blurred=6)
    given["images"] = given["images"] // 128 * 255
    given["factors"] = torch.where(given["kinds"] == HUE, 0.4, 30.0)
    given["threshold"].fill_(torch.inf)
    for dtype in (torch.float32, torch.bfloat16):
        got = photometric.photometric(**{**given, "dtype": dtype})
        assert got.min() >= -1e-6
        assert got.max() <= 1 + 1e-6


def test_images_do_not_know_of_each_other():
    given = arguments(5, 6, 7, blurred=2)
    together = photometric.photometric(**given)
    for row in range(3):
        alone = {k: v[row : row + 1] for k, v in given.items() if k not in ("blur", "kernels")}
        assert torch.equal(photometric.photometric(**alone)[0], together[row])
    last = {k: v[-1:] for k, v in given.items()}
    last["blur"] = torch.zeros_like(last["blur"])
    torch.testing.assert_close(photometric.photometric(**last)[0], together[-1], atol=0, rtol=0)


def test_strided_images_are_taken_as_they_are():
    given = arguments(3, 6, 8, blurred=1)
    want = photometric.photometric(**given)
    images = given["images"]
    for strided in (
        images.to(memory_format=torch.channels_last),
        images.mT.contiguous().mT,
        images.repeat_interleave(2, 0)[::2],
    ):
        assert torch.equal(photometric.photometric(**{**given, "images": strided}), want)
    for name in ("kinds", "factors", "kernels"):
        strided = given[name].repeat_interleave(2, -1)[:, ::2]
        assert torch.equal(photometric.photometric(**{**given, name: strided}), want)
    strided = {k: given[k].repeat_interleave(2)[::2] for k in ("threshold", "blur")}
    assert torch.equal(photometric.photometric(**{**given, **strided}), want)
    given = blur_arguments()
    want = gaussian_blur.gaussian_blur(**given)
    for strided in (
        {"images": given["images"].to(memory_format=torch.channels_last)},
        {"images": given["images"].mT.contiguous().mT},
        {"kernels": given["kernels"].T.contiguous().T},
    ):
        torch.testing.assert_close(
            gaussian_blur.gaussian_blur(**{**given, **strided}), want, atol=1e-6, rtol=0
        )


# --- blur ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("n", "height", "width", "taps"),
    [(2, 9, 7, 5), (1, 1, 1, 3), (2, 35, 4, 3), (1, 4, 40, 7), (1, 3, 2, 13), (3, 5, 5, 1)],
)
def test_blur_against_every_pixel_written_out(n, height, width, taps, dtype):
    images = torch.randn(n, 3, height, width, device=DEVICE).to(dtype)
    kernels = random_kernels(n, taps).to(DEVICE)
    got = gaussian_blur.gaussian_blur(images, kernels)
    assert got.dtype == dtype
    weights = kernels.double().cpu().numpy()
    reach = taps // 2
    padded = np.pad(images.double().cpu().numpy(), ((0, 0), (0, 0), *((reach, reach),) * 2), "edge")
    want = np.zeros(images.shape)
    for i, j in itertools.product(range(taps), repeat=2):
        both = (weights[:, i] * weights[:, j])[:, None, None, None]
        want += both * padded[:, :, i : i + height, j : j + width]
    scale = np.abs(want).max()
    assert np.abs(got.double().cpu().numpy() - want).max() <= TOLERANCE[dtype] * 2 * scale


def test_blur_of_none_and_by_one_tap_and_of_float64():
    none = torch.rand(0, 3, 4, 5, device=DEVICE)
    assert gaussian_blur.gaussian_blur(none, torch.rand(0, 3, device=DEVICE)).shape == none.shape
    images = torch.rand(2, 3, 4, 5, device=DEVICE)
    one = torch.ones(2, 1, device=DEVICE)
    assert torch.equal(gaussian_blur.gaussian_blur(images, one), images)
    with launch.chosen("torch"):
        given = images.double(), random_kernels(2, 3).double().to(DEVICE)
        want = gaussian_blur.eager(*given)
        assert worst(gaussian_blur.gaussian_blur(*given), want) < 1e-15


def test_asymmetric_kernels_are_not_mirrored():
    images = torch.rand(1, 3, 4, 6, device=DEVICE)
    left = torch.tensor([[1.0, 0.0, 0.0]], device=DEVICE)
    got = gaussian_blur.gaussian_blur(images, left)
    padded = torch.nn.functional.pad(images, (1, 0, 1, 0), mode="replicate")
    torch.testing.assert_close(got, padded[:, :, :-1, :-1], atol=0, rtol=0)


# --- both ---------------------------------------------------------------------------------------


def blur_arguments():
    return {
        "images": torch.rand(2, 3, 5, 7, device=DEVICE),
        "kernels": random_kernels(2, 5).to(DEVICE),
    }


BOTH = [
    pytest.param(photometric.photometric, lambda: arguments(3, 5, 7, blurred=1), id="photometric"),
    pytest.param(gaussian_blur.gaussian_blur, blur_arguments, id="gaussian_blur"),
]


def guard(x, made):
    """A copy of x with GUARD bytes of poison (NaN in floats) on both sides; `made` remembers them."""
    size = x.element_size()
    around = torch.full((2 * GUARD + x.numel() * size,), 0xFF, dtype=torch.uint8, device=x.device)
    made.append((around, around.clone()))
    inner = around[GUARD : GUARD + x.numel() * size].view(x.dtype).view(x.shape)
    inner.copy_(x)
    return inner


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("call", "make"), BOTH)
def test_repeats_itself_to_the_bit_and_touches_nothing_beside_its_buffers(
    call, make, dtype, monkeypatch
):
    given = make()
    if call is photometric.photometric:
        given["dtype"] = dtype
    else:
        given["images"] = given["images"].to(dtype)
    want = call(**given)
    assert torch.equal(call(**given), want)
    made = []

    def guarded_empty(*shape, dtype, like):
        poison = torch.full(shape, torch.nan, dtype=dtype, device=like.device)
        return guard(poison, made)

    monkeypatch.setattr(launch, "empty", guarded_empty)
    fenced = {k: guard(x, made) if isinstance(x, torch.Tensor) else x for k, x in given.items()}
    assert torch.equal(call(**fenced), want)
    for around, filled in made:
        assert torch.equal(around[:GUARD], filled[:GUARD])
        assert torch.equal(around[-GUARD:], filled[-GUARD:])
    for name, x in given.items():
        assert not isinstance(x, torch.Tensor) or torch.equal(x, fenced[name])


@pytest.mark.parametrize(("call", "make"), BOTH)
def test_compiles_into_one_graph(call, make):
    given = make()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**given), call(**given), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("call", "make"), BOTH)
def test_autocast_changes_nothing(call, make):
    given = make()
    want = call(**given)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(call(**given), want)


@pytest.mark.skipif(DEVICE == "cuda", reason="opcheck runs the operators on the CPU")
def test_operators_keep_their_contract():
    given = arguments(2, 3, 4, blurred=1)
    program = (given["blur"], given["kernels"], list(MEAN), list(STD), torch.bfloat16)
    names = ("images", "kinds", "factors", "threshold")
    torch.library.opcheck(photometric._adjust, (*(given[k] for k in names), *program))
    torch.library.opcheck(gaussian_blur._blur, tuple(blur_arguments().values()))


@pytest.mark.parametrize(("call", "make"), BOTH)
def test_there_is_no_gradient(call, make):
    given = make()
    floats = [x.requires_grad_() for x in given.values()
              if isinstance(x, torch.Tensor) and x.is_floating_point()]  # fmt: skip
    assert floats
    assert not call(**given).requires_grad


@pytest.mark.skipif(INTERPRETED, reason="compiling needs a process without the interpreter")
@pytest.mark.parametrize("sm", [86, 90])
def test_ragged_and_single_pixels_compile_too(sm):
    """Numbers that are 1 or not multiples of 16 make other kernels of the same source."""
    ahead = pytest.importorskip("kernels.ahead", reason="needs triton")
    for shape in ({"N": 1, "S": 1, "blurred": 1}, {"N": 3, "S": 33, "W": 47, "blurred": 2}):
        with ahead.compile_only(sm) as launches, torch.device("meta"):
            given = photometric.SPEC.inputs(shape, torch.bfloat16)
            photometric.SPEC.call(**given)
        assert {x.kernel for x in launches} == {"_contrast_means", "_change", "_filter"}
        assert [x.complaints(wide=False) for x in launches] == [[]] * len(launches)


WRONG = [
    ({"images": lambda x: x.float()}, "images in torch.uint8 expected, got torch.float32"),
    (
        {"images": lambda x: x[0]},
        "images [N, 3, H, W] of a pixel or more, kinds and factors [N, S]",
    ),
    ({"images": lambda x: x[:, :, :0]}, "images [N, 3, H, W] of a pixel or more"),
    ({"images": lambda x: x[:1]}, "threshold [N], blur [N] expected, got (1, 3, 5, 7), (3, 5)"),
    ({"kinds": lambda x: x.long()}, "kinds in torch.int32 expected, got torch.int64"),
    ({"kinds": lambda x: x[:, :3]}, "kinds and factors [N, S]"),
    ({"factors": lambda x: x.double()}, "factors in torch.float32 expected, got torch.float64"),
    ({"blur": lambda x: x.float()}, "blur in torch.int32 expected, got torch.float32"),
    ({"blur": lambda _: None}, "blur and kernels together expected, got one of them"),
    ({"kernels": lambda x: x[:, 1:]}, "kernels [M, T] with M at least 1 and T odd expected, got"),
    ({"kernels": lambda x: x[:0]}, "kernels [M, T] with M at least 1 and T odd expected, got"),
    ({"kernels": lambda x: x.to("meta")}, "kernels on "),
    ({"mean": lambda _: (0.5,)}, "mean and std of three channels expected, got 1, 3"),
    ({"dtype": lambda _: torch.int32}, "dtype float32, bfloat16 or float16 (float64 by"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_arguments_are_one_sentence(change, message):
    given = {**arguments(3, 5, 7, blurred=1), "mean": MEAN, "dtype": torch.float32}
    ((name, changed),) = change.items()
    with pytest.raises(ValueError) as told:
        photometric.photometric(**{**given, name: changed(given[name])})
    assert str(told.value).startswith("photometric: ")
    assert message in str(told.value)
    assert "expected, got" in str(told.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": lambda x: x[0]}, "images [N, 3, H, W] of at least one pixel"),
        ({"images": lambda x: x[:1]}, "kernels [N, T] with T odd expected, got (1, 3, 5, 7), (2, 5)"),
        ({"images": lambda x: x[:, :2]}, "images [N, 3, H, W]"),
        ({"images": lambda x: x.byte()}, "float32, bfloat16 or float16 images"),
        ({"kernels": lambda x: x[:, 1:]}, "T odd"),
        ({"kernels": lambda x: x.bfloat16()}, "float32 kernels expected"),
        ({"kernels": lambda x: x.to("meta")}, "one device expected"),
    ],
)  # fmt: skip
def test_wrong_arguments_of_the_blur_are_one_sentence(change, message):
    given = blur_arguments()
    ((name, changed),) = change.items()
    with pytest.raises(ValueError) as told:
        gaussian_blur.gaussian_blur(**{**given, name: changed(given[name])})
    assert str(told.value).startswith("gaussian_blur: ")
    assert message in str(told.value)


@pytest.mark.parametrize("spec", [photometric.SPEC, gaussian_blur.SPEC], ids=lambda s: s.name)
def test_specs_describe_what_they_call(spec):
    shape = {"N": 3, "S": 6, "blurred": 2, "T": 3}
    given = spec.inputs(shape, torch.float32)
    given = {k: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for k, x in given.items()}
    got = spec.call(**given)
    torch.testing.assert_close(got, spec.reference(**given), atol=1e-5, rtol=0)
    torch.testing.assert_close(got, spec.eager(**given), atol=3e-3, rtol=0)
    assert spec.bytes_moved(shape, 2) < spec.bytes_moved(shape, 4)


# --- policies -----------------------------------------------------------------------------------


def coloured(views, images, monkeypatch, fused, dtype=torch.float32):
    """What the policies make of images uint8 [B, 3, S, S], by `photometric` or step by step."""
    monkeypatch.setattr(augment, "launch", SimpleNamespace(on_triton=lambda _: fused))
    device = DEVICE if fused else "cpu"
    count, size = len(images), images.shape[-1]
    crops = {
        view.name: Crops(
            images.to(device).expand(view.count, -1, -1, -1, -1).contiguous(),
            torch.zeros(view.count, count, 4),
            torch.zeros(view.count, count, dtype=torch.bool),
        )
        for view in views
    }
    assert all(view.size == size for view in views)
    batch = MultiCropBatch(crops, torch.arange(count) + 7, torch.zeros(count))
    photometry = augment.Photometry(views, 40, dtype).to(device)  # draws all there is in 10 crops
    return {name: x.images.cpu() for name, x in photometry(batch, 1).views.items()}


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_gives_what_it_gives_step_by_step(name, monkeypatch):
    """From the same random numbers; normalised values are up to 4.4 times those in [0, 1]."""
    views = [ViewSpec(name="v", count=2, size=18, photometric=name)]
    images = torch.from_numpy(
        random_image(18, 18 * 6, 5).reshape(18, 6, 18, 3).transpose(1, 3, 0, 2)
    )
    images = images.contiguous()
    fused = coloured(views, images, monkeypatch, True)["v"]
    torch.testing.assert_close(
        fused, coloured(views, images, monkeypatch, False)["v"], atol=1e-5, rtol=0
    )


def test_bf16_is_the_rounded_float32(monkeypatch):
    """What waits for the blur does so in 65535ths, not in bf16."""
    views = [ViewSpec(name="v", count=1, size=14, photometric="dino_local")]
    images = torch.randint(256, (6, 3, 14, 14), dtype=torch.uint8)
    want = coloured(views, images, monkeypatch, True)["v"]
    for dtype, last_bit in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        got = coloured(views, images, monkeypatch, True, dtype)["v"]
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want, atol=1e-4, rtol=last_bit)


def test_policies_of_one_view_keep_to_their_crops(monkeypatch):
    names = ("dino_1", "moco_v1", "none", "none", "dino_2", "udi")
    views = [ViewSpec(name="v", count=6, size=12, photometric=names),
             ViewSpec(name="w", count=1, size=12, photometric="moco_v2")]  # fmt: skip
    images = torch.randint(256, (5, 3, 12, 12), dtype=torch.uint8)
    fused = coloured(views, images, monkeypatch, True)
    apart = coloured(views, images, monkeypatch, False)
    for name, x in apart.items():
        torch.testing.assert_close(fused[name], x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [n for n, policy in POLICIES.items() if not policy.moves_pixels])
def test_fused_policies_move_no_pixel(name, monkeypatch):
    """Mirroring and turning the coordinate image, and a random one, commute with these policies."""
    view = ViewSpec(name="v", count=1, size=16, photometric=name)
    image = torch.from_numpy(coordinate_image(16, 16).transpose(2, 0, 1).copy())
    images = torch.cat([image.expand(4, -1, -1, -1), colours(1, 16, 16).cpu()])

    def run(x):
        return coloured([view], x.contiguous(), monkeypatch, True)["v"][0]

    straight = run(images)
    for move in (lambda x: x.flip(-1), lambda x: x.mT.flip(-1)):
        torch.testing.assert_close(run(move(images)), move(straight), atol=1e-5, rtol=0)
    if name == "none":
        back = straight[0] * torch.tensor(STD).view(3, 1, 1)
        back = (back + torch.tensor(MEAN).view(3, 1, 1)) * 255
        torch.testing.assert_close(back, image.float(), atol=1e-3, rtol=0)


def test_every_policy_can_be_fused_but_those_that_blur_first():
    assert [name for name in POLICIES if not augment._is_fused(POLICIES[name])] == ["dc_1", "dc_2"]


@pytest.mark.parametrize(
    ("operations", "fused"),
    [
        ((), True),
        ((Grayscale(0.5), ColorJitter(0.4, 0.4, 0.4, 0.1), Grayscale(1.0), Solarize(1.0)), True),
        ((OneOf(((GaussianBlur(1.0),), (Solarize(1.0),), ())),), True),
        ((ColorJitter(0.4, 0.4, 0.4, 0.1), ColorJitter(0.4, 0.4, 0.4, 0.1)), False),
        ((Solarize(1.0), Grayscale(1.0)), False),
        ((Solarize(1.0), Solarize(1.0, 0.3)), False),
        ((GaussianBlur(0.5), GaussianBlur(0.5)), False),
        ((OneOf(((GaussianBlur(1.0),), ())), Grayscale(1.0)), False),
    ],
)
def test_others_go_step_by_step(operations, fused, monkeypatch):
    assert augment._is_fused(Policy(operations)) == fused
    monkeypatch.setitem(POLICIES, "own", Policy(operations))
    views = [ViewSpec(name="v", count=1, size=8, photometric="own")]
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    got = coloured(views, images, monkeypatch, True)["v"]
    want = coloured(views, images, monkeypatch, False)["v"]
    torch.testing.assert_close(got, want, atol=1e-5 if fused else 0, rtol=0)
