"""The ground on which faults strike: small data, a small run, and what comes of them undisturbed."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataprep.synthetic import write_class_folders, write_random_images
from dense_ssl.chaos.faults import CONVERSION, EVALUATION, MIDDLE
from dense_ssl.chaos.injection import BATCH, SAVE_EVERY, STEPS_PER_EPOCH
from dense_ssl.chaos.nursery import Nursery
from dense_ssl.chaos.verdicts import Outcome, succeeded

STEPS = 3 * STEPS_PER_EPOCH
IMAGES = STEPS_PER_EPOCH * BATCH + 4  # four are left out of every epoch
CONVERTED = 150  # three parts of a conversion
RECIPE = f"""
method:
  name: moco
  views: [{{name: global, count: 2, size: 32, photometric: moco_v2}}]
  backbone: {{name: test_resnet, init: fan_in}}
  hidden_dim: 16
  out_dim: 8
  queue_length: 16
data: {{path: "", workers: 1, max_replaced: 0.05}}
optim: {{lr: 0.05}}
train: {{epochs: {STEPS // STEPS_PER_EPOCH}, batch_size: {BATCH}, precision: fp32}}
run: {{dir: "", device: cpu, checkpoint_every_steps: {SAVE_EVERY}, log_every_steps: 1, log: []}}
"""
# What a log says of the machine, or counts from the start of the process, is no part of a result.
NO_RESULT = ("images_per_s", "data_wait", "eta_s", "replaced", "refused")
NOT_OF_AN_EVALUATION = ("time", "seconds", "memory_gb", "checkpoint", "data", "question")


@dataclass
class Ground:
    """Data, recipe, and results of undisturbed runs, each made when it is first needed."""

    folder: Path
    nursery: Nursery

    def __post_init__(self) -> None:
        self.recipe = self.folder / "recipe.yaml"
        self.images, self.shards = self.folder / "images", self.folder / "shards"
        self.many, self.classes = self.folder / "many", self.folder / "classes"
        self._undisturbed: dict[str, Any] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        self.recipe.write_text(RECIPE)
        write_random_images(self.images, IMAGES, sizes=((40, 48), (48, 40)))
        write_random_images(self.many, CONVERTED, seed=1, sizes=((32, 40),))
        for split, seed in (("train", 0), ("val", 1)):
            write_class_folders(self.classes / split, 3, 8, seed, (40, 48))
        arguments = self.conversion(self.shards, self.images)
        succeeded(self.run("none", CONVERSION, arguments, "shards"), "the conversion of the data")
        self.nursery.warm(self.shards)

    # --- commands ----------------------------------------------------------------------------------

    def run(self, fault: str, place: str, arguments: list[str], name: str) -> Outcome:
        """Run a command under a fault; its output is kept under `name`."""
        return self.nursery.run(fault, place, arguments, self.folder / "output" / name)

    def training(self, run: Path, loader: str, *more: str) -> list[str]:
        """Return the arguments of a training."""
        workers = "data.workers=0" if loader == "folder" else "data.workers=1"
        data = (f"data.path={self.shards}", f"data.loader={loader}", workers)
        return [str(self.recipe), f"run.dir={run}", *data, *more]

    def conversion(self, out: Path, source: Path | None = None) -> list[str]:
        """Return the arguments of a conversion."""
        where = ["--src", str(source or self.many), "--out", str(out)]
        return ["folder", *where, "--size", "48", "--workers", "1"]

    def evaluation(self, run: Path, out: Path) -> list[str]:
        """Return the arguments of an evaluation of a run."""
        where = ["--checkpoint", str(run), "--data", str(self.classes), "--out", str(out)]
        small = ["size=32", "k=3", "batch_size=8"]
        return ["knn", *where, *small, "--no-random", "--device", "cpu"]

    # --- undisturbed -------------------------------------------------------------------------------

    def trained(self, loader: str, ranks: int = 1) -> Mapping[str, Any]:
        """Return the result of the undisturbed training by a loader."""
        name = f"{loader}-{ranks}"
        if name not in self._undisturbed:
            run = self.run_of(loader, ranks)
            arguments = self.training(run, loader, *with_ranks(ranks))
            done = self.run("none", MIDDLE, arguments, f"undisturbed-{name}")
            succeeded(done, "the undisturbed training")
            self._undisturbed[name] = training_result(done, run)
        return self._undisturbed[name]

    def run_of(self, loader: str, ranks: int = 1) -> Path:
        """Return the folder of the undisturbed training by a loader."""
        return self.folder / "undisturbed" / f"{loader}-{ranks}"

    def converted(self) -> Mapping[str, Any]:
        """Return the result of the undisturbed conversion."""
        if CONVERSION not in self._undisturbed:
            out = self.folder / "undisturbed" / CONVERSION
            done = self.run("none", CONVERSION, self.conversion(out), "undisturbed-conversion")
            succeeded(done, "the undisturbed conversion")
            self._undisturbed[CONVERSION] = conversion_result(out)
        return self._undisturbed[CONVERSION]

    def evaluated(self, run: Path, name: str = EVALUATION) -> Mapping[str, Any]:
        """Return the result of the undisturbed evaluation of a run."""
        if name not in self._undisturbed:
            out = self.folder / "undisturbed" / name
            done = self.run("none", EVALUATION, self.evaluation(run, out), f"undisturbed-{name}")
            succeeded(done, "the undisturbed evaluation")
            self._undisturbed[name] = evaluation_result(out)
        return self._undisturbed[name]


def with_ranks(ranks: int) -> list[str]:
    """Return the arguments that ask for several ranks."""
    return ["--gpus", str(ranks)] if ranks > 1 else []


def training_result(outcome: Outcome, run: Path) -> dict[str, Any]:
    """Return the log and the hash of the weights of a training that has ended."""
    return {"weights": last_line(outcome.out), "log": log_of(run)}


def log_of(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log, without what it says of the machine."""
    try:
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return []
    return [{k: v for k, v in line.items() if k not in NO_RESULT} for line in lines]


def conversion_result(out: Path) -> dict[str, Any]:
    """Return the hash of every file of a shard set."""
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def evaluation_result(out: Path) -> dict[str, Any]:
    """Return the newest record of every metric, without its circumstances."""
    try:
        lines = (out / "eval.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return {}
    return {
        record["metric"]: {k: v for k, v in record.items() if k not in NOT_OF_AN_EVALUATION}
        for record in records
    }


def last_line(text: str) -> str:
    """Return the last line of a text, "" of none."""
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""
