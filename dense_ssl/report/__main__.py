"""One self-contained HTML page about a run: what ran, its curves, its results, its pictures, what next.

    python -m dense_ssl.report runs/a          # writes runs/a/report.html

Reads `config.yaml`, the `.jsonl` files and the `.png` files of the run's folder. The page has no script and
fetches nothing. A file still being written, or missing, takes nothing but its section away.
"""

import argparse
import html
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dense_ssl import plain_yaml
from dense_ssl.checkpoint import write_atomically
from dense_ssl.config import UserError
from dense_ssl.reference import judge
from dense_ssl.report.curves import schedule_panels, speed_panels, training_panels, watched_panels
from dense_ssl.report.facts import glance, progress, run_facts, setting
from dense_ssl.report.happened import events_of, incidents_table, standing, warnings_of
from dense_ssl.report.page import (
    code,
    evaluation_table,
    facts_table,
    page,
    picture,
    read_jsonl,
    read_steps,
    section,
    tiles,
)
from dense_ssl.watch import RECORDS

Records = Sequence[Mapping[str, Any]]

_PNG = b"\x89PNG\r\n\x1a\n"
_LARGEST_PICTURE = 8_000_000  # bytes; a page should still open at once
_NO_LOOKS = "No look at the features yet: watch.on is false, or the run has just begun."
_PICTURES = {
    "crops": "What the network sees: source images with their crop boxes, beside the views after "
    "photometry.",
    "correspondence": "Which cells of two views the trained features match, judged by the crop boxes.",
}


def write_report(run: Path) -> Path:
    """Write `report.html` into a run's folder and return its path.

    Raises:
        UserError: `run` is no folder with a `config.yaml`, or the page cannot be written.
    """
    try:
        text = (run / "config.yaml").read_text()
        config = plain_yaml.parse(text)
    except (OSError, plain_yaml.NotPlain, UnicodeDecodeError):
        raise UserError(f"{run}: no readable config.yaml in it; is it a run folder?") from None
    if not isinstance(config, dict):
        raise UserError(f"{run}/config.yaml: holds no settings; is it a run folder?")
    log, looks = read_steps(run / "log.jsonl"), read_steps(run / RECORDS)
    results = read_jsonl(run / "eval.jsonl")
    events = events_of(run)
    title = f"{setting(config, 'method', 'name')} · {run.resolve().name}"
    sections = [
        _heading(title, run, config, log, looks, events),
        section("Training", _grid(training_panels(log), "log.jsonl has no line yet.")),
        section("Features while training", _grid(watched_panels(looks), _NO_LOOKS)),
        section("Evaluation", evaluation_table(results)),
        section("Speed", _grid(speed_panels(log) if log else [], "Nothing logged yet.")),
        *_pictures(run),
        section("Incidents", incidents_table(run, events, log)),
        section("Commands", _commands(run, config, results)),
        section("This run", facts_table(run_facts(run, config, log, events))),
        section("Settings", _settings(text, config, log)),
    ]
    text = page(title, sections)
    path = run / "report.html"
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    return path


def _heading(
    title: str, run: Path, config: Mapping[str, Any], log: Records, looks: Records, events: Records
) -> str:
    step, planned = progress(config, log)
    state, why = standing(run, events, planned > 0 and step >= planned)
    line = f"{step:,} of {planned:,} steps" if planned else "no step logged yet"
    share = min(step / planned, 1.0) if planned else 0.0
    warnings = "".join(
        f'<p class="warning">{html.escape(text)}</p>' for text in warnings_of(log, looks)
    )
    judged = judge(config, log, looks)
    if judged.answer == "wrong":
        warnings += f'<p class="warning">This run {html.escape(judged.sentence)}.</p>'
    elif judged.answer == "right":
        warnings += f"<p>This run {html.escape(judged.sentence)}.</p>"
    return (
        f'<header><h1>{html.escape(title)} <span class="state {state}">{state}</span></h1>'
        f"<p>{html.escape(line)}{html.escape(f'; {why}' if why else '')}</p>"
        f'<div class="bar" role="progressbar" aria-valuenow="{100 * share:.0f}" aria-valuemin="0" '
        f'aria-valuemax="100" aria-label="steps done"><i style="width:{100 * share:.1f}%"></i></div>'
        f"{tiles(glance(config, log, looks, state))}{warnings}</header>"
    )


def _grid(panels: Sequence[str], otherwise: str) -> str:
    if not panels:
        return f'<p class="soft">{html.escape(otherwise)}</p>'
    return f'<div class="grid2">{"".join(panels)}</div>'


def _settings(text: str, config: Mapping[str, Any], log: Records) -> str:
    panels = schedule_panels(config, log)
    schedules = _grid(panels, "") if panels else ""
    return f"{schedules}<details><summary>config.yaml</summary>{code(text)}</details>"


# --- pictures and commands -------------------------------------------------------------------------


def _pictures(run: Path) -> list[str]:
    sections = []
    own = [run / f"{name}.png" for name in _PICTURES]
    for path in [*filter(Path.is_file, own), *sorted(set(run.glob("*.png")) - set(own))]:
        if path.stat().st_size > _LARGEST_PICTURE:
            body = f'<p class="soft">{html.escape(path.name)} is too large to embed.</p>'
        elif (png := path.read_bytes()).startswith(_PNG):
            body = picture(png, _PICTURES.get(path.stem, path.name))
        else:
            body = f'<p class="soft">{html.escape(path.name)} is no picture.</p>'
        sections.append(section(path.stem.replace("-", " ").capitalize(), body))
    return sections


def _commands(run: Path, config: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
    folder = shlex.quote(str(run))
    data = next((str(r["data"]) for r in reversed(results) if r.get("data")), None)
    where = shlex.quote(data) if data else "FOLDER"
    steps = {
        "Resume, or repeat in another run.dir": f"python -m dense_ssl.pretrain {folder}/config.yaml",
        "Evaluate, beside random weights": f"make eval RUN={folder} TASKS=knn,segment DATA={where} "
        "ARGS=--random",
        "Export for timm, torchvision, detectron2 and the authors' code": f"make export RUN={folder} TO=all",
        "Draw crops and correspondences": f"make visualise RUN={folder} KIND=crops\n"
        f"make visualise RUN={folder} KIND=correspondence",
        "Write this page again": f"make report RUN={folder}",
    }
    return "".join(f"<p>{html.escape(name)}</p>{code(text)}" for name, text in steps.items())


def main(argv: list[str]) -> int:
    """Parse the command line and write the page; return the process's exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dense_ssl.report", description="Write one HTML page about a run."
    )
    parser.add_argument("run", type=Path, help="a run folder")
    try:
        sys.stdout.write(f"{write_report(parser.parse_args(argv).run)}\n")
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
