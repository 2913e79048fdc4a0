"""Linear classification on frozen features, with many learning rates trained side by side.

Two named variants:

* `augmented` (`linear/v1`), the published protocol of DINO and iBOT (arXiv:2111.07832): random crops and
  mirrors of the training images go through the frozen network every epoch.
* `cached` (`linear-cached/v1`): features of centre crops, computed once. Minutes instead of hours, and
  a few tenths of a point to a few points below.

SGD with momentum 0.9, no decay, the learning rate times batch / 256, weights from N(0, 0.01); iBOT's larger
sweep is `weight_decay=0,1e-6 optimizer=sgd,lars`. ViTs narrower
than 768 read the class tokens of the last 4 blocks, wider ones the last class token beside the mean cell,
ResNets their pooled map.

Which classifier counts is decided on a tenth of the training images kept apart (`select=held-out`), or,
as the published codes do, on the very images that are reported (`select=val`); then the metrics are called
`top1@best-on-val`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from pydantic import Field
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from tqdm import tqdm

from dense_ssl import checkpoint
from dense_ssl.backbones import Backbone, ViTBackbone
from dense_ssl.config import Config as BaseConfig
from dense_ssl.config import UserError
from dense_ssl.distributed import rank
from dense_ssl.evaluation.choices import Filter, Pool, Range, Several
from dense_ssl.evaluation.classification.accuracy import accuracies, chance, confusion_sheet
from dense_ssl.evaluation.classification.augmented import (
    Augmentation,
    RandAugment,
    TrainingCrops,
    seeded,
)
from dense_ssl.evaluation.classification.data import (
    ClassifyData,
    LabelledPictures,
    held_out,
    open_classification,
    read_picture,
    shorter_side,
)
from dense_ssl.evaluation.classification.heads import Heads, Rule
from dense_ssl.evaluation.features import (
    FeatureCache,
    check_size,
    content_key,
    extract,
    normalised,
)
from dense_ssl.evaluation.protocol_settings import marked
from dense_ssl.evaluation.ranks import start_of_all
from dense_ssl.evaluation.readout import Readout
from dense_ssl.loaders.order import Order
from dense_ssl.rng import key_of
from dense_ssl.schedule import Schedule, Step

STREAM = int.from_bytes(b"probe", "big")  # random erasing: a seed per (epoch, step, rank)
_LR_BATCH = 256  # learning rates are for this batch
_SHARE = 0.1  # of the training images kept apart
# 45 rates, as iBOT sweeps them
_LRS = tuple(digit * 10.0**power for power in range(-4, 1) for digit in range(1, 10))


class Config(BaseConfig):
    """Settings of the protocol; the defaults are iBOT's on ImageNet."""

    variant: Literal["augmented", "cached"] = "augmented"
    select: Literal["held-out", "val"] = "held-out"  # where the learning rate is chosen
    size: Annotated[int, Field(ge=16)] = 224
    resampling: Filter = "bicubic"  # of validation images
    crop_resampling: Filter = "bilinear"  # of training crops
    crop_scale: Range = (0.08, 1.0)
    randaugment: RandAugment | None = None  # UDI: rand-m9-mstd0.5-inc1
    erase: Annotated[float, Field(ge=0, le=1)] = 0.0  # probability of a noise rectangle; UDI: 0.25
    pool: Pool | Literal["auto"] = "auto"
    blocks: Annotated[int, Field(ge=1)] | None = None  # None: of the network, see above
    lr: Several[Annotated[float, Field(gt=0)]] = _LRS
    weight_decay: Several[Annotated[float, Field(ge=0)]] = (0.0,)
    optimizer: Several[Literal["sgd", "lars"]] = ("sgd",)
    schedule: Literal["cosine", "step"] = "cosine"  # step: x 0.1 after 60 % and 80 % (MoCo)
    epochs: Annotated[int, Field(ge=1)] = 100
    batch_size: Annotated[int, Field(ge=1)] = 1024  # of all ranks together
    precision: Literal["fp32", "bf16"] = "fp32"  # of the frozen network
    seed: int = 0
    extract_batch: Annotated[int, Field(ge=1)] = 64
    workers: Annotated[int, Field(ge=0)] | None = None  # that decode; None: all cores
    max_train: Annotated[int, Field(ge=1)] | None = None
    max_val: Annotated[int, Field(ge=1)] | None = None

    def rules(self) -> list[Rule]:
        """Return how each classifier is trained, the smallest rates first."""
        kinds = product(self.lr, self.weight_decay, self.optimizer)
        return [Rule(lr, decay, name) for lr, decay, name in kinds]


def load(path: Path, config: Config) -> ClassifyData:
    """Return the data at `path`: class folders, or COCO's objects.

    Raises:
        UserError: it is neither, or nothing in it is usable.
    """
    name = "linear" if config.variant == "augmented" else "linear-cached"
    return open_classification(path, (config.max_train, config.max_val), name)


def run(
    backbone: Backbone, data: ClassifyData, config: Config, cache: FeatureCache | None = None
) -> dict[str, float]:
    """Return `top1` and `top5` in percent with the chosen learning rate, and their chance levels."""
    outcome = _outcome(backbone, data, config, cache)
    found = accuracies(outcome.scores, outcome.labels)
    named = "@best-on-val" if outcome.chosen_on == "val" else ""
    values = {f"{name}{named}": value for name, value in found.items()}
    values |= chance(data.train.labels, outcome.labels, len(data.classes))
    values |= {"note/lr": outcome.rule.lr, "note/features": float(outcome.dim)}
    if len(config.weight_decay) * len(config.optimizer) > 1:
        values |= {"note/weight decay": outcome.rule.weight_decay}
        values |= {"note/lars": float(outcome.rule.optimizer == "lars")}
    return values


def pictures(
    backbone: Backbone, data: ClassifyData, config: Config, cache: FeatureCache | None = None
) -> dict[str, Image.Image]:
    """Return the confusion matrix; the trained layers are those `run` left in the cache."""
    outcome = _outcome(backbone, data, config, cache)
    top1 = accuracies(outcome.scores, outcome.labels)["top1"]
    named = marked(data.protocol, "linear", config)
    title = f"{named}: top-1 {top1:.1f} %, lr {outcome.rule.lr:g} chosen on {outcome.chosen_on}"
    said = outcome.scores.argmax(1)
    return {"confusion": confusion_sheet(outcome.labels, said, data.classes, title)}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the chosen classifier says of the validation images."""

    scores: Tensor  # [m, C]
    labels: Tensor  # int64 [m]
    rule: Rule
    chosen_on: Literal["held-out", "val", "nothing"]
    dim: int


def _outcome(
    backbone: Backbone, data: ClassifyData, config: Config, cache: FeatureCache | None
) -> Outcome:
    """Train, choose a classifier, and score the validation images."""
    check_size((config.size,), backbone.stride)
    reader = Readout(backbone, *_reading(backbone, config))
    train, apart = _apart(data, config)
    settings = config.model_dump_json(exclude={"workers", "extract_batch"})
    key = content_key("heads", data.protocol, data.content, settings)
    heads = _trained(reader, train, data, config, cache, key)

    def scores_of(split: LabelledPictures, name: str) -> tuple[Tensor, Tensor]:
        features, labels = _embedded(reader, split, name, data, config, cache)
        rows = [heads.scores(part.float()).cpu() for part in features.split(1024)]
        return torch.cat(rows, dim=1), labels.cpu()  # [L, n, C], [n]

    val_scores, val_labels = scores_of(data.val, "val")
    chosen_on = "nothing"
    best = 0
    rules = config.rules()
    if len(rules) > 1:
        chosen_on = config.select
        judged, truth = (val_scores, val_labels) if apart is None else scores_of(apart, "held-out")
        hits = (judged.argmax(2) == truth).float().mean(1)  # [L]
        best = int(hits.argmax())  # the smallest rate on ties
    return Outcome(val_scores[best], val_labels, rules[best], chosen_on, reader.dim)


def _apart(data: ClassifyData, config: Config) -> tuple[LabelledPictures, LabelledPictures | None]:
    """What is trained on, and what the classifier is chosen on (None: val, or nothing to choose)."""
    if config.select == "val" or len(config.rules()) == 1:
        return data.train, None
    mask = held_out(data.train.labels, _SHARE, config.seed)
    if not mask.any():
        raise UserError(
            f"linear: {len(mask)} training images leave none to choose the learning rate on; give one "
            "(lr=0.1), or select=val"
        )
    return data.train.subset(~mask), data.train.subset(mask)


def _trained(
    reader: Readout,
    train: LabelledPictures,
    data: ClassifyData,
    config: Config,
    cache: FeatureCache | None,
    key: str,
) -> Heads:
    """Train the heads, from the last epoch a cache has of them."""
    device = next(reader.parameters()).device
    heads = Heads(config.rules(), len(data.classes), reader.dim, seed=config.seed, device=device)
    folder = cache.job(key) if cache else None
    saved = checkpoint.load_newest(folder) if folder else None
    start = start_of_all(saved["step"] if saved else 0, folder)
    if saved is not None:
        heads.load({name: value.to(device) for name, value in saved["heads"].items()})
    if start == config.epochs:
        return heads
    batches, batch_size, steps = _batches(reader, train, data, config, cache)
    progress = tqdm(
        range(start, config.epochs), initial=start, total=config.epochs, desc="linear",
        unit="epoch", leave=False, disable=True if rank() else None,
    )  # fmt: skip
    for epoch in progress:
        for number, (x, labels) in enumerate(batches(epoch)):
            step = Step(epoch * steps + number, steps, config.epochs)
            heads.step(x, labels, _schedule(config).at(step) * batch_size / _LR_BATCH)
        # Epochs on cached features take milliseconds: only the last one is worth a file.
        if folder and rank() == 0 and (config.variant == "augmented" or epoch == config.epochs - 1):
            checkpoint.save(folder, {"step": epoch + 1, "heads": heads.state()}, keep=1)
    return heads


def _batches(
    reader: Readout,
    train: LabelledPictures,
    data: ClassifyData,
    config: Config,
    cache: FeatureCache | None,
) -> tuple[Any, int, int]:
    """A function from an epoch to its batches (features [B, D], labels [B]), their size, and how many."""
    device = next(reader.parameters()).device
    if config.variant == "cached":
        features, labels = _embedded(reader, train, "train", data, config, cache)
        # Every rank has all features and takes every batch whole: their gradients are equal.
        order = Order(len(labels), min(config.batch_size, len(labels)), seed=config.seed)

        def cached(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
            for index in order.batches(epoch):
                rows = torch.from_numpy(index)
                yield features[rows].float(), labels[rows]

        return cached, order.batch_size, order.steps_per_epoch
    crops = TrainingCrops(
        train.pictures,
        train.labels,
        Augmentation(config.size, config.crop_resampling, config.crop_scale, config.randaugment),
        batch_size=config.batch_size,
        seed=config.seed,
        workers=config.workers,
        omitted=data.omitted,
    )

    erase = RandomErasing(config.erase, mode="pixel", device=device.type)

    def augmented(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        reader.eval()
        for number, (images, labels) in enumerate(crops.epoch(epoch)):
            x = normalised(images.to(device, non_blocking=True))
            if config.erase:
                with seeded(int(key_of(config.seed, STREAM, epoch, number, rank()))):
                    x = erase(x)
            enabled = config.precision == "bf16"
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled):
                features = reader(x)
            yield features.clone(), labels.to(device)

    return augmented, crops.batch_size, crops.steps_per_epoch


def _reading(backbone: Backbone, config: Config) -> tuple[Pool, int]:
    """Tokens and blocks to read: those asked for, else iBOT's for this network."""
    vit = isinstance(backbone, ViTBackbone)
    wide = backbone.dim >= 768
    pool: Pool = "cls"
    if config.pool != "auto":
        pool = config.pool
    elif vit and wide:
        pool = "cls+mean"
    depth = len(backbone.trunk.blocks) if vit else 1  # pyright: ignore
    blocks = min(4, depth) if vit and not wide and pool == "cls" else 1
    return pool, config.blocks or blocks


def _schedule(config: Config) -> Schedule:
    if config.schedule == "cosine":
        return Schedule(start=1.0, end=0.0, shape="cosine", per="epoch")
    marks = (0.6 * config.epochs, 0.8 * config.epochs)
    return Schedule(start=1.0, shape="multistep", milestones=marks)


def _embedded(
    reader: Readout,
    split: LabelledPictures,
    name: str,
    data: ClassifyData,
    config: Config,
    cache: FeatureCache | None,
) -> tuple[Tensor, Tensor]:
    """Features of centre crops, float16 [n, D], and labels int64 [n], on the network's device."""
    resize = shorter_side(config.size)
    extracted = extract(
        reader,
        split.pictures,
        lambda picture: read_picture(picture, resize, config.size, config.resampling),
        lambda features: features.half(),
        batch_size=config.extract_batch,
        key=content_key(
            *("linear", name, config.size, resize, config.resampling, reader.pool, reader.blocks),
            *(len(split.pictures), config.seed, data.content),
        ),
        cache=cache,
        omitted=data.omitted,
        label=name,
        precision=config.precision,
    )
    device = next(reader.parameters()).device
    return extracted.features.to(device), split.labels[extracted.kept].to(device)
