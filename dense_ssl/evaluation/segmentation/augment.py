"""Images and label maps changed together, as the segmentation protocols train on them.

An image is uint8 [H, W, 3], its label map int16 [H, W] with -1 where no class is given. Resizing follows
OpenCV's rules (no antialiasing, nearest by the floor), which the published loaders use, unless
`antialiased`. Every draw comes from a counter, so that a sample depends on its key alone.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.nn import functional as F
from torchvision.transforms import functional as colour

from dense_ssl.augment import MEAN
from dense_ssl.evaluation.label_maps import WIDE_VOID
from dense_ssl.evaluation.trained.draws import Draws

Resampling = Literal["bilinear", "bicubic", "antialiased"]
Sample = tuple[np.ndarray, np.ndarray]
MEAN_COLOUR = np.array([round(255 * part) for part in MEAN], np.uint8)  # 0 once normalised
_TRIES = 10  # of a crop that is not all one class
_OUTSIDE = -2  # label of what lies around the image


def resized(image: np.ndarray, size: tuple[int, int], how: Resampling) -> np.ndarray:
    """Return an image uint8 [H, W, 3] at another size (height, width)."""
    if image.shape[:2] == size:
        return image
    if how == "antialiased":
        picture = Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR)
        return np.array(picture)
    maps = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    maps = F.interpolate(maps, size=size, mode=how, align_corners=False)
    return maps[0].round().clamp(0, 255).permute(1, 2, 0).to(torch.uint8).numpy()


def resized_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a label map [H, W] at another size by nearest neighbour: pixel i reads floor(i H / h)."""
    if labels.shape == size:
        return labels
    rows, columns = (
        np.minimum(np.arange(new) * old // new, old - 1) for new, old in zip(size, labels.shape)
    )
    return labels[rows[:, None], columns]


def fitted(size: tuple[int, int], scale: tuple[float, float]) -> tuple[int, int]:
    """Return height and width that fit in `scale` (longer and shorter side), the aspect kept."""
    factor = min(max(scale) / max(size), min(scale) / min(size))
    height, width = (int(side * factor + 0.5) for side in size)
    return max(height, 1), max(width, 1)


def any_scale(
    sample: Sample,
    draws: Draws,
    *,
    size: tuple[int, int],
    scale: tuple[int, int],
    ratio: tuple[float, float],
    max_share: float,
    resampling: Resampling,
) -> Sample:
    """Return a crop of the image at a random scale, mirrored and distorted (DenseCL).

    Of ten crops the first is taken in which no class has `max_share` of the labelled pixels or more, else
    the last. What the image does not fill is of the mean colour, without labels.
    """
    image, labels = sample
    factor = draws.uniform(*ratio)
    new = fitted(labels.shape, (int(scale[0] * factor), int(scale[1] * factor)))
    image, labels = resized(image, new, resampling), resized_labels(labels, new)
    window = _varied_window(labels, size, max_share, draws)
    image, labels = _mirrored((image[window], labels[window]), draws)
    return _padded((distorted(image, draws), labels), size)


def listed_scale(
    sample: Sample, draws: Draws, *, size: tuple[int, int], resampling: Resampling
) -> Sample:
    """Return a crop at one of seven scales, mirrored (Van Gansbeke et al. 2021, Cityscapes)."""
    image, labels = sample
    factor = (0.5, 0.75, 1, 1.25, 1.5, 1.75, 2)[draws.below(7)]
    height, width = (int(side * factor) for side in labels.shape)
    if height < size[0] or width < size[1]:  # enlarged until the crop fits, one pixel more
        again = max(size[0] / height, size[1] / width)
        height, width = int(height * again) + 1, int(width * again) + 1
    new = (height, width)
    image, labels = resized(image, new, resampling), resized_labels(labels, new)
    y, x = (draws.below(old - wanted + 1) for old, wanted in zip(new, size))
    window = (slice(y, y + size[0]), slice(x, x + size[1]))
    return _mirrored((image[window], labels[window]), draws)


def rotate_zoom(
    sample: Sample, draws: Draws, *, size: tuple[int, int], fill: int, resampling: Resampling
) -> Sample:
    """Return the image mirrored, turned up to 5 degrees, zoomed by 0.75 to 1.25, and squashed to `size`.

    Around the turned image all is black, with the label `fill` (Van Gansbeke et al. 2021, VOC).
    """
    sample = _mirrored(sample, draws)
    degrees, zoom = draws.uniform(-5, 5), draws.uniform(0.75, 1.25)
    image, labels = turned(sample, degrees, zoom)
    labels = np.where(labels == _OUTSIDE, fill, labels).astype(np.int16)
    return resized(image, size, resampling), resized_labels(labels, size)


def resized_crop(sample: Sample, draws: Draws, *, size: tuple[int, int]) -> Sample:
    """Return 14 to 100 % of the image at `size`, mirrored, recoloured and blurred (SERE)."""
    image, labels = sample
    x, y, width, height = _crop_box(labels.shape, draws)
    box = (x, y, x + width, y + height)
    picture = Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR, box=box)
    labels = resized_labels(labels[y : y + height, x : x + width], size)
    image, labels = _mirrored((np.asarray(picture), labels), draws)
    picture = Image.fromarray(image)
    if draws.chance(0.8):
        picture = _jittered(picture, draws)
    if draws.chance(0.2):
        picture = picture.convert("L").convert("RGB")
    if draws.chance(0.5):
        picture = picture.filter(ImageFilter.GaussianBlur(draws.uniform(0.1, 2)))
    return np.asarray(picture), labels


def turned(sample: Sample, degrees: float, zoom: float) -> Sample:
    """Return an image turned counter-clockwise and zoomed about its centre, its size kept.

    Bicubic, and black around it; labels by nearest neighbour, with -2 around them.
    """
    image, labels = sample
    height, width = labels.shape
    cosine, sine = math.cos(math.radians(degrees)) / zoom, math.sin(math.radians(degrees)) / zoom
    y, x = torch.meshgrid(
        torch.arange(height) - height / 2, torch.arange(width) - width / 2, indexing="ij"
    )
    source = torch.stack(
        [cosine * x - sine * y + width / 2, sine * x + cosine * y + height / 2], -1
    )
    grid = (2 * source + 1) / torch.tensor([width, height]) - 1  # -1 and 1 are the outer edges
    grid = grid[None].float()
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    pixels = F.grid_sample(pixels, grid, "bicubic", "zeros", align_corners=False)
    shifted = torch.from_numpy(np.ascontiguousarray(labels))[None, None].float() - _OUTSIDE
    shifted = F.grid_sample(shifted, grid, "nearest", "zeros", align_corners=False)
    image = pixels[0].round().clamp(0, 255).permute(1, 2, 0).to(torch.uint8).numpy()
    return image, (shifted[0, 0] + _OUTSIDE).to(torch.int16).numpy()


def distorted(image: np.ndarray, draws: Draws) -> np.ndarray:
    """Return an image with other brightness, contrast, saturation and hue, each with probability 1/2.

    Brightness moves by up to 32 of 255, contrast and saturation by factors of 0.5 to 1.5, hue by up to 36
    degrees; contrast comes before the colours or after them (DenseCL).
    """
    if draws.chance(0.5):
        image = _clipped(image + np.float32(draws.uniform(-32, 32)))
    early = draws.chance(0.5)
    if early and draws.chance(0.5):
        image = _clipped(image * np.float32(draws.uniform(0.5, 1.5)))
    if draws.chance(0.5):
        image = saturated(image, draws.uniform(0.5, 1.5))
    if draws.chance(0.5):
        image = hue_turned(image, 2 * (draws.below(36) - 18))
    if not early and draws.chance(0.5):
        image = _clipped(image * np.float32(draws.uniform(0.5, 1.5)))
    return image


def saturated(image: np.ndarray, factor: float) -> np.ndarray:
    """Return an image uint8 [H, W, 3] whose HSV saturation is multiplied, at most to 1."""
    pixels = image.astype(np.float32)
    value = pixels.max(2, keepdims=True)
    spread = value - pixels.min(2, keepdims=True)
    most = np.divide(value, spread, out=np.full_like(value, factor), where=spread > 0)
    return _clipped(value - (value - pixels) * np.minimum(factor, most) + 0.5)


def hue_turned(image: np.ndarray, degrees: float) -> np.ndarray:
    """Return an image uint8 [H, W, 3] whose HSV hue is turned."""
    pixels = image.astype(np.float32)
    value = pixels.max(2)
    spread = value - pixels.min(2)
    red, green, blue = np.moveaxis(pixels, 2, 0)
    safe = np.where(spread > 0, spread, 1)
    hue = np.select(  # in sixths of a turn
        [value == red, value == green], [(green - blue) / safe, 2 + (blue - red) / safe],
        4 + (red - green) / safe,
    ) + np.float32(degrees / 60)  # fmt: skip
    channels = []
    for number in (5, 3, 1):
        place = (number + hue) % 6
        channels.append(value - spread * np.clip(np.minimum(place, 4 - place), 0, 1))
    return _clipped(np.stack(channels, axis=2) + 0.5)


def _mirrored(sample: Sample, draws: Draws) -> Sample:
    """Left to right, every other time."""
    if not draws.chance(0.5):
        return sample
    image, labels = sample
    return np.ascontiguousarray(image[:, ::-1]), np.ascontiguousarray(labels[:, ::-1])


def _varied_window(
    labels: np.ndarray, size: tuple[int, int], max_share: float, draws: Draws
) -> tuple[slice, slice]:
    """Where to crop so that no class has too large a share."""
    window = (slice(0), slice(0))
    for _ in range(_TRIES):
        y, x = (draws.below(max(old - new, 0) + 1) for old, new in zip(labels.shape, size))
        window = (slice(y, y + size[0]), slice(x, x + size[1]))
        counts = np.bincount(labels[window][labels[window] != WIDE_VOID].ravel())
        counts = counts[counts > 0]
        if len(counts) > 1 and counts.max() / counts.sum() < max_share:
            break
    return window


def _padded(sample: Sample, size: tuple[int, int]) -> Sample:
    """To `size` at the right and the bottom."""
    image, labels = sample
    height, width = labels.shape
    if (height, width) == size:
        return sample
    canvas = np.broadcast_to(MEAN_COLOUR, (*size, 3)).copy()
    canvas[:height, :width] = image
    around = np.full(size, WIDE_VOID, np.int16)
    around[:height, :width] = labels
    return canvas, around


def _crop_box(size: Sequence[int], draws: Draws) -> tuple[int, int, int, int]:
    """x, y, width, height of a random resized crop: 14 to 100 % of the area, aspect 3/4 to 4/3."""
    height, width = size
    for _ in range(_TRIES):
        area = height * width * draws.uniform(0.14, 1)
        aspect = math.exp(draws.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return draws.below(width - w + 1), draws.below(height - h + 1), w, h
    w = min(width, max(round(height * 4 / 3), 1))
    h = min(height, max(round(w * 4 / 3), 1))
    return (width - w) // 2, (height - h) // 2, w, h


def _jittered(picture: Image.Image, draws: Draws) -> Image.Image:
    """Brightness, contrast and saturation by 0.2 to 1.8, hue by a fifth of a turn, in random order."""
    factors = [draws.uniform(0.2, 1.8) for _ in range(3)]
    hue = draws.uniform(-0.2, 0.2)
    changes = [colour.adjust_brightness, colour.adjust_contrast, colour.adjust_saturation]
    order = sorted(range(4), key=[draws.uniform(0, 1) for _ in range(4)].__getitem__)
    for number in order:
        if number == 3:
            picture = colour.adjust_hue(picture, hue)  # pyright: ignore
        else:
            picture = changes[number](picture, factors[number])  # pyright: ignore
    return picture


def _clipped(pixels: np.ndarray) -> np.ndarray:
    """To 0 ... 255, what follows the point cut off."""
    return np.clip(pixels, 0, 255).astype(np.uint8)
