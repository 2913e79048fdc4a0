"""Runs beside one another, and beside what is right: `make compare RUNS=runs/a,runs/b` writes `compare.html`.

What differs in their settings, their curves in the same axes, their evaluation in one table. For each run it
says in a sentence whether it looks right beside the reference of its recipe (`dense_ssl.reference`), or
beside `--reference`: a file of that kind, or a run, whose loss the others' should stay near.

Exit codes: 0 no run looks wrong (or nothing can be said), 1 one does, 2 the user's input is wrong.
"""

import argparse
import html
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dense_ssl.checkpoint import write_atomically
from dense_ssl.config import UserError, read_yaml
from dense_ssl.reference import Reference, judge
from dense_ssl.report.curves import CONSTANT, WATCHED
from dense_ssl.report.facts import setting
from dense_ssl.report.page import (
    evaluation_table,
    page,
    panel,
    read_jsonl,
    read_steps,
    section,
    series,
)
from dense_ssl.report.svg_plot import Band
from dense_ssl.watch import RECORDS

LARGEST = 5  # runs: as many as there are colours
NEAR = 0.1  # of the reference's own fall: what counts as the same curve
IGNORED = ("run.",)  # where and how it ran


@dataclass(frozen=True)
class Run:
    """What is read of a run."""

    name: str
    config: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]
    looks: Sequence[Mapping[str, Any]]
    results: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Said:
    """A sentence about a run, and whether it is a bad one."""

    sentence: str
    wrong: bool = False


def read_run(path: Path) -> Run:
    """Return a run's settings, log, looks and results.

    Raises:
        UserError: it is no run folder.
    """
    try:
        config = read_yaml(path / "config.yaml")
    except UserError:
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path}: no readable config.yaml in it; is it a run folder?")
    results = [{**record, "checkpoint": str(path)} for record in read_jsonl(path / "eval.jsonl")]
    log, looks = (read_steps(path / name) for name in ("log.jsonl", RECORDS))
    return Run(str(path), config, log, looks, results)


def write_comparison(paths: Sequence[Path], out: Path, reference: Path | None = None) -> list[Said]:
    """Write the page and return what it says of each run.

    Raises:
        UserError: there are no runs or too many, one is none, or `out` cannot be written.
    """
    if not 1 <= len(paths) <= LARGEST:
        raise UserError(f"{len(paths)} runs given: name one to {LARGEST}, with commas between")
    runs = [read_run(path) for path in paths]
    file = reference if reference and reference.is_file() else None
    judged = [judge(run.config, run.log, run.looks, file) for run in runs]
    said = [
        Said(f"{run.name}: {j.sentence}", j.answer == "wrong")
        for run, j in zip(runs, judged, strict=True)
    ]
    if file is None:
        first = read_run(reference) if reference else runs[0]
        beside = [verdict(run, first) for run in runs if run.name != first.name]
        # Two runs may well differ; but when one is named as being right, the others should not.
        said += [Said(text, "NOT as" in text and reference is not None) for text in beside]
    found = next((j.reference for j in judged if j.reference is not None), None)
    title = " and ".join(run.name for run in runs)
    sections = [
        f"<h1>{html.escape(title)}</h1>",
        section("Do they look right?", "".join(map(_said, said))),
        section("Settings that differ", settings_table(runs)),
        section("Training", curves(runs, found)),
        section("Features while training", looks_panels(runs, found)),
        section("Evaluation", evaluation_table([r for run in runs for r in run.results])),
    ]
    try:
        write_atomically(out, page(title, sections).encode())
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from None
    return said


def _said(said: Said) -> str:
    kind = ' class="warning"' if said.wrong else ""
    return f"<p{kind}>{html.escape(said.sentence)}</p>"


def verdict(run: Run, reference: Run) -> str:
    """Return whether a run's loss stays near the reference's, at the steps that both have logged.

    Near is within a tenth of how far the reference's loss goes from its highest to its lowest. Losses of
    other methods, or of other prototypes or queues, have another scale, and are not judged.
    """
    names = [setting(r.config, "method", "name") for r in (run, reference)]
    if names[0] != names[1]:
        return f"{run.name}: {names[0]} beside {names[1]}: their losses are not comparable"
    for key in ("out_dim", "queue_length"):
        values = [setting(r.config, "method", key) for r in (run, reference)]
        if values[0] != values[1]:
            return (
                f"{run.name}: method.{key} {values[0]} beside {values[1]}: losses have other scales"
            )
    mine = dict(series(run.log, "loss", "").points)
    theirs = dict(series(reference.log, "loss", "").points)
    shared = sorted(set(mine) & set(theirs))
    if len(shared) < 2:
        return f"{run.name}: fewer than two steps logged by both"
    span = max(theirs.values()) - min(theirs.values())
    gaps = {step: abs(mine[step] - theirs[step]) for step in shared}
    worst = max(gaps, key=lambda step: math.inf if math.isnan(gaps[step]) else gaps[step])
    apart = gaps[worst] / max(span, 1e-12)
    says = "as the reference" if apart <= NEAR else "NOT as the reference"
    return (
        f"{run.name}: {says}; farthest at step {worst:.0f} (loss {mine[worst]:.4f}, there "
        f"{theirs[worst]:.4f}: {apart:.0%} of the reference's range)"
    )


def settings_table(runs: Sequence[Run]) -> str:
    """Return the settings in which runs differ, where they ran left out."""
    flat = [_flattened(run.config) for run in runs]
    keys = sorted({key for one in flat for key in one if not key.startswith(IGNORED)})
    rows = [key for key in keys if len({str(one.get(key)) for one in flat}) > 1]
    if not rows:
        return '<p class="soft">None.</p>'
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    body = "".join(
        f"<tr><td>{html.escape(key)}</td>"
        + "".join(f"<td>{html.escape(str(one.get(key, '-')))}</td>" for one in flat)
        + "</tr>"
        for key in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr><th>setting</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def curves(runs: Sequence[Run], reference: Reference | None = None) -> str:
    """Return the runs' curves, one panel per quantity, one line per run; the loss before its reference."""
    logged = {key for run in runs for record in run.log for key in record}
    quantities = [("loss", "Loss", "nats", 1.0)]
    quantities += [
        (key, f"Loss: {key.removeprefix('loss_')}", "nats", 1.0)
        for key in sorted(logged)
        if key.startswith("loss_")
    ]
    quantities += [
        ("lr", "Learning rate", "", 1.0),
        ("images_per_s", "Throughput", "images/s", 1.0),
        ("data_wait", "Waiting for data", "% of step time", 100.0),
    ]
    panels = [
        panel(
            title,
            [series(run.log, key, run.name, scale) for run in runs],
            unit,
            band=loss_band(reference) if key == "loss" and reference else None,
        )
        for key, title, unit, scale in quantities
        if key in logged
    ]
    return f'<div class="grid2">{"".join(panels)}</div>'


def loss_band(reference: Reference) -> Band:
    """Return the band that a right run's loss is in, for the page."""
    steps = [0, *(record["step"] for record in next(iter(reference.logs.values())))]
    steps = [step for step in steps if step <= reference.last_step()]
    band = reference.band(steps)
    points = [(float(s), low, high) for s, (low, _, high) in zip(steps[1:], band, strict=True)]
    return Band(f"{reference.name}, {len(reference.logs)} seeds", points)


def looks_panels(runs: Sequence[Run], reference: Reference | None = None) -> str:
    """Return what was seen of the runs' features while they trained, beside the reference's first seed."""
    shown = [(run.name, run.looks) for run in runs]
    if reference and len(shown) < LARGEST:
        shown.append((reference.name, next(iter(reference.looks.values()))))
    panels = [
        panel(f"{title}: {label}", [series(looks, key, name) for name, looks in shown], unit)
        for title, unit, keys in WATCHED
        for key, label in keys.items()
        if key not in CONSTANT and any(key in record for run in runs for record in run.looks)
    ]
    if not panels:
        return '<p class="soft">None of these runs was watched.</p>'
    return f'<div class="grid2">{"".join(panels)}</div>'


def _flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= _flattened(value, f"{name}.")
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            for number, item in enumerate(value):
                flat |= _flattened(item, f"{name}.{number}.")
        else:
            flat[name] = value
    return flat


def main(argv: Sequence[str]) -> int:
    """Parse the command line and write the page; return the process's exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dense_ssl.compare", description="Put runs beside one another in one page."
    )
    parser.add_argument("runs", help="run folders, with commas between")
    parser.add_argument(
        "--reference",
        type=Path,
        help="a run, or a file of curves, that is right (default: the recipe's)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("compare.html"), help="the page (compare.html)"
    )
    args = parser.parse_args(argv)
    paths = [Path(name) for name in args.runs.split(",") if name]
    try:
        said = write_comparison(paths, args.out, args.reference)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write("".join(f"{one.sentence}\n" for one in said) + f"{args.out}\n")
    return int(any(one.wrong for one in said))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
