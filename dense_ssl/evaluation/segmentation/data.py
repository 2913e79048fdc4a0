"""Images with a class per pixel: a training and a validation split of one data set.

`segment_layouts` lists the folders that are understood; besides, COCO's instances are painted into a map.
"""

from collections.abc import Sequence
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
from dense_ssl.evaluation.label_maps import (
    MOST_CLASSES,
    VOID,
    LabelledImage,
    read_mask,
    usable_images,
)
from dense_ssl.evaluation.omissions import Omissions, require_some
from dense_ssl.evaluation.segmentation.layouts import Layout, find_coco_stuff, find_layout
from dense_ssl.pictures import open_image

__all__ = [
    "VOID", "LabelledImage", "Labels", "SegmentData", "open_segmentation", "read_image", "read_labels",
    "read_mask", "semantic_map",
]  # fmt: skip

PROTOCOL = "segment-linear/v1"
SPLITS = ("train", "val")
Labels = Literal["category", "supercategory", "stuff"]  # of COCO: its instances, or its pixel maps


@dataclass(frozen=True, slots=True)
class SegmentData:
    """A training and a validation split with the same classes."""

    protocol: str
    classes: tuple[str, ...]
    train: tuple[LabelledImage, ...]
    val: tuple[LabelledImage, ...]
    content: str  # hash, other when a file or the choice of files is
    omitted: Omissions = field(compare=False)
    layout: str  # as `segment_layouts` calls it, or coco


def open_segmentation(
    root: Path,
    labels: Labels,
    max_train: int | None,
    max_val: int | None,
    train_split: str | None = None,
    most_classes: int = MOST_CLASSES,
    splits: Sequence[str] = SPLITS,
) -> SegmentData:
    """Return the data at `root`, at most `max_train` and `max_val` images, evenly spaced.

    train_split: of VOC, `train` or `trainaug`; None takes the larger one that is there.
    splits: those that are needed; the other one stays empty, and nothing of it is opened.

    Raises:
        UserError: none of the layouts is there, nothing in it is usable, or it has too many classes.
    """
    limits = (max_train, max_val)
    if labels != "stuff" and coco.is_coco(root):
        return _open_coco(root, labels, limits, splits)
    found = find_layout(root, train_split) or find_coco_stuff(root)
    if found is None:
        raise UserError(
            f"{root}: neither COCO (annotations/instances_*.json) nor CamVid (train/, trainannot/, "
            "classes.txt) nor VOC (VOC2012/SegmentationClass, ImageSets/Segmentation) nor Cityscapes "
            "(leftImg8bit/, gtFine/) nor ADE20K (images/, annotations/training) nor ImageNet-S "
            "(train-semi/, train-semi-segmentation/) nor COCO-stuff (stuffthingmaps/) in it"
        )
    if len(found.classes) > most_classes:
        raise UserError(
            f"{root}: {len(found.classes)} classes; this task takes {most_classes} at most"
        )
    return _opened(root, found, limits, splits)


def _opened(
    root: Path, found: Layout, limits: tuple[int | None, int | None], splits: Sequence[str]
) -> SegmentData:
    omitted = Omissions()
    parts: list[tuple[LabelledImage, ...]] = []
    content = [found.name, *found.classes]
    for split, pairs, limit in zip(SPLITS, (found.train, found.val), limits):
        if split not in splits:
            parts.append(())
            continue
        images, stamps = usable_images(
            pairs, found.read, split, f"{root} ({split})", limit, omitted
        )
        parts.append(images)
        content += stamps
    return SegmentData(
        PROTOCOL, found.classes, parts[0], parts[1], content_key(*content), omitted, found.name
    )


def read_image(image: LabelledImage, height: int, width: int) -> Tensor:
    """Return uint8 [3, height, width], the whole image resized (bilinear, antialiased).

    Label maps belong to the stored pixels, so an orientation tag is not applied.
    """
    with open_image(image.path) as opened:
        resized = opened.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def read_labels(image: LabelledImage, height: int, width: int) -> np.ndarray:
    """Return the label map resized by nearest neighbour, [height, width]."""
    stored = Image.fromarray(image.read_labels())
    return np.array(stored.resize((width, height), Image.Resampling.NEAREST))


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


def _open_coco(
    root: Path, labels: Labels, limits: tuple[int | None, int | None], splits: Sequence[str]
) -> SegmentData:
    omitted = Omissions()
    parts: list[tuple[LabelledImage, ...]] = []
    content: list[str] = [labels]
    first: dict[int, tuple[str, str]] = {}
    names: list[str] = []
    for part, limit in zip(SPLITS, limits):
        if part not in splits:
            parts.append(())
            continue
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
        PROTOCOL, ("background", *names), parts[0], parts[1], content_key(*content), omitted, "coco"
    )
