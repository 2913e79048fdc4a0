"""COCO instance annotations: read with every defect counted, and turned into masks.

A pixel belongs to a polygon when its centre lies inside (even-odd rule); pixel (0, 0) spans 0..1. The
run-length format is COCO's own, column by column, as text or as a list.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from dataprep import plain_json
from dense_ssl.config import UserError
from dense_ssl.evaluation.omissions import Omissions
from dense_ssl.pictures import open_image

_FARTHEST = 1e7  # pixels, of a polygon's points: beyond, slopes have no digits left
Polygons: TypeAlias = list[list[float]]
Rle: TypeAlias = dict[str, Any]  # {"size": [height, width], "counts": str or list of int}


@dataclass(frozen=True, slots=True)
class Instance:
    """One annotated object."""

    category: int  # COCO's id
    segmentation: Polygons | Rle
    box: tuple[float, float, float, float]  # x, y, width, height in pixels
    crowd: bool
    area: float | None = None  # in pixels, as the file says it; None: it does not


@dataclass(frozen=True, slots=True)
class AnnotatedImage:
    """One image with its objects."""

    path: Path
    height: int
    width: int
    instances: tuple[Instance, ...]


@dataclass(frozen=True, slots=True)
class CocoSplit:
    """All usable images of one split."""

    images: tuple[AnnotatedImage, ...]
    categories: dict[int, tuple[str, str]]  # id -> (name, supercategory), in the file's order


def is_coco(root: Path) -> bool:
    """Return whether `root` has COCO's layout."""
    return bool(list((root / "annotations").glob("instances_*.json")))


def split_name(root: Path, part: str) -> str:
    """Return the name of the newest split of a part: "train" -> "train2017".

    Raises:
        UserError: there is none.
    """
    found = sorted((root / "annotations").glob(f"instances_{part}*.json"))
    if not found:
        raise UserError(f"{root}/annotations: no instances_{part}*.json, which this task needs")
    return found[-1].stem.removeprefix("instances_")


def read_split(root: Path, split: str, omitted: Omissions) -> CocoSplit:
    """Return the images and objects of `annotations/instances_{split}.json`, without the defective.

    What is left out (an image without its file, a box of no size, a reference to nothing, ...) is
    counted in `omitted`.

    Raises:
        UserError: the file is missing, no JSON, or not of this format.
    """
    path = root / "annotations" / f"instances_{split}.json"
    data = _read_json(path)
    try:
        return _collect(data, root, split, omitted)
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(
            f"{path}: an entry lacks or garbles {error}; fetch the file again"
        ) from None


def decode_mask(segmentation: Polygons | Rle, height: int, width: int) -> np.ndarray:
    """Return the mask of one object, bool [height, width].

    Raises:
        ValueError: run lengths of another image size.
    """
    if isinstance(segmentation, dict):
        return decode_rle(segmentation, height, width)
    mask = np.zeros((height, width), bool)
    for polygon in segmentation:
        fill_polygon(mask, polygon)
    return mask


def fill_polygon(mask: np.ndarray, polygon: Sequence[float]) -> None:
    """Set the pixels of `mask` (bool [H, W]) whose centres lie inside `[x0, y0, x1, y1, ...]`."""
    height, width = mask.shape
    x0, y0 = np.array(polygon[::2], float), np.array(polygon[1::2], float)
    top = max(math.floor(y0.min()), 0)
    bottom = min(math.ceil(y0.max()), height)
    if top >= bottom:
        return
    x1, y1 = np.roll(x0, -1), np.roll(y0, -1)
    centre = np.arange(top, bottom)[:, None] + 0.5  # [rows, 1] against [edges]
    row, edge = np.nonzero((y0 <= centre) != (y1 <= centre))
    slope = (x1[edge] - x0[edge]) / (y1[edge] - y0[edge])
    crossing = x0[edge] + (centre[row, 0] - y0[edge]) * slope
    first_right = np.clip(np.ceil(crossing - 0.5), 0, width).astype(np.intp)
    toggles = np.zeros((bottom - top, width + 1), np.int32)
    np.add.at(toggles, (row, first_right), 1)
    mask[top:bottom] |= (np.cumsum(toggles, axis=1)[:, :width] & 1).astype(bool)


def decode_rle(rle: Rle, height: int, width: int) -> np.ndarray:
    """Return a mask from run lengths, compressed text or plain list; bool [height, width].

    Raises:
        ValueError: the runs do not make an image of this size.
    """
    counts = rle["counts"]
    runs = np.array(_read_counts(counts) if isinstance(counts, str) else counts, np.int64)
    fits = runs.ndim == 1 and ((runs >= 0) & (runs <= height * width)).all()
    if not fits or list(rle["size"]) != [height, width] or runs.sum() != height * width:
        raise ValueError(f"run lengths of size {rle['size']} in an image of {[height, width]}")
    values = np.arange(len(runs)) % 2 == 1  # zeros first
    return np.repeat(values, runs).reshape(width, height).T


def _collect(data: dict[str, Any], root: Path, split: str, omitted: Omissions) -> CocoSplit:
    categories = {
        int(entry["id"]): (str(entry["name"]), str(entry.get("supercategory", entry["name"])))
        for entry in data["categories"]
    }
    sizes: dict[int, tuple[Path, int, int]] = {}
    for entry in data["images"]:
        name, identity = str(entry["file_name"]), int(entry["id"])
        path = root / split / name
        if identity in sizes:
            omitted.add(f"{split}: image listed twice", name)
        elif (problem := _image_problem(path, entry)) is not None:
            omitted.add(f"{split}: {problem}", name)
        else:
            sizes[identity] = (path, int(entry["height"]), int(entry["width"]))
    known = {int(entry["id"]) for entry in data["images"]}
    instances: dict[int, list[Instance]] = {identity: [] for identity in sizes}
    seen: set[int] = set()
    for entry in data["annotations"]:
        identity, image = int(entry["id"]), int(entry["image_id"])
        if image not in sizes:
            if image not in known:
                omitted.add(f"{split}: annotation of an unknown image", str(identity))
            continue
        _, height, width = sizes[image]
        problem = _instance_problem(entry, height, width, categories)
        if identity in seen:
            problem = "annotation id used twice"
        seen.add(identity)
        if problem:
            omitted.add(f"{split}: {problem}", str(identity))
            continue
        x, y, w, h = (float(value) for value in entry["bbox"])
        instances[image].append(
            Instance(
                int(entry["category_id"]),
                entry["segmentation"],
                (x, y, w, h),
                bool(entry.get("iscrowd", 0)),
                float(entry["area"]) if "area" in entry else None,
            )
        )
    images = tuple(
        AnnotatedImage(path, height, width, tuple(instances[identity]))
        for identity, (path, height, width) in sorted(sizes.items())
    )
    return CocoSplit(images, categories)


def _read_counts(text: str) -> list[int]:
    """COCO's text form: five bits a character, lowest first; from the third run on, differences."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("run lengths that are none")
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            value |= -1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = plain_json.read(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: no valid JSON ({error}); fetch it again") from None
    keys = ("images", "annotations", "categories")
    if not isinstance(data, dict) or not all(isinstance(data.get(key), list) for key in keys):
        raise UserError(f"{path}: not COCO instances: it needs lists of {', '.join(keys)}")
    return data


def _image_problem(path: Path, entry: dict[str, Any]) -> str | None:
    try:
        with open_image(path) as image:
            size = image.size
    except FileNotFoundError:
        return "image file missing"
    except (OSError, ValueError):
        return "image header not readable"
    if size != (entry.get("width"), entry.get("height")):
        return "image of another size than the annotations say"
    return None


def _instance_problem(
    entry: dict[str, Any], height: int, width: int, categories: dict[int, tuple[str, str]]
) -> str | None:
    if entry.get("category_id") not in categories:
        return "annotation of an unknown category"
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not min(box[2], box[3]) > 0:
        return "annotation with a box of no size"
    if box[0] >= width or box[1] >= height or box[0] + box[2] <= 0 or box[1] + box[3] <= 0:
        return "annotation outside its image"
    segmentation = entry.get("segmentation")
    if isinstance(segmentation, dict):
        try:
            decode_rle(segmentation, height, width)
        except (ValueError, KeyError, IndexError, TypeError, OverflowError):
            return "annotation with run lengths of another size"
        return None
    if not isinstance(segmentation, list) or not segmentation:
        return "annotation without a segmentation"
    if any(len(polygon) < 6 or len(polygon) % 2 for polygon in segmentation):
        return "annotation with a polygon of fewer than three points"
    if not all(max(map(abs, polygon)) < _FARTHEST for polygon in segmentation):
        return "annotation with a polygon of points far outside"
    return None
