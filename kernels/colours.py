"""One step of colour change, for whole batches in torch and for the pixels of a program in Triton.

On channels in [0, 1], with a factor f:

    BRIGHTNESS   clamp(f x)                            clamp is to [0, 1]
    CONTRAST     clamp(f x + (1 - f) mean of luma(x))
    SATURATION   clamp(f x + (1 - f) luma(x))          f = 0 is grey
    HUE          x turned by f of a circle of the HSV cone
    any other    x

The definitions are torchvision's functional operations on float images, with Pillow's and kornia's luma
0.299 R + 0.587 G + 0.114 B (torchvision has 0.2989 R).

Hue: with value and low the maximum and the minimum of the channels and C their difference, it is
sign(G - B) (G + B - R + value - 2 low) / C in sixths of a circle, red at 0. Turned, each channel is value
less a share of C that the hue alone decides.
"""

import torch
from torch import Tensor

from kernels.language import jit, tl

BRIGHTNESS, CONTRAST, SATURATION, HUE, NOTHING = 0, 1, 2, 3, -1
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def step_of_each(x: Tensor, kind: Tensor, factor: Tensor) -> Tensor:
    """Return x [N, 3, H, W] after one step of each image, kind int [N] and factor [N]."""
    kind, factor = per_image(kind), per_image(factor)
    luma = _luma(x)
    of_mean = torch.where(kind == CONTRAST, 1 - factor, 0) * luma.mean((2, 3), keepdim=True)
    of_luma = torch.where(kind == SATURATION, 1 - factor, 0) * luma
    mixed = (factor * x + (of_luma + of_mean)).clamp(0, 1)
    known = (kind >= BRIGHTNESS) & (kind <= SATURATION)
    return torch.where(kind == HUE, _turned(x, factor), torch.where(known, mixed, x))


def step_of_all(x: Tensor, kind: int, factor: float) -> Tensor:
    """Return x [N, 3, H, W] after the same step of all images, perhaps in its own memory."""
    if kind == HUE:
        return _turned(x, factor)
    if kind == CONTRAST:
        mean = _luma(x).mean((2, 3), keepdim=True)
        return x.mul_(factor).add_(mean, alpha=1 - factor).clamp_(0, 1)
    if kind == SATURATION:
        luma = _luma(x)
        return x.mul_(factor).add_(luma, alpha=1 - factor).clamp_(0, 1)
    return x.mul_(factor).clamp_(0, 1) if kind == BRIGHTNESS else x


def _luma(x: Tensor) -> Tensor:
    red, green, blue = x.split(1, 1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def _turned(x: Tensor, turn: Tensor | float) -> Tensor:
    red, green, blue = x.split(1, 1)
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = value - low
    hue = (green + blue - red + value - 2 * low) / chroma.clamp_min(torch.finfo(x.dtype).tiny)
    hue = torch.where(green < blue, -hue, hue) + 6 * turn
    hue = hue - 6 * torch.round(hue / 6)
    shares = torch.cat([hue.abs() - 1, 2 - (hue + 1).abs(), 2 - (hue - 1).abs()], 1)
    return value - chroma * shares.clamp(0, 1)


def per_image(values: Tensor) -> Tensor:
    """Return values [N] as [N, 1, 1, 1]."""
    return values[:, None, None, None]


@jit
def luma_of(red, green, blue):
    """Return the luma."""
    return red * 0.299 + green * 0.587 + blue * 0.114


@jit
def turned(red, green, blue, turn):
    """Return the channels with their hue turned."""
    value = tl.maximum(tl.maximum(red, green), blue)
    low = tl.minimum(tl.minimum(red, green), blue)
    chroma = value - low
    hue = (green + blue - red + value - 2 * low) / tl.maximum(chroma, 1.1754943508222875e-38)
    hue = tl.where(green < blue, -hue, hue) + 6 * turn
    hue -= 6 * tl.floor(hue * (1 / 6) + 0.5)
    red = value - chroma * tl.minimum(tl.maximum(tl.abs(hue) - 1, 0.0), 1.0)
    green = value - chroma * tl.minimum(tl.maximum(2 - tl.abs(hue + 1), 0.0), 1.0)
    blue = value - chroma * tl.minimum(tl.maximum(2 - tl.abs(hue - 1), 0.0), 1.0)
    return red, green, blue


@jit
def stepped(red, green, blue, kind, factor, mean):
    """Return the channels of pixels of one image after one step; mean is for the contrast."""
    if kind == 3:
        red, green, blue = turned(red, green, blue, factor)
    if (kind >= 0) & (kind < 3):
        of_mean = tl.where(kind == 1, (1 - factor) * mean, 0.0)
        of_luma = tl.where(kind == 2, 1 - factor, 0.0)
        offset = luma_of(red, green, blue) * of_luma + of_mean
        red = tl.minimum(tl.maximum(red * factor + offset, 0.0), 1.0)
        green = tl.minimum(tl.maximum(green * factor + offset, 0.0), 1.0)
        blue = tl.minimum(tl.maximum(blue * factor + offset, 0.0), 1.0)
    return red, green, blue
