"""Collectives over two gloo ranks, and their identities on one."""

import torch

from dense_ssl.config import UserError
from dense_ssl.distributed import (
    BatchShuffle,
    World,
    all_gather,
    any_rank,
    cat_carries,
    exchanged,
    mean_over_ranks,
)
from dense_ssl.rundir import check_same_start
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
    rows = torch.arange(8.0).view(4, 2) + 10 * world.rank
    wanted = [torch.tensor([5, 0, 6, 2]), torch.tensor([1, 7, 3, 4])]  # of the eight of both ranks
    moved = torch.equal(exchanged(rows, wanted), all_gather(rows)[wanted[world.rank]])
    torch.manual_seed(0)  # one layer for both
    layer, pixels = torch.nn.Conv2d(3, 4, 3), torch.rand(4, 3, 8, 8) + world.rank
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with BatchShuffle(pixels, seed=1, step=2) as sent:
            (seen,) = sent.restore(layer(sent.images))
        rounded = sent.images.dtype == torch.bfloat16 and torch.equal(seen, layer(pixels))
    refused = []
    for step, count in ((0, 5), (3 * world.rank, 5), (0, 5 + world.rank)):
        try:
            check_same_start(
                {"run": {"dir": "a"}, "data": {"path": "b"}}, step, {"images": count}, world
            )
        except UserError as error:
            refused.append(str(error))
    flags = [any_rank(world.rank == 1 and i >= 1, world) for i in range(4)]
    return {
        "gathered": all_gather(x),
        "carried": cat_carries([x[:1], x[1:]]),
        "mean": mean_over_ranks(x),
        "images": images,
        "shuffled": shuffled,
        "restored": restored,
        "keyed": same and differs,
        "moved": moved and rounded,
        "flags": flags,
        "refused": refused,
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
        assert result["moved"]
        steps, images = result["refused"]
        assert steps.startswith("a: ranks find checkpoints of different steps in it, 0 to 3")
        assert images.startswith("b: ranks find different images there")
        assert result["flags"] == [False, True, True, True]
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
    assert any_rank(True, world)


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
