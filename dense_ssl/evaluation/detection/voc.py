"""PASCAL VOC's boxes: `Annotations/NAME.xml` of the images that `ImageSets/Main/SPLIT.txt` lists."""

from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from dense_ssl.config import UserError
from dense_ssl.evaluation.features import content_key, file_stamp
from dense_ssl.evaluation.omissions import Omissions
from dense_ssl.pictures import open_image

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Record:
    """One image and its objects: box (x0, y0, x1, y1), label from 1, difficult."""

    path: Path
    height: int
    width: int
    objects: tuple[tuple[tuple[float, float, float, float], int, bool], ...]


def is_voc(root: Path) -> bool:
    """Return whether `root` is VOCdevkit, the folder around it, or a year's folder."""
    return _home(root, "2007") is not None


def read_voc(
    root: Path, year: str, split: str, omitted: Omissions
) -> tuple[tuple[str, ...], list[Record], str]:
    """Return the classes, the images of a split, and a hash of their annotations.

    What is left out (an image without its file, a box of no size, an unknown class, ...) is counted.

    Raises:
        UserError: the folder or the list is not there.
    """
    home = _home(root, year)
    if home is None:
        raise UserError(
            f"{root}: no VOC{year}/Annotations and VOC{year}/ImageSets/Main in it; VOC07+12 needs both "
            "years (train_years=2007 trains on the one alone)"
        )
    path = home / "ImageSets" / "Main" / f"{split}.txt"
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    names = list(dict.fromkeys(line.split()[0] for line in lines if line.strip()))
    label = f"VOC{year} {split}"
    records, stamps = [], []
    for name in names:
        record = _read(home, name, label, omitted)
        if record is not None:
            records.append(record)
            stamps.append(file_stamp(home / "Annotations" / f"{name}.xml"))
    return CLASSES, records, content_key(*stamps)


def _home(root: Path, year: str) -> Path | None:
    name = f"VOC{year}"
    places = [root / "VOCdevkit" / name, root / name, root.parent / name]
    if root.name.startswith("VOC20") and root.name != name:
        places = [root.parent / name]
    elif root.name == name:
        places = [root]
    else:
        places = places[:2]
    for place in places:
        if (place / "Annotations").is_dir() and (place / "ImageSets" / "Main").is_dir():
            return place
    return None


def _read(home: Path, name: str, split: str, omitted: Omissions) -> Record | None:
    """One image, or None with the reason counted."""
    path, notes = home / "JPEGImages" / f"{name}.jpg", home / "Annotations" / f"{name}.xml"
    for needed, what in ((path, "image file missing"), (notes, "annotation file missing")):
        if not needed.is_file():
            omitted.add(f"{split}: {what}", needed.name)
            return None
    try:
        tree = ElementTree.parse(notes).getroot()
        width, height = (int(_text(tree, f"size/{side}")) for side in ("width", "height"))
    except (ElementTree.ParseError, ValueError):
        omitted.add(f"{split}: annotation file not readable", notes.name)
        return None
    try:
        with open_image(path) as image:
            size = image.size
    except (OSError, ValueError):
        omitted.add(f"{split}: image header not readable", path.name)
        return None
    if size != (width, height):
        omitted.add(f"{split}: image of another size than its annotation says", path.name)
        return None
    objects = []
    for number, entry in enumerate(tree.iter("object")):
        found = _object(entry, width, height)
        if isinstance(found, str):
            omitted.add(f"{split}: {found}", f"{name}, object {number}")
        else:
            objects.append(found)
    return Record(path, height, width, tuple(objects))


def _object(
    entry: ElementTree.Element, width: int, height: int
) -> tuple[tuple[float, float, float, float], int, bool] | str:
    """Box, label and difficulty of an object, or what is wrong with it."""
    name = (entry.findtext("name") or "").strip()
    if name not in CLASSES:
        return f"object of an unknown class {name!r}"
    try:
        x0, y0, x1, y1 = (
            float(_text(entry, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")
        )
        difficult = bool(int(entry.findtext("difficult") or 0))
    except ValueError:
        return "object without a readable box"
    x0, y0 = x0 - 1, y0 - 1
    if not (x1 > x0 and y1 > y0):
        return "object with a box of no size"
    if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
        return "object outside its image"
    return (x0, y0, x1, y1), CLASSES.index(name) + 1, difficult


def _text(tree: ElementTree.Element, path: str) -> str:
    text = tree.findtext(path)
    if text is None:
        raise ValueError(path)
    return text
