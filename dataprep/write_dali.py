"""Records to tar shards that DALI's webdataset reader and the webdataset library read.

Each record is two members, `{index:09d}.jpg` and `{index:09d}.cls` (the label in decimal). Beside
each shard lies DALI's index, version 1.2: a line a record with extension, offset, size and name of
both members.
"""

import hashlib
import tarfile
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np

BLOCK = tarfile.BLOCKSIZE


def plan_shards(lengths: np.ndarray, shard_bytes: int) -> list[tuple[int, int]]:
    """Return the records [start, stop) of each shard: as many as fit into `shard_bytes`, or one.

    Args:
        lengths: int64 [n], bytes of each record.
        shard_bytes: size of the tar file not to be exceeded.
    """
    shards: list[tuple[int, int]] = []
    start, used = 0, 2 * BLOCK  # the end of an archive
    for index, length in enumerate(lengths.tolist()):
        needs = 3 * BLOCK + _padded(length)
        if index > start and used + needs > shard_bytes:
            shards.append((start, index))
            start, used = index, 2 * BLOCK
        used += needs
    return [*shards, (start, len(lengths))]


def write_shard(
    file: BinaryIO, *, start: int, labels: np.ndarray, payloads: Iterable[bytes | memoryview]
) -> tuple[str, int, bytes]:
    """Write one tar and return its sha256 in hex, its size, and the content of its index file.

    Args:
        file: open for binary writing, at 0.
        start: index of the first record.
        labels: int64 [m] of the records of this shard.
        payloads: the JPEG bytes of each of them.
    """
    digest = hashlib.sha256()
    position = 0
    lines: list[str] = []

    def member(name: str, data: bytes | memoryview) -> str:
        nonlocal position
        for piece in (_header(name, len(data)), data, bytes(_padded(len(data)) - len(data))):
            file.write(piece)
            digest.update(piece)
            position += len(piece)
        offset = position - _padded(len(data))
        return f"{name.partition('.')[2]} {offset} {len(data)} {name}"

    for index, (label, payload) in enumerate(zip(labels.tolist(), payloads, strict=True), start):
        image = member(f"{index:09d}.jpg", payload)
        lines.append(f"{image} {member(f'{index:09d}.cls', str(label).encode())}")
    end = bytes(2 * BLOCK)
    file.write(end)
    digest.update(end)
    index_file = "".join(f"{line}\n" for line in [f"v1.2 {len(lines)}", *lines]).encode()
    return digest.hexdigest(), position + len(end), index_file


def _header(name: str, size: int) -> bytes:
    """Return a tar header that depends on nothing but name and size."""
    info = tarfile.TarInfo(name)  # mtime 0, uid and gid 0, mode 0644
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def _padded(length: int) -> int:
    return -(-length // BLOCK) * BLOCK
