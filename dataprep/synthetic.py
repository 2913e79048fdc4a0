"""Small images whose content is known exactly, for tests, smoke runs and benches."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

COORDINATE_BLUE = 128


def coordinate_image(height: int, width: int) -> np.ndarray:
    """Return an image that reads its own position, uint8 [height, width, 3].

    Red is x and green is y: the pixel whose centre lies at the fraction `u` of the side holds
    `round(255 * u)`, so a pixel of any crop tells where in the source it was taken, whatever the
    size. Blue is constant.
    """
    x = np.rint((np.arange(width) + 0.5) / width * 255).astype(np.uint8)
    y = np.rint((np.arange(height) + 0.5) / height * 255).astype(np.uint8)
    image = np.empty((height, width, 3), np.uint8)
    image[..., 0] = x[None, :]
    image[..., 1] = y[:, None]
    image[..., 2] = COORDINATE_BLUE
    return image


def random_image(height: int, width: int, seed: int) -> np.ndarray:
    """Return a smooth random colour image with some detail, uint8 [height, width, 3].

    Three scales of noise, so that JPEG neither destroys it nor compresses it to nothing.
    """
    rng = np.random.default_rng([seed, height, width])
    total = np.zeros((height, width, 3), np.float32)
    for cells, weight in ((3, 0.6), (12, 0.3), (48, 0.1)):
        grid = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        layer = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)
        total += weight * np.asarray(layer, np.float32)
    return np.rint(total).astype(np.uint8)


def write_jpeg(path: Path, image: np.ndarray, quality: int = 90) -> None:
    """Write `image` (uint8, [H, W, 3] or [H, W]) as a JPEG, creating the folders above it.

    No chroma subsampling, so that colours keep their place to the pixel.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, "JPEG", quality=quality, subsampling=0)


def write_random_images(
    folder: Path,
    count: int,
    seed: int = 0,
    sizes: Sequence[tuple[int, int]] = ((96, 128), (128, 96), (120, 120)),
) -> list[Path]:
    """Write `count` JPEG files `000000.jpg, ...` into `folder` and return their paths.

    Image i has the (height, width) `sizes[i % len(sizes)]` and depends on (seed, i) alone.
    """
    paths = [folder / f"{index:06d}.jpg" for index in range(count)]
    for index, path in enumerate(paths):
        height, width = sizes[index % len(sizes)]
        write_jpeg(path, random_image(height, width, seed * 1_000_003 + index))
    return paths


def write_class_folders(
    root: Path,
    classes: int,
    per_class: int,
    seed: int = 0,
    size: tuple[int, int] = (96, 128),
) -> list[Path]:
    """Write `root/class_0/000.jpg, ...`, images whose class is the direction of their stripes.

    An ImageNet-like folder that is easy to classify: colour and phase vary, the angle does not.
    Returns the paths, class by class.
    """
    height, width = size
    y, x = np.mgrid[:height, :width].astype(np.float32)
    paths = []
    for label in range(classes):
        angle = np.pi * label / classes
        ramp = x * np.cos(angle) + y * np.sin(angle)
        for number in range(per_class):
            rng = np.random.default_rng([seed, label, number])
            wave = np.sin(ramp * (2 * np.pi / 12) + rng.uniform(0, 2 * np.pi))
            low, high = rng.uniform(0, 100, 3), rng.uniform(155, 255, 3)
            share = (wave[..., None] + 1) / 2
            image = np.rint(low + share * (high - low)).astype(np.uint8)
            paths.append(root / f"class_{label}" / f"{number:03d}.jpg")
            write_jpeg(paths[-1], image)
    return paths
