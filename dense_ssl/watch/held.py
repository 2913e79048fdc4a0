"""The images that are looked at: chosen once, decoded once, held as they go into the network."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dense_ssl.augment import Photometry
from dense_ssl.config import UserError
from dense_ssl.evaluation.classification.data import open_classification, read_picture, shorter_side
from dense_ssl.evaluation.features import thinned
from dense_ssl.loaders.batch import assemble
from dense_ssl.loaders.folder import cut_one
from dense_ssl.loaders.source import ImageSource, decode
from dense_ssl.views import CropPlan, ViewSpec, draw_epoch
from dense_ssl.visualise.samples import shown

PAIR = "pair"
ASKED = 5  # every fifth labelled image is asked for, the others answer
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Two crops of each of n images, after photometry."""

    images: Tensor  # uint8 [2, n, 3, S, S]
    boxes: Tensor  # float32 [2, n, 4], fractions of the source images
    flipped: Tensor  # bool [2, n]


@dataclass(frozen=True, slots=True)
class Labelled:
    """Images with a class: some answer, the others are asked for."""

    bank: Tensor  # uint8 [m, 3, S, S]
    bank_labels: Tensor  # int64 [m]
    asked: Tensor  # uint8 [k, 3, S, S]
    asked_labels: Tensor  # int64 [k]
    classes: int


def pairs_of(source: ImageSource, count: int, size: int, seed: int) -> Pairs | None:
    """Return two crops of `count` evenly spaced images; None where none of them can be read.

    Crops are iBOT's for correspondence (40 to 100 % of the area), colours those of MoCo-v2. What cannot be
    read is left out: the loader, which meets the image too, names it.
    """
    view = ViewSpec(name=PAIR, count=2, size=size, scale=(0.4, 1.0), photometric="moco_v2")
    index = np.array(thinned(range(len(source.sizes)), count), np.int64)
    plan = draw_epoch((view,), source.sizes, seed, 0, index)
    kept, crops = [], []
    for row, number in enumerate(index.tolist()):
        try:
            picture = decode(source.read(number))
        except _UNREADABLE:
            continue
        drawn = zip(plan.boxes[row], plan.flipped[row], strict=True)
        crops.append(torch.stack([cut_one(picture, box, bool(flip), view) for box, flip in drawn]))
        kept.append(row)
    if not crops:
        return None
    part, index = CropPlan(plan.boxes[kept], plan.flipped[kept]), index[kept]
    images = {PAIR: torch.stack(crops, dim=1)}
    batch = assemble((view,), images, part, source.sizes[index], index, source.labels[index])
    seen = Photometry((view,), seed)(batch, 0).views[PAIR]
    pixels = torch.from_numpy(shown(seen.images)).movedim(-1, -3).contiguous()
    return Pairs(pixels, seen.boxes, seen.flipped)


def labelled_in(folder: Path, count: int, size: int) -> Labelled:
    """Return at most `count` labelled images of a folder: val/ is asked for, train/ answers.

    Raises:
        UserError: the folder holds neither class folders nor COCO's objects, or nothing readable.
    """
    try:
        data = open_classification(folder, (count - count // ASKED, count // ASKED), "watch")
    except UserError as error:
        raise UserError(f"watch.data: {error}") from None

    def read(position: int, split: Sequence, labels: Tensor) -> tuple[Tensor, int] | None:
        try:
            picture = read_picture(split[position], shorter_side(size), size)
        except _UNREADABLE:
            return None
        return picture, int(labels[position])

    halves = []
    for split in (data.train, data.val):
        rows = [read(i, split.pictures, split.labels) for i in range(len(split.pictures))]
        halves.append([row for row in rows if row is not None])
    if not all(halves):
        raise UserError(f"watch.data: {folder}: no image of train or of val can be read")
    return _labelled(halves[0], halves[1], len(data.classes))


def own_labels(source: ImageSource, count: int, size: int) -> Labelled | None:
    """Return at most `count` of the training images by their own labels; None where they have none.

    Every fifth is asked for. They are training images: a comparison over time, not a result.
    """
    with_label = np.flatnonzero(source.labels >= 0)
    if len(np.unique(source.labels[with_label])) < 2:
        return None
    view = ViewSpec(name="whole", count=1, size=size, scale=(1.0, 1.0))
    halves: tuple[list, list] = ([], [])
    for place, number in enumerate(thinned(with_label.tolist(), count)):
        try:
            picture = decode(source.read(number))
        except _UNREADABLE:
            continue
        side = min(picture.size) * 224 / 256
        left, top = ((length - side) / 2 for length in picture.size)
        box = np.array([left, top, left + side, top + side])
        row = (cut_one(picture, box, False, view), int(source.labels[number]))
        halves[place % ASKED == 0].append(row)
    if not all(halves):
        return None
    return _labelled(halves[0], halves[1], int(source.labels.max()) + 1)


def _labelled(bank: Sequence, asked: Sequence, classes: int) -> Labelled:
    (images, labels), (images_asked, labels_asked) = (
        (torch.stack([image for image, _ in rows]), torch.tensor([label for _, label in rows]))
        for rows in (bank, asked)
    )
    return Labelled(images, labels, images_asked, labels_asked, classes)
