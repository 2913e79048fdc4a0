"""Data sets with a class per pixel in the folders they are distributed in.

| layout      | images, masks                                                                | classes |
|-------------|------------------------------------------------------------------------------|---------|
| camvid      | `train/`, `trainannot/`, the same of `val`; `classes.txt`                    | as listed |
| voc         | `VOC2012/{JPEGImages,SegmentationClass[Aug]}`, `ImageSets/Segmentation/*.txt` | 21      |
| voc         | `{images,SegmentationClass[Aug]}`, `sets/*.txt` (the archive of Revisiting)  | 21      |
| cityscapes  | `leftImg8bit/SPLIT/CITY/*`, `gtFine/SPLIT/CITY/*_labelIds.png`               | 19      |
| ade20k      | `images/{training,validation}/*`, `annotations/{training,validation}/*.png`  | 150     |
| coco-stuff  | `{train,val}2017/*`, `stuffthingmaps/{train,val}2017/*.png`                  | 171     |
| coco-stuff  | `{train,val}2017/*`, `annotations/stuff_{train,val}2017_pixelmaps/*.png`     | 92      |
| imagenet-s  | `{train-semi,validation}/SYNSET/*`, `{...}-segmentation/SYNSET/*.png`        | 51, 301, 920 |
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from dense_ssl.config import UserError
from dense_ssl.evaluation.label_maps import VOID, Code, Pair, read_coded, read_mask
from dense_ssl.loaders.source import SUFFIXES

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair"),
    *("cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
# Cityscapes' labelIds of the 19 evaluated classes; all others up to 33 are void.
CITYSCAPES: dict[int, str] = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole",
    19: "traffic light", 20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky",
    24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle",
    33: "bicycle",
}  # fmt: skip
ADE20K_CLASSES = 150
# COCO's category ids 1 to 91 that no image of the 2017 release has.
_COCO_UNUSED = frozenset({12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91})
_IMAGENET_S_IGNORE = 1000
_VOID_NAMES = frozenset({"void", "unlabelled", "unlabeled", "ignore"})


@dataclass(frozen=True, slots=True)
class Layout:
    """What a folder holds, before any mask is opened."""

    name: str  # of the first column above
    classes: tuple[str, ...]
    train: tuple[Pair, ...]
    val: tuple[Pair, ...]
    read: Callable[[Path], np.ndarray]  # a mask's label map


def find_layout(root: Path, train_split: str | None) -> Layout | None:
    """Return what is at `root`, or None where none of the layouts is there.

    train_split: VOC's `train` or `trainaug`; None takes the larger one that is there.

    Raises:
        UserError: a layout is there in part.
    """
    if (root / "trainannot").is_dir():
        return _camvid(root)
    if (home := _voc_home(root)) is not None:
        return _voc(home, train_split)
    if (root / "leftImg8bit").is_dir():
        return _cityscapes(root)
    if (home := _first_with(root, "annotations/training", "ADEChallengeData2016")) is not None:
        return _ade20k(home)
    return _imagenet_s(root) if (root / "train-semi-segmentation").is_dir() else None


def find_coco_stuff(root: Path) -> Layout | None:
    """Return the pixel maps beside COCO's images, with things (171 classes) or without (92).

    The second kind gives all things the class `other`.
    """
    if (root / "stuffthingmaps").is_dir():
        folders = [root / "stuffthingmaps" / f"{split}2017" for split in ("train", "val")]
        used = [number for number in range(1, 183) if number not in _COCO_UNUSED]
        code = Code({number - 1: label for label, number in enumerate(used)})  # stored from 0
        classes = _stuff_names(root / "labels.txt", used)
    elif (root / "annotations" / "stuff_train2017_pixelmaps").is_dir():
        names = [f"stuff_{split}2017_pixelmaps" for split in ("train", "val")]
        folders = [root / "annotations" / name for name in names]
        # 92 to 182 are stuff, 183 is everything else.
        code = Code({number: number - 92 for number in range(92, 184)}, void=(0,))
        classes = (*_stuff_names(root / "labels.txt", range(92, 183)), "other")
    else:
        return None
    train, val = (
        tuple(
            Pair(root / f"{split}2017" / f"{mask.stem}.jpg", mask)
            for mask in sorted(folder.glob("*.png"))
        )
        for split, folder in zip(("train", "val"), folders, strict=True)
    )
    read = partial(read_coded, code=code)
    return Layout("coco-stuff", tuple(classes), train, val, read)


def _camvid(root: Path) -> Layout:
    names = _class_names(root / "classes.txt")
    void = next((i for i, name in enumerate(names) if name.lower() in _VOID_NAMES), VOID)
    classes = tuple(name for i, name in enumerate(names) if i != void)
    if void not in (VOID, len(classes)):
        raise UserError(f"{root}/classes.txt: the void class must be the last one, not {void}")
    train, val = (
        tuple(
            Pair(path, root / f"{split}annot" / f"{path.stem}.png")
            for path in sorted((root / split).glob("*"))
            if _is_image(path)
        )
        for split in ("train", "val")
    )
    read = partial(read_mask, classes=len(classes), void=void)
    return Layout("camvid", classes, train, val, read)


def _voc_home(root: Path) -> Path | None:
    """VOC2012's folder, else VOC2007's, else the archive: `root`, in it, or in VOCdevkit in it."""
    for year in ("VOC2012", "VOC2007"):
        for home in (root / "VOCdevkit" / year, root / year, root):
            if home.name == year and (home / "SegmentationClass").is_dir():
                return home
    return root if (root / "sets").is_dir() and (root / "SegmentationClass").is_dir() else None


def _voc(home: Path, train_split: str | None) -> Layout:
    """VOC; `trainaug` is the 10,582 images of SBD and VOC, whose masks are in SegmentationClassAug."""
    archive = (home / "sets").is_dir()
    lists = home / "sets" if archive else home / "ImageSets" / "Segmentation"
    images = home / ("images" if archive else "JPEGImages")
    augmented = home / "SegmentationClassAug"
    found = [lists / f"{name}.txt" for name in ("trainaug", "train_aug")]
    listing = next((path for path in found if path.is_file()), None)
    if train_split is None:
        train_split = "trainaug" if listing and augmented.is_dir() else "train"
    if train_split == "trainaug":
        if listing is None or not augmented.is_dir():
            raise UserError(
                f"{home}: no trainaug.txt in {lists.name} or no SegmentationClassAug, VOC's additional "
                "masks; take train_split=train, or add them"
            )
        masks = augmented
    else:
        listing, masks = lists / "train.txt", home / "SegmentationClass"

    def pairs(path: Path, folder: Path) -> tuple[Pair, ...]:
        try:
            names = [Path(line.split()[0]).stem for line in path.read_text().splitlines() if line]
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        return tuple(Pair(images / f"{name}.jpg", folder / f"{name}.png") for name in names)

    read = partial(read_mask, classes=len(VOC_CLASSES), void=VOID)
    train, val = pairs(listing, masks), pairs(lists / "val.txt", home / "SegmentationClass")
    return Layout("voc", VOC_CLASSES, train, val, read)


def _cityscapes(root: Path) -> Layout:
    """Fine annotations: 34 ids, of which 19 are classes; licence plates are stored as 255."""
    void = tuple(number for number in range(34) if number not in CITYSCAPES)
    code = Code({number: label for label, number in enumerate(CITYSCAPES)}, (*void, VOID))
    train, val = (
        tuple(
            Pair(path, root / "gtFine" / split / path.parent.name / _fine_mask(path))
            for path in sorted((root / "leftImg8bit" / split).glob("*/*"))
            if _is_image(path)
        )
        for split in ("train", "val")
    )
    read = partial(read_coded, code=code)
    return Layout("cityscapes", tuple(CITYSCAPES.values()), train, val, read)


def _ade20k(home: Path) -> Layout:
    """SceneParse150: number 0 is what belongs to no class ("zero label reduced")."""
    train, val = (
        tuple(
            Pair(path, home / "annotations" / split / f"{path.stem}.png")
            for path in sorted((home / "images" / split).glob("*"))
            if _is_image(path)
        )
        for split in ("training", "validation")
    )
    code = Code({label + 1: label for label in range(ADE20K_CLASSES)}, void=(0, VOID))
    read = partial(read_coded, code=code)
    return Layout("ade20k", _ade20k_names(home), train, val, read)


def _imagenet_s(root: Path) -> Layout:
    """ImageNet-S: class 0 is `other`, then the synsets in order; 1000 is ignored (SERE)."""
    synsets = sorted(path.name for path in (root / "train-semi").glob("n*") if path.is_dir())
    train, val = (
        tuple(
            Pair(path, root / f"{split}-segmentation" / path.parent.name / f"{path.stem}.png")
            for path in sorted((root / split).glob("n*/*"))
            if _is_image(path)
        )
        for split in ("train-semi", "validation")
    )
    numbers = {label: label for label in range(len(synsets) + 1)}
    code = Code(numbers, void=(_IMAGENET_S_IGNORE,), colours=True)
    classes = ("other", *synsets)
    return Layout("imagenet-s", classes, train, val, partial(read_coded, code=code))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _first_with(root: Path, inner: str, outer: str) -> Path | None:
    """`root`, or `outer` in it, whichever has the folder `inner`."""
    return next((home for home in (root, root / outer) if (home / inner).is_dir()), None)


def _fine_mask(image: Path) -> str:
    return f"{image.stem.removesuffix('_leftImg8bit')}_gtFine_labelIds.png"


def _stuff_names(path: Path, numbers: Iterable[int]) -> tuple[str, ...]:
    """Names of COCO's ids from lines `ID: NAME` where the file is there, else the ids."""
    lines = path.read_text().splitlines() if path.is_file() else []
    names = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    return tuple(names.get(str(number)) or f"id {number}" for number in numbers)


def _ade20k_names(home: Path) -> tuple[str, ...]:
    """Names from `objectInfo150.txt` where it is there, else the numbers."""
    path = home / "objectInfo150.txt"
    names: dict[str, str] = {}
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        cells = line.split("\t")
        names[cells[0].strip()] = cells[-1].split(",")[0].strip()
    return tuple(names.get(str(i)) or f"class {i}" for i in range(1, ADE20K_CLASSES + 1))


def _class_names(path: Path) -> tuple[str, ...]:
    """Names from lines `INDEX NAME`, which must count from 0."""
    try:
        lines = [line.split(maxsplit=1) for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; it names the classes") from None
    if [line[0] for line in lines] != [str(i) for i in range(len(lines))] or not lines:
        raise UserError(f"{path}: expected a line `INDEX NAME` per class, counting from 0")
    return tuple(line[-1].strip() for line in lines)
