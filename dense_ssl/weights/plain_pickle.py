"""Pickles of numpy arrays, written for every numpy and read without numpy's own unpickling.

numpy's constructors trust what a pickle tells them (an object array over a byte buffer takes the bytes
for pointers), so a file from elsewhere is read with the stand-ins below: only booleans, integers and
floats ever become arrays. `NUMBERS` also serves torch's restricted loader.
"""

import collections
import io
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np


class PlainDtype:
    """Stand-in for `numpy.dtype`: a code such as `f4`, then its byte order as state."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code = code
        self.order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Take the byte order from the tuple that numpy stores."""
        self.order = {"<": "<", ">": ">"}.get(state[1], "=")

    def resolve(self) -> np.dtype:
        """Return the numpy type; refuse all but plain numbers."""
        dtype = np.dtype(str(self.code)).newbyteorder(self.order)  # pyright: ignore
        if dtype.kind not in "biuf":
            raise pickle.UnpicklingError(f"an array of {dtype}")
        return dtype


class _PlainArray:
    """Stand-in for `numpy.ndarray`, filled by its constructor or by the state that follows."""

    def __init__(self, shape: tuple[int, ...], dtype: str, buffer: Any = b"") -> None:
        self.value = _array(buffer, PlainDtype(dtype), shape)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Take shape, type, order and bytes from the tuple that numpy stores."""
        _, shape, dtype, fortran, raw = state
        self.value = _array(raw, dtype, shape, "F" if fortran else "C")


def _array(raw: Any, dtype: PlainDtype, shape: tuple[int, ...], order: str = "C") -> np.ndarray:
    raw = raw.encode("latin1") if isinstance(raw, str) else bytes(raw)  # str: a pickle of Python 2
    flat = np.frombuffer(raw, dtype.resolve())
    if flat.size != math.prod(shape):
        raise pickle.UnpicklingError("an array of another size than its bytes")
    return flat.reshape(shape, order="F" if order == "F" else "C").copy()


def _scalar(dtype: PlainDtype, raw: Any) -> Any:
    return _array(raw, dtype, ()).item()


def _bytes_of(raw: Any = b"", *encoding: str) -> bytes:
    """Return bytes; never as many of them as a number asks for."""
    if not isinstance(raw, bytes | bytearray | str):
        raise pickle.UnpicklingError(f"a byte array of {type(raw).__name__}")
    return raw.encode(*encoding) if isinstance(raw, str) else bytes(raw)


def _both(name: str, stand_in: Any) -> dict[str, Any]:
    """Return a stand-in under the module names of numpy 1 and numpy 2."""
    return {f"numpy.core.{name}": stand_in, f"numpy._core.{name}": stand_in}


NUMBERS: dict[str, Any] = {"numpy.dtype": PlainDtype, **_both("multiarray.scalar", _scalar)}
_ARRAYS: dict[str, Any] = {
    **NUMBERS,
    "numpy.ndarray": _PlainArray,
    **_both("multiarray._reconstruct", lambda *_: _PlainArray((0,), "u1")),
    **_both("numeric._frombuffer", _array),
    "_codecs.encode": lambda text, _: text.encode("latin1"),
    "builtins.bytearray": _bytes_of,
    "collections.OrderedDict": collections.OrderedDict,
}


class _Reader(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]
    """The unpickler in Python: the one in C takes memory for whatever place a pickle wants to note."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name, or refuse it in torch's words."""
        path = f"{module}.{name}"
        if path not in _ARRAYS:
            raise pickle.UnpicklingError(f"GLOBAL {path} was not an allowed global")
        return _ARRAYS[path]


class _Writer(pickle.Pickler):
    def reducer_override(self, obj: Any, /) -> Any:
        """Store arrays by their public constructor: numpy 1 lacks the modules that numpy 2 names."""
        if isinstance(obj, np.ndarray):
            return np.ndarray, (obj.shape, obj.dtype.str, bytearray(obj.tobytes()))
        return NotImplemented


def dumps(content: dict[str, Any]) -> bytes:
    """Return the pickle of nested dictionaries of arrays and plain values."""
    out = io.BytesIO()
    _Writer(out, protocol=4).dump(content)
    return out.getvalue()


def read(path: Path) -> Any:
    """Return what a pickle holds: dictionaries and lists of arrays and plain values.

    Raises:
        Exception: of any type, where the file is damaged or names anything else.
    """
    with path.open("rb") as file:
        return _unwrap(_Reader(file, encoding="latin1").load())


def _unwrap(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _unwrap(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_unwrap(value) for value in content]
    return content.value if isinstance(content, _PlainArray) else content
