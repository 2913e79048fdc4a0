"""Boxes of regions: sampling, losses, refinement and suppression (Fast R-CNN; Cascade R-CNN).

Regions and objects are boxes float [n, 4] of x0, y0, x1, y1 in the pixels of the network's input. Label 0 is
the background. Each class has its own box.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import (
    BalancedPositiveNegativeSampler,
    BoxCoder,
    Matcher,
)
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, generalized_box_iou_loss
from torchvision.ops import roi_align as align

_POSITIVE_SHARE = 0.25  # of the sampled regions
_GIOU_WEIGHT = 10.0  # iBOT
_LEAST_SCORE, _OVERLAP = 0.05, 0.5  # of an answer; above which the lower of two is suppressed
# What the deltas of a stage are divided by (Cai & Vasconcelos 2018): a later stage refines less.
DEVIATIONS = (
    (0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067)
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """The objects of one image."""

    boxes: Tensor  # float [n, 4]
    labels: Tensor  # int64 [n], from 1
    masks: Tensor | None  # uint8 [n, h, w]


@dataclass(frozen=True, slots=True)
class Sampled:
    """Regions of one image that are learnt from."""

    boxes: Tensor  # float [R, 4]
    labels: Tensor  # int64 [R]
    objects: Tensor  # int64 [R], the object of a positive; 0 for others
    goals: Tensor  # float [R, 4], the box of that object
    given: Tensor  # bool [R], the object itself, put among the proposals


@dataclass(frozen=True, slots=True)
class Answer:
    """Detections of one image, best first."""

    boxes: Tensor  # float [n, 4]
    scores: Tensor  # float [n]
    labels: Tensor  # int64 [n], from 1


class BoxPredictor(nn.Module):
    """Features of regions to class scores and one box per class."""

    def __init__(self, features: int, classes: int, stage: int) -> None:
        super().__init__()
        self.scores = nn.Linear(features, classes + 1)
        self.deltas = nn.Linear(features, classes * 4)
        for layer, deviation in ((self.scores, 0.01), (self.deltas, 0.001)):  # Fast R-CNN
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)
        x, y, w, h = (1 / part for part in DEVIATIONS[stage])
        self.coder = BoxCoder((x, y, w, h))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores [R, 1 + C] and deltas [R, C, 4] of features [R, F], in float32."""
        return self.scores(features).float(), self.deltas(features).float().unflatten(1, (-1, 4))

    def boxes(self, deltas: Tensor, regions: Tensor) -> Tensor:
        """Return the boxes [R, C, 4] that deltas make of regions [R, 4]."""
        return self.coder.decode_single(deltas.flatten(1), regions).unflatten(1, (-1, 4))


def sample_regions(
    proposals: Sequence[Tensor], targets: Sequence[Target], overlap: float, count: int
) -> list[Sampled]:
    """Return `count` regions of each image's proposals and objects, a quarter positive at most.

    Positive is what overlaps an object by `overlap` or more.
    """
    match = Matcher(overlap, overlap, allow_low_quality_matches=False)
    sample = BalancedPositiveNegativeSampler(count, _POSITIVE_SHARE)
    found = []
    for regions, target in zip(proposals, targets, strict=True):
        boxes = torch.cat([regions, target.boxes])
        given = torch.arange(len(boxes), device=boxes.device) >= len(regions)
        objects = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        labels = torch.zeros_like(objects)
        goals = torch.zeros_like(boxes)
        if len(target.boxes):
            matched = match(box_iou(target.boxes, boxes))
            objects = matched.clamp(min=0)
            labels = torch.where(matched >= 0, target.labels[objects], 0)
            goals = target.boxes[objects]
        positive, negative = (mask[0].bool() for mask in sample([labels]))
        chosen = positive | negative
        found.append(
            Sampled(boxes[chosen], labels[chosen], objects[chosen], goals[chosen], given[chosen])
        )
    return found


def box_losses(
    scores: Tensor, deltas: Tensor, sampled: Sequence[Sampled], predictor: BoxPredictor, how: str
) -> tuple[Tensor, Tensor]:
    """Return the losses of classes and boxes, both divided by the number of regions.

    how: `l1` of the deltas, or `giou` of the boxes, ten times (Rezatofighi et al. 2019).
    """
    labels = torch.cat([part.labels for part in sampled])
    of_classes = F.cross_entropy(scores, labels)
    at = labels.nonzero()[:, 0]
    regions = torch.cat([part.boxes for part in sampled])[at]
    goals = torch.cat([part.goals for part in sampled])[at]
    said = deltas[at, labels[at] - 1]
    if how == "giou":
        boxes = predictor.boxes(said[:, None], regions)[:, 0]
        total = _GIOU_WEIGHT * generalized_box_iou_loss(boxes, goals, reduction="sum")
    else:
        wanted = predictor.coder.encode_single(goals, regions)
        total = F.l1_loss(said, wanted, reduction="sum")
    return of_classes, total / max(len(labels), 1)


def refined(
    scores: Tensor, deltas: Tensor, regions: Tensor, labels: Tensor, predictor: BoxPredictor
) -> Tensor:
    """Return regions [R, 4] moved by the box of their label; of the likeliest class for background."""
    likeliest = scores[:, 1:].argmax(1) + 1
    chosen = torch.where(labels > 0, labels, likeliest) - 1
    own = deltas[torch.arange(len(deltas), device=deltas.device), chosen]
    return predictor.boxes(own[:, None], regions)[:, 0]


def answer(scores: Tensor, boxes: Tensor, size: tuple[int, int], most: int) -> Answer:
    """Return the detections of one image from class logits [R, 1 + C] and boxes [R, C, 4].

    Above a score of 0.05, without boxes that overlap a better one of the same class by more than 0.5.
    """
    chances = scores.softmax(1)[:, 1:]
    boxes = clip_boxes_to_image(boxes, size)
    sides = boxes[..., 2:] - boxes[..., :2]
    likely = (chances > _LEAST_SCORE) & (sides > 0).all(-1)
    region, label = likely.nonzero(as_tuple=True)
    chosen, chances = boxes[region, label], chances[region, label]
    kept = batched_nms(chosen, chances, label, _OVERLAP)[:most]
    return Answer(chosen[kept], chances[kept], label[kept] + 1)


class RegionPooler(nn.Module):
    """Maps within regions, by bilinear samples at exact places (RoIAlign, aligned).

    A region of 224 x 224 px is read of the level of stride 16, one of twice the side of the level above, and
    so on (Lin et al. 2017, eq. 1).
    """

    def __init__(self, strides: Sequence[int], size: int) -> None:
        """Read maps of these strides (those for regions) at size x size points."""
        super().__init__()
        self._strides, self._size = tuple(strides), size

    def forward(self, maps: Sequence[Tensor], regions: Sequence[Tensor]) -> Tensor:
        """Return float [R, C, size, size] for the regions of all images."""
        levels = self.levels(torch.cat(list(regions)))
        image = torch.cat(
            [torch.full_like(boxes[:, :1], number) for number, boxes in enumerate(regions)]
        )
        boxes = torch.cat([image, torch.cat(list(regions))], dim=1)
        places, parts = [], []
        for level, (stride, values) in enumerate(zip(self._strides, maps)):
            at = (levels == level).nonzero()[:, 0]
            # Also of a level without a region, so that every map has its share in the gradient.
            places.append(at)
            parts.append(align(values.float(), boxes[at], self._size, 1 / stride, 0, aligned=True))
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts).index_select(0, torch.cat(places).argsort())

    def levels(self, boxes: Tensor) -> Tensor:
        """Return the level of each box, int64 [R]."""
        if len(self._strides) == 1:
            return torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        side = (boxes[:, 2:] - boxes[:, :2]).prod(1).clamp(min=0).sqrt()
        level = torch.floor(torch.log2(side / 224 * (16 / self._strides[0]) + 1e-6))
        return level.clamp(0, len(self._strides) - 1).long()
