"""Which settings are a protocol's own, so that results of others are marked: `knn/v1*`.

The trained protocols of segmentation and detection know their own. A data set that is not the
published one cannot be told from here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from dense_ssl.config import Config

_DEFAULTS: tuple[Mapping[str, Any], ...] = (MappingProxyType({}),)


@dataclass(frozen=True, slots=True)
class Own:
    """The settings that somebody reports numbers of, and those that may differ all the same."""

    free: frozenset[str]  # of the network, of the data set, of the draw, or without any effect
    published: tuple[Mapping[str, Any], ...] = _DEFAULTS  # beside the defaults of the others


def _own(free: str, *published: Mapping[str, Any]) -> Own:
    return Own(frozenset(free.split()), published or _DEFAULTS)


# Of DeiT's recipe by data set and network (iBOT, UDI): docs/evaluation.md says which is which.
_TRANSFERS: tuple[Mapping[str, Any], ...] = (
    {}, {"lr": 7.5e-5}, {"lr": 5e-6, "erase": 0.1},
    *({"epochs": 360, "erase": 0.1, "lr": lr} for lr in (7.5e-6, 5e-5, 2.5e-5)),
    *({"epochs": 360, "lr": lr} for lr in (3e-5, 5e-5)),
)  # fmt: skip
_SEGMENT = _own("labels seed extract_batch")
OWN: dict[str, Own] = {
    "knn": _own("k pool resampling bank batch_size"),
    "linear": _own(
        "select pool blocks precision seed extract_batch workers",
        {},  # iBOT
        {"weight_decay": (0.0, 1e-6), "optimizer": ("sgd", "lars")},  # its larger sweep
        {"lr": (30.0,), "schedule": "step", "batch_size": 256, "resampling": "bilinear"},  # MoCo
        {
            "lr": (0.02,), "batch_size": 2048, "randaugment": "rand-m9-mstd0.5-inc1", "erase": 0.25,
            "crop_resampling": "bicubic",
        },  # UDI
        {"variant": "cached"},
    ),
    "semi-supervised": _own("subset samplings select pool resampling seed batch_size"),
    "finetune": _own(
        # The protocol's name tells of the last two.
        "precision accumulate seed extract_batch workers subset tuned_blocks",
        *({"recipe": name} for name in ("mae", "beit-small", "beit-base", "beit-large", "udi", "semi")),
        *({"recipe": "transfer"} | own for own in _TRANSFERS),
    ),
    "cluster": _own("batch_size seed"),
    "svm": _own(
        "features shots seed batch_size workers",
        *({"variant": name} for name in ("cost-grid", "low-shot", "fixed")),
    ),
    "segment": _SEGMENT,
    "segment-linear": _SEGMENT,
    "object-knn": _own("k batch_size seed"),
    "attention": _own("labels batch_size seed"),
    "landmarks": _own("dataset pool seed", {}, {"crop_queries": True}),
    "copydays": _own("batch_size seed", {}, {"size": 320}),
    "correspondence": _own("batch_size seed"),
    "davis": _own("split", {"settings": "dino"}, {"settings": "revisiting"}),
    "hummingbird": _own("labels train_split memory_size batch_size seed"),
    "retrieve": _own("labels train_split batch_size seed"),
}  # fmt: skip


def departs(task: str, config: Config) -> bool:
    """Whether a setting that is not free differs from every published combination."""
    own = OWN.get(task)
    if own is None:
        return False
    free = set(own.free)
    said = config.model_dump(exclude=free)
    return all(
        type(config).model_validate(dict(values)).model_dump(exclude=free) != said
        for values in own.published
    )


def marked(protocol: str, task: str, config: Config) -> str:
    """Return a protocol's name as results and titles of pictures say it: with `*` where a setting departs."""
    return f"{protocol}*" if departs(task, config) else protocol
