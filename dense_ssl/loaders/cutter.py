"""From one encoded JPEG to all of its crops in one compiled call, for any thread of any library.

The call is a C function of integers: record, place in the batch, and the address of a table. What
changes from epoch to epoch and from batch to batch (boxes, flips, where the crops go) is found through
that table, so nothing is ever compiled again, and whoever calls it compiles no more than the call.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numba as nb
import numpy as np
import torch
from torch import Tensor

from dense_ssl.loaders.batch import cut_views
from dense_ssl.loaders.jpeg import OK, REASONS, Decode, checked
from dense_ssl.loaders.resample import Layout, crop_table, cut, layout
from dense_ssl.loaders.simd import pointer
from dense_ssl.views import CropPlan, ViewSpec

# What the table holds at which position: addresses of arrays, then numbers.
_BOXES, _FLIPPED, _SIZES, _SCRATCH, _TARGETS, _CROPS, _NUM_CROPS, _NUM_VIEWS, _LAYOUT = range(9)
_TABLE = _LAYOUT + len(Layout._fields)
_ALIGNMENT = 64


class Cutter:
    """The memory behind the table, and the compiled function that works in it.

    Args:
        sizes: int [n, 2], height and width of the records.
        views: the whole recipe.
        decode: decodes a JPEG, as FFCV's `imdecode`.
        threads: how many may call at a time.
        slots: batches that may be written at a time.
        pinned: whether batches will be sent to a GPU.
    """

    def __init__(
        self,
        sizes: np.ndarray,
        views: Sequence[ViewSpec],
        decode: Decode,
        *,
        threads: int,
        slots: int,
        pinned: bool,
    ) -> None:
        self._views, self._pinned = cut_views(views), pinned
        self._sizes = np.ascontiguousarray(sizes, np.int32)
        self._crops = crop_table(views)
        self._spare_thread, self._spare_slot = threads, slots  # for `show`
        memory = layout(self._sizes, self._crops)
        # Pages that no thread touches cost nothing.
        self._scratch = np.empty((threads + 1) * memory.total + _ALIGNMENT, np.uint8)
        self._targets = np.zeros((slots + 1, len(self._crops)), np.int64)
        self._plan: CropPlan | None = None  # keeps alive what the table points to
        self._table = np.zeros(_TABLE, np.int64)
        self._table[_SIZES] = self._sizes.ctypes.data
        self._table[_SCRATCH] = -(-self._scratch.ctypes.data // _ALIGNMENT) * _ALIGNMENT
        self._table[_TARGETS] = self._targets.ctypes.data
        self._table[_CROPS] = self._crops.ctypes.data
        self._table[_NUM_CROPS] = len(self._crops)
        self._table[_NUM_VIEWS] = sum(view.count for view in views)
        self._table[_LAYOUT:] = memory
        self._compiled = _compile(decode)

    @property
    def function(self) -> Any:
        """The C function, callable from Python and from numba; its arguments are int64.

        (address and length of the JPEG, record, row in the batch, slot, thread, `table_address`)
        It returns OK, or a key of REASONS.
        """
        return self._compiled.ctypes

    @property
    def table_address(self) -> int:
        """The address of the table, for as long as this object lives."""
        return self._table.ctypes.data

    def follow(self, plan: CropPlan) -> None:
        """Cut by `plan`, which has a row for every record, from now on."""
        self._plan = plan
        self._table[_BOXES] = plan.boxes.ctypes.data
        self._table[_FLIPPED] = plan.flipped.ctypes.data

    def place(self, slot: int, records: np.ndarray) -> dict[str, Tensor]:
        """Return memory for the crops of `records`, where the batch of `slot` goes from now on.

        uint8 [V, B, 3, S, S] by view.
        """
        images = {
            view.name: torch.empty(
                (view.count, len(records), 3, view.size, view.size),
                dtype=torch.uint8,
                pin_memory=self._pinned,
            )
            for view in self._views
        }
        self._aim(slot, images)
        return images

    def _aim(self, slot: int, images: Mapping[str, Tensor]) -> None:
        tensors = [images[view.name] for view in self._views]
        self._targets[slot] = [crop.data_ptr() for views in tensors for crop in views]

    def show(self, encoded: bytes, index: int, row: int, images: Mapping[str, Tensor]) -> None:
        """Write record `index`, whose JPEG is `encoded`, to row `row` of `images`.

        Raises:
            ValueError: it cannot be shown.
        """
        self._aim(self._spare_slot, images)
        data = np.frombuffer(encoded, np.uint8)
        status = self.function(
            *(data.ctypes.data, len(data), index, row),
            *(self._spare_slot, self._spare_thread, self.table_address),
        )
        if status != OK:
            raise ValueError(REASONS[status])


@cache
def _compile(decode: Decode) -> Any:
    """Return the C function over `decode`."""
    decode_to = checked(decode)

    def show(
        address: int, length: int, index: int, row: int, slot: int, thread: int, table_address: int
    ) -> int:
        table = nb.carray(pointer(table_address), (_TABLE,), np.int64)
        views, count, part = table[_NUM_VIEWS], table[_NUM_CROPS], table[_LAYOUT:]
        memory = Layout(
            *(part[0], part[1], part[2], part[3], part[4], part[5]),
            *(part[6], part[7], part[8], part[9], part[10], part[11]),
        )
        sizes = nb.carray(pointer(table[_SIZES] + 8 * index), (2,), np.int32)
        height, width = int(sizes[0]), int(sizes[1])
        scratch = table[_SCRATCH] + thread * memory.total
        status = decode_to(address, length, height, width, scratch + memory.image)
        if status != OK:
            return status
        cut(
            height,
            width,
            nb.carray(pointer(table[_BOXES] + 8 * index * views), (views, 4), np.int16),
            nb.carray(pointer(table[_FLIPPED] + index * views), (views,), np.bool_),
            nb.carray(pointer(table[_CROPS]), (count, 3), np.int64),
            nb.carray(pointer(table[_TARGETS] + 8 * slot * count), (count,), np.int64),
            row,
            scratch,
            memory,
        )
        return OK

    return nb.cfunc(nb.int64(*[nb.int64] * 7), error_model="numpy")(show)
