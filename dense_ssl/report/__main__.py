"""One self-contained HTML page about a run: what ran, its curves, its results, its pictures, what next.

    python -m dense_ssl.report runs/a          # writes runs/a/report.html

Reads `config.yaml`, `log.jsonl`, `eval.jsonl` and the `.png` files of the run's folder. The page has no
script and fetches nothing. A file still being written, or missing, takes nothing but its section away.
"""

import argparse
import html
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dense_ssl.checkpoint import write_atomically
from dense_ssl.config import UserError
from dense_ssl.report.facts import run_facts, setting
from dense_ssl.report.page import (
    code,
    evaluation_table,
    page,
    panel,
    picture,
    read_jsonl,
    section,
    series,
)

_LARGEST_PICTURE = 8_000_000  # bytes; a page should still open at once
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
        config = yaml.safe_load(text)
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{run}: no readable config.yaml in it; is it a run folder?") from None
    if not isinstance(config, dict):
        raise UserError(f"{run}/config.yaml: holds no settings; is it a run folder?")
    log = read_jsonl(run / "log.jsonl")
    results = read_jsonl(run / "eval.jsonl")
    title = f"{setting(config, 'method', 'name')} · {run.resolve().name}"
    sections = [
        _heading(run, config, log),
        section("Training", _curves(log)),
        section("Evaluation", evaluation_table(results)),
        *_pictures(run),
        section("Commands", _commands(run, config, results)),
        section("Settings", f"<details><summary>config.yaml</summary>{code(text)}</details>"),
    ]
    text = page(title, sections)
    path = run / "report.html"
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    return path


def _heading(run: Path, config: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in run_facts(run, config, log).items()
    )
    title = html.escape(f"{setting(config, 'method', 'name')} · {run.resolve().name}")
    return f'<h1>{title}</h1><table class="facts">{rows}</table>'


# --- curves ----------------------------------------------------------------------------------------


def _curves(log: Sequence[Mapping[str, Any]]) -> str:
    if not log:
        return '<p class="soft">log.jsonl has no line yet.</p>'
    parts = sorted({key for record in log for key in record if key.startswith("loss_")})
    losses = [series(log, "loss", "loss")]
    losses += [series(log, part, part.removeprefix("loss_")) for part in parts[:4]]
    panels = [
        panel("Loss", losses, "loss (nats)"),
        panel("Learning rate", [series(log, "lr", "lr")], "learning rate"),
        panel("Throughput", [series(log, "images_per_s", "images/s")], "images/s", True),
        panel(
            "Waiting for data",
            [series(log, "data_wait", "data wait", 100)],
            "% of step time",
            True,
        ),
    ]
    if any("memory_gb" in record for record in log):
        memory = [series(log, "memory_gb", "peak memory")]
        panels.append(panel("GPU memory", memory, "GB", True))
    return f'<div class="grid2">{"".join(panels)}</div>'


# --- pictures and commands -------------------------------------------------------------------------


def _pictures(run: Path) -> list[str]:
    sections = []
    own = [run / f"{name}.png" for name in _PICTURES]
    for path in [*filter(Path.is_file, own), *sorted(set(run.glob("*.png")) - set(own))]:
        if path.stat().st_size > _LARGEST_PICTURE:
            body = f'<p class="soft">{html.escape(path.name)} is too large to embed.</p>'
        else:
            body = picture(path.read_bytes(), _PICTURES.get(path.stem, path.name))
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
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
