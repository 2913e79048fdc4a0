"""The next batch is made ready while the step on this one runs: sent to the GPU, and cut there."""

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from dense_ssl.config import GaveUp, UserError
from dense_ssl.crops import Crops, MultiCropBatch
from dense_ssl.loaders.decoded import SourceBatch
from dense_ssl.loaders.loader import Batch


class Prefetcher:
    """Iterates over batches whose images are on `device`; a thread is one batch ahead of the user.

    On a CUDA device the thread copies from pinned memory on a stream of its own, so the copy overlaps
    with the step and the host never waits for it. On the CPU it only runs ahead. Images that come whole
    are cut on the device, on the same stream. `index` stays on the host on every device: it keys random
    draws, which are made there.

    Use it as a context manager, or call `close`: that ends the thread and closes `batches`. An
    exception in the thread is raised in the user's `next`, with its own traceback.

    Args:
        batches: consumed in the thread; each must own its memory.
        device: where the images are wanted.
        patience_s: seconds after which a batch that does not come is given up; for ever unless told.
    """

    def __init__(
        self, batches: Iterator[Batch], device: torch.device, patience_s: float | None = None
    ) -> None:
        self.wait_s = 0.0  # seconds the user has waited for data so far
        self._batches = batches
        self._device = device
        self._patience_s = patience_s
        self._ready: queue.Queue[_Ready | BaseException | None] = queue.Queue(maxsize=1)
        self._closing = threading.Event()
        self._asked = threading.Event()  # the user waits for a batch
        self._ended = self._stalled = False
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> MultiCropBatch:
        if self._ended:
            raise StopIteration
        start = time.perf_counter()
        self._asked.set()
        try:
            item = self._ready.get(timeout=self._patience_s)
        except queue.Empty:
            self._ended = self._stalled = True
            raise GaveUp(
                f"the loader has given no batch for {self._patience_s:.0f} s "
                "(run.stall_minutes): its storage, or one of its workers, does not answer; "
                "the checkpoints are intact, and the same command resumes"
            ) from None
        self._asked.clear()
        self.wait_s += time.perf_counter() - start
        if isinstance(item, _Ready):
            return item.take()
        self.close()
        if item is None:
            raise StopIteration
        if isinstance(item, torch.OutOfMemoryError):  # smaller passes make no smaller batches
            raise UserError(
                f"no room for the images of a batch ({str(item).split('. ')[0]}): take a smaller "
                "train.micro_batch, or data.cut=host; the checkpoints are intact"
            ) from None
        raise item

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the thread once it has finished the batch it works on, then close `batches`.

        A thread that has been given up is left alone: it may never finish.
        """
        self._ended = True
        if self._stalled:
            return
        self._closing.set()
        self._asked.set()
        while self._thread.is_alive():
            try:  # room for a thread that waits to hand over a batch
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()

    def _run(self) -> None:
        try:
            stream = None
            if self._device.type == "cuda":
                # A new thread is on GPU 0: what it calls would leave a context there for every rank.
                torch.cuda.set_device(self._device)
                stream = torch.cuda.Stream(self._device)
            with torch.cuda.stream(stream) if stream is not None else nullcontext():
                for batch in self._batches:
                    if self._closing.is_set():
                        return
                    self._ready.put(self._sent(batch, stream))
            self._ready.put(None)
        except BaseException as error:  # whatever it is, it belongs to the user's thread
            self._ready.put(error)

    def _sent(self, batch: Batch, stream: torch.cuda.Stream | None) -> "_Ready":
        """Return the batch on its way; where a step has all the memory, once that step is over."""
        try:
            return _send(batch, self._device, stream)
        except torch.OutOfMemoryError:
            self._asked.wait()
        torch.cuda.empty_cache()
        return _send(batch, self._device, stream)


@dataclass(frozen=True)
class _Ready:
    """A batch on its device, or on its way there."""

    batch: MultiCropBatch
    arrived: torch.cuda.Event | None

    def take(self) -> MultiCropBatch:
        """Return the batch for use on the current stream, which waits for it to arrive."""
        if self.arrived is not None:
            stream = torch.cuda.current_stream(self.batch.label.device)
            stream.wait_event(self.arrived)
            for tensor in _tensors(self.batch):
                # The memory belongs to the side stream: it must not be given out again there before
                # the work queued here is done.
                tensor.record_stream(stream)
        return self.batch


def _send(batch: Batch, device: torch.device, stream: torch.cuda.Stream | None) -> _Ready:
    """Return the batch on its way to `device` on the current stream, its crops to be cut there."""
    if isinstance(batch, SourceBatch):
        batch = batch.to(device).cut()
    if stream is None:
        return _Ready(batch, None)

    def move(x: Tensor) -> Tensor:
        return x if x.is_cuda else x.pin_memory().to(device, non_blocking=True)

    views: dict[str, Crops] = {name: crops.map(move) for name, crops in batch.views.items()}
    moved = MultiCropBatch(views, batch.index, move(batch.label))
    arrived = torch.cuda.Event()
    arrived.record(stream)
    return _Ready(moved, arrived)


def _tensors(batch: MultiCropBatch) -> Iterator[Tensor]:
    """Yield everything of a batch that is on its device."""
    for crops in batch.views.values():
        yield from (crops.images, crops.boxes, crops.flipped)
    yield batch.label
