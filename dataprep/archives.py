"""Images inside zip and tar files: where each lies, and its bytes, without unpacking anything."""

import stat
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from dataprep.manifest import DataError

ENTRY = np.dtype(
    [
        ("label", "<i8"),  # class index, -1: none
        ("size", "<i8"),  # bytes of the image file
        ("stamp", "<i8"),  # time of change in ns, of the file or of the archive
        ("offset", "<i8"),  # within the archive, -1: a file of its own
        ("packed", "<i8"),  # bytes it takes in the archive
        ("crc", "<u4"),  # of the image file, 0: not known
        ("method", "<u1"),  # TAR, ZIP_STORED, ZIP_DEFLATED
    ]
)
TAR, ZIP_STORED, ZIP_DEFLATED = 0, 1, 2
LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # of a zip member: PKWARE's APPNOTE, 4.3.7


class Found(NamedTuple):
    """One file of a source."""

    name: str
    size: int
    stamp: int
    offset: int = -1
    packed: int = 0
    crc: int = 0
    method: int = TAR


Scanned = tuple[
    list[Found], list[tuple[str, str]]
]  # files, and (name, reason) of what was left out


def scan_zip(path: Path, split: str) -> Scanned:
    """Return the files below `split/` in a zip file, named with it.

    Raises:
        DataError: not a readable zip, or nothing below `split/`.
    """
    stamp = path.stat().st_mtime_ns
    found: list[Found] = []
    skipped: list[tuple[str, str]] = []
    prefix = f"{split}/" if split else ""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:  # of a damaged directory zipfile raises anything at all
        raise DataError(f"{path}: not readable as a zip file: {error}") from None
    for member in members:
        name = member.filename
        if member.is_dir() or not name.startswith(prefix):
            continue
        if _hidden(name[len(prefix) :]):
            skipped.append((name, "hidden"))
        elif stat.S_ISLNK(member.external_attr >> 16):
            skipped.append((name, "a link within an archive"))
        elif member.flag_bits & 1:
            skipped.append((name, "encrypted"))
        elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            skipped.append((name, "packed with a method other than deflate"))
        else:
            stored = member.compress_type == zipfile.ZIP_STORED
            method = ZIP_STORED if stored else ZIP_DEFLATED
            place = (member.header_offset, member.compress_size, member.CRC)
            found.append(Found(name, member.file_size, stamp, *place, method))
    if not found:
        tops = sorted({member.filename.split("/")[0] for member in members})[:8]
        raise DataError(f"{path}: no files below {split!r} (it has {', '.join(tops) or 'nothing'})")
    return found, skipped


def scan_tar(path: Path, split: str) -> Scanned:
    """Return the files of a tar file and of the tar files in it, as `split/class/file`.

    A tar within gives its stem as the class folder: the layout of ILSVRC2012_img_train.tar.

    Raises:
        DataError: not a readable, uncompressed tar.
    """
    stamp = path.stat().st_mtime_ns
    found: list[Found] = []
    skipped: list[tuple[str, str]] = []
    prefix = f"{split}/" if split else ""

    def scan(file: BinaryIO, start: int, folder: str, nested: bool) -> None:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                name = name if name.startswith(folder) else folder + name
                offset = start + member.offset_data
                if member.isdir():
                    continue
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    skipped.append((name, "a link or special file within an archive"))
                elif _hidden(name[len(folder) :]):
                    skipped.append((name, "hidden"))
                elif not nested and name.endswith(".tar"):
                    inner = _Window(file, offset, member.size)
                    scan(inner, offset, f"{name.removesuffix('.tar')}/", True)  # type: ignore[arg-type]
                else:
                    found.append(Found(name, member.size, stamp, offset, member.size))

    try:
        with path.open("rb") as file:
            scan(file, 0, prefix, False)
    except (tarfile.TarError, OSError, ValueError, IndexError, OverflowError) as error:
        raise DataError(f"{path}: not readable as an uncompressed tar file: {error}") from None
    return found, skipped


def open_member(archive: BinaryIO, offset: int, packed: int, method: int, limit: int) -> bytes:
    """Return the first `limit` bytes of a member.

    Raises:
        ValueError, zlib.error: the archive is damaged there.
    """
    archive.seek(offset)
    if method == TAR:
        return archive.read(min(packed, limit))
    header = archive.read(LOCAL_HEADER.size)
    if len(header) < LOCAL_HEADER.size or header[:4] != b"PK\3\4":
        raise ValueError("no zip member where one should be")
    name_length, extra_length = LOCAL_HEADER.unpack(header)[-2:]
    archive.seek(name_length + extra_length, 1)
    if method == ZIP_STORED:
        return archive.read(min(packed, limit))
    # never more than `limit` bytes come out, whatever the archive claims
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(archive.read(packed), max(limit, 1))


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


class _Window:
    """A stretch of a file, as the file that tarfile wants."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self.file, self.start, self.size = file, start, size
        self.position = 0

    def read(self, size: int = -1) -> bytes:
        left = self.size - self.position
        self.file.seek(self.start + self.position)
        data = self.file.read(left if size < 0 else max(0, min(size, left)))
        self.position += len(data)
        return data

    def seek(self, position: int, whence: int = 0) -> int:
        self.position = position + (0, self.position, self.size)[whence]
        return self.position

    def tell(self) -> int:
        return self.position
