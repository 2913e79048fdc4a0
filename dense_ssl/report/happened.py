"""What happened to a run, as sentences: how it stands, whether it is well, and every incident."""

import fcntl
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dense_ssl.events import EVENTS
from dense_ssl.incidents import FOLDER, RECORDS
from dense_ssl.report.curves import first_not_finite
from dense_ssl.report.page import read_jsonl
from dense_ssl.watch.signs import signs

Records = Sequence[Mapping[str, Any]]
ENDS = ("done", "stopped", "refused")  # after these a process only writes the page
_MOST_ROWS = 50  # of the table of incidents


def standing(run: Path, events: Records, finished: bool) -> tuple[str, str]:
    """Return how a run stands, `running`, `finished`, `stopped`, `failed` or `unknown`, and why.

    Running is what holds the lock of the folder, which dies with its process, and has not noted its end.
    """
    last = events[-1] if events else {}
    kind = last.get("kind")
    if kind not in ENDS and _locked(run / ".lock"):
        return "running", "a process holds the run's folder"
    if finished:
        return "finished", ""
    if kind in ("stopped", "done"):
        return "stopped", f"at step {last.get('step')}, everything saved; the same command resumes"
    if kind == "refused":
        return "failed", str(last.get("reason", ""))
    if kind:
        return "failed", "its process was killed or crashed; the same command resumes"
    return "unknown", "no record of how it ended"


def warnings_of(log: Records, looks: Records) -> list[str]:
    """Return what a person should know at once, in sentences; [] where all is well."""
    found = []
    step = first_not_finite(log)
    if step is not None:
        found.append(f"The loss is not finite from step {step} on: training diverged.")
    if looks:
        last = looks[-1]
        found += [f"{_sentence(text)} (step {last.get('step')})." for text in signs(last).values()]
    refused = max((r.get("refused", 0) for r in log), default=0)
    if refused:
        found.append(f"{refused} steps were refused because their gradient was not finite.")
    recent = [r["data_wait"] for r in log[-20:] if isinstance(r.get("data_wait"), int | float)]
    if recent and sum(recent) / len(recent) > 0.2:  # a fifth of the time paid for is not used
        found.append(
            f"{100 * sum(recent) / len(recent):.0f} % of the time the network waits for data: "
            "data.workers, data.cut=device or smaller shards help; make doctor says which."
        )
    return found


def incidents_table(run: Path, events: Records, log: Records) -> str:
    """Return restarts, refused steps, replaced records, halved micro-batches and failures, as a table."""
    rows: list[tuple[str, str, str]] = []
    running = False
    for event in events:
        when, kind = str(event.get("time", "")), event.get("kind")
        if kind == "started":
            if running:
                rows.append((when, "killed", "the process before this one ended without a word"))
            if event.get("step"):
                rows.append((when, "resumed", f"at step {event['step']}, {_ranks(event)}"))
            running = True
        elif kind == "halved":
            rows.append((when, "memory ran short", f"{event.get('micro_batches')} micro-batches of "
                         f"{event.get('images')} images make up a step from here on"))  # fmt: skip
        else:
            running = False
            if kind == "stopped":
                rows.append((when, "stopped", f"at step {event.get('step')}, everything saved"))
            elif kind != "done":
                rows.append((when, str(kind), str(event.get("reason", ""))))
    for record in read_jsonl(run / FOLDER / RECORDS):
        what = f"step {record.get('step')}: {record.get('kind')}"
        if record.get("bundle"):
            what += f"; python -m dense_ssl.replay {run}/{FOLDER}/{record['bundle']} repeats it"
        rows.append((str(record.get("time", "")), "step refused", what))
    rows.sort()
    replaced = max((r.get("replaced", 0) for r in log), default=0)
    if replaced:
        rows.append(("", "records replaced", f"{replaced} damaged records were shown as a neighbour: "
                     "make verify names them"))  # fmt: skip
    if not rows:
        return '<p class="soft">None: no restart, no refused step, no replaced record.</p>'
    left = f'<p class="soft">{len(rows) - _MOST_ROWS} earlier ones are left out.</p>'
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows[-_MOST_ROWS:]
    )
    return (
        f"{left if len(rows) > _MOST_ROWS else ''}"
        '<div class="scroll"><table><thead><tr><th>when</th><th>what</th><th>details</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def events_of(run: Path) -> list[dict[str, Any]]:
    """Return the events of a run."""
    return read_jsonl(run / EVENTS)


def _ranks(event: Mapping[str, Any]) -> str:
    ranks = event.get("ranks", 1)
    return "one rank" if ranks == 1 else f"{ranks} ranks"


def _locked(path: Path) -> bool:
    try:
        with path.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
