"""Checkpoints written behind the loop's back: it waits for a copy in memory, not for the disk.

The copy is taken between two steps, so what is saved is what a blocking save would have saved. One write
runs at a time; the next one, the end of the run and a stop signal wait for it. A process that is killed in
the middle leaves the checkpoint before it, as ever.
"""

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dense_ssl import checkpoint

logger = logging.getLogger("dense_ssl")


class CheckpointWriter:
    """Writes the checkpoints of one run in a thread of its own.

    Attributes:
        stalled: seconds the last `save` kept its caller.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int | None) -> None:
        self._folder, self._keep, self._keep_every = folder, keep, keep_every
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[Path] | None = None
        self._buffers: dict[str, Tensor] = {}  # on the host, reused: copies need no new memory
        self.stalled = 0.0

    def save(self, payload: dict[str, Any]) -> None:
        """Copy `payload` and return; it is on the disk after `wait`, or when the next save begins.

        Raises:
            UserError: the write before this one has failed.
        """
        start = time.perf_counter()
        self.wait()
        copied = self._copied(payload, "")
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # copies from the GPU run on their own
        self._running = self._pool.submit(
            checkpoint.save, self._folder, copied, self._keep, self._keep_every
        )
        self.stalled = time.perf_counter() - start

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

    def _copied(self, x: Any, key: str) -> Any:
        if isinstance(x, Tensor):
            return self._host(x.detach(), key)
        if isinstance(x, dict):
            return {name: self._copied(value, f"{key}/{name}") for name, value in x.items()}
        if isinstance(x, list | tuple):
            return type(x)(self._copied(value, f"{key}/{i}") for i, value in enumerate(x))
        return x

    def _host(self, x: Tensor, key: str) -> Tensor:
        """Return a copy on the host, strides kept, in the buffer of the last copy if it fits."""
        buffer = self._buffers.get(key)
        if buffer is None or buffer.dtype != x.dtype or buffer.shape != x.shape:
            buffer = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(x, non_blocking=x.is_cuda)
