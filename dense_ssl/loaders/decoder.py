"""From encoded JPEGs to decoded images in the memory of a batch: the device will cut them.

The call is a C function of integers, as that of `cutter`; it leaves alone the thread it runs in.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numba as nb
import numpy as np
import torch

from dense_ssl.loaders.decoded import Decoded
from dense_ssl.loaders.jpeg import OK, REASONS, Decode, checked
from dense_ssl.loaders.simd import pointer
from dense_ssl.views import CropPlan, ViewSpec

# What the table holds at which position: addresses of arrays, then a number.
_SIZES, _TARGETS, _NUM_ROWS = range(3)


class Decoder:
    """The table behind the compiled function, and where the images of each batch go.

    Args:
        sizes: int [n, 2], height and width of the records.
        views: the whole recipe.
        decode: decodes a JPEG, as FFCV's `imdecode`.
        rows: the largest number of images in a batch.
        slots: batches that may be written at a time.
        pinned: whether batches will be sent to a GPU.
    """

    def __init__(
        self,
        sizes: np.ndarray,
        views: Sequence[ViewSpec],
        decode: Decode,
        *,
        rows: int,
        slots: int,
        pinned: bool,
    ) -> None:
        self._views, self._pinned = tuple(views), pinned
        self._sizes = np.ascontiguousarray(sizes, np.int32)
        self._spare_slot = slots  # for `show`
        self._targets = np.zeros((slots + 1, rows), np.int64)
        self._table = np.array([self._sizes.ctypes.data, self._targets.ctypes.data, rows], np.int64)
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
        """Do nothing: boxes are for the device."""

    def place(self, slot: int, records: np.ndarray) -> Decoded:
        """Return memory for the images of `records`, where the batch of `slot` goes from now on."""
        images = Decoded(
            self._views, self._sizes[records], torch.device("cpu"), pinned=self._pinned
        )
        self._targets[slot, : len(records)] = images.memory.data_ptr() + images.offsets
        return images

    def show(self, encoded: bytes, index: int, row: int, images: Decoded) -> None:
        """Put record `index`, whose JPEG is `encoded`, in row `row` of `images`.

        Raises:
            ValueError: it cannot be decoded.
        """
        data = np.frombuffer(encoded, np.uint8)
        image = torch.empty((*self._sizes[index].tolist(), 3), dtype=torch.uint8)
        self._targets[self._spare_slot, 0] = image.data_ptr()
        status = self.function(
            *(data.ctypes.data, len(data), index, 0, self._spare_slot, 0, self.table_address)
        )
        if status != OK:
            raise ValueError(REASONS[status])
        images.put(row, image)


@cache
def _compile(decode: Decode) -> Any:
    """Return the C function over `decode`."""
    decode_to = checked(decode)

    def show(
        address: int, length: int, index: int, row: int, slot: int, thread: int, table_address: int
    ) -> int:
        table = nb.carray(pointer(table_address), (_NUM_ROWS + 1,), np.int64)
        sizes = nb.carray(pointer(table[_SIZES] + 8 * index), (2,), np.int32)
        target = table[_TARGETS] + 8 * (slot * table[_NUM_ROWS] + row)
        to = nb.carray(pointer(target), (1,), np.int64)[0]
        return decode_to(address, length, int(sizes[0]), int(sizes[1]), to)

    return nb.cfunc(nb.int64(*[nb.int64] * 7), error_model="numpy")(show)
