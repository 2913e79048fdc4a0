"""The micro-batches of a step: as the loader gives them, or in halves since memory has run short.

Halving changes what `train.accumulate` twice as large would have changed, and nothing else: the same samples
make up the step, each micro-batch draws its noise by its own number, and BatchNorm sees smaller groups.

One process makes the step again at once. Of several ranks only one may have run short, while the others wait
for it in the middle of a collective; so all of them end, with a note in the run's folder, and the next start
goes on from the last checkpoint as if `train.micro_batch` asked for halves.
"""

import gc
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from dataprep import plain_json
from dense_ssl.checkpoint import write_atomically
from dense_ssl.config import GaveUp, UserError
from dense_ssl.crops import Crops, MultiCropBatch
from dense_ssl.distributed import World, largest
from dense_ssl.events import note
from dense_ssl.log import StepClock
from dense_ssl.run_config import RunConfig
from dense_ssl.shares import groups_of
from dense_ssl.views import ViewSpec

logger = logging.getLogger("dense_ssl")

NOTE = "micro_batch.json"  # in the run's folder: {"micro_batch": the most images at a time}
_NO_LIMIT = 1 << 30


class MicroBatches:
    """Gives each step's micro-batches, again from the first of them after `halve`.

    Attributes:
        parts: pieces that each batch of the loader is cut into.
    """

    def __init__(
        self, config: RunConfig, micro_batch: int, world: World, bn_images: int | None = None
    ) -> None:
        self.parts = 1
        self._config, self._micro_batch, self._world = config, micro_batch, world
        self._bn_images = bn_images  # what the recipe asks for, if it does
        self._given: list[MultiCropBatch] = []  # by the loader, for this step

    @property
    def count(self) -> int:
        """Micro-batches a step on each rank."""
        return self._config.train.accumulate * self.parts

    @property
    def images(self) -> int:
        """Images of a micro-batch."""
        return self._micro_batch // self.parts

    @property
    def bn_groups(self) -> int:
        """BatchNorm groups of a micro-batch: of as many images as the recipe says, where it does."""
        return self._groups_of(self.images)

    def _groups_of(self, images: int) -> int:
        if self._bn_images is None:
            return self._config.method.backbone.bn_groups
        return groups_of(images, self._bn_images)

    def begin(self) -> None:
        """Forget the last step."""
        self._given.clear()

    def of_step(
        self, batches: Iterator[MultiCropBatch], clock: StepClock
    ) -> Iterator[tuple[int, MultiCropBatch]]:
        """Yield each micro-batch of the step with its number; `clock` learns of the wait for it."""
        for number in range(self._config.train.accumulate):
            if number == len(self._given):
                waiting = time.perf_counter()
                self._given.append(next(batches))
                clock.waited(time.perf_counter() - waiting)
            pieces = cut(self._given[number], self._config.method.views, self.parts)
            for piece, batch in enumerate(pieces):
                yield number * self.parts + piece, batch

    def halve(self, error: torch.OutOfMemoryError) -> None:
        """Cut micro-batches into halves from now on, and say so.

        Raises:
            UserError: they cannot be halved any more.
            GaveUp: there are other ranks; the next start goes on in halves, by the note this leaves.
        """
        size = self._micro_batch // (2 * self.parts)
        if not self._may_be(size):
            explain(error, self._config)
        self.parts *= 2
        folder = Path(self._config.run.dir)
        note(folder, "halved", micro_batches=self.count, images=size)
        if self._world.size == 1:
            logger.warning(
                "%s: from here on %d micro-batches of %d images make up a step, as with train.accumulate=%d",
                _first_line(error), self.count, size, self.count,
            )  # fmt: skip
            return
        write_atomically(folder / NOTE, json.dumps({"micro_batch": size}).encode())
        raise GaveUp(
            f"{_first_line(error)}: from the last checkpoint on a rank takes {size} images at a time, as "
            f"with train.micro_batch={size}; the same command goes on"
        )

    def _may_be(self, size: int) -> bool:
        """Return whether micro-batches may be of `size` images."""
        groups = self._groups_of(size)
        return (
            size * 2 * self.parts == self._micro_batch
            and size % groups == 0
            and size // groups > 1  # BatchNorm needs two of them
            and all(int(view.part * size) >= 1 for view in self._config.method.views)
        )


def limited(config: RunConfig, world: World, saved: Mapping[str, Any] | None = None) -> RunConfig:
    """Return the configuration with `train.micro_batch` as small as its run has been brought to.

    `saved`, the run's checkpoint, says how many images a rank took at a time.
    """
    before = (saved or {}).get("micro_batch")
    known = (config.train.micro_batch, noted(config), before)
    limits = [n for n in known if isinstance(n, int) and n > 0]
    # The same on all ranks, whatever their file system shows them: the smallest.
    least = -largest(-min(limits, default=_NO_LIMIT), world)
    if least == _NO_LIMIT:
        return config
    train = config.train.model_copy(update={"micro_batch": least})
    return config.model_copy(update={"train": train})


def noted(config: RunConfig) -> int | None:
    """Return the most images at a time that this run has been brought to, None without a note."""
    path = Path(config.run.dir) / NOTE
    try:
        return max(int(plain_json.read(path)["micro_batch"]), 1)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError):
        logger.warning("%s: not readable, and left aside", path)
        return None


def cut(batch: MultiCropBatch, views: Sequence[ViewSpec], parts: int) -> Iterator[MultiCropBatch]:
    """Yield a batch in `parts` pieces of consecutive images, each as the loader would have made it.

    A twin shows the last images of its micro-batch; of a piece it shows the last of that piece, whose pixels
    and boxes are those of the view it names.
    """
    if parts == 1:
        yield batch
        return
    size = len(batch.index) // parts
    for start in range(0, len(batch.index), size):
        shown: dict[str, Crops] = {}
        for view in views:
            rows = slice(start + size - int(view.part * size), start + size)
            whole = batch.views[view.twin_of or view.name]
            shown[view.name] = whole.map(lambda x, rows=rows: x[:, rows])
        rows = slice(start, start + size)
        yield MultiCropBatch(shown, batch.index[rows], batch.label[rows])


def free_memory() -> None:
    """Give back what a step that failed has left; its error must be gone by now, it holds the step."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def explain(error: torch.OutOfMemoryError, config: RunConfig) -> NoReturn:
    """Refuse to go on without enough memory, with what would help.

    Raises:
        UserError: always.
    """
    checkpointed = "" if config.run.checkpoint_gradients else "run.checkpoint_gradients=true or "
    raise UserError(
        f"{_first_line(error)}: take {checkpointed}a smaller train.batch_size; the checkpoints are intact"
    ) from None


def _first_line(error: torch.OutOfMemoryError) -> str:
    text = (str(error).splitlines() or [""])[0].split(". ")[0].strip().rstrip(".")
    return text if "out of memory" in text.lower() else f"out of memory ({text})"
