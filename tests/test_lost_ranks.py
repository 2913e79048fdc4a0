"""A rank that is gone or hangs is named by the others; other errors stay what they are."""

import os
import time
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from dense_ssl.config import GaveUp
from dense_ssl.distributed import World, init_world
from dense_ssl.lost_ranks import named
from tests.ranks import start_ranks

ALONE = World(rank=0, size=1, device=torch.device("cpu"), flags=None)
ONE_OF_TWO = World(rank=0, size=2, device=torch.device("cpu"), flags=None)


def _rank(how, folder):
    world = init_world("cpu", timedelta(seconds=5 if how == "hangs" else 60))
    dist.all_reduce(torch.ones(2))
    if world.rank == 1:
        if how == "hangs":
            time.sleep(60)
        os._exit(0)
    try:
        with named(world, grace_s=0.5):
            for _ in range(50):
                dist.all_reduce(torch.ones(2))
    except GaveUp as error:
        (folder / str(world.rank)).write_text(str(error))
    os._exit(0)


@pytest.mark.parametrize("how", ["is dead", "hangs"])
def test_the_other_says_which_one(how, tmp_path):
    ranks = start_ranks(2, _rank, how, tmp_path)
    ranks[0].join(120)
    ranks[1].kill()
    ranks[1].join()
    text = (tmp_path / "0").read_text()
    assert text.startswith("rank 1 of 2 does not answer")
    assert "run.stall_minutes" in text


def test_other_errors_pass():
    for world, text in ((ONE_OF_TWO, "size mismatch"), (ALONE, "Connection closed by peer")):
        with pytest.raises(RuntimeError, match=text), named(world):
            raise RuntimeError(text)


def test_a_rank_that_fails_says_so_to_the_others(monkeypatch):
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    with pytest.raises(LookupError), named(replace(ONE_OF_TWO, rank=1)):
        raise LookupError("no such key")
    said = "rank 1 has failed: LookupError: no such key"
    with pytest.raises(GaveUp, match=said), named(ONE_OF_TWO, grace_s=0.0):
        raise RuntimeError("Connection closed by peer")


def test_without_the_list_it_says_who_has_lost_the_others():
    with pytest.raises(GaveUp, match="rank 0 has lost the others .Connection closed by peer"):
        with named(ONE_OF_TWO, grace_s=0):
            raise RuntimeError("Connection closed by peer [127.0.0.1]:1")
