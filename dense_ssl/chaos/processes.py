"""The processes that a process has started, and their end."""

import contextlib
import os
import signal
import time
from pathlib import Path


def below(pid: int) -> list[int]:
    """Return the processes below `pid`, whichever of its threads started them."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            found += [int(word) for word in path.read_text().split()]
    return found + [deeper for child in found for deeper in below(child)]


def end_all_below() -> None:
    """End all that this process has started, down to the last grandchild, and collect what they leave."""
    while pids := below(os.getpid()):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0] != 0:
                continue
        time.sleep(0.01)
