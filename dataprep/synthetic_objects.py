"""Coloured rectangles on grey, in COCO's layout and in VOC's: what a detector learns in seconds."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"car": (210, 60, 60), "dog": (60, 190, 70), "sofa": (70, 80, 220)}
HEIGHT, WIDTH = 64, 80  # of every image, in pixels
Thing = tuple[str, int, int, int, int]  # class, x, y, width, height


def write_rectangles(
    root: Path,
    *,
    train: int = 24,
    val: int = 8,
    shuffled: bool = False,
    seed: int = 0,
    sides: tuple[int, int] = (16, 32),
) -> Path:
    """Write `coco/` and `VOCdevkit/VOC2007/` of the same images below `root`, and return it.

    Args:
        root: a folder, made where there is none.
        train: images to learn from.
        val: images to test on.
        shuffled: the annotations have nothing to do with the images.
        seed: of all draws.
        sides: shortest and longest side of a rectangle, in pixels.
    """
    rng = np.random.default_rng(seed)
    voc = root / "VOCdevkit" / "VOC2007"
    for folder in ("coco/train2017", "coco/val2017", "coco/annotations"):
        (root / folder).mkdir(parents=True)
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (voc / folder).mkdir(parents=True)
    for part, split, count in (("train", "trainval", train), ("val", "test", val)):
        stems, images, annotations = [], [], []
        for number in range(count):
            picture, things = _drawn(rng, 1 + number % 2, sides)
            if shuffled:
                things = _elsewhere(rng, len(things))
            identity = 100 * (part == "val") + number
            stem = f"{identity:06}"
            picture.save(root / f"coco/{part}2017/{stem}.jpg", quality=95)
            picture.save(voc / f"JPEGImages/{stem}.jpg", quality=95)
            (voc / f"Annotations/{stem}.xml").write_text(voc_annotation(things))
            stems.append(stem)
            images.append(
                {"id": identity, "file_name": f"{stem}.jpg", "height": HEIGHT, "width": WIDTH}
            )
            annotations += [_coco_annotation(thing, identity) for thing in things]
        for number, entry in enumerate(annotations, 1):
            entry["id"] = number
        categories = [
            {"id": 3 * number + 1, "name": name, "supercategory": "thing"}
            for number, name in enumerate(COLOURS)
        ]
        told = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"coco/annotations/instances_{part}2017.json").write_text(json.dumps(told))
        (voc / f"ImageSets/Main/{split}.txt").write_text("\n".join(stems))
    return root


def voc_annotation(
    things: Sequence[Thing], *, height: int = HEIGHT, width: int = WIDTH, difficult: int = 0
) -> str:
    """Return VOC's XML of things, the boxes 1-based and inclusive."""
    objects = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x + 1}</xmin>"
        f"<ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
        for name, x, y, w, h in things
    )
    return (
        f"<annotation><size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        f"{objects}</annotation>"
    )


def _drawn(
    rng: np.random.Generator, count: int, sides: tuple[int, int]
) -> tuple[Image.Image, list[Thing]]:
    """An image with rectangles that do not overlap."""
    image = np.clip(rng.normal(128, 8, (HEIGHT, WIDTH, 3)), 0, 255)
    taken = np.zeros((HEIGHT, WIDTH), bool)
    things: list[Thing] = []
    while len(things) < count:
        w, h = (int(side) for side in rng.integers(sides[0], sides[1] + 1, 2))
        x, y = int(rng.integers(0, WIDTH - w)), int(rng.integers(0, HEIGHT - h))
        if taken[y : y + h, x : x + w].any():
            continue
        taken[y : y + h, x : x + w] = True
        name = list(COLOURS)[rng.integers(len(COLOURS))]
        image[y : y + h, x : x + w] = np.clip(rng.normal(COLOURS[name], 8, (h, w, 3)), 0, 255)
        things.append((name, x, y, w, h))
    return Image.fromarray(image.astype(np.uint8)), things


def _elsewhere(rng: np.random.Generator, count: int) -> list[Thing]:
    names = list(COLOURS)
    return [
        (names[rng.integers(3)], int(rng.integers(60)), int(rng.integers(40)), 18, 22)
        for _ in range(count)
    ]


def _coco_annotation(thing: Thing, image: int) -> dict:
    name, x, y, w, h = thing
    return {
        "image_id": image, "category_id": 3 * list(COLOURS).index(name) + 1, "bbox": [x, y, w, h],
        "area": w * h, "iscrowd": 0, "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
    }  # fmt: skip
