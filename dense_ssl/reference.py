"""Does a run look right? Curves of runs that were, with several seeds, and a judgement beside them.

    python -m dense_ssl.reference runs/a runs/b runs/c --out configs/reference/demo-densecl.jsonl

A reference holds what a recipe's runs logged: a first line with the settings they share, then a line per
logged step and look and seed. How far a loss may be from their mean is not chosen but follows from how far
they are from one another. Throughput is never judged.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from dense_ssl.checkpoint import write_atomically
from dense_ssl.config import UserError, read_yaml
from dense_ssl.report.page import read_jsonl
from dense_ssl.run_config import with_defaults
from dense_ssl.watch import RECORDS
from dense_ssl.watch.signs import signs

FOLDER = Path(__file__).resolve().parent.parent / "configs" / "reference"
FORMAT = "dense_ssl-reference/1"
CHANCE = 0.001  # two-sided: what a right run's loss is outside of the band with, at one step
OUTSIDE = 0.1  # share of the steps that may be outside: neighbouring steps go astray together
RANK_LEFT = 0.5  # of the lowest effective rank among the seeds; below it features are degenerate

_IGNORED = (
    "run.",
    "watch.",
    "data.path",
    "data.workers",
    "data.loader",
    "train.seed",
    "train.steps",
)
# What decides how large a loss is: with another value of one of these nothing can be said.
_SCALE = ("method.name", "method.out_dim", "method.queue_length", "method.temperature", "method.views",
          "method.backbone", "train.batch_size")  # fmt: skip

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Reference:
    """Runs of one recipe that went well."""

    name: str
    settings: Mapping[str, Any]  # flattened, what does not change results left out
    steps_per_epoch: int
    logs: Mapping[int, Records]  # by seed
    looks: Mapping[int, Records]

    def band(self, steps: Sequence[int]) -> list[tuple[float, float, float]]:
        """Return (low, mean, high) of the loss over each stretch from one of `steps` to the next.

        A prediction interval for one more run: mean -+ t s sqrt(1 + 1 / n) of n seeds, with s pooled over
        the steps, for three values alone say little of a deviation, and t of n - 1 degrees of freedom for
        every three stretches, as neighbours are not independent.
        """
        from scipy.stats import t as student

        curves = [stretches(log, steps) for log in self.logs.values()]
        n = len(curves)
        means = [sum(values) / n for values in zip(*curves, strict=True)]
        squares = [
            sum((v - mean) ** 2 for v in values) / (n - 1)
            for values, mean in zip(zip(*curves, strict=True), means, strict=True)
        ]
        s = math.sqrt(sum(squares) / len(squares))
        freedom = (n - 1) * max(len(squares) / 3, 1)
        half = float(student.ppf(1 - CHANCE / 2, freedom)) * s * math.sqrt(1 + 1 / n)
        return [(mean - half, mean, mean + half) for mean in means]

    def last_step(self) -> int:
        """Return the last step that all of its runs have logged."""
        return min(log[-1]["step"] for log in self.logs.values())


@dataclass(frozen=True)
class Judgement:
    """Whether a run looks right, in a sentence."""

    answer: Literal["right", "wrong", "unknown"]
    sentence: str
    reference: Reference | None = None


def judge(
    config: Mapping[str, Any], log: Records, looks: Records, given: Path | None = None
) -> Judgement:
    """Return how a run looks beside the reference of its recipe, or beside the one in a file.

    Raises:
        UserError: the file is no reference.
    """
    mine = comparable(with_defaults(config))
    known = [load(given)] if given else shipped()
    of_method = [r for r in known if all(_same(mine, r.settings, key) for key in _SCALE)]
    if not of_method:
        near = [r for r in known if r.settings.get("method.name") == mine.get("method.name")]
        if not near:
            names = ", ".join(r.name for r in known) or "none"
            return Judgement("unknown", f"no reference of this method (there are: {names})")
        keys = [key for key in _SCALE if not _same(mine, near[0].settings, key)]
        return Judgement(
            "unknown",
            f"its losses have another scale than {near[0].name}'s: {', '.join(keys)} differ",
        )
    reference = min(of_method, key=lambda r: len(differing(mine, r.settings)))
    lines = [r for r in log if r.get("step") and r.get("epoch")]
    if lines and round(lines[-1]["step"] / lines[-1]["epoch"]) != reference.steps_per_epoch:
        return Judgement(
            "unknown",
            f"it sees other data than {reference.name}, which has {reference.steps_per_epoch} steps an epoch",
        )
    steps = [0, *(r["step"] for r in lines if r["step"] <= reference.last_step())]
    if len(steps) < 3:
        return Judgement("unknown", "too few steps are logged to say anything", reference)
    return _beside(reference, mine, lines, looks, steps)


def _beside(
    reference: Reference, mine: Mapping[str, Any], lines: Records, looks: Records, steps: list[int]
) -> Judgement:
    band, losses = reference.band(steps), stretches(lines, steps)
    outside = [
        step
        for step, loss, (low, _, high) in zip(steps[1:], losses, band, strict=True)
        if not low <= loss <= high
    ]
    until = f"up to step {steps[-1]} of {reference.name} ({len(reference.logs)} seeds)"
    wrong = []
    if len(outside) > OUTSIDE * len(losses):
        at = steps.index(outside[0]) - 1
        low, _, high = band[at]
        wrong.append(
            f"its loss leaves the reference's band at step {outside[0]} ({losses[at]:.3f}, there "
            f"{low:.3f} to {high:.3f}), {len(outside)} of {len(losses)} logged steps are outside"
        )
    wrong += _degenerate(reference, looks)
    if not wrong:
        most = max(
            abs(loss - mean) / max(high - mean, 1e-12)
            for loss, (_, mean, high) in zip(losses, band, strict=True)
        )
        return Judgement(
            "right",
            f"looks right {until}: its loss goes to {100 * most:.0f} % of the band's half width at most",
            reference,
        )
    other = differing(mine, reference.settings)
    because = f"; settings that differ: {', '.join(other[:4])}" if other else ""
    return Judgement(
        "wrong", f"does NOT look right {until}: {'; '.join(wrong)}{because}", reference
    )


def _degenerate(reference: Reference, looks: Records) -> list[str]:
    """Return what of a run's features is worse than all of the reference's, at the last common look."""
    theirs = {r["step"]: [] for log in reference.looks.values() for r in log}
    for log in reference.looks.values():
        for record in log:
            theirs[record["step"]].append(record)
    common = [r for r in looks if r.get("step") in theirs]
    if not common:
        return []
    last = common[-1]
    found = list(signs(last).values())
    ranks = [r["rankme"] for r in theirs[last["step"]] if "rankme" in r]
    same = {r.get("most_rank") for r in theirs[last["step"]]} == {last.get("most_rank")}
    if not found and ranks and same and last["rankme"] < RANK_LEFT * min(ranks):
        found.append(
            f"the effective rank of its features is {last['rankme']:.1f} at step {last['step']}, "
            f"there at least {min(ranks):.1f}"
        )
    return found


def stretches(log: Records, steps: Sequence[int]) -> list[float]:
    """Return the mean loss from each of `steps` to the next.

    A logged loss is the mean since the line before it, so runs that log at other steps can be compared.
    """
    known, total, at = [(0, 0.0)], 0.0, 0
    for record in log:
        if isinstance(record.get("loss"), int | float) and record["step"] > at:
            total += (record["step"] - at) * float(record["loss"])
            at = record["step"]
            known.append((at, total))

    def until(step: int) -> float:
        for (a, x), (b, y) in pairwise(known):
            if a <= step <= b:
                return x + (y - x) * (step - a) / (b - a)
        return math.nan

    return [(until(b) - until(a)) / (b - a) for a, b in pairwise(steps)]


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that change results, flattened: `method.out_dim` and so on."""
    flat: dict[str, Any] = {}

    def add(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(inner, f"{name}.{key}" if name else str(key))
        elif isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
            for number, inner in enumerate(value):
                add(inner, f"{name}.{number}")
        else:
            flat[name] = list(value) if isinstance(value, tuple) else value

    add(dict(config), "")
    return {key: value for key, value in flat.items() if not key.startswith(_IGNORED)}


def differing(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return settings that differ, with both values."""
    return [
        f"{key} {mine.get(key)} (there {theirs.get(key)})"
        for key in sorted({*mine, *theirs})
        if mine.get(key) != theirs.get(key)
    ]


def _same(mine: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str) -> bool:
    keys = {k for k in (*mine, *theirs) if k == prefix or k.startswith(f"{prefix}.")}
    return all(mine.get(key) == theirs.get(key) for key in keys)


def shipped() -> list[Reference]:
    """Return the references that come with the recipes."""
    return [load(path) for path in sorted(FOLDER.glob("*.jsonl"))]


def load(path: Path) -> Reference:
    """Return the reference in a file.

    Raises:
        UserError: it holds none.
    """
    first, *lines = read_jsonl(path) or [{}]
    if first.get("format") != FORMAT:
        raise UserError(f"{path}: no reference; python -m dense_ssl.reference makes one of runs")
    seeds = sorted({line["seed"] for line in lines})
    logs = {seed: [r for r in lines if r["seed"] == seed and "loss" in r] for seed in seeds}
    looks = {seed: [r for r in lines if r["seed"] == seed and "rankme" in r] for seed in seeds}
    return Reference(first["name"], first["settings"], first["steps_per_epoch"], logs, looks)


def make(runs: Sequence[Path], name: str) -> str:
    """Return the text of a reference made of runs that differ in their seed alone.

    Raises:
        UserError: they are fewer than two, differ in more, or have logged nothing.
    """
    settings, lines, per_epoch = [], [], set()
    for run in runs:
        try:
            config = read_yaml(run / "config.yaml")
            seed = int(config["train"]["seed"])
        except (UserError, KeyError, TypeError, ValueError):
            raise UserError(f"{run}: no readable config.yaml in it; is it a run folder?") from None
        settings.append(comparable(with_defaults(config)))
        log = [r for r in read_jsonl(run / "log.jsonl") if r.get("epoch") and "loss" in r]
        if not log:
            raise UserError(f"{run}: nothing is logged")
        per_epoch.add(round(log[-1]["step"] / log[-1]["epoch"]))
        kept = [{k: v for k, v in r.items() if k == "step" or k.startswith("loss")} for r in log]
        kept += [
            {k: v for k, v in r.items() if k not in ("epoch", "seconds")}
            for r in read_jsonl(run / RECORDS)
        ]
        lines += [{"seed": seed, **_rounded(record)} for record in kept]
    if len({line["seed"] for line in lines}) < max(len(runs), 2):
        raise UserError("a reference is made of two runs or more, each with its own train.seed")
    other = [text for one in settings[1:] for text in differing(one, settings[0])]
    if other or len(per_epoch) > 1:
        raise UserError(
            f"these runs differ in more than their seed: {', '.join(other) or 'the data'}"
        )
    header = {
        "format": FORMAT, "name": name, "steps_per_epoch": per_epoch.pop(), "settings": settings[0],
    }  # fmt: skip
    return "".join(json.dumps(record) + "\n" for record in (header, *lines))


def _rounded(record: Mapping[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in record.items()}


def main(argv: Sequence[str]) -> int:
    """Parse the command line and write the reference; return the process's exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dense_ssl.reference", description="Keep the curves of runs that went well."
    )
    parser.add_argument("runs", nargs="+", type=Path, help="runs that differ in train.seed alone")
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl file; its name is theirs")
    args = parser.parse_args(argv)
    try:
        write_atomically(args.out, make(args.runs, args.out.stem).encode())
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"error: {args.out}: cannot be written: {error.strerror}\n")
        return 2
    sys.stdout.write(f"{args.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
