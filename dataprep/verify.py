"""A shard set against its manifest: every file, every record, every index."""

import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dataprep.encode import BadImage, check_decodes
from dataprep.manifest import (
    MANIFEST,
    DataError,
    Manifest,
    RecordReader,
    file_sha256,
    read_index,
    read_manifest,
    record_checksum,
)
from dataprep.write_ffcv import read_allocations, read_samples

MOST = 10  # problems of one kind that are named; the rest are counted
STRETCH = 256  # records a thread takes at a time


def verify(root: Path, deep: bool = True, workers: int = 1) -> list[str]:
    """Return what is wrong with a shard set, one sentence each; an empty list is what one hopes for.

    Args:
        root: the folder of the shard set.
        deep: also check every record of every format: its checksum, that it decodes in full to the
            size in the manifest, its label, and its place in the index.
        workers: number of threads.
    """
    try:
        listed = read_manifest(root)["files"]
    except DataError as error:
        return [str(error)]
    problems = [f"{root / name}: not in the manifest" for name in _found(root) - set(listed)]
    with ThreadPoolExecutor(workers) as threads:
        checks = threads.map(lambda item: _check_file(root / item[0], item[1]), listed.items())
        problems += [problem for problem in checks if problem]
        if any(not _has_size(root / name, entry) for name, entry in listed.items()):
            return sorted(problems)
        try:
            manifest = Manifest.load(root)
            problems += _check_arrays(manifest)
            if deep:
                for kind in manifest.formats:
                    problems += _most(_check_records(manifest, kind, threads))
        except (DataError, OSError) as error:
            problems.append(str(error))
    return sorted(set(problems))


def _found(root: Path) -> set[str]:
    """Return the relative paths of all files there but the manifest and unfinished work."""
    paths = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return {str(path) for path in paths if path.parts[0] not in (MANIFEST, ".work")}


def _check_file(path: Path, entry: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path}: missing"
    if not _has_size(path, entry):
        size = path.stat().st_size
        return f"{path}: {size:,} bytes where the manifest says {entry['bytes']:,}"
    if file_sha256(path) != entry["sha256"]:
        return f"{path}: its content is not what the manifest's sha256 says"
    return None


def _has_size(path: Path, entry: dict[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == entry["bytes"]


def _check_arrays(manifest: Manifest) -> Iterator[str]:
    """Yield what does not fit together among the arrays, the names and the metadata of FFCV."""
    root = manifest.root
    if (manifest.sizes <= 0).any():
        yield f"{root / 'sizes.npy'}: has sizes below one pixel"
    known = len(manifest.classes)
    if manifest.labels.min() < -1 or manifest.labels.max() >= known:
        yield f"{root / 'labels.npy'}: has labels outside of the {known} classes"
    if "ffcv" in manifest.formats:
        try:
            sizes, labels, addresses = read_samples(manifest.beton)
            offsets, _ = read_allocations(manifest.beton)
        except ValueError as error:
            yield str(error)
            return
        pairs = (
            ("sizes", sizes, manifest.sizes),
            ("labels", labels, manifest.labels),
            ("addresses", addresses, offsets),
        )
        for what, mine, other in pairs:
            if not np.array_equal(mine, other):
                yield f"{manifest.beton}: its {what} are not those of the manifest"


def _check_records(manifest: Manifest, kind: str, threads: ThreadPoolExecutor) -> Iterator[str]:
    """Yield what is wrong with the records of one format."""
    decode = kind == manifest.formats[0]  # equal checksums make the other format's equal
    stretches = range(0, manifest.num_images, STRETCH)
    with RecordReader(manifest, kind) as reader:

        def check(start: int) -> list[str]:
            stop = min(start + STRETCH, manifest.num_images)
            found = (_check_record(manifest, reader, kind, i, decode) for i in range(start, stop))
            return [problem for problem in found if problem]

        for problems in threads.map(check, stretches):
            yield from problems
    if kind == "dali":
        for problems in threads.map(lambda path: _check_shard(path, manifest), manifest.shards):
            yield from problems


def _check_record(
    manifest: Manifest, reader: RecordReader, kind: str, index: int, decode: bool
) -> str | None:
    where = f"{manifest.root}: record {index} ({manifest.names[index]}) in format {kind}"
    data = reader.read(index)
    if record_checksum(data) != manifest.checksums[index].tobytes():
        return f"{where}: its bytes do not have the checksum in the manifest"
    if decode:
        try:
            if check_decodes(data) != tuple(manifest.sizes[index]):
                return f"{where}: not of the size in the manifest"
        except BadImage as error:
            return f"{where}: does not decode: {error}"
    return None


def _check_shard(path: Path, manifest: Manifest) -> list[str]:
    """Return where a tar, its index and the labels disagree."""
    problems: list[str] = []
    index_path = path.with_suffix(".idx")
    places = {(int(offset), int(length)) for offset, length in read_index(index_path)}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name, _, extension = member.name.partition(".")
                if extension == "jpg":
                    if (member.offset_data, member.size) not in places:
                        problems.append(f"{index_path}: {member.name} does not lie where it says")
                    continue
                file = archive.extractfile(member)
                label = file.read() if file else b""
                if label != str(manifest.labels[int(name)]).encode():
                    problems.append(f"{path}: {member.name} has another label than the manifest")
    except (tarfile.TarError, ValueError, IndexError) as error:
        problems.append(f"{path}: not readable as a tar: {error}")
    return problems


def _most(problems: Iterable[str]) -> Iterator[str]:
    """Yield the first problems, and how many more there are."""
    count = 0
    for count, problem in enumerate(problems, 1):
        if count <= MOST:
            yield problem
    if count > MOST:
        yield f"... and {count - MOST} more of this kind"
