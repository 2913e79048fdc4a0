"""Files that are there whole or not at all, and one conversion at a time into a folder."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dataprep.manifest import DataError


@contextmanager
def replacing(path: Path, aside: Path) -> Iterator[BinaryIO]:
    """Yield a file in folder `aside` that takes the name `path` once written out to the disk.

    If the block raises, `path` stays as it was and nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = aside / f"{path.name}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_whole(path: Path, data: bytes, aside: Path) -> None:
    """Write a small file so that it is there whole or not at all."""
    with replacing(path, aside) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Make names given in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock file of a folder; the kernel drops it with its owner, however that one ends.

    Raises:
        DataError: another process holds it.
    """
    with (folder / "lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise DataError(
                f"{folder.parent}: another conversion is writing here; wait for it or stop it"
            ) from None
        yield


def explain(error: OSError, target: Path) -> DataError:
    """Return a failed write as the one sentence the user needs."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(f"{target}: {reason}; make room and repeat the command: it continues")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT):
        return DataError(f"{target}: cannot be written ({reason}); choose another OUT")
    return DataError(f"{error.filename or target}: {reason}; see to it and repeat the command")
