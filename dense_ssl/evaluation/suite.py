"""Several protocols on one backbone, each beside the same network at random initialisation."""

import json
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, cast

import torch

from dense_ssl.backbones import Backbone, Projection, make_backbone
from dense_ssl.config import Config, UserError
from dense_ssl.distributed import World, close_world, init_world, rank
from dense_ssl.evaluation import results
from dense_ssl.evaluation.catalogue import TASKS, config_of, configs_of, data_paths
from dense_ssl.evaluation.drawn import draw
from dense_ssl.evaluation.features import FeatureCache, content_key
from dense_ssl.evaluation.kept import Question, measuring_program, remember
from dense_ssl.evaluation.protocol_settings import marked
from dense_ssl.evaluation.results import Result
from dense_ssl.weights.fingerprint import weights_sha256
from dense_ssl.weights.pretrained import Loaded, load_backbone

_log = logging.getLogger(__name__)
__all__ = ["config_of", "configs_of", "evaluate", "network_key", "protocol_of"]
_RANDOM_SEED = 0
_BASELINE_BYTES = (
    1 << 30
)  # features of an untrained network beyond this are computed again instead of kept


class Data(Protocol):
    """What `load` of a protocol opens."""

    protocol: str  # name and version
    content: str  # hash of what is there
    omitted: Any  # Omissions


class Evaluation(Protocol):
    """What a protocol's file offers.

    One may also have `pictures`, called after `run` with the same arguments (what both need is in the
    cache): by name, those of RUN/eval/TASK-NAME.png.
    """

    def load(self, path: Path, config: Any) -> Data:
        """Open the data."""
        ...

    def run(
        self, backbone: Backbone, data: Any, config: Any, cache: FeatureCache | None
    ) -> dict[str, float]:
        """Return metrics in percent."""
        ...


def protocol_of(task: str) -> Evaluation:
    """Return the module of a task's protocol."""
    return cast(Evaluation, import_module(f"dense_ssl.evaluation.{TASKS[task].module}"))


def evaluate(
    tasks: Sequence[str],
    checkpoint: str,
    data: str,
    overrides: Iterable[str] = (),
    *,
    out: Path | None = None,
    random: bool = True,
    device: str = "auto",
    questions: Mapping[str, Question] = MappingProxyType({}),
) -> list[Result]:
    """Return the results of `tasks` on the backbone that `checkpoint` names.

    `data` is a path for all tasks or `task=path,task=path`. `overrides` are `key=value` for every task
    that has the key, or `task.key=value`. With `out` (a run folder does it by itself) results are
    appended to `out/eval.jsonl`, features kept in `out/features` and pictures drawn into `out/eval`.
    `random` runs the same network at random initialisation beside it, once per settings. `questions` are
    kept beside the results of their tasks (kept.py).

    Under torchrun every rank calls this and gets the results; rank 0 alone writes.

    Raises:
        UserError: an argument is wrong, the data is not usable, or a GPU's memory too small.
    """
    paths = data_paths(tasks, data)
    configs = configs_of(tasks, overrides)
    _require_modules(tasks)
    loaded = load_backbone(checkpoint)
    if out is None and (Path(checkpoint) / "checkpoints").is_dir():
        out = Path(checkpoint)
    world = _world(device, tasks)
    try:
        return _evaluate(tasks, loaded, paths, configs, out, random, world.device, questions)
    except torch.OutOfMemoryError as error:
        first = (str(error).splitlines() or [""])[0].split(". ")[0]
        raise UserError(f"{first}: take a smaller batch_size or size") from None
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
    questions: Mapping[str, Question],
) -> list[Result]:
    _place(loaded.backbone, where)
    untrained = _untrained(loaded) if random and not _is_random(loaded.name) else None
    if untrained is not None:
        _place(untrained.backbone, where)
    collected: list[Result] = []
    # All data before the first hour of work: a mistake in the last task's is said at once.
    contents = {name: protocol_of(name).load(paths[name], configs[name]) for name in tasks}
    for name, content in contents.items():
        protocol, config, path = protocol_of(name), configs[name], paths[name]
        _say("%s: %s on %s", name, loaded.name, path)
        cache = _cache(out, loaded)
        started = time.perf_counter()
        values = protocol.run(loaded.backbone, content, config, cache)
        seconds = time.perf_counter() - started
        memory_gb = _peak_memory_gb(where)
        settings = config.model_dump(mode="json")
        # Before the untrained network meets the same things and names them again.
        left_out = content.omitted.lines()
        for line in left_out if rank() == 0 else ():
            _log.warning("%s: left out of %s: %s", name, path, line)
        pictures = getattr(protocol, "pictures", None)
        if out and pictures is not None:
            sheets = pictures(loaded.backbone, content, config, cache)
            if rank() == 0:
                draw(out, name, sheets)
        baseline: Mapping[str, float] = {}
        if untrained is not None:
            baseline = _baseline(name, untrained, content, config, out)
        found = results.results_of(
            values,
            baseline,
            task=name,
            protocol=marked(content.protocol, name, config),
            checkpoint=loaded.name,
            weights=loaded.sha256,
            data=str(path),
            settings=settings,
            omitted=left_out,
            seconds=round(seconds, 3),
            memory_gb=round(memory_gb, 3),
        )
        question = questions.get(name, Question())
        if out and rank() == 0:
            results.append_results(out, found, question.whole)
            if TASKS[name].again and question.features and not left_out:
                _remember(out, question, protocol, content, config, (loaded, untrained))
        collected += found
    return collected


def _say(text: str, *words: object) -> None:
    if rank() == 0:
        _log.info(text, *words)


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
        known = loaded.backbone.projection
        if known is not None:  # for those that train from there on
            fresh = torch.nn.init.trunc_normal_(torch.empty_like(known.weight), std=0.02)
            backbone.projection = Projection(fresh, torch.zeros_like(known.bias), known.activation)
        if loaded.backbone.class_head is not None:
            backbone.class_head = loaded.backbone.class_head.fresh()
    weights = weights_sha256(backbone.trunk.state_dict())
    return Loaded(backbone, f"random:{loaded.config.name}", weights, loaded.config)


def network_key(loaded: Loaded) -> str:
    """Return what tells a network's features from others': equal weights may be read in different ways.

    The heads of its checkpoint, which some tasks read, are part of it.
    """
    known = loaded.backbone.projection, loaded.backbone.class_head
    heads: dict[str, torch.Tensor] = known[1].tensors() if known[1] else {}
    if known[0]:
        heads |= {"projection.weight": known[0].weight, "projection.bias": known[0].bias}
    return content_key(loaded.sha256, loaded.config.model_dump_json(), weights_sha256(heads))


def _cache(out: Path | None, loaded: Loaded, most_bytes: int | None = None) -> FeatureCache | None:
    """Where a network's features and jobs are kept: with the program that made them."""
    if out is None:
        return None
    return FeatureCache(
        out / "features", content_key(network_key(loaded), measuring_program()), most_bytes
    )


def _remember(
    out: Path,
    question: Question,
    protocol: Any,
    content: Any,
    config: Any,
    networks: tuple[Loaded, Loaded | None],
) -> None:
    """Note which files of neighbours belong to a question, for a second one without torch."""
    files = [
        protocol.neighbours_file(content, config, _cache(out, network)).name if network else ""
        for network in networks
    ]
    about = {
        "protocol": content.protocol,
        "classes": content.classes,
        "weights": networks[0].sha256,
    }
    remember(out, question.features, about | {"files": files})


def _is_random(checkpoint: str) -> bool:
    return checkpoint.startswith("random:")


def _baseline(
    task: str, untrained: Loaded, content: Data, config: Config, out: Path | None
) -> dict[str, float]:
    """Metrics of the untrained network, from the run's folder if they are there."""
    settings = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    weights = untrained.sha256
    network = network_key(untrained)
    key = content_key(content.protocol, content.content, settings, network, measuring_program())
    stored = results.stored_baseline(out, key) if out else None
    if stored is not None:
        return stored
    _say("%s: the same network, untrained", task)
    cache = _cache(out, untrained, None if TASKS[task].resumes else _BASELINE_BYTES)
    values = protocol_of(task).run(untrained.backbone, content, config, cache)
    if out and rank() == 0:
        record = {"key": key, "protocol": content.protocol, "weights": weights, "values": values}
        results.append(out / results.BASELINES, [record])
    return values


def _peak_memory_gb(device: torch.device) -> float:
    """Peak of the memory allocated on a GPU, or of this process's since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return results.peak_memory_gb()


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
