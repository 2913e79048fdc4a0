"""The trained segmentation protocols as data: who published which numbers, and what may be changed.

Lengths within a run (warm-up, milestones) are shares of it, so that a run of other `steps` has the same
shape. `size` takes the test scale and the window's stride with it. A protocol's name ends in `*` when a
number is not the published one, or the data set is another.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from dense_ssl.config import Config as BaseConfig
from dense_ssl.evaluation.segment_data import Labels

Side = Annotated[int, Field(ge=16)]
Share = Annotated[float, Field(ge=0, le=1)]
# Beside these, every number belongs to the protocol. Void around rotated images is ours: see `fill`.
_FREE = frozenset(
    {"settings", "fill", "precision", "accumulate", "seed", "workers", "labels", "max_train", "max_val",
     "test_scales", "test_flip"}
)  # fmt: skip
MULTI_SCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # mmsegmentation's augmented test; iBOT, ADE20K


@dataclass(frozen=True, slots=True)
class Published:
    """One protocol: its data set, its network's head, and its numbers."""

    layout: str  # of segment_layouts
    head: str  # of segment_model.HEADS
    values: dict[str, Any]


class TrainedConfig(BaseConfig):
    """Settings of a trained segmentation protocol; `settings` names the one whose numbers fill the rest."""

    task: ClassVar[str]
    published: ClassVar[dict[str, Published]]

    settings: str
    size: tuple[Side, Side]  # height and width of a training crop
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
    no_decay: Literal["none", "norms", "vectors"] = (
        "none"  # norms: and positions; vectors: and biases
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    schedule: Literal["poly", "milestones", "cosine"] = "poly"
    power: Annotated[float, Field(gt=0)] = 0.9
    per: Literal["step", "epoch"] = "step"  # epoch: the rate moves between epochs only
    milestones: tuple[Share, ...] = ()  # a tenth of the rate from each on
    warmup: Share = 0.0
    warmup_start: Share = 0.0  # share of the rate that warm-up begins with
    # The images
    augmentation: Literal["rotate-zoom", "listed-scale", "any-scale", "resized-crop"]
    scale: tuple[Side, Side] = (2048, 512)  # longer and shorter side that an image fits in
    ratio: tuple[float, float] = (0.5, 2.0)  # any-scale: of that scale while training
    max_share: Share = 0.75  # any-scale: of one class in a crop
    fill: Literal["void", "background"] = "void"  # rotate-zoom: label around the image
    resampling: Literal["bilinear", "bicubic", "antialiased"] = "bilinear"
    train_split: Literal["train", "trainaug"] | None = None  # of VOC
    # The network
    dilation: Annotated[int, Field(ge=1)] = 1  # of RevisitingFcn
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    normed: bool = False  # all levels of a ViT pass its final norm
    align_corners: bool = False  # when scores are enlarged
    # The loss
    loss_over: Literal["labelled", "all"] = "labelled"  # pixels that the sum is divided by
    loss_stride: Annotated[int, Field(ge=1)] | None = None  # pixels per score; None: all pixels
    aux_weight: Annotated[float, Field(ge=0)] = 0.0
    # The test
    test: Literal["squash", "native", "whole", "slide", "short"]
    window_stride: Annotated[int, Field(ge=1)] | None = None  # slide: pixels between windows
    test_scales: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (
        1.0,
    )  # `ms`: MULTI_SCALE
    test_flip: bool = False  # the mirrored image too
    select: Literal["last", "best"] = "last"  # best: of the epochs, by mIoU on val
    # Ours
    precision: Literal["fp32", "bf16"] = "fp32"
    labels: Labels = "category"  # of COCO
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
        if "size" in given:
            values |= _with_size(values, _sides(given["size"]))
        return values | given | {"settings": name}

    @field_validator("settings")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in cls.published:
            raise ValueError(f"there are {', '.join(cls.published)}")
        return value

    @field_validator("size", "scale", mode="before")
    @classmethod
    def _both_sides(cls, value: Any) -> Any:
        return _sides(value)

    @field_validator("test_scales", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        if value == "ms":
            return MULTI_SCALE
        if isinstance(value, str):
            return value.split(",")
        return (value,) if isinstance(value, int | float) else value

    @model_validator(mode="after")
    def _whole(self) -> "TrainedConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give steps or epochs, one of the two")
        if self.batch_size % self.accumulate:
            raise ValueError("batch_size must be a multiple of accumulate")
        if self.test == "slide" and self.window_stride is None:
            raise ValueError("window_stride: test=slide needs it")
        return self

    @property
    def of(self) -> Published:
        """The protocol these settings are of."""
        return self.published[self.settings]

    def protocol(self, layout: str) -> str:
        """Return the name and version under which results on a data set's layout are kept.

        `+ms` and `+flip` are the published augmented test; other scales count as a changed number.
        """
        published = type(self)(settings=self.settings)  # pyright: ignore[reportCallIssue]
        own, theirs = self.model_dump(exclude=set(_FREE)), published.model_dump(exclude=set(_FREE))
        changed = own != theirs or layout != self.of.layout or bool(self.max_train or self.max_val)
        augmented = "+ms" if self.test_scales == MULTI_SCALE else ""
        augmented += "+flip" if self.test_flip else ""
        changed |= self.test_scales not in ((1.0,), MULTI_SCALE)
        return f"{self.task}/{self.settings}/v1{augmented}{'*' if changed else ''}"

    def single(self) -> "TrainedConfig":
        """Return the same with the plain test, by which epochs are compared."""
        return self.model_copy(update={"test_scales": (1.0,), "test_flip": False})

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the optimiser's steps in the whole run."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(round(self.epochs * steps_per_epoch), 1)


def learning_rate(config: TrainedConfig, step: int, steps_per_epoch: int) -> float:
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


def _sides(value: Any) -> Any:
    """`192,256` and `256` as two sides; anything else as it is, for its field to refuse."""
    if isinstance(value, str):
        value = value.split(",")
    if isinstance(value, list | tuple):
        return tuple(int(v) if str(v).strip().isdecimal() else v for v in value)
    return (value, value) if isinstance(value, int) else value


def _with_size(values: dict[str, Any], size: Any) -> dict[str, Any]:
    """The numbers in pixels that go with the crop's size."""
    if not isinstance(size, tuple) or len(size) != 2 or not all(isinstance(s, int) for s in size):
        return {}
    factor = min(size) / min(values["size"])
    changed: dict[str, Any] = {}
    if "scale" in values:
        changed["scale"] = tuple(round(side * factor) for side in values["scale"])
    if "window_stride" in values:
        changed["window_stride"] = max(round(values["window_stride"] * factor), 1)
    return changed


# mmsegmentation 0.x trains on crops of rescaled images and divides the loss by all pixels, void or not.
_MMSEG: dict[str, Any] = {"augmentation": "any-scale", "loss_over": "all"}
_DENSECL: dict[str, Any] = _MMSEG | {
    "lr": 0.01, "min_lr": 1e-4, "weight_decay": 5e-4, "aux_weight": 0.4
}  # fmt: skip
_UPERNET: dict[str, Any] = _MMSEG | {
    "steps": 160_000, "batch_size": 16, "size": (512, 512), "scale": (2048, 512), "optimizer": "adamw",
    "weight_decay": 0.05, "no_decay": "vectors", "power": 1.0, "warmup": 1500 / 160_000,
    "warmup_start": 1e-6, "normed": True, "test": "slide", "window_stride": 341, "precision": "bf16",
}  # fmt: skip


class FcnConfig(TrainedConfig):
    """Dilated ResNets (DenseCL, Van Gansbeke et al. 2021)."""

    task: ClassVar[str] = "segment-fcn"
    published: ClassVar[dict[str, Published]] = {
        "voc-densecl": Published("voc", "fcn-d8", _DENSECL | {
            "steps": 20_000, "batch_size": 16, "size": (512, 512), "scale": (2048, 512),
            "test": "whole", "train_split": "trainaug",
        }),
        "cityscapes-densecl": Published("cityscapes", "fcn-d8", _DENSECL | {
            "steps": 40_000, "batch_size": 8, "size": (769, 769), "scale": (2049, 1025),
            "test": "slide", "window_stride": 513, "align_corners": True,
        }),
        "voc-revisiting": Published("voc", "fcn", {
            "epochs": 45, "batch_size": 16, "size": (512, 512), "lr": 0.003, "weight_decay": 1e-4,
            "schedule": "milestones", "per": "epoch", "milestones": (31 / 45, 41 / 45), "dilation": 6,
            "augmentation": "rotate-zoom", "resampling": "bicubic", "test": "squash", "select": "best",
            "train_split": "trainaug",
        }),
        "cityscapes-revisiting": Published("cityscapes", "fcn", {
            "epochs": 150, "batch_size": 8, "size": (768, 768), "optimizer": "adam", "lr": 1e-4,
            "weight_decay": 1e-4, "per": "epoch", "augmentation": "listed-scale",
            "resampling": "bicubic", "test": "native", "select": "best",
        }),
    }  # fmt: skip


class UperNetConfig(TrainedConfig):
    """UperNet on a ViT's pyramid, or a ResNet's stages (iBOT)."""

    task: ClassVar[str] = "segment-upernet"
    published: ClassVar[dict[str, Published]] = {
        "ade20k-small": Published("ade20k", "upernet", _UPERNET | {
            "lr": 3e-5, "layer_decay": 0.9, "aux_weight": 0.4, "drop_path": 0.1,
        }),
        "ade20k-base": Published("ade20k", "upernet", _UPERNET | {
            "lr": 8e-5, "layer_decay": 0.65, "aux_weight": 0.4, "drop_path": 0.1,
        }),
    }  # fmt: skip


class FpnConfig(TrainedConfig):
    """Semantic FPN (UDI): a ViT without class tokens, its levels all at the patch's stride."""

    task: ClassVar[str] = "segment-fpn"
    published: ClassVar[dict[str, Published]] = {
        name: Published("ade20k", head, _MMSEG | {
            "steps": 40_000, "batch_size": 16, "size": (512, 512), "scale": (2048, 512),
            "optimizer": "adamw", "lr": 6e-5, "weight_decay": 0.01, "no_decay": "norms", "power": 1.0,
            "warmup": 1500 / 40_000, "warmup_start": 1e-6, "test": "whole",
        })
        for name, head in (("ade20k", "fpn"), ("ade20k-pyramid", "fpn-pyramid"))
    }  # fmt: skip


class FrozenConfig(TrainedConfig):
    """A linear layer on four frozen levels of a ViT beside each other (iBOT)."""

    task: ClassVar[str] = "segment-frozen"
    published: ClassVar[dict[str, Published]] = {
        "ade20k": Published("ade20k", "linear", _UPERNET | {"lr": 8e-4})
    }


class FinetuneConfig(TrainedConfig):
    """Few labelled images of ImageNet-S, the whole network trained (SERE)."""

    task: ClassVar[str] = "segment-finetune"
    published: ClassVar[dict[str, Published]] = {
        "imagenet-s": Published("imagenet-s", "cells", {
            "epochs": 100, "batch_size": 256, "size": (224, 224), "optimizer": "adamw", "lr": 5e-4,
            "lr_per": 256, "min_lr": 1e-6, "weight_decay": 0.05, "no_decay": "vectors",
            "layer_decay": 0.5, "schedule": "cosine", "warmup": 5 / 100, "drop_path": 0.1,
            "augmentation": "resized-crop", "resampling": "antialiased", "loss_stride": 8,
            "test": "short", "precision": "bf16",
        })
    }  # fmt: skip


CONFIGS: tuple[type[TrainedConfig], ...] = (
    FcnConfig,
    UperNetConfig,
    FpnConfig,
    FrozenConfig,
    FinetuneConfig,
)
