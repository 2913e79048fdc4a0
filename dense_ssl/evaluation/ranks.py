"""What an evaluation under torchrun asks of the other ranks; on one rank, nothing."""

from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from dense_ssl.distributed import world_size

T = TypeVar("T")


def everyone(value: T) -> list[T]:
    """Return every rank's value in rank order; any object that pickles."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def share_buffers(model: nn.Module) -> None:
    """Give every rank the buffers of rank 0: running statistics differ between ranks that train."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
