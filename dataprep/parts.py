"""Parts: stretches of the source, encoded by workers, from which the shards are put together.

Part i holds the records of a fixed stretch of the listing: `part-000000.bin` has their JPEG bytes
one after the other, `part-000000.json`, written after it, everything else and a checksum of the
former. So a part is there whole or not at all, and whoever encodes it gets the same bytes.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataprep import plain_json
from dataprep.encode import BadImage, EncodeOptions, encode
from dataprep.files import replacing, write_whole
from dataprep.manifest import DataError, record_checksum
from dataprep.pool import Tell
from dataprep.sources import Listing, Reader, Unreadable

PART_BYTES = 256 << 20  # of source files


class Started(NamedTuple):
    """A worker's word: this is the file I open now."""

    name: str


class Ended(NamedTuple):
    """A worker's word: a file is done with."""

    name: str
    bytes_in: int
    bytes_out: int
    refused: str | None  # the reason, if it does not become a record


class Reused(NamedTuple):
    """A worker's word: this part was there already, and whole."""

    files: int
    quarantined: list[tuple[str, str]]


@dataclass(frozen=True)
class PartTask:
    """What a worker needs to make one part."""

    index: int
    listing: Listing  # the part's stretch
    work: Path  # where parts lie
    options: EncodeOptions

    @property
    def path(self) -> Path:
        """The file of JPEG bytes; its sidecar has suffix .json."""
        return self.work / f"part-{self.index:06d}.bin"


class Part(NamedTuple):
    """A finished part."""

    path: Path
    digest: str  # blake2b of the file
    num_records: int


@dataclass(frozen=True)
class Records:
    """Everything about the records of a conversion but their bytes, in their final order."""

    names: list[str]
    sizes: np.ndarray  # int32 [n, 2] (height, width)
    labels: np.ndarray  # int64 [n]
    lengths: np.ndarray  # int64 [n], bytes
    checksums: np.ndarray  # uint8 [n, 16]
    quarantined: list[tuple[str, str]]
    bytes_in: int
    parts: list[Part]  # where the bytes are


def plan_parts(listing: Listing) -> list[tuple[int, int]]:
    """Return the stretches [start, stop) of a listing that become parts.

    They do not show in the result. Small enough that a kill costs little and that a part fits into
    memory, large enough that there are not too many.
    """
    files = min(512, max(64, len(listing) // 64))
    parts: list[tuple[int, int]] = []
    start = size = 0
    for index, length in enumerate(listing.table["size"].tolist()):
        if index - start == files or (index > start and size + length > PART_BYTES):
            parts.append((start, index))
            start, size = index, 0
        size += length
    return [*parts, (start, len(listing))]


def encode_part(task: PartTask, tell: Tell) -> int:
    """Make one part, unless it is there and whole, and return its index."""
    part = _load(task.path)
    if part is not None and _digest(task.path) == part["digest"]:
        tell(Reused(len(task.listing), [(name, reason) for name, reason in part["quarantined"]]))
        return task.index
    part = {"names": [], "sizes": [], "labels": [], "lengths": [], "checksums": []}
    quarantined: list[tuple[str, str]] = []
    bytes_in = 0
    digest = hashlib.blake2b()
    reader = Reader(task.listing)
    with replacing(task.path, task.work) as file:
        for position, name in enumerate(task.listing.names):
            tell(Started(name))
            size = int(task.listing.table["size"][position])
            bytes_in += size
            try:
                record = encode(reader.read(position), task.options)
            except (BadImage, Unreadable) as error:
                quarantined.append((name, str(error)))
                tell(Ended(name, size, 0, str(error)))
                continue
            file.write(record.jpeg)
            digest.update(record.jpeg)
            part["names"].append(name)
            part["sizes"].append((record.height, record.width))
            part["labels"].append(int(task.listing.table["label"][position]))
            part["lengths"].append(len(record.jpeg))
            part["checksums"].append(record_checksum(record.jpeg).hex())
            tell(Ended(name, size, len(record.jpeg), None))
    reader.close()
    part |= {"digest": digest.hexdigest(), "quarantined": quarantined, "bytes_in": bytes_in}
    write_whole(task.path.with_suffix(".json"), json.dumps(part).encode(), task.work)
    return task.index


def gather(paths: list[Path]) -> Records:
    """Return what the sidecars of all parts say, in order."""
    parts = [part for path in paths if (part := _load(path)) is not None]
    assert len(parts) == len(paths), "a part is missing after encoding"

    def column(key: str) -> list[Any]:
        return [value for part in parts for value in part[key]]

    return Records(
        names=column("names"),
        sizes=np.array(column("sizes"), dtype=np.int32).reshape(-1, 2),
        labels=np.array(column("labels"), dtype=np.int64),
        lengths=np.array(column("lengths"), dtype=np.int64),
        checksums=np.frombuffer(bytes.fromhex("".join(column("checksums"))), np.uint8).reshape(
            -1, 16
        ),
        quarantined=[(name, reason) for name, reason in column("quarantined")],
        bytes_in=sum(part["bytes_in"] for part in parts),
        parts=[Part(path, part["digest"], len(part["names"])) for path, part in zip(paths, parts)],
    )


def payloads(records: Records, start: int, stop: int) -> Iterator[memoryview]:
    """Yield the JPEG bytes of records [start, stop), in order.

    Raises:
        DataError: a part has been damaged since it was written.
    """
    first = 0
    for part in records.parts:
        last = first + part.num_records
        if first < stop and last > start:
            data = part.path.read_bytes()
            if hashlib.blake2b(data).hexdigest() != part.digest:
                raise DataError(f"{part.path}: damaged on disk; repeat the command to renew it")
            end = 0
            for index in range(first, last):
                begin, end = end, end + int(records.lengths[index])
                if start <= index < stop:
                    yield memoryview(data)[begin:end]
        first = last


def _load(path: Path) -> dict[str, Any] | None:
    try:
        return plain_json.read(path.with_suffix(".json"))
    except (FileNotFoundError, ValueError):
        return None


def _digest(path: Path) -> str:
    try:
        return hashlib.blake2b(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return ""
