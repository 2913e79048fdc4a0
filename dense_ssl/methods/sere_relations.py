"""Self-relations of SERE (arXiv:2206.05184): their heads, their alignment between crops, their losses.

A network relates the positions of an image to each other, and its channels, by products of features that
a small head made of the last block's patch tokens (before the final norm). Rows of these matrices are
distributions; the student's follow the teacher's of another crop of the image:

    R_spatial = y_h y_h^T / sqrt(d)   per head h       R_channel = y^T y / N
    H(t, s) = - sum_k softmax(t / T)_k log softmax(s)_k          mean over rows and pairs of crops

Positions of two crops are the same only where they overlap, so both are sampled there first. The published
code samples relations, on both axes; bilinear sampling S is linear, so here features are sampled instead:
S (y y^T) S^T = (S y)(S y)^T.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dense_ssl.crops import Crops, overlap, sampling_grid
from dense_ssl.methods.synced_batch_norm import SyncedBatchNorm
from kernels.multicrop_cross_entropy import multicrop_cross_entropy
from kernels.relation_cross_entropy import relation_cross_entropy

NOWHERE = (
    -2.0
)  # grid coordinate of crops that share nothing: half a crop outside, where samples are 0


class RelationHead(nn.Module):
    """What stands between tokens and their relations; the student's features take one step more.

        z = ReLU(BN(x))             the teacher's
        p = ReLU(BN(W z))           the student's

    Parameter names are the official ones, but that W is [C, C] where theirs is a 1 x 1 convolution.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.projection = nn.Sequential(SyncedBatchNorm(dim), nn.ReLU())
        self.predictor = nn.Sequential(
            nn.Linear(dim, dim, bias=False), SyncedBatchNorm(dim), nn.ReLU()
        )

    def project(self, tokens: Tensor) -> Tensor:
        """Return z [M, N, C] of tokens [M, N, C]; batch statistics are over all M * N of all ranks."""
        return self.projection(tokens.flatten(0, 1)).view(tokens.shape)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return p [M, N, C] of tokens [M, N, C]."""
        rows = self.projection(tokens.flatten(0, 1))
        return self.predictor(rows).view(tokens.shape)


class Grids(NamedTuple):
    """Where the features of two crops are sampled so that they are of the same points, (x, y) in -1 .. 1."""

    queries: Tensor  # [G, B, S, S, 2]  in each of the two global crops, what both show
    keys: Tensor  # [G, B, R, R, 2]  for the other axis of relations; `queries` where R = S
    local: Tensor | None  # [L, B, G, Q, Q, 2]  in local crops, what each shares with a global one
    of_local: Tensor | None  # [G, B, L, Q, Q, 2]  the same points in the global ones

    @staticmethod
    def of(crops: Crops, local: Crops | None, sizes: tuple[int, int], local_size: int) -> "Grids":
        """Return the grids of two global crops of each image, and of its local ones, if any."""
        (a, b), (a_flip, b_flip) = crops.boxes, crops.flipped
        queries = keys = torch.stack(overlap_grids(a, a_flip, b, b_flip, sizes[0]))
        if sizes[1] != sizes[0]:
            keys = torch.stack(overlap_grids(a, a_flip, b, b_flip, sizes[1]))
        if local is None:
            return Grids(queries, keys, None, None)
        boxes, flipped = crops.boxes.transpose(0, 1), crops.flipped.transpose(0, 1)  # [B, G, ...]
        mine, theirs = overlap_grids(
            local.boxes[:, :, None], local.flipped[:, :, None], boxes, flipped, local_size
        )
        return Grids(queries, keys, mine, theirs.transpose(0, 2))


def overlap_grids(
    a: Tensor, a_flipped: Tensor, b: Tensor, b_flipped: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Return the same size x size points in crops a and b, each [..., size, size, 2], as (x, y).

    Points lie regularly in what both crops show, on its border too, in coordinates -1 .. 1 of the crop
    as it is seen. Where the crops share nothing all are far outside. Boxes are [..., 4], flips [...].
    """
    region, meet = overlap(a, b)
    here = sampling_grid(region, a, a_flipped, size)
    there = sampling_grid(region, b, b_flipped, size)
    meet = meet[..., None, None, None]
    return here.where(meet, NOWHERE), there.where(meet, NOWHERE)


def sampling_matrix(grid: Tensor, cells: tuple[int, int]) -> Tensor:
    """Return the weights of bilinear sampling at a grid [..., S, R, 2], as [..., S * R, h * w].

    Of features on h x w cells, which have their centres half a cell inside; what is outside is 0, so a
    point on the border has half the weight of its cell, and one in a corner a quarter.
    """
    height, width = cells
    x, y = grid.flatten(-3, -2).unbind(-1)  # [..., P]
    along_x = _hat(((x + 1) * width - 1) / 2, width)
    along_y = _hat(((y + 1) * height - 1) / 2, height)
    return (along_y[..., :, None] * along_x[..., None, :]).flatten(-2)


def _hat(place: Tensor, count: int) -> Tensor:
    """Return how much each of `count` cells weighs at a place among them, [..., count]."""
    cells = torch.arange(count, device=place.device, dtype=place.dtype)
    return (1 - (place[..., None] - cells).abs()).clamp_(min=0)


def sample(features: Tensor, matrix: Tensor) -> Tensor:
    """Return features [M, N, C] at the points of a matrix [M, P, N], as [M, P, C].

    Sampled in float32; under autocast then in its dtype, which is what products would make of them.
    """
    kind = features.device.type
    with torch.autocast(kind, enabled=False):
        wide = torch.promote_types(features.dtype, torch.float32)
        points = matrix.to(wide) @ features.to(wide)
    if torch.is_autocast_enabled(kind):
        return points.to(torch.get_autocast_dtype(kind))
    return points


class Maps(NamedTuple):
    """Features of V crops of B images, crop-major, on a grid of cells."""

    tokens: Tensor  # [V * B, N, C]
    cells: tuple[int, int]  # h * w = N


def spatial_loss(
    student: Maps, teacher: Maps, local: Maps | None, grids: Grids, heads: int, T: float
) -> Tensor:
    """Mean cross-entropy of the positions' relations, over pairs of crops.

    Pairs are the teacher's two global crops with the student's other one and with all local crops, each
    where they overlap. Those that do not overlap have uniform relations: a constant, log of their number
    of points, and no gradient. Gradients flow to student and local.
    """
    queries = keys = sampling_matrix(grids.queries, student.cells).flatten(0, 1)
    if grids.keys is not grids.queries:
        keys = sampling_matrix(grids.keys, student.cells).flatten(0, 1)
    target = [_other_crop(x) for x in _at(teacher, queries, keys)]
    loss, pairs = 2 * _relate(target, _at(student, queries, keys), heads, T), 2
    if local is not None:
        points, target = _at_shared_points(local, teacher, grids)
        crops = 2 * len(local.tokens) // len(teacher.tokens)
        loss = loss + 2 * crops * _relate([target, target], [points, points], heads, T)
        pairs += 2 * crops
    return loss / pairs


def _at_shared_points(local: Maps, teacher: Maps, grids: Grids) -> tuple[Tensor, Tensor]:
    """Return features of local crops and of the teacher's, each [L * B * G, P, C], at the same points."""
    assert grids.local is not None
    assert grids.of_local is not None
    crops, batch, views = grids.local.shape[:3]
    mine = sampling_matrix(grids.local, local.cells).flatten(2, 3).flatten(0, 1)
    theirs = sampling_matrix(grids.of_local, teacher.cells).flatten(2, 3).flatten(0, 1)
    points = sample(local.tokens, mine).view(crops * batch * views, -1, local.tokens.shape[2])
    target = sample(teacher.tokens, theirs).view(views, batch, crops, *points.shape[1:])
    return points, target.transpose(0, 2).reshape(points.shape)


def _at(maps: Maps, queries: Tensor, keys: Tensor) -> list[Tensor]:
    """Return features at the queries' and at the keys' points: one tensor where they are the same."""
    points = sample(maps.tokens, queries)
    return [points, points if keys is queries else sample(maps.tokens, keys)]


def _other_crop(x: Tensor) -> Tensor:
    """Return [2 * B, ...] with the two crops of each image swapped."""
    return x.unflatten(0, (2, -1)).flip(0).flatten(0, 1)


def _relate(teacher: list[Tensor], student: list[Tensor], heads: int, T: float) -> Tensor:
    """Return the mean loss over rows; each list is queries [M, P, C] and keys [M, R, C]."""
    t_queries, t_keys, queries, keys = (
        x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (*teacher, *student)
    )
    scale = queries.shape[3] ** -0.5
    return relation_cross_entropy(t_queries, t_keys, queries, keys, scale / T, scale).mean()


def channel_relation(features: Tensor) -> Tensor:
    """Return the relations of channels [M, C, C] of features [M, N, C].

    Features, not their products, are divided: float16 would overflow.
    """
    scaled = features * features.shape[1] ** -0.5
    return scaled.transpose(1, 2) @ scaled


def channel_loss(student: Maps, teacher: Maps, local: Maps | None, T: float) -> Tensor:
    """Mean cross-entropy of the channels' relations, over the same pairs as in `spatial_loss`.

    Of whole crops: channels are the same everywhere. Gradients flow to student and local.
    """
    of_local = None if local is None else channel_relation(local.tokens)
    own, target = channel_relation(student.tokens), channel_relation(teacher.tokens)
    return channel_relations_loss(own, target, of_local, T)


def channel_relations_loss(
    student: Tensor, teacher: Tensor, local: Tensor | None, T: float
) -> Tensor:
    """Return the loss of relations: student and teacher [2 * B, C, C], local [L * B, C, C]."""
    target = _rows(teacher, 2)
    total = multicrop_cross_entropy(_rows(student, 2), target, None, 1.0, T).sum()
    pairs = 2
    if local is not None:
        crops = 2 * len(local) // len(teacher)
        every = torch.ones(crops, 2, device=local.device)
        own = _rows(local, crops)
        total = total + multicrop_cross_entropy(own, target, None, 1.0, T, every).sum()
        pairs += 2 * crops
    return total / (pairs * target.shape[1])


def _rows(relations: Tensor, crops: int) -> Tensor:
    """Return relations [V * B, C, C] as rows of each crop [V, B * C, C]."""
    return relations.view(crops, -1, relations.shape[2])
