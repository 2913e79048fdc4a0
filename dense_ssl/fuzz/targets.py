"""The readers of files from elsewhere, each with sound files to begin from.

A reader is given one hostile file among sound ones. It may return, or raise one of the errors that its
callers turn into a sentence; anything else is a finding.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dataprep.encode import BadImage
from dataprep.manifest import DataError
from dataprep.sources import Unreadable
from dense_ssl.config import UserError
from dense_ssl.events import machine
from dense_ssl.fuzz import readers, sound
from dense_ssl.fuzz.bounds import Broken, bounded

SAID = (UserError, DataError, Unreadable, BadImage)


@dataclass(frozen=True, slots=True)
class Target:
    """One kind of file."""

    name: str
    file: str  # the hostile one's place in its folder
    read: Callable[[Path], None]  # is given the folder
    beside: str = ""  # folder of sound files that come with it
    part: Literal["all", "head", "tail"] = "all"  # of the file that is hostile
    allowed: tuple[type[Exception], ...] = SAID


# What replaces a record within a run takes these two for "not readable".
_RECORD = (*SAID, OSError, ValueError)

TARGETS = (
    Target("config", "recipe.yaml", readers.config),
    Target("override", "override.txt", readers.override),
    Target("manifest", "manifest.json", readers.shards, "shards"),
    Target("sizes", "sizes.npy", readers.shards, "shards"),
    Target("labels", "labels.npy", readers.shards, "shards"),
    Target("checksums", "checksums.npy", readers.shards, "shards"),
    Target("names", "names.txt", readers.shards, "shards"),
    Target("index", "dali/shard-000000.idx", readers.shards, "shards"),
    Target("tar-shard", "dali/shard-000000.tar", readers.shards, "shards"),
    Target("beton-head", "ffcv/images.beton", readers.shards, "beton", "head"),
    Target("beton-table", "ffcv/images.beton", readers.shards, "beton", "tail"),
    Target("picture", "picture.jpg", readers.picture, allowed=_RECORD),
    Target("zip", "images.zip", readers.archive),
    Target("tar", "images.tar", readers.archive),
    Target("checkpoint", "checkpoints/step-00000002.pt", readers.checkpoint),
    Target("checksum", "checkpoints/step-00000002.json", readers.checkpoint, "run"),
    Target("legacy-checkpoint", "weights.pth", readers.weights),
    Target("safetensors", "weights.safetensors", readers.weights),
    Target("pickle", "weights.pkl", readers.weights),
    Target("bundle", "incidents/step-00000001-rank0.pt", readers.bundle),
    Target("coco", "annotations/instances_train.json", readers.coco, "coco"),
    Target("voc", "VOC2007/Annotations/cow.xml", readers.voc, "voc"),
    Target("feature-cache", "features.pt", readers.feature_cache),
    Target("memory-cache", "memory.safetensors", readers.memory_cache),
    Target("log", "log.jsonl", readers.log, "page"),
    Target("looks", "watch.jsonl", readers.page, "page"),
    Target("events", "events.jsonl", readers.page, "page"),
    Target("settings", "config.yaml", readers.page, "page"),
    Target("results", "eval.jsonl", readers.results, "page"),
    Target("davis-cache", "cow.json", readers.davis_cache),
    Target("memory-note", "micro_batch.json", readers.memory_note),
)


class Range:
    """Sound files of every kind in one folder, made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        sound.make(folder)
        machine()  # Python asks `uname` for the processor, once; a page names it

    def sound_files(self, target: Target) -> list[bytes]:
        """Return what the sound files of a target hold, the likeliest first."""
        paths = sorted((self._folder / "seeds" / target.name).iterdir())
        return [path.read_bytes() for path in paths]

    def attempt(self, target: Target, data: bytes) -> str | None:
        """Return what the reader broke with this file, None if it kept its promise."""
        folder = self._folder / "attempt"
        shutil.rmtree(folder, ignore_errors=True)
        if target.beside:
            shutil.copytree(self._folder / target.beside, folder, copy_function=_link)
        path = folder / target.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # the sound one's bytes stay where they are
        path.write_bytes(self._put(target, data))
        try:
            with bounded(folder):
                target.read(folder)
        except target.allowed as error:
            return None if str(error).strip() else f"{type(error).__name__} without a word"
        except (Exception, Broken) as error:
            return f"{type(error).__name__}: {str(error)[:300]} at {_where(error)}"
        return None

    def _put(self, target: Target, data: bytes) -> bytes:
        """Return the whole file of which `data` is a part."""
        if target.part == "all":
            return data
        whole = (self._folder / target.beside / target.file).read_bytes()
        length = len(self.sound_files(target)[0])
        return data + whole[length:] if target.part == "head" else whole[:-length] + data


def chosen(names: str) -> list[Target]:
    """Return the targets of these names, comma-separated; all of them for "".

    Raises:
        UserError: there is none of one of the names.
    """
    wanted = [name for name in names.split(",") if name]
    strange = set(wanted) - {target.name for target in TARGETS}
    if strange:
        known = ", ".join(target.name for target in TARGETS)
        raise UserError(f"no target {', '.join(sorted(strange))}; there are {known}")
    return [target for target in TARGETS if not wanted or target.name in wanted]


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def _where(error: BaseException) -> str:
    places = [f"{Path(f.tb_frame.f_code.co_filename).name}:{f.tb_lineno}" for f in _frames(error)]
    return " < ".join(reversed(places[-6:]))


def _frames(error: BaseException) -> Iterator:
    trace = error.__traceback__
    while trace is not None:
        yield trace
        trace = trace.tb_next
