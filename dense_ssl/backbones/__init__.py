"""Backbones: a timm trunk behind one output type.

`Features` is all a method or an evaluation ever sees of a network. ResNets give their last map as a
grid of cells, ViTs their patch tokens; both are `[B, N, D]`, row-major, with the grid's height and width.
"""

from dense_ssl.backbones.features import (
    Backbone,
    BackboneConfig,
    ClassHead,
    Features,
    Projection,
)
from dense_ssl.backbones.resnet import ResNetBackbone
from dense_ssl.backbones.vit import ViTBackbone
from dense_ssl.config import UserError

__all__ = ["Backbone", "BackboneConfig", "ClassHead", "Features", "Projection", "make_backbone"]


def make_backbone(config: BackboneConfig) -> Backbone:
    """Return the freshly initialised backbone that `config` describes (random weights).

    Raises:
        UserError: timm has no such model, or it is neither a ResNet nor a ViT.
    """
    name = config.name
    if name.startswith(("resnet", "wide_resnet", "resnext", "test_resnet")):
        return ResNetBackbone(config)
    if name.startswith(("vit_", "deit_", "test_vit")):
        return ViTBackbone(config)
    raise UserError(
        f"method.backbone.name: {name!r} is not supported; take a timm ResNet (resnet18, resnet50, "
        "resnet101, ...) or ViT (vit_small_patch16_224, ...)"
    )
