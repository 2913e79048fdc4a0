"""A class for every pixel, as data sets store it: index images, and what their numbers mean.

A label map is uint8 [height, width] with `VOID` where no class is given. Beyond 254 classes it is int16
with -1 there. The metrics count neither.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dense_ssl.evaluation.features import file_stamp, thinned
from dense_ssl.evaluation.omissions import Omissions, require_some
from dense_ssl.loaders import share_of_cores
from dense_ssl.pictures import open_image

VOID = 255
WIDE_VOID = -1  # of int16 maps, whose 255 is a class
MOST_CLASSES = 254  # that uint8 maps hold
_STRANGE = -2
_SLOW = 2000  # masks; from so many on, checking them shows its progress


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """One image and how to get its label map."""

    path: Path
    read_labels: Callable[[], np.ndarray]  # [H, W], uint8 with VOID or int16 with WIDE_VOID

    def __str__(self) -> str:
        return self.path.name


@dataclass(frozen=True, slots=True)
class Code:
    """What the numbers in a mask mean."""

    labels: Mapping[int, int]  # number -> class
    void: tuple[int, ...] = (VOID,)  # numbers of no class; any other is refused
    colours: bool = False  # the number is R + 256 G of a colour image


@dataclass(frozen=True, slots=True)
class Pair:
    """An image and the mask that goes with it."""

    image: Path
    mask: Path


def usable_images(
    pairs: Sequence[Pair],
    read: Callable[[Path], np.ndarray],
    split: str,
    where: str,
    limit: int | None,
    omitted: Omissions,
) -> tuple[tuple[LabelledImage, ...], list[str]]:
    """Return the images whose masks hold what they should, and a stamp of every file of theirs.

    At most `limit` of the pairs are looked at, evenly spaced; all their masks are decoded. What cannot be
    used is counted in `omitted`.

    Raises:
        UserError: nothing is left.
    """
    pairs = thinned(pairs, limit)
    with ThreadPoolExecutor(min(16, share_of_cores())) as pool:
        problems = list(
            tqdm(
                pool.map(partial(_problem, read=read), pairs),
                total=len(pairs),
                desc=f"{split}: masks",
                unit="img",
                leave=False,
                disable=None if len(pairs) >= _SLOW else True,
            )
        )
    images, stamps = [], []
    for pair, problem in zip(pairs, problems, strict=True):
        if problem:
            omitted.add(f"{split}: {problem}", pair.image.name)
            continue
        images.append(LabelledImage(pair.image, partial(read, pair.mask)))
        stamps += [file_stamp(pair.image), file_stamp(pair.mask)]
    require_some(images, where, omitted)
    return tuple(images), stamps


def read_mask(path: Path, classes: int, void: int) -> np.ndarray:
    """Return the label map in an index image (grey or palette), uint8 [H, W].

    `void` and 255 become VOID.

    Raises:
        ValueError: colours where an index is expected, or an index above the classes.
    """
    numbers = _numbers(path, colours=False)
    numbers[(numbers == void) | (numbers == VOID)] = VOID
    strange = numbers[(numbers != VOID) & ((numbers < 0) | (numbers >= classes))]
    if strange.size:
        raise ValueError(f"mask has class {strange.max()} of {classes}")
    return numbers.astype(np.uint8)


def read_coded(path: Path, code: Code) -> np.ndarray:
    """Return the label map in a mask whose numbers `code` explains, [H, W].

    Raises:
        ValueError: colours where an index is expected or the reverse, or a number the code does not have.
    """
    table = _table(code)
    numbers = _numbers(path, code.colours)
    outside = (numbers < 0) | (numbers >= len(table))
    labels = table[np.where(outside, 0, numbers)]
    labels[outside] = _STRANGE
    if (labels == _STRANGE).any():
        raise ValueError(
            f"mask has number {numbers[labels == _STRANGE].max()}, which means nothing"
        )
    if table.max() < MOST_CLASSES:
        return np.where(labels == WIDE_VOID, VOID, labels).astype(np.uint8)
    return labels.astype(np.int16)


def signed(labels: np.ndarray) -> np.ndarray:
    """Return a label map of either kind as int16 [H, W] with -1 where no class is given."""
    if labels.dtype == np.int16:
        return labels
    return np.where(labels == VOID, WIDE_VOID, labels.astype(np.int16)).astype(np.int16)


def _table(code: Code) -> np.ndarray:
    """The label of every number, int16; WIDE_VOID for no class, _STRANGE for numbers in between."""
    table = np.full(max(*code.labels, *code.void) + 1, _STRANGE, np.int16)
    table[list(code.labels)] = list(code.labels.values())
    table[list(code.void)] = WIDE_VOID
    return table


def _numbers(path: Path, colours: bool) -> np.ndarray:
    """The stored numbers, int64 [H, W]."""
    with open_image(path) as opened:
        if colours and opened.mode != "RGB":
            raise ValueError(f"mask is {opened.mode}, not R + 256 G of a colour image")
        if not colours and opened.mode not in ("L", "P", "I", "I;16", "1"):
            raise ValueError(f"mask is {opened.mode}, not one class index per pixel")
        if opened.format == "JPEG":
            raise ValueError("mask is a JPEG, whose indices are smeared")
        stored = np.array(opened).astype(np.int64)
    return stored[..., 0] + 256 * stored[..., 1] if colours else stored


def _problem(pair: Pair, read: Callable[[Path], np.ndarray]) -> str | None:
    """What keeps a pair from being used."""
    if not pair.image.is_file():
        return "image file missing"
    if not pair.mask.is_file():
        return "mask missing"
    try:
        with open_image(pair.image) as image:
            size = image.size
    except (OSError, ValueError):
        return "image header not readable"
    try:
        labels = read(pair.mask)
    except OSError:
        return "mask not readable"
    except ValueError as error:
        return str(error)
    if labels.shape != size[::-1]:
        return "mask of another size than its image"
    return "mask is void everywhere" if (signed(labels) == WIDE_VOID).all() else None
