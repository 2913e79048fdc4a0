"""Several protocols on one backbone, each beside the same network at random initialisation."""

import json
import logging
import os
import resource
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dense_ssl.backbones import Backbone, make_backbone
from dense_ssl.config import Config, UserError, apply_override, validate
from dense_ssl.distributed import World, close_world, init_world, rank
from dense_ssl.evaluation import (
    correspondence,
    davis,
    finetune,
    hummingbird,
    knn,
    linear,
    results,
    retrieve,
    segment,
    segment_train,
    semi_supervised,
    svm,
)
from dense_ssl.evaluation.features import FeatureCache, content_key
from dense_ssl.evaluation.results import Result
from dense_ssl.evaluation.segment_protocols import CONFIGS as SEGMENT_CONFIGS
from dense_ssl.weights.fingerprint import weights_sha256
from dense_ssl.weights.pretrained import Loaded, load_backbone

_log = logging.getLogger(__name__)
PICTURES = "eval"  # folder below the run's
_RANDOM_SEED = 0


@dataclass(frozen=True, slots=True)
class Task:
    """What a protocol file offers."""

    config: type[Config]
    load: Callable[[Path, Any], Any]  # data with `protocol`, `content` and `omitted`
    run: Callable[[Backbone, Any, Any, FeatureCache | None], dict[str, float]]
    # Called after `run` with the same arguments; what both need is in the cache.
    pictures: Callable[[Backbone, Any, Any, FeatureCache | None], dict[str, Image.Image]] | None = (
        None  # by name: RUN/eval/TASK-NAME.png
    )
    needs: tuple[str, ...] = ()  # modules beyond the core's
    ranks: bool = False  # knows what to do under torchrun
    resumes: bool = (
        False  # a long job that keeps its state in the cache, for the untrained network too
    )


TASKS: dict[str, Task] = {
    "knn": Task(knn.Config, knn.load, knn.run, knn.pictures, ranks=True),
    "linear": Task(
        linear.Config, linear.load, linear.run, linear.pictures, ranks=True, resumes=True
    ),
    "finetune": Task(
        finetune.Config, finetune.load, finetune.run, finetune.pictures, ranks=True, resumes=True
    ),
    **dict.fromkeys(
        ("segment", "segment-linear"),  # two names of one protocol
        Task(segment.Config, segment.load, segment.run, segment.pictures),
    ),
    **{
        config.task: Task(
            config,
            segment_train.load,
            segment_train.run,
            segment_train.pictures,
            ranks=True,
            resumes=True,
        )
        for config in SEGMENT_CONFIGS
    },
    "correspondence": Task(
        correspondence.Config, correspondence.load, correspondence.run, correspondence.pictures
    ),
    "davis": Task(davis.Config, davis.load, davis.run, davis.pictures, ranks=True, resumes=True),
    "semi-supervised": Task(
        semi_supervised.Config, semi_supervised.load, semi_supervised.run, needs=("sklearn",)
    ),
    "hummingbird": Task(
        hummingbird.Config, hummingbird.load, hummingbird.run, hummingbird.pictures
    ),
    "retrieve": Task(
        retrieve.Config, retrieve.load, retrieve.run, retrieve.pictures, needs=("sklearn",)
    ),
    "svm": Task(svm.Config, svm.load, svm.run, needs=("sklearn",)),
}


def evaluate(
    tasks: Sequence[str],
    checkpoint: str,
    data: str,
    overrides: Iterable[str] = (),
    *,
    out: Path | None = None,
    random: bool = True,
    device: str = "auto",
) -> list[Result]:
    """Return the results of `tasks` on the backbone that `checkpoint` names.

    `data` is a path for all tasks or `task=path,task=path`. `overrides` are `key=value` for every task
    that has the key, or `task.key=value`. With `out` (a run folder does it by itself) results are
    appended to `out/eval.jsonl`, features kept in `out/features` and pictures drawn into `out/eval`.
    `random` runs the same network at random initialisation beside it, once per settings.

    Under torchrun every rank calls this and gets the results; rank 0 alone writes.

    Raises:
        UserError: an argument is wrong, or the data is not usable.
    """
    paths = data_paths(tasks, data)
    configs = configs_of(tasks, overrides)
    _require_modules(tasks)
    loaded = load_backbone(checkpoint)
    if out is None and Path(checkpoint).is_dir():
        out = Path(checkpoint)
    world = _world(device, tasks)
    try:
        return _evaluate(tasks, loaded, paths, configs, out, random, world.device)
    finally:
        close_world(world)


def _evaluate(
    tasks: Sequence[str],
    loaded: Loaded,
    paths: Mapping[str, Path],
    configs: Mapping[str, Any],
    out: Path | None,
    random: bool,
    where: torch.device,
) -> list[Result]:
    _place(loaded.backbone, where)
    untrained = _untrained(loaded).backbone if random and not _is_random(loaded.name) else None
    if untrained is not None:
        _place(untrained, where)
    collected: list[Result] = []
    for name in tasks:
        task, config, path = TASKS[name], configs[name], paths[name]
        content = task.load(path, config)
        cache = FeatureCache(out / "features", loaded.sha256) if out else None
        started = time.perf_counter()
        values = task.run(loaded.backbone, content, config, cache)
        seconds = time.perf_counter() - started
        memory_gb = _peak_memory_gb(where)
        settings = config.model_dump(mode="json")
        # Before the untrained network meets the same things and names them again.
        left_out = content.omitted.lines()
        for line in left_out if rank() == 0 else ():
            _log.warning("%s: left out of %s: %s", name, path, line)
        if out and task.pictures is not None:
            sheets = task.pictures(loaded.backbone, content, config, cache)
            _draw(out / PICTURES, name, sheets)
        baseline: Mapping[str, float] = {}
        if untrained is not None:
            baseline = _baseline(task, untrained, content, config, out)
        found = results.results_of(
            values,
            baseline,
            task=name,
            protocol=content.protocol,
            checkpoint=loaded.name,
            weights=loaded.sha256,
            data=str(path),
            settings=settings,
            omitted=left_out,
            seconds=round(seconds, 3),
            memory_gb=round(memory_gb, 3),
        )
        if out and rank() == 0:
            results.append_results(out, found)
        collected += found
    return collected


def task_names(text: str) -> list[str]:
    """Return the tasks in `a,b`.

    Raises:
        UserError: there is no such task.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in TASKS:
            raise UserError(f"no task {name!r}; there are: {', '.join(TASKS)}")
    if not names:
        raise UserError(f"name a task, or several with commas: {', '.join(TASKS)}")
    return list(dict.fromkeys(names))


def data_paths(tasks: Sequence[str], data: str) -> dict[str, Path]:
    """Return where each task finds its data, from `PATH` or `task=PATH,task=PATH`.

    Raises:
        UserError: a task has no data, or its folder does not exist.
    """
    named = dict(part.split("=", 1) for part in data.split(",") if part.split("=")[0] in TASKS)
    paths: dict[str, Path] = {}
    for task in tasks:
        text = named.get(task, "") if named else data
        if not text:
            raise UserError(f"{task}: no data given; use --data PATH or --data {task}=PATH,...")
        paths[task] = Path(text)
        if not paths[task].is_dir():
            raise UserError(f"{task}: no such data folder: {text}")
    return paths


def configs_of(tasks: Sequence[str], overrides: Iterable[str]) -> dict[str, Any]:
    """Return the validated settings of each task, after `key=value` and `task.key=value`.

    Raises:
        UserError: no task has the key, or a value is out of range.
    """
    given: dict[str, dict[str, Any]] = {task: {} for task in tasks}
    own: list[tuple[str, str]] = []
    for override in overrides:
        key, equals, _ = override.partition("=")
        task, dot, _ = key.partition(".")
        if equals and dot and task in given:
            own.append((task, override.partition(".")[2]))  # goes before one for all
            continue
        takers = [name for name in tasks if key in TASKS[name].config.model_fields] or list(tasks)
        for name in takers:
            apply_override(given[name], override)
    for task, override in own:
        apply_override(given[task], override)
    return {task: validate(TASKS[task].config, given[task], task) for task in tasks}


def _require_modules(tasks: Sequence[str]) -> None:
    for name in tasks:
        missing = [module for module in TASKS[name].needs if find_spec(module) is None]
        if missing:
            raise UserError(f"{name}: needs {', '.join(missing)}, not installed; run `make setup`")


def _untrained(loaded: Loaded) -> Loaded:
    """The same network at random initialisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RANDOM_SEED)
        backbone = make_backbone(loaded.config).eval()
    weights = weights_sha256(backbone.trunk.state_dict())
    return Loaded(backbone, f"random:{loaded.config.name}", weights, loaded.config)


def _is_random(checkpoint: str) -> bool:
    return checkpoint.startswith("random:")


def _baseline(
    task: Task, untrained: Backbone, content: Any, config: Config, out: Path | None
) -> dict[str, float]:
    """Metrics of the untrained network, from the run's folder if they are there."""
    settings = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    weights = weights_sha256(untrained.trunk.state_dict())
    key = content_key(content.protocol, content.content, settings, weights)
    stored = results.stored_baseline(out, key) if out else None
    if stored is not None:
        return stored
    cache = FeatureCache(out / "features", weights) if out and task.resumes else None
    values = task.run(untrained, content, config, cache)
    if out and rank() == 0:
        record = {"key": key, "protocol": content.protocol, "weights": weights, "values": values}
        results.append(out / results.BASELINES, [record])
    return values


def _draw(folder: Path, task: str, sheets: Mapping[str, Image.Image]) -> None:
    """Write the pictures of a task, each whole or not at all."""
    if rank() != 0:
        return
    for name, sheet in sheets.items():
        path = folder / f"{task}-{name}.png"
        aside = path.with_name(f".{path.name}.writing")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sheet.save(aside, format="PNG")
            aside.replace(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def _peak_memory_gb(device: torch.device) -> float:
    """Peak of the memory allocated on a GPU, or of this process's since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _world(device: str, tasks: Sequence[str]) -> World:
    """This process alone on a device, or its place among torchrun's ranks.

    Raises:
        UserError: there is no such device, or a task cannot share its work.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World(rank=0, size=1, device=_device(device), flags=None)
    alone = [name for name in tasks if not TASKS[name].ranks]
    if alone:
        raise UserError(f"{', '.join(alone)}: runs in one process; start it without torchrun")
    return init_world(device)


def _place(backbone: Backbone, device: torch.device) -> None:
    backbone.to(device)
    backbone.to(memory_format=torch.channels_last)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # torch without CUDA asserts
        raise UserError(f"--device {name}: there is no such device here; try cpu") from None
    return device
