"""A source to a complete shard set, in four steps that each survive being killed.

1. List the source. 2. Encode it in parts, many workers side by side (`parts.py`). 3. Put the shards
together from the parts. 4. Write the manifest, and remove the parts.

Everything that is finished has its final name and was renamed into it, so the same command run
again checks what is there and goes on; the result depends on the source and the options alone.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TextIO

from dataprep.assemble import assemble, write_manifest
from dataprep.encode import versions
from dataprep.files import explain, locked, write_whole
from dataprep.job import Job, check_complete, check_target, same_job
from dataprep.manifest import FORMAT, MANIFEST, DataError
from dataprep.parts import (
    Ended,
    PartTask,
    Records,
    Reused,
    Started,
    encode_part,
    gather,
    plan_parts,
)
from dataprep.pool import run_tasks
from dataprep.progress import Progress, duration, reasons, size, spread, table
from dataprep.sources import Listing, list_source

MANY_BAD = 100  # fewer never stop a conversion halfway: its end names them all
EXAMPLES = 10  # of bad files that a stopped conversion shows


@dataclass(frozen=True)
class Manner:
    """How a job is done; nothing of it shows in the result."""

    workers: int  # processes
    max_bad: float  # share of the files that may be bad; above it no shard is written
    stream: TextIO  # where progress goes
    say: Callable[[str], None]  # takes the sentences and tables for the user


def convert(job: Job, manner: Manner) -> None:
    """Convert, continue a conversion, or find it complete.

    Raises:
        DataError: the source or the target cannot be used, too many images are bad, the disk is
            full. What is done stays, and the same command continues.
    """
    try:
        if (job.out / MANIFEST).is_file():
            count = check_complete(job).num_images
            manner.say(f"{job.out}: already complete, {count:,} images; delete it to convert again")
            return
        work = check_target(job)
        manner.say(f"listing {job.source / job.split} ...")
        listing = list_source(job.dataset, job.source, job.split)
        if job.limit:
            listing = replace(listing.part(0, job.limit), skipped=listing.skipped)
        work.mkdir(parents=True, exist_ok=True)
        with locked(work):
            if not (job.out / MANIFEST).is_file():
                _convert(job, listing, work, manner)
        shutil.rmtree(work)
    except OSError as error:
        raise explain(error, job.out) from None


def _convert(job: Job, listing: Listing, work: Path, manner: Manner) -> None:
    began = time.monotonic()
    for stale in work.glob("*.tmp"):  # a killed process leaves what it was writing
        stale.unlink(missing_ok=True)
    if same_job(job, listing, work):
        manner.say(f"continuing what was begun in {job.out}")
    if versions()["simplejpeg"] is None:
        manner.say("simplejpeg is not installed: JPEG damage that Pillow overlooks will pass")
    progress = Progress(len(listing), manner.stream)
    try:
        paths = _encode(job, listing, work, manner, progress)
    finally:
        progress.close()
    workers = f"{manner.workers} worker" + ("s" if manner.workers > 1 else "")
    encoding = f"encoded in {duration(progress.seconds)} at {progress.rates()} by {workers}"
    records = gather(paths)
    if len(records.quarantined) > manner.max_bad * len(listing):
        _too_many_bad(job, work, records.quarantined, progress, manner)
    if not records.names:
        raise DataError(f"{job.source}: none of its {len(listing)} images can be used")
    manner.say(f"writing {' and '.join(job.formats)} shards of {len(records.names):,} images ...")
    writing = Progress(len(records.names) * len(job.formats), manner.stream)
    try:
        files = assemble(job.out, work, job.formats, job.shard_bytes, records, writing)
    finally:
        writing.close()
    content = {"format": FORMAT, "num_images": len(records.names)} | job.describe()
    content |= {"classes": list(listing.classes), "versions": versions()}
    write_manifest(job.out, work, content, files, records, listing.skipped)
    rows = _summary(job, listing, records, files)
    if progress.reused:
        rows.append(("encoded before", f"{progress.reused:,} images"))
    fresh = progress.done > progress.reused
    total = duration(time.monotonic() - began)
    rows.append(("time", f"{total}; {encoding}" if fresh else total))
    manner.say(f"{job.out} is complete:\n{table(rows)}")


def _encode(
    job: Job, listing: Listing, work: Path, manner: Manner, progress: Progress
) -> list[Path]:
    """Make all parts and return their paths in order."""
    count = len(listing)
    tasks = [
        PartTask(index, listing.part(start, stop), work, job.encode)
        for index, (start, stop) in enumerate(plan_parts(listing))
    ]
    bad: list[tuple[str, str]] = []

    def hear(message: Started | Ended | Reused) -> str | None:
        if isinstance(message, Started):
            return message.name
        if isinstance(message, Ended):
            if message.refused:
                bad.append((message.name, message.refused))
            progress.add(1, message.bytes_in, message.refused is not None)
        else:
            bad.extend(message.quarantined)
            progress.add(message.files, 0, len(message.quarantined), reused=True)
        if len(bad) > max(manner.max_bad * count, MANY_BAD):
            _too_many_bad(job, work, bad, progress, manner)
        return None

    for _ in run_tasks(encode_part, tasks, workers=min(manner.workers, len(tasks)), hear=hear):
        pass
    return [task.path for task in tasks]


def _too_many_bad(
    job: Job, work: Path, bad: list[tuple[str, str]], progress: Progress, manner: Manner
) -> NoReturn:
    """Show what is bad, note all of it down, and stop the conversion."""
    bad = sorted(bad)
    path = work / "quarantine.jsonl"
    lines = (json.dumps({"name": name, "reason": reason}) + "\n" for name, reason in bad)
    write_whole(path, "".join(lines).encode(), work)
    more = [("...", f"all in {path}")] if len(bad) > EXAMPLES else []
    manner.say(f"bad: {reasons(bad)}\n{table([*bad[:EXAMPLES], *more])}")
    raise DataError(
        f"{job.source}: {len(bad):,} bad among {progress.done:,} images, where --max-bad "
        f"{manner.max_bad:g} allows {int(manner.max_bad * progress.total):,} of "
        f"{progress.total:,}; repeat the command with a larger --max-bad to leave them out, or "
        f"repair them, delete {job.out} and begin anew"
    )


def _summary(
    job: Job, listing: Listing, records: Records, files: dict[str, dict[str, Any]]
) -> list[tuple[str, str]]:
    """Return the rows of the table at the end."""
    bad, skipped = reasons(records.quarantined), reasons(listing.skipped)
    stored = sum(entry["bytes"] for entry in files.values())
    return [
        ("images", f"{len(records.names):,} of {len(listing):,}"),
        ("classes", f"{len(listing.classes):,}" if listing.classes else "none"),
        ("quarantined", f"{bad} (quarantine.jsonl)" if bad else "none"),
        ("skipped files", f"{skipped} (skipped.jsonl)" if skipped else "none"),
        ("read", size(records.bytes_in)),
        ("stored", f"{size(stored)} as {' and '.join(job.formats)}"),
        ("shorter side", f"{spread(records.sizes.min(axis=1))} px (min / median / max)"),
        ("longer side", f"{spread(records.sizes.max(axis=1))} px"),
        ("record", f"{spread(records.lengths)} bytes"),
    ]
