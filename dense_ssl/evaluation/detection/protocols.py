"""The detection protocols as data: who published which numbers, and what may be changed.

`short` takes the longer side, the test's size and the cut's sides with it.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from dense_ssl.config import UserError
from dense_ssl.evaluation.trained.settings import Published, Share, TrainedSettings

Side = Annotated[int, Field(ge=16)]
Count = Annotated[int, Field(ge=1)]
Part = Literal["neck", "box", "mask"]
LEVELS = 5  # of a pyramid, each with its own size of anchors


class DetectConfig(TrainedSettings):
    """Settings of a detection protocol."""

    task: ClassVar[str] = "detect"

    # The images
    short: tuple[Side, ...]  # shorter sides in training, one at random
    longest: Side = 1333  # of the longer side, in training and in the test
    test_short: Side = 800
    crop: tuple[Side, Side] | None = None  # sides that every other image is cut to, at random
    crop_short: tuple[Side, ...] = (400, 500, 600)  # before the cut
    resampling: Literal["bilinear", "antialiased"] = "bilinear"
    train_years: tuple[Literal["2007", "2012"], ...] = ("2007", "2012")  # of VOC
    # The network
    masks: bool = True
    width: Count = 256  # channels of the pyramid
    hidden: Count = 1024  # of the box head
    box_head: Literal["convolutions", "layers"] = "convolutions"  # four and a layer, or two layers
    normed: tuple[Part, ...] = ()  # parts with BatchNorm
    position_size: tuple[Side, Side] | None = (
        None  # pixels that a ViT's positions are resampled to first
    )
    # Proposals
    anchors: tuple[Count, ...] = (32, 64, 128, 256, 512)
    proposals: tuple[Count, Count] = (2000, 1000)  # per level before suppression, training and test
    kept: tuple[Count, Count] = (1000, 1000)  # after it
    rpn_beta: Annotated[float, Field(ge=0)] = 0.0  # where the box loss turns from squares to lines
    # Boxes
    overlaps: tuple[Share, ...] = (0.5,)  # that make a positive, one per stage
    rois: Count = 512  # sampled per image
    box_loss: Literal["l1", "giou"] = "l1"
    detections: Count = 100  # per image
    # Ours
    bn_steps: Annotated[int, Field(ge=0)] = (
        0  # batches the final BatchNorm statistics are taken over
    )

    @classmethod
    def implied(cls, values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Return the lengths in pixels that go with other shorter sides."""
        short = _numbers(given.get("short"))
        if not isinstance(short, tuple) or not all(isinstance(side, int) for side in short):
            return {}
        factor = max(short, default=1) / max(values["short"])
        changed = {"longest": 1333, "test_short": 800, "crop_short": (400, 500, 600)} | values
        scaled: dict[str, Any] = {
            name: max(round(changed[name] * factor), 16) for name in ("longest", "test_short")
        }
        for name in ("crop", "crop_short", "position_size"):
            if changed.get(name) is not None:
                scaled[name] = tuple(max(round(side * factor), 16) for side in changed[name])
        return scaled

    @field_validator(
        "short", "crop", "crop_short", "position_size", "anchors", "proposals", "kept", "overlaps",
        mode="before",
    )  # fmt: skip
    @classmethod
    def _several(cls, value: Any) -> Any:
        return _numbers(value)

    @field_validator("train_years", "normed", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if isinstance(value, int):
            value = str(value)
        return tuple(value.split(",")) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits(self) -> "DetectConfig":
        if not self.short or not self.train_years or not self.anchors:
            raise ValueError("short, train_years and anchors: one at least")
        if len(self.overlaps) not in (1, 3):
            raise ValueError("overlaps: one, or three of a cascade")
        if self.of.head != "c4" and len(self.anchors) != LEVELS:
            raise ValueError(f"anchors: one size per level of the pyramid, {LEVELS} of them")
        return self

    def check_layout(self, layout: str) -> None:
        """Raise unless data of a layout can be used.

        Raises:
            UserError: masks are wanted of VOC, or a VOC protocol of COCO.
        """
        if layout == "voc" and self.masks:
            raise UserError(
                f"settings={self.settings}: needs masks, VOC has boxes; take settings=voc-c4 (ResNets), or "
                "masks=false"
            )
        if layout == "coco" and self.of.layout == "voc":
            raise UserError(
                f"settings={self.settings}: is of VOC's boxes, the data are COCO's; take "
                "settings=coco-fpn-1x (ResNets), coco-cascade-small-1x (ViTs) or another of "
                f"{', '.join(name for name in self.published if name.startswith('coco'))}"
            )

    published: ClassVar[dict[str, Published]]


def _numbers(value: Any) -> Any:
    """`64,96` and `96` as a tuple; anything else as it is, for its field to refuse."""
    if isinstance(value, str) and value != "none":
        value = value.split(",")
    if isinstance(value, list | tuple):
        return tuple(_number(part) for part in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (value,)
    return None if value == "none" else value


def _number(part: Any) -> Any:
    if not isinstance(part, str):
        return part
    try:
        return float(part) if "." in part else int(part)
    except ValueError:
        return part


# detectron2 (MoCo, DenseCL): Pillow resizes, norms are not decayed, boxes are learnt by L1, and the final
# statistics of BatchNorm are means over 200 batches.
_DETECTRON: dict[str, Any] = {
    "batch_size": 16, "lr": 0.02, "weight_decay": 1e-4, "no_decay": "norms", "schedule": "milestones",
    "warmup_start": 1e-3, "short": (640, 672, 704, 736, 768, 800), "resampling": "antialiased",
    "bn_steps": 200,
}  # fmt: skip
_C4: dict[str, Any] = _DETECTRON | {"proposals": (12_000, 6000), "kept": (2000, 1000)}
_FPN: dict[str, Any] = _DETECTRON | {"normed": ("neck", "box", "mask")}
# mmdetection (iBOT, UDI): twelve epochs, a tenth of the rate from the ninth and the twelfth on.
_MMDET: dict[str, Any] = {
    "epochs": 12, "optimizer": "adamw", "weight_decay": 0.05, "schedule": "milestones",
    "milestones": (8 / 12, 11 / 12), "warmup_start": 1e-3, "short": tuple(range(480, 801, 32)),
    "crop": (384, 600), "kept": (2000, 1000), "precision": "bf16",
}  # fmt: skip
_IBOT: dict[str, Any] = _MMDET | {
    "lr": 1e-4, "no_decay": "flat", "rpn_beta": 1 / 9, "normed": ("box",), "overlaps": (0.5, 0.6, 0.7),
    "box_loss": "giou",
}  # fmt: skip
_COCO_IMAGES = 117_266  # of train2017, with an object that is no crowd


def _epochs_of(batch: int, warmup: int) -> dict[str, Any]:
    """A batch, and `warmup` steps as a share of twelve epochs of it."""
    return {"batch_size": batch, "warmup": warmup / (12 * _COCO_IMAGES / batch)}


DetectConfig.published = {
    "voc-c4": Published("voc", "c4", _C4 | {
        "steps": 24_000, "milestones": (18 / 24, 22 / 24), "warmup": 100 / 24_000, "masks": False,
        "short": tuple(range(480, 801, 32)),
    }),
    "coco-c4-1x": Published("coco", "c4", _C4 | {
        "steps": 90_000, "milestones": (6 / 9, 8 / 9), "warmup": 1000 / 90_000,
    }),
    "coco-c4-2x": Published("coco", "c4", _C4 | {
        "steps": 180_000, "milestones": (12 / 18, 16 / 18), "warmup": 1000 / 180_000,
    }),
    "coco-fpn-1x": Published("coco", "stages", _FPN | {
        "steps": 90_000, "milestones": (6 / 9, 8 / 9), "warmup": 1000 / 90_000,
    }),
    "coco-cascade-small-1x": Published("coco", "blocks", _IBOT | _epochs_of(32, 500) | {
        "layer_decay": 0.8, "drop_path": 0.1, "position_size": (800, 1008),
    }),
    "coco-cascade-base-1x": Published("coco", "blocks", _IBOT | _epochs_of(16, 500) | {
        "layer_decay": 0.75, "drop_path": 0.2, "position_size": (672, 1092),
    }),
    "coco-mask-1x": Published("coco", "tokenless", _MMDET | _epochs_of(8, 1000) | {
        "lr": 5e-5, "no_decay": "norms", "drop_path": 0.05, "box_head": "layers", "kept": (1000, 1000),
    }),
    "coco-simple-1x": Published("coco", "simple", _IBOT | _epochs_of(32, 500) | {
        "layer_decay": 0.8, "drop_path": 0.1, "overlaps": (0.5,), "box_loss": "l1",
    }),
}  # fmt: skip
