"""Semantic segmentation by a network trained end to end; `segment_protocols` has the numbers.

A job keeps its state beside the features' cache every few minutes: what was interrupted goes on from
there to the same weights. Several ranks: torchrun -m dense_ssl.evaluation segment-fcn ...; on GPUs they
share their batch statistics.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from tqdm import tqdm

from dense_ssl.backbones import Backbone
from dense_ssl.config import UserError
from dense_ssl.distributed import rank, world_size
from dense_ssl.evaluation.features import FeatureCache, content_key, normalised, thinned
from dense_ssl.evaluation.label_maps import MOST_CLASSES, VOID, WIDE_VOID, LabelledImage
from dense_ssl.evaluation.metrics import confusion, foreground_f, segmentation_scores
from dense_ssl.evaluation.omissions import Omissions
from dense_ssl.evaluation.ranks import everyone, share_buffers
from dense_ssl.evaluation.segmentation.crops import TrainingCrops, read_sample
from dense_ssl.evaluation.segmentation.data import SegmentData, open_segmentation
from dense_ssl.evaluation.segmentation.inference import predict
from dense_ssl.evaluation.segmentation.model import (
    Segmenter,
    build,
    make_optimizer,
    segmentation_loss,
)
from dense_ssl.evaluation.segmentation.protocols import TrainedConfig
from dense_ssl.evaluation.tinted import class_sheet
from dense_ssl.evaluation.trained.job import Job, synchronise_norms
from dense_ssl.evaluation.trained.loop import drawn_for, take_steps

STREAM = int.from_bytes(b"segstep", "big")  # dropout and drop path: a seed per (step, rank)
_WIDE_CLASSES = 30_000
_COUNTED = 500  # training images that the commonest class is counted in
_DRAWN = 4


def load(path: Path, config: TrainedConfig) -> SegmentData:
    """Return the data at `path`, in any layout that `segment_layouts` lists, or COCO's.

    Raises:
        UserError: it is none of them, or nothing in it is usable.
    """
    data = open_segmentation(
        path, config.labels, config.max_train, config.max_val, config.train_split, _WIDE_CLASSES
    )
    return replace(data, protocol=config.protocol(data.layout))


def run(
    backbone: Backbone, data: SegmentData, config: TrainedConfig, cache: FeatureCache | None = None
) -> dict[str, float]:
    """Return `mIoU`, `aAcc`, `mAcc` in percent, and `chance/...`: the commonest class everywhere.

    Of ImageNet-S also `F-measure`, the mean over images of that of the foreground.

    Raises:
        UserError: the protocol cannot take the backbone, training diverges, or a split is all void.
    """
    model = _trained(backbone, data, config, cache)
    matrix, foregrounds = _judged(model, data, config, data.omitted)
    if not matrix.any():
        raise UserError("val: every pixel is void")
    commonest = _commonest(data)
    chance = torch.zeros_like(matrix)
    chance[:, commonest] = matrix.sum(1)
    values, by_chance = segmentation_scores(matrix), segmentation_scores(chance)
    if data.layout == "imagenet-s":
        own, everywhere = (100 * float(mean) for mean in np.mean(foregrounds, axis=0))
        values["F-measure"], by_chance["F-measure"] = own, everywhere if commonest else 0.0
    return values | {f"chance/{name}": value for name, value in by_chance.items()}


def pictures(
    backbone: Backbone, data: SegmentData, config: TrainedConfig, cache: FeatureCache | None = None
) -> dict[str, Image.Image]:
    """Return predictions beside the truth; the weights are those `run` left in the cache."""
    model = _trained(backbone, data, config, cache)
    rows = []
    for image, said, truth in _answers(model, thinned(data.val, _DRAWN), config):
        if not isinstance(said, str):
            rows.append((image, said, truth))
    names, rows = _fewer_classes(rows, data.classes)
    return {"predictions": class_sheet(rows, names, data.protocol)} if rows else {}


def _trained(
    backbone: Backbone, data: SegmentData, config: TrainedConfig, cache: FeatureCache | None
) -> Segmenter:
    """The network after its run, as selected."""
    device = next(backbone.parameters()).device
    model = build(backbone, len(data.classes), config).to(device)
    if world_size() > 1 and device.type == "cuda":
        for part in (model.trunk, model.head, model.auxiliary):
            synchronise_norms(part)
    model.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, config)
    crops = TrainingCrops(data.train, config, data.omitted)
    if crops.micro_batch < 2 and any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        raise UserError("batch_size: two images per rank and micro-batch at least, for BatchNorm")
    # How the test is made changes no weight: its other ways find the network trained.
    settings = config.model_dump_json(exclude={"workers", "test_scales", "test_flip"})
    key = content_key(config.task, data.layout, data.content, settings)
    job = Job(cache.job(key) if cache else None)
    start = job.resume(model, optimizer)
    total = config.total_steps(crops.steps_per_epoch)
    if start < total:
        _train(model, optimizer, crops, data, config, job, start, total)
    if job.best is not None:
        model.load_state_dict(job.best["model"])
    return model.eval()


def _train(
    model: Segmenter,
    optimizer: Optimizer,
    crops: TrainingCrops,
    data: SegmentData,
    config: TrainedConfig,
    job: Job,
    start: int,
    total: int,
) -> None:
    """Take the steps from `start` up to `total`."""
    device = next(model.parameters()).device
    trained = DistributedDataParallel(model) if world_size() > 1 else model
    batches = crops.batches(start, total)

    def loss_of(step: int, micro: int) -> Tensor:
        images, labels = next(batches)
        images = normalised(images.to(device, non_blocking=True))
        with drawn_for(config, STREAM, step, micro, device):
            scores = trained(images.contiguous(memory_format=torch.channels_last))
        return segmentation_loss(scores, labels.to(device), config)

    def select(done: int) -> None:
        if config.select == "best" and (done == total or done % crops.steps_per_epoch == 0):
            share_buffers(model)
            job.compare(model, _mean_iou(model, data, config.single()))
            model.train()

    take_steps(
        model, optimizer, config, job, start=start, total=total,
        steps_per_epoch=crops.steps_per_epoch, loss_of=loss_of, after=select,
    )  # fmt: skip


def _mean_iou(model: Segmenter, data: SegmentData, config: TrainedConfig) -> float:
    return segmentation_scores(_judged(model, data, config, Omissions())[0])["mIoU"]


def _judged(
    model: Segmenter, data: SegmentData, config: TrainedConfig, omitted: Omissions
) -> tuple[Tensor, list[tuple[float, float]]]:
    """The confusion matrix over the validation split, of all ranks together.

    Of ImageNet-S also the F-measure of each image's foreground: as predicted, and if it were everywhere.
    """
    classes = len(data.classes)
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    lost: list[tuple[str, str]] = []
    foregrounds: list[tuple[float, float]] = []
    shown = tqdm(
        _answers(model, data.val[rank() :: world_size()], config),
        total=len(data.val[rank() :: world_size()]), desc="val", unit="img", leave=False,
        disable=True if rank() else None,
    )  # fmt: skip
    for image, said, truth in shown:
        if isinstance(said, str):
            lost.append((str(image), said))
        else:
            matrix += confusion(torch.from_numpy(truth), torch.from_numpy(said), classes)
            if data.layout == "imagenet-s":
                everywhere = foreground_f(truth, np.ones_like(truth))
                foregrounds.append((foreground_f(truth, said), everywhere))
    for name, reason in (pair for part in everyone(lost) for pair in part):
        omitted.add("val: image not readable", f"{name}: {reason}")
    together = [pair for part in everyone(foregrounds) for pair in part]
    return torch.stack(everyone(matrix)).sum(0), together


def _answers(
    model: Segmenter, images: Sequence[LabelledImage], config: TrainedConfig
) -> Iterator[tuple[LabelledImage, Any, np.ndarray]]:
    """Every image with its predicted classes int64 [H, W] (or why there are none) and the true ones."""
    device = next(model.parameters()).device
    model.eval()
    for image in images:
        try:
            pixels, truth = read_sample(image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            yield image, str(error), np.empty(0)
            continue
        with torch.autocast(device.type, torch.bfloat16, config.precision == "bf16"):
            said = predict(model.scores, pixels, config, multiple=model.multiple, device=device)
        yield image, said, truth


def _commonest(data: SegmentData) -> int:
    """The class of most pixels in training masks, evenly spaced ones."""
    counts = np.zeros(len(data.classes), np.int64)
    for image in thinned(data.train, _COUNTED):
        try:
            labels = read_sample(image)[1]
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
        counts += np.bincount(labels[labels != WIDE_VOID], minlength=len(counts))
    if not counts.any():
        raise UserError("train: every pixel is void")
    return int(counts.argmax())


def _fewer_classes(
    rows: Sequence[tuple[LabelledImage, np.ndarray, np.ndarray]], classes: Sequence[str]
) -> tuple[Sequence[str], list[tuple[LabelledImage, np.ndarray, np.ndarray]]]:
    """The same maps with VOID, and only the occurring classes where there are too many for a picture."""
    kept = np.arange(len(classes))
    if len(classes) > MOST_CLASSES:
        kept = np.unique(np.concatenate([m[m >= 0] for row in rows for m in row[1:]]))
    numbers = np.full(len(classes) + 1, VOID, np.uint8)
    numbers[kept] = np.arange(len(kept))  # the last one is for -1
    fewer = [(image, numbers[said], numbers[truth]) for image, said, truth in rows]
    return [classes[number] for number in kept.tolist()], fewer
