"""Protocols that train a network end to end, as data: who published which numbers, what may be changed.

Lengths within a run (warm-up, milestones) are shares of it, so that a run of other `steps` has the same
shape. A protocol's name ends in `*` when a number is not the published one, or the data set is another.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from dense_ssl.config import Config as BaseConfig

Share = Annotated[float, Field(ge=0, le=1)]
# Beside these, every number belongs to the protocol.
_FREE = {"settings", "precision", "accumulate", "seed", "workers", "max_train", "max_val"}


@dataclass(frozen=True, slots=True)
class Published:
    """One protocol: its data set, its network's head, and its numbers."""

    layout: str  # of the data, as its reader calls it
    head: str  # which network is built
    values: dict[str, Any]


class TrainedSettings(BaseConfig):
    """Settings of a trained protocol; `settings` names the one whose numbers fill the rest."""

    task: ClassVar[str]
    published: ClassVar[dict[str, Published]]
    free: ClassVar[frozenset[str]] = frozenset()  # more keys that belong to no protocol

    settings: str
    steps: Annotated[int, Field(ge=1)] | None = None  # of the optimiser; or
    epochs: Annotated[float, Field(gt=0)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 16  # of all ranks together, after accumulation
    accumulate: Annotated[int, Field(ge=1)] = 1
    # The optimiser
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"  # adam: decay is part of the gradient
    lr: Annotated[float, Field(gt=0)]
    lr_per: Annotated[int, Field(ge=1)] | None = None  # images the rate is for; None: any batch
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    # norms: and positions; vectors: biases and positions too; flat: biases, but positions decay
    no_decay: Literal["none", "norms", "vectors", "flat"] = "none"
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    schedule: Literal["poly", "milestones", "cosine"] = "poly"
    power: Annotated[float, Field(gt=0)] = 0.9
    per: Literal["step", "epoch"] = "step"  # epoch: the rate moves between epochs only
    milestones: tuple[Share, ...] = ()  # a tenth of the rate from each on
    warmup: Share = 0.0
    warmup_start: Share = 0.0  # share of the rate that warm-up begins with
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # Ours
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    workers: Annotated[int, Field(ge=0)] | None = None  # per rank; None: its share of the cores
    max_train: Annotated[int, Field(ge=1)] | None = None
    max_val: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_the_protocol(cls, given: Any) -> Any:
        first = next(iter(cls.published))
        name = given.get("settings", first)
        values = dict(cls.published.get(name, cls.published[first]).values)
        if "steps" in given or "epochs" in given:
            values.pop("steps", None)
            values.pop("epochs", None)
        values |= cls.implied(values, given)
        return values | given | {"settings": name}

    @classmethod
    def implied(cls, values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Return the published `values` that change with what is given."""
        return {}

    @field_validator("settings")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in cls.published:
            raise ValueError(f"there are {', '.join(cls.published)}")
        return value

    @model_validator(mode="after")
    def _one_length(self) -> "TrainedSettings":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give steps or epochs, one of the two")
        if self.batch_size % self.accumulate:
            raise ValueError("batch_size must be a multiple of accumulate")
        return self

    @property
    def of(self) -> Published:
        """The protocol whose numbers these are, before changes."""
        return self.published[self.settings]

    def protocol(self, layout: str) -> str:
        """Return the name and version under which results on a data set's layout are kept."""
        published = type(self)(settings=self.settings)  # pyright: ignore[reportCallIssue]
        free = _FREE | self.free
        own, theirs = self.model_dump(exclude=free), published.model_dump(exclude=free)
        changed = own != theirs or layout != self.of.layout or bool(self.max_train or self.max_val)
        return f"{self.task}/{self.settings}/v1{'*' if changed else ''}"

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the optimiser's steps in the whole run."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(round(self.epochs * steps_per_epoch), 1)


def learning_rate(config: TrainedSettings, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step, from 0, before layer decay.

    poly: (lr - min) (1 - t)^power + min, t the share of the run that is done; cosine: from the end of
    warm-up to min. Warm-up multiplies it, linearly in steps.
    """
    total = config.total_steps(steps_per_epoch)
    peak = config.lr * (config.batch_size / config.lr_per if config.lr_per else 1)
    low = min(config.min_lr, peak)
    done = step if config.per == "step" else step // steps_per_epoch * steps_per_epoch
    share = done / total
    if config.schedule == "poly":
        rate = (peak - low) * (1 - share) ** config.power + low
    elif config.schedule == "milestones":
        rate = peak * 0.1 ** sum(share >= mark for mark in config.milestones)
    else:
        after = max(share - config.warmup, 0) / (1 - config.warmup) if config.warmup < 1 else 0.0
        rate = low + (peak - low) * 0.5 * (1 + math.cos(math.pi * after))
    warm = round(config.warmup * total)
    if step < warm:
        rate *= config.warmup_start + (1 - config.warmup_start) * step / warm
    return rate
