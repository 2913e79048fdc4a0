"""Parts to finished shards, and the manifest that closes a shard set."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dataprep.files import replacing, sync_folder, write_whole
from dataprep.manifest import BETON, MANIFEST, file_sha256
from dataprep.parts import Records, payloads
from dataprep.progress import Progress
from dataprep.write_dali import plan_shards, write_shard
from dataprep.write_ffcv import write_beton

Entry = dict[str, Any]  # {"bytes", "sha256"} of a finished file


def assemble(
    out: Path,
    work: Path,
    formats: tuple[str, ...],
    shard_bytes: int,
    records: Records,
    progress: Progress,
) -> dict[str, Entry]:
    """Write the shards of each format and return {relative path: entry} of their files.

    A shard finished before is kept if its content still has the sha256 noted then.
    """
    files: dict[str, Entry] = {}

    def counted(start: int, stop: int) -> Iterator[memoryview]:
        for payload in payloads(records, start, stop):
            yield payload
            progress.add(1, len(payload), 0)

    if "ffcv" in formats:

        def beton(file: BinaryIO) -> Entry:
            sha256, size = write_beton(
                file,
                sizes=records.sizes,
                labels=records.labels,
                lengths=records.lengths,
                payloads=counted(0, len(records.names)),
            )
            return {"bytes": size, "sha256": sha256}

        files[BETON] = _once(out, work, BETON, beton)
    if "dali" in formats:
        for number, (start, stop) in enumerate(plan_shards(records.lengths, shard_bytes)):
            name = f"dali/shard-{number:06d}"

            def shard(
                file: BinaryIO, start: int = start, stop: int = stop, name: str = name
            ) -> Entry:
                sha256, size, index = write_shard(
                    file,
                    start=start,
                    labels=records.labels[start:stop],
                    payloads=counted(start, stop),
                )
                write_whole(out / f"{name}.idx", index, work)
                return {"bytes": size, "sha256": sha256}

            # the index is written before its tar takes its name, so the tar's note covers both
            files[f"{name}.tar"] = _once(out, work, f"{name}.tar", shard, also=[f"{name}.idx"])
            files[f"{name}.idx"] = _entry(out / f"{name}.idx")
    return files


def write_manifest(
    out: Path,
    work: Path,
    content: dict[str, Any],
    files: dict[str, Entry],
    records: Records,
    skipped: list[tuple[str, str]],
) -> None:
    """Write the arrays and lists of a shard set, then its manifest."""
    lists = {"quarantine.jsonl": records.quarantined, "skipped.jsonl": skipped}
    contents = {
        "sizes.npy": _npy(records.sizes),
        "labels.npy": _npy(records.labels),
        "checksums.npy": _npy(records.checksums),
        "names.txt": _lines(records.names),
    } | {
        name: _lines({"name": path, "reason": reason} for path, reason in items)
        for name, items in lists.items()
    }
    for name, data in contents.items():
        write_whole(out / name, data, work)
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    content |= {"num_quarantined": len(records.quarantined), "num_skipped": len(skipped)}
    content["files"] = {name: files[name] for name in sorted(files)}
    write_whole(out / MANIFEST, (json.dumps(content, indent=1) + "\n").encode(), work)
    sync_folder(out)


def _once(
    out: Path, work: Path, name: str, write: Callable[[BinaryIO], Entry], also: Iterable[str] = ()
) -> Entry:
    """Return the entry of a finished shard; `write` it unless it is there, unharmed."""
    note = work / f"{Path(name).name}.json"
    path = out / name
    if note.is_file() and path.is_file() and all((out / other).is_file() for other in also):
        entry = json.loads(note.read_text())
        if file_sha256(path) == entry["sha256"]:
            return entry
    with replacing(path, work) as file:
        entry = write(file)
    write_whole(note, json.dumps(entry).encode(), work)
    return entry


def _entry(path: Path) -> Entry:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _npy(array: np.ndarray) -> bytes:
    file = BytesIO()
    np.save(file, array)
    return file.getvalue()


def _lines(values: Iterable[Any]) -> bytes:
    return "".join(f"{json.dumps(value)}\n" for value in values).encode()
