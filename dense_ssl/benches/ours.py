"""Our loaders, as the trainer uses them; where the device cuts, up to the images sent there."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dense_ssl.benches.task import Task
from dense_ssl.loaders import DataConfig, make_loader, open_source


@dataclass(frozen=True)
class _Rows:
    """An order of the bench, in the form loaders take."""

    num_images: int
    rows: np.ndarray
    seed: int = 0

    @property
    def steps_per_epoch(self) -> int:
        return len(self.rows)

    @property
    def micro_batch(self) -> int:
        return self.rows.shape[1]

    def batches(self, epoch: int, start_step: int = 0) -> Sequence[np.ndarray]:
        return list(self.rows[start_step:])


def batches(task: Task) -> Iterator[int]:
    """Yield the number of images of each batch."""
    torch.set_num_threads(
        1
    )  # as for the peers: waiting threads of OpenMP spin, and would be counted
    config = DataConfig.model_validate(
        {"path": task.data, "loader": task.loader, "workers": task.workers, "cut": task.cut}
    )
    source = open_source(config)
    rows = _Rows(len(source.sizes), task.order(len(source.sizes)))
    loader = make_loader(config, task.views, rows, torch.device(task.device), source)
    try:
        for batch in loader.epoch(0):
            yield len(batch.index)
    finally:
        loader.close()
