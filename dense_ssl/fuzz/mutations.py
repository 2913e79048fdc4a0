"""Damage to a file's bytes, drawn from a generator: what storage does to files, and what people do."""

import struct
from collections.abc import Sequence

import numpy as np

MOST = 6  # changes to one file
# Numbers that parsers trip over: signs, and the ends of 8, 16, 32 and 64 bits.
NUMBERS = (
    0, 1, -1, 127, 128, 255, 256, 32767, 65535, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 63) - 1
)  # fmt: skip
WORDS = (
    *(str(number).encode() for number in NUMBERS),
    *(struct.pack("<q", number) for number in NUMBERS),
    *(struct.pack("<i", number) for number in NUMBERS[:10]),
    # JSON and YAML
    b"1e999", b"-1e999", b"NaN", b"null", b"true", b"[]", b"{}", b'""', b'"\\ud800"', b"\x00", b"\xff\xfe",
    b"../../../../tmp/x", b"/tmp/x", b"&a [*a, *a]", b"*a", b"<<: *a", b"!!python/object:os.system",
    b"? ", b"- " * 300, b"[" * 3000, b'{"a":' * 3000,
    # XML
    b'<!DOCTYPE x [<!ENTITY a "aaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]>', b"&b;", b"<object>",
    b"<![CDATA[", b"<!--", b'<!ENTITY e SYSTEM "file:///etc/passwd">', b"nan", b"inf", b"1e400",
    # pickles
    b"cos\nsystem\n(S'true'\ntR.", b"c__builtin__\neval\n", b"\x8c\x05posix\x8c\x06system\x93",
    b"cbuiltins\nbytearray\n", b"\x80\x02", b"r\xff\xff\xff\x7f", b"\x8e\xff\xff\xff\xff\xff\x00\x00\x00",
    # archives, pictures, arrays
    b"PK\x03\x04", b"PK\x05\x06", b"ustar\x00", b"\xff\xd8", b"\xff\xda", b"\x93NUMPY",
)  # fmt: skip


def mutated(data: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    """Return a damaged copy of `data`; pieces of `others` may be put into it."""
    for _ in range(rng.integers(1, MOST + 1)):
        data = _changed(data, others, rng)
    return data


def _changed(data: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    at = int(rng.integers(0, len(data) + 1))
    length = int(min(2 ** rng.integers(0, 12), len(data) - at))
    before, piece, after = data[:at], data[at : at + length], data[at + length :]
    kind = rng.integers(0, 8)
    if kind == 0:  # a bit
        return (
            before + bytes([piece[0] ^ (1 << rng.integers(0, 8))]) + piece[1:] + after
            if piece
            else data
        )
    if kind == 1:  # random bytes
        return before + rng.bytes(length) + after
    if kind == 2:  # cut out
        return before + after
    if kind == 3:  # cut off
        return before
    if kind == 4:  # twice
        return before + piece * int(rng.integers(2, 20)) + after
    if kind == 5:  # a word in place
        word = WORDS[int(rng.integers(0, len(WORDS)))]
        return before + word + (piece + after)[len(word) :]
    if kind == 6:  # a word between
        return before + WORDS[int(rng.integers(0, len(WORDS)))] + piece + after
    other = others[int(rng.integers(0, len(others)))]
    start = int(rng.integers(0, len(other) + 1))
    return before + other[start : start + length] + after


def a_number_replaced(text: bytes, rng: np.random.Generator) -> bytes:
    """Return a text in which one run of digits is another number; a text without digits as it is."""
    runs = [(i, j) for i, j in _runs_of_digits(text)]
    if not runs:
        return text
    start, stop = runs[int(rng.integers(0, len(runs)))]
    return text[:start] + str(NUMBERS[int(rng.integers(0, len(NUMBERS)))]).encode() + text[stop:]


def _runs_of_digits(text: bytes) -> list[tuple[int, int]]:
    runs, start = [], None
    for place, byte in enumerate(text + b" "):
        digit = 48 <= byte <= 57
        if digit and start is None:
            start = place
        elif not digit and start is not None:
            runs.append((start, place))
            start = None
    return runs
