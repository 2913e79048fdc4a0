"""The projection head of DINO (arXiv:2104.14294, appendix C) and iBOT: an MLP, unit vectors, prototypes.

    x -> Linear, GELU, Linear, GELU, Linear -> x / |x| -> W x,   W_k = g_k v_k / |v_k|

Rows of W are prototypes; with g frozen at 1 (`norm_last_layer`) logits are cosines. iBOT's patch tokens go
through the same MLP and, shared or not, through the same prototypes. The last product is left to the
losses: most of them never need the logits of every token.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dense_ssl.methods.parts import unit


class Prototypes(nn.Module):
    """K weight-normalised rows [K, D], g trained or frozen at 1."""

    def __init__(self, dim: int, count: int, train_norms: bool) -> None:
        super().__init__()
        # The directions start as torch's linear layers do, as the published code leaves them.
        self.weight_v = nn.Parameter(nn.Linear(dim, count, bias=False).weight.detach())
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=train_norms)

    def forward(self) -> Tensor:
        """Return the prototypes W [K, D]."""
        return self.weight_g * unit(self.weight_v)


class PrototypeHead(nn.Module):
    """Three linear layers to unit vectors, and the prototypes of class tokens and of patches.

    Parameter names are the official ones: mlp.{0,2,4}, last_layer and, where patches have prototypes of
    their own, last_layer2.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        patch_out_dim: int | None = None,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        train_norms: bool = False,
    ) -> None:
        """Build the head of tokens of width `dim`; no patch_out_dim: patches share `last_layer`."""
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = Prototypes(bottleneck_dim, out_dim, train_norms)
        self.last_layer2 = None
        if patch_out_dim is not None:
            self.last_layer2 = Prototypes(bottleneck_dim, patch_out_dim, train_norms)

    def project(self, tokens: Tensor) -> Tensor:
        """Return unit features [..., bottleneck_dim] of tokens [..., dim].

        float32, but under autocast in its dtype: that is what the product with the prototypes would
        make of them.
        """
        features = unit(self.mlp(tokens))
        kind = features.device.type
        if torch.is_autocast_enabled(kind):
            return features.to(torch.get_autocast_dtype(kind))
        return features

    def prototypes(self) -> Tensor:
        """Return the prototypes of class tokens, [out_dim, bottleneck_dim]."""
        return self.last_layer()

    def patch_prototypes(self) -> Tensor:
        """Return the prototypes of patches, [patch_out_dim or out_dim, bottleneck_dim]."""
        return self.last_layer() if self.last_layer2 is None else self.last_layer2()

    def last_layers(self) -> list[nn.Parameter]:
        """Return the trained parameters of all prototypes: what stays frozen in the first epochs."""
        layers = [layer for layer in (self.last_layer, self.last_layer2) if layer is not None]
        return [p for layer in layers for p in layer.parameters() if p.requires_grad]

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of class tokens [B, out_dim] and of patches [B, N, ...] of tokens [B, 1 + N, dim].

        All of them, as the published head does; training asks for fewer.
        """
        features = self.project(tokens)
        cls = F.linear(features[:, 0], self.prototypes().to(features.dtype))
        return cls, F.linear(features[:, 1:], self.patch_prototypes().to(features.dtype))
