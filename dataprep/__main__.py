"""The command line: `python -m dataprep coco --src /data/coco --out shards/coco`, and `verify`."""

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from dataprep import scenes
from dataprep.convert import Manner, convert
from dataprep.encode import EncodeOptions
from dataprep.job import Job
from dataprep.manifest import DataError
from dataprep.pool import STOPPING
from dataprep.progress import Progress
from dataprep.sources import DATASETS, DEFAULT_SPLIT
from dataprep.verify import verify

FORMATS = {"ffcv": ("ffcv",), "dali": ("dali",), "both": ("ffcv", "dali")}


class Stopped(BaseException):
    """A signal asked to stop; not an Exception, so that nothing on the way takes it for an error."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 bad input, 75 stopped by a signal."""
    options = _parser().parse_args(arguments)
    for number in STOPPING:
        signal.signal(number, _stop)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may be no text at all
    try:
        if options.dataset == "verify":
            return _verify(options)
        _convert(options)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"\nstopped by {stopped}; the same command continues", file=sys.stderr)
        return 75
    return 0


def _convert(options: argparse.Namespace) -> None:
    source = options.src
    if options.dataset == "scenes":
        source = source or options.out.parent / f"{options.out.name}-source"
        _say(f"rendering {options.count:,} scenes to {source} ...")
        progress = Progress(options.count, sys.stderr)
        scenes.render(
            source,
            options.count,
            options.seed,
            workers=options.workers,
            progress=lambda done, _: progress.add(done - progress.done, 0, 0),
        )
        progress.close()
    job = Job(
        dataset=options.dataset,
        source=source,
        split=options.split,
        out=options.out,
        formats=FORMATS[options.format],
        encode=EncodeOptions(options.size, options.quality),
        shard_bytes=options.shard_mib << 20,
        limit=options.limit,
    )
    convert(job, Manner(options.workers, options.max_bad, sys.stderr, _say))


def _verify(options: argparse.Namespace) -> int:
    _say(f"verifying {options.out} ...")
    problems = verify(options.out, deep=not options.quick, workers=options.workers)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
        print(f"error: {options.out}: {count}; convert it again", file=sys.stderr)
        return 2
    print(f"{options.out}: everything as the manifest says")
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dataprep",
        description="Convert images to shards, or verify a set of shards.",
    )
    commands = parser.add_subparsers(dest="dataset", required=True, metavar="DATASET | verify")
    processors = len(os.sched_getaffinity(0))
    about = {
        "coco": "COCO's folders, or train2017.zip",
        "imagenet": "class folders, or ILSVRC2012_img_train.tar",
        "folder": "any tree of images",
        "scenes": "scenes rendered here, in COCO's layout",
    }
    for name in DATASETS:
        command = commands.add_parser(name, help=f"convert {about[name]}")
        add = command.add_argument
        add("--src", type=_path, required=name != "scenes", help="the data set's folder or archive")
        add("--split", default=DEFAULT_SPLIT[name], help="folder of images within it (%(default)s)")
        add("--out", type=_path, required=True, help="folder of the shard set")
        add("--format", choices=FORMATS, default="both", help="shards to write (%(default)s)")
        add(
            "--size",
            type=_at_least(0),
            default=256,
            help="shorter side in px, 0: as is (%(default)s)",
        )
        add("--quality", type=_quality, default=90, help="JPEG quality (%(default)s)")
        add("--max-bad", type=_share, default=0.01, help="share that may be bad (%(default)s)")
        add("--workers", type=_at_least(1), default=processors, help="processes (%(default)s)")
        add("--limit", type=_at_least(0), default=0, help="only the first so many images")
        add("--shard-mib", type=_at_least(1), default=256, help="size of a tar, MiB (%(default)s)")
        if name == "scenes":
            add("--count", type=_at_least(1), default=2000, help="scenes to render (%(default)s)")
            add("--seed", type=int, default=0, help="seed of the scenes (%(default)s)")
    command = commands.add_parser("verify", help="re-check a shard set against its manifest")
    command.add_argument("out", type=_path, help="folder of the shard set")
    command.add_argument("--quick", action="store_true", help="files only, no decoding of records")
    command.add_argument("--workers", type=_at_least(1), default=processors, help="threads")
    return parser


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("empty; give a folder")
    return Path(text)


def _at_least(minimum: int):  # noqa: ANN202 - argparse names the type in its messages
    def number(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is below {minimum}")
        return value

    return number


def _quality(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{value} is not in 1..100")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value:g} is not a share, 0..1")
    return value


def _stop(number: int, _: FrameType | None) -> None:
    for other in STOPPING:  # once is enough: what follows only tidies up
        signal.signal(other, signal.SIG_IGN)
    raise Stopped(signal.Signals(number).name)


if __name__ == "__main__":
    sys.exit(main())
