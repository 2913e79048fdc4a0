"""Images with one label each: class folders, small sets in their own files (archives.py), COCO's objects."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dense_ssl.config import UserError
from dense_ssl.evaluation import coco
from dense_ssl.evaluation.choices import Filter
from dense_ssl.evaluation.classification.archives import (
    find_archive,
    stored_image,
    stored_size,
)
from dense_ssl.evaluation.features import content_key, file_stamp, thinned
from dense_ssl.evaluation.omissions import Omissions, require_some
from dense_ssl.loaders.source import SUFFIXES, decode, upright_size
from dense_ssl.pictures import open_image

SPLITS = ("train", "val")
MIN_OBJECT_PX = 32  # shorter side of a box that is worth recognising
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True, slots=True)
class Picture:
    """One image, the part of one that a box (x, y, width, height in pixels) frames, or a row of a file."""

    path: Path
    box: tuple[float, float, float, float] | None = None
    row: int | None = None

    def __str__(self) -> str:
        if self.row is not None:
            return f"{self.path.name}[{self.row}]"
        return self.path.name if self.box is None else f"{self.path.name}{list(self.box)}"


@dataclass(frozen=True, slots=True)
class LabelledPictures:
    """One split."""

    pictures: tuple[Picture, ...]
    labels: Tensor  # int64 [n]

    def subset(self, chosen: Tensor) -> "LabelledPictures":
        """Return the pictures where `chosen`, bool [n], is true."""
        pictures = tuple(p for p, keep in zip(self.pictures, chosen.tolist(), strict=True) if keep)
        return LabelledPictures(pictures, self.labels[chosen])


@dataclass(frozen=True, slots=True)
class ClassifyData:
    """A training and a validation split with the same classes."""

    protocol: str
    classes: tuple[str, ...]
    train: LabelledPictures
    val: LabelledPictures
    content: str  # hash, other when a file or the choice of files is
    omitted: Omissions = field(compare=False)


def open_classification(
    root: Path, limits: tuple[int | None, int | None], task: str
) -> ClassifyData:
    """Return the data at `root`: COCO's objects (`TASK-objects/v1`), else whole images (`TASK/v1`).

    Those are in class folders, or in the files of a small data set. `limits` are for train and val: at most
    so many images, evenly spaced.

    Raises:
        UserError: it is neither, or nothing in it is usable.
    """
    if coco.is_coco(root):
        return open_coco_objects(root, limits, f"{task}-objects/v1")
    omitted = Omissions()
    archive = find_archive(root, omitted)
    if archive is None:
        return open_class_folders(root, limits, f"{task}/v1")
    parts = []
    for name, entries, limit in zip(SPLITS, (archive.train, archive.val), limits):
        require_some(entries, f"{root} ({name})", omitted)
        labelled = [(Picture(path, row=row), label) for path, row, label in thinned(entries, limit)]
        parts.append(_split(labelled))
    return _data(f"{task}/v1", archive.classes, parts, omitted)


def open_class_folders(
    root: Path, limits: tuple[int | None, int | None], protocol: str
) -> ClassifyData:
    """Return the images of `root/train/CLASS/*` and `root/val/CLASS/*`; `limits` as above.

    Raises:
        UserError: a split is missing or empty, or val has a class that train has not.
    """
    omitted = Omissions()
    classes: list[str] = []
    parts: list[LabelledPictures] = []
    for split, limit in zip(SPLITS, limits):
        folder = root / split
        if not folder.is_dir():
            raise UserError(
                f"{root}: no folder {split}/ in it; classification reads train/CLASS/* and "
                "val/CLASS/*, CIFAR, Flowers, Cars and iNaturalist in their own files, or COCO's "
                "annotations/instances_*.json"
            )
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        classes = classes or names
        strangers = sorted(set(names) - set(classes))
        if strangers:
            raise UserError(f"{folder}: classes that train has not: {', '.join(strangers[:5])}")
        labelled: list[tuple[Picture, int]] = []
        for name in names:
            paths = _images_below(folder / name)
            if not paths:
                omitted.add(f"{split}: class folder without images", name)
            labelled += [(Picture(path), classes.index(name)) for path in paths]
        require_some(labelled, str(folder), omitted)
        parts.append(_split(thinned(labelled, limit)))
    return _data(protocol, tuple(classes), parts, omitted)


def open_coco_objects(
    root: Path, limits: tuple[int | None, int | None], protocol: str
) -> ClassifyData:
    """Return the objects of a COCO data set, each framed by its box.

    Crowds and boxes with a side below `MIN_OBJECT_PX` are not part of it. `limits` as above.

    Raises:
        UserError: the annotations are missing or unreadable, or no object is left.
    """
    omitted = Omissions()
    identities: list[int] = []
    classes: tuple[str, ...] = ()
    parts: list[LabelledPictures] = []
    for part, limit in zip(SPLITS, limits):
        name = coco.split_name(root, part)
        split = coco.read_split(root, name, omitted)
        if not identities:
            identities = list(split.categories)
            classes = tuple(entry[0] for entry in split.categories.values())
        elif list(split.categories) != identities:
            raise UserError(f"{root}/annotations: the splits have different categories")
        framed = [
            (Picture(image.path, instance.box), identities.index(instance.category))
            for image in split.images
            for instance in image.instances
            if not instance.crowd and min(instance.box[2:]) >= MIN_OBJECT_PX
        ]
        require_some(framed, f"{root} ({name})", omitted)
        parts.append(_split(thinned(framed, limit)))
    return _data(protocol, classes, parts, omitted)


def shorter_side(size: int) -> int:
    """Return what the shorter side is resized to before a centre crop of `size`: 256 for 224."""
    return round(size * 256 / 224)


def read_picture(
    picture: Picture, resize: int, size: int, resampling: Filter = "bilinear"
) -> Tensor:
    """Return uint8 [3, size, size]: the shorter side resized to `resize`, then the centre.

    A framed object is cut as the square around its box, pushed back into the image, and resized to
    `size` whole.
    """
    image, window = open_picture(picture)
    if picture.box is None:
        scale = resize / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), FILTERS[resampling])
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    else:
        image = image.resize((size, size), FILTERS[resampling], box=window)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def open_picture(
    picture: Picture,
) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """Return the decoded image and the window of it that is the picture: left, top, right, bottom.

    A whole image is upright. A box is drawn on the stored pixels, so there no orientation applies.

    Raises:
        OSError, ValueError, SyntaxError: the file cannot be read.
    """
    if picture.row is not None:
        image = stored_image(picture.path, picture.row)
        return image, (0, 0, *image.size)
    if picture.box is None:
        image = decode(picture.path.read_bytes())
        return image, (0, 0, *image.size)
    with open_image(picture.path) as opened:
        image = opened.convert("RGB")
    return image, _square(picture.box, *image.size)


def picture_size(picture: Picture) -> tuple[int, int] | None:
    """Return height and width of the window `open_picture` will give, rounded down, from the header alone.

    None where the header cannot be read.
    """
    if picture.row is not None:
        return stored_size()
    size = upright_size(picture.path)
    if picture.box is None or size is None:
        return size
    with open_image(picture.path) as opened:
        left, top, right, bottom = _square(picture.box, *opened.size)
    return int(bottom - top), int(right - left)


def held_out(labels: Tensor, share: float, seed: int) -> Tensor:
    """Return which samples of a training set are kept apart to choose by, bool [n].

    About `share` of every class, drawn by `seed`, and never the last one of a class: a class with
    fewer than 1 / share / 2 images gives none.
    """
    generator = torch.Generator().manual_seed(seed)
    apart = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        count = min(round(share * len(members)), len(members) - 1)
        apart[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return apart


def _split(labelled: Sequence[tuple[Picture, int]]) -> LabelledPictures:
    labels = torch.tensor([label for _, label in labelled])
    return LabelledPictures(tuple(picture for picture, _ in labelled), labels)


def _data(
    protocol: str, classes: tuple[str, ...], parts: list[LabelledPictures], omitted: Omissions
) -> ClassifyData:
    stamps = {path: file_stamp(path) for part in parts for path in {p.path for p in part.pictures}}
    content = content_key(
        *((stamps[p.path], p.box, p.row) for part in parts for p in part.pictures),
        *(part.labels.tolist() for part in parts),
    )
    return ClassifyData(protocol, classes, parts[0], parts[1], content, omitted)


def _square(
    box: tuple[float, float, float, float], width: int, height: int
) -> tuple[float, float, float, float]:
    """The square around a box, no larger than the image and pushed inside: left, top, right, bottom."""
    x, y, w, h = box
    side = min(max(w, h), width, height)
    left = min(max(x + w / 2 - side / 2, 0), width - side)
    top = min(max(y + h / 2 - side / 2, 0), height - side)
    return left, top, left + side, top + side


def _images_below(folder: Path) -> list[Path]:
    return [
        Path(where, name)
        for where, folders, names in os.walk(folder)
        for name in sorted(names)
        if folders.sort() is None  # os.walk descends in the order left in this list
        if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
    ]
