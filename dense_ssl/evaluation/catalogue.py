"""The tasks of the suite by name, and the words of a command checked against them, without torch.

A task's protocol is imported when it is asked for: all together bring timm, torchvision and scikit-learn,
which takes seconds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from dense_ssl.config import Config, UserError, apply_override, validate


@dataclass(frozen=True, slots=True)
class Task:
    """Where a protocol is, and what is to be known before it is imported."""

    module: str  # in dense_ssl.evaluation; has load, run and, where there are any, pictures
    config: str = ""  # MODULE.CLASS of its settings; `Config` of its own module when empty
    needs: tuple[str, ...] = ()  # modules beyond the core's
    ranks: bool = False  # knows what to do under torchrun
    # A long job that keeps its state in the cache, for the untrained network too.
    resumes: bool = False
    # A module without torch that answers from what is kept beside the features: VOTING, the settings that
    # change none of it, `scored` and `drawn`. Then `config` is read without torch too.
    again: str = ""


def _trained_segmentation(config: str) -> Task:
    return Task("segmentation.train", f"segmentation.protocols.{config}", ranks=True, resumes=True)


TASKS: dict[str, Task] = {
    "knn": Task(
        "classification.knn",
        "classification.knn_settings.Config",
        ranks=True,
        again="classification.knn_again",
    ),
    "object-knn": Task("classification.object_knn", ranks=True),
    "linear": Task("classification.linear", ranks=True, resumes=True),
    "finetune": Task("classification.finetune", ranks=True, resumes=True),
    "segment": Task("segmentation.probe"),
    "segment-linear": Task("segmentation.probe"),  # its other name
    "segment-fcn": _trained_segmentation("FcnConfig"),
    "segment-upernet": _trained_segmentation("UperNetConfig"),
    "segment-fpn": _trained_segmentation("FpnConfig"),
    "segment-frozen": _trained_segmentation("FrozenConfig"),
    "segment-finetune": _trained_segmentation("FinetuneConfig"),
    "detect": Task("detection.train", "detection.protocols.DetectConfig", ranks=True, resumes=True),
    "attention": Task("matching.attention", ranks=True),
    "correspondence": Task("matching.correspondence"),
    "davis": Task("matching.davis", ranks=True, resumes=True),
    "semi-supervised": Task("classification.semi_supervised", needs=("sklearn",)),
    "hummingbird": Task("matching.hummingbird"),
    "retrieve": Task("matching.retrieve", needs=("sklearn",)),
    "landmarks": Task("retrieval.landmarks", ranks=True),
    "copydays": Task("retrieval.copydays", ranks=True),
    "cluster": Task("classification.cluster", needs=("sklearn",), ranks=True),
    "svm": Task("classification.svm", needs=("sklearn",)),
}


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
        UserError: a task has no data, its folder does not exist, or data is for a task that there is not.
    """
    parts = [part.partition("=") for part in data.split(",")]
    named = {name: text for name, equals, text in parts if equals and name in TASKS}
    strange = [name for name, equals, _ in parts if equals and name not in TASKS]
    if named and strange:
        raise UserError(f"--data {data}: no task {strange[0]!r}; there are: {', '.join(TASKS)}")
    paths: dict[str, Path] = {}
    for task in tasks:
        text = named.get(task, "") if named else data
        if not text:
            raise UserError(f"{task}: no data given; use --data PATH or --data {task}=PATH,...")
        paths[task] = Path(text)
        if not paths[task].is_dir():
            raise UserError(f"{task}: no such data folder: {text}")
    return paths


def config_of(task: str) -> type[Config]:
    """Return the class of a task's settings."""
    named = TASKS[task].config or f"{TASKS[task].module}.Config"
    module, _, name = named.rpartition(".")
    return getattr(import_module(f"dense_ssl.evaluation.{module}"), name)


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
        takers = [name for name in tasks if key in config_of(name).model_fields] or list(tasks)
        for name in takers:
            apply_override(given[name], override)
    for task, override in own:
        apply_override(given[task], override)
    return {task: validate(config_of(task), given[task], task) for task in tasks}
