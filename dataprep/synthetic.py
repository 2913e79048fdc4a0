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


def write_camvid_discs(
    root: Path, count: int, seed: int = 0, *, random_labels: bool = False
) -> None:
    """Write `count` training and validation images with label maps, in CamVid's layout.

    72 x 96 pixels with a red and a green disc on blue; the class of a pixel is its colour, and the
    last six rows are void (label 3). With `random_labels` the labels are of random 8 x 8 blocks.
    """
    rng = np.random.default_rng(seed)
    colours = np.array([[60, 60, 200], [200, 60, 60], [60, 200, 60]])
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("0 Sky\n1 Red disc\n2 Green disc\n3 Unlabelled\n")
    y, x = np.mgrid[:72, :96]
    for split in ("train", "val"):
        (root / f"{split}annot").mkdir(exist_ok=True)
        for number in range(count):
            labels = np.zeros((72, 96), np.uint8)
            for label in (1, 2):
                cx, cy = rng.uniform(15, 80), rng.uniform(15, 55)
                labels[np.hypot(x - cx, y - cy) < 14] = label
            image = np.clip(colours[labels] + rng.normal(0, 10, (72, 96, 3)), 0, 255)
            write_jpeg(root / split / f"{number:03d}.jpg", image.astype(np.uint8), quality=95)
            if random_labels:
                blocks = rng.integers(0, 3, (9, 12), dtype=np.uint8)
                labels = np.kron(blocks, np.ones((8, 8), np.uint8))
            labels[-6:] = 3
            Image.fromarray(labels).save(root / f"{split}annot" / f"{number:03d}.png")
