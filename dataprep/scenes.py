"""Rendered scenes as a real COCO data set: the data there is when there is no data.

    out/train2017/000000000001.jpg ...      out/annotations/instances_train2017.json
    out/val2017/000000001801.jpg ...        out/annotations/instances_val2017.json
    out/scenes.json                         the options; written first

Objects of 14 classes, textured, lit and overlapping, with polygons of what is visible of each. Image
and annotations are a pure function of (seed, index), whatever the number of workers. The annotation
files are written last: where both are there, the set is complete.
"""

import io
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataprep.manifest import DataError
from dataprep.outlines import mask_to_polygons
from dataprep.scene_painting import paint_scene
from dataprep.scene_shapes import CLASSES

FORMAT = "scenes/2"  # to be raised when the pictures change
OPTIONS = "scenes.json"
JPEG_QUALITY = 92
_SPLITS = ("train2017", "val2017")
_IDS_PER_IMAGE = 100  # annotation id = image id * 100 + number of the object

Record = tuple[int, dict[str, Any], list[dict[str, Any]]]  # index, image entry, annotations
Progress = Callable[[int, int], None]  # (images done, images in all)


def render(
    out: Path,
    count: int = 2000,
    seed: int = 0,
    *,
    workers: int | None = None,
    val_share: float = 0.1,
    progress: Progress | None = None,
) -> None:
    """Write `count` scenes below `out` as a COCO data set; the last `val_share` of them are val.

    A complete set with the same options is left as it is; an interrupted one is rendered again, to
    the same bytes. `workers` defaults to the number of processors this process may use.

    Raises:
        DataError: an option is out of range, `out` holds something else, or cannot be written.
    """
    out = Path(out)
    options = {"format": FORMAT, "count": count, "seed": seed, "val_share": val_share}
    _check(count, seed, val_share, workers)
    try:
        if _prepare(out, options):
            if progress:
                progress(count, count)
            return
        first_val = count - round(count * val_share)
        records: list[Record] = []
        for record in _rendered(out, count, seed, first_val, workers or _processors()):
            records.append(record)
            if progress:
                progress(len(records), count)
        records.sort(key=lambda record: record[0])
        for split, part in zip(_SPLITS, (records[:first_val], records[first_val:])):
            path = _annotation_path(out, split)
            path.parent.mkdir(exist_ok=True)
            _write_aside(path, json.dumps(_coco(part), separators=(",", ":")).encode(), sync=True)
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror or error}") from None


def _check(count: int, seed: int, val_share: float, workers: int | None) -> None:
    if count < 1:
        raise DataError(f"count: at least one scene is needed, got {count}")
    if seed < 0:
        raise DataError(f"seed: must not be negative, got {seed}")
    if not 0 <= val_share < 1:
        raise DataError(f"val_share: must be at least 0 and below 1, got {val_share}")
    if workers is not None and workers < 1:
        raise DataError(f"workers: at least one is needed, got {workers}")


def _prepare(out: Path, options: dict[str, Any]) -> bool:
    """Make the folders; return whether the set is there already.

    Raises:
        DataError: `out` holds something else, or scenes with other options.
    """
    path = out / OPTIONS
    if path.is_file():
        try:
            found = json.loads(path.read_text())
        except ValueError:
            raise DataError(f"{path}: not readable; remove {out} and render again") from None
        if found != options:
            raise DataError(
                f"{out}: holds scenes with other options ({_listed(found)}; now "
                f"{_listed(options)}); choose another folder or remove this one"
            )
        if all(_annotation_path(out, split).is_file() for split in _SPLITS):
            return True
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: exists and is not a set of rendered scenes; choose another folder")
    for split in _SPLITS:
        (out / split).mkdir(parents=True, exist_ok=True)
    _write_aside(path, json.dumps(options).encode(), sync=True)
    return False


def _listed(options: Any) -> str:
    if not isinstance(options, dict):
        return repr(options)
    return ", ".join(f"{key}={value}" for key, value in options.items())


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _annotation_path(out: Path, split: str) -> Path:
    return out / "annotations" / f"instances_{split}.json"


def _write_aside(path: Path, data: bytes, *, sync: bool) -> None:
    """Write under another name, then rename: the final name never holds a part of a file."""
    aside = path.with_name(f".{path.name}.part")
    with aside.open("wb") as file:
        file.write(data)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    aside.replace(path)


def _rendered(out: Path, count: int, seed: int, first_val: int, workers: int) -> Iterator[Record]:
    """Render and write every scene; yields their records, in no particular order.

    One pipe per worker: when this process is killed, a worker finds its pipe broken and ends too.
    """
    workers = min(workers, count)
    if workers == 1:
        for index in range(count):
            yield _render_one(out, seed, index, first_val)
        return
    context = multiprocessing.get_context("spawn")
    pipes: list[Any] = []  # Connection; its type parameters differ between Python versions
    processes = []
    try:
        for worker in range(workers):
            receiver, sender = context.Pipe(duplex=False)
            indices = range(worker, count, workers)
            process = context.Process(
                target=_work, args=(sender, out, seed, indices, first_val), daemon=True
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        waiting = {pipe: len(range(worker, count, workers)) for worker, pipe in enumerate(pipes)}
        while waiting:
            for pipe in wait(list(waiting)):
                assert isinstance(pipe, Connection)
                try:
                    message = pipe.recv()
                except EOFError:
                    raise DataError(
                        f"{out}: a rendering process was killed; render again"
                    ) from None
                if isinstance(message, Exception):
                    raise message
                yield message
                waiting[pipe] -= 1
                if not waiting[pipe]:
                    del waiting[pipe]
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(timeout=10)


def _work(sender: Connection, out: Path, seed: int, indices: range, first_val: int) -> None:
    try:
        for index in indices:
            try:
                message: Record | Exception = _render_one(out, seed, index, first_val)
            except Exception as error:  # to be raised by the parent
                message = error
            sender.send(message)
    except (BrokenPipeError, KeyboardInterrupt):
        return  # the parent is gone, or being stopped


def _render_one(out: Path, seed: int, index: int, first_val: int) -> Record:
    """Render scene `index`, write its JPEG and return its entries."""
    scene = paint_scene(seed, index)
    image_id = index + 1
    name = f"{image_id:012d}.jpg"
    stream = io.BytesIO()
    Image.fromarray(scene.image).save(stream, "JPEG", quality=JPEG_QUALITY)
    _write_aside(out / _SPLITS[index >= first_val] / name, stream.getvalue(), sync=False)
    height, width = scene.owner.shape
    image = {
        "license": 1,
        "file_name": name,
        "coco_url": "",
        "height": height,
        "width": width,
        "date_captured": "2000-01-01 00:00:00",
        "flickr_url": "",
        "id": image_id,
    }
    annotations = [
        _annotation(scene.owner == number, image_id, number, category)
        for number, category in enumerate(scene.categories, start=1)
    ]
    return index, image, annotations


def _annotation(mask: np.ndarray, image_id: int, number: int, category: int) -> dict[str, Any]:
    """The COCO annotation of what is visible of one object."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    return {
        "segmentation": mask_to_polygons(mask),
        "area": float(mask.sum()),
        "iscrowd": 0,
        "image_id": image_id,
        "bbox": [float(x), float(y), float(columns[-1] + 1 - x), float(rows[-1] + 1 - y)],
        "category_id": category + 1,
        "id": image_id * _IDS_PER_IMAGE + number,
    }


def _coco(records: list[Record]) -> dict[str, Any]:
    return {
        "info": {
            "description": "Procedurally rendered scenes",
            "url": "",
            "version": FORMAT,
            "year": 2000,
            "contributor": "dataprep.scenes",
            "date_created": "2000-01-01",
        },
        "licenses": [{"id": 1, "name": "Public domain, rendered", "url": ""}],
        "images": [image for _, image, _ in records],
        "annotations": [entry for _, _, entries in records for entry in entries],
        "categories": [
            {"supercategory": shape.supercategory, "id": number, "name": shape.name}
            for number, shape in enumerate(CLASSES, start=1)
        ],
    }
