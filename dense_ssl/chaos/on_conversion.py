"""Faults that strike a conversion: each scenario ends with a verdict."""

import shutil
from collections.abc import Callable
from pathlib import Path

from dense_ssl.chaos import disks
from dense_ssl.chaos.faults import CONVERSION, Case
from dense_ssl.chaos.ground import Ground, conversion_result
from dense_ssl.chaos.verdicts import Kind, Lost, Verdict, judge


def struck(case: Case, ground: Ground) -> Verdict:
    """Return what becomes of a conversion under the fault of a case."""
    out = ground.folder / "cases" / case.name / "disk" / "out"
    disks.release(out.parent)
    try:
        return SCENARIOS.get(case.fault.name, _struck_and_repeated)(case, ground, out)
    finally:
        disks.release(out.parent)
        disks.come_back(ground.many)


def _struck_and_repeated(case: Case, ground: Ground, out: Path) -> Verdict:
    """The command meets the fault; the cause is removed, and the command repeated."""
    want = ground.converted()
    if case.fault.name == "disk-full":
        disks.small_disk(out.parent)
    arguments = ground.conversion(out)
    first = ground.run(case.fault.name, CONVERSION, arguments, f"{case.name}/first")
    disks.free(out.parent)
    disks.writable(out)
    again = ground.run("none", CONVERSION, arguments, f"{case.name}/again")
    return judge(first, again, conversion_result(out), want)


def _damaged_part(case: Case, ground: Ground, out: Path) -> Verdict:
    """What a stopped conversion has finished is damaged; the command is repeated."""
    want = ground.converted()
    arguments = ground.conversion(out)
    first = ground.run("sigterm", CONVERSION, arguments, f"{case.name}/first")
    parts = sorted((out / ".work").glob("part-*.bin"))
    if not parts:
        raise Lost("no part was finished before the stop")
    if case.fault.name == "truncated":
        disks.truncate(parts[0])
    else:
        disks.flip_bit(parts[0], parts[0].stat().st_size // 2)
    again = ground.run("none", CONVERSION, arguments, f"{case.name}/again")
    return judge(first, again, conversion_result(out), want)


def _corrupt(case: Case, ground: Ground, out: Path) -> Verdict:
    """More images are damaged than may be; they are repaired, and the conversion begun anew."""
    want = ground.converted()
    images = sorted(ground.many.glob("*.jpg"))[::40]
    whole = {image: image.read_bytes() for image in images}
    arguments = ground.conversion(out)
    try:
        for image in images:
            disks.truncate(image)
        first = ground.run("none", CONVERSION, arguments, f"{case.name}/first")
    finally:
        for image, data in whole.items():
            image.write_bytes(data)
    shutil.rmtree(out)
    again = ground.run("none", CONVERSION, arguments, f"{case.name}/again")
    return judge(first, again, conversion_result(out), want)


def _vanished(case: Case, ground: Ground, out: Path) -> Verdict:
    """An image goes away after it was listed; the shards are made without it, and it is named."""
    want = ground.converted()
    arguments = ground.conversion(out)
    first = ground.run(case.fault.name, CONVERSION, arguments, f"{case.name}/first")
    named = "unreadable" in (out / "quarantine.jsonl").read_text() if first.code == 0 else None
    disks.come_back(ground.many)
    if named is not None:
        shutil.rmtree(out)
    again = ground.run("none", CONVERSION, arguments, f"{case.name}/again")
    verdict = judge(first, again, conversion_result(out), want)
    if verdict.kind is not Kind.EQUAL or named is None:
        return verdict
    if not named:
        return Verdict(Kind.FAILED, "an image is missing, and not named")
    return Verdict(Kind.WITHOUT, "left out, and named")


SCENARIOS: dict[str, Callable[[Case, Ground, Path], Verdict]] = {
    "truncated": _damaged_part,
    "flipped": _damaged_part,
    "corrupt": _corrupt,
    "vanished": _vanished,
}
