"""Object detection and instance segmentation by a network trained end to end.

`detect_protocols` has the numbers, each set under the name `detect/SETTINGS/v1`. A job keeps its state beside
the features' cache every few minutes: what was interrupted goes on from there to the same weights. Several
ranks: torchrun -m dense_ssl.evaluation detect ...; on GPUs they share their batch statistics.
"""

from collections import Counter
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
from dense_ssl.evaluation.detection.augment import (
    Example,
    TrainingExamples,
    at_test_size,
    read_image,
)
from dense_ssl.evaluation.detection.boxes import Target
from dense_ssl.evaluation.detection.data import DetectData, Scene, open_detection, trainable
from dense_ssl.evaluation.detection.masks import encoded, pasted
from dense_ssl.evaluation.detection.metrics import Found, coco_scores, voc_scores
from dense_ssl.evaluation.detection.model import Detector, build, make_optimizer
from dense_ssl.evaluation.detection.pictures import detection_sheet
from dense_ssl.evaluation.detection.protocols import DetectConfig
from dense_ssl.evaluation.features import FeatureCache, content_key, thinned
from dense_ssl.evaluation.ranks import everyone
from dense_ssl.evaluation.trained.job import Job, synchronise_norms
from dense_ssl.evaluation.trained.loop import drawn_for, take_steps
from dense_ssl.evaluation.trained.samples import UNREADABLE, TrainingSamples

Config = DetectConfig
STREAM = int.from_bytes(b"detect", "big")  # this module's branch of the random numbers of a seed
_STEPS = int.from_bytes(b"detstep", "big")  # sampled regions and drop path: a seed per (step, rank)
_DRAWN = 4


def load(path: Path, config: DetectConfig) -> DetectData:
    """Return the data at `path`, COCO's or VOC's layout.

    Raises:
        UserError: it is neither, nothing in it is usable, or the settings are of the other one.
    """
    data = open_detection(path, config.max_train, config.max_val, config.train_years)
    config.check_layout(data.layout)
    learnt = {scene.path for scene in _learnt(data)}
    for scene in data.train:
        if scene.path not in learnt:
            data.omitted.add("train: image without an object to learn", str(scene))
    return replace(data, protocol=config.protocol(data.layout))


def run(
    backbone: Backbone, data: DetectData, config: DetectConfig, cache: FeatureCache | None = None
) -> dict[str, float]:
    """Return average precisions in percent, and `chance/...` of the same boxes in every image.

    COCO: `box-AP`, `box-AP50`, ... `mask-AP`, ...; VOC: `AP`, `AP50`, `AP75`.

    Raises:
        UserError: the protocol cannot take the backbone, or training diverges.
    """
    model = _trained(backbone, data, config, cache)
    scenes, found = _found(model, data, config)
    if not scenes:
        raise UserError("test: no image can be read")
    if not any(len(said.scores) for said in found):
        data.omitted.add(
            "test: nothing is found", f"in {len(scenes)} images no score is above 0.05"
        )
    values = _scores(scenes, found, data, config.masks)
    for name in _absent(scenes, data):
        data.omitted.add("test: class of no object, in no mean", name)
    blind = _blind(_learnt(data), config)
    fixed = [_laid(blind, scene, masks=config.masks) for scene in scenes]
    by_chance = _scores(scenes, fixed, data, config.masks)
    return values | {f"chance/{name}": value for name, value in by_chance.items()}


def pictures(
    backbone: Backbone, data: DetectData, config: DetectConfig, cache: FeatureCache | None = None
) -> dict[str, Image.Image]:
    """Return detections beside the truth; the weights are those `run` left in the cache."""
    model = _trained(backbone, data, config, cache)
    scenes = [scene for scene in data.val if scene.things]
    rows = []
    for scene in thinned(scenes, _DRAWN):
        try:
            rows.append((scene, _detect(model, scene, config)))
        except UNREADABLE:
            continue
    return {"detections": detection_sheet(rows, data.classes, data.protocol)} if rows else {}


def _learnt(data: DetectData) -> tuple[Scene, ...]:
    """What is trained on; detectron2 learns VOC's difficult objects."""
    return trainable(data.train, difficult=data.layout == "voc")


def _trained(
    backbone: Backbone, data: DetectData, config: DetectConfig, cache: FeatureCache | None
) -> Detector:
    """The network after its run."""
    device = next(backbone.parameters()).device
    model = build(backbone, len(data.classes), config).to(device)
    if world_size() > 1 and device.type == "cuda":
        synchronise_norms(model)
    model.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, config)
    show = TrainingExamples(config)
    samples = TrainingSamples(_learnt(data), show, config, data.omitted, stream=STREAM)
    settings = config.model_dump_json(exclude={"workers"})
    key = content_key(config.task, data.protocol, data.content, settings)
    job = Job(cache.job(key) if cache else None)
    start = job.resume(model, optimizer)
    total = config.total_steps(samples.steps_per_epoch)
    if start < total:
        _train(model, optimizer, samples, config, job, start, total)
    return model.eval()


def _train(
    model: Detector,
    optimizer: Optimizer,
    samples: TrainingSamples[Scene, Example],
    config: DetectConfig,
    job: Job,
    start: int,
    total: int,
) -> None:
    """Take the steps from `start` up to `total`, then the final statistics."""
    trained = DistributedDataParallel(model) if world_size() > 1 else model
    batches = samples.batches(start, total + -(-config.bn_steps // config.accumulate))

    def loss_of(step: int, micro: int) -> Tensor:
        losses = _losses(trained, next(batches), config, step, micro)
        loss = torch.stack(list(losses.values())).sum()
        if not loss.isfinite():  # proposals wait for the device anyway
            raise _diverged(losses, step)
        return loss

    take_steps(
        model, optimizer, config, job, start=start, total=total,
        steps_per_epoch=samples.steps_per_epoch, loss_of=loss_of,
        last=lambda: _settle_norms(model, batches, config, total),
    )  # fmt: skip


def _losses(
    model: nn.Module, examples: Sequence[Example], config: DetectConfig, step: int, micro: int
) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    images = [torch.from_numpy(example.image).permute(2, 0, 1) for example in examples]
    targets = [
        Target(
            torch.from_numpy(example.boxes).to(device),
            torch.from_numpy(example.labels).to(device),
            None if example.masks is None else torch.from_numpy(example.masks).to(device),
        )
        for example in examples
    ]
    with drawn_for(config, _STEPS, step, micro, device):
        return model(images, targets)


def _diverged(losses: dict[str, Tensor], step: int) -> UserError:
    bad = [name for name, value in losses.items() if not value.isfinite()]
    return UserError(
        f"training diverged at step {step}: the loss of {', '.join(bad)} is not finite; lower lr, or take "
        "a longer warmup or precision=fp32"
    )


@torch.no_grad()
def _settle_norms(
    model: Detector, batches: Iterator[list[Example]], config: DetectConfig, total: int
) -> None:
    """Set running statistics to their means over `bn_steps` batches (detectron2's precise BatchNorm)."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not config.bn_steps or not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
    for number in tqdm(range(config.bn_steps), desc="BatchNorm", leave=False, disable=None):
        _losses(model, next(batches), config, total + number, 0)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def _found(
    model: Detector, data: DetectData, config: DetectConfig
) -> tuple[list[Scene], list[Found]]:
    """The test images that can be read, and what is found in them, of all ranks together."""
    share = range(rank(), len(data.val), world_size())
    found: dict[int, Found | str] = {}
    for number in tqdm(
        share, desc="test", unit="img", leave=False, disable=True if rank() else None
    ):
        try:
            found[number] = _detect(model, data.val[number], config)
        except UNREADABLE as error:
            found[number] = " ".join(str(error).split()) or type(error).__name__
    scenes, answers = [], []
    for number, said in sorted(pair for part in everyone(list(found.items())) for pair in part):
        if isinstance(said, str):
            data.omitted.add("test: image not readable", f"{data.val[number]}: {said}")
        else:
            scenes.append(data.val[number])
            answers.append(said)
    return scenes, answers


@torch.inference_mode()
def _detect(model: Detector, scene: Scene, config: DetectConfig) -> Found:
    """What is found in one image, in the pixels of its file.

    Raises:
        OSError, ValueError, SyntaxError: it cannot be read.
    """
    device = next(model.parameters()).device
    pixels = at_test_size(read_image(scene), config)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    model.eval()
    with torch.autocast(device.type, torch.bfloat16, config.precision == "bf16"):
        answers: Any = model([image])
    said, masks = answers[0]
    factor = said.boxes.new_tensor(
        [scene.width / pixels.shape[1], scene.height / pixels.shape[0]]
    ).repeat(2)
    boxes = said.boxes * factor
    runs = None
    if masks is not None:
        runs = encoded(pasted(masks, boxes, (scene.height, scene.width)).cpu().numpy())
    return Found(
        boxes.cpu().numpy(), said.scores.float().cpu().numpy(), said.labels.cpu().numpy(), runs
    )


def _scores(
    scenes: Sequence[Scene], found: Sequence[Found], data: DetectData, masks: bool
) -> dict[str, float]:
    if data.layout == "voc":
        return voc_scores(scenes, found, data.classes)[0]
    values = {f"box-{name}": x for name, x in coco_scores(scenes, found, by="bbox").items()}
    if masks:
        by_mask = coco_scores(scenes, found, by="segm")
        values |= {f"mask-{name}": x for name, x in by_mask.items()}
    return values


def _absent(scenes: Sequence[Scene], data: DetectData) -> list[str]:
    there = {thing.label for scene in scenes for thing in scene.things if not thing.ignored}
    return [name for label, name in enumerate(data.classes, 1) if label not in there]


def _blind(scenes: Sequence[Scene], config: DetectConfig) -> list[tuple[np.ndarray, int, float]]:
    """What an answer that ignores the image would be: objects of training images as they lie.

    Boxes in shares of the image, labels, and how common the class is as a score.
    """
    things = [(scene, thing) for scene in scenes for thing in scene.things]
    counts = Counter(thing.label for _, thing in things)
    return [
        (
            np.array(thing.box) / np.tile([scene.width, scene.height], 2),
            thing.label,
            counts[thing.label] / len(things),
        )
        for scene, thing in thinned(things, config.detections)
    ]


def _laid(blind: Sequence[tuple[np.ndarray, int, float]], scene: Scene, *, masks: bool) -> Found:
    """The same objects in another image."""
    boxes = np.stack([box for box, _, _ in blind]) * np.tile([scene.width, scene.height], 2)
    scores = np.array([score for _, _, score in blind])
    labels = np.array([label for _, label, _ in blind])
    whole = torch.ones(len(boxes), 28, 28)  # of a few cells the corners would fade
    size = (scene.height, scene.width)
    runs = encoded(pasted(whole, torch.from_numpy(boxes), size).numpy()) if masks else None
    return Found(boxes, scores, labels, runs)
