"""ViTs of timm in two phases: `embed(images)` to patches, edits by the method, `encode(patches)`.

An edit sees patch embeddings before their positions are added (a masked patch keeps its place), and never
the class tokens. The only file that touches timm's private `_pos_embed`; `tests/test_backbones.py` pins it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dense_ssl.backbones.features import Backbone, BackboneConfig, Features, create_trunk
from dense_ssl.config import UserError

if TYPE_CHECKING:  # importing timm takes 2 s, see features.create_trunk
    from timm.models.vision_transformer import VisionTransformer


class ViTBackbone(Backbone):
    """A ViT whose cells are its patch tokens, for any input size that is a multiple of the patch."""

    def __init__(self, config: BackboneConfig, trunk: VisionTransformer | None = None) -> None:
        """Build timm's model of the configured name, or stand around `trunk` as it is."""
        super().__init__()
        self.config = config
        if trunk is None:
            options: dict[str, Any] = {"dynamic_img_size": True, "drop_path_rate": config.drop_path}
            if config.class_tokens > 1:
                options["reg_tokens"] = config.class_tokens - 1
            made = create_trunk(config.name, **options)
            trunk = _plain_vit(made, config)
            if config.init == "dino":
                _initialise_as_dino(trunk)
        self.trunk = trunk
        self.dim = trunk.embed_dim
        self.prefix = trunk.num_prefix_tokens  # T
        self.stride = int(trunk.patch_embed.patch_size[0])

    def embed(self, images: Tensor) -> Tensor:
        """Return patch embeddings [B, h, w, D] of images [B, 3, H, W], without positions."""
        trunk: Any = self.trunk
        return trunk.patch_embed(images)

    def encode(self, patches: Tensor) -> Features:
        """Return the features of patch embeddings [B, h, w, D], edited or not."""
        rows, columns = int(patches.shape[1]), int(patches.shape[2])
        hidden, x = self.run_blocks(self.place(patches))
        first = self.prefix
        return Features(x[:, :first], x[:, first:], (rows, columns), hidden[:, first:])

    def forward(self, images: Tensor) -> Features:
        """Return the features of normalised float images [B, 3, H, W]."""
        return self.encode(self.embed(images))

    def place(self, patches: Tensor) -> Tensor:
        """Return tokens [B, T + N, D]: class tokens, then patches row-major, positions added."""
        trunk: Any = self.trunk
        table, first = trunk.pos_embed, trunk.num_prefix_tokens
        own, grid = tuple(trunk.patch_embed.grid_size), (patches.shape[1], patches.shape[2])
        # CUDA has no deterministic backward pass of an interpolation, but one of a product.
        as_product = grid != own and torch.are_deterministic_algorithms_enabled()
        if self.config.positions == "timm":
            if not as_product or table is None or trunk.no_embed_class:
                return trunk._pos_embed(patches)
            resampled = _as_timm
        else:
            resampled = interpolate_positions
        cells = table[:, first:]
        if as_product:
            with torch.autocast(patches.device.type, enabled=False):
                one_hot = torch.eye(cells.shape[1], device=cells.device, dtype=cells.dtype)[None]
                cells = resampled(one_hot, own, grid) @ cells
        else:
            cells = resampled(cells, own, grid)
        prefix = [x for x in (trunk.cls_token, trunk.reg_token) if x is not None]
        prefix = torch.cat(prefix, dim=1) + table[:, :first]
        placed = patches.flatten(1, 2) + cells
        return trunk.pos_drop(torch.cat([prefix.expand(len(placed), -1, -1), placed], dim=1))

    def run_blocks(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens after the last block, before and after the final norm, each [B, T + N, D]."""
        trunk: Any = self.trunk
        x = trunk.norm_pre(trunk.patch_drop(tokens))
        if trunk.grad_checkpointing and torch.is_grad_enabled():
            for block in trunk.blocks:
                x = checkpoint(block, x, use_reentrant=False)
        else:
            x = trunk.blocks(x)
        return x, trunk.norm(x)

    def maps_after(
        self, images: Tensor, blocks: Sequence[int], *, normed: bool, class_tokens: bool = True
    ) -> list[Tensor]:
        """Return the cells after each of `blocks` (from 0, ascending) as maps [B, D, h, w].

        normed: all pass the final norm. class_tokens: False leaves them out of the sequence.
        """
        trunk: Any = self.trunk
        patches = self.embed(images)
        first = self.prefix
        x = self.place(patches)
        if not class_tokens:
            x, first = x[:, first:], 0
        x = trunk.norm_pre(trunk.patch_drop(x))
        maps = []
        for number, block in enumerate(trunk.blocks[: max(blocks) + 1]):
            if trunk.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            if number in blocks:
                cells = (trunk.norm(x) if normed else x)[:, first:]
                maps.append(cells.transpose(1, 2).unflatten(2, patches.shape[1:3]))
        return maps

    @torch.no_grad()
    def last_attention(self, images: Tensor) -> Tensor:
        """Return how the class tokens attend to the patches in the last block, [B, heads, T, N].

        Each class token's weights over all tokens sum to 1; those over the patches are returned.
        """
        trunk: Any = self.trunk
        tokens = trunk.norm_pre(trunk.patch_drop(self.place(self.embed(images))))
        for block in trunk.blocks[:-1]:
            tokens = block(tokens)
        attention = trunk.blocks[-1].attn
        qkv = attention.qkv(trunk.blocks[-1].norm1(tokens))
        q, k, _ = qkv.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = attention.q_norm(q[:, :, : self.prefix]), attention.k_norm(k)
        weights = (q * attention.scale @ k.transpose(2, 3)).softmax(3)
        return weights[..., self.prefix :]

    def compile_encoder(self) -> None:
        """Compile `run_blocks`."""
        self.run_blocks = torch.compile(self.run_blocks)

    def checkpoint_gradients(self) -> None:
        """Recompute each block in the backward pass."""
        trunk: Any = self.trunk
        trunk.set_grad_checkpointing(True)


def _as_timm(table: Tensor, side: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Return positions [1, h * w, D] for a grid (h, w) from a table of another grid, as timm does."""
    from timm.layers.pos_embed import resample_abs_pos_embed  # see features.create_trunk

    return resample_abs_pos_embed(table, list(grid), list(side), num_prefix_tokens=0)


def interpolate_positions(
    table: Tensor, side: int | tuple[int, int], grid: tuple[int, int]
) -> Tensor:
    """Return positions [1, h * w, D] for a grid (h, w) from a table of another grid, as DINO does.

    side: of the table, [1, side * side, D]; or its rows and columns. Bicubic by the scale factors
    (h + 0.1) / rows and (w + 0.1) / columns: what is sampled depends on the 0.1, which only had to keep the
    size from being rounded down. timm resamples by size, antialiased.
    """
    rows, columns = (side, side) if isinstance(side, int) else side
    height, width = grid
    if (height, width) == (rows, columns):
        return table
    maps = table.unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
    factors = [(height + 0.1) / rows, (width + 0.1) / columns]
    maps = F.interpolate(
        maps.float(), scale_factor=factors, mode="bicubic", recompute_scale_factor=False
    )
    assert maps.shape[2:] == grid, (tuple(maps.shape), grid)
    return maps.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)


def _plain_vit(made: nn.Module, config: BackboneConfig) -> VisionTransformer:
    """Return the model if it is one that this file knows to run.

    Raises:
        UserError: it is another kind of ViT, or has no position table that DINO's rule applies to.
    """
    from timm.models.vision_transformer import VisionTransformer  # there since `made` was made

    if not isinstance(made, VisionTransformer):
        raise UserError(
            f"method.backbone.name: {config.name} is a {type(made).__name__}, not a plain ViT; take "
            "vit_small_patch16_224, vit_base_patch16_224, ..."
        )
    if config.positions == "dino" and (made.pos_embed is None or made.no_embed_class):
        raise UserError(
            f"method.backbone.positions: {config.name} has no position table of class token and "
            "patches, as DINO resamples; take timm"
        )
    return made


@torch.no_grad()
def _initialise_as_dino(trunk: VisionTransformer) -> None:
    """Draw class tokens as the position table is; the rest of timm's initialisation is the published one.

    That is: linear layers and positions normal with deviation 0.02, biases 0, norms 1 and 0, and the
    patch convolution as torch makes it.
    """
    for token in (trunk.cls_token, trunk.reg_token):
        if token is not None:
            nn.init.trunc_normal_(token, std=0.02)
