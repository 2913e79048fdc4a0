"""What a fault does within a process: functions are replaced, so that it strikes at one exact moment."""

import contextlib
import importlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from io import BytesIO
from multiprocessing import active_children
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dataprep.progress import Progress
from dense_ssl import pretrain
from dense_ssl.chaos import disks
from dense_ssl.chaos.faults import CONVERSION, EPOCH, EVALUATION, MIDDLE, NO_FAULT, WRITE
from dense_ssl.chaos.processes import below
from dense_ssl.crops import Crops, MultiCropBatch
from dense_ssl.evaluation import features
from dense_ssl.loaders import loader
from dense_ssl.loaders import source as sources
from dense_ssl.methods import Output, Step
from dense_ssl.methods.moco import MoCo

STEPS_PER_EPOCH, SAVE_EVERY, BATCH = 3, 2, 8  # of the run that is struck
AT = {EPOCH: 3, MIDDLE: 4, WRITE: 5}  # step that is spoilt: an epoch's first, its second, one saved
STRUCK_EPOCH = 1
STRUCK_SAVE = 2  # of the checkpoints, counted from 1
STRUCK_IMAGE = 100  # of a conversion
STRUCK_BATCH = 2  # of an evaluation
DAY = 86400.0

Action = Callable[[], None]
Patch = tuple[Any, str, Any]  # object, attribute, what takes its place


@contextlib.contextmanager
def injected(fault: str, place: str, arguments: Sequence[str]) -> Iterator[None]:
    """Let `fault` strike this process once, at `place`.

    Args:
        fault: a name of `faults.FAULTS`, one that strikes from within.
        place: one of `faults.PLACES`.
        arguments: of the command; they say where the run's folder and its data are.
    """
    with ExitStack() as stack:
        for patch in patches(fault, place, arguments):
            stack.enter_context(mock.patch.object(*patch))
        yield


def patches(fault: str, place: str, arguments: Sequence[str]) -> list[Patch]:
    """Return what is replaced."""
    if fault == NO_FAULT:
        return []
    if fault == "clock":
        return _clock(place)
    if fault == "stalled":
        marker = folder_of(place, arguments).parent / "stalled"
        return _stall(place, value_of(arguments, "data.loader="), marker)
    if fault == "memory" and place == EVALUATION:
        return [_trigger(place, _raise_out_of_memory)]
    if fault in SPOILT:
        return [_at_step(AT[place], SPOILT[fault])]
    return [_trigger(place, _action(fault, place, arguments))]


def value_of(arguments: Sequence[str], key: str) -> str:
    """Return the value of `key=value`, or what follows the option `key`."""
    for number, argument in enumerate(arguments):
        if argument.startswith(key) and key.endswith("="):
            return argument.removeprefix(key)
        if argument == key:
            return arguments[number + 1]
    raise ValueError(f"no {key} among {arguments}")


# --- when ---------------------------------------------------------------------------------------------


def _trigger(place: str, act: Action) -> Patch:
    """Return what is replaced so that `act` is called once, at `place`."""
    if place == EPOCH:
        return _before(loader.Loader, "epoch", act, lambda _, epoch, *more: epoch == STRUCK_EPOCH)
    if place == MIDDLE:
        return _before(MoCo, "forward", act, lambda _, batch, step: step.index == AT[MIDDLE])
    if place == CONVERSION:
        calls = iter(range(1, 1 << 30))
        return _before(Progress, "add", act, lambda *_: next(calls) == STRUCK_IMAGE)
    if place == EVALUATION:
        calls = iter(range(1, 1 << 30))
        return _before(features, "normalised", act, lambda *_: next(calls) == STRUCK_BATCH)
    assert place == WRITE
    return _halfway_through_a_save(act)


def _before(owner: Any, name: str, act: Action, now: Callable[..., bool]) -> Patch:
    original = getattr(owner, name)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        if now(*args):
            act()
        return original(*args, **kwargs)

    return owner, name, replaced


def _halfway_through_a_save(act: Action) -> Patch:
    original, saves = torch.save, iter(range(1, 1 << 30))

    def save(payload: Any, file: Any, *more: Any, **options: Any) -> None:
        named = str(getattr(file, "name", ""))
        if "step-" not in named or next(saves) != STRUCK_SAVE:
            original(payload, file, *more, **options)
            return
        buffer = BytesIO()
        original(payload, buffer, *more, **options)
        data = buffer.getvalue()
        file.write(data[: len(data) // 2])
        file.flush()
        act()
        file.write(data[len(data) // 2 :])

    return torch, "save", save


def _at_step(index: int, spoilt: Callable[..., Output]) -> Patch:
    forward = MoCo.forward

    def replaced(method: MoCo, batch: MultiCropBatch, step: Step) -> Output:
        if step.index != index:
            return forward(method, batch, step)
        return spoilt(lambda shown: forward(method, shown, step), batch)

    return MoCo, "forward", replaced


# --- what ---------------------------------------------------------------------------------------------


def _action(fault: str, place: str, arguments: Sequence[str]) -> Action:
    if fault == "sigterm":
        return lambda: os.kill(os.getpid(), signal.SIGTERM)
    if fault == "kill-one":
        return _kill_a_worker if place == CONVERSION else lambda: _kill_one_rank(place)
    if fault == "restarted":
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        return lambda: _kill_one_rank(place) if first else None
    if fault == "hung":
        return lambda: _hang() if _is_struck(place) else None
    if fault == "kill-all":
        return _kill_all
    folder = folder_of(place, arguments)
    if fault == "disk-full":
        return lambda: disks.fill(folder.parent)
    if fault == "read-only":
        return lambda: disks.read_only(folder)
    assert fault == "vanished"
    return lambda: disks.vanish(*files_read(place, arguments))


def folder_of(place: str, arguments: Sequence[str]) -> Path:
    """Return the folder that a command writes to."""
    key = "--out" if place in (CONVERSION, EVALUATION) else "run.dir="
    return Path(value_of(arguments, key))


def files_read(place: str, arguments: Sequence[str]) -> list[Path]:
    """Return those of the files a command reads that go away: all shards, or the last image."""
    if place == CONVERSION:
        return sorted(Path(value_of(arguments, "--src")).glob("*.jpg"))[-1:]
    if place == EVALUATION:
        return sorted(Path(value_of(arguments, "--data")).glob("val/*/*.jpg"))[-1:]
    shards = Path(value_of(arguments, "data.path="))
    return sorted([*shards.glob("ffcv/*"), *shards.glob("dali/*")])


def _is_struck(place: str) -> bool:
    """Return whether this is the rank that writes, where one is written; the other one elsewhere."""
    return int(os.environ["RANK"]) == (0 if place == WRITE else 1)


def _kill_one_rank(place: str) -> None:
    if _is_struck(place):
        os.kill(os.getpid(), signal.SIGKILL)


def _kill_a_worker() -> None:
    worker = active_children()[0].pid
    assert worker is not None
    os.kill(worker, signal.SIGKILL)


def _kill_all() -> None:
    """End this process; of several ranks all, and what started them."""
    if "RANK" in os.environ:
        agent = os.getppid()
        for pid in (agent, *below(agent)):
            if pid != os.getpid():
                os.kill(pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _nan_loss(forward: Callable[..., Output], batch: MultiCropBatch) -> Output:
    output = forward(batch)
    return replace(output, loss=output.loss * float("nan"))


def _nan_gradient(forward: Callable[..., Output], batch: MultiCropBatch) -> Output:
    output = forward(batch)
    output.loss.register_hook(lambda gradient: gradient * float("nan"))
    return output


def _nan_input(forward: Callable[..., Output], batch: MultiCropBatch) -> Output:
    def spoil(images: Tensor) -> Tensor:
        images = images.clone()
        images[0, 0, :, 3, 5] = float("nan")  # one pixel
        return images

    views = {
        name: Crops(spoil(crops.images), crops.boxes, crops.flipped)
        for name, crops in batch.views.items()
    }
    return forward(MultiCropBatch(views, batch.index, batch.label))


def _out_of_memory_on_one_rank(forward: Callable[..., Output], batch: MultiCropBatch) -> Output:
    """Have room for half of the second rank's micro-batch; the first one knows of nothing."""
    if int(os.environ["RANK"]) == 1 and len(batch.index) > BATCH // 4:
        _raise_out_of_memory()
    return forward(batch)


def _out_of_memory(forward: Callable[..., Output], batch: MultiCropBatch) -> Output:
    """Have room for half of the micro-batch."""
    if len(batch.index) > BATCH // 2:
        forward(batch)  # what it has moved by then is part of the fault
        _raise_out_of_memory()
    return forward(batch)


def _raise_out_of_memory() -> None:
    raise torch.OutOfMemoryError("out of memory: tried to allocate 1.00 GiB (by the fault matrix)")


SPOILT = {
    "nan-loss": _nan_loss,
    "nan-gradient": _nan_gradient,
    "nan-input": _nan_input,
    "memory": _out_of_memory,
    "memory-ranks": _out_of_memory_on_one_rank,
}


def _clock(place: str) -> list[Patch]:
    """Return clocks that jump a day at `place`: forwards at an epoch's end, backwards elsewhere."""
    shift = 0.0

    def jump() -> None:
        nonlocal shift
        shift = DAY if place == EPOCH else -DAY

    def jumping(clock: Callable[[], float]) -> Callable[[], float]:
        return lambda: clock() + shift

    clocks = ("time", "monotonic", "perf_counter")
    return [
        _trigger(place, jump),
        *((time, name, jumping(getattr(time, name))) for name in clocks),
    ]


# --- a loader that comes to a stop --------------------------------------------------------------------


def _stall(place: str, name: str, marker: Path) -> list[Patch]:
    """Return what is replaced so that reading hangs, in the loader's own threads or processes."""
    batches = 0 if place == EPOCH else 1  # of the struck epoch that still come
    if name == "ffcv":
        ffcv = importlib.import_module("dense_ssl.loaders.ffcv")
        begun = iter(range(1 << 30))
        last = STEPS_PER_EPOCH * STRUCK_EPOCH + batches
        return [
            _before(ffcv.EpochIterator, "run_pipeline", _hang, lambda *_: next(begun) == last),
        ]
    opened = pretrain.open_source

    def open_stalling(data: Any) -> Any:
        source = opened(data)
        assert isinstance(source, sources.ShardSource)
        source.__class__ = StallingSource
        source.marker, source.left = marker, batches * BATCH  # pyright: ignore
        return source

    return [
        (pretrain, "open_source", open_stalling),
        _before(loader.Loader, "epoch", marker.touch, lambda _, epoch, *m: epoch == STRUCK_EPOCH),
    ]


class StallingSource(sources.ShardSource):
    """A shard set whose storage does not answer any more, once a file says so; in any process."""

    marker: Path
    left: int  # records it still gives

    def read(self, index: int) -> bytes:
        """Return a record, or never return."""
        if self.marker.exists():
            self.left -= 1
            if self.left < 0:
                _hang()
        return super().read(index)


def _hang() -> None:
    threading.Event().wait()
