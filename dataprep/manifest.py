"""What a shard set is: the contract between the writers here and every reader. numpy and stdlib only.

A shard set is a folder:

    manifest.json          written last: where it is missing, the conversion is not finished
    sizes.npy              int32 [n, 2], (height, width) of the stored images
    labels.npy             int64 [n], class index, -1 where the source has none
    checksums.npy          uint8 [n, 16], blake2b-128 of each record's JPEG bytes
    names.txt              one JSON string a line: the id of each record, its path within the source
    quarantine.jsonl       one {"name", "reason"} a line: images that were refused
    skipped.jsonl          one {"name", "reason"} a line: files that were never taken for images
    ffcv/images.beton      FFCV's own format, fields `image` and `label`
    dali/shard-000000.tar  webdataset tar shards, each with its index for DALI (`.idx`)
"""

import hashlib
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from dataprep import plain_json
from dataprep.write_ffcv import read_allocations

FORMAT = "shards/1"
MANIFEST = "manifest.json"
KEYS: dict[str, type] = {
    "num_images": int, "formats": list, "classes": list, "source": dict, "options": dict,
    "versions": dict, "files": dict, "num_quarantined": int,
}  # fmt: skip
BETON = "ffcv/images.beton"
CHUNK = 1 << 20


class DataError(ValueError):
    """What the user pointed at is wrong or cannot be used; programs print it alone and exit with 2."""


@dataclass(frozen=True)
class Manifest:
    """A complete shard set, checked for presence and shape of everything it lists."""

    root: Path
    num_images: int
    formats: tuple[str, ...]  # of "ffcv", "dali"
    classes: tuple[str, ...]  # class names by label, empty where the source has none
    source: Mapping[str, Any]  # dataset, path as given, split
    options: Mapping[str, Any]  # size, quality, ...
    versions: Mapping[str, Any]  # of the libraries that made the pixels
    files: Mapping[str, Mapping[str, Any]] = field(repr=False)  # path -> {"bytes", "sha256"}
    num_quarantined: int
    sizes: np.ndarray = field(repr=False)  # int32 [n, 2] (height, width)
    labels: np.ndarray = field(repr=False)  # int64 [n]

    @classmethod
    def load(cls, root: Path) -> "Manifest":
        """Return the shard set in `root`.

        Every listed file must be there with its size in bytes; contents are `verify`'s business.

        Raises:
            DataError: no manifest, another format, or a file is missing or has another size.
        """
        root = Path(root)
        data = read_manifest(root)
        files = data["files"]
        for name, entry in files.items():
            path = root / name
            if not path.is_file():
                raise DataError(f"{path}: missing from the shard set; convert it again")
            if path.stat().st_size != entry["bytes"]:
                raise DataError(
                    f"{path}: {path.stat().st_size:,} bytes where the manifest says "
                    f"{entry['bytes']:,}; convert it again"
                )
        count = data["num_images"]
        return cls(
            root=root,
            num_images=count,
            formats=tuple(data["formats"]),
            classes=tuple(data["classes"]),
            source=data["source"],
            options=data["options"],
            versions=data["versions"],
            files=files,
            num_quarantined=data["num_quarantined"],
            sizes=load_array(root / "sizes.npy", np.dtype(np.int32), (count, 2)),
            labels=load_array(root / "labels.npy", np.dtype(np.int64), (count,)),
        )

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The id of each record: its path within the source."""
        path = self.root / "names.txt"
        try:
            names = tuple(plain_json.parse(line) for line in path.read_bytes().splitlines())
            if not all(isinstance(name, str) for name in names):
                raise ValueError
        except ValueError:
            raise DataError(f"{path}: not a JSON string a line; convert the set again") from None
        if len(names) != self.num_images:
            raise DataError(f"{path}: {len(names)} names for {self.num_images} images")
        return names

    @cached_property
    def checksums(self) -> np.ndarray:
        """uint8 [n, 16], blake2b-128 of each record's JPEG bytes."""
        shape = (self.num_images, 16)
        return load_array(self.root / "checksums.npy", np.dtype(np.uint8), shape)

    @property
    def shards(self) -> list[Path]:
        """The tar shards in the order of their records; empty without format "dali"."""
        return [self.root / name for name in sorted(self.files) if name.endswith(".tar")]

    @property
    def beton(self) -> Path:
        """The FFCV file; it exists where "ffcv" is among the formats."""
        return self.root / BETON


class RecordReader:
    """Random access to the JPEG bytes of a complete shard set.

    Safe to share between threads and across fork (positional reads only), and picklable (it reopens).
    `close()` closes the files at once; otherwise they go with the reader.
    """

    def __init__(self, manifest: Manifest, kind: str | None = None) -> None:
        """Open the shards of format `kind`: "ffcv" where there are any, unless told otherwise.

        Its table of a million records is read in 0.2 s, the text of DALI's index in 4 s and 0.4 GB.
        """
        self.manifest = manifest
        self._kind = kind or ("ffcv" if "ffcv" in manifest.formats else "dali")
        if self._kind == "dali":
            paths = manifest.shards
            located = [read_index(path.with_suffix(".idx")) for path in paths]
            offsets = np.concatenate([table[:, 0] for table in located])
            lengths = np.concatenate([table[:, 1] for table in located])
            owner = np.repeat(np.arange(len(located)), [len(table) for table in located])
        else:
            paths = [manifest.beton]
            try:
                offsets, lengths = read_allocations(manifest.beton)
            except ValueError as error:
                raise DataError(f"{error}; convert it again") from None
            owner = np.zeros(len(offsets), dtype=np.int64)
        if len(offsets) != manifest.num_images:
            raise DataError(
                f"{manifest.root}: its index holds {len(offsets)} records, its manifest "
                f"{manifest.num_images}; convert it again"
            )
        ends = np.array([path.stat().st_size for path in paths], np.int64)[owner]
        if (offsets < 0).any() or (lengths < 1).any() or (lengths > ends - offsets).any():
            raise DataError(
                f"{manifest.root}: its index points outside its files; convert it again"
            )
        self._paths, self._offsets, self._lengths, self._owner = paths, offsets, lengths, owner
        self._files: list[int] = []
        self.close = weakref.finalize(self, _close_all, self._files)
        try:
            self._files.extend(os.open(path, os.O_RDONLY) for path in paths)
        except OSError as error:
            self.close()
            raise DataError(
                f"{manifest.root}: its {len(paths)} files cannot be opened together ({error.strerror}); "
                "where they are too many raise `ulimit -n`, or convert with a larger --shard-mib"
            ) from None

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, index: int) -> bytes:
        """Return the JPEG bytes of one record.

        Raises:
            DataError: the file ends before the record does.
        """
        owner, length = int(self._owner[index]), int(self._lengths[index])
        data = os.pread(self._files[owner], length, int(self._offsets[index]))
        if len(data) != length:
            raise DataError(f"{self._paths[owner]}: ends within record {index}; convert it again")
        return data

    def __enter__(self) -> "RecordReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[[Path, str], "RecordReader"], tuple[Path, str]]:
        return _reopen, (self.manifest.root, self._kind)


def record_checksum(data: bytes | memoryview) -> bytes:
    """Return the 16 bytes that stand for one record in checksums.npy."""
    return hashlib.blake2b(data, digest_size=16).digest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_index(path: Path) -> np.ndarray:
    """Return int64 [n, 2], (offset, length) of each `.jpg` named by a webdataset index file.

    Raises:
        DataError: the file is not an index as written here.
    """
    try:
        lines = path.read_text().splitlines()
        version, count = lines[0].split()
        rows = [line.split() for line in lines[1:]]
        table = np.array([[int(row[1]), int(row[2])] for row in rows], dtype=np.int64)
        table = table.reshape(int(count), 2)
    except (IndexError, ValueError, OverflowError):
        raise DataError(f"{path}: not a webdataset index; convert the set again") from None
    if version != "v1.2" or any(row[0] != "jpg" for row in rows):
        raise DataError(f"{path}: not an index of this project; convert the set again")
    return table


def load_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Return the array in an .npy file, which must have this type and shape.

    Raises:
        DataError: it has not.
    """
    try:
        # Mapped first: a header may claim any size, a map only what the file has.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception:  # a damaged header can raise anything at all
        raise DataError(f"{path}: not readable as an array; convert the set again") from None
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: an archive of arrays, not one; convert the set again")
    if array.dtype != dtype or array.shape != shape:
        raise DataError(
            f"{path}: {array.dtype} {list(array.shape)} where {dtype} {list(shape)} is expected; "
            "convert the set again"
        )
    return np.array(array)


def read_manifest(root: Path) -> dict[str, Any]:
    """Return the content of a manifest; the files it lists are not looked at.

    Raises:
        DataError: there is none, it is not finished, or of another format.
    """
    path = root / MANIFEST
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; make one with `make shards OUT={root} ...`")
    if (root / ".work").is_dir() and not path.is_file():
        raise DataError(
            f"{root}: its conversion is not finished; repeat the command that began it to continue"
        )
    if not path.is_file():
        raise DataError(f"{root}: no {MANIFEST}, so not a shard set; make one with `make shards`")
    try:
        data = plain_json.read(path)
        known = data["format"]
        missing = [key for key in KEYS if key not in data]
    except (OSError, ValueError, TypeError, KeyError):
        raise DataError(f"{path}: not readable as a manifest; convert the set again") from None
    if known != FORMAT:
        raise DataError(
            f"{path}: format {known!r:.40} where this code reads {FORMAT!r}; convert again"
        )
    if missing:
        raise DataError(f"{path}: lacks {', '.join(missing)}; convert the set again")
    wrong = [key for key, kind in KEYS.items() if not isinstance(data[key], kind)]
    if not wrong:
        wrong = [key for key, sound in _CHECKS.items() if not sound(data)]
    if wrong:
        raise DataError(f"{path}: garbled at {', '.join(wrong)}; convert the set again")
    return data


def _are_entries(files: Mapping[str, Any]) -> bool:
    """Return whether these are files below the set's folder, each with its size and hash."""
    return all(
        isinstance(entry, dict)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("sha256"), str)
        and not PurePath(name).is_absolute()
        and ".." not in PurePath(name).parts
        and "\0" not in name
        for name, entry in files.items()
    )


def _are_formats(data: Mapping[str, Any]) -> bool:
    """Return whether these are formats, each with its files."""
    made = data["formats"]
    listed = {
        "ffcv": BETON in data["files"],
        "dali": any(n.endswith(".tar") for n in data["files"]),
    }
    return bool(made) and all(isinstance(kind, str) and listed.get(kind, False) for kind in made)


_CHECKS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "num_images": lambda data: data["num_images"] >= 1,
    "files": lambda data: _are_entries(data["files"]),
    "formats": _are_formats,
    "classes": lambda data: all(isinstance(name, str) for name in data["classes"]),
}


def _close_all(files: list[int]) -> None:
    for file in files:
        os.close(file)


def _reopen(root: Path, kind: str) -> RecordReader:
    return RecordReader(Manifest.load(root), kind)
