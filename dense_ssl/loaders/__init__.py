"""From a data set to batches: three loaders execute the same plan in the same order.

`ffcv` and `dali` are imported only when asked for; `folder` needs Pillow alone.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from dense_ssl.config import Config, UserError
from dense_ssl.loaders.batch import check_recipe
from dense_ssl.loaders.folder import FolderReader
from dense_ssl.loaders.loader import Loader, Reader, Reading
from dense_ssl.loaders.order import Batches
from dense_ssl.loaders.replace import Replacements
from dense_ssl.loaders.source import ImageSource, open_path
from dense_ssl.views import ViewSpec


class DataConfig(Config):
    """What is read, and by which loader."""

    path: str  # a shard set, or a folder of images
    loader: Literal["ffcv", "dali", "folder"] = "ffcv"
    # Who cuts the crops: the loader, or the device that uses them. Pixels differ by rounding.
    cut: Literal["host", "device"] = "host"
    workers: Annotated[int, Field(ge=0)] | None = None  # per rank; None: its share of the cores
    max_replaced: Annotated[float, Field(ge=0, le=1)] = 0.01  # share of records that may be broken


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
    check_recipe(views, order.micro_batch)
    source = source or open_source(data)
    workers = share_of_cores() if data.workers is None else data.workers
    reading = Reading(
        source=source,
        views=tuple(views),
        replacements=Replacements(len(source.sizes), data.max_replaced),
        cut=data.cut,
        device=device,
        micro_batch=order.micro_batch,
        workers=workers if data.loader == "folder" else max(workers, 1),
    )
    return Loader(reading, _reader(data.loader)(reading), order)


def _reader(name: str) -> Callable[[Reading], Reader]:
    """Return the class that reads by the library `name`."""
    if name == "folder":
        return FolderReader
    try:
        if name == "ffcv":
            from dense_ssl.loaders.ffcv import FfcvReader as Chosen
        else:
            from dense_ssl.loaders.dali import DaliReader as Chosen
    except ImportError as error:
        if error.name is None or error.name.startswith("dense_ssl"):
            raise
        raise UserError(
            f"data.loader={name}: {error.name} is not installed; run `make setup`, "
            "or use data.loader=folder"
        ) from None
    return Chosen


def share_of_cores() -> int:
    """Return the cores this process may use, divided among the ranks of this machine."""
    cores = len(os.sched_getaffinity(0))
    return max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
