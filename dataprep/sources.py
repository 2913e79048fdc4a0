"""Where images come from: folder trees, zip files, and tar files of tar files, read in place.

A source is listed once, in the order of its paths as bytes. Archives are never unpacked and never
trusted: a member's name is an id and nothing else. The same images give the same ids, so the same
shards, from a folder as from its official archive.
"""

import hashlib
import os
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dataprep.archives import ENTRY, Found, open_member, scan_tar, scan_zip
from dataprep.manifest import DataError

DATASETS = ("coco", "imagenet", "folder", "scenes")
DEFAULT_SPLIT = {"coco": "train2017", "imagenet": "train", "folder": "", "scenes": "train2017"}
OFFICIAL_TAR = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
# fmt: off
EXTENSIONS = frozenset([
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".jp2", ".j2k",
])
# fmt: on
LARGEST_FILE = 256 << 20  # bytes; anything above is no photograph


class SourceChanged(DataError):
    """A file is not what it was when the source was listed."""


class Unreadable(ValueError):
    """One file cannot be read; the message is the reason for the quarantine list."""


@dataclass(frozen=True)
class Listing:
    """The images of a source, in their final order."""

    where: Path  # the folder the names are relative to, or the archive
    names: list[str]
    table: np.ndarray  # ENTRY [n]
    classes: tuple[str, ...]  # class names by label, empty where there are none
    skipped: list[tuple[str, str]]  # (name, reason) of files not taken for images

    def __len__(self) -> int:
        return len(self.names)

    def part(self, start: int, stop: int) -> "Listing":
        """Return the images [start, stop), without the list of what was skipped."""
        names, table = self.names[start:stop], self.table[start:stop]
        return replace(self, names=names, table=table, skipped=[])

    def digest(self) -> str:
        """Return a sha256 in hex of names, sizes, labels and times of change."""
        digest = hashlib.sha256(repr((str(self.where), self.classes)).encode())
        digest.update("\0".join(self.names).encode("utf-8", "surrogateescape"))
        digest.update(self.table.tobytes())
        return digest.hexdigest()


class Reader:
    """Reads the images of a listing; an archive is opened once."""

    def __init__(self, listing: Listing) -> None:
        self.listing = listing
        self._archive: BinaryIO | None = None
        if not listing.where.is_dir():
            try:
                self._archive = listing.where.open("rb")
            except OSError as error:
                raise SourceChanged(_changed(listing.where, error.strerror or "gone")) from None

    def read(self, index: int) -> bytes:
        """Return the bytes of one image file.

        Raises:
            SourceChanged: it is gone, or has another size or time of change than when listed.
            Unreadable: it cannot be read, or is larger than any photograph.
        """
        name, entry = self.listing.names[index], self.listing.table[index]
        if entry["size"] > LARGEST_FILE:
            raise Unreadable(f"file too large: {entry['size']:,} bytes")
        if self._archive is not None:
            _check(self._archive, self.listing.where, int(entry["stamp"]), None)
            return _read_member(self._archive, entry)
        path = self.listing.where / name
        try:
            with path.open("rb") as file:
                _check(file, path, int(entry["stamp"]), int(entry["size"]))
                return file.read()
        except FileNotFoundError:
            raise SourceChanged(_changed(path, "it is gone")) from None
        except OSError as error:
            raise Unreadable(f"unreadable: {error.strerror}") from None

    def close(self) -> None:
        """Close the archive, if there is one."""
        if self._archive is not None:
            self._archive.close()


def list_source(dataset: str, source: Path, split: str) -> Listing:
    """Return the images of `split` of a data set.

    Args:
        dataset: one of DATASETS; "scenes" is COCO's layout.
        source: the data set's folder, or its official archive (`train2017.zip`,
            `ILSVRC2012_img_train.tar`), or the folder such an archive lies in.
        split: the folder of images within the source; may be empty for "folder".

    Raises:
        DataError: nothing there, no images, or labels cannot be told.
    """
    if not source.exists():
        raise DataError(f"{source}: no such folder or archive; give the data set's place as SRC")
    archive = _archive(dataset, source, split)
    if archive is None:
        root = source / split
        if not root.is_dir():
            inside = ", ".join(sorted(p.name for p in source.iterdir())[:8]) or "nothing"
            raise DataError(f"{source}: no {split!r} in it (it has {inside}); give it as SPLIT")
        where, (found, skipped) = source, _scan_folder(source, split)
    elif archive.suffix == ".zip":
        where, (found, skipped) = archive, scan_zip(archive, split)
    else:
        where, (found, skipped) = archive, scan_tar(archive, split)
    return _listing(dataset, where, split, found, skipped)


def _archive(dataset: str, source: Path, split: str) -> Path | None:
    """Return the archive to read, or None for a folder."""
    if source.is_file():
        if source.suffix not in (".zip", ".tar"):
            raise DataError(f"{source}: not a folder, a .zip or an (uncompressed) .tar")
        return source
    if not split or (source / split).is_dir():
        return None
    official = OFFICIAL_TAR.get(split, "") if dataset == "imagenet" else f"{split}.zip"
    return source / official if official and (source / official).is_file() else None


def _scan_folder(source: Path, split: str) -> tuple[list[Found], list[tuple[str, str]]]:
    """Return the regular files below source/split, links followed, and what was left out."""
    found: list[Found] = []
    skipped: list[tuple[str, str]] = []
    top = (source / split).stat()
    stack = [(split, frozenset([(top.st_dev, top.st_ino)]))]
    while stack:
        folder, above = stack.pop()
        try:
            entries = list(os.scandir(source / folder))
        except OSError as error:
            raise DataError(f"{source / folder}: cannot be listed: {error.strerror}") from None
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith("."):
                skipped.append((name, "hidden"))
                continue
            try:
                status = entry.stat()
            except OSError as error:
                skipped.append((name, f"cannot be reached: {error.strerror}"))
                continue
            if entry.is_dir():
                identity = (status.st_dev, status.st_ino)
                if identity in above:
                    skipped.append((name, "a link to a folder above it"))
                else:
                    stack.append((name, above | {identity}))
            elif entry.is_file():
                found.append(Found(name, status.st_size, status.st_mtime_ns))
            else:
                skipped.append((name, "not a regular file"))
    return found, skipped


def _listing(
    dataset: str, where: Path, split: str, found: list[Found], skipped: list[tuple[str, str]]
) -> Listing:
    latest = {item.name: item for item in found}  # a later member replaces an earlier one
    repeated = Counter(item.name for item in found)
    skipped += [(name, "replaced by a later member") for name, n in repeated.items() if n > 1]
    images = []
    for name in sorted(latest, key=lambda name: name.encode("utf-8", "surrogateescape")):
        reason = _not_an_image(where, latest[name])
        if reason:
            skipped.append((name, reason))
        else:
            images.append(latest[name])
    skipped.sort(key=lambda item: item[0].encode("utf-8", "surrogateescape"))
    if not images:
        example = f" ({len(skipped)} skipped; {': '.join(skipped[0])})" if skipped else ""
        raise DataError(f"{where / split}: no images in it{example}")
    names = [item.name for item in images]
    labels, classes = _labels(dataset, where, split, names)
    table = np.zeros(len(images), dtype=ENTRY)
    for column in ("size", "stamp", "offset", "packed", "method", "crc"):
        table[column] = [getattr(item, column) for item in images]
    table["label"] = labels
    return Listing(where, names, table, classes, skipped)


def _not_an_image(where: Path, item: Found) -> str | None:
    """Return why a file is not taken for an image; one without a known extension is looked into."""
    if Path(item.name).suffix.lower() in EXTENSIONS:
        return None
    try:
        if item.offset < 0:
            with (where / item.name).open("rb") as file:
                head = file.read(16)
        else:
            with where.open("rb") as file:
                head = open_member(file, item.offset, item.packed, item.method, 16)
    except (OSError, ValueError, zlib.error):
        return "no image extension, and not readable"
    return None if _looks_like_image(head) else "no image extension, and no image inside"


def _looks_like_image(head: bytes) -> bool:
    starts = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*")
    return head.startswith(starts) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def _labels(
    dataset: str, where: Path, split: str, names: list[str]
) -> tuple[list[int], tuple[str, ...]]:
    """Return a label for each name (-1: none) and the class names.

    Classes are the folders directly below the split. ImageNet has them unless it is flat; any other
    folder has them when every image lies in exactly one of two or more of them.
    """
    none: tuple[list[int], tuple[str, ...]] = ([-1] * len(names), ())
    if dataset in ("coco", "scenes"):
        return none
    skip = len(split) + 1 if split else 0
    parts = [name[skip:].split("/") for name in names]
    depths = {len(part) for part in parts}
    if depths == {1}:
        return none
    if dataset == "imagenet" and 1 in depths:
        stray = next(name for name, part in zip(names, parts) if len(part) == 1)
        raise DataError(f"{where}: {stray} lies in no class folder; use DATASET=folder if intended")
    classes = sorted({part[0] for part in parts}, key=os.fsencode)
    if dataset == "folder" and (depths != {2} or len(classes) < 2):
        return none
    index = {name: label for label, name in enumerate(classes)}
    return [index[part[0]] for part in parts], tuple(classes)


def _read_member(archive: BinaryIO, entry: np.void) -> bytes:
    size, crc = int(entry["size"]), int(entry["crc"])
    try:
        data = open_member(
            archive, int(entry["offset"]), int(entry["packed"]), int(entry["method"]), size
        )
    except (OSError, ValueError, zlib.error) as error:
        raise Unreadable(f"unreadable: {error}") from None
    if len(data) != size or (crc and zlib.crc32(data) != crc):
        raise Unreadable("unreadable: the archive's checksum of it does not hold")
    return data


def _check(file: BinaryIO, path: Path, stamp: int, size: int | None) -> None:
    status = os.fstat(file.fileno())
    if status.st_mtime_ns != stamp or (size is not None and status.st_size != size):
        raise SourceChanged(_changed(path, "it was written to"))


def _changed(path: Path, how: str) -> str:
    return (
        f"{path}: changed while it was being converted ({how}); restore it and repeat the command, "
        "or delete OUT and begin anew"
    )
