"""What a run was, in words: read from its folder for the first table of the report."""

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dense_ssl.config import UserError
from dense_ssl.log import duration
from dense_ssl.weights.fingerprint import weights_sha256
from dense_ssl.weights.pretrained import read_checkpoint


def run_facts(
    run: Path, config: Mapping[str, Any], log: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """Return what is to be said of a run, by title."""
    return {
        "Run": str(run),
        "Method": f"{setting(config, 'method', 'name')}, backbone "
        f"{setting(config, 'method', 'backbone', 'name')}",
        "Views": _views(config),
        "Data": f"{setting(config, 'data', 'path')}, loader {setting(config, 'data', 'loader')}",
        "Optimiser": _optimiser(config),
        "Progress": _progress(config, log),
        "Weights": _weights(run),
        "Page written on": _machine(),
    }


def setting(config: Mapping[str, Any], *keys: str) -> Any:
    """Return a nested setting, or an empty text where there is none."""
    node: Any = config
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return "" if node is None else node


def _views(config: Mapping[str, Any]) -> str:
    views = setting(config, "method", "views")
    described = [
        f"{view.get('name')}: {view.get('count')} x {view.get('size')} px of "
        f"{' to '.join(f'{100 * share:g}' for share in view.get('scale', ()))} % of the area"
        for view in views
        if isinstance(view, dict)
    ]
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
    steps = [(p["step"], p["epoch"]) for p in log if p.get("epoch") and "step" in p]
    if not steps:
        return "no step logged yet"
    step, epoch = steps[-1]
    planned = round(float(setting(config, "train", "epochs") or epoch) * step / epoch)
    planned = min(planned, setting(config, "train", "steps") or planned)
    state = "finished" if step >= planned else "not finished"
    return (
        f"{step:,} of {planned:,} steps, {epoch:.2f} epochs, {state}; {_time_trained(config, log)}"
    )


def _time_trained(config: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> str:
    """Return the training time that the logged speeds add up to."""
    seconds, before = 0.0, 0
    for record in log:
        if record.get("images_per_s"):
            images = (record["step"] - before) * float(setting(config, "train", "batch_size") or 0)
            seconds += images / record["images_per_s"]
        before = record.get("step", before)
    return f"{duration(seconds)} of training"


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


def _machine() -> str:
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return (
        f"{processor}, {os.cpu_count()} cores, {', '.join(gpus) or 'no CUDA GPU'}; "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
