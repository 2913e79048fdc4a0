"""Separable blur with a kernel of its own for every image, edges replicated.

    out[n, c, y, x] = sum_ij kernels[n, i] kernels[n, j] images[n, c, Y(y + i - R), X(x + j - R)]

images [N, 3, H, W], kernels float32 [N, 2 R + 1]; Y and X clamp to the image. What makes the kernel a
Gaussian is the caller's: the policies take Pillow's three extended box filters.

One Triton kernel, launched twice, filters the columns of a tile and stores it transposed: both passes
thus read along rows, 16 bytes at a time, and edges cost one clamped row number a tap.

Moved: every value read and written twice. Of a photometric pipeline (see `photometric`) what lies between
the launches is in [0, 1] and takes 16 bits where the result does: 65535ths, an error of 8e-6, where bf16
would have 2e-3. Sums are float32, taps in their order: bitwise repeatable.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import launch
from kernels.language import ceil_div, jit, rounded, tl
from kernels.spec import KernelSpec

TILE = 32  # both sides of a tile; 224 and 96 are multiples
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def gaussian_blur(images: Tensor, kernels: Tensor) -> Tensor:
    """Return float images [N, 3, H, W] filtered along both axes, in their dtype; no gradient.

    kernels is [N, T], T odd, in float32 (float64 where the images are).

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    _check(images, kernels)
    with torch.no_grad(), launch.no_autocast(images):
        return _blur(images, kernels)


def reference(images: Tensor, kernels: Tensor) -> Tensor:
    """Return the same by two grouped convolutions: the definition of correct."""
    return _convolved(images.to(kernels.dtype), kernels).to(images.dtype)


def _convolved(images: Tensor, kernels: Tensor) -> Tensor:
    """Return images filtered along x, then y: pad, and a convolution with a group per plane."""
    n, _, height, width = images.shape
    if n == 0:
        return images.clone()
    taps = kernels.shape[1]
    reach = taps // 2
    weights = kernels.repeat_interleave(3, 0)
    x = F.pad(images, (reach, reach, 0, 0), mode="replicate").reshape(1, 3 * n, height, -1)
    x = F.conv2d(x, weights.view(-1, 1, 1, taps), groups=3 * n)
    x = F.pad(x, (0, 0, reach, reach), mode="replicate")
    x = F.conv2d(x, weights.view(-1, 1, taps, 1), groups=3 * n)
    return x.reshape(n, 3, height, width)


def _check(images: Tensor, kernels: Tensor) -> None:
    shapes = "images [N, 3, H, W] of at least one pixel, kernels [N, T] with T odd"
    fits = images.ndim == 4 and images.shape[1] == 3 and images[0:1, 0].numel() > 0
    fits |= images.ndim == 4 and images.shape[:2] == (0, 3)
    if not (fits and kernels.ndim == 2 and len(kernels) == len(images) and kernels.shape[1] % 2):
        got = f"{tuple(images.shape)}, {tuple(kernels.shape)}"
        raise ValueError(f"gaussian_blur: {shapes} expected, got {got}")
    double = images.dtype == torch.float64 and not launch.on_triton(images)
    wanted = torch.float64 if double else torch.float32
    if (images.dtype not in _FLOATS and not double) or kernels.dtype != wanted:
        raise ValueError(
            "gaussian_blur: float32, bfloat16 or float16 images and float32 kernels expected, "
            f"got {images.dtype}, {kernels.dtype} (float64 only by the reference)"
        )
    if images.device != kernels.device:
        raise ValueError(
            f"gaussian_blur: all tensors on one device expected, got {images.device}, "
            f"{kernels.device}"
        )


def _fake(images: Tensor, kernels: Tensor) -> Tensor:
    return images.new_empty(images.shape)


@launch.operator("gaussian_blur", _fake)
def _blur(images: Tensor, kernels: Tensor) -> Tensor:
    if len(images) and launch.on_triton(images):
        return _launch(images, kernels)
    return reference(images, kernels)


# Triton


def _launch(images: Tensor, kernels: Tensor) -> Tensor:
    images, kernels = images.contiguous(), kernels.contiguous()
    n, _, height, width = images.shape
    between = launch.empty(n, 3, width, height, dtype=torch.float32, like=images)
    out = launch.empty(n, 3, height, width, dtype=images.dtype, like=images)
    _pass(images, between, kernels, last=False)
    _pass(between, out, kernels, last=True)
    return out


def finish_blurred(
    images: Tensor,
    blur: Tensor,
    kernels: Tensor,
    threshold: Tensor,
    scale: tuple[float, ...],
    shift: tuple[float, ...],
) -> None:
    """Blur, solarise and normalise some of the images [N, 3, H, W], in place.

    Args:
        images: contiguous; those to be blurred hold values in [0, 1] as `kept` leaves them.
        blur: int32 [N], the row of kernels of each image, -1 for images that are left as they are.
        kernels: float32 [M, T]; each row for one image.
        threshold: float32 [N]; values from it up are inverted.
        scale: of each channel.
        shift: of each channel, after the scale.
    """
    _, _, height, width = images.shape
    between = launch.empty(len(kernels), 3, width, height, dtype=images.dtype, like=images)
    _pass(images, between, kernels, last=False, blur=blur)
    _pass(between, images, kernels, True, blur, threshold, scale + shift)


def _pass(
    source: Tensor,
    target: Tensor,
    kernels: Tensor,
    last: bool,
    blur: Tensor | None = None,
    threshold: Tensor | None = None,
    normal: tuple[float, ...] = (1.0,) * 3 + (0.0,) * 3,
) -> None:
    """Filter the columns of the planes of `source` into `target`, which holds them transposed."""
    height, width = source.shape[2:]
    across = ceil_div(width, TILE)
    tiles = across * ceil_div(height, TILE)
    images = len(source) if blur is None else len(blur)
    with launch.on_device_of(source):
        _filter[(images * 3 * tiles,)](
            *(source, target, kernels, kernels if blur is None else blur),
            *(kernels if threshold is None else threshold, height, width, across, tiles, *normal),
            TAPS=kernels.shape[1],
            TILE=TILE,
            SOME=blur is not None,
            LAST=last,
            FINISH=threshold is not None,
            KEPT=blur is not None and source.dtype != torch.float32,
            num_warps=4,
        )


@jit
def kept(x, dtype: tl.constexpr):
    """Return x in [0, 1] as it waits for the blur: in 16 bits as 65535ths, in float32 as it is."""
    if dtype == tl.float32:
        waits = x
    else:
        # The last bits of 2^23 + n are those of the integer n: a sum rounds and converts at once.
        bits = (x * 65535.0 + 8388608.0).to(tl.uint32, bitcast=True)
        waits = bits.to(tl.uint16).to(dtype, bitcast=True)
    return waits


@jit
def taken_up(x, KEPT: tl.constexpr):
    """Return loaded values as float32; those that `kept` left in 16 bits times 65535."""
    if KEPT:
        # As there: a conversion of 16-bit integers runs at a quarter of the speed of a sum.
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) | 0x4B000000
        values = bits.to(tl.float32, bitcast=True) - 8388608.0
    else:
        values = x.to(tl.float32)
    return values


@jit
def finished(x, threshold, scale, shift):
    """Return x solarised from the threshold up and normalised."""
    return tl.where(x < threshold, x, 1.0 - x) * scale + shift


@jit
def _filter(
    IN, OUT, KERNELS, BLUR, THRESHOLD, height, width, across, tiles,
    scale_red, scale_green, scale_blue, shift_red, shift_green, shift_blue,
    TAPS: tl.constexpr, TILE: tl.constexpr, SOME: tl.constexpr, LAST: tl.constexpr,
    FINISH: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Filter one tile of a plane along its columns and store it transposed."""
    plane = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    image = plane // 3
    channel = plane % 3
    row = image  # of the kernels, and of what lies between the passes
    if SOME:
        row = tl.load(BLUR + image)
    if row >= 0:
        from_image, to_image = image, row
        if LAST:
            from_image, to_image = row, image
        source = IN + (from_image * 3 + channel).to(tl.int64) * height * width
        target = OUT + (to_image * 3 + channel).to(tl.int64) * height * width
        down = tile // across * TILE + tl.arange(0, TILE)
        right = tile % across * TILE + tl.arange(0, TILE)
        total = tl.zeros([TILE, TILE], tl.float32)
        for tap in tl.static_range(TAPS):  # pyright: ignore
            at = tl.minimum(tl.maximum(down + (tap - TAPS // 2), 0), height - 1)
            x = tl.load(
                source + at[:, None] * width + right[None, :], mask=right[None, :] < width, other=0
            )
            total += tl.load(KERNELS + row * TAPS + tap) * taken_up(x, KEPT)
        if KEPT:
            total *= 1 / 65535
        if FINISH:
            scale = tl.where(channel == 0, scale_red, scale_green)
            shift = tl.where(channel == 0, shift_red, shift_green)
            scale = tl.where(channel == 2, scale_blue, scale)
            shift = tl.where(channel == 2, shift_blue, shift)
            total = finished(total, tl.load(THRESHOLD + image), scale, shift)
        if KEPT and not LAST:
            result = kept(total, OUT.dtype.element_ty)
        else:
            result = rounded(total, OUT.dtype.element_ty)
        at = target + right[:, None] * height + down[None, :]
        tl.store(at, tl.trans(result), mask=(right[:, None] < width) & (down[None, :] < height))


# For tests and the bench


def eager(images: Tensor, kernels: Tensor) -> Tensor:
    """Return the same by kornia's sequence, which is the reference in the images' dtype."""
    return _convolved(images, kernels.to(images.dtype))


def random_kernels(count: int, taps: int) -> Tensor:
    """Return symmetric positive kernels of sum 1, float32 [count, taps]."""
    kernels = torch.rand(count, taps) + 0.1
    kernels = kernels + kernels.flip(1)
    return kernels / kernels.sum(1, keepdim=True)


def _inputs(shape: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    n, height = shape["N"], shape["S"]
    images = torch.rand(n, 3, height, shape.get("W", height)).to(dtype)
    return {"images": images, "kernels": random_kernels(n, shape.get("T", 13))}


def _bytes(shape: Mapping[str, Any], size: int) -> int:
    return shape["N"] * 3 * shape["S"] * shape.get("W", shape["S"]) * 2 * size


SPEC = KernelSpec(
    name="gaussian_blur",
    call=gaussian_blur,
    reference=reference,
    eager=eager,
    inputs=_inputs,
    small=(),
    real={
        "64 views, 224 px": {"N": 64, "S": 224},
        "256 views, 224 px": {"N": 256, "S": 224},
        "1280 views, 96 px": {"N": 1280, "S": 96},
    },
    bytes_moved=_bytes,
)
