"""What a backbone returns, and what every backbone is."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from dense_ssl.config import Config, UserError


class BackboneConfig(Config):
    """Which network, and the few things about it that change results."""

    name: str = "resnet50"  # a timm model name
    init: Literal["fan_in", "fan_out", "timm", "dino"] = (
        "fan_in"  # ResNets: Kaiming normal; ViTs: dino
    )
    positions: Literal["timm", "dino"] = "timm"  # ViTs: how positions are resampled to another grid
    output_stride: Literal[8, 16, 32] = 32  # ResNets: dilate the last stages below 32
    bn_groups: Annotated[int, Field(ge=1)] = 1  # batch statistics over this many groups of samples
    bn_images: Annotated[int, Field(ge=2)] | None = None  # in its place: images of a group
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0  # ViTs: stochastic depth
    class_tokens: Annotated[int, Field(ge=1)] = 1  # ViTs: all but the first are timm's reg_tokens

    @model_validator(mode="after")
    def _check(self) -> "BackboneConfig":
        if self.bn_images is not None and self.bn_groups > 1:
            raise ValueError(
                "bn_groups follows from bn_images and the number of ranks; set bn_images=null to choose it"
            )
        return self


@dataclass(frozen=True, slots=True)
class Features:
    """What a backbone says of B images."""

    cls: Tensor  # [B, T, D]  class tokens; a ResNet's one is its average-pooled map
    dense: Tensor  # [B, N, D]  one vector per cell, row-major
    grid: tuple[int, int]  # rows, columns; N = rows * columns
    hidden: Tensor | None = None  # [B, N, D]  a ViT's cells before its final norm


@dataclass(frozen=True, slots=True)
class Projection:
    """The first layer of the head that a backbone was trained under; no part of its state."""

    weight: Tensor  # [hidden, D]
    bias: Tensor  # [hidden]
    activation: Literal["gelu", "relu"]  # after it


@dataclass(frozen=True, slots=True)
class ClassHead:
    """The head of class tokens that a backbone was trained under (DINO's); no part of its state.

    Linear layers with GELUs between them, a unit vector, and its products with the prototypes.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]  # weight [out, in] and bias [out] of each
    prototypes: Tensor  # [K, d]

    def logits(self, tokens: Tensor) -> Tensor:
        """Return float32 logits [B, K] of class tokens [B, D], on their device."""
        x = tokens.float()
        for number, (weight, bias) in enumerate(self.layers):
            x = F.linear(F.gelu(x) if number else x, weight.to(x), bias.to(x))
        return F.normalize(x, dim=-1) @ self.prototypes.to(x).T

    def tensors(self) -> dict[str, Tensor]:
        """Return all of it by name."""
        named = {"prototypes": self.prototypes}
        for number, (weight, bias) in enumerate(self.layers):
            named |= {f"{number}.weight": weight, f"{number}.bias": bias}
        return named

    def fresh(self) -> "ClassHead":
        """Return one of the same sizes with new random weights, as training starts with."""
        layers = tuple(
            (nn.init.trunc_normal_(torch.empty_like(weight), std=0.02), torch.zeros_like(bias))
            for weight, bias in self.layers
        )
        return ClassHead(layers, F.normalize(torch.randn_like(self.prototypes), dim=1))


class Backbone(nn.Module, ABC):
    """A timm trunk that returns `Features`. State keys are `trunk.<timm name>`."""

    projection: Projection | None = None  # where its checkpoint has one
    class_head: ClassHead | None = None  # likewise
    config: BackboneConfig
    trunk: nn.Module
    dim: int  # D
    stride: int  # source pixels per cell

    @abstractmethod
    def forward(self, images: Tensor) -> Features:
        """Return the features of normalised float images [B, 3, H, W]."""

    @abstractmethod
    def compile_encoder(self) -> None:
        """Compile the part of the network that does the work, in place."""

    @abstractmethod
    def checkpoint_gradients(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""


def create_trunk(name: str, **options: Any) -> nn.Module:
    """Return a timm model without its classifier, or say which names exist.

    Raises:
        UserError: timm does not know `name`, or the model does not take one of `options`.
    """
    import timm  # brings torchvision and torch._dynamo, 2 s: only where a network is built

    if not timm.is_model(name):
        close = timm.list_models(f"*{name}*")[:3] or timm.list_models(f"{name[:6]}*")[:3]
        hint = f"; did you mean one of {', '.join(close)}?" if close else ""
        raise UserError(f"method.backbone.name: timm has no model {name!r}{hint}")
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, **options)
    except TypeError as error:
        raise UserError(f"method.backbone: {name} does not take {error}") from None


def initialise_convolutions(module: nn.Module, mode: Literal["fan_in", "fan_out"]) -> None:
    """Kaiming-normal convolutions and unit BatchNorm (moco: fan_out; OpenSelfSup, DenseCL: fan_in).

    No residual branch starts at zero: both families leave the last BatchNorm's weight at 1.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode=mode, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


def grid_of(images: Tensor, stride: int) -> tuple[int, int]:
    """Return rows and columns of the cells of images [B, 3, H, W] at a stride."""
    return images.shape[-2] // stride, images.shape[-1] // stride


def tokens_from_map(maps: Tensor) -> Tensor:
    """Return a map [B, D, h, w] as cells [B, h * w, D], row-major."""
    return maps.flatten(2).transpose(1, 2)


def pooled(dense: Tensor) -> Tensor:
    """Return the mean over cells as the one class token, [B, N, D] -> [B, 1, D]."""
    return torch.mean(dense, dim=1, keepdim=True)
