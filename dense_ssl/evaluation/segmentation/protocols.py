"""The trained segmentation protocols as data: who published which numbers.

`size` takes the test scale and the window's stride with it.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from dense_ssl.evaluation.segmentation.data import Labels
from dense_ssl.evaluation.trained.settings import Published, Share, TrainedSettings

Side = Annotated[int, Field(ge=16)]
MULTI_SCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # mmsegmentation's augmented test; iBOT, ADE20K


class TrainedConfig(TrainedSettings):
    """Settings of a trained segmentation protocol."""

    free: ClassVar[frozenset[str]] = frozenset(
        {"fill", "labels", "test_scales", "test_flip"}  # void around images is ours
    )

    size: tuple[Side, Side]  # height and width of a training crop
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
    labels: Labels = "category"  # of COCO

    @classmethod
    def implied(cls, values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Return the lengths in pixels that go with another size."""
        return _with_size(values, _sides(given["size"])) if "size" in given else {}

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
        if self.test == "slide" and self.window_stride is None:
            raise ValueError("window_stride: test=slide needs it")
        return self

    def protocol(self, layout: str) -> str:
        """Return the name and version under which results on a data set's layout are kept.

        `+ms` and `+flip` are the published augmented test; other scales count as a changed number.
        """
        name = super().protocol(layout)
        augmented = "+ms" if self.test_scales == MULTI_SCALE else ""
        augmented += "+flip" if self.test_flip else ""
        changed = name.endswith("*") or self.test_scales not in ((1.0,), MULTI_SCALE)
        return f"{name.removesuffix('*')}{augmented}{'*' if changed else ''}"

    def single(self) -> "TrainedConfig":
        """Return the same with the plain test, by which epochs are compared."""
        return self.model_copy(update={"test_scales": (1.0,), "test_flip": False})


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
    "weight_decay": 0.05, "no_decay": "flat", "power": 1.0, "warmup": 1500 / 160_000,
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
