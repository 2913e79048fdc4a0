"""The model card that Hugging Face shows: what the network is, how it was trained, measured and checked."""

import json
from collections.abc import Mapping
from typing import Any

from dense_ssl.evaluation.results import RESULTS
from dense_ssl.export.source import MEAN, STD, Source

IMAGENET_PROCESSING = {
    "mean": MEAN,
    "std": STD,
    "interpolation": "bicubic",
    "crop_mode": "center",
}


def model_card(source: Source, library: str, usage: str, outputs: str) -> str:
    """Return the README.md of a folder for the hub. `usage` is Python, `outputs` says what it gives."""
    method = source.method or "a self-supervised method"
    lines = [
        "---",
        f"library_name: {library}",
        "pipeline_tag: image-feature-extraction",
        f"tags: [self-supervised, dense-features{f', {source.method}' if source.method else ''}]",
        "---",
        f"# {source.arch}, trained with {method}",
        "",
        *_training(source),
        "",
        "```python",
        usage.strip(),
        "```",
        "",
        outputs,
        "",
        f"Images are RGB in 0..1, normalised by mean {MEAN} and deviation {STD}. The weights' hash is "
        f"`{source.loaded.sha256[:16]}`.",
        "",
        *_measured(source),
        "No licence is named here: add `license:` above once you have chosen one.",
        "",
    ]
    return "\n".join(lines)


def _training(source: Source) -> list[str]:
    if source.method is None:
        return ["Where the weights come from is not known: the source was no run of this project."]
    config: Mapping[str, Any] = source.checkpoint["config"]
    facts = [
        f"The {source.part} network after {source.checkpoint['step']} steps "
        f"({source.checkpoint['epoch']:.4g} epochs)"
    ]
    images = source.checkpoint.get("data", {}).get("images")
    if images:
        facts.append(f"of {images} images")
    batch = config.get("train", {}).get("batch_size")
    if batch:
        facts.append(f"in batches of {batch}")
    return [" ".join(facts) + ". No labels were used."]


def _measured(source: Source) -> list[str]:
    """Return the results of these weights that the run's folder holds, as a table."""
    path = source.run / RESULTS if source.run else None
    if path is None or not path.is_file():
        return []
    rows: dict[tuple[str, str], str] = {}
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
            if record["weights"] != source.loaded.sha256:
                continue
            untrained = record["random_init"]
            beside = "" if untrained is None else f"{untrained:.1f}"
            key = (str(record["protocol"]), str(record["metric"]))
            rows[key] = f"| {key[0]} | {key[1]} | {record['value']:.1f} | {beside} |"
        except (ValueError, KeyError, TypeError):  # broken off, or not ours
            continue
    if not rows:
        return []
    head = ["| protocol | metric | % | same network, untrained |", "|---|---|---|---|"]
    return [*head, *rows.values(), ""]
