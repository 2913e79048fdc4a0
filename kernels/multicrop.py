"""The device cutter: crops of decoded images, resized with Pillow's antialiased filters, mirrored.

    rows[y, o, c] = round(sum_x f((x + 1/2 - m_o) / s) image[y, x, c] / sum_x f((x + 1/2 - m_o) / s))
    m_o = x0 + (o + 1/2) (x1 - x0) / S,    s = max((x1 - x0) / S, 1)

and crop[c, p, o] is the same sum over the rows y of the box, from y0 to y1. f is the triangle (bilinear) or
Keys' cubic with a = -1/2 (bicubic), x and y run over all pixels of the image that f reaches, also around
the box, and `round` gives 8 bits: Pillow's `resize((S, S), f, box=box, reducing_gap=None)`.

images is one flat uint8 buffer of B decoded images, [h, w, 3] each, of any sizes; out come V crops of each,
uint8 [V, B, 3, S, S]. There is no gradient.

Moved: the images once, the crops once. 64 images of 256 x 341 px with 2 x 224 + 10 x 96: 17 and 37 MB; the
host sends the 17 MB of images instead of 37 MB of crops, and its cores do nothing but decode.

Numbers: Pillow's. Weights are rounded to 22 bits after the point and their sums are exact, on tensor cores
too: a weight is the sum of two numbers that float16 holds. Positions are ratios of integers. What is left is
the last bit of a weight computed in float32, which shows where an exact value lies within 1e-4 of a rounding
boundary, by one level. Bitwise repeatable.

(Some versions of Pillow take the vertical pass first in tall images, which rounds and clips otherwise.)
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from kernels import launch
from kernels.language import ceil_div, dot, jit, tl
from kernels.spec import KernelSpec

Filter = Literal["bilinear", "bicubic"]
SUPPORT = {"bilinear": 1, "bicubic": 2}  # source pixels either side of the centre, when enlarging

LARGEST_SIZE = 16384  # of crops, px: positions are int32
BITS = 22  # of weights, after the point

# One program makes TILE_Y rows of TILE_X / 3 pixels, in steps of ROWS rows of the source.
TILE_X, TILE_Y, ROWS = 64, 32, 16


def multicrop(
    images: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    boxes: Tensor,
    flipped: Tensor,
    size: int,
    filter: Filter = "bilinear",
) -> Tensor:
    """Return the crops of decoded images, uint8 [V, B, 3, size, size].

    What the arguments hold is not looked at (that would wait for the GPU): images must lie within the
    buffer and boxes within their images.

    Args:
        images: uint8 [N], RGB images [h, w, 3] anywhere in it.
        offsets: int64 [B], where each of them begins.
        sizes: int32 [B, 2], height and width.
        boxes: int16 or int32 [V, B, 4], pixels (x0, y0, x1, y1), x0 < x1 and y0 < y1.
        flipped: bool [V, B], mirrored left-right after cutting.
        size: side of the crops, px.
        filter: "bilinear" or "bicubic".

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    tensors = (images, offsets, sizes, boxes, flipped)
    fits = (
        images.ndim == offsets.ndim == 1
        and sizes.shape == (len(offsets), 2)
        and boxes.ndim == 3
        and boxes.shape[1:] == (len(offsets), 4)
        and flipped.shape == boxes.shape[:2]
    )
    if not fits:
        raise ValueError(
            "multicrop: images [N], offsets [B], sizes [B, 2], boxes [V, B, 4], flipped [V, B] expected, "
            f"got {', '.join(str(tuple(x.shape)) for x in tensors)}"
        )
    dtypes = [x.dtype for x in tensors]
    if dtypes != [torch.uint8, torch.int64, torch.int32, boxes.dtype, torch.bool] or (
        boxes.dtype not in (torch.int16, torch.int32)
    ):
        raise ValueError(
            "multicrop: uint8, int64, int32, int16 or int32, bool expected, "
            f"got {', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}"
        )
    if any(x.device != images.device for x in tensors):
        got = ", ".join(str(x.device) for x in tensors)
        raise ValueError(f"multicrop: all tensors on one device expected, got {got}")
    if not 1 <= size <= LARGEST_SIZE or filter not in SUPPORT:
        raise ValueError(
            f"multicrop: size 1 .. {LARGEST_SIZE} and filter {' or '.join(SUPPORT)} expected, "
            f"got {size}, {filter}"
        )
    return _forward(images, offsets, sizes, boxes, flipped, size, filter == "bicubic")


def reference(
    images: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    boxes: Tensor,
    flipped: Tensor,
    size: int,
    filter: Filter = "bilinear",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return the crops, one after the other, as two products with the filter's matrices in `dtype`."""
    crops = images.new_empty(len(boxes), len(offsets), 3, size, size)
    for b, (offset, (height, width)) in enumerate(zip(offsets.tolist(), sizes.tolist())):
        image = images[offset : offset + 3 * height * width].view(height, width, 3).to(dtype)
        for v, (x0, y0, x1, y1) in enumerate(boxes[:, b].tolist()):
            across = _matrix(x0, x1, width, size, filter, image)
            down = _matrix(y0, y1, height, size, filter, image)
            rows = _to_levels(torch.einsum("ox,yxc->yoc", across, image))
            crop = _to_levels(torch.einsum("py,yoc->cpo", down, rows))
            crops[v, b] = torch.where(flipped[v, b], crop.flip(-1), crop).to(torch.uint8)
    return crops


def _matrix(low: int, high: int, extent: int, size: int, filter: Filter, like: Tensor) -> Tensor:
    """Return what each of `extent` pixels adds to each of `size` over [low, high), [size, extent]."""
    scale = (high - low) / size
    stretch = max(scale, 1)
    pixel = torch.arange(extent, dtype=like.dtype, device=like.device) + 0.5
    centre = low + (torch.arange(size, dtype=like.dtype, device=like.device) + 0.5) * scale
    x = (pixel - centre[:, None]).abs() / stretch
    if filter == "bilinear":
        weights = (1 - x).clamp_min(0)
    else:
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    return (weights / weights.sum(1, keepdim=True) * 2**BITS).round() / 2**BITS


def _to_levels(x: Tensor) -> Tensor:
    return (x + 0.5).floor().clamp(0, 255)


# The operator


def _fake(images: Tensor, offsets: Tensor, sizes: Tensor, boxes: Tensor, *rest: Any) -> Tensor:
    size = rest[1]
    return images.new_empty(boxes.shape[0], boxes.shape[1], 3, size, size)


@launch.operator("multicrop", _fake)
def _forward(
    images: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    boxes: Tensor,
    flipped: Tensor,
    size: int,
    cubic: bool,
) -> Tensor:
    if flipped.numel() and launch.on_triton(images):
        return _launch(images, offsets, sizes, boxes, flipped, size, cubic)
    filter = "bicubic" if cubic else "bilinear"
    return reference(images, offsets, sizes, boxes, flipped, size, filter)


# Triton


def _launch(
    images: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    boxes: Tensor,
    flipped: Tensor,
    size: int,
    cubic: bool,
) -> Tensor:
    images, offsets, sizes = (x.contiguous() for x in (images, offsets, sizes))
    boxes, flipped = boxes.contiguous(), flipped.contiguous().view(torch.uint8)
    views, batch = flipped.shape
    crops = launch.empty(views, batch, 3, size, size, dtype=torch.uint8, like=images)
    tiles_x, tiles_y = ceil_div(3 * size, TILE_X), ceil_div(size, TILE_Y)
    with launch.on_device_of(images):
        _cut[(views * batch * tiles_y * tiles_x,)](
            *(images, offsets, sizes, boxes, flipped, crops, batch, size, tiles_x, tiles_y),
            CUBIC=cubic,
            TILE_X=TILE_X,
            TILE_Y=TILE_Y,
            ROWS=ROWS,
            num_warps=4,
        )
    return crops


@jit
def _weight(numerator, inverse, CUBIC: tl.constexpr):
    """Return the filter at distances |numerator| * inverse, not normalised."""
    x = tl.abs(numerator.to(tl.float32)) * inverse
    if CUBIC:
        near = (1.5 * x - 2.5) * x * x + 1.0
        far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
        return tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    return tl.maximum(1.0 - x, 0.0)


@jit
def _to_level(total):
    """Return int32 sums of 22 bits after the point, rounded to 0, 1, .., 255."""
    return tl.minimum(tl.maximum((total + (1 << 21)) >> 22, 0), 255)


@jit
def _cut(
    IMAGES, OFFSETS, SIZES, BOXES, FLIPPED, CROPS, batch, size, tiles_x, tiles_y,
    CUBIC: tl.constexpr, TILE_X: tl.constexpr, TILE_Y: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Make one tile of one crop: the horizontal pass by gathering, the vertical one as a product.

    Columns of the tile are bytes as they lie in the image, channels interleaved. Along an axis, pixel k of
    the image and pixel q of the crop are |(2 (k - low) + 1) size - (2 q + 1) extent| / wide apart, seen by
    the stretched filter.
    """
    program = tl.program_id(0)
    tile_x = program % tiles_x
    tile_y = (program // tiles_x) % tiles_y
    crop = program // (tiles_x * tiles_y)
    image = crop % batch
    x0 = tl.load(BOXES + 4 * crop).to(tl.int32)
    y0 = tl.load(BOXES + 4 * crop + 1).to(tl.int32)
    extent_x = tl.load(BOXES + 4 * crop + 2).to(tl.int32) - x0
    extent_y = tl.load(BOXES + 4 * crop + 3).to(tl.int32) - y0
    height, width = tl.load(SIZES + 2 * image), tl.load(SIZES + 2 * image + 1)
    flip = tl.load(FLIPPED + crop) != 0
    reach = 2 if CUBIC else 1

    # What the columns of the tile see: `taps_x` pixels each, from `first_x` on
    column = tile_x * TILE_X + tl.arange(0, TILE_X)
    out_x, channel = column // 3, column % 3
    column_there = out_x < size
    seen_x = tl.minimum(out_x, size - 1)
    seen_x = tl.where(flip, size - 1 - seen_x, seen_x)
    wide_x = 2 * tl.maximum(extent_x, size)
    inverse_x = 1.0 / wide_x.to(tl.float32)
    centre_x = (2 * seen_x + 1) * extent_x
    first_x = tl.maximum(2 * size * x0 + centre_x - reach * wide_x + size, 0) // (2 * size)
    taps_x = (reach * wide_x + size - 1) // size
    total_x = tl.zeros([TILE_X], tl.float32)
    for tap in range(taps_x):
        x = first_x + tap
        weight = _weight((2 * (x - x0) + 1) * size - centre_x, inverse_x, CUBIC)
        total_x += tl.where(x < width, weight, 0.0)
    scale_x = 4194304.0 / total_x  # 2 ** BITS

    # What its rows see: the same, altogether the pixels of rows start .. end - 1
    out_y = tile_y * TILE_Y + tl.arange(0, TILE_Y)
    seen_y = tl.minimum(out_y, size - 1)
    wide_y = 2 * tl.maximum(extent_y, size)
    inverse_y = 1.0 / wide_y.to(tl.float32)
    centre_y = (2 * seen_y + 1) * extent_y
    first_y = tl.maximum(2 * size * y0 + centre_y - reach * wide_y + size, 0) // (2 * size)
    total_y = tl.zeros([TILE_Y], tl.float32)
    for tap in range((reach * wide_y + size - 1) // size):
        y = first_y + tap
        weight = _weight((2 * (y - y0) + 1) * size - centre_y, inverse_y, CUBIC)
        total_y += tl.where(y < height, weight, 0.0)
    scale_y = 4194304.0 / total_y
    top = 2 * tile_y * TILE_Y + 1
    bottom = 2 * tl.minimum(tile_y * TILE_Y + TILE_Y, size) - 1
    around = 2 * size * y0 + size
    start = tl.maximum(around + top * extent_y - reach * wide_y, 0) // (2 * size)
    end = tl.minimum((around + bottom * extent_y + reach * wide_y) // (2 * size), height)

    pixels = IMAGES + tl.load(OFFSETS + image)
    coarse_sum = tl.zeros([TILE_Y, TILE_X], tl.float32)
    fine_sum = tl.zeros([TILE_Y, TILE_X], tl.float32)
    for row_start in range(start, end, ROWS):
        # Where no pixel is, the nearest one is read and weighs nothing: no load needs a mask.
        row = row_start + tl.arange(0, ROWS)
        rows = pixels + tl.minimum(row, end - 1).to(tl.int64)[:, None] * (3 * width)
        total = tl.zeros([ROWS, TILE_X], tl.int32)
        for tap in range(taps_x):
            x = first_x + tap
            weight = _weight((2 * (x - x0) + 1) * size - centre_x, inverse_x, CUBIC)
            weight = tl.where(x < width, tl.floor(weight * scale_x + 0.5), 0.0).to(tl.int32)
            value = tl.load(rows + (3 * tl.minimum(x, width - 1) + channel)[None, :])
            total += value.to(tl.int32) * weight[None, :]
        level = _to_level(total).to(tl.float16)
        numerator = ((2 * (row - y0) + 1) * size)[None, :] - centre_y[:, None]
        weight = tl.floor(_weight(numerator, inverse_y, CUBIC) * scale_y[:, None] + 0.5)
        weight = tl.where((row < end)[None, :], weight, 0.0)
        coarse = tl.floor(weight * (1 / 4096) + 0.5)
        fine = weight - coarse * 4096.0  # -2048 .. 2047
        coarse_sum += dot(coarse.to(tl.float16), level, "ieee")
        fine_sum += dot(fine.to(tl.float16), level, "ieee")

    level = _to_level(coarse_sum.to(tl.int32) * 4096 + fine_sum.to(tl.int32))
    at = (crop.to(tl.int64) * 3 + channel[None, :]) * size * size + out_y[:, None] * size
    there = (out_y < size)[:, None] & column_there[None, :]
    tl.store(CROPS + at + out_x[None, :], level.to(tl.uint8), mask=there)


# For tests and the bench


def eager(
    images: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    boxes: Tensor,
    flipped: Tensor,
    size: int,
    filter: Filter = "bilinear",
) -> Tensor:
    """Return the crops as torchvision's transforms make them; at borders they see less than Pillow."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    views = []
    plan = zip(offsets.tolist(), sizes.tolist(), boxes.transpose(0, 1).tolist())
    for (offset, (height, width), image_boxes), flips in zip(plan, flipped.T.tolist()):
        image = images[offset : offset + 3 * height * width].view(height, width, 3).permute(2, 0, 1)
        crops = []
        for (x0, y0, x1, y1), flip in zip(image_boxes, flips):
            crop = functional.resized_crop(
                image,
                *(y0, x0, y1 - y0, x1 - x0),
                size=[size, size],
                interpolation=InterpolationMode(filter),
                antialias=True,
            )
            crops.append(functional.horizontal_flip(crop) if flip else crop)
        views.append(torch.stack(crops))
    return torch.stack(views, dim=1)


def _inputs(shape: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    batch, views, height, width = shape["B"], shape["V"], shape["H"], shape["W"]
    low, high = shape["scale"]
    sides = torch.tensor([width, height])
    extent = (sides * (low + (high - low) * torch.rand(views, batch, 1)).sqrt()).long().clamp_min(1)
    start = (torch.rand(views, batch, 2) * (sides - extent + 1)).long()
    return {
        "images": torch.randint(256, (batch * height * width * 3,), dtype=dtype),
        "offsets": torch.arange(batch) * (height * width * 3),
        "sizes": torch.tensor([[height, width]] * batch, dtype=torch.int32),
        "boxes": torch.cat([start, start + extent], dim=-1).to(torch.int16),
        "flipped": torch.rand(views, batch) < 0.5,
        "size": shape["S"],
        "filter": shape["filter"],
    }


def _bytes(shape: Mapping[str, Any], size: int) -> int:
    images = shape["B"] * shape["H"] * shape["W"]
    crops = shape["V"] * shape["B"] * shape["S"] ** 2
    return 3 * size * (images + crops)


_COCO = {"H": 256, "W": 341}
SPEC = KernelSpec(
    name="multicrop",
    call=multicrop,
    reference=reference,
    eager=eager,
    inputs=_inputs,
    small=(),  # nothing here is a float: tests/test_kernel_multicrop.py has the cases
    real={
        "64 images, 2 x 224, bicubic": {
            **{"B": 64, **_COCO, "V": 2, "S": 224, "filter": "bicubic", "scale": (0.4, 1.0)}
        },
        "64 images, 10 x 96, bicubic": {
            **{"B": 64, **_COCO, "V": 10, "S": 96, "filter": "bicubic", "scale": (0.05, 0.4)}
        },
        "32 images, 2 x 224, bilinear": {
            **{"B": 32, **_COCO, "V": 2, "S": 224, "filter": "bilinear", "scale": (0.2, 1.0)}
        },
    },
    bytes_moved=_bytes,
    dtypes=(torch.uint8,),
    bench_dtype=torch.uint8,
    wide_loads=False,  # images begin at any byte, and a pixel has three
)
