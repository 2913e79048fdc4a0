"""What a reader may do with a hostile file: say no, in bounded time and memory, and touch nothing else."""

import contextlib
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

CPU_S = 10.0  # processor time of one file; the slowest honest reader here takes 0.1
MEMORY_MIB = 512  # that one file may add
ADDRESS_GIB = 8  # beyond what is mapped already: the machine is not brought down by what is found

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = ("os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod")
_NEVER = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "socket.connect",
    "pty.spawn",
)


class Broken(BaseException):
    """A promise that a reader has not kept; no reader can catch it by mistake."""


class _Watch(threading.local):
    """The folder that this thread's reader may write to; None: nobody is watched."""

    folder: str | None = None


_watch = _Watch()
_installed = False


@contextlib.contextmanager
def bounded(folder: Path) -> Iterator[None]:
    """Hold what runs inside, on the main thread, to its promises; it may write below `folder` only.

    Raises:
        Broken: one was not kept.
    """
    _install()
    before = _peak_mib(reset=True)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(
        resource.RLIMIT_AS, (pages * resource.getpagesize() + (ADDRESS_GIB << 30), limits[1])
    )
    handler = signal.signal(signal.SIGPROF, _too_slow)
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    _watch.folder = str(folder.resolve())
    try:
        yield
    finally:
        _watch.folder = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    added = _peak_mib() - before
    if added > MEMORY_MIB:
        raise Broken(f"took {added:.0f} MiB")


def _peak_mib(reset: bool = False) -> float:
    """Return the most memory this process has held, since the last reset: proc(5), VmHWM."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) / 1024


def _too_slow(_number: int, _frame: FrameType | None) -> None:
    raise Broken(f"took more than {CPU_S:.0f} s of processor time")


def _install() -> None:
    """Let the interpreter report what a reader touches; a hook cannot be taken away again."""
    global _installed
    if not _installed:
        sys.addaudithook(_seen)
        _installed = True


def _seen(event: str, arguments: tuple[Any, ...]) -> None:
    folder = _watch.folder
    if folder is None:
        return
    if event.startswith(_NEVER):
        raise Broken(f"{event} {arguments!r:.200}")
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
    if writes or event in _CHANGES or event == "os.rename":
        for path in arguments[: 2 if event == "os.rename" else 1]:
            _check_place(event, path, folder)


def _check_place(event: str, path: Any, folder: str) -> None:
    if isinstance(path, bytes | str) and os.fsdecode(path) != os.devnull:
        place = os.path.realpath(os.fsdecode(path))
        if os.path.commonpath([place, folder]) != folder:
            raise Broken(f"{event} of {place}, outside of its folder")
