"""Images with a class per pixel: CamVid's and VOC's folders, or COCO's instances painted into a map.

A label map is uint8 [height, width] at the resolution of the annotation; `VOID` is counted nowhere.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dense_ssl.config import UserError
from dense_ssl.evaluation import coco
from dense_ssl.evaluation.features import content_key, file_stamp, thinned
from dense_ssl.evaluation.omissions import Omissions, require_some
from dense_ssl.loaders.source import SUFFIXES

PROTOCOL = "segment-linear/v1"
VOID = 255
VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair"),
    *("cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
_VOID_NAMES = frozenset({"void", "unlabelled", "unlabeled", "ignore"})


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """One image and how to get its label map."""

    path: Path
    read_labels: Callable[[], np.ndarray]  # uint8 [H, W], classes and VOID

    def __str__(self) -> str:
        return self.path.name


@dataclass(frozen=True, slots=True)
class SegmentData:
    """A training and a validation split with the same classes."""

    protocol: str
    classes: tuple[str, ...]
    train: tuple[LabelledImage, ...]
    val: tuple[LabelledImage, ...]
    content: str  # hash, other when a file or the choice of files is
    omitted: Omissions = field(compare=False)


def open_segmentation(
    root: Path,
    labels: Literal["category", "supercategory"],
    max_train: int | None,
    max_val: int | None,
) -> SegmentData:
    """Return the data at `root`, at most `max_train` and `max_val` images, evenly spaced.

    Raises:
        UserError: none of the layouts is there, or nothing in it is usable.
    """
    if coco.is_coco(root):
        return _open_coco(root, labels, (max_train, max_val))
    if (root / "trainannot").is_dir():
        return _open_camvid(root, (max_train, max_val))
    voc = _voc_home(root)
    if voc is not None:
        return _open_voc(voc, (max_train, max_val))
    raise UserError(
        f"{root}: neither COCO (annotations/instances_*.json) nor CamVid (train/, trainannot/, "
        "classes.txt) nor VOC (VOC2012/SegmentationClass, ImageSets/Segmentation) in it"
    )


def read_image(image: LabelledImage, height: int, width: int) -> Tensor:
    """Return uint8 [3, height, width], the whole image resized (bilinear, antialiased).

    Label maps belong to the stored pixels, so an orientation tag is not applied.
    """
    with Image.open(io.BytesIO(image.path.read_bytes())) as opened:
        resized = opened.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def semantic_map(image: coco.AnnotatedImage, numbers: dict[int, int]) -> np.ndarray:
    """Return the label map of an image's instances, uint8 [H, W]; 0 is background.

    Crowds are VOID; then the largest instance first, so that smaller ones lie on top. `numbers` maps
    COCO's category ids to labels.
    """
    labels = np.zeros((image.height, image.width), np.uint8)
    layers = [
        (coco.decode_mask(instance.segmentation, image.height, image.width), instance)
        for instance in image.instances
    ]
    for mask, instance in sorted(layers, key=lambda layer: (not layer[1].crowd, -layer[0].sum())):
        labels[mask] = VOID if instance.crowd else numbers[instance.category]
    return labels


def read_mask(path: Path, classes: int, void: int) -> np.ndarray:
    """Return the label map in an index image (grey or palette), uint8 [H, W].

    `void` and 255 become VOID.

    Raises:
        ValueError: colours where an index is expected, or an index above the classes.
    """
    with Image.open(path) as opened:
        if opened.mode not in ("L", "P", "I", "I;16", "1"):
            raise ValueError(f"mask is {opened.mode}, not one class index per pixel")
        if opened.format == "JPEG":
            raise ValueError("mask is a JPEG, whose indices are smeared")
        indices = np.array(opened).astype(np.int64)
    indices[(indices == void) | (indices == VOID)] = VOID
    strange = indices[(indices != VOID) & ((indices < 0) | (indices >= classes))]
    if strange.size:
        raise ValueError(f"mask has class {strange.max()} of {classes}")
    return indices.astype(np.uint8)


def _open_coco(
    root: Path, labels: Literal["category", "supercategory"], limits: tuple[int | None, int | None]
) -> SegmentData:
    omitted = Omissions()
    parts: list[tuple[LabelledImage, ...]] = []
    content: list[str] = [labels]
    first: dict[int, tuple[str, str]] = {}
    names: list[str] = []
    for part, limit in zip(("train", "val"), limits):
        name = coco.split_name(root, part)
        split = coco.read_split(root, name, omitted)
        if not first:
            first = split.categories
            which = 0 if labels == "category" else 1
            names = list(dict.fromkeys(entry[which] for entry in first.values()))
            if len(names) + 1 >= VOID:
                raise UserError(f"{root}: {len(names)} categories; label maps hold {VOID - 1}")
        elif split.categories != first:
            raise UserError(f"{root}/annotations: the splits have different categories")
        numbers = {
            identity: names.index(entry[0 if labels == "category" else 1]) + 1
            for identity, entry in first.items()
        }
        images = [
            LabelledImage(image.path, partial(semantic_map, image, numbers))
            for image in thinned(split.images, limit)
        ]
        require_some(images, f"{root} ({name})", omitted)
        content.append(file_stamp(root / "annotations" / f"instances_{name}.json"))
        content += [file_stamp(image.path) for image in images]
        parts.append(tuple(images))
    return SegmentData(
        PROTOCOL, ("background", *names), parts[0], parts[1], content_key(*content), omitted
    )


def _open_camvid(root: Path, limits: tuple[int | None, int | None]) -> SegmentData:
    names = _class_names(root / "classes.txt")
    void = next((i for i, name in enumerate(names) if name.lower() in _VOID_NAMES), VOID)
    classes = [name for i, name in enumerate(names) if i != void]
    if void not in (VOID, len(classes)):
        raise UserError(f"{root}/classes.txt: the void class must be the last one, not {void}")
    omitted = Omissions()
    parts: list[tuple[LabelledImage, ...]] = []
    content: list[str] = []
    for split, limit in zip(("train", "val"), limits):
        images = []
        for path in sorted((root / split).glob("*")):
            if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
                continue
            mask = root / f"{split}annot" / f"{path.stem}.png"
            problem = _mask_problem(path, mask, len(classes), void)
            if problem:
                omitted.add(f"{split}: {problem}", path.name)
                continue
            images.append(LabelledImage(path, partial(read_mask, mask, len(classes), void)))
            content += [file_stamp(path), file_stamp(mask)]
        require_some(images, str(root / split), omitted)
        parts.append(thinned(tuple(images), limit))
    return SegmentData(PROTOCOL, tuple(classes), parts[0], parts[1], content_key(*content), omitted)


def _voc_home(root: Path) -> Path | None:
    """The folder of VOC2012, else VOC2007: `root` is VOCdevkit, the folder around it, or itself."""
    for year in ("VOC2012", "VOC2007"):
        for home in (root / "VOCdevkit" / year, root / year, root):
            if home.name == year and (home / "SegmentationClass").is_dir():
                return home
    return None


def _open_voc(home: Path, limits: tuple[int | None, int | None]) -> SegmentData:
    omitted = Omissions()
    parts: list[tuple[LabelledImage, ...]] = []
    content: list[str] = []
    classes = len(VOC_CLASSES)
    for split, limit in zip(("train", "val"), limits):
        listing = home / "ImageSets" / "Segmentation" / f"{split}.txt"
        try:
            names = listing.read_text().split()
        except OSError as error:
            raise UserError(f"{listing}: cannot be read: {error.strerror}") from None
        images = []
        for name in names:
            path = home / "JPEGImages" / f"{name}.jpg"
            mask = home / "SegmentationClass" / f"{name}.png"
            missing = None if path.is_file() else "image file missing"
            problem = missing or _mask_problem(path, mask, classes, VOID)
            if problem:
                omitted.add(f"{split}: {problem}", path.name)
                continue
            images.append(LabelledImage(path, partial(read_mask, mask, classes, VOID)))
            content += [file_stamp(path), file_stamp(mask)]
        require_some(images, f"{home} ({split})", omitted)
        parts.append(thinned(tuple(images), limit))
    return SegmentData(PROTOCOL, VOC_CLASSES, parts[0], parts[1], content_key(*content), omitted)


def _class_names(path: Path) -> list[str]:
    """Names from lines `INDEX NAME`, which must count from 0."""
    try:
        lines = [line.split(maxsplit=1) for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; it names the classes") from None
    if [line[0] for line in lines] != [str(i) for i in range(len(lines))] or not lines:
        raise UserError(f"{path}: expected a line `INDEX NAME` per class, counting from 0")
    return [line[-1].strip() for line in lines]


def _mask_problem(path: Path, mask: Path, classes: int, void: int) -> str | None:
    if not mask.is_file():
        return "mask missing"
    try:
        with Image.open(path) as image:
            size = image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return "image header not readable"
    try:
        labels = read_mask(mask, classes, void)
    except (OSError, SyntaxError):
        return "mask not readable"
    except ValueError as error:
        return str(error)
    if labels.shape != size[::-1]:
        return "mask of another size than its image"
    return "mask is void everywhere" if (labels == VOID).all() else None
