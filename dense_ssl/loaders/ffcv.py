"""FFCV executes the plan: one decode per image, then every crop of it, in FFCV's own threads.

The decoder is an FFCV operation of ours. It reads boxes and flips of the running epoch through a fixed
address, so nothing is compiled twice, and it writes each crop once: to where the batch keeps it.

Pixels are those of `folder` but for the JPEG decoder's arithmetic: FFCV asks libjpeg-turbo for its
fast inverse DCT. Boxes, flips, order and replaced records are the same.
"""

import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from queue import Empty
from typing import Any

import numba as nb
import numpy as np
import torch
from torch import Tensor

from dense_ssl.config import UserError
from dense_ssl.crops import MultiCropBatch
from dense_ssl.loaders.batch import assemble, check_recipe, cut_views
from dense_ssl.loaders.cutter import REASONS, Cutter
from dense_ssl.loaders.order import Batches
from dense_ssl.loaders.replace import Replacements
from dense_ssl.loaders.simd import pointer
from dense_ssl.loaders.source import ImageSource, ShardSource
from dense_ssl.views import CropPlan, ViewSpec, draw_epoch

_torch_threads = torch.get_num_threads()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of names that Python has deprecated since
    from ffcv.libffcv import imdecode
    from ffcv.loader import Loader as StockLoader
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.pipeline import PipelineSpec
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.operation import Operation
    from ffcv.pipeline.state import State
torch.set_num_threads(_torch_threads)  # FFCV's import sets it to 1
if nb.config.THREADING_LAYER == "default":  # pyright: ignore[reportAttributeAccessIssue]
    # numba's last resort, "workqueue", ends the process when two loaders run at a time.
    nb.config.THREADING_LAYER = "threadsafe"  # pyright: ignore[reportAttributeAccessIssue]

BATCHES_AHEAD = 3
RING = BATCHES_AHEAD + 2  # batches that FFCV may be writing or holding while one is asked for


class FfcvLoader:
    """Batches from a shard set in FFCV's format, on the CPU; pinned where `device` is a GPU."""

    def __init__(
        self,
        source: ImageSource,
        views: Sequence[ViewSpec],
        order: Batches,
        device: torch.device,
        *,
        workers: int,
        max_replaced: float,
    ) -> None:
        check_recipe(views, order.micro_batch)
        if not isinstance(source, ShardSource) or "ffcv" not in source.manifest.formats:
            raise UserError(
                "data.loader=ffcv: data.path holds no FFCV file; convert it with `make shards "
                "FORMAT=ffcv`, or use data.loader=folder"
            )
        self.steps_per_epoch = order.steps_per_epoch
        self._source, self._views, self._order = source, tuple(views), order
        self._pinned = device.type == "cuda"
        self._replacements = Replacements(len(source.sizes), max_replaced)
        threads = nb.config.NUMBA_NUM_THREADS  # pyright: ignore[reportAttributeAccessIssue]
        self._cutter = Cutter(source.sizes, views, imdecode, threads=threads, slots=RING)
        self._decoder = _Decoder(self._cutter)
        self._file = _open(source, self._decoder, order.micro_batch, min(workers, threads))
        self._bytes = np.memmap(source.manifest.beton, np.uint8, "r")
        self._extents = _extents(self._file, source)
        self._live: Generator[MultiCropBatch] | None = None

    @property
    def replaced(self) -> dict[int, str]:
        """Records that could not be shown, with the reason."""
        return self._replacements.reasons

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[MultiCropBatch]:
        """Yield the micro-batches of one epoch from `start_step` on; ends the epoch before it."""
        self.close()
        self._live = self._batches(epoch, start_step)
        return self._live

    def close(self) -> None:
        """End the running epoch and its thread."""
        if self._live is not None:
            self._live.close()
            self._live = None

    def _batches(self, epoch: int, start_step: int) -> Generator[MultiCropBatch]:
        order = self._order.batches(epoch, start_step)
        if not order:
            return
        plan = draw_epoch(self._views, self._source.sizes, self._order.seed, epoch)
        self._cutter.follow(plan)
        self._decoder.calls[0] = 0
        pending = deque(self._place(i, len(batch)) for i, batch in enumerate(order[:RING]))
        threads = torch.get_num_threads()
        iterator = EpochIterator(self._file, np.concatenate(order))  # pyright: ignore[reportArgumentType]
        try:
            for number, wanted in enumerate(order):
                status = _next(iterator)
                if number == 0:
                    torch.set_num_threads(threads)  # what FFCV's thread began by changing
                images = pending.popleft()
                index = self._check(wanted, status, images)
                if number + RING < len(order):
                    # Not begun yet: FFCV has no room for it before the next batch is asked for.
                    pending.append(self._place(number + RING, len(order[number + RING])))
                yield assemble(
                    self._views,
                    images,
                    CropPlan(plan.boxes[index], plan.flipped[index]),
                    self._source.sizes[index],
                    index,
                    self._source.labels[index],
                )
        finally:
            _stop(iterator)

    def _place(self, number: int, count: int) -> dict[str, Tensor]:
        """Return memory for batch `number` of `count` images, having told the decoder about it."""
        images = {
            view.name: torch.empty(
                (view.count, count, 3, view.size, view.size),
                dtype=torch.uint8,
                pin_memory=self._pinned,
            )
            for view in cut_views(self._views)
        }
        self._cutter.aim(number % RING, images)
        return images

    def _check(
        self, wanted: np.ndarray, status: np.ndarray, images: dict[str, Tensor]
    ) -> np.ndarray:
        """Return the records shown, after putting neighbours where one could not be."""
        shown = wanted.copy()
        for row, (index, code) in enumerate(zip(wanted.tolist(), status.tolist())):
            reason = REASONS.get(code) or self._differs(index)
            if reason is not None:
                self._replacements.note(index, reason)
                shown[row], _ = self._replacements.show(
                    index,
                    lambda i, row=row: self._cutter.show(self._source.read(i), i, row, images),
                )
        return shown

    def _differs(self, index: int) -> str | None:
        """Return why record `index` is not what was written, None when it is."""
        start, length = self._extents[index]
        try:
            self._source.check(index, self._bytes[start : start + length].data)
        except ValueError as error:
            return str(error)
        return None


class _Decoder(Operation):
    """FFCV's decoder of the image field: cuts the crops, and gives FFCV only a status per image."""

    def __init__(self, cutter: Cutter) -> None:
        super().__init__()
        self.calls = np.zeros(1, np.int64)  # batches of this epoch that FFCV has begun
        self._cutter = cutter

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        """Ask FFCV for one int32 per image."""
        shape, dtype = (1,), np.dtype("<i4")
        state = replace(previous_state, jit_mode=True, shape=shape, dtype=dtype)
        return state, AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable[..., Any]:
        """Return the function that FFCV compiles; what it closes over is constant to it."""
        read: Any = self.memory_read  # (address, storage) -> the bytes there
        rows = Compiler.get_iterator()
        show, table_address = self._cutter.function, self._cutter.table_address
        calls_address = self.calls.ctypes.data

        def decode(batch, status, metadata, storage):  # noqa: ANN001, ANN202
            calls = nb.carray(pointer(calls_address), (1,), np.int64)
            slot = calls[0] % RING
            calls[0] += 1
            for row in rows(len(batch)):
                index = batch[row]
                data = read(metadata[index]["data_ptr"], storage)
                thread = nb.get_thread_id()
                status[row, 0] = show(
                    data.ctypes.data, data.size, index, row, slot, thread, table_address
                )
            return status[: len(batch)]

        decode.is_parallel = True  # pyright: ignore[reportFunctionMemberAccess]
        return decode


def _open(source: ShardSource, decoder: _Decoder, batch_size: int, workers: int) -> StockLoader:
    """Return FFCV's loader of the shard set's file.

    Raises:
        UserError: it is not a file of FFCV's.
    """
    threads = torch.get_num_threads(), nb.get_num_threads()
    pipelines: dict[str, Any] = {"image": PipelineSpec("image", decoder=decoder), "label": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that Python has deprecated since
        try:
            file = StockLoader(
                str(source.manifest.beton),
                batch_size=batch_size,
                num_workers=workers,
                pipelines=pipelines,
                drop_last=False,
                batches_ahead=BATCHES_AHEAD,
            )
        except (AssertionError, LookupError, OSError, ValueError) as error:
            raise _damaged(source, f"FFCV cannot open it ({error})") from error
    torch.set_num_threads(threads[0])  # FFCV sets both to its own number
    nb.set_num_threads(threads[1])
    # Dictionaries over all records, which only FFCV's other cache uses: 0.6 GB per rank on ImageNet.
    memory: Any = file.memory_manager
    memory.ptr_to_size, memory.sample_to_pages, memory.page_to_samples = {}, {}, {}
    return file


def _extents(file: StockLoader, source: ShardSource) -> np.ndarray:
    """Return where the JPEG of each record lies in the file, int64 [n, 2]: offset and length.

    Raises:
        UserError: the file does not describe the records of the shard set.
    """
    image = file.reader.metadata["f0"]
    sizes = np.stack([image["height"], image["width"]], axis=1)
    if not np.array_equal(sizes, source.sizes) or image["mode"].any():
        raise _damaged(source, "its metadata is not that of the shard set")
    allocations = np.sort(file.reader.alloc_table, order="ptr")
    found = np.searchsorted(allocations["ptr"], image["data_ptr"])
    found = np.minimum(found, max(len(allocations) - 1, 0))
    extents = np.stack([image["data_ptr"], allocations["size"][found]], axis=1).astype(np.int64)
    bytes_in_file = source.manifest.beton.stat().st_size
    if (allocations["ptr"][found] != image["data_ptr"]).any() or (
        extents.sum(axis=1) > bytes_in_file
    ).any():
        raise _damaged(source, "its table of records is damaged")
    return extents


def _damaged(source: ShardSource, what: str) -> UserError:
    return UserError(f"{source.manifest.beton}: {what}; check it with `make verify`, convert again")


def _next(iterator: EpochIterator) -> np.ndarray:
    """Return the status of every image of the next batch, int32 [B]."""
    while True:
        try:
            _, (status,) = iterator.output_queue.get(timeout=1)
            return status[:, 0].copy()  # FFCV uses its memory again
        except Empty:
            if not iterator.is_alive():
                raise RuntimeError("FFCV's thread ended early; its error is above") from None


def _stop(iterator: EpochIterator) -> None:
    """End FFCV's thread: it finishes the batch at hand and finds no further one."""
    iterator.iter_ixes = iter(())
    while iterator.is_alive():
        try:
            iterator.output_queue.get(timeout=0.01)  # the thread may wait for room to put
        except Empty:
            continue
    iterator.close()
