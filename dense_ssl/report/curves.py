"""The curves of a run as panels: losses, schedules, what was watched, speed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dense_ssl.report.page import panel, series
from dense_ssl.report.svg_plot import Line
from dense_ssl.run_config import RunConfig
from dense_ssl.schedule import Ramp, Schedule, Step

Records = Sequence[Mapping[str, Any]]

# Title, unit of the y axis, and what is drawn: keys of `watch.jsonl` with their labels.
WATCHED = (
    ("Matches between two crops", "% of cells", {
        "match_one_cell": "within one cell", "match_same_cell": "same cell",
        "match_chance": "within one, by place alone"}),
    ("Classes of labelled images", "top-1, %", {
        "knn": "k-NN", "linear": "linear probe", "class_chance": "chance"}),
    ("Effective rank of images (RankMe)", "dimensions", {
        "rankme": "pooled features", "most_rank": "most possible"}),
    ("Effective rank of cells", "dimensions", {"rankme_cells": "dense features"}),
    ("Spread of unit features (0: one point)", "deviation x sqrt(d)", {
        "spread": "images", "spread_cells": "cells"}),
    ("Uniformity and alignment (lower is better)", "log, squared distance", {
        "uniformity": "uniformity", "alignment": "alignment"}),
    ("Prototypes of class tokens", "prototypes", {
        "prototypes_used": "used over all images", "prototypes_each": "an image hesitates between"}),
    ("Prototypes of patches", "prototypes", {
        "patch_prototypes_used": "used over all patches",
        "patch_prototypes_each": "a patch hesitates between"}),
    ("Keys in the queues", "mean cosine", {
        "queue_similarity": "queue", "dense_queue_similarity": "dense queue",
        "backbone_queue_similarity": "backbone queue"}),
)  # fmt: skip
CONSTANT = ("match_chance", "class_chance", "most_rank")  # the same in every look at a run


def training_panels(log: Records) -> list[str]:
    """Return losses and learning rate over the steps."""
    parts = sorted({key for record in log for key in record if key.startswith("loss_")})
    losses = [series(log, "loss", "loss")]
    losses += [series(log, part, part.removeprefix("loss_")) for part in parts[:4]]
    return [
        panel("Loss", losses, "nats"),
        panel("Learning rate", [series(log, "lr", "lr")], ""),
    ]


def schedule_panels(config: Mapping[str, Any], log: Records) -> list[str]:
    """Return every other schedule that moves: weight decay, the teacher's momentum, temperatures."""
    try:
        known = RunConfig.model_validate(config)
    except ValueError:  # of another version, or no configuration at all
        return []
    at = next((r for r in reversed(log) if r.get("epoch") and r.get("step")), None)
    if at is None:
        return []
    per_epoch = max(round(at["step"] / at["epoch"]), 1)
    total = int(known.train.epochs * per_epoch)
    steps = sorted({round(i * (total - 1) / 100) for i in range(101)})
    panels = []
    for owner in (known.optim, known.method):
        for name in type(owner).model_fields:
            schedule = getattr(owner, name)
            if name == "lr" or not isinstance(schedule, Schedule | Ramp):
                continue
            seed, epochs = known.train.seed, known.train.epochs
            values = [(float(s), schedule.at(Step(s, per_epoch, epochs, seed))) for s in steps]
            if len({value for _, value in values}) > 1:
                title = name.replace("_", " ").capitalize()
                panels.append(panel(title, [Line("planned", values)], ""))
    return panels


def watched_panels(looks: Records) -> list[str]:
    """Return what was seen of the features while training."""
    panels = []
    for title, unit, keys in WATCHED:
        lines = [
            series(looks, key, label)
            for key, label in keys.items()
            if any(key in record for record in looks)
        ]
        if lines:
            panels.append(panel(title, lines, unit))
    return panels


def speed_panels(log: Records) -> list[str]:
    """Return throughput, waiting and memory over the steps."""
    panels = [
        panel("Throughput", [series(log, "images_per_s", "images/s")], "images/s", True),
        panel(
            "Waiting for data", [series(log, "data_wait", "data wait", 100)], "% of step time", True
        ),
    ]
    if any("memory_gb" in record for record in log):
        memory = [series(log, "memory_gb", "peak memory")]
        panels.append(panel("GPU memory", memory, "GB", True))
    return panels


def first_not_finite(log: Records) -> int | None:
    """Return the first step whose logged loss is no number, where there is one."""
    for record in log:
        loss = record.get("loss")
        if isinstance(loss, float) and not math.isfinite(loss):
            return record.get("step")
    return None
