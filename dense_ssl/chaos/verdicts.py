"""From what a command did under a fault, and what repeating it gave, to one word and a reason."""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Kind(StrEnum):
    """What became of a run."""

    EQUAL = "equal"  # the same command again: log and weights of the undisturbed run
    REFUSED = "refused"  # one sentence, a clean end; with the cause removed: equal
    WITHOUT = "without"  # it goes on without the step, record or image, and says so; repeatable
    HALVED = "halved"  # it goes on in smaller micro-batches, as if they had been asked for
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a process ended."""

    code: int  # exit code; -9: by signal 9
    out: str = ""
    err: str = ""
    seconds: float = 0.0
    hung: bool = False  # it was ended from outside, after its time


@dataclass(frozen=True, slots=True)
class Verdict:
    """The word, and what stands behind it."""

    kind: Kind
    why: str = ""
    seconds: float = 0.0


TRY_AGAIN, WRONG = 75, 2


class Lost(Exception):
    """Something was lost, hung or unexplained; the message says what."""


def ended(outcome: Outcome, what: str) -> None:
    """Check that a process ended by itself and left no traceback.

    Raises:
        Lost: it did not.
    """
    if outcome.hung:
        raise Lost(f"{what} did not end within {outcome.seconds:.0f} s")
    if "Traceback (most recent call last)" in outcome.err:
        raise Lost(f"{what} ended with a traceback: {_last_line(outcome.err)}")


def explained(outcome: Outcome) -> str:
    """Return the one sentence a command refused with; several ranks may say the same.

    Raises:
        Lost: there is none, or more than one.
    """
    sentences = re.findall(r"^(?:\[rank \d+\] )?error: (.*)$", outcome.err, re.MULTILINE)
    if len(set(sentences)) != 1:
        raise Lost(f"refused with {len(sentences)} sentences: {_last_line(outcome.err)}")
    return sentences[0]


def succeeded(outcome: Outcome, what: str) -> None:
    """Check that a process did what it was asked to.

    Raises:
        Lost: it did not.
    """
    ended(outcome, what)
    if outcome.code != 0:
        raise Lost(f"{what} ended with code {outcome.code}: {_last_line(outcome.err)}")


def same(got: Any, want: Any) -> None:
    """Check that a result is that of the undisturbed run.

    Args:
        got: {part: value}, such as the log and the hash of the weights.
        want: the same of the undisturbed run.

    Raises:
        Lost: naming the parts that differ.
    """
    parts = [name for name in want if got.get(name) != want[name]]
    if parts:
        raise Lost(f"{' and '.join(parts)} not as in the undisturbed run")


def judge(first: Outcome, again: Outcome, got: Any, want: Any) -> Verdict:
    """Return the verdict on a command that met a fault, and was repeated once the cause was removed.

    Args:
        first: under the fault.
        again: the same command, repeated.
        got: its result.
        want: the result of the undisturbed run.
    """
    try:
        ended(first, "the command")
        why = explained(first) if first.code == WRONG else ""
        if first.code == TRY_AGAIN and "error: " in first.err:
            why = explained(first)
        succeeded(again, "repeating the command")
        same(got, want)
    except Lost as lost:
        return Verdict(Kind.FAILED, str(lost))
    return Verdict(Kind.REFUSED if why else Kind.EQUAL, why)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "(nothing was said)"
