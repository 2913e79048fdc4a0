"""Masks of regions (Mask R-CNN, He et al. 2017): the head, its targets, and masks put back into images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.ops import roi_align as align

from dense_ssl.evaluation.coco import Rle
from dense_ssl.evaluation.detection.boxes import Sampled, Target

_CONVOLUTIONS = 4
_CHANNELS = 256  # behind the deconvolution


class MaskHead(nn.Sequential):
    """Maps of regions [R, D, s, s] to a mask per class [R, C, 2 s, 2 s], as logits."""

    def __init__(
        self, channels: int, width: int, classes: int, *, deep: bool, normed: bool
    ) -> None:
        """Draw the head; deep: four convolutions before the deconvolution, else none (C4)."""
        norm = nn.BatchNorm2d if normed else None
        layers: list[nn.Module] = []
        if deep:
            layers.append(MaskRCNNHeads(channels, (width,) * _CONVOLUTIONS, 1, norm_layer=norm))
        up = nn.ConvTranspose2d(width if deep else channels, width, 2, 2)
        last = nn.Conv2d(width, classes, 1)
        nn.init.kaiming_normal_(up.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(up.bias)  # pyright: ignore[reportArgumentType]
        nn.init.normal_(last.weight, std=0.001)  # detectron2
        nn.init.zeros_(last.bias)  # pyright: ignore[reportArgumentType]
        super().__init__(*layers, up, nn.ReLU(), last)


def mask_loss(logits: Tensor, regions: Tensor, labels: Tensor, targets: Sequence[Tensor]) -> Tensor:
    """Return the mean binary cross-entropy of the labels' masks.

    Args:
        logits: [R, C, s, s].
        regions: float [R, 4], positives alone, image by image.
        labels: int64 [R], from 1.
        targets: of every image, the objects' masks of its regions, uint8 [r, h, w].
    """
    size = logits.shape[-1]
    wanted = []
    for masks, boxes in zip(targets, regions.split([len(masks) for masks in targets])):
        number = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)
        places = torch.cat([number[:, None], boxes], dim=1)
        sampled = align(masks[:, None].to(boxes.dtype), places, size, 1.0, 0, aligned=True)
        wanted.append(sampled[:, 0] >= 0.5)
    said = logits[torch.arange(len(labels), device=labels.device), labels - 1]
    return F.binary_cross_entropy_with_logits(said.float(), torch.cat(wanted).float())


def positives(
    sampled: Sequence[Sampled], targets: Sequence[Target]
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Return the positive regions of each image, their labels, and their objects' masks."""
    at = [(part.labels > 0).nonzero()[:, 0] for part in sampled]
    regions = [part.boxes[index] for part, index in zip(sampled, at)]
    labels = torch.cat([part.labels[index] for part, index in zip(sampled, at)])
    masks = []
    for part, index, target in zip(sampled, at, targets):
        assert target.masks is not None
        masks.append(target.masks[part.objects[index]])
    return regions, labels, masks


def pasted(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return masks [n, s, s] in 0..1 stretched over boxes [n, 4] of an image, bool [n, height, width].

    Bilinear at pixel centres; beyond the centres of the outer cells a mask fades to nothing.
    """
    height, width = size
    out = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    for number, (mask, box) in enumerate(zip(masks, boxes.tolist())):
        x0, y0, x1, y1 = box
        # Half a cell around the box is where a faded mask can still be above one half: it cannot.
        left, right = max(int(x0), 0), min(int(x1) + 1, width)
        top, bottom = max(int(y0), 0), min(int(y1) + 1, height)
        if left >= right or top >= bottom or x1 <= x0 or y1 <= y0:
            continue
        x = (torch.arange(left, right, device=mask.device) + 0.5 - x0) / (x1 - x0) * 2 - 1
        y = (torch.arange(top, bottom, device=mask.device) + 0.5 - y0) / (y1 - y0) * 2 - 1
        grid = torch.stack(
            [x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1
        )  # [rows, columns, 2]
        part = F.grid_sample(mask[None, None], grid[None].to(mask.dtype), align_corners=False)
        out[number, top:bottom, left:right] = part[0, 0] >= 0.5
    return out


def encoded(masks: np.ndarray) -> tuple[Rle, ...]:
    """Return masks uint8 or bool [n, h, w] as COCO's compressed run lengths."""
    columns = np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8))
    runs: Any = rle.encode(columns)
    return tuple(runs)
