"""JPEGs decoded in compiled code that knows why one cannot be."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numba as nb
import numpy as np

from dense_ssl.loaders.simd import pointer

# decode(data, image, height, width, height, width, 0, 0, 1, 1, False, False) -> 0 if all went well
Decode = Callable[..., int]

OK, NOT_DECODABLE, WRONG_SIZE, NOT_JPEG = range(4)
REASONS = {
    NOT_DECODABLE: "its JPEG data is damaged",
    WRONG_SIZE: "its JPEG header gives another size than the shard set",
    NOT_JPEG: "it is not a JPEG",
}


@cache
def checked(decode: Decode) -> Any:
    """Return the compiled function (address, length, height, width, target) -> OK or a key of REASONS.

    It decodes the JPEG at `address` to uint8 [height, width, 3] at address `target`, with FFCV's
    `imdecode` or a function like it.
    """
    compiled_decode = nb.njit(decode)

    @nb.njit(error_model="numpy")
    def decode_to(address: int, length: int, height: int, width: int, target: int) -> int:
        data = nb.carray(pointer(address), (length,), np.uint8)
        found_height, found_width = jpeg_size(data)
        if found_height == 0:
            return NOT_JPEG
        if found_height != height or found_width != width:
            return WRONG_SIZE
        image = nb.carray(pointer(target), (height * width * 3,), np.uint8)
        h, w = np.uint32(height), np.uint32(width)
        if compiled_decode(data, image, h, w, h, w, 0, 0, 1, 1, False, False) != 0:
            return NOT_DECODABLE
        return OK

    return decode_to


@nb.njit(error_model="numpy")
def jpeg_size(data: np.ndarray) -> tuple[int, int]:
    """Return (height, width) from the frame header of a JPEG, (0, 0) where there is none.

    libjpeg-turbo, given other dimensions than the header's, would scale or fill a part only.
    """
    if len(data) < 4 or data[0] != 0xFF or data[1] != 0xD8:
        return 0, 0
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height = (int(data[at + 5]) << 8) + int(data[at + 6])
            return height, (int(data[at + 7]) << 8) + int(data[at + 8])
        if marker == 0xFF:  # a filling byte
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:  # markers without a length
            at += 2
        elif marker in (0xD9, 0xDA):  # the end, or pixels before any frame header
            return 0, 0
        else:
            at += 2 + (int(data[at + 2]) << 8) + int(data[at + 3])
    return 0, 0
