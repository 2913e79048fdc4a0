"""A store of keys for one start of the ranks, though torchrun's agent keeps one store for all of them.

When torchrun starts ranks again (`--max-restarts`), its agent serves them the store of the start before, with
the addresses that dead ranks have left in it: whoever connects to those fails (PyTorch issue 135712). The
count of restarts tells starts apart on one machine, not on several, where each agent counts its own. So the
ranks agree on a name for this start: each one asks with a word that nobody used before, and rank 0 answers
that word.
"""

import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store

from dense_ssl.config import GaveUp

_POLL_S = 0.01


def fresh(store: Store, rank: int, size: int, patience: timedelta) -> Store:
    """Return what `store` holds of this start alone; every rank calls it once.

    Raises:
        GaveUp: another rank does not come within `patience`.
    """
    word = uuid.uuid4().hex
    if rank == 0:
        _answer(store, word, set(range(1, size)), patience)
        return PrefixStore(word, store)
    store.set(f"asks/{rank}", word)
    try:
        store.wait([f"answer/{word}"], patience)
    except RuntimeError:  # DistStoreError where it is one
        raise GaveUp(_absent([0])) from None
    name = store.get(f"answer/{word}").decode()
    store.set(f"knows/{name}/{rank}", "")
    return PrefixStore(name, store)


def _answer(store: Store, name: str, absent: set[int], patience: timedelta) -> None:
    """Tell every rank the name of this start; words of ranks that are dead are answered as well."""
    deadline = time.monotonic() + patience.total_seconds()
    while absent:
        for rank in sorted(absent):
            if store.check([f"asks/{rank}"]):
                store.set(f"answer/{store.get(f'asks/{rank}').decode()}", name)
            if store.check([f"knows/{name}/{rank}"]):
                absent.discard(rank)
        if absent and time.monotonic() > deadline:
            raise GaveUp(_absent(sorted(absent)))
        time.sleep(_POLL_S)


def _absent(ranks: list[int]) -> str:
    who = f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} have"
    return (
        f"{who} not started within twice run.stall_minutes; look at its machine, the same command "
        "tries again"
    )
