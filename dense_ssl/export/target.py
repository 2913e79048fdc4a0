"""What every target of an export is: whether it fits a network, and the files it writes."""

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dense_ssl.export.source import Checked, Source


@dataclass(frozen=True, slots=True)
class Draft:
    """A file or folder that is written aside, checked, and only then given its name."""

    name: str
    write: Callable[[Path], None]
    check: Callable[[Path, Source], Checked]  # raises `source.Differs`
    options: Mapping[str, Any] | None = None  # what timm must be told, if it reads the file


@dataclass(frozen=True, slots=True)
class Target:
    """One value of TO=."""

    obstacle: Callable[[Source], str | None]  # why it cannot be, in words for the user
    drafts: Callable[[Source], list[Draft]]
    in_all: bool = True  # TO=all writes it where nothing stands in the way


def always(_: Source) -> None:
    """No obstacle."""


def file(name: str, data: bytes, check: Callable[[Path, Source], Checked], **more: Any) -> Draft:
    """Return the draft of one file of these bytes."""
    return Draft(name, lambda path: write(path, data), check, **more)


def write(path: Path, data: bytes) -> None:
    """Write bytes and see them onto the disk."""
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def pickled(content: Mapping[str, Any]) -> bytes:
    """Return what `torch.save` would write."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    return buffer.getvalue()
