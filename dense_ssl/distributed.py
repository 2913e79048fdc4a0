"""The few collectives training needs, each the identity on one rank."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from dense_ssl.config import UserError
from dense_ssl.fresh_store import fresh
from dense_ssl.rng import key_of

_SHUFFLE = 0x5B  # stream of the batch-shuffle permutations

# torch 2.14 has a new name for it, and warns of the old one.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, slots=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device
    flags: dist.ProcessGroup | None  # gloo group for host-side agreement; None on one rank


def init_world(device: str, patience: timedelta = timedelta(minutes=20)) -> World:
    """Join the process group torchrun describes, or be alone; return this rank's place and device.

    Args:
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".
        patience: how long a rank waits for the others. NCCL, which ends the process without a word to
            it, waits longer than gloo, which tells.

    Raises:
        UserError: CUDA is asked for and there is none, or there are fewer GPUs than local ranks.
        GaveUp: another rank does not come.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    where = _device(device, local_rank)
    if size == 1:
        return World(rank=0, size=1, device=where, flags=None)
    met, rank, size = next(rendezvous("env://", timeout=patience))
    store = fresh(met, rank, size, patience)
    place: dict[str, Any] = {"store": store, "rank": rank, "world_size": size}
    if where.type == "cuda":
        dist.init_process_group("nccl", timeout=1.5 * patience, device_id=where, **place)
    else:
        dist.init_process_group("gloo", timeout=patience, **place)
    flags = dist.new_group(backend="gloo", timeout=patience)
    assert isinstance(flags, dist.ProcessGroup)
    return World(rank=dist.get_rank(), size=size, device=where, flags=flags)


def _device(name: str, local_rank: int) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"run.device: {name} asked for, but torch sees no CUDA GPU; use cpu or auto"
        )
    index = local_rank if name in ("auto", "cuda") else torch.device(name).index or 0
    if name not in ("auto", "cuda") and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise UserError(f"run.device: {name} is one GPU for several ranks; use cuda, or GPUS=1")
    if index >= torch.cuda.device_count():
        raise UserError(
            f"run.device: rank needs cuda:{index}, torch sees {torch.cuda.device_count()} GPU(s); "
            "lower GPUS"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def close_world(world: World) -> None:
    """Leave the process group."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return this rank, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_gather(x: Tensor) -> Tensor:
    """Return every rank's x [B, ...] concatenated in rank order, [G * B, ...]. No gradient."""
    if world_size() == 1:
        return x
    x = x.contiguous()
    out = x.new_empty((world_size() * x.shape[0], *x.shape[1:]))
    _gather(out, x)
    return out


def exchanged(x: Tensor, wanted: Sequence[Tensor]) -> Tensor:
    """Return the rows of all ranks' x [B, ...] that this rank wants, [B, ...]. No gradient.

    wanted: what each rank wants, int64 [B] on the host, of all ranks' rows in rank order; every row is wanted
        once. Of G ranks each sends what the others want, 1 / G of what `all_gather` would move.
    """
    own, rows = rank(), len(x)
    to_give = [w[w // rows == own] - own * rows for w in wanted]
    given = x[torch.cat(to_give).to(x.device, non_blocking=True)]
    if len(wanted) == 1:
        return given
    owners = wanted[own] // rows
    got = torch.empty_like(given)
    counts = torch.bincount(owners, minlength=len(wanted)).tolist()
    dist.all_to_all_single(got, given, counts, [len(w) for w in to_give])
    places = torch.argsort(
        torch.argsort(owners, stable=True)
    )  # they come in the order of their owners
    return got[places.to(x.device, non_blocking=True)]


def _rounded(images: Tensor) -> Tensor:
    """Return images as the first layer will take them: where it is autocast, half the bytes to be sent."""
    kind = images.device.type
    autocast = torch.is_autocast_enabled(kind)
    return images.to(torch.get_autocast_dtype(kind)) if autocast else images


def mean_over_ranks(x: Tensor) -> Tensor:
    """Return the mean of x over ranks. No gradient."""
    if world_size() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x / world_size()


def any_rank(flag: bool, world: World) -> bool:
    """Return whether the flag of any rank is up."""
    return bool(largest(int(flag), world))


def largest(number: int, world: World) -> int:
    """Return the largest of all ranks' numbers; it goes from host to host, past the GPUs."""
    if world.size == 1:
        return number
    x = torch.tensor([number], dtype=torch.int64)
    dist.all_reduce(x, op=dist.ReduceOp.MAX, group=world.flags)
    return int(x.item())


def shuffle_indices(perm: Tensor, G: int) -> list[Tensor]:
    """Return, for each of G ranks, which gathered samples it encodes (MoCo, arXiv:1911.05722, step 4)."""
    return list(perm.view(G, -1))


def unshuffle_indices(perm: Tensor, G: int) -> list[Tensor]:
    """Return, for each rank, where its own samples stand in the shuffled order (step 5)."""
    return list(torch.argsort(perm).view(G, -1))


class BatchShuffle:
    """Shuffled BatchNorm: encode other samples than one's own, then hand them back (MoCo, arXiv:1911.05722).

    With `groups` BatchNorm groups per rank the permutation spans all ranks' groups, so one device with
    8 groups shuffles as 8 devices do. With one group in all there is nothing to shuffle.

        with BatchShuffle(x, seed, step) as shuffle:
            k = shuffle.restore(encode(shuffle.images))
    """

    def __init__(
        self, images: Tensor, seed: int, step: int, micro: int = 0, groups: int = 1
    ) -> None:
        self._ranks, self._rank = world_size(), rank()
        self._active = self._ranks * groups > 1
        self.images = images
        if self._active:
            total = images.shape[0] * self._ranks
            generator = torch.Generator().manual_seed(int(key_of(seed, _SHUFFLE, step, micro) >> 1))
            # Drawn alike on every rank from the same key: no broadcast needed.
            perm = torch.randperm(total, generator=generator)
            inverse = unshuffle_indices(perm, self._ranks)[self._rank]
            self._inverse = inverse.to(images.device, non_blocking=True)
            self.images = exchanged(_rounded(images), shuffle_indices(perm, self._ranks))

    def __enter__(self) -> "BatchShuffle":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None

    def restore(self, *encoded: Tensor) -> tuple[Tensor, ...]:
        """Return each encoded tensor [B, ...] with this rank's own samples back in order."""
        if not self._active:
            return encoded
        return tuple(all_gather(x)[self._inverse] for x in encoded)


def cat_carries(tensors: Sequence[Tensor]) -> Tensor:
    """Return the micro-batches' tensors of one step as one, gathered from every rank."""
    return all_gather(torch.cat(list(tensors)))
