"""Backbones as detectors take them: the C4 map, or a pyramid of five levels of one width.

The backbone they are made of stays as it is.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork

from dense_ssl.backbones import Backbone, ResNetBackbone, ViTBackbone
from dense_ssl.config import UserError
from dense_ssl.evaluation.detection.protocols import DetectConfig
from dense_ssl.evaluation.segmentation.trunks import Pyramid, ResNetStages, ViTLevels


class C4(nn.Module):
    """A ResNet up to its third stage: one map of stride 16; the fourth is the heads' (`last_stage`)."""

    def __init__(self, backbone: Backbone, config: DetectConfig) -> None:
        super().__init__()
        stages = _stages(backbone, config)
        self.backbone = stages.backbone
        self.channels, self.last_channels = stages.channels[2], stages.channels[3]
        trunk: Any = self.backbone.trunk
        self._taken = trunk.layer4
        trunk.layer4 = nn.Identity()
        self.strides, self.multiple = (16,), 16

    def last_stage(self) -> nn.Module:
        """Return the fourth stage, and give it away."""
        stage = self._taken
        del self._taken
        return stage

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the map [B, C, h / 16, w / 16] of normalised images."""
        trunk: Any = self.backbone.trunk
        x = images.contiguous(memory_format=torch.channels_last)
        x = trunk.maxpool(trunk.act1(trunk.bn1(trunk.conv1(x))))
        return [trunk.layer3(trunk.layer2(trunk.layer1(x)))]


class FpnTrunk(nn.Module):
    """A feature pyramid (Lin et al. 2017) on four maps, and a fifth by leaving out every other cell."""

    def __init__(self, maps: ResNetStages | Pyramid, width: int, *, normed: bool) -> None:
        super().__init__()
        self.maps = maps
        norm = nn.BatchNorm2d if normed else None
        self.fpn = FeaturePyramidNetwork(list(maps.channels), width, norm_layer=norm)
        self.channels = width
        self.strides = (*maps.strides, 2 * maps.strides[-1])
        self.multiple = maps.strides[-1]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return five maps [B, width, h, w] of normalised images, finest first."""
        named = OrderedDict((str(level), x) for level, x in enumerate(self.maps(images)))
        maps = list(self.fpn(named).values())
        return [*maps, F.max_pool2d(maps[-1], 1, 2)]


class SimplePyramid(nn.Module):
    """Five levels from a ViT's last map alone (Li et al. 2022, arXiv:2203.16527), with LayerNorm."""

    def __init__(self, backbone: Backbone, config: DetectConfig) -> None:
        super().__init__()
        self.levels = _vit_levels(backbone, config, class_tokens=True)
        stride, D = self.levels.strides[0], self.levels.channels[0]
        half, quarter = max(D // 2, 1), max(D // 4, 1)
        self.channels = width = config.width
        self.strides = (stride // 4, stride // 2, stride, stride * 2, stride * 4)
        self.multiple = stride * 2
        scaled = [
            nn.Sequential(
                nn.ConvTranspose2d(D, half, 2, 2), _MapNorm(half), nn.GELU(),
                nn.ConvTranspose2d(half, quarter, 2, 2),
            ),
            nn.ConvTranspose2d(D, half, 2, 2),
            nn.Identity(),
            nn.MaxPool2d(2),
        ]  # fmt: skip
        self.scaled = nn.ModuleList(scaled)
        self.lateral = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, width, 1, bias=False), _MapNorm(width),
                nn.Conv2d(width, width, 3, padding=1, bias=False), _MapNorm(width),
            )
            for channels in (quarter, half, D, D)
        )  # fmt: skip

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return five maps [B, width, h, w] of normalised images, finest first."""
        last = self.levels(images)[-1]
        maps = [lateral(scaled(last)) for scaled, lateral in zip(self.scaled, self.lateral)]
        return [*maps, F.max_pool2d(maps[-1], 1, 2)]


class _MapNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map [B, C, h, w]."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


DetectTrunk = C4 | FpnTrunk | SimplePyramid


def make_trunk(backbone: Backbone, config: DetectConfig) -> DetectTrunk:
    """Return the trunk of a protocol.

    Raises:
        UserError: the protocol is for another kind of backbone.
    """
    head, normed = config.of.head, "neck" in config.normed
    if head == "c4":
        return C4(backbone, config)
    if head == "stages":
        return FpnTrunk(_stages(backbone, config), config.width, normed=normed)
    if head == "simple":
        return SimplePyramid(backbone, config)
    levels = _vit_levels(backbone, config, class_tokens=head != "tokenless")
    return FpnTrunk(Pyramid(levels), config.width, normed=normed)


def _stages(backbone: Backbone, config: DetectConfig) -> ResNetStages:
    if not isinstance(backbone, ResNetBackbone):
        raise UserError(
            f"detect settings={config.settings}: {backbone.config.name} is no ResNet; for ViTs there are "
            "coco-cascade-small-1x, coco-cascade-base-1x, coco-mask-1x and coco-simple-1x (masks=false on "
            "VOC)"
        )
    return ResNetStages(backbone, (2, 2), (1, 1), contracted=False)


def _vit_levels(backbone: Backbone, config: DetectConfig, *, class_tokens: bool) -> ViTLevels:
    """A ViT's maps after its blocks 3, 5, 7 and 11 of 0 to 11, before its final norm."""
    if not isinstance(backbone, ViTBackbone):
        raise UserError(
            f"detect settings={config.settings}: {backbone.config.name} is no ViT; for ResNets there are "
            "voc-c4, coco-c4-1x, coco-c4-2x and coco-fpn-1x"
        )
    trunk: Any = backbone.trunk
    stride = backbone.stride
    grid = trunk.patch_embed.grid_size
    size = config.position_size or (grid[0] * stride, grid[1] * stride)
    return ViTLevels(
        backbone,
        size,
        evenly=False,
        normed=False,
        class_tokens=class_tokens,
        drop_path=config.drop_path,
        again=True,
    )
