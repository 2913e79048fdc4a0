"""Files of `torch.save` from elsewhere: plain tensors and values, no code, no more memory than bytes.

torch's restricted loader keeps code out. What it lets in are files that claim more than they hold: deflated
records, tensors of a billion elements over one, byte arrays of any length.
"""

import mmap
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# torch lets `bytearray(n)` be called with any n. As a pickle of protocol 2 or 0 names it:
_BYTE_ARRAYS = (b"cbuiltins\nbytearray\n", b"c__builtin__\nbytearray\n")
_MOST = 10_000_000  # values
_DEEPEST = 64  # containers within one another; a checkpoint of ours has 5


class NotPlain(ValueError):
    """What is wrong with a file, in one line."""


def load(path: Path, harmless: Sequence[Any] = ()) -> Any:
    """Return the content of a file, on the CPU.

    Args:
        path: written by `torch.save`, in its present or its former format.
        harmless: types and functions that may be named beside torch's own.

    Raises:
        OSError: it cannot be read.
        NotPlain: it is damaged, would need code to be run, or claims more than it holds.
    """
    try:
        _check_records(path)
        with torch.serialization.safe_globals(list(harmless)):
            content = torch.load(path, map_location="cpu", weights_only=True)
        _check(content, path.stat().st_size)
    except (OSError, NotPlain):
        raise
    except Exception as error:  # a damaged pickle can raise anything at all
        raise NotPlain(" ".join(str(error).split()) or type(error).__name__) from None
    return content


def _check_records(path: Path) -> None:
    """Refuse records that are packed or overlap, and pickles that ask for byte arrays."""
    if path.stat().st_size == 0:
        raise NotPlain("empty")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise NotPlain("its records are packed, which torch never does")
            if sum(member.file_size for member in members) > path.stat().st_size:
                raise NotPlain("its records claim more bytes than it has")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if any(data.find(name) >= 0 for name in _BYTE_ARRAYS):
            raise NotPlain("GLOBAL builtins.bytearray was not an allowed global")


def _check(content: Any, size: int) -> None:
    """Refuse tensors that are not dense or larger than what stores them, and endless containers.

    Args:
        content: of a file.
        size: of the file in bytes.
    """
    waiting: list[tuple[Any, int]] = [(content, 0)]
    total = 0
    while waiting:
        value, depth = waiting.pop()
        total += 1
        if depth > _DEEPEST or total > min(size, _MOST):
            raise NotPlain("its containers are nested without end")
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_quantized or value.is_meta:
                raise NotPlain(f"holds a tensor of layout {value.layout}, or without values")
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise NotPlain("holds a tensor of more elements than it stores")
        elif isinstance(value, dict):
            waiting += [(child, depth + 1) for child in value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += [(child, depth + 1) for child in value]
