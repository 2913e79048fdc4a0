"""Answers that a run's folder has already, found again in a fraction of a second and without torch.

A question is a task with its settings, the checkpoint, the data and this program, each by what would
change with it: files by name, size and times of change, the program by its own text and the versions of the
libraries. Results say which question they answer; who asks the same again gets them back.

Tasks that vote on something kept (k-NN) have a second, wider question without the settings of the vote:
what belongs to it is noted in `features/known.jsonl`, and other votes are taken from there.
"""

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dataprep import plain_json
from dense_ssl.config import Config
from dense_ssl.evaluation.catalogue import TASKS
from dense_ssl.evaluation.drawn import draw
from dense_ssl.evaluation.protocol_settings import marked
from dense_ssl.evaluation.results import (
    RESULTS,
    Result,
    append,
    append_results,
    peak_memory_gb,
    results_of,
)
from dense_ssl.weights.place import checkpoint_file

_ROOT = Path(__file__).resolve().parents[2]
_PROGRAM = ("dense_ssl", "kernels")
# What features and the states of jobs are made by: beside these, nothing changes what they are.
_MEASURING = (
    "dense_ssl/evaluation",
    "dense_ssl/backbones",
    "dense_ssl/loaders",
    "dense_ssl/weights",
)
_LIBRARIES = ("torch", "torchvision", "timm", "pillow", "numpy", "scikit-learn")
_KNOWN = Path("features", "known.jsonl")


@dataclass(frozen=True, slots=True)
class Question:
    """Hashes that tell what is asked from all else; "" where a file of it cannot be seen."""

    whole: str = ""
    features: str = ""  # without the settings of a vote; "" where nothing is voted


def asked(
    task: str,
    *,
    checkpoint: str,
    data: Path,
    settings: Sequence[str],
    config: Config | None,
    random: bool,
    device: str,
) -> Question:
    """Return what is asked, and where its settings are known its wider question.

    Raises:
        UserError: the checkpoint is a path at which nothing is.
    """  # fmt: skip
    place = _place(checkpoint, data)
    about = {"checkpoint": checkpoint, "data": data, "random": random, "device": device}
    whole = question_of(task, settings=settings, place=place, **about)
    if config is None or not TASKS[task].again or not whole:
        return Question(whole)
    voting: frozenset[str] = _again(task).VOTING
    rest = config.model_dump_json(exclude=set(voting))
    return Question(whole, _hashed([task, str(random), device, rest, place]))


def question_of(
    task: str,
    *,
    checkpoint: str,
    data: Path,
    settings: Iterable[str],
    random: bool,
    device: str,
    place: str | None = None,
) -> str:
    """Return the hash that tells a question from every other; "" where a file of it cannot be seen.

    place: of the checkpoint, the data and the program, where it is known already.

    Raises:
        UserError: the checkpoint is a path at which nothing is.
    """
    words = [text for text in settings if _concerns(text, task)]
    named = [Path(text.partition("=")[2]) for text in words]
    place = _place(checkpoint, data) if place is None else place
    try:
        files = [_stamp(path) for path in named if path.is_file()]  # lists of images, and the like
    except OSError:
        return ""
    return _hashed([task, str(random), device, *words, *files, place]) if place else ""


def _place(checkpoint: str, data: Path) -> str:
    """What tells weights, data and program from others; "" where a file cannot be seen."""
    try:
        return _hashed([*weights_of(checkpoint), *_tree(data), *_program(_PROGRAM)])
    except OSError:  # the protocol itself will meet it, and say so
        return ""


def measuring_program() -> str:
    """Return what tells the program that makes features from others, and from later ones."""
    return _hashed(_program(_MEASURING))


def remember(folder: Path, features: str, about: Mapping[str, Any]) -> None:
    """Note what is kept for a wider question.

    Raises:
        UserError: it cannot be written.
    """
    append(folder / _KNOWN, [{"question": features, **about}])


def voted_again(
    folder: Path, task: str, question: Question, config: Config, *, checkpoint: str, data: Path
) -> list[Result]:
    """Return the results of other votes on what is kept for a question, and keep them; none: [].

    Raises:
        UserError: they cannot be kept.
    """
    began = time.perf_counter()
    about = next(reversed(_records(folder / _KNOWN, question.features)), None)
    if about is None:
        return []
    files = [folder / "features" / name for name in about["files"] if name]
    scores = [_again(task).scored(file, config) for file in files]
    if None in scores:
        return []
    draw(folder, task, _again(task).drawn(files[0], config, about))
    values, baseline = (*scores, {})[:2]
    found = results_of(
        values,
        baseline,
        task=task,
        protocol=marked(about["protocol"], task, config),
        checkpoint=checkpoint,
        weights=about["weights"],
        data=str(data),
        settings=config.model_dump(mode="json"),
        omitted=[],
        seconds=round(time.perf_counter() - began, 3),
        memory_gb=round(peak_memory_gb(), 3),
    )
    append_results(folder, found, question.whole)
    return found


def answer_of(folder: Path, question: str) -> tuple[list[Result], str]:
    """Return the newest results that answer a question, and when they were written; none: [], ""."""
    found = _records(folder / RESULTS, question)
    last = [record for record in found if record["time"] == found[-1]["time"]]
    if not last or len(last) != last[0]["rows"]:  # a table of which a part is missing is no answer
        return [], ""
    if any(record.get("omitted") for record in last):  # what was left out may have come back
        return [], ""
    names = {field.name for field in fields(Result)}
    results = [Result(**{k: v for k, v in record.items() if k in names}) for record in last]
    return results, last[0]["time"]


def _records(path: Path, question: str) -> list[dict]:
    """The records of a file of lines that belong to a question."""
    if not question or not path.is_file():
        return []
    found: list[dict] = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = plain_json.parse(line)
        except ValueError:  # broken off
            continue
        if isinstance(record, dict) and record.get("question") == question:
            found.append(record)
    return found


def _again(task: str) -> Any:
    return import_module(f"dense_ssl.evaluation.{TASKS[task].again}")


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
    return f"{path.resolve()}:{_change(stat)}"


def _change(stat: os.stat_result) -> str:
    """What differs once a file was written to; the second time cannot be set back."""
    return f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


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
                    yield f"{entry.path}:{_change(found)}"


def _link_or_file(entry: os.DirEntry[str]) -> os.stat_result:
    try:
        return entry.stat()
    except FileNotFoundError:  # a link to nothing
        return entry.stat(follow_symlinks=False)


def _hashed(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()


def _program(packages: Iterable[str]) -> Iterator[str]:
    for package in packages:
        for path in sorted((_ROOT / package).rglob("*.py")):
            yield hashlib.sha256(path.read_bytes()).hexdigest()
    for name in _LIBRARIES:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            yield name
