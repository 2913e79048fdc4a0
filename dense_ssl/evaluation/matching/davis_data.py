"""DAVIS-2017 as it is distributed: frames, an object mask for each, and lists of sequences.

    JPEGImages/480p/SEQUENCE/00000.jpg   Annotations/480p/SEQUENCE/00000.png   ImageSets/2017/val.txt

A mask is an index image, grey or palette, of object numbers; 0 is the background and 255, which the
official evaluation counts as background too, belongs to nobody. Masks of 0 and 255 alone are those of
DAVIS-2016: there 255 is the one object.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dense_ssl.config import UserError
from dense_ssl.evaluation.features import content_key, file_stamp
from dense_ssl.evaluation.omissions import Omissions, require_some
from dense_ssl.pictures import open_image

_VOID = 255
_FEWEST = 3  # frames: the first is given and the last is not scored


@dataclass(frozen=True, slots=True)
class Video:
    """One sequence with a mask for every frame."""

    name: str
    frames: tuple[Path, ...]
    masks: tuple[Path, ...]
    objects: tuple[int, ...]  # numbers in the first mask, ascending
    size: tuple[int, int]  # height, width of frames and masks in pixels
    binary: bool  # masks of 0 and 255: one object

    def truth(self, number: int) -> np.ndarray:
        """Return the object numbers of a frame, uint8 [H, W].

        Raises:
            OSError, ValueError, SyntaxError: the mask cannot be read, or has another size.
        """
        mask = _index_image(self.masks[number])
        if mask.shape != self.size:
            raise ValueError(
                f"{self.masks[number].name}: mask of another size than the first frame"
            )
        return _numbers(mask, self.binary)


@dataclass(frozen=True, slots=True)
class DavisData:
    """The sequences of a split."""

    protocol: str
    videos: tuple[Video, ...]
    content: str  # hash, other when a file or the choice of files is
    omitted: Omissions = field(compare=False)


def open_davis(root: Path, split: str, resolution: str, protocol: str) -> DavisData:
    """Return the sequences listed in `ImageSets/2017/{split}.txt`; the unusable are left out and named.

    Raises:
        UserError: the layout is another, or no sequence is usable.
    """
    listing = root / "ImageSets" / "2017" / f"{split}.txt"
    try:
        names = [line.strip() for line in listing.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise UserError(
            f"{listing}: cannot be read: {error.strerror}; it lists the sequences, as DAVIS-2017 does"
        ) from None
    images, masks = (root / kind / resolution for kind in ("JPEGImages", "Annotations"))
    for folder in (images, masks):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; DAVIS-2017 at 480p has one")
    omitted = Omissions()
    videos: list[Video] = []
    stamps: list[str] = []
    for name in dict.fromkeys(names):
        try:
            video = _open_video(name, images / name, masks / name)
        except (OSError, ValueError, SyntaxError) as error:
            omitted.add(f"{split}: sequence not usable", f"{name}: {error}")
            continue
        videos.append(video)
        stamps += [file_stamp(path) for path in (*video.frames, *video.masks)]
    require_some(videos, str(root), omitted)
    return DavisData(protocol, tuple(videos), content_key(*stamps), omitted)


def read_frame(path: Path, size: tuple[int, int]) -> Tensor:
    """Return a frame, uint8 [3, H, W].

    Raises:
        OSError, ValueError, SyntaxError: it cannot be read, or is not of `size` (height, width).
    """
    with open_image(path) as opened:
        pixels = np.array(opened.convert("RGB"))
    if pixels.shape[:2] != size:
        raise ValueError(f"{path.name}: frame of another size than the first one")
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _open_video(name: str, images: Path, masks: Path) -> Video:
    """Return a sequence; ValueError with the reason where it cannot be evaluated."""
    frames = sorted(path for path in images.glob("*.jpg") if not path.name.startswith("."))
    if len(frames) < _FEWEST:
        raise ValueError(f"{len(frames)} frames, at least {_FEWEST} are needed")
    annotations = tuple(masks / f"{frame.stem}.png" for frame in frames)
    missing = [path.name for path in annotations if not path.is_file()]
    if missing:
        raise ValueError(f"{len(missing)} of {len(frames)} masks missing, the first {missing[0]}")
    first = _index_image(annotations[0])
    with open_image(frames[0]) as opened:
        size = (opened.height, opened.width)
    if first.shape != size:
        raise ValueError("mask of another size than its frame")
    values = set(np.unique(first).tolist())
    binary = values <= {0, _VOID} and _VOID in values
    objects = np.unique(_numbers(first, binary))
    present = tuple(int(number) for number in objects if number)
    if not present:
        raise ValueError("no object in the first mask")
    return Video(name, tuple(frames), annotations, present, size, binary)


def _index_image(path: Path) -> np.ndarray:
    with open_image(path) as opened:
        if opened.mode not in ("L", "P", "1"):
            raise ValueError(f"{path.name}: mask is {opened.mode}, not one object number per pixel")
        binary = opened.mode == "1"
        mask = np.array(opened, np.uint8)
    return mask * _VOID if binary else mask


def _numbers(mask: np.ndarray, binary: bool) -> np.ndarray:
    """Object numbers of an index image: 255 is object 1 of a binary mask, otherwise nobody's."""
    return np.where(mask == _VOID, np.uint8(binary), mask)
