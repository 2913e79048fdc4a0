"""Images with boxes around objects: a training and a test split of COCO or PASCAL VOC, as distributed.

VOC trains on the trainval lists of VOC2007 and VOC2012 and tests on VOC2007's test list. Boxes are
(x0, y0, x1, y1) in continuous pixels: VOC's 1-based (xmin, ymin, xmax, ymax) is (xmin - 1, ymin - 1, xmax,
ymax), so that (1, 1, W, H) covers the image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dense_ssl.config import UserError
from dense_ssl.evaluation import coco
from dense_ssl.evaluation.detection.voc import is_voc, read_voc
from dense_ssl.evaluation.features import content_key, file_stamp, thinned
from dense_ssl.evaluation.omissions import Omissions, require_some

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Thing:
    """One annotated object."""

    box: Box
    label: int  # 1 ... C; 0 is the background
    ignored: bool  # a crowd, or difficult: neither found nor missed
    area: float  # in pixels: decides whether COCO calls it small, medium or large
    outline: coco.Polygons | coco.Rle | None = None


@dataclass(frozen=True, slots=True)
class Scene:
    """One image with its objects."""

    path: Path
    height: int
    width: int
    things: tuple[Thing, ...]

    def __str__(self) -> str:
        """Return the name of the file."""
        return self.path.name


@dataclass(frozen=True, slots=True)
class DetectData:
    """A training and a test split with the same classes."""

    protocol: str
    classes: tuple[str, ...]  # without the background
    train: tuple[Scene, ...]
    val: tuple[Scene, ...]
    content: str  # hash, other when a file or the choice of files is
    omitted: Omissions = field(compare=False)
    layout: str  # coco or voc


def open_detection(
    root: Path, max_train: int | None, max_val: int | None, train_years: Sequence[str]
) -> DetectData:
    """Return the data at `root`, at most `max_train` and `max_val` images, evenly spaced.

    train_years: of VOC.

    Raises:
        UserError: it is neither COCO nor VOC, the splits do not agree, or nothing in them is usable.
    """
    if coco.is_coco(root):
        return _open_coco(root, (max_train, max_val))
    if is_voc(root):
        return _open_voc(root, (max_train, max_val), train_years)
    raise UserError(
        f"{root}: neither COCO (annotations/instances_*.json) nor VOC (VOCdevkit/VOC2007/Annotations, "
        "ImageSets/Main) in it"
    )


def trainable(scenes: Sequence[Scene], *, difficult: bool) -> tuple[Scene, ...]:
    """Return the scenes with the objects that are learnt, without scenes that have none of them.

    difficult: ignored objects are learnt like others, as VOC's are; crowds never are.
    """
    kept = []
    for scene in scenes:
        things = tuple(thing for thing in scene.things if difficult or not thing.ignored)
        if things:
            kept.append(Scene(scene.path, scene.height, scene.width, things))
    return tuple(kept)


def _open_coco(root: Path, limits: tuple[int | None, int | None]) -> DetectData:
    omitted = Omissions()
    first: dict[int, tuple[str, str]] = {}
    parts: list[tuple[Scene, ...]] = []
    content: list[str] = []
    for part, limit in zip(("train", "val"), limits):
        name = coco.split_name(root, part)
        split = coco.read_split(root, name, omitted)
        first = first or split.categories
        if split.categories != first:
            raise UserError(f"{root}/annotations: the splits have different categories")
        numbers = {identity: number for number, identity in enumerate(first, 1)}
        scenes = tuple(_scene_of(image, numbers) for image in thinned(split.images, limit))
        content.append(file_stamp(root / "annotations" / f"instances_{name}.json"))
        parts.append(_checked(scenes, f"{root} ({name})", omitted, ignored="a crowd"))
    return _data("coco", tuple(name for name, _ in first.values()), parts, content, omitted)


def _scene_of(image: coco.AnnotatedImage, numbers: dict[int, int]) -> Scene:
    things = []
    for instance in image.instances:
        x, y, w, h = instance.box
        area = w * h if instance.area is None else instance.area
        label = numbers[instance.category]
        box = (x, y, x + w, y + h)
        things.append(Thing(box, label, instance.crowd, area, instance.segmentation))
    return Scene(image.path, image.height, image.width, tuple(things))


def _open_voc(
    root: Path, limits: tuple[int | None, int | None], train_years: Sequence[str]
) -> DetectData:
    omitted = Omissions()
    classes: tuple[str, ...] = ()
    parts: list[tuple[Scene, ...]] = []
    content: list[str] = []
    splits = ([(year, "trainval") for year in train_years], [("2007", "test")])
    for wanted, limit in zip(splits, limits):
        found = []
        for year, split in wanted:
            classes, records, stamp = read_voc(root, year, split, omitted)
            content.append(stamp)
            found += records
        scenes = tuple(
            Scene(
                record.path,
                record.height,
                record.width,
                tuple(
                    Thing(box, label, difficult, (box[2] - box[0]) * (box[3] - box[1]))
                    for box, label, difficult in record.objects
                ),
            )
            for record in thinned(found, limit)
        )
        names = " + ".join(f"VOC{year} {split}" for year, split in wanted)
        learnt = not parts  # training takes difficult objects like others
        ignored = None if learnt else "difficult"
        parts.append(_checked(scenes, f"{root} ({names})", omitted, ignored=ignored))
    return _data("voc", classes, parts, content, omitted)


def _checked(
    scenes: tuple[Scene, ...], where: str, omitted: Omissions, *, ignored: str | None
) -> tuple[Scene, ...]:
    """The scenes, where at least one object counts; `ignored` says what those are that do not."""
    require_some(scenes, where, omitted)
    things = [thing for scene in scenes for thing in scene.things]
    if not any(ignored is None or not thing.ignored for thing in things):
        reasons = omitted.lines()
        if things:
            reasons.insert(
                0, f"each of its {len(things)} objects is {ignored}, which does not count"
            )
        raise UserError(
            f"{where}: no object to find: {'; '.join(reasons) or 'nothing is annotated'}"
        )
    return scenes


def _data(
    layout: str,
    classes: tuple[str, ...],
    parts: list[tuple[Scene, ...]],
    content: list[str],
    omitted: Omissions,
) -> DetectData:
    content += [file_stamp(scene.path) for part in parts for scene in part]
    key = content_key(layout, *classes, *content)
    return DetectData("", classes, parts[0], parts[1], key, omitted, layout)
