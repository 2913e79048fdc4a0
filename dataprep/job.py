"""What is converted into what, and whether a folder holds that very conversion already."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataprep import plain_json
from dataprep.encode import EncodeOptions, versions
from dataprep.files import write_whole
from dataprep.manifest import MANIFEST, DataError, Manifest
from dataprep.sources import Listing

WORK = ".work"


@dataclass(frozen=True)
class Job:
    """What is converted into what: all that decides about the bytes of the shard set."""

    dataset: str  # one of sources.DATASETS
    source: Path
    split: str
    out: Path
    formats: tuple[str, ...] = ("ffcv", "dali")
    encode: EncodeOptions = field(default_factory=EncodeOptions)
    shard_bytes: int = 256 << 20  # of a tar
    limit: int = 0  # only the first so many images; 0: all

    def describe(self) -> dict[str, Any]:
        """Return the job as the manifest has it."""
        source = {"dataset": self.dataset, "path": str(self.source), "split": self.split}
        return {
            "formats": list(self.formats),
            "source": source | {"limit": self.limit},
            "options": self.encode.as_dict() | {"shard_bytes": self.shard_bytes},
        }


def check_target(job: Job) -> Path:
    """Return OUT's working folder, there or not; OUT must be new, empty, or begun before."""
    work = job.out / WORK
    if job.out.exists() and not job.out.is_dir():
        raise DataError(f"{job.out}: is a file; give a folder as OUT")
    if job.out.is_dir() and not work.is_dir() and any(job.out.iterdir()):
        raise DataError(f"{job.out}: holds files but no {MANIFEST}; give a new folder as OUT")
    root = (job.source / job.split).resolve()
    if root.is_dir() and job.out.resolve().is_relative_to(root):
        raise DataError(f"{job.out}: lies within the source {root}; give another OUT")
    return work


def check_complete(job: Job) -> Manifest:
    """Return the shard set in OUT, which must be finished and made by this job."""
    manifest = Manifest.load(job.out)
    begun = {"source": manifest.source, "options": manifest.options}
    _compare(job, begun | {"formats": list(manifest.formats)}, job.describe(), "a shard set")
    shutil.rmtree(job.out / WORK, ignore_errors=True)
    return manifest


def same_job(job: Job, listing: Listing, work: Path) -> bool:
    """Return whether this job was begun in OUT before; if nothing was, note it down.

    Raises:
        DataError: another job was begun there, or the source or a library has changed since.
    """
    mine = job.describe() | {"listing": listing.digest(), "versions": versions()}
    path = work / "job.json"
    if not path.is_file():
        write_whole(path, json.dumps(mine).encode(), work)
        return False
    try:
        found = plain_json.read(path)
        begun = {key: found[key] for key in mine}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: not readable; delete {job.out} to begin anew") from None
    _compare(job, begun, mine, "an unfinished conversion")
    for key, what in (("listing", "the source has changed"), ("versions", "a library has changed")):
        if begun[key] != mine[key]:
            raise DataError(
                f"{job.out}: {what} since its conversion began; delete it to begin anew"
            )
    return True


def _compare(job: Job, begun: dict[str, Any], mine: dict[str, Any], what: str) -> None:
    """Raise unless two jobs agree; the first difference is named."""
    for section in ("source", "options"):
        for key, value in mine[section].items():
            if begun[section].get(key) != value:
                raise DataError(
                    f"{job.out}: holds {what} with {key} {begun[section].get(key)!r}, not "
                    f"{value!r}; repeat the command with that, give another OUT, or delete it"
                )
    if begun["formats"] != mine["formats"]:
        raise DataError(
            f"{job.out}: holds {what} with format {'+'.join(begun['formats'])}, not "
            f"{'+'.join(mine['formats'])}; give another OUT, or delete it"
        )
