"""What one arm of the data bench is asked to do, and the processor time it takes."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dense_ssl.views import ViewSpec

RECIPES = {
    "2x224+8x96": (
        ViewSpec(name="global", count=2, size=224, scale=(0.4, 1.0)),
        ViewSpec(name="local", count=8, size=96, scale=(0.05, 0.4)),
    ),
    "2x224": (ViewSpec(name="global", count=2, size=224, scale=(0.2, 1.0)),),
}
WARM_BATCHES = 8  # compiled, queues full
AHEAD_BATCHES = 16  # beyond the measured ones, so that no arm runs dry while it is measured
TICK_S = 1 / os.sysconf("SC_CLK_TCK")  # resolution of the kernel's accounts, 10 ms
MAX_FILES = 2048  # records used of a large data set, so that all of them stay in the page cache


@dataclass(frozen=True)
class Task:
    """One measurement of one arm.

    Args:
        arm: name of a module of this package.
        loader: of ours, where `arm` is "ours".
        data: a shard set or a folder of images.
        files: the same images as JPEG files in a class folder.
        recipe: key of RECIPES.
        filter: "bilinear", "bicubic", "area", or "-" where nothing is resized.
        images: how many to measure, warm-up not counted.
        batch: images per batch.
        workers: threads or processes, whatever the arm has.
        device: where DALI decodes.
        cut: who cuts for our loaders. What "device" would do is left out of the measurement.
    """

    arm: str
    loader: str
    data: str
    files: str
    recipe: str
    filter: str
    images: int
    batch: int
    workers: int
    device: str
    cut: Literal["host", "device"] = "host"

    @property
    def views(self) -> tuple[ViewSpec, ...]:
        """The views of the recipe, resized by the filter of this task where we know it."""
        known = self.filter if self.filter in ("bilinear", "bicubic") else "bilinear"
        return tuple(v.model_copy(update={"filter": known}) for v in RECIPES[self.recipe])

    @property
    def crops(self) -> tuple[ViewSpec, ...]:
        """One entry per crop."""
        return tuple(view for view in self.views for _ in range(view.count))

    def order(self, num_images: int) -> np.ndarray:
        """Return enough batches for warm-up and measurement, int64 [batches, batch].

        Shuffled passes over the images, one after the other: no arm starts an epoch while measured.
        """
        num_images = min(num_images, MAX_FILES)
        count = WARM_BATCHES + -(-self.images // self.batch) + AHEAD_BATCHES
        rng = np.random.default_rng(0)
        passes = -(-count * self.batch // num_images)
        records = np.concatenate([rng.permutation(num_images) for _ in range(passes)])
        return records[: count * self.batch].reshape(count, self.batch)


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process and all below it, ended or alive."""
    return TICK_S * sum(_ticks(process) for process in _tree(pid))


def _ticks(pid: int) -> int:
    """User and system time of a process and of its children that have ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return sum(int(field) for field in fields[11:15])


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            below = children.read_text().split()
        except OSError:
            continue
        for child in below:
            yield from _tree(int(child))
