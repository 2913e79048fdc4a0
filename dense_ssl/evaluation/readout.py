"""One vector per image from a frozen backbone: which tokens, of how many last blocks.

Every token has passed the backbone's final norm, those of earlier blocks too (DINO's protocol).
"""

from typing import Any

import torch
from torch import Tensor, nn

from dense_ssl.backbones import Backbone, ViTBackbone
from dense_ssl.config import UserError
from dense_ssl.evaluation.choices import Pool


class Readout(nn.Module):
    """A frozen backbone and what is read from it: images [B, 3, H, W] to vectors [B, dim]."""

    def __init__(self, backbone: Backbone, pool: Pool, blocks: int = 1) -> None:
        """Read `pool`; class tokens of the last `blocks` blocks stand beside each other, oldest first.

        Raises:
            UserError: the backbone has no such token, or not so many blocks.
        """
        super().__init__()
        self.backbone, self.pool, self.blocks = backbone, pool, blocks
        vit = isinstance(backbone, ViTBackbone)
        if pool in ("second", "both") and not (vit and backbone.prefix > 1):
            raise UserError(f"pool={pool}: {backbone.config.name} has one class token; take cls")
        depth = len(backbone.trunk.blocks) if vit else 1  # pyright: ignore
        if not 1 <= blocks <= depth:
            raise UserError(
                f"blocks={blocks}: {backbone.config.name} has class tokens after {depth} block(s)"
            )
        if blocks > 1 and pool == "mean":
            raise UserError("blocks: pool=mean reads the last block alone; take cls or cls+mean")
        tokens = {"cls": 1, "second": 1, "both": 2, "mean": 0, "cls+mean": 1}[pool]
        self.dim = backbone.dim * (blocks * tokens + ("mean" in pool))

    def forward(self, images: Tensor) -> Tensor:
        """Return the vectors, float [B, dim]."""
        if self.blocks == 1:
            features = self.backbone(images)
            parts, cells = [features.cls], features.dense
        else:
            parts, cells = self._last_blocks(images)
        first = {"second": 1}.get(self.pool, 0)
        count = {"both": 2, "mean": 0}.get(self.pool, 1)
        read = [tokens[:, first + i] for i in range(count) for tokens in parts]
        if "mean" in self.pool:
            read.append(cells.mean(1))
        return torch.cat(read, dim=1).float()

    def _last_blocks(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Class tokens [B, T, D] after each of the last blocks, and the last one's cells [B, N, D]."""
        backbone: Any = self.backbone
        trunk = backbone.trunk
        x = trunk.norm_pre(trunk.patch_drop(backbone.place(backbone.embed(images))))
        before = len(trunk.blocks) - self.blocks
        read = []
        for number, block in enumerate(trunk.blocks):
            x = block(x)
            if number >= before:
                read.append(trunk.norm(x))
        prefix = backbone.prefix
        return [tokens[:, :prefix] for tokens in read], read[-1][:, prefix:]
