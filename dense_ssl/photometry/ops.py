"""The photometric operations themselves: pure torch on batches, one parameter per image.

Images are float [n, 3, H, W] in [0, 1]. Nothing here draws a random number, and nothing moves a pixel.

The definitions are those of torchvision's functional operations on float images, which are Pillow's
without the rounding to 8 bits between steps. Two choices differ from torchvision's: grey is Pillow's
and kornia's ITU-R 601 luma, whose weights sum to 1 (torchvision writes 0.2989 for red, so that grey is
no fixed point of it); and the blur is Pillow's `GaussianBlur`, which the published codes use.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
BLUR_PASSES = 3  # Pillow's number of box filters


def to_grey(x: Tensor) -> Tensor:
    """Return the luma of every pixel in all three channels, [n, 3, H, W]."""
    return _luma(x).repeat(1, 3, 1, 1)


def solarize(x: Tensor, threshold: float) -> Tensor:
    """Return `x` with every value of at least `threshold` replaced by its distance from 1."""
    return torch.where(x < threshold, x, 1 - x)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Return `x` with its hue turned by `shift` [n], in parts of a full turn of the HSV cone.

    Writing V, m and C = V - m for the maximum, minimum and range of a pixel's channels, its hue in
    sixths of a turn is, without a case for each maximum, `h = sign(G - B) (G + B - R + V - 2 m) / C`,
    in [-3, 3] with red at 0. After the turn, wrapped to the same range, R is `V - C clamp(|h| - 1)`,
    G is `V - C clamp(2 - |h + 1|)` and B is `V - C clamp(2 - |h - 1|)`, all clamped to [0, 1].
    """
    red, green, blue = x.unbind(1)
    value = torch.maximum(red, green).maximum(blue)
    low = torch.minimum(red, green).minimum(blue)
    chroma = value - low
    hue = (green + blue).sub_(red).add_(value).sub_(low, alpha=2)
    hue = hue.div_(chroma.clamp_min(torch.finfo(x.dtype).tiny))  # a grey pixel: 0 / tiny
    hue = hue.copysign_(green - blue).add_(6 * shift[:, None, None])
    hue.sub_((hue / 6).round_(), alpha=6)
    out = torch.empty_like(x)
    shares = (hue.abs().sub_(1), (hue + 1).abs_().neg_().add_(2), (hue - 1).abs_().neg_().add_(2))
    for channel, share in enumerate(shares):
        torch.addcmul(value, chroma, share.clamp_(0, 1), value=-1, out=out[:, channel])
    return out


def jitter_steps(
    order: np.ndarray, brightness: np.ndarray, contrast: np.ndarray, saturation: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return brightness, contrast and saturation as colour matrices, in each image's own order.

    All three are `clamp(M x + c * mean)`, with `mean` the mean luma of the image before the step:
    M is `b I`, `s I + (1 - s) 1 luma^T` or `f I`, and c is 0 except for contrast, where it is 1 - f.
    The hue lies somewhere among them, so an image has up to three steps before and after it; steps
    it does not have are the identity, which leaves values as they are to the bit.

    Args:
        order: [n, 4] permutations of 0 brightness, 1 contrast, 2 saturation, 3 hue.
        brightness: [n] factor.
        contrast: [n] factor.
        saturation: [n] factor.

    Returns:
        float32 matrices [6, n, 3, 3] and float32 shares of the mean [6, n]: three steps before the
        hue, three after it.
    """
    n = len(order)
    identity = np.eye(3)
    to_luma = np.tile(np.asarray(LUMA), (3, 1))
    factors = np.stack([brightness, contrast, saturation], 1)
    matrices = np.tile(identity, (6, n, 1, 1))
    means = np.zeros((6, n))
    rows = np.arange(n)
    hue_at = np.argmax(order == 3, axis=1)
    for place in range(4):
        kind = order[:, place]
        step = np.where(place < hue_at, place, 2 + place - hue_at)
        for number in range(3):
            chosen = rows[kind == number]
            factor = factors[chosen, number]
            matrix = factor[:, None, None] * identity
            if number == 1:
                means[step[chosen], chosen] = 1 - factor
            if number == 2:
                matrix = matrix + (1 - factor)[:, None, None] * to_luma
            matrices[step[chosen], chosen] = matrix
    return matrices.astype(np.float32), means.astype(np.float32)


def color_jitter(x: Tensor, matrices: Tensor, means: Tensor, hue: Tensor) -> Tensor:
    """Return `x` after the steps of `jitter_steps` and the turn of its hue by `hue` [n]."""
    for step in range(3):
        x = _affine(x, matrices[step], means[step])
    x = adjust_hue(x, hue)
    for step in range(3, 6):
        x = _affine(x, matrices[step], means[step])
    return x


def blur_radius(sigma: float) -> int:
    """Return how many pixels to each side `blur_kernels` reaches for standard deviations up to `sigma`."""
    return BLUR_PASSES * (int(_box(np.asarray([sigma]))[0][0]) + 1)


def blur_kernels(sigma: np.ndarray, radius: int) -> np.ndarray:
    """Return the 1-D kernels of Pillow's `GaussianBlur(sigma)`, float32 [n, 2 * radius + 1].

    Pillow approximates the Gaussian by three extended box filters of variance sigma^2 / 3 each
    (Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended box
    filtering", eq. 7, 11 and 14): the 2 l + 1 middle taps are equal, one more to each side has a
    share of their weight. The kernel is the threefold convolution of that box, and its standard
    deviation is sigma exactly.
    """
    middle, edge = _box(sigma)
    reach = radius // BLUR_PASSES
    distance = np.abs(np.arange(-reach, reach + 1))
    box = np.where(distance <= middle[:, None], 1.0, 0.0)
    box = np.where(distance == middle[:, None] + 1, edge[:, None], box)
    box /= box.sum(1, keepdims=True)
    kernel = np.zeros((len(sigma), 2 * radius + 1))
    kernel[:, radius] = 1
    for _ in range(BLUR_PASSES):
        shifted = [np.roll(kernel, tap, axis=1) for tap in range(-reach, reach + 1)]
        kernel = np.einsum("tnk,nt->nk", shifted, box)
    return kernel.astype(np.float32)


def blur(x: Tensor, kernels: Tensor) -> Tensor:
    """Return `x` filtered along both axes by each image's own kernel [n, 2 r + 1], edges replicated."""
    n, _, height, width = x.shape
    taps = kernels.shape[1]
    weights = kernels.repeat_interleave(3, 0)
    rows = x.reshape(1, 3 * n, height, width)  # one group of a grouped convolution per plane
    rows = F.pad(rows, (taps // 2,) * 4, mode="replicate")
    rows = F.conv2d(rows, weights.view(-1, 1, 1, taps), groups=3 * n)
    rows = F.conv2d(rows, weights.view(-1, 1, taps, 1), groups=3 * n)
    return rows.view(x.shape)


def _luma(x: Tensor) -> Tensor:
    red, green, blue = LUMA
    return (x[:, :1] * red).add_(x[:, 1:2], alpha=green).add_(x[:, 2:], alpha=blue)


def _affine(x: Tensor, matrix: Tensor, mean: Tensor) -> Tensor:
    """Return `clamp(matrix x + mean * (mean luma of x))` per image."""
    luma = _luma(x.mean((2, 3), keepdim=True))[:, :, 0]
    shift = (mean[:, None, None] * luma).expand(-1, 3, 1)
    return torch.baddbmm(shift, matrix, x.flatten(2)).clamp_(0, 1).view(x.shape)


def _box(sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the integer radius and the edge weight of one extended box per standard deviation."""
    variance = np.asarray(sigma, np.float64) ** 2 / BLUR_PASSES
    middle = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    edge = (2 * middle + 1) * (middle * (middle + 1) - 3 * variance)
    edge /= 6 * (variance - (middle + 1) ** 2)
    return middle, edge
