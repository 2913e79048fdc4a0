"""Checkpoints written behind the loop's back: it waits neither for the disk nor for most of the copy.

A forward and a backward pass change no weight, no moving average, no queue and nothing of the optimiser. So
a thread copies those while the next passes run, and the loop waits for what is left of the copy before it
lets the optimiser go on. What is small, and what a forward pass moves, is copied before `save` returns.
So what is saved is what a blocking save would have saved, to the bit.

One write runs at a time; the next one, the end of the run and a stop signal wait for it. A process that is
killed in the middle leaves the checkpoint before it, as ever.
"""

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dense_ssl import checkpoint
from dense_ssl.step_context import moved_by_forward

logger = logging.getLogger("dense_ssl")

LATE_BYTES = 1 << 16  # tensors up to this size are copied at once: of a ViT-B 2.5 MB in all


class CheckpointWriter:
    """Writes the checkpoints of one run in a thread of its own.

    Attributes:
        stalled: seconds the last `save`, and the `finish_copy` after it, kept their caller.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int | None) -> None:
        self._folder, self._keep, self._keep_every = folder, keep, keep_every
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[Path] | None = None
        self._copying = threading.Event()  # set: nothing is being copied
        self._copying.set()
        self._buffers: dict[str, Tensor] = {}  # on the host, reused: copies need no new memory
        self.stalled = 0.0

    def save(self, payload: dict[str, Any]) -> None:
        """Begin to save `payload`; it is on the disk after `wait`, or when the next save begins.

        Until `finish_copy` only forward and backward passes may run.

        Raises:
            UserError: the write before this one has failed.
        """
        start = time.perf_counter()
        self.wait()
        begun = self._copied(payload, "", early=True)
        ready = _mark()
        self._copying.clear()
        self._running = self._pool.submit(self._write, begun, ready)
        self.stalled = time.perf_counter() - start

    def finish_copy(self) -> None:
        """Return when what is being saved may change: called before anything else than passes runs."""
        start = time.perf_counter()
        self._copying.wait()
        self.stalled += time.perf_counter() - start

    def wait(self) -> None:
        """Return when nothing is being written any more.

        Raises:
            UserError: the last write has failed; the checkpoints before it are intact.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Let a write that is running come to its end; what is wrong with it is said, not raised."""
        try:
            self.wait()
        except Exception as error:
            logger.warning("%s", error)
        self._pool.shutdown()

    def _write(self, begun: dict[str, Any], ready: torch.cuda.Event | None) -> Path:
        """Copy what has not been copied yet, let the loop go on, and write; in the thread."""
        try:
            payload = self._all_copied(begun, ready)
        finally:  # an error is for `wait` to raise, and the loop must get there
            self._copying.set()
        return checkpoint.save(self._folder, payload, self._keep, self._keep_every)

    def _all_copied(self, begun: dict[str, Any], ready: torch.cuda.Event | None) -> dict[str, Any]:
        if ready is None:
            return self._copied(begun, "")
        torch.cuda.set_device(ready.device)  # a new thread is on GPU 0
        with torch.cuda.stream(torch.cuda.Stream(ready.device)):
            torch.cuda.current_stream().wait_event(ready)  # the step before, and the early copies
            payload = self._copied(begun, "")
            torch.cuda.current_stream().synchronize()
        return payload

    def _copied(self, x: Any, key: str, early: bool = False) -> Any:
        """Return `x` with its tensors copied; `early` leaves those that passes do not change."""
        if isinstance(x, Tensor):
            late = x.nbytes > LATE_BYTES and not moved_by_forward(key.rpartition("/")[2])
            return x.detach() if early and late else self._host(x.detach(), key)
        if isinstance(x, dict):
            return {name: self._copied(value, f"{key}/{name}", early) for name, value in x.items()}
        if isinstance(x, list | tuple):
            return type(x)(self._copied(value, f"{key}/{i}", early) for i, value in enumerate(x))
        return x

    def _host(self, x: Tensor, key: str) -> Tensor:
        """Return a copy on the host, strides kept, in the buffer of the last copy if it fits."""
        buffer = self._buffers.get(key)
        if buffer is not None and buffer.data_ptr() == x.data_ptr() and buffer.device == x.device:
            return x  # copied early
        if buffer is None or buffer.dtype != x.dtype or buffer.shape != x.shape:
            buffer = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(x, non_blocking=x.is_cuda)


def _mark() -> torch.cuda.Event | None:
    """Return the place in the GPU's work that the loop has come to, None where there is no GPU in use."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return None
    mark = torch.cuda.Event()
    mark.record()
    return mark
