"""Which rank is dead or hangs, said by those that are not.

A collective that fails tells one of its ranks that another did not answer, and not which. So every rank whose
collective failed signs a list that all can read; whoever has not signed it a moment later is named.
"""

import logging
import time

import torch.distributed as dist

from dense_ssl.config import GaveUp
from dense_ssl.distributed import World

logger = logging.getLogger("dense_ssl")

# gloo reports through plain RuntimeErrors.
_SAID = ("gloo", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")
GRACE_S = 3.0  # the others' collectives fail within a moment of ours


def explained(error: RuntimeError, world: World, grace_s: float = GRACE_S) -> Exception:
    """Return `error` itself, or, where it says that a rank does not answer, what to tell the user."""
    text = str(error)
    if world.size == 1 or not (
        isinstance(error, dist.DistError) or any(word in text for word in _SAID)
    ):
        return error
    missing = _missing(world, grace_s)
    if not missing:
        return GaveUp(
            f"{_named([world.rank])} lost the others ({text.splitlines()[0][:200]}); "
            "the checkpoints are intact, and the same command resumes"
        )
    waited = "does not answer" if len(missing) == 1 else "do not answer"
    return GaveUp(
        f"{_named(missing)} of {world.size} {waited}: dead, or hanging for longer than twice "
        "run.stall_minutes; the checkpoints are intact, and the same command resumes"
    )


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


def _named(ranks: list[int]) -> str:
    numbers = ", ".join(str(rank) for rank in ranks)
    return f"rank {numbers}" if len(ranks) == 1 else f"ranks {numbers}"
