"""Backbones as the segmentation protocols take them: maps of several depths, trained with the head.

The backbone they are made of stays as it is.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dense_ssl.backbones import Backbone, ResNetBackbone, ViTBackbone, make_backbone
from dense_ssl.config import UserError


class ResNetStages(nn.Module):
    """The four stages of a ResNet, the last two at the strides and dilations of a protocol."""

    def __init__(
        self,
        backbone: Backbone,
        strides: tuple[int, int],
        dilations: tuple[int, int],
        *,
        contracted: bool,
    ) -> None:
        """Set every 3 x 3 convolution of stages three and four.

        Args:
            backbone: a ResNet; its own output stride does not matter.
            strides: of the two stages, 1 or 2 each.
            dilations: of the two stages.
            contracted: the first block of a dilated stage takes half the dilation.

        Raises:
            UserError: it is no ResNet, or one that pools between its stages.
        """  # fmt: skip
        super().__init__()
        if not isinstance(backbone, ResNetBackbone):
            raise UserError(
                f"segment-fcn: {backbone.config.name} is no ResNet, which this protocol dilates; take "
                "segment-upernet or segment-fpn"
            )
        self.backbone = _twin(backbone, output_stride=32)
        trunk: Any = self.backbone.trunk
        for stage, stride, dilation in zip((trunk.layer3, trunk.layer4), strides, dilations):
            for number, block in enumerate(stage):
                first = number == 0
                halved = contracted and first and dilation > 1
                _set_block(block, stride if first else 1, dilation // 2 if halved else dilation)
        self.channels = _stage_channels(trunk)
        self.strides = (4, 8, 8 * strides[0], 8 * strides[0] * strides[1])
        self.multiple = 1  # that the sides of an image must be of

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps of all stages of normalised images [B, 3, H, W], finest first."""
        trunk: Any = self.backbone.trunk
        x = images.contiguous(memory_format=torch.channels_last)
        x = trunk.maxpool(trunk.act1(trunk.bn1(trunk.conv1(x))))
        maps = []
        for stage in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4):
            x = stage(x)
            maps.append(x)
        return maps


class ViTLevels(nn.Module):
    """A ViT's cells after four of its blocks."""

    def __init__(
        self,
        backbone: Backbone,
        size: tuple[int, int],
        *,
        evenly: bool,
        normed: bool,
        class_tokens: bool,
        drop_path: float,
        again: bool = False,
    ) -> None:
        """Resample the positions once to the training crop's grid; they are trained as they are then.

        Args:
            backbone: a ViT.
            size: height and width of the training crop in pixels.
            evenly: after a quarter, a half, three quarters and all of the blocks (2, 5, 8, 11 of 0 to 11);
                else after a third, a half, two thirds and all (3, 5, 7, 11).
            normed: all four levels pass the final norm.
            class_tokens: False leaves them out of the sequence.
            drop_path: stochastic depth while training.
            again: they are resampled again to every image's grid, by DINO's rule where it applies.

        Raises:
            UserError: it is no ViT, or has too few blocks.
        """
        super().__init__()
        if not isinstance(backbone, ViTBackbone):
            raise UserError(
                f"{backbone.config.name}: no ViT, whose blocks this protocol reads; take segment-fcn"
            )
        by_dino = again and has_plain_positions(backbone)
        twin = _twin(backbone, drop_path=drop_path, positions="dino" if by_dino else "timm")
        assert isinstance(twin, ViTBackbone)
        self.backbone = twin
        _resample_positions(twin, (size[0] // twin.stride, size[1] // twin.stride))
        trunk: Any = twin.trunk
        self.blocks = tap_blocks(len(trunk.blocks), evenly)
        self.channels = (twin.dim,) * 4
        self.strides = (twin.stride,) * 4
        self.multiple = twin.stride
        self._normed, self._class_tokens = normed, class_tokens
        if not normed:
            trunk.norm = nn.Identity()  # no parameter is left without a gradient
        if not class_tokens:
            for token in (trunk.cls_token, trunk.reg_token):
                if token is not None:
                    token.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return four maps [B, D, h, w] of normalised images, the first block's first."""
        return self.backbone.maps_after(
            images, self.blocks, normed=self._normed, class_tokens=self._class_tokens
        )


class Pyramid(nn.Module):
    """Four maps of one stride made into strides 1/4, 1/2, 1 and 2 times that (iBOT)."""

    def __init__(self, levels: ViTLevels) -> None:
        super().__init__()
        self.levels = levels
        self.channels, self.multiple = levels.channels, levels.multiple
        stride = levels.strides[0]
        self.strides = (stride // 4, stride // 2, stride, stride * 2)
        D = levels.channels[0]
        self.finest = nn.Sequential(
            nn.ConvTranspose2d(D, D, 2, 2), nn.BatchNorm2d(D), nn.GELU(), nn.ConvTranspose2d(D, D, 2, 2)
        )  # fmt: skip
        self.finer = nn.ConvTranspose2d(D, D, 2, 2)
        self.coarser = nn.MaxPool2d(2)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the four maps of normalised images, finest first."""
        a, b, c, d = self.levels(images)
        return [self.finest(a), self.finer(b), c, self.coarser(d)]


class Cells(nn.Module):
    """The last map alone; a ViT's before its final norm."""

    def __init__(self, backbone: Backbone, size: tuple[int, int], drop_path: float) -> None:
        super().__init__()
        if isinstance(backbone, ViTBackbone):
            twin = _twin(backbone, drop_path=drop_path, positions="timm")
            assert isinstance(twin, ViTBackbone)
            _resample_positions(twin, (size[0] // twin.stride, size[1] // twin.stride))
            twin.trunk.norm = nn.Identity()
        else:
            twin = _twin(backbone)
        self.backbone = twin
        self.channels, self.strides = (twin.dim,), (twin.stride,)
        self.multiple = twin.stride

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one map [B, D, h, w] of normalised images."""
        features = self.backbone(images)
        return [features.dense.transpose(1, 2).unflatten(2, features.grid)]


def tap_blocks(depth: int, evenly: bool) -> tuple[int, ...]:
    """Return the four blocks, from 0, whose cells are read of a ViT with `depth` of them.

    Raises:
        UserError: there are fewer than four.
    """
    if depth < 4:
        raise UserError(f"the ViT has {depth} blocks; four levels are read")
    shares = (1, 2, 3, 4) if evenly else (4 / 3, 2, 8 / 3, 4)
    return tuple(max(round(share * depth / 4) - 1, level) for level, share in enumerate(shares))


def has_plain_positions(backbone: ViTBackbone) -> bool:
    """Return whether a ViT's table holds positions of its class tokens and its patches."""
    trunk: Any = backbone.trunk
    return trunk.pos_embed is not None and not trunk.no_embed_class


def _twin(backbone: Backbone, **changed: Any) -> Backbone:
    """A copy with other settings that no weight depends on."""
    if not isinstance(backbone, ResNetBackbone | ViTBackbone):
        return copy.deepcopy(backbone)
    if isinstance(backbone, ResNetBackbone):
        changed["bn_groups"] = 1
    with torch.random.fork_rng(devices=[]):  # the random weights are replaced
        twin = make_backbone(backbone.config.model_copy(update=changed))
    twin.load_state_dict(backbone.state_dict())
    return twin


def _set_block(block: Any, stride: int, dilation: int) -> None:
    """Give a residual block another stride, and all its 3 x 3 convolutions a dilation."""
    convolutions = [m for m in (block.conv1, block.conv2) if m.kernel_size == (3, 3)]
    for number, convolution in enumerate(convolutions):
        convolution.stride = (stride, stride) if number == 0 else (1, 1)
        convolution.dilation = convolution.padding = (dilation, dilation)
    if block.downsample is None:
        return
    if not any(isinstance(m, nn.AvgPool2d) for m in block.downsample.modules()):
        block.downsample[0].stride = (stride, stride)
    elif stride == 1:
        raise UserError(
            "segment-fcn: this ResNet pools between its stages, and cannot be dilated as published; "
            "take a plain one"
        )


def _stage_channels(trunk: Any) -> tuple[int, ...]:
    return tuple(
        (stage[-1].conv3 if hasattr(stage[-1], "conv3") else stage[-1].conv2).out_channels
        for stage in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4)
    )


@torch.no_grad()
def _resample_positions(backbone: ViTBackbone, grid: tuple[int, int]) -> None:
    """Bring the position table to another grid, bicubic by size, as the published loaders do."""
    trunk: Any = backbone.trunk
    if trunk.pos_embed is None:
        return
    first = 0 if trunk.no_embed_class else trunk.num_prefix_tokens
    table = trunk.pos_embed
    maps = table[:, first:].unflatten(1, trunk.patch_embed.grid_size).permute(0, 3, 1, 2)
    if tuple(maps.shape[2:]) != grid:
        maps = F.interpolate(maps.float(), size=grid, mode="bicubic", align_corners=False)
    cells = maps.permute(0, 2, 3, 1).flatten(1, 2)
    trunk.pos_embed = nn.Parameter(torch.cat([table[:, :first], cells], dim=1))
    trunk.patch_embed.set_input_size((grid[0] * backbone.stride, grid[1] * backbone.stride))
