"""Signals that end a run with everything saved."""

import signal
from types import FrameType
from typing import Any

from dense_ssl.log import logger


class StopRequest:
    """Turns SIGTERM, SIGUSR1 and Ctrl-C into a flag; a second Ctrl-C ends the process at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._before = {which: signal.signal(which, self._note) for which in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for which, handler in self._before.items():
            signal.signal(which, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self.requested:
            logger.info("\n%s: finishing this step, then saving", name)
        elif number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.requested = True
