"""What is exported, and how another network is compared with it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from dense_ssl.backbones import Backbone, BackboneConfig, make_backbone
from dense_ssl.checkpoint import FORMAT
from dense_ssl.weights.fingerprint import weights_sha256
from dense_ssl.weights.pretrained import Loaded, method_name, read_checkpoint

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's, as all recipes are trained
# What float32 rounding may make of features when sums are taken in another order, as a share of the
# largest one: 1e-6 to 2e-6 was seen. A GELU by tanh in place of the exact one gives 1e-3.
ROUNDING = 1e-5


class Differs(Exception):
    """A written file is not the network it was written from; says in what."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What comparing a written file with its source gave."""

    description: str  # what was compared with what, in one line
    max_abs_diff: float  # of the features of one fixed input
    equal: bool = True  # False: another network, as the target says
    remarks: Mapping[str, Any] = field(default_factory=dict)  # for the .json


@dataclass(frozen=True)
class Source:
    """A loaded backbone and the checkpoint it comes from."""

    loaded: Loaded
    checkpoint: Mapping[str, Any]
    part: str  # student or teacher
    run: Path | None = None  # its folder, where it is a run

    @cached_property
    def trunk(self) -> dict[str, Tensor]:
        """The trunk's tensors, plain and contiguous."""
        state = self.loaded.backbone.trunk.state_dict()
        return {name: value.detach().contiguous() for name, value in state.items()}

    @property
    def arch(self) -> str:
        """The name in timm, without its tag."""
        return self.loaded.config.name.partition(".")[0]

    @property
    def is_resnet(self) -> bool:
        """Whether cells are positions of a map."""
        return "patch_embed.proj.weight" not in self.trunk

    @property
    def side(self) -> int:
        """Side of the input to compare on, in pixels: a plain ViT takes its own only."""
        patches = getattr(self.loaded.backbone.trunk, "patch_embed", None)
        return 128 if patches is None else int(patches.img_size[0])

    @property
    def method(self) -> str | None:
        """The method of a checkpoint of ours."""
        own = self.checkpoint.get("format") == FORMAT
        return method_name(self.checkpoint) if own else None

    @property
    def class_tokens(self) -> int:
        """How many class tokens a ViT has."""
        return self.loaded.config.class_tokens

    @cached_property
    def standard(self) -> Backbone:
        """The backbone at its published stride: dilation is not in the weights."""
        config = BackboneConfig.model_validate(
            self.loaded.config.model_dump() | {"output_stride": 32}
        )
        backbone = make_backbone(config)
        backbone.load_state_dict(self.loaded.backbone.state_dict())
        return backbone.eval()

    @cached_property
    def features(self) -> Tensor:
        """What the network makes of `images(side)`."""
        return features(self.standard, images(self.side))


def images(*sides: int) -> Tensor:
    """Return two fixed normalised images [2, 3, H, W] of the side, or of height and width."""
    shape = (2, 3, sides[0], sides[-1])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    # One memory format for all: convolutions in another one round differently.
    return noise.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def features(network: nn.Module, x: Tensor) -> Tensor:
    """Return cells [2, N, D] of images; a ViT's class tokens come before its cells."""
    network.eval()
    if isinstance(network, Backbone):
        found = network(x)
        is_map = "patch_embed.proj.weight" not in network.trunk.state_dict()
        return found.dense if is_map else torch.cat((found.cls, found.dense), dim=1)
    # torchvision has no name for "all but pooling and fc", its last two children.
    without_fc = nn.Sequential(*list(network.children())[:-2])
    out = getattr(network, "forward_features", without_fc)(x)
    return out.flatten(2).transpose(1, 2) if out.ndim == 4 else out


def compare(network: nn.Module, source: Source, description: str) -> Checked:
    """Return what was compared if `network` has the source's weights and features, to the bit.

    Raises:
        Differs: it has not.
    """
    difference = float((features(network, images(source.side)) - source.features).abs().max())
    state = network.state_dict()
    trunk = {name: value for name, value in state.items() if not name.startswith("fc.")}
    if difference != 0.0 or weights_sha256(trunk) != source.loaded.sha256:
        raise Differs(
            f"{description} has other weights or gives features that differ (by {difference:.3g})"
        )
    return Checked(description, difference)


def within_rounding(found: Tensor, expected: Tensor, description: str) -> float:
    """Return the largest difference of features from another implementation.

    Raises:
        Differs: it is more than rounding.
    """
    difference = float((found - expected).abs().max())
    largest = float(expected.abs().max())
    if not difference <= ROUNDING * largest:
        raise Differs(
            f"{description} gives features that differ by {difference:.3g}; the largest is {largest:.3g}"
        )
    return difference


def other_sides(source: Source) -> tuple[int, int]:
    """Return height and width of an input that is not of the network's own size, nor square."""
    step = source.loaded.backbone.stride
    return source.side + 2 * step, source.side + 4 * step


def at_other_size(network: nn.Module, source: Source) -> dict[str, Any]:
    """Return how far features of another size are from ours; timm's rule for positions is not DINO's."""
    height, width = other_sides(source)
    x = images(height, width)
    difference = float((features(network, x) - features(source.standard, x)).abs().max())
    return {"other_size": f"{height} x {width}", "max_abs_diff_at_other_size": difference}


def plain_timm(
    source: Source, state: Mapping[str, Tensor], options: Mapping[str, Any] | None = None
) -> nn.Module:
    """Return timm's own model with these weights, all of them and no others."""
    plain = timm.create_model(source.arch, pretrained=False, num_classes=0, **(options or {}))
    plain.load_state_dict(state, strict=True)
    return plain


def read_written(path: Path) -> dict[str, Any]:
    """Return what was just written, from the disk."""
    return read_checkpoint(path)


def described(source: Source) -> dict[str, str]:
    """Return what a file says of itself: enough to build its network again."""
    return {
        "format": "pt",  # transformers refuses files that do not say so
        "arch": source.arch,
        "positions": source.loaded.config.positions,
        "weights_sha256": source.loaded.sha256,
    }
