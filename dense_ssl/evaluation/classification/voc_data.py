"""PASCAL VOC's image-level labels: `ImageSets/Main/CLASS_SPLIT.txt` beside `JPEGImages`.

A line is `IMAGE LABEL` with 1 (present), 0 (present, but every object of the class is difficult) and
-1 (absent). Classes are in alphabetical order.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dense_ssl.config import UserError
from dense_ssl.evaluation.classification.data import Picture
from dense_ssl.evaluation.features import content_key, file_stamp
from dense_ssl.evaluation.omissions import Omissions, require_some

PRESENT, DIFFICULT, ABSENT = 1, 0, -1


@dataclass(frozen=True, slots=True)
class VocSplit:
    """Images and what they show."""

    pictures: tuple[Picture, ...]
    labels: Tensor  # int8 [n, C] of PRESENT, DIFFICULT, ABSENT


@dataclass(frozen=True, slots=True)
class VocData:
    """A training and a test split with the same classes."""

    protocol: str
    classes: tuple[str, ...]
    train: VocSplit
    test: VocSplit
    content: str  # hash, other when a file or a label is
    omitted: Omissions = field(compare=False)


def open_voc(root: Path, year: str, train: str, test: str, protocol: str) -> VocData:
    """Return two splits of VOC; `root` is VOCdevkit, the folder around it, or VOC2007 itself.

    Raises:
        UserError: the layout is not there, a list is malformed, or no image of a split exists.
    """
    home = _home(root, year)
    omitted = Omissions()
    classes = _classes(home, train)
    parts = []
    for split in (train, test):
        names, labels = _labels(home, split, classes)
        paths = [home / "JPEGImages" / f"{name}.jpg" for name in names]
        there = [path.is_file() for path in paths]
        for path, found in zip(paths, there):
            if not found:
                omitted.add(f"{split}: image file missing", path.name)
        pictures = tuple(Picture(path) for path, found in zip(paths, there) if found)
        require_some(pictures, f"{home} ({split})", omitted)
        parts.append(VocSplit(pictures, labels[torch.tensor(there, dtype=torch.bool)]))
    content = content_key(
        *(file_stamp(picture.path) for part in parts for picture in part.pictures),
        *(part.labels.tolist() for part in parts),
    )
    return VocData(protocol, classes, parts[0], parts[1], content, omitted)


def _home(root: Path, year: str) -> Path:
    """The folder that holds JPEGImages and ImageSets of a year."""
    name = f"VOC{year}"
    places = [root / "VOCdevkit" / name, root / name]
    places += [root] if root.name == name else []
    for place in places:
        if (place / "ImageSets" / "Main").is_dir() and (place / "JPEGImages").is_dir():
            return place
    raise UserError(
        f"{root}: no {name}/ImageSets/Main and {name}/JPEGImages in it; give the folder VOCdevkit "
        "(year=2012 for VOC2012)"
    )


def _classes(home: Path, split: str) -> tuple[str, ...]:
    suffix = f"_{split}.txt"
    found = sorted(
        path.name.removesuffix(suffix) for path in (home / "ImageSets/Main").glob(f"*{suffix}")
    )
    if not found:
        raise UserError(f"{home}/ImageSets/Main: no CLASS{suffix} in it; is the split called so?")
    return tuple(found)


def _labels(home: Path, split: str, classes: tuple[str, ...]) -> tuple[list[str], Tensor]:
    """Image names of a split, and labels int8 [n, C]."""
    names: list[str] = []
    columns = []
    for number, name in enumerate(classes):
        path = home / "ImageSets" / "Main" / f"{name}_{split}.txt"
        images, labels = _read_list(path)
        if number and images != names:
            raise UserError(f"{path}: lists other images than {classes[0]}_{split}.txt")
        names = images
        columns.append(labels)
    return names, torch.tensor(columns, dtype=torch.int8).T.contiguous()


def _read_list(path: Path) -> tuple[list[str], list[int]]:
    try:
        lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if len(line) != 2 or line[1] not in ("1", "0", "-1"):
            raise UserError(f"{path}, line {number}: expected `IMAGE LABEL` with -1, 0 or 1")
    return [line[0] for line in lines], [int(line[1]) for line in lines]
