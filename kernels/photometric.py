"""Colours of a batch of uint8 images: each image's own steps in its own order, solarised, normalised.

images uint8 [N, 3, H, W] become x = images / 255, and image n goes through its steps s = 0 .. S - 1, each
a kind and a factor of `colours`: brightness, saturation, hue, nothing, and the contrast at most once. The
four of a ColorJitter come in a random order; grey is a saturation of 0.

Then, where asked, through a blur with its own kernel (`gaussian_blur`), values from its threshold up are
inverted, and (x - mean) / std is rounded to the asked dtype. Nothing is random here.

Two launches: one leaves the luma of blocks of pixels just before the contrast, the other adds them in
their order and does everything. Images that are blurred leave the second one in [0, 1], and the two
passes of the blur finish them, in the memory of the result. Moved without a blur: the bytes of the images
twice, the result once. All arithmetic is float32. Bitwise repeatable.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import gaussian_blur, launch
from kernels.colours import (
    NOTHING,
    SATURATION,
    luma_of,
    per_image,
    step_of_all,
    step_of_each,
    stepped,
)
from kernels.gaussian_blur import finish_blurred, finished, kept, random_kernels
from kernels.language import ceil_div, jit, power_of_two, rounded, tl
from kernels.spec import KernelSpec

BLOCK = 1024  # pixels of a program; 224 x 224 and 96 x 96 are multiples
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def photometric(
    images: Tensor,
    kinds: Tensor,
    factors: Tensor,
    threshold: Tensor,
    blur: Tensor | None = None,
    kernels: Tensor | None = None,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return uint8 images [N, 3, H, W] with their colours changed, in `dtype`; no gradient.

    Args:
        images: RGB.
        kinds: int32 [N, S], the steps of each image.
        factors: float32 [N, S].
        threshold: float32 [N]; values from it up are inverted, infinity inverts none.
        blur: int32 [N], the row of `kernels` an image is blurred with, -1 for none; no two images
            share a row.
        kernels: float32 [M, T], T odd, M at least 1.
        mean: subtracted from each channel at the end, in [0, 1].
        std: what each channel is then divided by.
        dtype: float32, bfloat16 or float16 (float64 only by the reference).

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    tensors = {"images": images, "kinds": kinds, "factors": factors, "threshold": threshold}
    _check(mean, std, dtype, **tensors, blur=blur, kernels=kernels)
    with torch.no_grad(), launch.no_autocast(images):
        return _adjust(
            images, kinds, factors, threshold, blur, kernels, list(mean), list(std), dtype
        )


def reference(
    images: Tensor,
    kinds: Tensor,
    factors: Tensor,
    threshold: Tensor,
    blur: Tensor | None = None,
    kernels: Tensor | None = None,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the same, every step of the batch after the other: the definition of correct."""
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    x = images.to(precise) * (1 / 255)
    for step in range(kinds.shape[1]):
        x = step_of_each(x, kinds[:, step], factors[:, step].to(precise))
    if blur is not None and kernels is not None:
        weights = kernels[blur.clamp_min(0)].to(precise)
        x = torch.where(per_image(blur) >= 0, gaussian_blur.reference(x, weights), x)
    x = torch.where(x < per_image(threshold), x, 1 - x)
    scale, shift = (x.new_tensor(values).view(3, 1, 1) for values in _normal(mean, std))
    return torch.addcmul(shift, x, scale).to(dtype)


def image_by_image(
    images: Tensor,
    kinds: Tensor,
    factors: Tensor,
    threshold: Tensor,
    blur: Tensor | None,
    kernels: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """Return the same by the steps each image has, while it is in a CPU's cache."""
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.empty(images.shape, dtype=dtype, device=images.device)
    scale, shift = (torch.tensor(v, dtype=precise).view(3, 1, 1) for v in _normal(mean, std))
    rows = [-1] * len(images) if blur is None else blur.tolist()
    programs = zip(kinds.tolist(), factors.tolist(), threshold.tolist(), rows)
    for number, (own_kinds, own_factors, above, row) in enumerate(programs):
        x = images[number : number + 1].to(precise).mul_(1 / 255)
        for kind, factor in zip(own_kinds, own_factors):
            x = step_of_all(x, kind, factor)
        if row >= 0 and kernels is not None:
            x = gaussian_blur.reference(x, kernels[row : row + 1].to(precise))
        if above < math.inf:
            x = torch.where(x < above, x, 1 - x)
        out[number] = torch.addcmul(shift, x[0], scale)
    return out


def _normal(
    mean: Sequence[float], std: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return scale and shift per channel: (x - mean) / std is x scale + shift."""
    return tuple(1 / s for s in std), tuple(-m / s for m, s in zip(mean, std))


def _check(
    mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, **tensors: Tensor | None
) -> None:
    def wrong(expected: str, got: object) -> ValueError:
        return ValueError(f"photometric: {expected} expected, got {got}")

    kernels, blur = tensors.pop("kernels"), tensors["blur"]
    given = {name: x for name, x in tensors.items() if x is not None}
    images, kinds = given["images"], given["kinds"]
    n = len(images) if images.ndim else -1
    good = images.ndim == 4 and images.shape[1] == 3 and images.shape[2] * images.shape[3] > 0
    good = good and kinds.ndim == 2 and kinds.shape == given["factors"].shape and len(kinds) == n
    good = good and all(given[k].shape == (n,) for k in ("threshold", "blur") if k in given)
    if not good:
        shapes = "images [N, 3, H, W] of a pixel or more, kinds and factors [N, S], threshold [N]"
        got = ", ".join(str(tuple(x.shape)) for x in given.values())
        raise wrong(f"{shapes}{'' if blur is None else ', blur [N]'}", got)
    if (blur is None) != (kernels is None):
        raise wrong("blur and kernels together", "one of them")
    if kernels is not None:
        if kernels.ndim != 2 or len(kernels) == 0 or kernels.shape[1] % 2 == 0:
            raise wrong("kernels [M, T] with M at least 1 and T odd", tuple(kernels.shape))
        given["kernels"] = kernels
    wanted = {"images": torch.uint8, "kinds": torch.int32, "blur": torch.int32}
    for name, x in given.items():
        if x.dtype != wanted.get(name, torch.float32):
            raise wrong(f"{name} in {wanted.get(name, torch.float32)}", x.dtype)
        if x.device != images.device:
            raise wrong(f"{name} on {images.device}", x.device)
    if len(mean) != 3 or len(std) != 3:
        raise wrong("mean and std of three channels", f"{len(mean)}, {len(std)}")
    double = dtype == torch.float64 and not launch.on_triton(images)
    if dtype not in _FLOATS and not double:
        raise wrong("dtype float32, bfloat16 or float16 (float64 by the reference)", dtype)


def _fake(images: Tensor, *given: Any) -> Tensor:
    return torch.empty(images.shape, dtype=given[-1], device=images.device)


@launch.operator("photometric", _fake)
def _adjust(
    images: Tensor,
    kinds: Tensor,
    factors: Tensor,
    threshold: Tensor,
    blur: Tensor | None,
    kernels: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    if len(images) and launch.on_triton(images):
        scale, shift = _normal(mean, std)
        return _launch(images, kinds, factors, threshold, blur, kernels, scale, shift, dtype)
    plain = image_by_image if images.device.type == "cpu" else reference  # values are at hand there
    return plain(images, kinds, factors, threshold, blur, kernels, mean, std, dtype)


# Triton


def _launch(
    images: Tensor,
    kinds: Tensor,
    factors: Tensor,
    threshold: Tensor,
    blur: Tensor | None,
    kernels: Tensor | None,
    scale: tuple[float, ...],
    shift: tuple[float, ...],
    dtype: torch.dtype,
) -> Tensor:
    images, kinds, factors = images.contiguous(), kinds.contiguous(), factors.contiguous()
    threshold = threshold.contiguous()
    n, _, height, width = images.shape
    pixels, steps = height * width, kinds.shape[1]
    blocks = ceil_div(pixels, BLOCK)
    parts = launch.empty(n, blocks, dtype=torch.float32, like=images)
    out = launch.empty(n, 3, height, width, dtype=dtype, like=images)
    blur = None if blur is None else blur.contiguous()
    with launch.on_device_of(images):
        if steps:
            _contrast_means[(n * blocks,)](
                *(images, kinds, factors, parts, pixels, blocks, 1 / pixels),
                STEPS=steps,
                STEPS_PADDED=power_of_two(steps),
                BLOCK=BLOCK,
                num_warps=2,
            )
        _change[(n * blocks,)](
            *(images, kinds, factors, parts, threshold, kinds if blur is None else blur, out),
            *(pixels, blocks, *scale, *shift),
            STEPS=steps,
            BLOCKS_PADDED=power_of_two(blocks),
            BLOCK=BLOCK,
            BLURS=blur is not None,
            num_warps=2,
        )
    if blur is not None and kernels is not None:
        finish_blurred(out, blur, kernels.contiguous(), threshold, scale, shift)
    return out


@jit
def _channels(IMAGES, image, at, pixels):
    """Return the pixels `at` of an image as float32 in [0, 1], 0 past its end."""
    first = IMAGES + image.to(tl.int64) * 3 * pixels + at
    there = at < pixels
    red = tl.load(first, mask=there, other=0).to(tl.float32) * (1 / 255)
    green = tl.load(first + pixels, mask=there, other=0).to(tl.float32) * (1 / 255)
    blue = tl.load(first + 2 * pixels, mask=there, other=0).to(tl.float32) * (1 / 255)
    return red, green, blue


@jit
def _contrast_means(
    IMAGES, KINDS, FACTORS, PARTS, pixels, blocks, share,
    STEPS: tl.constexpr, STEPS_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Leave what a block of pixels adds to the mean luma of its image before the contrast."""
    image = tl.program_id(0) // blocks
    places = tl.arange(0, STEPS_PADDED)
    kinds = tl.load(KINDS + image * STEPS + places, mask=places < STEPS, other=-1)
    contrast = tl.min(tl.where(kinds == 1, places, STEPS), 0)
    part = 0.0
    if contrast < STEPS:
        at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
        red, green, blue = _channels(IMAGES, image, at, pixels)
        for step in range(contrast):  # pyright: ignore
            kind = tl.load(KINDS + image * STEPS + step)
            factor = tl.load(FACTORS + image * STEPS + step)
            red, green, blue = stepped(red, green, blue, kind, factor, 0.0)
        part = tl.sum(tl.where(at < pixels, luma_of(red, green, blue), 0.0), 0) * share
    tl.store(PARTS + tl.program_id(0), part)


@jit
def _change(
    IMAGES, KINDS, FACTORS, PARTS, THRESHOLD, BLUR, OUT, pixels, blocks,
    scale_red, scale_green, scale_blue, shift_red, shift_green, shift_blue,
    STEPS: tl.constexpr, BLOCKS_PADDED: tl.constexpr, BLOCK: tl.constexpr, BLURS: tl.constexpr,
):  # fmt: skip
    """Do everything to a block of pixels, or everything before the blur."""
    image = tl.program_id(0) // blocks
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    red, green, blue = _channels(IMAGES, image, at, pixels)
    if STEPS > 0:
        parts = tl.arange(0, BLOCKS_PADDED)
        mean = tl.sum(tl.load(PARTS + image * blocks + parts, mask=parts < blocks, other=0.0), 0)
        for step in range(STEPS):
            kind = tl.load(KINDS + image * STEPS + step)
            factor = tl.load(FACTORS + image * STEPS + step)
            red, green, blue = stepped(red, green, blue, kind, factor, mean)
    first = OUT + image.to(tl.int64) * 3 * pixels + at
    there = at < pixels
    dtype: tl.constexpr = OUT.dtype.element_ty
    waits = False
    if BLURS:
        waits = tl.load(BLUR + image) >= 0
    if waits:
        tl.store(first, kept(red, dtype), mask=there)
        tl.store(first + pixels, kept(green, dtype), mask=there)
        tl.store(first + 2 * pixels, kept(blue, dtype), mask=there)
    else:
        threshold = tl.load(THRESHOLD + image)
        red = finished(red, threshold, scale_red, shift_red)
        green = finished(green, threshold, scale_green, shift_green)
        blue = finished(blue, threshold, scale_blue, shift_blue)
        tl.store(first, rounded(red, dtype), mask=there)
        tl.store(first + pixels, rounded(green, dtype), mask=there)
        tl.store(first + 2 * pixels, rounded(blue, dtype), mask=there)


# For tests and the bench


def eager(
    images: Tensor,
    kinds: Tensor,
    factors: Tensor,
    threshold: Tensor,
    blur: Tensor | None = None,
    kernels: Tensor | None = None,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the same by torchvision's functional operations, image by image as orders differ."""
    from torchvision.transforms.v2 import functional as tv

    operations = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    rows = [-1] * len(images) if blur is None else blur.tolist()
    out = images.new_empty(images.shape, dtype=dtype)
    programs = zip(images, kinds.tolist(), factors.tolist(), threshold.tolist(), rows)
    for number, (image, kind, factor, above, row) in enumerate(programs):
        x = image.float() / 255
        for operation, strength in zip(kind, factor):
            if operation != NOTHING:
                x = operations[operation](x, strength)
        if row >= 0 and kernels is not None:
            x = gaussian_blur.eager(x[None], kernels[row : row + 1])[0]
        if above <= 1:
            x = tv.solarize(x, above)
        out[number] = tv.normalize(x, list(mean), list(std))
    return out


def _inputs(shape: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    n, size, blurred = shape["N"], shape["S"], shape.get("blurred", 0)
    order = torch.rand(n, 4).argsort(1)
    strengths = torch.tensor([0.4, 0.4, 0.4, 0.1])[order]
    centres = torch.tensor([1.0, 1.0, 1.0, 0.0])[order]
    factors = centres + strengths * (2 * torch.rand(n, 4) - 1)
    grey = torch.where(torch.rand(n, 1) < 0.2, SATURATION, NOTHING)
    images = torch.randint(256, (n, 3, size, shape.get("W", size)), dtype=torch.uint8)
    rows = torch.arange(n, dtype=torch.int32)
    return {
        "images": images,
        "kinds": torch.cat([order, grey], 1).to(torch.int32),
        "factors": torch.cat([factors, torch.zeros(n, 1)], 1),
        "threshold": torch.where(torch.rand(n) < 0.2, 0.5, torch.inf),
        "blur": torch.where(rows < blurred, rows, -1) if blurred else None,
        "kernels": random_kernels(blurred, shape.get("T", 13)) if blurred else None,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "dtype": dtype,
    }


def _bytes(shape: Mapping[str, Any], size: int) -> int:
    image = 3 * shape["S"] * shape.get("W", shape["S"])
    # Bytes read twice, the result written once; blurred ones are read and written twice more.
    return image * (shape["N"] * (2 + size) + shape.get("blurred", 0) * 4 * size)


SPEC = KernelSpec(
    name="photometric",
    call=photometric,
    reference=reference,
    eager=eager,
    inputs=_inputs,
    small=(),
    real={
        "64 views, 224 px": {"N": 64, "S": 224},
        "256 views, 224 px": {"N": 256, "S": 224},
        "256 views, 224 px, half blurred": {"N": 256, "S": 224, "blurred": 128},
        "1280 views, 96 px": {"N": 1280, "S": 96},
    },
    bytes_moved=_bytes,
)
