"""Processes that start at once: this one has imported everything, and forks for each command it is told.

A child goes on as if it had been started by hand: own session, own output files, and the interpreter's usual
end. It is told a JSON line on stdin and answers with one. What a command leaves behind becomes a child of
this process (a "subreaper"), and is ended before the answer.
"""

import atexit
import ctypes
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from dense_ssl.chaos import child
from dense_ssl.chaos.processes import end_all_below
from dense_ssl.chaos.verdicts import Outcome
from dense_ssl.loaders import DataConfig, make_loader, open_source
from dense_ssl.loaders.order import Order
from dense_ssl.views import ViewSpec, draw_epoch

PR_SET_CHILD_SUBREAPER = 36
ROOT = Path(__file__).resolve().parent.parent.parent


class Nursery:
    """Runs commands, one at a time, in processes of their own."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dense_ssl.chaos.nursery"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip

    def run(self, fault: str, place: str, arguments: Sequence[str], folder: Path) -> Outcome:
        """Return how the command ended that a fault strikes at a place; its output is kept in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        argv = [fault, place, "--", *arguments]
        answer = self._ask({"argv": argv, "folder": str(folder), "limit_s": self._limit_s})
        out, err = (_text(folder / name) for name in ("stdout.txt", "stderr.txt"))
        return Outcome(out=out, err=err, **answer)

    def warm(self, shards: Path) -> None:
        """Let everything be compiled, once for all commands, that reading a shard set by FFCV needs."""
        self._ask({"warm": str(shards)})

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the process that starts all others has died; its error is above")
        return json.loads(answer)

    def close(self) -> None:
        """End the process that starts all others."""
        self._process.communicate()  # at the end of its stdin


def main() -> int:
    """Serve until stdin ends; in a forked child, be that child."""
    for name in ("dense_ssl.loaders.ffcv", "dense_ssl.loaders.dali"):
        try:
            importlib.import_module(name)
        except ImportError:
            continue  # not installed here
    # Compiled once here, for all children.
    draw_epoch((ViewSpec(name="global", count=2, size=32),), np.full((2, 2), 48, np.int32), 0, 0)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    argv = _serve()
    if argv is not None:
        _leave(child.main(argv))
    return 0


def _leave(code: int) -> NoReturn:
    """End this process as the interpreter does, threads first, but for taking a thousand modules apart."""
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def _serve() -> list[str] | None:
    """Fork for every request; return its arguments in the child, and None here at the end."""
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "warm" in request:
            _warm(request["warm"])
            sys.stdout.write("{}\n")
            sys.stdout.flush()
            continue
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _become(Path(request["folder"]))
            # What worker processes import first: the command's module, and not this one.
            sys.modules["__main__"] = sys.modules[child.command_of(request["argv"][1]).__module__]
            return request["argv"]
        code, hung = _wait(pid, began + request["limit_s"])
        end_all_below()
        answer = {"code": code, "hung": hung, "seconds": time.monotonic() - began}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return None


def _warm(shards: str) -> None:
    """Read an epoch by FFCV in this process: what numba compiles, all children have."""
    if "dense_ssl.loaders.ffcv" not in sys.modules:
        return
    data = DataConfig(
        path=shards, loader="ffcv", workers=1
    )  # one thread: none is left when it forks
    views = (ViewSpec(name="global", count=2, size=32),)
    source = open_source(data)
    count = len(source.sizes)
    loader = make_loader(data, views, Order(count, count), torch.device("cpu"), source)
    for _ in loader.epoch(0):
        pass
    loader.close()


def _become(folder: Path) -> None:
    """Give this process a session and files of its own."""
    os.setsid()
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, name in ((1, "stdout.txt"), (2, "stderr.txt")):
        file = os.open(folder / name, flags, 0o644)
        os.dup2(file, number)
        os.close(file)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def _wait(pid: int, deadline: float) -> tuple[int, bool]:
    """Return the child's exit code, and whether it had to be ended at its deadline."""
    handle = os.pidfd_open(pid)
    ended, _, _ = select.select([handle], [], [], max(deadline - time.monotonic(), 0))
    os.close(handle)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), not ended


def _text(path: Path) -> Any:
    return path.read_text(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
