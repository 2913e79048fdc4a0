"""Features of a ResNet's stages, pooled as OpenSelfSup's linear SVM specifies (DenseCL)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dense_ssl.backbones import Backbone, ResNetBackbone
from dense_ssl.config import UserError
from dense_ssl.evaluation.voc import specified_pool

STAGES: tuple[str, ...] = ("feat1", "feat2", "feat3", "feat4", "feat5")


class StageFeatures(nn.Module):
    """Chosen features of a backbone beside each other: images [B, 3, 224, 224] to [B, dim].

    `feat1` is the stem after its ReLU, `feat2` to `feat5` are the stages; `pooled` is the mean of the
    last map, or a ViT's first class token.
    """

    def __init__(self, backbone: Backbone, names: Sequence[str]) -> None:
        """Read the features `names`.

        Raises:
            UserError: the backbone has no stages, or its last one is not at stride 32.
        """
        super().__init__()
        self.backbone, self.names = backbone, tuple(names)
        staged = [name for name in names if name in STAGES]
        if staged and not (isinstance(backbone, ResNetBackbone) and backbone.stride == 32):
            raise UserError(
                f"features={','.join(staged)}: specified for ResNets of stride 32, which "
                f"{backbone.config.name} is not here; take features=pooled"
            )
        training = backbone.training
        backbone.eval()  # a probe must not move BatchNorm's statistics
        with torch.inference_mode():
            device = next(backbone.parameters()).device
            parts = self._parts(torch.zeros(1, 3, 224, 224, device=device))
        backbone.train(training)
        self.columns: dict[str, slice] = {}
        start = 0
        for name, part in zip(self.names, parts, strict=True):
            self.columns[name] = slice(start, start + part.shape[1])
            start += part.shape[1]

    @staticmethod
    def default(backbone: Backbone, pooled: bool) -> tuple[str, ...]:
        """Return the headline feature: `feat5` of a ResNet, else, or when asked for, `pooled`."""
        return ("feat5",) if isinstance(backbone, ResNetBackbone) and not pooled else ("pooled",)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features, float [B, dim], in the order of `columns`."""
        return torch.cat(self._parts(images), dim=1).float()

    def _parts(self, images: Tensor) -> list[Tensor]:
        if set(self.names) == {"pooled"}:
            return [self.backbone(images).cls[:, 0]]
        trunk: Any = self.backbone.trunk
        maps = [trunk.act1(trunk.bn1(trunk.conv1(images)))]
        x = trunk.maxpool(maps[0])
        for stage in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4):
            x = stage(x)
            maps.append(x)
        found: dict[str, Tensor] = dict(zip(STAGES, specified_pool(maps), strict=True))
        found["pooled"] = maps[-1].mean((2, 3))
        return [found[name] for name in self.names]
