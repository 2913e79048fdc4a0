"""End-to-end fine-tuning for classification, by the recipes of MAE and BEiT.

| recipe     | lr                  | layer decay | epochs, warm-up | drop path | read         | of                        |
|------------|---------------------|-------------|-----------------|-----------|--------------|---------------------------|
| mae        | 5e-4 per 256 images | 0.65        | 100, 5          | 0.1       | mean of cells | MAE, ViT-B (SERE's evaluation) |
| beit-small | 1e-3                | 0.75        | 200, 20         | 0.1       | class token  | iBOT, ViT-S               |
| beit-base  | 1e-3                | 0.65        | 100, 20         | 0.2       | class token  | iBOT, ViT-B               |
| beit-large | 1e-3                | 0.75        | 50, 5           | 0.4       | class token  | iBOT, ViT-L               |
| udi        | 1e-3                | 0.55        | 200, 20         | 0.1       | class token  | UDI, ViT-S                |
| transfer   | 7.5e-6 per 512      | none        | 1000, 5         | 0.1       | class token  | DeiT; iBOT on small sets  |
| semi       | 5e-6 per 512        | none        | 1000, 5         | 0.1       | first layer of the projection head | iBOT, UDI from few labels |

The last two see every image three times in a batch of 768 (repeated augmentation), and are judged by the weights
themselves, as DeiT's code does: its moving average is kept there and not measured. `from_head` keeps the first
layer of the head a network was pre-trained under, with its activation; `tuned_blocks` trains the last blocks alone.

All: AdamW, decay 0.05 but none of tensors with one axis, positions and class tokens; cosine per step to
1e-6; batch 1024 but for the last two; RandAugment, mixup 0.8 or cutmix 1.0, label smoothing 0.1, random erasing 0.25; no clipping,
no average of weights. A recipe sets the keys that are not given. ResNets train with their stages as layers.

Every draw is keyed by (seed, epoch, image) or (seed, step): a job that was stopped goes on from its last
epoch to the same weights. Several ranks: torchrun -m dense_ssl.evaluation finetune ...
"""  # noqa: E501  (a table row cannot wrap)

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from pydantic import Field, field_validator, model_validator
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from tqdm import tqdm

from dense_ssl import checkpoint
from dense_ssl.backbones import Backbone, Projection, ViTBackbone, make_backbone
from dense_ssl.config import Config as BaseConfig
from dense_ssl.config import UserError
from dense_ssl.distributed import rank, world_size
from dense_ssl.evaluation.choices import Filter
from dense_ssl.evaluation.classification.accuracy import accuracies, chance, confusion_sheet
from dense_ssl.evaluation.classification.augmented import (
    Augmentation,
    RandAugment,
    TrainingCrops,
    seeded,
)
from dense_ssl.evaluation.classification.data import (
    ClassifyData,
    open_classification,
    read_picture,
    shorter_side,
)
from dense_ssl.evaluation.classification.subsets import draw_subset, is_list
from dense_ssl.evaluation.features import (
    FeatureCache,
    check_size,
    content_key,
    extract,
    normalised,
)
from dense_ssl.evaluation.protocol_settings import marked
from dense_ssl.evaluation.ranks import share_buffers, start_of_all
from dense_ssl.evaluation.trained.layer_decay import freeze_all_but, parameter_groups
from dense_ssl.rng import key_of
from dense_ssl.schedule import Schedule, Step

_MAE: dict[str, Any] = {"read": "mean", "lr": 5e-4, "lr_per": 256, "layer_decay": 0.65}
_BEIT: dict[str, Any] = {"read": "cls", "lr": 1e-3, "lr_per": None, "warmup_epochs": 20}
_DEIT: dict[str, Any] = {
    "read": "cls", "lr_per": 512, "layer_decay": 1.0, "epochs": 1000, "warmup_epochs": 5, "drop_path": 0.1,
    "batch_size": 768, "repeats": 3, "resampling": "bicubic",
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "mae": _MAE | {"epochs": 100, "warmup_epochs": 5, "drop_path": 0.1, "resampling": "bicubic"},
    "beit-small": _BEIT | {"epochs": 200, "layer_decay": 0.75, "drop_path": 0.1},
    "beit-base": _BEIT | {"epochs": 100, "layer_decay": 0.65, "drop_path": 0.2},
    "beit-large": _BEIT | {"epochs": 50, "layer_decay": 0.75, "drop_path": 0.4, "warmup_epochs": 5},
    "udi": _BEIT | {"epochs": 200, "layer_decay": 0.55, "drop_path": 0.1},
    "transfer": _DEIT | {"lr": 7.5e-6},
    "semi": _DEIT | {"lr": 5e-6, "from_head": True},
}
STREAM = int.from_bytes(b"tune", "big")  # mixup, erasing and drop path: a seed per (step, rank)


class Config(BaseConfig):
    """Settings of the protocol; `recipe` sets what is not given."""

    recipe: Literal[
        "mae", "beit-small", "beit-base", "beit-large", "udi", "transfer", "semi"
    ] = "mae"  # fmt: skip
    read: Literal["cls", "mean"]
    lr: Annotated[float, Field(gt=0)]
    lr_per: Annotated[int, Field(ge=1)] | None  # images the rate is for; None: whatever the batch
    layer_decay: Annotated[float, Field(gt=0, le=1)]
    epochs: Annotated[int, Field(ge=1)]
    warmup_epochs: Annotated[float, Field(ge=0)]
    drop_path: Annotated[float, Field(ge=0, lt=1)]
    from_head: bool = False  # keep the first layer of the projection head
    tuned_blocks: Annotated[int, Field(ge=0)] | None = None  # of a ViT, the last ones; None: all
    repeats: Annotated[int, Field(ge=1)] = 1  # crops of every image in a batch
    min_lr: Annotated[float, Field(ge=0)] = 1e-6
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    batch_size: Annotated[int, Field(ge=2)] = 1024  # of all ranks together, after accumulation
    accumulate: Annotated[int, Field(ge=1)] = 1
    size: Annotated[int, Field(ge=16)] = 224
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_resampling: Filter = "bicubic"
    resampling: Filter = "bilinear"  # of validation images
    randaugment: RandAugment | None = "rand-m9-mstd0.5-inc1"
    mixup: Annotated[float, Field(ge=0)] = 0.8
    cutmix: Annotated[float, Field(ge=0)] = 1.0  # one of the two per batch, evenly
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    erase: Annotated[float, Field(ge=0, le=1)] = 0.25  # probability of a noise rectangle
    precision: Literal["bf16", "fp32"] = "bf16"
    subset: str | None = None  # 1%, 10/class or a list file; None: all training images
    seed: int = 0
    extract_batch: Annotated[int, Field(ge=1)] = 64
    workers: Annotated[int, Field(ge=0)] | None = None
    max_train: Annotated[int, Field(ge=1)] | None = None
    max_val: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_the_recipe(cls, given: Any) -> Any:
        name = given.get("recipe", "mae")
        return RECIPES.get(name, RECIPES["mae"]) | given  # an unknown name is refused by its field

    @field_validator("crop_scale", mode="before")
    @classmethod
    def _both(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    @model_validator(mode="after")
    def _divides(self) -> "Config":
        if self.batch_size % self.accumulate:
            raise ValueError("batch_size must be a multiple of accumulate")
        if self.from_head and self.read != "cls":
            raise ValueError("from_head: heads are trained on the class token; take read=cls")
        return self


def load(path: Path, config: Config) -> ClassifyData:
    """Return the data at `path`: class folders, or COCO's objects.

    Raises:
        UserError: it is neither, nothing in it is usable, or the subset is not understood.
    """
    if config.subset:
        is_list(config.subset)
    name = "finetune"
    if config.recipe in ("transfer", "semi"):
        name += f"-{config.recipe}"
    if config.subset and config.recipe != "semi":
        name += "-subset"
    if config.tuned_blocks is not None:
        name += f"-last{config.tuned_blocks}"
    return open_classification(path, (config.max_train, config.max_val), name)


def run(
    backbone: Backbone, data: ClassifyData, config: Config, cache: FeatureCache | None = None
) -> dict[str, float]:
    """Return `top1` and `top5` after the last epoch in percent, and their chance levels."""
    scores, labels = _outcome(backbone, data, config, cache)
    return accuracies(scores, labels) | chance(data.train.labels, labels, len(data.classes))


def pictures(
    backbone: Backbone, data: ClassifyData, config: Config, cache: FeatureCache | None = None
) -> dict[str, Image.Image]:
    """Return the confusion matrix; the weights are those `run` left in the cache."""
    scores, labels = _outcome(backbone, data, config, cache)
    named = marked(data.protocol, "finetune", config)
    title = f"{named}: top-1 {accuracies(scores, labels)['top1']:.1f} %"
    return {"confusion": confusion_sheet(labels, scores.argmax(1), data.classes, title)}


class Classifier(nn.Module):
    """A backbone with a linear layer on its class token, or on the normalised mean of its cells.

    With `projection` that layer and its activation stand in between.
    """

    def __init__(
        self,
        backbone: Backbone,
        read: Literal["cls", "mean"],
        classes: int,
        projection: Projection | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.read = backbone, read
        dim = backbone.dim
        self.projection: nn.Module = nn.Identity()
        if projection is not None:
            dim, width = projection.weight.shape
            layer = nn.Linear(width, dim)
            layer.load_state_dict({"weight": projection.weight, "bias": projection.bias})
            activation = nn.GELU() if projection.activation == "gelu" else nn.ReLU()
            self.projection = nn.Sequential(layer, activation)
        self.fc_norm: nn.Module = nn.Identity()
        if read == "mean" and isinstance(backbone, ViTBackbone):
            self.fc_norm = nn.LayerNorm(backbone.dim, eps=1e-6)
            backbone.trunk.norm = nn.Identity()  # MAE: fc_norm takes the place of the final norm
        self.head = nn.Linear(dim, classes)
        # MAE draws with 2e-5; BEiT with 0.02 and then takes a thousandth of that: the same.
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores [B, C] of normalised images [B, 3, H, W]."""
        features = self.backbone(images)
        read = features.cls[:, 0] if self.read == "cls" else features.dense.mean(1)
        return self.head(self.projection(self.fc_norm(read)))


def _outcome(
    backbone: Backbone, data: ClassifyData, config: Config, cache: FeatureCache | None
) -> tuple[Tensor, Tensor]:
    """Train and return validation scores [m, C] and labels [m]."""
    check_size((config.size,), backbone.stride)
    model = _trained(backbone, data, config, cache)
    resize = shorter_side(config.size)
    extracted = extract(
        model,
        data.val.pictures,
        lambda picture: read_picture(picture, resize, config.size, config.resampling),
        lambda scores: scores.float(),
        batch_size=config.extract_batch,
        key="",
        cache=None,  # the weights are not those the cache is for
        omitted=data.omitted,
        label="val",
        precision=config.precision,
    )
    return extracted.features, data.val.labels[extracted.kept]


def _trained(
    backbone: Backbone, data: ClassifyData, config: Config, cache: FeatureCache | None
) -> Classifier:
    device = next(backbone.parameters()).device
    model = _classifier(backbone, len(data.classes), config).to(device)
    model.to(memory_format=torch.channels_last)
    optimizer = AdamW(
        parameter_groups(model, config.layer_decay, config.weight_decay),
        lr=0.0,
        betas=(0.9, 0.999),
        fused=True,
    )
    settings = config.model_dump_json(exclude={"workers", "extract_batch"})
    key = content_key("finetune", data.protocol, data.content, settings)
    folder = cache.job(key) if cache else None
    saved = checkpoint.load_newest(folder) if folder else None
    start = start_of_all(_resume(model, optimizer, saved), folder)
    if start == config.epochs:
        return model.eval()
    crops = _crops(data, config)
    schedule = _schedule(config, crops.batch_size * config.accumulate)
    steps = crops.steps_per_epoch // config.accumulate
    if not steps:
        raise UserError(f"accumulate={config.accumulate}: more batches than an epoch has")
    trained = DistributedDataParallel(model) if world_size() > 1 else model
    draws = _Draws(config, len(data.classes), device)
    progress = tqdm(
        total=config.epochs * steps, initial=start * steps, desc="finetune", unit="step",
        leave=False, disable=True if rank() else None,
    )  # fmt: skip
    for epoch in range(start, config.epochs):
        model.train()
        batches = iter(crops.epoch(epoch))
        for number in range(steps):
            step = Step(epoch * steps + number, steps, config.epochs)
            lr = schedule.at(step)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            for micro in range(config.accumulate):
                images, labels = next(batches)
                key_of_step = int(key_of(config.seed, STREAM, step.index, micro, rank()))
                with seeded(key_of_step):
                    loss = draws.loss(trained, images.to(device), labels.to(device))
                    (loss / config.accumulate).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.update()
        for _ in batches:  # what does not fill a step is read to its end: one epoch, one pass
            pass
        _require_finite(model, epoch)
        share_buffers(model)
        if folder and rank() == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoint.save(folder, {"step": epoch + 1, **state}, keep=1)
    progress.close()
    return model.eval()


def _require_finite(model: nn.Module, epoch: int) -> None:
    """Refuse weights that would replace good ones in the job's folder."""
    norms = torch._foreach_norm([parameter.detach() for parameter in model.parameters()])
    if not torch.stack(norms).isfinite().all():
        raise UserError(
            f"finetune: weights are not finite after epoch {epoch + 1}; lower lr, or precision=fp32"
        )


def _resume(model: nn.Module, optimizer: AdamW, saved: Mapping[str, Any] | None) -> int:
    """Load a job's last epoch; return the epoch to go on with."""
    if saved is None:
        return 0
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return int(saved["step"])


def _classifier(backbone: Backbone, classes: int, config: Config) -> Classifier:
    """A copy of the backbone, with drop path, under a fresh head.

    Raises:
        UserError: the projection head is to be kept and not known, or blocks are to be tuned and there are
            none or not so many.
    """
    name = backbone.config.name
    if config.from_head and backbone.projection is None:
        raise UserError(
            f"finetune: no projection head is known of this {name}, which recipe=semi starts from; give the "
            "run or the full training file (not a backbone alone), or take from_head=false"
        )
    depth = len(backbone.trunk.blocks) if isinstance(backbone, ViTBackbone) else 0  # pyright: ignore
    if (config.tuned_blocks or 0) > depth or (config.tuned_blocks is not None and not depth):
        raise UserError(f"tuned_blocks={config.tuned_blocks}: {name} has {depth} blocks of a ViT")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if isinstance(backbone, ViTBackbone):
            settings = backbone.config.model_copy(update={"drop_path": config.drop_path})
            twin = make_backbone(settings)
            twin.load_state_dict(backbone.state_dict())
        else:
            twin = copy.deepcopy(backbone)
        projection = backbone.projection if config.from_head else None
        model = Classifier(twin, config.read, classes, projection)
        if config.tuned_blocks is not None:
            freeze_all_but(model, config.tuned_blocks)
        return model


def _crops(data: ClassifyData, config: Config) -> TrainingCrops:
    train = data.train
    if config.subset:
        train = draw_subset(train, config.subset, config.seed, data.omitted)
    return TrainingCrops(
        train.pictures,
        train.labels,
        Augmentation(config.size, config.crop_resampling, config.crop_scale, config.randaugment),
        batch_size=config.batch_size // config.accumulate,
        seed=config.seed,
        workers=config.workers,
        omitted=data.omitted,
        repeats=config.repeats,
        multiple=2,  # timm's mixup pairs the images of a batch
    )


def _schedule(config: Config, batch_size: int) -> Schedule:
    peak = config.lr * (batch_size / config.lr_per if config.lr_per else 1)
    return Schedule(start=peak, end=min(config.min_lr, peak), warmup_epochs=config.warmup_epochs)


class _Draws:
    """Mixup, cutmix and erasing of timm, and the loss they leave; seeded by the caller."""

    def __init__(self, config: Config, classes: int, device: torch.device) -> None:
        self._erase = RandomErasing(config.erase, mode="pixel", device=device.type)
        self._mix: Any = None
        if config.mixup or config.cutmix:
            self._mix = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                label_smoothing=config.smoothing,
                num_classes=classes,
            )
        self._smoothing = config.smoothing
        self._bf16 = config.precision == "bf16"

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy of uint8 images [B, 3, S, S] against their mixed labels."""
        x, target = self._erase(normalised(images)), labels
        if self._mix is not None:
            x, target = self._mix(x, labels)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self._bf16):
            scores = model(x)
        smoothing = 0.0 if self._mix is not None else self._smoothing  # mixed labels are smooth
        return nn.functional.cross_entropy(scores.float(), target, label_smoothing=smoothing)
