"""Worker processes that say what they are at, so that one that dies is reported and not waited for."""

import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from dataprep.manifest import DataError

T = TypeVar("T")
R = TypeVar("R")
Tell = Callable[[Any], None]
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def run_tasks(
    job: Callable[[T, Tell], R],
    tasks: Iterable[T],
    *,
    workers: int,
    hear: Callable[[Any], str | None],
) -> Iterator[R]:
    """Yield the results of `job(task, tell)`, in the order in which they are ready.

    Args:
        job: a function of a module; what it passes to `tell` reaches `hear`.
        tasks: picklable; taken one by one.
        workers: number of processes.
        hear: called with each message, in this process; a string it returns says what the worker
            is at, for the sentence about its death.

    Raises:
        DataError, OSError: as raised by the job.
        DataError: a worker died (out of memory, a crash in a decoder).
        RuntimeError: the job failed in a way it should not, with its traceback.
    """
    context = get_context("spawn")  # a fork would copy the locks of numpy's and tqdm's threads
    processes, connections = {}, []
    at: dict[Connection, str] = {}
    remaining = iter(tasks)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # workers start deaf to them
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, job), daemon=True)
            process.start()
            theirs.close()
            processes[ours] = process
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    try:
        connections = [connection for connection in processes if _next(connection, remaining)]
        while connections:
            for connection in wait(connections):
                assert isinstance(connection, Connection)
                try:
                    kind, content = connection.recv()
                except (EOFError, OSError):
                    processes[connection].join(5)
                    raise _death(processes[connection].exitcode, at.get(connection)) from None
                if kind == "told":
                    place = hear(content)
                    if place is not None:
                        at[connection] = place
                elif kind == "failed":
                    raise content
                elif kind == "crashed":
                    raise RuntimeError(f"a worker failed:\n{content}")
                else:
                    yield content
                    if not _next(connection, remaining):
                        connections.remove(connection)
    finally:
        for connection, process in processes.items():
            process.kill()  # it holds nothing that is not whole or aside
            process.join()
            process.close()
            connection.close()


def _next(connection: Connection, remaining: Iterator[Any]) -> bool:
    for task in remaining:
        with suppress(OSError):  # it is dead: reading from it tells how
            connection.send(task)
        return True
    return False


def _serve(connection: Connection, job: Callable[[Any, Tell], Any]) -> None:
    """Work until the parent hangs up. Signals are the parent's business."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 2)  # libtiff writes about broken files there, across the progress bar
    os.close(silence)
    try:
        while True:
            task = connection.recv()
            try:
                message = ("done", job(task, lambda said: connection.send(("told", said))))
            except BrokenPipeError:
                return
            except (DataError, OSError) as error:
                message = ("failed", error)
            except Exception:
                message = ("crashed", traceback.format_exc())
            connection.send(message)
    except (EOFError, OSError):
        return  # the parent is gone


def _death(exit_code: int | None, at: str | None) -> DataError:
    if exit_code is not None and exit_code < 0:
        how = signal.Signals(-exit_code).name
    else:
        how = f"exit code {exit_code}"
    place = f" while at {at}" if at else ""
    hint = ", probably for lack of memory" if how == "SIGKILL" else ""
    return DataError(
        f"a worker process died ({how}){place}{hint}; repeat the command to continue, "
        "with fewer --workers if memory is short"
    )
