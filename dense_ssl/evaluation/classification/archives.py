"""Small classification sets in the files they are distributed in, whole images with one class each.

| data set         | files                                                                        | train, test    |
|------------------|------------------------------------------------------------------------------|----------------|
| CIFAR-10         | `cifar-10-batches-py/data_batch_1 ...`, or `cifar-10-batches-bin/*.bin`      | 50,000, 10,000 |
| CIFAR-100        | `cifar-100-python/{train,test}`, or `cifar-100-binary/*.bin`; the 100 classes | 50,000, 10,000 |
| Flowers-102      | `jpg/`, `imagelabels.mat`, `setid.mat`; trained on trnid and valid           | 2,040, 6,149   |
| Stanford Cars    | `cars_train/`, `cars_test/`, `devkit/`, `cars_test_annos_withlabels.mat`      | 8,144, 8,041   |
| iNaturalist 2018, 2019 | `train2018.json`, `val2018.json` beside `train_val2018/`               |                |

CIFAR's pickles are read as plain data; no code in them is run.
"""  # noqa: E501  (a table row cannot wrap)

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dataprep import plain_json
from dense_ssl.config import UserError
from dense_ssl.evaluation.omissions import Omissions
from dense_ssl.weights import plain_pickle

_SIDE = 32  # of CIFAR's images in pixels
_BYTES = 3 * _SIDE * _SIDE
_FILES_AT_ONCE = 8  # of CIFAR, held in memory; 31 MB each at most but CIFAR-100's 154 MB
_FLOWERS, _CARS = 102, 196  # classes


class Entry(NamedTuple):
    """One image of a data set."""

    path: Path
    row: int | None  # in a file of many
    label: int


@dataclass(frozen=True, slots=True)
class Archive:
    """The images of both splits."""

    classes: tuple[str, ...]
    train: tuple[Entry, ...]
    val: tuple[Entry, ...]


class _Cifar(NamedTuple):
    """How a data set of CIFAR is stored."""

    folder: str
    train: tuple[str, ...]
    test: str
    names: tuple[str, str]  # file of the classes' names, and their key in it
    labels: str  # key in a pickle; "" for a binary file
    before: int = 0  # bytes of a binary file's record before the pixels; the last one is the class


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_CIFARS = (
    _Cifar(
        "cifar-10-batches-py", _BATCHES, "test_batch", ("batches.meta", "label_names"), "labels"
    ),
    _Cifar("cifar-100-python", ("train",), "test", ("meta", "fine_label_names"), "fine_labels"),
    _Cifar(
        "cifar-10-batches-bin", tuple(f"{name}.bin" for name in _BATCHES), "test_batch.bin",
        ("batches.meta.txt", ""), "", 1,
    ),
    _Cifar(
        "cifar-100-binary", ("train.bin",), "test.bin", ("fine_label_names.txt", ""), "", 2
    ),
)  # fmt: skip


def find_archive(root: Path, omitted: Omissions) -> Archive | None:
    """Return the data set at `root`, or None where it is none of these.

    Raises:
        UserError: it is one in part, or a file of it cannot be read.
    """
    for stored in _CIFARS:
        for home in (root / stored.folder, root):
            if home.name == stored.folder and home.is_dir():
                return _cifar(home, stored)
    if (root / "imagelabels.mat").is_file():
        return _flowers(root, omitted)
    if (root / "cars_train").is_dir():
        return _cars(root, omitted)
    listed = sorted(root.glob("train20??.json"))
    return _inaturalist(root, listed[-1].stem.removeprefix("train"), omitted) if listed else None


def stored_image(path: Path, row: int) -> Image.Image:
    """Return one image of a file of CIFAR.

    Raises:
        UserError: the file cannot be read any more.
    """
    pixels, _ = _records(path)
    return Image.fromarray(pixels[row].reshape(3, _SIDE, _SIDE).transpose(1, 2, 0))


def stored_size() -> tuple[int, int]:
    """Return height and width of CIFAR's images."""
    return _SIDE, _SIDE


def _cifar(home: Path, stored: _Cifar) -> Archive:
    names = _cifar_names(home / stored.names[0], stored.names[1])
    splits = []
    for files in (stored.train, (stored.test,)):
        entries: list[Entry] = []
        for file in files:
            path = home / file
            _, labels = _records(path)
            if not 0 <= labels.min() <= labels.max() < len(names):
                raise UserError(f"{path}: has class {labels.max()} of {len(names)}; fetch it again")
            entries += [Entry(path, row, label) for row, label in enumerate(labels.tolist())]
        splits.append(tuple(entries))
    return Archive(names, *splits)


@lru_cache(maxsize=_FILES_AT_ONCE)
def _records(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The pixels uint8 [n, 3072] and classes int64 [n] in a file of CIFAR."""
    stored = next(s for s in _CIFARS if s.folder == path.parent.name)
    try:
        if not stored.labels:
            raw = np.fromfile(path, np.uint8).reshape(-1, stored.before + _BYTES)
            pixels, labels = raw[:, stored.before :], raw[:, stored.before - 1].astype(np.int64)
        else:
            content = plain_pickle.read(path)
            pixels, labels = content["data"], np.array(content[stored.labels], np.int64)
        if pixels.dtype != np.uint8 or pixels.shape != (len(labels), _BYTES) or not len(labels):
            raise ValueError(f"images of {pixels.shape}, {len(labels)} classes")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {stored.folder} has one") from None
    except Exception as error:  # a damaged pickle can raise anything at all
        raise _unreadable(path, error) from None
    return pixels, labels


def _cifar_names(path: Path, key: str) -> tuple[str, ...]:
    try:
        if key:
            names = plain_pickle.read(path)[key]
        else:
            names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        return tuple(str(name) for name in names)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; it names the classes") from None
    except Exception as error:  # a damaged pickle can raise anything at all
        raise _unreadable(path, error) from None


def _flowers(root: Path, omitted: Omissions) -> Archive:
    labels = np.atleast_1d(_matlab(root / "imagelabels.mat", "labels")["labels"]).astype(int)
    parts = _matlab(root / "setid.mat", "trnid", "valid", "tstid")
    chosen = [np.concatenate([np.atleast_1d(parts[k]) for k in ("trnid", "valid")]), parts["tstid"]]
    classes = tuple(f"flower {number}" for number in range(1, _FLOWERS + 1))
    splits = []
    for split, numbers in zip(("train", "val"), chosen):
        found = [
            (root / "jpg" / f"image_{number:05d}.jpg", int(labels[number - 1]) - 1)
            for number in np.atleast_1d(numbers).astype(int).tolist()
            if 0 < number <= len(labels)
        ]
        splits.append(_there(found, split, len(classes), root / "imagelabels.mat", omitted))
    return Archive(classes, *splits)


def _cars(root: Path, omitted: Omissions) -> Archive:
    devkit = root / "devkit"
    names = np.atleast_1d(_matlab(devkit / "cars_meta.mat", "class_names")["class_names"]).tolist()
    tested = "cars_test_annos_withlabels.mat"
    files = [
        devkit / "cars_train_annos.mat",
        next(
            (home / tested for home in (root, devkit) if (home / tested).is_file()), root / tested
        ),
    ]
    splits = []
    for split, folder, path in zip(("train", "val"), ("cars_train", "cars_test"), files):
        entries = np.atleast_1d(_matlab(path, "annotations")["annotations"])
        try:
            found = [(root / folder / str(e["fname"]), int(e["class"]) - 1) for e in entries]
        except (ValueError, TypeError, IndexError) as error:
            raise _unreadable(path, error) from None
        splits.append(_there(found, split, len(names), path, omitted))
    return Archive(tuple(str(name) for name in names), *splits)


def _inaturalist(root: Path, year: str, omitted: Omissions) -> Archive:
    splits = []
    classes: dict[int, str] = {}
    for split in ("train", "val"):
        path = root / f"{split}{year}.json"
        try:
            content = plain_json.read(path)
            if not classes:
                kinds = sorted(content["categories"], key=lambda kind: kind["id"])
                classes = {int(kind["id"]): str(kind["name"]) for kind in kinds}
            files = {image["id"]: str(image["file_name"]) for image in content["images"]}
            places = {identity: place for place, identity in enumerate(classes)}
            found = [
                (root / files[said["image_id"]], places[said["category_id"]])
                for said in content["annotations"]
            ]
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; iNaturalist has one") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unreadable(path, error) from None
        splits.append(_there(found, split, len(classes), path, omitted))
    return Archive(tuple(classes.values()), *splits)


def _there(
    found: Iterable[tuple[Path, int]], split: str, classes: int, listing: Path, omitted: Omissions
) -> tuple[Entry, ...]:
    """The entries whose files exist; the others are counted."""
    entries = []
    for path, label in found:
        if not 0 <= label < classes:
            raise UserError(f"{listing}: has class {label + 1} of {classes}; fetch it again")
        if path.is_file():
            entries.append(Entry(path, None, int(label)))
        else:
            omitted.add(f"{split}: image file missing", path.name)
    return tuple(entries)


def _matlab(path: Path, *keys: str) -> Mapping[str, Any]:
    """The variables of a MATLAB file, of up to version 7.2; numbers, texts and structures alone."""
    from scipy.io import loadmat  # a third of a second to import

    if not path.is_file():
        raise UserError(f"{path}: no such file; the data set has one")
    try:
        content = loadmat(path, squeeze_me=True, appendmat=False)
    except Exception as error:  # a damaged file can raise anything at all
        raise _unreadable(path, error) from None
    if missing := [key for key in keys if key not in content]:
        raise UserError(f"{path}: lacks {', '.join(missing)}; fetch it again")
    return content


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return UserError(f"{path}: cannot be read ({reason}); fetch it again")
