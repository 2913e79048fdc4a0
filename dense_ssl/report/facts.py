"""What a run was, in words: read from its folder for the first table of the report."""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dense_ssl.config import UserError
from dense_ssl.events import machine
from dense_ssl.log import duration
from dense_ssl.report.page import is_number
from dense_ssl.weights.fingerprint import weights_sha256
from dense_ssl.weights.pretrained import read_checkpoint


def run_facts(
    run: Path,
    config: Mapping[str, Any],
    log: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
) -> dict[str, str]:
    """Return what is to be said of a run, by title."""
    machines = dict.fromkeys(str(e["machine"]) for e in events if e.get("machine"))
    return {
        "Run": str(run),
        "Method": f"{setting(config, 'method', 'name')}, backbone "
        f"{setting(config, 'method', 'backbone', 'name')}",
        "Views": _views(config),
        "Data": f"{setting(config, 'data', 'path')}, loader {setting(config, 'data', 'loader')}",
        "Optimiser": _optimiser(config),
        "Progress": _progress(config, log),
        "Weights": _weights(run),
        "Trained on": "; then ".join(machines) or "not recorded",
        "Page written": f"{time.strftime('%Y-%m-%d %H:%M')} on {machine()}",
    }


def glance(
    config: Mapping[str, Any],
    log: Sequence[Mapping[str, Any]],
    looks: Sequence[Mapping[str, Any]],
    state: str,
) -> dict[str, str]:
    """Return the few figures that say whether a run is well, by what they are."""
    found: dict[str, str] = {}
    if log:
        last = log[-1]
        if isinstance(last.get("loss"), int | float):
            found["loss"] = f"{last['loss']:.4g}"
        if last.get("epoch"):
            found["epochs"] = f"{last['epoch']:.2f}"
        speeds = [r["images_per_s"] for r in log if r.get("images_per_s")]
        if speeds:
            found["images/s, median"] = f"{statistics.median(speeds):,.0f}"
        found["of training"] = duration(seconds_trained(config, log))
        if state == "running" and isinstance(last.get("eta_s"), int | float):
            found["left"] = duration(last["eta_s"])
    if looks:
        last = looks[-1]
        for key, name, form in _GLANCED:
            if isinstance(last.get(key), int | float):
                found[name] = form.format(last[key])
    return found


_GLANCED = (
    ("match_one_cell", "matches within a cell", "{:.0f} %"),
    ("knn", "k-NN", "{:.1f} %"),
    ("rankme", "effective rank", "{:.3g}"),
)


def progress(config: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Return the last step logged and how many are planned; 0, 0 before the first line."""
    steps = [(p["step"], p["epoch"]) for p in log if p.get("epoch") and "step" in p]
    if not steps:
        return 0, 0
    step, epoch = steps[-1]
    planned = round((number(config, "train", "epochs") or epoch) * step / epoch)
    return step, min(planned, round(number(config, "train", "steps")) or planned)


def setting(config: Mapping[str, Any], *keys: str) -> Any:
    """Return a nested setting, or an empty text where there is none."""
    node: Any = config
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return "" if node is None else node


def number(config: Mapping[str, Any], *keys: str) -> float:
    """Return a nested setting that is a positive number, 0 where there is none."""
    found = setting(config, *keys)
    return found if is_number(found) and 0 < found < math.inf else 0.0


def _views(config: Mapping[str, Any]) -> str:
    views = setting(config, "method", "views")
    described = []
    for view in views if isinstance(views, list) else ():
        if isinstance(view, dict):
            shares = view.get("scale")
            shares = [s for s in shares if is_number(s)] if isinstance(shares, list) else []
            share = " to ".join(f"{100 * s:g}" for s in shares) or "?"
            described.append(
                f"{view.get('name')}: {view.get('count')} x {view.get('size')} px of {share} % of the area"
            )
    return "; ".join(described)


def _optimiser(config: Mapping[str, Any]) -> str:
    lr = setting(config, "optim", "lr")
    if isinstance(lr, dict):
        lr = f"{lr.get('start')} ({lr.get('shape')})"
    return (
        f"{setting(config, 'optim', 'name')}, lr {lr}, batch {setting(config, 'train', 'batch_size')}, "
        f"{setting(config, 'train', 'precision')}, seed {setting(config, 'train', 'seed')}"
    )


def _progress(config: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> str:
    step, planned = progress(config, log)
    if not planned:
        return "no step logged yet"
    epoch = next(p["epoch"] for p in reversed(log) if p.get("epoch"))
    state = "finished" if step >= planned else "not finished"
    spent = duration(seconds_trained(config, log))
    return f"{step:,} of {planned:,} steps, {epoch:.2f} epochs, {state}; {spent} of training"


def seconds_trained(config: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> float:
    """Return the training time that the logged speeds add up to."""
    seconds, before = 0.0, 0
    for record in log:
        if record.get("images_per_s"):
            images = (record["step"] - before) * number(config, "train", "batch_size")
            seconds += images / record["images_per_s"]
        before = record.get("step", before)
    return seconds


def _weights(run: Path) -> str:
    path = run / "checkpoints" / "last.pt"
    if not path.is_file():
        return "no checkpoint yet"
    try:
        checkpoint = read_checkpoint(path)
        digest = weights_sha256(checkpoint["method"])
    except (UserError, KeyError, TypeError, AttributeError):
        return "the last checkpoint cannot be read"
    return f"sha256 {digest} at step {checkpoint.get('step')}"
