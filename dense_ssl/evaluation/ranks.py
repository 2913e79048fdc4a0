"""What an evaluation under torchrun asks of the other ranks; on one rank, nothing."""

from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from dense_ssl.config import UserError
from dense_ssl.distributed import world_size

T = TypeVar("T")


def everyone(value: T) -> list[T]:
    """Return every rank's value in rank order; any object that pickles."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def start_of_all(start: int, folder: Path | None) -> int:
    """Return where a job goes on, which all ranks have read from its folder.

    Raises:
        UserError: they see different folders; each would wait for steps that the others do not take.
    """
    if len(set(everyone(start))) > 1:
        raise UserError(
            f"{folder}: the machines see different states of this job; put the run onto a disk they share, "
            "or --out FOLDER there"
        )
    return start


def share_buffers(model: nn.Module) -> None:
    """Give every rank the buffers of rank 0: running statistics differ between ranks that train."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
