"""Features at sampled points of a view, from all its patches: the attention module of UDI (arXiv:2407.17671).

    U = LN(X)    Q, K, V = split(W U + b)
    Z = LN(proj(softmax(P Q K^T / sqrt(d)) V) + P U)          per head, of d channels

X [N, D] are the patch tokens of a view before its final norm, rows of P [S, N] interpolate between them: one
patch, or bilinear weights of four, or nothing. Queries are linear, so points are taken first and projected
then: S products in the place of N. A row of nothing attends to all patches alike, and what it gives means
nothing; the losses leave it out.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dense_ssl.config import UserError

EPS = 1e-6  # of the norms, as in the ViTs


class PointAttention(nn.Module):
    """The formula above, LN(X) apart; names of parameters are the official ones."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise UserError(
                f"method.attention_heads: {heads} heads cannot share the backbone's {dim} channels; "
                "take a number that divides them"
            )
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        for layer in (self.qkv, self.proj):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor, maps: Tensor) -> Tensor:
        """Return features [M, S, D] at the points of maps [M, S, N] among normalised tokens [M, N, D]."""
        points = sample(tokens, maps)
        q, k, v = self.heads_of(tokens, points, maps)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.norm(self.proj(mixed.transpose(1, 2).flatten(2)) + points)

    def heads_of(
        self, tokens: Tensor, points: Tensor, maps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [M, heads, S, d] of points, keys and values [M, heads, N, d] of tokens."""
        dim = tokens.shape[2]
        k, v = F.linear(tokens, self.qkv.weight[dim:], self.qkv.bias[dim:]).chunk(2, dim=2)
        # The bias is interpolated like the rest: once where weights sum to 1, not at all where to 0.
        bias = maps.sum(2, keepdim=True) * self.qkv.bias[:dim]
        q = (F.linear(points, self.qkv.weight[:dim]) + bias).to(k.dtype)
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return q, k, v


class PointSampler(nn.Module):
    """The whole module: the norm of a view's patch tokens, then attention from points to all of them."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = PointAttention(dim, heads)

    def forward(self, hidden: Tensor, maps: Tensor) -> Tensor:
        """Return features [M, S, D] of patch tokens [M, N, D] at the points of maps [M, S, N]."""
        return self.attn(self.norm1(hidden), maps)


def sample(tokens: Tensor, maps: Tensor) -> Tensor:
    """Return tokens [M, N, D] interpolated by maps [M, S, N], float32 [M, S, D] whatever the autocast."""
    with torch.autocast(tokens.device.type, enabled=False):
        wide = torch.promote_types(tokens.dtype, torch.float32)
        return maps.to(wide) @ tokens.to(wide)
