"""ViTs of timm in two phases: `embed(images)` to tokens, edits by the method, `encode(tokens)`.

The only file that touches timm's private `_pos_embed`; `tests/test_backbones.py` pins what it returns.
"""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dense_ssl.backbones.features import Backbone, BackboneConfig, Features, create_trunk, grid_of


class ViTBackbone(Backbone):
    """A ViT whose cells are its patch tokens, for any input size that is a multiple of the patch."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        trunk = create_trunk(config.name, dynamic_img_size=True, drop_path_rate=config.drop_path)
        assert isinstance(trunk, VisionTransformer), f"{config.name} is not a plain ViT"
        self.trunk = trunk
        self.dim = trunk.embed_dim
        self.stride = int(trunk.patch_embed.patch_size[0])

    def embed(self, images: Tensor) -> Tensor:
        """Return tokens [B, T + N, D]: class tokens, then patches row-major, positions added."""
        return self.trunk._pos_embed(self.trunk.patch_embed(images))  # pyright: ignore

    def encode(self, tokens: Tensor) -> Tensor:
        """Return the normalised tokens after the last block, [B, T + N, D]."""
        trunk = self.trunk
        x = trunk.norm_pre(trunk.patch_drop(tokens))  # pyright: ignore
        if trunk.grad_checkpointing and torch.is_grad_enabled():
            for block in trunk.blocks:  # pyright: ignore
                x = checkpoint(block, x, use_reentrant=False)
        else:
            x = trunk.blocks(x)  # pyright: ignore
        return trunk.norm(x)  # pyright: ignore

    def forward(self, images: Tensor) -> Features:
        """Return the features of normalised float images [B, 3, H, W]."""
        x = self.encode(self.embed(images))
        prefix = int(self.trunk.num_prefix_tokens)  # pyright: ignore
        return Features(x[:, :prefix], x[:, prefix:], grid_of(images, self.stride))

    def compile_encoder(self) -> None:
        """Compile `encode`."""
        self.encode = torch.compile(self.encode)  # pyright: ignore

    def checkpoint_gradients(self) -> None:
        """Recompute each block in the backward pass."""
        self.trunk.set_grad_checkpointing(True)  # pyright: ignore
