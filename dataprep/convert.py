"""A source to a complete shard set, in four steps that each survive being killed.

1. List the source. 2. Encode it in parts, many workers side by side (`parts.py`). 3. Put the shards
together from the parts. 4. Write the manifest, and remove the parts.

Everything that is finished has its final name and was renamed into it, so the same command run
again checks what is there and goes on; the result depends on the source and the options alone.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from dataprep.assemble import assemble, write_manifest
from dataprep.encode import versions
from dataprep.files import explain, locked, write_whole
from dataprep.job import Job, check_complete, prepare, same_job
from dataprep.manifest import FORMAT, MANIFEST, DataError
from dataprep.parts import Ended, PartTask, Records, Reused, Started, encode_part, gather
from dataprep.pool import run_tasks
from dataprep.progress import Progress, duration, reasons, size, spread, table
from dataprep.sources import Listing, list_source


def convert(
    job: Job, *, workers: int, max_bad: float, stream: TextIO, say: Callable[[str], None]
) -> None:
    """Convert, continue a conversion, or find it complete.

    Args:
        job: what to convert into what.
        workers: number of processes; does not change the result.
        max_bad: share of files that may be bad before the conversion stops.
        stream: where progress goes.
        say: takes the sentences and the table for the user.

    Raises:
        DataError: the source or the target cannot be used, too many images are bad, the disk is
            full. What is done stays, and the same command continues.
    """
    try:
        if (job.out / MANIFEST).is_file():
            count = check_complete(job).num_images
            say(f"{job.out}: already complete, {count:,} images; delete it to convert again")
            return
        work = prepare(job)
        with locked(work):
            if not (job.out / MANIFEST).is_file():
                _convert(job, work, workers, max_bad, stream, say)
        shutil.rmtree(work)
    except OSError as error:
        raise explain(error, job.out) from None


def _convert(
    job: Job, work: Path, workers: int, max_bad: float, stream: TextIO, say: Callable[[str], None]
) -> None:
    say(f"listing {job.source / job.split} ...")
    listing = list_source(job.dataset, job.source, job.split)
    if job.limit:
        listing = Listing(
            listing.where,
            listing.names[: job.limit],
            listing.table[: job.limit],
            listing.classes,
            listing.skipped,
        )
    same_job(job, listing, work)
    if versions()["simplejpeg"] is None:
        say("simplejpeg is not installed: JPEG damage that Pillow does not notice will pass")
    progress = Progress(len(listing), stream)
    try:
        paths = _encode(job, listing, work, workers, max_bad, progress)
    finally:
        progress.close()
    records = gather(paths)
    if not records.names:
        raise DataError(f"{job.source}: none of its {len(listing)} images can be used")
    say(f"writing {' and '.join(job.formats)} shards of {len(records.names):,} images ...")
    files = assemble(job.out, work, job.formats, job.shard_bytes, paths, records)
    content = {"format": FORMAT, "num_images": len(records.names)} | job.describe()
    content |= {"classes": list(listing.classes), "versions": versions()}
    write_manifest(job.out, work, content, files, records, listing.skipped)
    say(_summary(job, listing, records, files, progress, workers))


def _encode(
    job: Job, listing: Listing, work: Path, workers: int, max_bad: float, progress: Progress
) -> list[Path]:
    """Make all parts and return their paths in order."""
    count = len(listing)
    step = min(
        512, max(16, count // 64)
    )  # parts do not show in the result, only in what a kill costs
    tasks = [
        PartTask(index, listing.part(start, start + step), work, job.encode)
        for index, start in enumerate(range(0, count, step))
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
        if len(bad) > max_bad * count:
            _too_many_bad(job, work, bad, max_bad, progress)
        return None

    for _ in run_tasks(encode_part, tasks, workers=min(workers, len(tasks)), hear=hear):
        pass
    return [task.path for task in tasks]


def _too_many_bad(
    job: Job, work: Path, bad: list[tuple[str, str]], max_bad: float, progress: Progress
) -> None:
    bad.sort()
    lines = (json.dumps({"name": name, "reason": reason}) + "\n" for name, reason in bad)
    path = work / "quarantine.jsonl"
    write_whole(path, "".join(lines).encode(), work)
    raise DataError(
        f"{job.source}: {len(bad)} of the first {progress.done:,} images are bad ({reasons(bad)}; "
        f"{bad[0][0]}: {bad[0][1]}; all in {path}), more than the share of {max_bad:g} allowed of "
        f"{progress.total:,}; repeat the command with a larger --max-bad to leave them out, or "
        f"repair them, delete {job.out} and begin anew"
    )


def _summary(
    job: Job,
    listing: Listing,
    records: Records,
    files: dict[str, dict[str, Any]],
    progress: Progress,
    workers: int,
) -> str:
    fresh = progress.done - progress.reused
    stored = sum(entry["bytes"] for entry in files.values())
    reused = f", {progress.reused:,} found from before" if progress.reused else ""
    bad, skipped = reasons(records.quarantined), reasons(listing.skipped)
    rows = [
        ("images", f"{len(records.names):,} of {len(listing):,}"),
        ("classes", f"{len(listing.classes):,}" if listing.classes else "none"),
        ("quarantined", f"{bad} (quarantine.jsonl)" if bad else "none"),
        ("skipped files", f"{skipped} (skipped.jsonl)" if skipped else "none"),
        ("read", size(records.bytes_in)),
        ("stored", f"{size(stored)} as {' and '.join(job.formats)}"),
        ("shorter side", f"{spread(records.sizes.min(axis=1))} px (min / median / max)"),
        ("longer side", f"{spread(records.sizes.max(axis=1))} px"),
        ("record", f"{spread(records.lengths)} bytes"),
        (
            "time",
            f"{duration(progress.seconds)} with {workers} workers, "
            f"{fresh / progress.seconds:,.0f} images/s{reused}",
        ),
    ]
    return f"{job.out} is complete:\n{table(rows)}"
