"""A backbone and its detector: Faster, Mask and Cascade Mask R-CNN of one to three stages.

In training the losses of a batch, in the test the answers for it. All boxes are in the pixels of the images
as they come in; images of a batch are padded at the right and the bottom.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import clip_boxes_to_image

from dense_ssl.backbones import Backbone
from dense_ssl.evaluation.detection.boxes import (
    Answer,
    BoxPredictor,
    RegionPooler,
    Sampled,
    Target,
    answer,
    box_losses,
    refined,
    sample_regions,
)
from dense_ssl.evaluation.detection.masks import MaskHead, mask_loss, positives
from dense_ssl.evaluation.detection.protocols import DetectConfig
from dense_ssl.evaluation.detection.rpn import Proposals
from dense_ssl.evaluation.detection.trunks import C4, DetectTrunk, SimplePyramid, make_trunk
from dense_ssl.evaluation.features import normalised
from dense_ssl.evaluation.trained.optimizer import num_layers, trained_optimizer

_WEIGHTS = (1.0, 0.5, 0.25)  # of the losses of a cascade's stages
_DIVISOR = 32  # that a batch's sides are padded to, of pyramids
_BOX_CELLS, _MASK_CELLS = 7, 14  # sides of a region's map


class Detector(nn.Module):
    """Trunk, proposals, and stages of region heads."""

    def __init__(self, trunk: DetectTrunk, classes: int, config: DetectConfig) -> None:
        super().__init__()
        self.trunk, self._config = trunk, config
        c4 = isinstance(trunk, C4)
        self.multiple = trunk.multiple if c4 else math.lcm(_DIVISOR, trunk.multiple)
        channels = trunk.channels
        self.rpn = Proposals(channels, trunk.strides, config)
        strides = trunk.strides if c4 else trunk.strides[:4]
        # The fourth stage of a C4 halves its regions: it is given twice the cells.
        self.pool_boxes = RegionPooler(strides, 2 * _BOX_CELLS if c4 else _BOX_CELLS)
        self.pool_masks = self.pool_boxes if c4 else RegionPooler(strides, _MASK_CELLS)
        self.shared = _SharedStage(trunk) if c4 else None
        stages = range(len(config.overlaps))
        self.box_heads = nn.ModuleList(_box_head(trunk, config) for _ in stages)
        features = trunk.last_channels if c4 else config.hidden
        self.predictors = nn.ModuleList(BoxPredictor(features, classes, stage) for stage in stages)
        self.mask_heads = nn.ModuleList()
        if config.masks:
            inner = trunk.last_channels if c4 else channels
            self.mask_heads.extend(
                MaskHead(inner, config.width, classes, deep=not c4, normed="mask" in config.normed)
                for _ in stages
            )

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor] | list[tuple[Answer, Tensor | None]]:
        """Return the losses by name, or, without targets, the answers with their masks.

        Args:
            images: uint8 [3, h, w] each.
            targets: their objects, in training.

        Masks are float [n, s, s] in 0..1, of the answers' boxes.
        """
        batch = self._batch(images)
        maps = self.trunk(batch.tensors)
        named = {str(level): x for level, x in enumerate(maps)}
        goals = None if targets is None else [{"boxes": target.boxes} for target in targets]
        proposals, losses = self.rpn(batch, named, goals)
        if targets is not None:
            losses = {"objects": losses["loss_objectness"], "anchors": losses["loss_rpn_box_reg"]}
            return losses | self._region_losses(maps, proposals, targets, batch.image_sizes)
        return self._answers(maps, proposals, batch.image_sizes)

    def _batch(self, images: Sequence[Tensor]) -> ImageList:
        """The images, normalised, then padded with zeros at the right and the bottom."""
        sizes = [(int(image.shape[1]), int(image.shape[2])) for image in images]
        height, width = (
            math.ceil(max(sides) / self.multiple) * self.multiple for sides in zip(*sizes)
        )
        device = next(self.parameters()).device
        batch = torch.zeros(len(images), 3, height, width, device=device)
        for row, image, (h, w) in zip(batch, images, sizes):
            row[:, :h, :w] = normalised(image.to(device, non_blocking=True)[None])[0]
        return ImageList(batch.contiguous(memory_format=torch.channels_last), sizes)

    def _features(self, maps: list[Tensor], regions: Sequence[Tensor], stage: int) -> Any:
        """A vector per region, and, of a C4, the map that its mask is made of."""
        cells = self.pool_boxes(maps, regions)
        if self.shared is not None:
            cells = self.shared(cells)
            return cells.mean((2, 3)), cells
        return self.box_heads[stage](cells), None

    def _region_losses(
        self,
        maps: list[Tensor],
        proposals: list[Tensor],
        targets: Sequence[Target],
        sizes: Sequence[tuple[int, int]],
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for stage, overlap in enumerate(self._config.overlaps):
            sampled = sample_regions(proposals, targets, overlap, self._config.rois)
            regions = [part.boxes for part in sampled]
            features, cells = self._features(maps, regions, stage)
            predictor = self._predictor(stage)
            scores, deltas = predictor(features)
            found = box_losses(scores, deltas, sampled, predictor, self._config.box_loss)
            ending = str(stage + 1) if len(self._config.overlaps) > 1 else ""
            for name, value in zip(("classes", "boxes"), found):
                losses[name + ending] = _WEIGHTS[stage] * value
            if self._config.masks:
                value = self._mask_loss(maps, sampled, targets, cells, stage)
                losses["masks" + ending] = _WEIGHTS[stage] * value
            if stage + 1 < len(self._config.overlaps):
                proposals = _next_regions(scores, deltas, sampled, predictor, sizes)
        return losses

    def _mask_loss(
        self,
        maps: list[Tensor],
        sampled: Sequence[Sampled],
        targets: Sequence[Target],
        cells: Tensor | None,
        stage: int,
    ) -> Tensor:
        regions, labels, masks = positives(sampled, targets)
        if not len(labels):  # every parameter takes part in every step: ranks wait for one another
            return sum(p.sum() for p in self.mask_heads[stage].parameters()) * 0.0  # pyright: ignore
        if cells is not None:
            chosen = cells[torch.cat([part.labels for part in sampled]) > 0]
        else:
            chosen = self.pool_masks(maps, regions)
        return mask_loss(self.mask_heads[stage](chosen), torch.cat(regions), labels, masks)

    def _answers(
        self, maps: list[Tensor], proposals: list[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[tuple[Answer, Tensor | None]]:
        """Scores are means over the stages, boxes the last one's, masks means over the stages."""
        regions, total = proposals, torch.zeros(())
        stages = len(self._config.overlaps)
        counts = [len(boxes) for boxes in proposals]
        deltas, predictor = torch.zeros(()), self._predictor(0)
        for stage in range(stages):
            predictor = self._predictor(stage)
            scores, deltas = predictor(self._features(maps, regions, stage)[0])
            total = scores if stage == 0 else total + scores
            if stage + 1 < stages:
                nothing = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
                moved = refined(scores, deltas, torch.cat(regions), nothing, predictor)
                regions = [
                    clip_boxes_to_image(boxes, size)
                    for boxes, size in zip(moved.split(counts), sizes)
                ]
        boxes = predictor.boxes(deltas, torch.cat(regions))
        parts = zip((total / stages).split(counts), boxes.split(counts), sizes)
        answers = [answer(*part, self._config.detections) for part in parts]
        masks = self._masks(maps, answers) if self._config.masks else [None] * len(answers)
        return list(zip(answers, masks, strict=True))

    def _masks(self, maps: list[Tensor], answers: Sequence[Answer]) -> list[Tensor]:
        labels = torch.cat([said.labels for said in answers])
        cells = self.pool_masks(maps, [said.boxes for said in answers])
        if self.shared is not None:
            cells = self.shared(cells)
        row = torch.arange(len(labels), device=labels.device)
        masks = torch.stack([head(cells).float().sigmoid() for head in self.mask_heads]).mean(0)
        return list(masks[row, labels - 1].split([len(said.labels) for said in answers]))

    def _predictor(self, stage: int) -> BoxPredictor:
        predictor = self.predictors[stage]
        assert isinstance(predictor, BoxPredictor)
        return predictor


class _SharedStage(nn.Module):
    """A ResNet's fourth stage on regions, and one BatchNorm more behind it (MoCo)."""

    def __init__(self, trunk: C4) -> None:
        super().__init__()
        self.stage = trunk.last_stage()
        self.norm = nn.BatchNorm2d(trunk.last_channels)

    def forward(self, cells: Tensor) -> Tensor:
        return self.norm(self.stage(cells))


def build(backbone: Backbone, classes: int, config: DetectConfig) -> Detector:
    """Return the network of a protocol, its heads drawn by the seed; `classes` without the background.

    Raises:
        UserError: the protocol is for another kind of backbone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Detector(make_trunk(backbone, config), classes, config)


def make_optimizer(model: Detector, config: DetectConfig) -> Optimizer:
    """Return the protocol's optimiser; every group has `lr_scale`, the factor of its layer."""
    return trained_optimizer(model, config, depth=num_layers(inner_trunk(model)))


def inner_trunk(model: Detector) -> nn.Module:
    """Return the model of timm within."""
    trunk: Any = model.trunk
    if isinstance(trunk, SimplePyramid):
        return trunk.levels.backbone.trunk
    if isinstance(trunk, C4):
        return trunk.backbone.trunk
    maps = trunk.maps
    return getattr(maps, "levels", maps).backbone.trunk


def _box_head(trunk: DetectTrunk, config: DetectConfig) -> nn.Module:
    """Regions [R, D, 7, 7] to vectors [R, hidden]; nothing for a C4, whose last stage does it."""
    if isinstance(trunk, C4):
        return nn.Identity()
    D = trunk.channels
    if config.box_head == "layers":
        return TwoMLPHead(D * _BOX_CELLS**2, config.hidden)
    norm = nn.BatchNorm2d if "box" in config.normed else None
    cells = (D, _BOX_CELLS, _BOX_CELLS)
    return FastRCNNConvFCHead(cells, [D] * 4, [config.hidden], norm_layer=norm)


def _next_regions(
    scores: Tensor,
    deltas: Tensor,
    sampled: Sequence[Sampled],
    predictor: BoxPredictor,
    sizes: Sequence[tuple[int, int]],
) -> list[Tensor]:
    """The proposals of the next stage: this one's boxes, without the objects that were put among them."""
    with torch.no_grad():
        regions = torch.cat([part.boxes for part in sampled])
        labels = torch.cat([part.labels for part in sampled])
        moved = refined(scores, deltas, regions, labels, predictor)
        parts = moved.split([len(part.labels) for part in sampled])
        return [
            clip_boxes_to_image(boxes, size)[~part.given]
            for boxes, size, part in zip(parts, sizes, sampled)
        ]
