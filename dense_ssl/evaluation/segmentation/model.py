"""A backbone and a head trained together for segmentation, and what the optimiser is told of them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from dense_ssl.backbones import Backbone, ResNetBackbone
from dense_ssl.evaluation.features import check_size
from dense_ssl.evaluation.segmentation.heads import (
    CellHead,
    FcnHead,
    FpnHead,
    LinearHead,
    RevisitingFcn,
    UperHead,
)
from dense_ssl.evaluation.segmentation.protocols import TrainedConfig
from dense_ssl.evaluation.segmentation.trunks import Cells, Pyramid, ResNetStages, ViTLevels
from dense_ssl.evaluation.trained.optimizer import num_layers, trained_groups, trained_optimizer

Trunk = ResNetStages | ViTLevels | Pyramid | Cells
_RESNET_WIDTH = 512  # of UperNet on a ResNet


class Segmenter(nn.Module):
    """Normalised images to class scores, and to those of an auxiliary head where there is one."""

    def __init__(
        self,
        trunk: Trunk,
        head: nn.Module,
        auxiliary: nn.Module | None = None,
        *,
        frozen: bool = False,
    ) -> None:
        """Put a head on maps; `frozen` keeps the trunk's weights and statistics as they are."""
        super().__init__()
        self.trunk, self.head, self.auxiliary, self.frozen = trunk, head, auxiliary, frozen
        self.multiple = trunk.multiple
        if frozen:
            trunk.requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return scores [B, C, h, w] and the auxiliary ones, None when not training."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.trunk(images)
        auxiliary = self.auxiliary(maps) if self.auxiliary is not None and self.training else None
        return self.head(maps), auxiliary

    def scores(self, images: Tensor) -> Tensor:
        """Return the scores alone."""
        return self(images)[0]

    def train(self, mode: bool = True) -> "Segmenter":
        """Set training mode, but not of a frozen trunk."""
        super().train(mode)
        if self.frozen:
            self.trunk.eval()
        return self


def build(backbone: Backbone, classes: int, config: TrainedConfig) -> Segmenter:
    """Return the network of a protocol, its head drawn by the seed.

    Raises:
        UserError: the protocol is for another kind of backbone, or the crop is no multiple of the patch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return _BUILDERS[config.of.head](backbone, classes, config)


def segmentation_loss(
    scores: tuple[Tensor, Tensor | None], labels: Tensor, config: TrainedConfig
) -> Tensor:
    """Return the cross-entropy of scores and auxiliary scores against labels int [B, h, w].

    Labels of -1 count as no loss. Scores are enlarged to the labels, or both brought to `loss_stride`.
    """
    if config.loss_stride is not None:
        size = [side // config.loss_stride for side in labels.shape[1:]]
        labels = F.interpolate(labels[:, None].float(), size=size, mode="nearest")[:, 0]
    labels = labels.long()
    counted = (labels != -1).sum() if config.loss_over == "labelled" else labels.numel()
    total = scores[0].new_zeros((), dtype=torch.float32)
    for part, weight in zip(scores, (1.0, config.aux_weight)):
        if part is None:
            continue
        maps = F.interpolate(
            part.float(),
            size=labels.shape[1:],
            mode="bilinear",
            align_corners=config.align_corners,
        )
        total = total + weight * F.cross_entropy(maps, labels, ignore_index=-1, reduction="sum")
    return total / (counted if isinstance(counted, int) else counted.clamp(min=1))


def make_optimizer(model: Segmenter, config: TrainedConfig) -> Optimizer:
    """Return the protocol's optimiser; every group has `lr_scale`, the factor of its layer."""
    return trained_optimizer(model, config, depth=num_layers(_inner_trunk(model)))


def parameter_groups(model: Segmenter, config: TrainedConfig) -> list[dict[str, Any]]:
    """Return the trained parameters, a group per layer's factor and weight decay."""
    return trained_groups(model, config, depth=num_layers(_inner_trunk(model)))


def _inner_trunk(model: Segmenter) -> Any:
    """The model of timm within."""
    levels = model.trunk.levels if isinstance(model.trunk, Pyramid) else model.trunk
    return levels.backbone.trunk


def _fcn(backbone: Backbone, classes: int, config: TrainedConfig) -> Segmenter:
    """Revisiting: the last stage dilated as a whole, stride 16."""
    trunk = ResNetStages(backbone, (2, 1), (1, 2), contracted=False)
    return Segmenter(trunk, RevisitingFcn(trunk.channels[-1], classes, config.dilation))


def _fcn_d8(backbone: Backbone, classes: int, config: TrainedConfig) -> Segmenter:
    """DenseCL: stride 8, and an auxiliary head on the third stage."""
    trunk = ResNetStages(backbone, (1, 1), (2, 4), contracted=True)
    head = FcnHead(trunk.channels[3], classes, level=3, width=512, depth=2, concat=True)
    auxiliary = FcnHead(trunk.channels[2], classes, level=2, width=256, depth=1, concat=False)
    return Segmenter(trunk, head, auxiliary)


def _upernet(backbone: Backbone, classes: int, config: TrainedConfig) -> Segmenter:
    trunk = _pyramid(backbone, config, evenly=False, class_tokens=True)
    vit = isinstance(trunk, Pyramid)
    head = UperHead(trunk.channels, classes, trunk.channels[0] if vit else _RESNET_WIDTH)
    auxiliary = FcnHead(trunk.channels[2], classes, level=2, width=256, depth=1, concat=False)
    return Segmenter(trunk, head, auxiliary)


def _fpn(backbone: Backbone, classes: int, config: TrainedConfig) -> Segmenter:
    """UDI: every level at the stride of the patches, no class token in the sequence."""
    if isinstance(backbone, ResNetBackbone):
        return _fpn_pyramid(backbone, classes, config)
    check_size(config.size, backbone.stride)
    trunk = ViTLevels(
        backbone,
        config.size,
        evenly=True,
        normed=config.normed,
        class_tokens=False,
        drop_path=config.drop_path,
    )
    return Segmenter(trunk, FpnHead(trunk.channels, trunk.strides, classes))


def _fpn_pyramid(backbone: Backbone, classes: int, config: TrainedConfig) -> Segmenter:
    trunk = _pyramid(backbone, config, evenly=True, class_tokens=False)
    return Segmenter(trunk, FpnHead(trunk.channels, trunk.strides, classes))


def _linear(backbone: Backbone, classes: int, config: TrainedConfig) -> Segmenter:
    check_size(config.size, backbone.stride)
    trunk = ViTLevels(
        backbone,
        config.size,
        evenly=False,
        normed=config.normed,
        class_tokens=True,
        drop_path=0.0,
    )
    return Segmenter(trunk, LinearHead(trunk.channels, classes), frozen=True)


def _cells(backbone: Backbone, classes: int, config: TrainedConfig) -> Segmenter:
    check_size(config.size, backbone.stride)
    trunk = Cells(backbone, config.size, config.drop_path)
    return Segmenter(trunk, CellHead(trunk.channels[0], classes))


def _pyramid(
    backbone: Backbone, config: TrainedConfig, *, evenly: bool, class_tokens: bool
) -> Pyramid | ResNetStages:
    """Four strides: a ResNet's stages, or a ViT's blocks with adapters."""
    if isinstance(backbone, ResNetBackbone):
        return ResNetStages(backbone, (2, 2), (1, 1), contracted=False)
    check_size(config.size, backbone.stride)
    levels = ViTLevels(
        backbone,
        config.size,
        evenly=evenly,
        normed=config.normed,
        class_tokens=class_tokens,
        drop_path=config.drop_path,
    )
    return Pyramid(levels)


_BUILDERS = {
    "fcn": _fcn,
    "fcn-d8": _fcn_d8,
    "upernet": _upernet,
    "fpn": _fpn,
    "fpn-pyramid": _fpn_pyramid,
    "linear": _linear,
    "cells": _cells,
}
