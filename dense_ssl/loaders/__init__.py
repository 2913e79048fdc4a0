"""From a data set to batches: three loaders execute the same plan in the same order.

`ffcv` and `dali` are imported only when asked for; `folder` needs Pillow alone.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field

from dense_ssl.config import Config, UserError
from dense_ssl.crops import MultiCropBatch
from dense_ssl.loaders.folder import FolderLoader
from dense_ssl.loaders.order import Batches
from dense_ssl.loaders.source import ImageSource, open_path
from dense_ssl.views import ViewSpec


class DataConfig(Config):
    """What is read, and by which loader."""

    path: str  # a shard set, or a folder of images
    loader: Literal["ffcv", "dali", "folder"] = "ffcv"
    workers: Annotated[int, Field(ge=0)] | None = None  # per rank; None: its share of the cores
    max_replaced: Annotated[float, Field(ge=0, le=1)] = 0.01  # share of records that may be broken


class Loader(Protocol):
    """Batches of one rank, epoch by epoch; one epoch runs at a time."""

    steps_per_epoch: int

    @property
    def replaced(self) -> dict[int, str]:
        """Records that could not be shown, with the reason."""
        ...

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[MultiCropBatch]:
        """Yield the micro-batches of one epoch; steps before `start_step` are never decoded.

        The images are uint8, on the CPU or already on the device. Starting an epoch ends the one
        before it.
        """
        ...

    def close(self) -> None:
        """End the running epoch with its threads and processes."""
        ...


def open_source(data: DataConfig) -> ImageSource:
    """Return what is at `data.path`; its sizes tell how many images there are.

    Raises:
        UserError: nothing usable is there.
    """
    return open_path(Path(data.path))


def make_loader(
    data: DataConfig,
    views: Sequence[ViewSpec],
    order: Batches,
    device: torch.device,
    source: ImageSource | None = None,
) -> Loader:
    """Return the loader that `data` asks for.

    Args:
        data: which data and which loader.
        views: the recipe.
        order: the order of this rank.
        device: where the batches will be used; DALI decodes there if it is a GPU.
        source: what `open_source(data)` returned, where it is at hand.

    Raises:
        UserError: the data cannot be read this way, or the library is not installed.
    """
    source = source or open_source(data)
    workers = share_of_cores() if data.workers is None else data.workers
    if data.loader == "folder":
        return FolderLoader(source, views, order, workers=workers, max_replaced=data.max_replaced)
    try:
        if data.loader == "ffcv":
            from dense_ssl.loaders.ffcv import FfcvLoader as Chosen
        else:
            from dense_ssl.loaders.dali import DaliLoader as Chosen
    except ImportError as error:
        if error.name is None or error.name.startswith("dense_ssl"):
            raise
        raise UserError(
            f"data.loader={data.loader}: {error.name} is not installed; run `make setup`, "
            "or use data.loader=folder"
        ) from None
    return Chosen(
        source, views, order, device, workers=max(workers, 1), max_replaced=data.max_replaced
    )


def share_of_cores() -> int:
    """Return the cores this process may use, divided among the ranks of this machine."""
    cores = len(os.sched_getaffinity(0))
    return max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
