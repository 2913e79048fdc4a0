"""Parts of our HTML pages: a page with its style, sections, panels with curves, tables, pictures.

A page has no script and fetches nothing.
"""

import base64
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dataprep import plain_json
from dense_ssl.report.svg_plot import Band, Line, line_plot

MOST_LINES = 20_000
SMALLEST, LARGEST = 1e-100, 1e15  # no rate is smaller, no number of steps, seconds or bytes larger
_STYLE = Path(__file__).with_name("report.css")


def page(title: str, sections: Sequence[str]) -> str:
    """Return a whole page."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE.read_text()}</style></head><body>"
        f"<main>{''.join(sections)}</main></body></html>\n"
    )


def section(title: str, body: str) -> str:
    """Return a titled section."""
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


def code(text: str) -> str:
    """Return text as it is, for copying."""
    return f"<pre><code>{html.escape(text)}</code></pre>"


def picture(png: bytes, caption: str) -> str:
    """Return a picture with its caption, in the page itself."""
    data = base64.b64encode(png).decode()
    return (
        f'<p class="soft">{html.escape(caption)}</p>'
        f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
    )


def facts_table(facts: Mapping[str, str]) -> str:
    """Return names and what is to be said of them."""
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(value)}</td></tr>'
        for name, value in facts.items()
    )
    return f'<table class="facts">{rows}</table>'


def tiles(figures: Mapping[str, str]) -> str:
    """Return a few figures, large, with what they are below."""
    boxes = "".join(
        f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>"
        for name, value in figures.items()
    )
    return f'<div class="tiles">{boxes}</div>' if boxes else ""


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSON-lines file; lines that are cut short and missing files give none.

    Of more than `MOST_LINES` lines evenly spaced ones are read, and the last: a page takes a second, not
    minutes, whatever the length of the run.
    """
    if not path.is_file():
        return []
    records = []
    lines = path.read_text(errors="replace").splitlines()
    apart = -(-len(lines) // MOST_LINES)
    for line in lines if apart <= 1 else [*lines[:-1:apart], lines[-1]]:
        try:
            record = plain_json.parse(line, not_numbers=True)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append({k: v for k, v in record.items() if k.startswith("loss") or _plain(v)})
    return records


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Return those records of a log, or of looks, that say their step; of each what is a number."""
    found = []
    for record in read_jsonl(path):
        numbers = {key: value for key, value in record.items() if is_number(value)}
        if numbers.get("epoch", 1) <= 0:
            del numbers["epoch"]
        if isinstance(numbers.get("step"), int) and numbers["step"] >= 0:
            found.append(numbers)
    return found


def is_number(value: Any) -> bool:
    """Return whether a value is a number that a run may say: of a usual size, or none at all (NaN, inf)."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    size = abs(value)
    return SMALLEST <= size <= LARGEST or size == 0 or not size < math.inf


def _plain(value: Any) -> bool:
    """Return whether a value is no float that is no number: only losses may be that, and are said to be."""
    return not isinstance(value, float) or math.isfinite(value)


def series(log: Sequence[Mapping[str, Any]], key: str, label: str, scale: float = 1.0) -> Line:
    """Return one logged value over the steps."""
    points = [
        (float(record["step"]), scale * float(record[key]))
        for record in log
        if isinstance(record.get(key), int | float) and isinstance(record.get("step"), int)
    ]
    return Line(label, points)


def panel(
    title: str,
    lines: Sequence[Line],
    y_label: str,
    from_zero: bool = False,
    band: Band | None = None,
) -> str:
    """Return curves under a title, with the last value of each."""
    legend = "".join(
        f'<span><i class="key s{i}"></i>{html.escape(line.label)} {line.points[-1][1]:.4g}</span>'
        for i, line in enumerate(lines)
        if line.points
    )
    if band:
        legend += f'<span><i class="key in-band"></i>{html.escape(band.label)}</span>'
    plot = line_plot(
        lines, "optimiser step", ", ".join(filter(None, (title, y_label))), from_zero, band
    )
    return (
        f"<figure><figcaption>{html.escape(title)} <small>{html.escape(y_label)}</small>"
        f"<div>{legend}</div></figcaption>{plot}</figure>"
    )


def evaluation_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return results as a table: a row per metric, a column per checkpoint, random weights first."""
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
