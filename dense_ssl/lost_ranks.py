"""Which rank is dead or hangs, said by those that are not.

A collective that fails tells one of its ranks that another did not answer, and not which. So every rank whose
collective failed signs a list that all can read; whoever has not signed it a moment later is named. A rank
that ends with a sentence of its own leaves it there, and the others repeat it.
"""

import contextlib
import logging
import time
from collections.abc import Iterator

import torch.distributed as dist

from dense_ssl.config import GaveUp, UserError
from dense_ssl.distributed import World

logger = logging.getLogger("dense_ssl")

# gloo reports through plain RuntimeErrors.
_SAID = ("gloo", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")
GRACE_S = 3.0  # the others' collectives fail within a moment of ours
HERE = "here"  # what a rank signs with that has nothing else to say


@contextlib.contextmanager
def named(world: World, grace_s: float = GRACE_S) -> Iterator[None]:
    """Turn what a collective raises because a rank does not answer into one sentence with its number.

    Raises:
        GaveUp: instead of that; any other error passes.
    """
    try:
        yield
    except UserError as error:
        if world.size > 1:
            _sign(world, str(error))
        raise
    except Exception as error:
        if world.size > 1 and _of_a_lost_rank(error):
            said = _signed(world, grace_s)
            raise GaveUp(_sentence(world, said, error)) from None
        if world.size > 1:
            first_line = (str(error).splitlines() or [""])[0][:200]
            _sign(world, f"rank {world.rank} has failed: {type(error).__name__}: {first_line}")
        raise


def _sentence(world: World, said: dict[int, str], error: Exception) -> str:
    """Return what another rank has said, or which of them have said nothing."""
    spoken = [text for text in said.values() if text != HERE]
    if spoken:
        return spoken[0]
    missing = [rank for rank in range(world.size) if rank not in said]
    first_line = (str(error).splitlines() or [""])[0][:200]
    if not said or not missing:
        who = f"rank {world.rank} has lost the others ({first_line})"
    elif len(missing) == 1:
        who = f"rank {missing[0]} of {world.size} does not answer"
    else:
        who = f"ranks {', '.join(map(str, missing))} of {world.size} do not answer"
    return (
        f"{who}: dead, or hanging for longer than twice run.stall_minutes; the checkpoints are "
        "intact, and the same command resumes"
    )


def _of_a_lost_rank(error: Exception) -> bool:
    said = isinstance(error, RuntimeError) and any(word in str(error) for word in _SAID)
    return said or isinstance(error, dist.DistError)


def _sign(world: World, text: str) -> None:
    """Put this rank on the list, where it can still be reached."""
    try:
        dist.distributed_c10d._get_default_store().set(f"lost/{world.rank}", text)
    except (RuntimeError, ValueError) as error:  # who keeps the list is gone as well
        logger.debug("%s", error)


def _signed(world: World, grace_s: float) -> dict[int, str]:
    """Return who signs the list and with what; nobody where it cannot be reached any more."""
    _sign(world, HERE)
    time.sleep(grace_s)
    try:
        store = dist.distributed_c10d._get_default_store()
        ranks = [rank for rank in range(world.size) if store.check([f"lost/{rank}"])]
        return {rank: store.get(f"lost/{rank}").decode() for rank in ranks}
    except (RuntimeError, ValueError) as error:
        logger.debug("%s", error)
        return {}
