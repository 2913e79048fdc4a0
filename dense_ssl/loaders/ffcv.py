"""FFCV executes the plan: one decode per image, then every crop of it, in FFCV's own threads.

The decoder is an FFCV operation of ours. It reads boxes and flips of the running epoch through a fixed
address, so nothing is compiled twice, and it writes each crop once: to where the batch keeps it. Where the
device cuts, it decodes to where the batch keeps the images, and that is all.

Pixels are those of `folder` but for the JPEG decoder's arithmetic: FFCV asks libjpeg-turbo for its
fast inverse DCT. Boxes, flips, order and replaced records are the same.
"""

import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from queue import Empty
from typing import Any, Protocol
from unittest import mock

import numba as nb
import numpy as np
import torch

from dense_ssl.config import UserError
from dense_ssl.loaders.cutter import Cutter
from dense_ssl.loaders.decoder import Decoder
from dense_ssl.loaders.jpeg import REASONS
from dense_ssl.loaders.loader import Pixels, Reading
from dense_ssl.loaders.simd import pointer
from dense_ssl.loaders.source import ShardSource
from dense_ssl.views import CropPlan

_torch_threads = torch.get_num_threads()
# FFCV keeps two words in numba's dictionary for compiled code, which compiles for 2.8 CPU s; it looks them up
# in Python only, where any dictionary will do.
with warnings.catch_warnings(), mock.patch("numba.typed.Dict", dict):
    warnings.simplefilter("ignore")  # of names that Python has deprecated since
    from ffcv.libffcv import imdecode
    from ffcv.loader import Loader as StockLoader
    from ffcv.loader import epoch_iterator
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.memory_managers import OSCacheManager
    from ffcv.pipeline import PipelineSpec
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.operation import Operation
    from ffcv.pipeline.state import State
torch.set_num_threads(_torch_threads)  # FFCV's import sets it to 1
# Nothing that FFCV does here is for a GPU, but its thread would make streams and events on GPU 0, and so
# leave a CUDA context of every rank in that card's memory.
epoch_iterator.IS_CUDA = False
if nb.config.THREADING_LAYER == "default":  # pyright: ignore[reportAttributeAccessIssue]
    # numba's last resort, "workqueue", ends the process when two loaders run at a time.
    nb.config.THREADING_LAYER = "threadsafe"  # pyright: ignore[reportAttributeAccessIssue]

BATCHES_AHEAD = 3
RING = BATCHES_AHEAD + 2  # batches that FFCV may be writing or holding while one is asked for


def _memory_type(_: OSCacheManager) -> Any:
    return nb.types.Tuple([_BYTES, nb.uint64[::1], nb.uint64[::1]])


def _compile_reader(manager: OSCacheManager) -> Any:
    """Return the compiled function (address, memory) -> the bytes of the record there."""

    def read(address, memory):  # noqa: ANN001, ANN202
        file, starts, lengths = memory
        return file[address : address + lengths[np.searchsorted(starts, address)]]

    return Compiler.compile(read, _BYTES(nb.uint64, manager.state_type))


# FFCV marks numba's one type of all byte arrays as read-only where it means those of its file: what is
# compiled after that, for anybody in this process, cannot write to a byte array.
_BYTES: Any = nb.types.Array(nb.uint8, 1, "C", readonly=True)
OSCacheManager.state_type = property(_memory_type)  # pyright: ignore[reportAttributeAccessIssue]
OSCacheManager.compile_reader = _compile_reader  # pyright: ignore[reportAttributeAccessIssue]


class Writer(Protocol):
    """Compiled code that FFCV runs for every image, and the memory of the batches it writes."""

    @property
    def function(self) -> Any: ...  # noqa: D102  (see Cutter, Decoder)
    @property
    def table_address(self) -> int: ...  # noqa: D102

    def follow(self, plan: CropPlan) -> None:
        """Show the crops of `plan` from now on."""
        ...

    def place(self, slot: int, records: np.ndarray) -> Any:
        """Return memory for the pixels of `records`, where the batch of `slot` goes from now on."""
        ...

    def show(self, encoded: bytes, index: int, row: int, images: Any) -> None:
        """Write record `index`, whose JPEG is `encoded`, to row `row` of what `place` returned."""
        ...


class FfcvReader:
    """Reads a shard set in FFCV's format, to the CPU; pinned where `reading.device` is a GPU."""

    def __init__(self, reading: Reading) -> None:
        source = reading.source
        if not isinstance(source, ShardSource) or "ffcv" not in source.manifest.formats:
            raise UserError(
                "data.loader=ffcv: data.path holds no FFCV file; convert it with `make shards "
                "FORMAT=ffcv`, or use data.loader=folder"
            )
        self._source, self._replacements = source, reading.replacements
        threads = nb.config.NUMBA_NUM_THREADS  # pyright: ignore[reportAttributeAccessIssue]
        what = (source.sizes, reading.views, imdecode)
        self._writer: Writer
        if reading.cut == "host":
            self._writer = Cutter(*what, threads=threads, slots=RING, pinned=reading.pinned)
        else:
            self._writer = Decoder(
                *what, rows=reading.micro_batch, slots=RING, pinned=reading.pinned
            )
        self._operation = _Operation(self._writer)
        workers = min(reading.workers, threads)
        self._file = _open(source, self._operation, reading.micro_batch, workers)
        self._bytes = np.memmap(source.manifest.beton, np.uint8, "r")
        self._extents = _extents(self._file, source)

    def close(self) -> None:
        """Do nothing: FFCV's thread ends with its epoch."""

    def read(
        self, plan: CropPlan, order: Sequence[np.ndarray]
    ) -> Generator[tuple[np.ndarray, Pixels]]:
        """Yield the records shown, int64 [B], and their pixels, batch by batch."""
        if not order:
            return
        self._writer.follow(plan)
        self._operation.calls[0] = 0
        pending = deque(self._writer.place(i, batch) for i, batch in enumerate(order[:RING]))
        threads = torch.get_num_threads()
        iterator = EpochIterator(self._file, np.concatenate(order))  # pyright: ignore[reportArgumentType]
        try:
            for number, wanted in enumerate(order):
                status = _next(iterator)
                if number == 0:
                    torch.set_num_threads(threads)  # what FFCV's thread began by changing
                images = pending.popleft()
                index = self._check(wanted, status, images)
                after = number + RING
                if after < len(order):
                    # Not begun yet: FFCV has no room for it before the next batch is asked for.
                    pending.append(self._writer.place(after % RING, order[after]))
                yield index, images
        finally:
            _stop(iterator)

    def _check(self, wanted: np.ndarray, status: np.ndarray, images: Pixels) -> np.ndarray:
        """Return the records shown, after putting neighbours where one could not be."""
        shown = wanted.copy()
        for row, (index, code) in enumerate(zip(wanted.tolist(), status.tolist())):
            reason = REASONS.get(code) or self._differs(index)
            if reason is not None:
                self._replacements.note(index, reason)
                shown[row], _ = self._replacements.show(
                    index,
                    lambda i, row=row: self._writer.show(self._source.read(i), i, row, images),
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


class _Operation(Operation):
    """FFCV's decoder of the image field: runs the writer, and gives FFCV only a status per image."""

    def __init__(self, writer: Writer) -> None:
        super().__init__()
        self.calls = np.zeros(1, np.int64)  # batches of this epoch that FFCV has begun
        self._writer = writer

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        """Ask FFCV for one int32 per image."""
        shape, dtype = (1,), np.dtype("<i4")
        state = replace(previous_state, jit_mode=True, shape=shape, dtype=dtype)
        return state, AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable[..., Any]:
        """Return the function that FFCV compiles; what it closes over is constant to it."""
        read: Any = self.memory_read  # (address, storage) -> the bytes there
        rows = Compiler.get_iterator()
        show, table_address = self._writer.function, self._writer.table_address
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


def _open(source: ShardSource, operation: _Operation, batch_size: int, workers: int) -> StockLoader:
    """Return FFCV's loader of the shard set's file.

    Raises:
        UserError: it is not a file of FFCV's.
    """
    threads = torch.get_num_threads(), nb.get_num_threads()
    pipelines: dict[str, Any] = {"image": PipelineSpec("image", decoder=operation), "label": None}
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
