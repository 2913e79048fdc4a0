"""Finer grids of a ResNet's cells than it was trained with, for protocols that compare single cells.

ViTs keep their patches.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dense_ssl.backbones import Backbone, ResNetBackbone, make_backbone
from dense_ssl.config import UserError


def dilated(backbone: Backbone, stride: int) -> Backbone:
    """Return the backbone with cells of at most `stride` pixels: a ResNet with its last stages dilated.

    Weights are those of `backbone`; it is left as it was, and returned itself where its cells are small
    enough, or patches.

    stride: 8 or 16.
    """
    if not isinstance(backbone, ResNetBackbone) or backbone.stride <= stride:
        return backbone
    with torch.random.fork_rng(devices=[]):  # the random weights are replaced
        finer = make_backbone(backbone.config.model_copy(update={"output_stride": stride}))
    finer.load_state_dict(backbone.state_dict())
    finer.to(next(backbone.parameters()).device).to(memory_format=torch.channels_last)
    return finer.train(backbone.training)


class ThirdStage(nn.Module):
    """A ResNet up to its third stage, whose convolutions take steps of one: stride 8, nothing dilated.

    Jabri et al. 2020 propagate labels with these features.
    """

    stride = 8

    def __init__(self, backbone: ResNetBackbone) -> None:
        """Copy the stages of `backbone`, in eval mode.

        Raises:
            UserError: its stages are strided by other means than convolutions and a shortcut's pooling.
        """
        super().__init__()
        trunk: Any = copy.deepcopy(backbone.trunk)
        trunk.layer4 = nn.Identity()
        for block in trunk.layer3:
            for module in block.modules():
                if isinstance(module, nn.Conv2d):
                    module.stride = (1, 1)
            if isinstance(block.downsample, nn.Sequential) and isinstance(
                block.downsample[0], nn.AvgPool2d
            ):
                block.downsample[0] = nn.Identity()  # as timm builds it where nothing is strided
        layers = [module for module in trunk.layer3.modules() if not len(list(module.children()))]
        if any(getattr(layer, "stride", 1) not in (1, (1, 1)) for layer in layers):
            raise UserError(
                f"{backbone.config.name}: its third stage does not run at stride {self.stride}; take a "
                "plain ResNet"
            )
        self.trunk: Any = trunk.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return the map [B, D, ceil(H / 8), ceil(W / 8)] of normalised images [B, 3, H, W]."""
        return self.trunk.forward_features(images)
