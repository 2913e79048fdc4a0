"""Collectives over two gloo ranks, and their identities on one."""

import torch

from dense_ssl.distributed import (
    Agreement,
    BatchShuffle,
    World,
    all_gather,
    cat_carries,
    mean_over_ranks,
)
from kernels.sinkhorn_bias import sinkhorn_bias
from tests.ranks import on_ranks


def _collectives(world):
    x = torch.arange(3.0) + 10 * world.rank
    images = torch.arange(4.0).add(4 * world.rank)[:, None]
    with BatchShuffle(images, seed=1, step=2) as shuffle:
        shuffled = shuffle.images
        (restored,) = shuffle.restore(shuffle.images * 2)
    with BatchShuffle(images, seed=1, step=2) as again:
        same = torch.equal(again.images, shuffled)
    with BatchShuffle(images, seed=1, step=3) as other:
        differs = not torch.equal(other.images, shuffled)
    agreement = Agreement(world)
    flags = [agreement.ask(world.rank == 1 and i >= 1) for i in range(4)]
    agreement.settle()
    return {
        "gathered": all_gather(x),
        "carried": cat_carries([x[:1], x[1:]]),
        "mean": mean_over_ranks(x),
        "images": images,
        "shuffled": shuffled,
        "restored": restored,
        "keyed": same and differs,
        "flags": flags,
    }


def test_two_ranks(tmp_path):
    first, second = on_ranks(2, _collectives, tmp_path)
    both = torch.tensor([0.0, 1, 2, 10, 11, 12])
    for result in (first, second):
        assert torch.equal(result["gathered"], both)
        assert torch.equal(result["carried"], both)
        assert torch.equal(result["mean"], torch.tensor([5.0, 6, 7]))
        assert torch.equal(result["restored"], result["images"] * 2)
        assert result["keyed"]
        # the flag rank 1 raises at its second step is known to both at the third
        assert result["flags"] == [False, False, True, True]
    together = torch.cat([first["shuffled"], second["shuffled"]]).flatten()
    assert torch.equal(together.sort().values, torch.arange(8.0))
    assert not torch.equal(together, torch.arange(8.0))


def test_one_rank_is_the_identity_and_groups_still_shuffle():
    x = torch.arange(8.0)[:, None]
    assert all_gather(x) is x
    assert mean_over_ranks(x) is x
    with BatchShuffle(x, seed=0, step=0) as alone:
        assert alone.images is x
        assert alone.restore(x)[0] is x
    with BatchShuffle(x, seed=0, step=0, groups=4) as grouped:
        assert not torch.equal(grouped.images, x)
        assert torch.equal(grouped.restore(grouped.images)[0], x)
    world = World(rank=0, size=1, device=torch.device("cpu"), flags=None)
    assert Agreement(world).ask(True)


def _sinkhorn(world):
    torch.manual_seed(0)
    logits = torch.randn(12, 5)
    mine = logits.view(2, 6, 5)[world.rank]
    return sinkhorn_bias(mine, 0.05, group=torch.distributed.group.WORLD)


def test_sinkhorn_over_two_ranks_is_that_of_one_batch(tmp_path):
    first, second = on_ranks(2, _sinkhorn, tmp_path)
    torch.manual_seed(0)
    whole = sinkhorn_bias(torch.randn(12, 5), 0.05)
    assert torch.equal(first, second)
    assert torch.allclose(first, whole, rtol=1e-5)
    assert whole.std() > 0.1
