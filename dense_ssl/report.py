"""One self-contained HTML page about a run: what ran, its curves, its results, its pictures, what next.

    python -m dense_ssl.report runs/a          # writes runs/a/report.html

Reads `config.yaml`, `log.jsonl`, `eval.jsonl` and the `.png` files of the run's folder. The page has no
script and fetches nothing. A file still being written, or missing, takes nothing but its section away.
"""

import argparse
import base64
import html
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dense_ssl.checkpoint import write_atomically
from dense_ssl.config import UserError
from dense_ssl.report_facts import run_facts, setting
from dense_ssl.svg_plot import Line, line_plot

_LARGEST_PICTURE = 8_000_000  # bytes; a page should still open at once
_PICTURES = {
    "crops": "What the network sees: source images with their crop boxes, beside the views after "
    "photometry.",
    "correspondence": "Which cells of two views the trained features match, judged by the crop boxes.",
}
_STYLE = Path(__file__).with_name("report.css")


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
        _section("Training", _curves(log)),
        _section("Evaluation", _evaluation(results)),
        *_pictures(run),
        _section("Commands", _commands(run, config, results)),
        _section("Settings", f"<details><summary>config.yaml</summary>{_code(text)}</details>"),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE.read_text()}</style></head><body>"
        f"{''.join(sections)}</body></html>\n"
    )
    path = run / "report.html"
    try:
        write_atomically(path, page.encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSON-lines file; lines that are cut short and missing files give none."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


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
    losses = [_line(log, "loss", "loss")]
    losses += [_line(log, part, part.removeprefix("loss_")) for part in parts[:4]]
    panels = [
        _panel("Loss", losses, "loss (nats)", log),
        _panel("Learning rate", [_line(log, "lr", "lr")], "learning rate", log),
        _panel("Throughput", [_line(log, "images_per_s", "images/s")], "images/s", log, True),
        _panel(
            "Waiting for data",
            [_line(log, "data_wait", "data wait", 100)],
            "% of step time",
            log,
            True,
        ),
    ]
    if any("memory_gb" in record for record in log):
        memory = [_line(log, "memory_gb", "peak memory")]
        panels.append(_panel("GPU memory", memory, "GB", log, True))
    return f'<div class="grid2">{"".join(panels)}</div>'


def _line(log: Sequence[Mapping[str, Any]], key: str, label: str, scale: float = 1.0) -> Line:
    points = [
        (float(record["step"]), scale * float(record[key]))
        for record in log
        if isinstance(record.get(key), int | float) and isinstance(record.get("step"), int)
    ]
    return Line(label, points)


def _panel(
    title: str,
    lines: Sequence[Line],
    y_label: str,
    log: Sequence[Mapping[str, Any]],
    from_zero: bool = False,
) -> str:
    legend = "".join(
        f'<span><i class="key s{i}"></i>{html.escape(line.label)} '
        f"{f'{line.points[-1][1]:.4g}' if line.points else ''}</span>"
        for i, line in enumerate(lines)
    )
    plot = line_plot(lines, "optimiser step", y_label, from_zero)
    return f"<figure><figcaption>{html.escape(title)}{legend}</figcaption>{plot}</figure>"


# --- evaluation ------------------------------------------------------------------------------------


def _evaluation(results: Sequence[Mapping[str, Any]]) -> str:
    rows: dict[tuple[str, str, str], dict[str, float]] = {}
    labels: dict[str, None] = {}
    for record in results:
        if not isinstance(record.get("value"), int | float):
            continue
        task, protocol, metric = (str(record.get(k, "")) for k in ("task", "protocol", "metric"))
        label = str(record.get("checkpoint", "run"))
        labels[label] = None
        row = rows.setdefault((task, protocol, metric), {})
        row[label] = float(record["value"])  # a later result replaces an earlier
        if isinstance(record.get("random_init"), int | float):  # the same network, untrained
            labels["random initialisation"] = None
            row["random initialisation"] = float(record["random_init"])
    if not rows:
        return (
            '<p class="soft">Nothing evaluated yet. The command is below; results appear here when '
            "the report is written again.</p>"
        )
    columns = sorted(labels, key=lambda label: not label.startswith("random"))
    difference = len(columns) == 2 and columns[0].startswith("random")
    head = "".join(f'<th class="number">{html.escape(label)}</th>' for label in columns)
    head += '<th class="number">difference</th>' if difference else ""
    body = []
    for (task, protocol, metric), values in rows.items():
        cells = "".join(
            f'<td class="number">{f"{values[c]:.2f}" if c in values else "-"}</td>' for c in columns
        )
        if difference:
            both = all(c in values for c in columns)
            cells += '<td class="number">'
            cells += f"{values[columns[1]] - values[columns[0]]:+.2f}</td>" if both else "</td>"
        names = "".join(f"<td>{html.escape(text)}</td>" for text in (task, metric, protocol))
        body.append(f"<tr>{names}{cells}</tr>")
    return (
        '<div class="scroll"><table><thead><tr><th>task</th><th>metric</th><th>protocol</th>'
        f"{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


# --- pictures and commands -------------------------------------------------------------------------


def _pictures(run: Path) -> list[str]:
    sections = []
    own = [run / f"{name}.png" for name in _PICTURES]
    for path in [*filter(Path.is_file, own), *sorted(set(run.glob("*.png")) - set(own))]:
        if path.stat().st_size > _LARGEST_PICTURE:
            body = f'<p class="soft">{html.escape(path.name)} is too large to embed.</p>'
        else:
            data = base64.b64encode(path.read_bytes()).decode()
            caption = _PICTURES.get(path.stem, path.name)
            body = (
                f'<p class="soft">{html.escape(caption)}</p>'
                f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
            )
        sections.append(_section(path.stem.replace("-", " ").capitalize(), body))
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
    return "".join(f"<p>{html.escape(name)}</p>{_code(text)}" for name, text in steps.items())


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


def _code(text: str) -> str:
    return f"<pre><code>{html.escape(text)}</code></pre>"


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
