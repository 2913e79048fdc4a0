"""The looks themselves: when they are due, what they measure, and that they leave no trace in training."""

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dense_ssl.evaluation.features import normalised
from dense_ssl.evaluation.matching.cell_matches import TOLERANCES, counts_of
from dense_ssl.loaders.order import Order
from dense_ssl.loaders.source import ImageSource
from dense_ssl.log import RunLog, StepClock, logger
from dense_ssl.methods.method import Method, Step
from dense_ssl.run_config import RunConfig
from dense_ssl.step_context import autocast
from dense_ssl.watch.held import Labelled, Pairs, labelled_in, own_labels, pairs_of
from dense_ssl.watch.measures import alignment, rankme, spread, uniformity
from dense_ssl.watch.own_state import prototype_measures, queue_measures
from dense_ssl.watch.probes import probe
from dense_ssl.watch.signs import console_line, signs

SHARE = 0.01  # of the pixels that training sends through its networks, about; what looks may add to them
_CELLS = 2048  # cells that ranks and deviations are taken of, evenly spaced


class Watcher:
    """Looks at a run's backbone every so often, on the one rank that keeps the log."""

    def __init__(
        self, config: RunConfig, method: Method, source: ImageSource, order: Order, log: RunLog
    ) -> None:
        """Choose what is looked at; nothing is decoded before the first look.

        Raises:
            UserError: watch.data holds no labelled images.
        """
        self._config, self._method, self._source, self._log = config, method, source, log
        views = config.method.views
        self._size = next((view.size for view in views if view.count > 1), views[0].size)
        self._pairs: Pairs | None = None
        self._labelled: Labelled | None = None
        self._warned: set[str] = set()
        self._on = config.watch.on
        if self._on and config.watch.data is not None:  # a wrong folder is said now
            folder = Path(config.watch.data)
            self._labelled = labelled_in(folder, config.watch.labelled, self._size)
        self._every = config.watch.every_steps or self._seldom_enough(order)

    def _seldom_enough(self, order: Order) -> int:
        """Return the steps between looks: an epoch, or as many as keep them below SHARE of the work.

        Every pixel of a view is counted twice: as much as MoCo's two networks do with it (one view forward
        and backward, one forward), and less than all other methods do.
        """
        watch, views = self._config.watch, self._config.method.views
        per_image = sum(view.count * view.part * view.size**2 for view in views)
        step = 2 * order.micro_batch * order.accumulate * per_image
        images = 2 * min(watch.images, len(self._source.sizes))
        if self._labelled is not None:
            images += len(self._labelled.bank) + len(self._labelled.asked)
        elif (self._source.labels >= 0).any():
            images += min(watch.labelled, len(self._source.labels))
        return max(order.steps_per_epoch, math.ceil(images * self._size**2 / (SHARE * step)))

    def look(self, step: Step, last_step: int, clock: StepClock | None = None) -> None:
        """Look where it is time to: before the first step, every so often, and after the last."""
        if not self._on or (step.index % self._every and step.index != last_step):
            return
        start = time.perf_counter()
        try:
            found = self._measured(step)
        except torch.OutOfMemoryError:
            self._on = False
            logger.warning("watch: memory is short, no more looks; a smaller watch.images helps")
            return
        if not found:
            self._on = False
            logger.warning("watch: none of the chosen images can be read; no looks at this run")
            return
        seconds = time.perf_counter() - start
        record = {"step": step.index, "epoch": step.epoch, **found, "seconds": seconds}
        self._log.write_look(record, console_line(record))
        for kind, sentence in signs(record).items():
            if kind not in self._warned:
                logger.warning("watch: %s", sentence)
            self._warned.add(kind)
        if clock is not None:
            clock.paused(time.perf_counter() - start)

    def _measured(self, step: Step) -> dict[str, Any]:
        watch, seed = self._config.watch, self._config.train.seed
        if self._pairs is None:
            self._pairs = pairs_of(self._source, watch.images, self._size, seed)
            if self._pairs is None:
                return {}
            if self._labelled is None:
                self._labelled = own_labels(self._source, watch.labelled, self._size)
        network = (
            self._method.student if self._method.exports == "student" else self._method.teacher
        )
        with at_rest(self._method):
            return self._of_pairs(network["backbone"], self._pairs, step) | self._of_labels(
                network["backbone"]
            )

    def _of_pairs(self, backbone: nn.Module, pairs: Pairs, step: Step) -> dict[str, float]:
        device = next(backbone.parameters()).device
        totals = torch.zeros(len(TOLERANCES) + 1, 2, dtype=torch.float64)
        tokens: list[list[Tensor]] = [[], []]
        cells = []
        for rows in self._batches(pairs.images.shape[1]):
            both = [self._features(backbone, pairs.images[v, rows]) for v in (0, 1)]
            boxes, flipped = (x[:, rows].to(device) for x in (pairs.boxes, pairs.flipped))
            totals += counts_of(both[0], both[1], boxes, flipped).cpu()
            for kept, features in zip(tokens, both, strict=True):
                kept.append(features.cls[:, 0].float())
            cells.append(both[0].dense.flatten(0, 1).float())
        first, second = (torch.cat(kept) for kept in tokens)
        patches = torch.cat(cells)
        if not (first.isfinite().all() and patches.isfinite().all()):
            return {"finite": 0.0}
        some = patches[:: -(-len(patches) // _CELLS)]
        matched = {
            f"match_{name.replace('-', '_')}": 100 * float(totals[i, 0] / totals[-1, 0])
            for i, name in enumerate(TOLERANCES)
        }
        chance = 100 * float(totals[-2, 1] / totals[-1, 0])
        return {
            **matched, "match_chance": chance,
            "rankme": rankme(first), "rankme_cells": rankme(some), "most_rank": float(min(first.shape)),
            "uniformity": uniformity(first), "alignment": alignment(first, second),
            "spread": spread(first), "spread_cells": spread(some),
            **prototype_measures(self._method, torch.cat([first, second]), patches, step),
            **queue_measures(self._method),
        }  # fmt: skip

    def _of_labels(self, backbone: nn.Module) -> dict[str, float]:
        if self._labelled is None:
            return {}
        bank, asked = (
            torch.cat(
                [
                    self._features(backbone, images[rows]).cls[:, 0].float().cpu()
                    for rows in self._batches(len(images))
                ]
            )
            for images in (self._labelled.bank, self._labelled.asked)
        )
        if not (bank.isfinite().all() and asked.isfinite().all()):
            return {}
        held = self._labelled
        return probe(bank, held.bank_labels, asked, held.asked_labels, held.classes)

    def _features(self, backbone: nn.Module, images: Tensor) -> Any:
        device = next(backbone.parameters()).device
        with autocast(device, self._config.train.precision):
            return backbone(normalised(images.to(device)))

    def _batches(self, count: int) -> Iterator[slice]:
        """Yield rows, no more at once than a micro-batch has: less memory than a step takes."""
        train = self._config.train
        size = max(train.batch_size // train.accumulate, 1)
        return (slice(start, start + min(size, 64)) for start in range(0, count, min(size, 64)))


@contextlib.contextmanager
def at_rest(module: nn.Module) -> Iterator[None]:
    """Hold a module in eval mode, and leave everything about it as it was.

    Compiled parts run as they are written: another mode or batch size would make torch compile the training's
    graph again, for shapes that vary, and round otherwise. Random numbers drawn here come from elsewhere.
    """
    modes = [(part, part.training) for part in module.modules()]
    devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            with torch.compiler.set_stance("force_eager"):
                yield
    finally:
        for part, training in modes:
            part.training = training
