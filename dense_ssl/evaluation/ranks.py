"""What an evaluation under torchrun asks of the other ranks; on one rank, nothing."""

from typing import Any, TypeVar

import torch.distributed as dist

from dense_ssl.distributed import world_size

T = TypeVar("T")


def everyone(value: T) -> list[T]:
    """Return every rank's value in rank order; any object that pickles."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered
