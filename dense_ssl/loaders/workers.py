"""Worker processes of loaders: started safely beside threads, ended by their trainer and nobody else.

Schedulers send the signal that ends a run to every process of it. The trainer acts on it: it finishes its
step, for which it needs its workers, and saves.
"""

import contextlib
import multiprocessing
import os
import select
import signal
import threading
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext

from dense_ssl.signals import StopRequest

_HEARD_S = 1.0  # within which a worker learns that its trainer has ended
_PRELOADED = ["dense_ssl.loaders.folder"]


def worker_context() -> BaseContext:
    """Return a way to start workers that is safe beside the threads of numba, DALI and FFCV.

    The server they are forked from is deaf to the signals that end a run, too: they would end with it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, StopRequest.SIGNALS)
    try:
        resource_tracker.ensure_running()  # hears two of them again in this thread
        signal.pthread_sigmask(signal.SIG_BLOCK, StopRequest.SIGNALS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def end_with(trainer: int, _: int) -> None:
    """End this worker when the process `trainer` ends, SIGKILL included, or ends it: `worker_init_fn`.

    torch watches a worker's parent, which here is the fork server: it lives as long as its workers,
    and the workers of a killed run would wait for ever, with whatever pipes they inherited.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, StopRequest.SIGNALS)  # where it did not inherit that

    def watch() -> None:
        with contextlib.suppress(ProcessLookupError):
            ended = select.poll()
            ended.register(os.pidfd_open(trainer), select.POLLIN)
            while not ended.poll(0):
                told = signal.sigtimedwait(StopRequest.SIGNALS, _HEARD_S)
                if told is not None and told.si_pid == trainer:
                    break
        os._exit(1)

    threading.Thread(target=watch, name="end with the trainer", daemon=True).start()
