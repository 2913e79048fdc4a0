"""Answers that a run's folder has already, found again in a fraction of a second and without torch.

A question is a task with its settings, the checkpoint, the data and this program, each by what would
change with it: files by name, size and time of change, the program by its own text and the versions of the
libraries. Results say which question they answer; who asks the same again gets them back.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dataprep import plain_json
from dense_ssl.evaluation.results import RESULTS, Result
from dense_ssl.weights.place import checkpoint_file

_ROOT = Path(__file__).resolve().parents[2]
_PROGRAM = ("dense_ssl", "kernels")
_LIBRARIES = ("torch", "torchvision", "timm", "pillow", "numpy", "scikit-learn")


def question_of(
    task: str, *, checkpoint: str, data: Path, settings: Iterable[str], random: bool, device: str
) -> str:
    """Return the hash that tells a question from every other; "" where a file of it cannot be seen.

    Raises:
        UserError: the checkpoint is a path at which nothing is.
    """
    words = [text for text in settings if _concerns(text, task)]
    named = [Path(text.partition("=")[2]) for text in words]
    try:
        files = [path for path in named if path.is_file()]  # lists of images, and the like
        parts = [task, str(random), device, *words, *weights_of(checkpoint), *map(_stamp, files)]
        parts += [*_tree(data), *_program()]
    except OSError:  # the protocol itself will meet it, and say so
        return ""
    return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()


def answer_of(folder: Path, question: str) -> tuple[list[Result], str]:
    """Return the newest results that answer a question, and when they were written; none: [], ""."""
    path = folder / RESULTS
    if not question or not path.is_file():
        return [], ""
    found: list[dict] = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = plain_json.parse(line)
        except ValueError:  # broken off
            continue
        if isinstance(record, dict) and record.get("question") == question:
            found.append(record)
    last = [record for record in found if record["time"] == found[-1]["time"]]
    if not last or len(last) != last[0]["rows"]:  # a table of which a part is missing is no answer
        return [], ""
    if any(record.get("omitted") for record in last):  # what was left out may have come back
        return [], ""
    names = {field.name for field in fields(Result)}
    results = [Result(**{k: v for k, v in record.items() if k in names}) for record in last]
    return results, last[0]["time"]


def _concerns(setting: str, task: str) -> bool:
    """Whether `key=value` or `TASK.key=value` may be meant for this task."""
    from_task, dot, _ = setting.partition("=")[0].partition(".")
    return not dot or from_task == task


def weights_of(checkpoint: str) -> Sequence[str]:
    """Return what tells the weights of a SPEC from others.

    Raises:
        UserError: it is a path at which nothing is.
    """
    kind, separator, name = checkpoint.partition(":")
    if separator and kind in ("timm", "random"):
        path = Path(name)
        return checkpoint, *([_stamp(checkpoint_file(path))] if path.exists() else [])
    path, _, arch = checkpoint.partition("?arch=")
    return arch, _stamp(checkpoint_file(Path(path)))


def _stamp(path: Path) -> str:
    stat = path.stat()
    return f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"


def _tree(folder: Path) -> Iterator[str]:
    """Every file below a folder, links followed, in an order of their own."""
    yield str(folder.resolve())
    waiting, seen = [str(folder)], set[tuple[int, int]]()
    while waiting:
        here = waiting.pop()
        stat = Path(here).stat()
        if (stat.st_dev, stat.st_ino) in seen:  # a link back to a folder above
            continue
        seen.add((stat.st_dev, stat.st_ino))
        with os.scandir(here) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_dir():
                    waiting.append(entry.path)
                else:
                    found = _link_or_file(entry)
                    yield f"{entry.path}:{found.st_size}:{found.st_mtime_ns}"


def _link_or_file(entry: os.DirEntry[str]) -> os.stat_result:
    try:
        return entry.stat()
    except FileNotFoundError:  # a link to nothing
        return entry.stat(follow_symlinks=False)


def _program() -> Iterator[str]:
    for package in _PROGRAM:
        for path in sorted((_ROOT / package).rglob("*.py")):
            yield hashlib.sha256(path.read_bytes()).hexdigest()
    for name in _LIBRARIES:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            yield name
