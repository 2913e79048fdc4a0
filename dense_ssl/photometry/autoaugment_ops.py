"""Pillow's 8-bit operations in torch, on batches with one parameter per image, equal to the bit.

Images are uint8 [n, 3, H, W], on any device. Every function repeats Pillow's arithmetic: its 16.16 fixed
point for nearest-neighbour warps, its 16-bit luma, its float32 blends that are cut off and not rounded.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_LUMA = (19595, 38470, 7471)  # of 65536: ITU-R 601
_ONE = 65536  # of the fixed point


def posterize(x: Tensor, bits: Tensor) -> Tensor:
    """Return `x` with the upper `bits` [n] of every value, the others 0."""
    keep = 256 - torch.bitwise_left_shift(torch.ones_like(bits), 8 - bits)
    return x & _per_image(keep).to(torch.uint8)


def solarize(x: Tensor, threshold: Tensor) -> Tensor:
    """Return `x` with values of at least `threshold` [n] inverted."""
    return torch.where(x < _per_image(threshold), x, 255 - x)


def autocontrast(x: Tensor) -> Tensor:
    """Return `x` stretched, channel by channel, from its least and largest value to 0 and 255."""
    planes = x.flatten(2)
    low, high = (v.double().view(-1, 1) for v in (planes.amin(2), planes.amax(2)))
    levels = torch.arange(256, device=x.device, dtype=torch.float64)
    # 255 / x would be 255 times the rounded 1 / x
    scale = torch.full_like(low, 255) / (high - low).clamp_min(1)
    table = (levels * scale + -low * scale).clamp(0, 255).floor()
    return _looked_up(x, torch.where(high > low, table, levels))


def equalize(x: Tensor) -> Tensor:
    """Return `x` with the histogram of each channel flattened, as `ImageOps.equalize` does."""
    counts = _histograms(x)
    pixels = x.shape[2] * x.shape[3]
    last = counts.gather(1, x.flatten(2).amax(2).view(-1, 1).long())  # pixels of the largest value
    step = (pixels - last) // 255
    before = counts.cumsum(1) - counts
    table = ((step // 2 + before) // step.clamp_min(1)).clamp_max(255)
    return _looked_up(x, torch.where(step > 0, table, torch.arange(256, device=x.device)))


def color(x: Tensor, factor: Tensor) -> Tensor:
    """Return `x` with its saturation times `factor` [n]: a blend with its luma."""
    return _blend(_luma(x), x, factor)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Return `x` with its contrast times `factor` [n]: a blend with its mean luma, rounded."""
    pixels = x.shape[2] * x.shape[3]
    total = _luma(x).sum((1, 2, 3), dtype=torch.int64)
    return _blend(_per_image((2 * total + pixels) // (2 * pixels)), x, factor)


def sharpness(x: Tensor, factor: Tensor) -> Tensor:
    """Return `x` with its sharpness times `factor` [n]: a blend with it smoothed, borders excepted."""
    whole = x.to(torch.int32)
    rows = whole[..., :-2, :] + whole[..., 1:-1, :] + whole[..., 2:, :]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * whole[..., 1:-1, 1:-1]
    smooth = whole.clone()
    smooth[..., 1:-1, 1:-1] = (2 * total + 13) // 26  # total / 13, rounded; 13ths have no ties
    return _blend(smooth, x, factor)


def fixed_point(matrix: Sequence[float]) -> tuple[int, ...]:
    """Return an affine map (a, b, c, d, e, f) from output to input pixels as `warp` takes it.

    x = a X + b Y + c and y = d X + e Y + f; the shift to pixel centres goes into c and f.
    """
    a, b, c, d, e, f = matrix
    shifted = (a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5)
    return tuple(math.floor(value * _ONE + 0.5) for value in shifted)


def warp(x: Tensor, matrix: Tensor) -> Tensor:
    """Return `x` with every pixel from where `matrix` int64 [n, 6] says, black outside; nearest pixel."""
    height, width = x.shape[2:]
    columns = torch.arange(width, device=x.device)
    rows = torch.arange(height, device=x.device)[:, None]
    a, b, c, d, e, f = (value.view(-1, 1, 1) for value in matrix.unbind(1))
    column = (a * columns + b * rows + c) >> 16  # [n, H, W]
    row = (d * columns + e * rows + f) >> 16
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    at = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    moved = x.flatten(2).gather(2, at.flatten(1)[:, None].expand(-1, x.shape[1], -1))
    return moved.view(x.shape) * inside[:, None]


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _luma(x: Tensor) -> Tensor:
    """Return the luma of every pixel, int32 [n, 1, H, W]."""
    red, green, blue = x.to(torch.int32).split(1, dim=1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue + _ONE // 2) >> 16


def _blend(degenerate: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """Return `degenerate + factor (x - degenerate)`, cut off to 8 bits, for a factor [n]."""
    start = degenerate.to(torch.float32)
    moved = (x - start) * _per_image(factor)
    return (moved + start).clamp_(0, 255).to(torch.uint8)  # two roundings: no fused multiply-add


def _histograms(x: Tensor) -> Tensor:
    """Return how often each value occurs in each channel, int64 [3 n, 256]."""
    planes = x.flatten(0, 1).flatten(1)
    first = 256 * torch.arange(len(planes), device=x.device)[:, None]
    at = (planes + first).flatten()
    counts = torch.zeros(256 * len(planes), dtype=torch.int64, device=x.device)
    return counts.scatter_add_(0, at, torch.ones_like(at)).view(-1, 256)


def _looked_up(x: Tensor, table: Tensor) -> Tensor:
    """Return every value of `x` replaced by its entry in the table [3 n, 256] of its channel."""
    planes = x.flatten(0, 1).flatten(1).long()
    return table.to(torch.uint8).gather(1, planes).view(x.shape)
