"""The structure of a JPEG file (ITU-T T.81, annex B), read without decoding it."""

import re
import struct
from dataclasses import dataclass

# In entropy-coded data a marker is 0xFF followed by neither a stuffed zero, a restart nor a fill byte.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0..15 without DHT, JPG, DAC
_PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive; Huffman coded
_SAMPLINGS = ((1, 1), (2, 1), (2, 2), (1, 2), (4, 1))  # luma; 4:4:4, 4:2:2, 4:2:0, 4:4:0, 4:1:1


@dataclass(frozen=True)
class Layout:
    """What the markers of a JPEG say."""

    scans: int
    end: int  # first byte after the end-of-image marker
    plain: bool  # 8-bit Y'CbCr of three components as every decoder takes it


def read_layout(data: bytes) -> Layout | None:
    """Return the structure of a JPEG, or None where its markers do not lead to an end of image."""
    if data[:2] != b"\xff\xd8":
        return None
    position, scans, frame, components = 2, 0, 0, b""
    adobe_transform, jfif = -1, False
    try:
        while True:
            if data[position] != 0xFF:
                return None
            while data[position] == 0xFF:
                position += 1
            marker = data[position]
            position += 1
            if marker == 0xD9:
                break
            (length,) = struct.unpack_from(">H", data, position)
            segment = data[position + 2 : position + length]
            position += length
            if marker in _FRAMES:
                frame, components = marker, segment
            elif marker == 0xE0 and segment[:5] == b"JFIF\0":
                jfif = True
            elif marker == 0xEE and segment[:5] == b"Adobe":
                adobe_transform = segment[11]
            elif marker == 0xDA:
                scans += 1
                found = _NEXT_MARKER.search(data, position)
                if found is None:
                    return None
                position = found.start()
    except (IndexError, struct.error):
        return None
    plain = frame in _PLAIN_FRAMES and _is_ycbcr(components, adobe_transform, jfif)
    return Layout(scans, position, plain)


def _is_ycbcr(frame: bytes, adobe_transform: int, jfif: bool) -> bool:
    """Return whether a frame header describes 8-bit Y'CbCr with one of the usual samplings."""
    if len(frame) != 15 or frame[0] != 8 or frame[5] != 3:  # precision, number of components
        return False
    identifiers = frame[6], frame[9], frame[12]
    factors = [(frame[i] >> 4, frame[i] & 15) for i in (7, 10, 13)]
    told = adobe_transform == 1 or (adobe_transform < 0 and (jfif or identifiers == (1, 2, 3)))
    return told and factors[0] in _SAMPLINGS and factors[1:] == [(1, 1), (1, 1)]
