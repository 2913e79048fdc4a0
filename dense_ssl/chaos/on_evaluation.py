"""Faults that strike an evaluation: each scenario ends with a verdict."""

import shutil
from collections.abc import Callable
from pathlib import Path

from dense_ssl.chaos import disks
from dense_ssl.chaos.faults import EVALUATION, LOADERS, Case
from dense_ssl.chaos.ground import STEPS, Ground, evaluation_result
from dense_ssl.chaos.injection import files_read
from dense_ssl.chaos.verdicts import WRONG, Kind, Lost, Outcome, Verdict, ended, judge

LOADER = LOADERS[-1]  # whose run is evaluated: the one that needs no library


def struck(case: Case, ground: Ground) -> Verdict:
    """Return what becomes of an evaluation under the fault of a case."""
    ground.trained(LOADER)
    out = ground.folder / "cases" / case.name / "disk" / "out"
    disks.release(out.parent)
    try:
        return SCENARIOS.get(case.fault.name, _struck_and_repeated)(case, ground, out)
    finally:
        disks.release(out.parent)
        disks.come_back(ground.classes)


def _struck_and_repeated(case: Case, ground: Ground, out: Path) -> Verdict:
    """The command meets the fault; the cause is removed, and the command repeated."""
    run = ground.run_of(LOADER)
    want = ground.evaluated(run)
    if case.fault.name == "disk-full":
        disks.small_disk(out.parent)
    arguments = ground.evaluation(run, out)
    first = ground.run(case.fault.name, EVALUATION, arguments, f"{case.name}/first")
    disks.free(out.parent)
    disks.writable(out)
    disks.come_back(ground.classes)
    again = ground.run("none", EVALUATION, arguments, f"{case.name}/again")
    return _without(first, judge(first, again, evaluation_result(out), want))


def _damaged_checkpoint(case: Case, ground: Ground, out: Path) -> Verdict:
    """The newest checkpoint of the run is damaged: refused, or the one before it is evaluated."""
    want = ground.evaluated(ground.run_of(LOADER))
    run = out.parent / "run"
    shutil.copytree(ground.run_of(LOADER), run, symlinks=True)
    newest = run / "checkpoints" / f"step-{STEPS:08d}.pt"
    whole = newest.read_bytes()
    if case.fault.name == "truncated":
        disks.truncate(newest)
    else:
        disks.flip_bit(newest, newest.stat().st_size // 2)
    arguments = ground.evaluation(run, out)
    first = ground.run("none", EVALUATION, arguments, f"{case.name}/first")
    if first.code != WRONG:
        ended(first, "the command")
        raise Lost("damaged weights were evaluated")
    newest.write_bytes(whole)
    again = ground.run("none", EVALUATION, arguments, f"{case.name}/again")
    return judge(first, again, evaluation_result(out), want)


def _corrupt(case: Case, ground: Ground, out: Path) -> Verdict:
    """An image is damaged, and left out; it is repaired, and the command repeated."""
    run = ground.run_of(LOADER)
    want = ground.evaluated(run)
    arguments = ground.evaluation(run, out)
    (image,) = files_read(EVALUATION, arguments)
    whole = image.read_bytes()
    try:
        disks.truncate(image)
        first = ground.run("none", EVALUATION, arguments, f"{case.name}/first")
    finally:
        image.write_bytes(whole)
    again = ground.run("none", EVALUATION, arguments, f"{case.name}/again")
    return _without(first, judge(first, again, evaluation_result(out), want))


def _without(first: Outcome, verdict: Verdict) -> Verdict:
    """Return the verdict on an evaluation that may have left something out, and said so."""
    if verdict.kind is Kind.EQUAL and "not readable" in first.out + first.err:
        return Verdict(Kind.WITHOUT, "left out, and named")
    return verdict


SCENARIOS: dict[str, Callable[[Case, Ground, Path], Verdict]] = {
    "truncated": _damaged_checkpoint,
    "flipped": _damaged_checkpoint,
    "corrupt": _corrupt,
}
