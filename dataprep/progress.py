"""What a person sees while a conversion runs, and the table at its end."""

import time
from collections import Counter
from collections.abc import Sequence
from typing import TextIO

import numpy as np
from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0  # where nobody watches: logs, schedulers


class Progress:
    """Images done of all, images/s, MB/s and time left: a bar on a terminal, else a line at times."""

    def __init__(self, total: int, stream: TextIO) -> None:
        self.total, self.stream = total, stream
        self.done = self.reused = self.bad = self.bytes_in = 0
        self.began = self.last_line = time.monotonic()
        self.bar = None
        if stream.isatty():
            form = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} images [{elapsed}<{remaining}{postfix}]"
            self.bar = tqdm(total=total, file=stream, bar_format=form, leave=False)

    def add(self, files: int, bytes_in: int, bad: int, reused: bool = False) -> None:
        """Count files done with, the bytes read for them, and how many of them were bad."""
        self.done += files
        self.bad += bad
        self.bytes_in += bytes_in
        if reused:
            self.reused += files
        if self.bar is not None:
            if reused:
                self.bar.initial += files
            self.bar.set_postfix_str(self.rates() + self._bad(), refresh=False)
            self.bar.update(files)
        elif time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            self.stream.write(f"{self._line()}\n")
            self.stream.flush()

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return max(time.monotonic() - self.began, 1e-3)

    def rates(self) -> str:
        """Return what was done a second since the beginning."""
        text = f"{(self.done - self.reused) / self.seconds:,.0f} images/s"
        if self.bytes_in:
            text += f", {self.bytes_in / 1e6 / self.seconds:,.1f} MB/s"
        return text

    def _bad(self) -> str:
        return f", {self.bad:,} bad" if self.bad else ""

    def _line(self) -> str:
        fresh = self.done - self.reused
        left = (self.total - self.done) * self.seconds / fresh if fresh else 0.0
        share = 100 * self.done / self.total
        return (
            f"{share:3.0f} %  {self.done:,} of {self.total:,} images, {self.rates()}"
            f"{self._bad()}, {duration(left)} left"
        )


def duration(seconds: float) -> str:
    """Return seconds as 3.2 s, 4:05 or 2:03:04."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(count: float) -> str:
    """Return a number of bytes in the unit that suits it."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def spread(values: np.ndarray) -> str:
    """Return the smallest, the median and the largest value."""
    return f"{values.min():,} / {int(np.median(values)):,} / {values.max():,}"


def reasons(refused: Sequence[tuple[str, str]]) -> str:
    """Return how often each kind of reason occurs: `3 truncated, 1 not an image`."""
    kinds = Counter(reason.partition(":")[0] for _, reason in refused)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Return rows of (name, value) as an aligned table."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
