"""Which rank is dead or hangs, said by those that are not.

A collective that fails tells one of its ranks that another did not answer, and not which. So every rank whose
collective failed signs a list that all can read; whoever has not signed it a moment later is named.
"""

import contextlib
import logging
import time
from collections.abc import Iterator

import torch.distributed as dist

from dense_ssl.config import GaveUp
from dense_ssl.distributed import World

logger = logging.getLogger("dense_ssl")

# gloo reports through plain RuntimeErrors.
_SAID = ("gloo", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")
GRACE_S = 3.0  # the others' collectives fail within a moment of ours


@contextlib.contextmanager
def named(world: World, grace_s: float = GRACE_S) -> Iterator[None]:
    """Turn what a collective raises because a rank does not answer into one sentence with its number.

    Raises:
        GaveUp: instead of that; any other error passes.
    """
    try:
        yield
    except RuntimeError as error:
        if world.size == 1 or not _of_a_lost_rank(error):
            raise
        missing = _missing(world, grace_s)
        first_line = (str(error).splitlines() or [""])[0][:200]
        if not missing:
            who = f"rank {world.rank} has lost the others ({first_line})"
        elif len(missing) == 1:
            who = f"rank {missing[0]} of {world.size} does not answer"
        else:
            who = f"ranks {', '.join(map(str, missing))} of {world.size} do not answer"
        raise GaveUp(
            f"{who}: dead, or hanging for longer than twice run.stall_minutes; the checkpoints are "
            "intact, and the same command resumes"
        ) from None


def _of_a_lost_rank(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(word in str(error) for word in _SAID)


def _missing(world: World, grace_s: float) -> list[int]:
    """Return the ranks that do not sign; none where the list cannot be reached any more."""
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"lost/{world.rank}", "here")
        time.sleep(grace_s)
        return [rank for rank in range(world.size) if not store.check([f"lost/{rank}"])]
    except (RuntimeError, ValueError) as error:  # who keeps the list is gone as well
        logger.debug("%s", error)
        return []
