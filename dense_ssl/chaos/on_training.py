"""Faults that strike a training: each scenario ends with a verdict."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from dataprep.manifest import Manifest, read_index
from dataprep.write_ffcv import read_allocations
from dense_ssl import checkpoint
from dense_ssl.chaos import disks
from dense_ssl.chaos.faults import EPOCH, MIDDLE, WRITE, Case
from dense_ssl.chaos.ground import IMAGES, Ground, training_result, with_ranks
from dense_ssl.chaos.injection import AT, BATCH, SAVE_EVERY
from dense_ssl.chaos.verdicts import (
    TRY_AGAIN,
    WRONG,
    Kind,
    Lost,
    Verdict,
    ended,
    explained,
    judge,
    succeeded,
)
from dense_ssl.loaders.order import Order

STALL_MINUTES = 1.0  # after which a loader that gives no batch is given up; FFCV compiles first
RANK_STALL_MINUTES = 0.5  # a rank is waited for twice as long


def struck(case: Case, ground: Ground) -> Verdict:
    """Return what becomes of a training under the fault of a case."""
    run = ground.folder / "cases" / case.name / "disk" / "run"
    disks.release(run.parent)
    try:
        return SCENARIOS.get(case.fault.name, _struck_and_repeated)(case, ground, run)
    finally:
        disks.release(run.parent)


def _struck_and_repeated(case: Case, ground: Ground, run: Path) -> Verdict:
    """The command meets the fault; the cause is removed, and the command repeated."""
    if case.fault.name == "disk-full":
        disks.small_disk(run.parent)
    arguments = ground.training(run, case.loader, *with_ranks(case.fault.ranks))
    want = ground.trained(case.loader, case.fault.ranks)
    first = ground.run(case.fault.name, case.place, arguments, f"{case.name}/first")
    disks.free(run.parent)
    disks.writable(run)
    disks.come_back(ground.shards)
    again = ground.run("none", case.place, arguments, f"{case.name}/again")
    return judge(first, again, training_result(again, run), want)


def _given_up(case: Case, ground: Ground, run: Path) -> Verdict:
    """A loader or a rank does not answer, and is named; the command is repeated, with more patience."""
    ranks = case.fault.ranks
    minutes = RANK_STALL_MINUTES if case.fault.name == "hung" else STALL_MINUTES
    workers = ["data.workers=1"] * (case.loader == "folder" and ranks == 1)
    arguments = ground.training(run, case.loader, *workers, *with_ranks(ranks))
    want = ground.trained(case.loader, ranks)
    impatient = [*arguments, f"run.stall_minutes={minutes}"]
    first = ground.run(case.fault.name, case.place, impatient, f"{case.name}/first")
    ended(first, "the command")
    culprit = f"rank {0 if case.place == WRITE else 1} of 2" if ranks > 1 else "the loader"
    if first.code != TRY_AGAIN or culprit not in explained(first):
        raise Lost(f"it ended with code {first.code} and did not name {culprit}")
    again = ground.run("none", case.place, arguments, f"{case.name}/again")
    return judge(first, again, training_result(again, run), want)


def _restarted(case: Case, ground: Ground, run: Path) -> Verdict:
    """Ranks are started again by torchrun: nothing is left for anybody to repeat."""
    arguments = ground.training(run, case.loader, *with_ranks(case.fault.ranks))
    want = ground.trained(case.loader, case.fault.ranks)
    done = ground.run(case.fault.name, case.place, arguments, f"{case.name}/first")
    succeeded(done, "torchrun")
    if "resuming at step" not in done.err:
        raise Lost("no second start has resumed")
    return judge(done, done, training_result(done, run), want)


def _out_of_memory_on_one_rank(case: Case, ground: Ground, run: Path) -> Verdict:
    """All ranks start again from the last checkpoint, as if continued there with halves asked for."""
    ranks = with_ranks(case.fault.ranks)
    arguments = ground.training(run, case.loader, *ranks)
    halved = ground.run(case.fault.name, case.place, arguments, f"{case.name}/halved")
    succeeded(halved, "the training")
    want = training_result(halved, run)
    if "out of memory" not in explained(halved):
        raise Lost("it was not said")
    shutil.rmtree(run)
    last_saved = AT[case.place] // SAVE_EVERY * SAVE_EVERY
    _train_to(last_saved, case, ground, run)
    by_hand = [*arguments, f"train.micro_batch={BATCH // 4}"]  # half of a rank's share
    again = ground.run("none", case.place, by_hand, f"{case.name}/again")
    verdict = judge(again, again, training_result(again, run), want)
    return Verdict(Kind.HALVED) if verdict.kind is Kind.EQUAL else verdict


def _damaged_between(case: Case, ground: Ground, run: Path) -> Verdict:
    """The newest checkpoint is damaged while the run stands still; the command is repeated."""
    stop = AT[case.place]
    _train_to(stop, case, ground, run)
    newest = run / "checkpoints" / f"step-{stop:08d}.pt"
    if case.fault.name == "truncated":
        disks.truncate(newest)
    else:
        disks.flip_bit(newest, newest.stat().st_size // 2)
    again = ground.run("none", case.place, ground.training(run, case.loader), f"{case.name}/again")
    verdict = judge(again, again, training_result(again, run), ground.trained(case.loader))
    if verdict.kind is Kind.EQUAL and newest.name not in again.err:
        return Verdict(Kind.FAILED, "the damaged checkpoint was not named")
    return verdict


def _vanished(case: Case, ground: Ground, run: Path) -> Verdict:
    """Shards go away while the run stands still, or under its hands; they come back afterwards."""
    try:
        if case.place == MIDDLE:
            return _struck_and_repeated(case, ground, run)
        _train_to(AT[EPOCH], case, ground, run)
        disks.vanish(*sorted([*ground.shards.glob("ffcv/*"), *ground.shards.glob("dali/*")]))
        return _refused_until(lambda: disks.come_back(ground.shards), case, ground, run)
    finally:
        disks.come_back(ground.shards)


def _corrupt(case: Case, ground: Ground, run: Path) -> Verdict:
    """One record is damaged all the time and shown by its neighbour; or too many are, until repaired."""
    records = [int(record) for record in Order(IMAGES, BATCH).epoch(1)[1].flatten()]
    if case.place == EPOCH:
        _train_to(AT[EPOCH], case, ground, run)
        with _damaged(ground, records[:3]) as repair:
            return _refused_until(repair, case, ground, run)
    arguments = ground.training(run, case.loader)
    with _damaged(ground, records[:1]):
        whole = ground.run("none", MIDDLE, arguments, f"{case.name}/whole")
        succeeded(whole, "the training on a damaged record")
        want = training_result(whole, run)
        if f"record {records[0]} is replaced" not in whole.err:
            raise Lost("the record was not named")
        shutil.rmtree(run)
        first = ground.run("sigterm", MIDDLE, arguments, f"{case.name}/first")
        again = ground.run("none", MIDDLE, arguments, f"{case.name}/again")
    verdict = judge(first, again, training_result(again, run), want)
    why = "shown by its neighbour, and named"
    return Verdict(Kind.WITHOUT, why) if verdict.kind is Kind.EQUAL else verdict


def _spoilt_step(case: Case, ground: Ground, run: Path) -> Verdict:
    """A step is refused; the run that is stopped right behind it goes on to the same end."""
    arguments = ground.training(run, case.loader)
    whole = ground.run(case.fault.name, case.place, arguments, f"{case.name}/whole")
    succeeded(whole, "the training")
    want = training_result(whole, run)
    if f"step {AT[case.place]} refused" not in whole.err:
        raise Lost("no step was refused")
    _require_finite(run)
    shutil.rmtree(run)
    short = [*arguments, f"train.steps={AT[case.place] + 1}"]
    first = ground.run(case.fault.name, case.place, short, f"{case.name}/first")
    again = ground.run(case.fault.name, case.place, arguments, f"{case.name}/again")
    verdict = judge(first, again, training_result(again, run), want)
    why = f"step {AT[case.place]} refused"
    return Verdict(Kind.WITHOUT, why) if verdict.kind is Kind.EQUAL else verdict


def _out_of_memory(case: Case, ground: Ground, run: Path) -> Verdict:
    """The micro-batch is halved: as if the run had been continued with twice the accumulation by hand."""
    arguments = ground.training(run, case.loader)
    halved = ground.run(case.fault.name, case.place, arguments, f"{case.name}/halved")
    succeeded(halved, "the training")
    want = training_result(halved, run)
    if halved.err.count("out of memory") != 1:
        raise Lost("it was not said, or more than once")
    shutil.rmtree(run)
    _train_to(AT[case.place], case, ground, run)
    by_hand = [*arguments, "train.accumulate=2"]
    again = ground.run("none", case.place, by_hand, f"{case.name}/again")
    verdict = judge(halved, again, training_result(again, run), want)
    return Verdict(Kind.HALVED) if verdict.kind is Kind.EQUAL else verdict


def _train_to(step: int, case: Case, ground: Ground, run: Path) -> None:
    ranks = with_ranks(case.fault.ranks)
    arguments = ground.training(run, case.loader, f"train.steps={step}", *ranks)
    succeeded(ground.run("none", case.place, arguments, f"{case.name}/before"), "the training")


def _refused_until(repair: Callable[[], None], case: Case, ground: Ground, run: Path) -> Verdict:
    """Return the verdict where a command must refuse until something is repaired."""
    arguments = ground.training(run, case.loader)
    first = ground.run("none", case.place, arguments, f"{case.name}/first")
    ended(first, "the command")
    if first.code != WRONG:
        raise Lost(f"it ended with code {first.code} where it should refuse")
    explained(first)
    repair()
    again = ground.run("none", case.place, arguments, f"{case.name}/again")
    return judge(first, again, training_result(again, run), ground.trained(case.loader))


@contextmanager
def _damaged(ground: Ground, records: list[int]) -> Iterator[Callable[[], None]]:
    """Flip a bit in the middle of records, in every format; yield what repairs them, done at the end."""
    manifest = Manifest.load(ground.shards)
    (tar,) = manifest.shards
    extents = {
        manifest.beton: np.stack(read_allocations(manifest.beton), axis=1),
        tar: read_index(tar.with_suffix(".idx")),
    }
    flipped = False

    def flip() -> None:
        nonlocal flipped
        flipped = not flipped
        for file, table in extents.items():
            for start, length in table[records].tolist():
                disks.flip_bit(file, start + length // 2)

    flip()
    try:
        yield flip
    finally:
        if flipped:
            flip()


def _require_finite(run: Path) -> None:
    saved = checkpoint.load_newest(run / "checkpoints")
    assert saved is not None
    for name, value in saved["method"].items():
        if not torch.as_tensor(value, dtype=torch.float64).isfinite().all():
            raise Lost(f"{name} is not finite")


SCENARIOS: dict[str, Callable[[Case, Ground, Path], Verdict]] = {
    "restarted": _restarted,
    "hung": _given_up,
    "stalled": _given_up,
    "memory-ranks": _out_of_memory_on_one_rank,
    "truncated": _damaged_between,
    "flipped": _damaged_between,
    "corrupt": _corrupt,
    "vanished": _vanished,
    "nan-loss": _spoilt_step,
    "nan-gradient": _spoilt_step,
    "nan-input": _spoilt_step,
    "memory": _out_of_memory,
}
