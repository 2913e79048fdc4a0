"""Several ranks on this machine, forked from one process that has imported and compiled what they need.

Three fresh interpreters, those of an agent and two ranks, take 16 s of one core before the first step, and
what ranks compute does not depend on it. That the command line starts ranks, and what becomes of them
then, is tested in test_pretrain and test_launching.
"""

import contextlib
import os
import socket
import warnings
from pathlib import Path

import torch
import torch.multiprocessing as mp

_forks = mp.get_context("forkserver")
_forks.set_forkserver_preload(["tests.warm"])


def on_ranks(size, work, folder):
    """Run work(world) on `size` ranks; return each rank's result."""
    _all_end_well(start_ranks(size, _work, work, folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def train_on_ranks(size, argv, folder):
    """Run `dense_ssl.pretrain ARGV` on `size` ranks; return the first one's stdout and stderr."""
    _all_end_well(start_ranks(size, _train, argv, folder))
    return (folder / "0.stdout").read_text(), (folder / "0.stderr").read_text()


def start_ranks(size, target, *arguments):
    """Start target(*arguments) on `size` ranks; return the processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    ranks = [
        _forks.Process(target=_as_rank, args=(rank, size, port, target, arguments))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    return ranks


def _all_end_well(ranks):
    try:
        for process in ranks:
            process.join(300)
        assert [process.exitcode for process in ranks] == [0] * len(ranks)
    finally:
        for process in ranks:
            process.kill()


def _as_rank(rank, size, port, target, arguments):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
        MASTER_ADDR="localhost", MASTER_PORT=port,
    )  # fmt: skip
    torch.set_num_threads(1)
    target(*arguments)


def _work(work, folder):
    from dense_ssl.distributed import close_world, init_world

    warnings.simplefilter("error")  # a rank's would be on the console of every run
    world = init_world("cpu")
    torch.save(work(world), folder / f"{world.rank}.pt")
    close_world(world)


def _train(argv, folder):
    from dense_ssl import pretrain

    said = Path(folder, os.environ["RANK"])
    with said.with_suffix(".stdout").open("w") as out, said.with_suffix(".stderr").open("w") as err:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = pretrain.main(argv)
    assert code == 0, said.with_suffix(".stderr").read_text()
