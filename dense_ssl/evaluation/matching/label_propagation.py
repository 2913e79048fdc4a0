"""Labels of a video's first frame carried to the others by the similarity of cells. Nothing is trained.

A target cell compares itself with cells of earlier frames that lie near its own place, keeps the few most
similar, and takes the mean of their labels, weighted by exp(cosine / temperature). Two published sets of
rules: Jabri et al. 2020 (arXiv:2006.14613), which Van Gansbeke et al. 2021 report with, and Caron et al.
2021 (DINO, arXiv:2104.14294), which iBOT, SERE and UDI report with.

Frames are streamed and targets are taken a few rows at a time, each tile of cells against the window of a
source frame that its neighbourhoods reach: memory grows with the window, never with the square of a frame.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

_TILE = 8  # side in cells of the targets that share a window; a window is _TILE + 2 * reach wide


@dataclass(frozen=True, slots=True)
class Rules:
    """What a target cell looks at, and what it makes of that."""

    recent: int  # frames before the target, besides the first
    repeated: bool  # the first frame stands in for recent ones that there are not yet
    shape: Literal[
        "disc", "square"
    ]  # of the neighbourhood: distance < radius, or offsets <= radius
    radius: int  # in cells
    whole_first: bool  # all of the first frame is searched, not the neighbourhood alone
    topk: int  # most similar cells kept, over all frames together
    ties: bool  # those as similar as the last one kept are kept as well
    temperature: float

    @property
    def reach(self) -> int:
        """The largest offset on an axis within the neighbourhood."""
        return self.radius if self.shape == "square" else max(self.radius - 1, 0)


# Van Gansbeke et al. 2021: 20 frames and the first, disc of 12, ten, 0.05
REVISITING = Rules(20, True, "disc", 12, True, 10, False, 0.05)
# iBOT: 7 frames and the first, square of 12, five, 0.1
DINO = Rules(7, False, "square", 12, False, 5, True, 0.1)


@dataclass(frozen=True, slots=True)
class Labelled:
    """A frame whose labels are known, or were predicted."""

    cells: Tensor  # [D, h, w], unit vectors
    labels: Tensor  # [C, h, w], a weight for every class


@torch.no_grad()
def propagate(features: Iterable[Tensor], labels: Tensor, rules: Rules) -> Iterator[Tensor]:
    """Yield the labels [C, h, w] of every frame: the first one's as given, then those carried to it.

    Args:
        features: of the frames in order, [D, h, w] each, of any length.
        labels: of the first frame, [C, h, w].
        rules: which frames, which cells, how weighted.
    """
    recent: deque[Labelled] = deque(maxlen=rules.recent)
    first: Labelled | None = None
    for feature in features:
        cells = F.normalize(feature, dim=0)
        if first is None:
            first = Labelled(cells, labels)
            if rules.repeated:
                recent.extend([first] * rules.recent)
            yield labels
            continue
        frame = Labelled(cells, carried(cells, first, list(recent), rules))
        recent.append(frame)
        yield frame.labels


@torch.no_grad()
def carried(cells: Tensor, first: Labelled, recent: Sequence[Labelled], rules: Rules) -> Tensor:
    """Return the labels [C, h, w] that cells [D, h, w] take from the first and recent frames."""
    near = recent if rules.whole_first else [first, *recent]
    _, height, width = cells.shape
    tiles = math.ceil(width / _TILE)
    across = F.pad(cells, (0, tiles * _TILE - width))
    out = []
    for top in range(0, height, _TILE):
        rows = min(_TILE, height - top)
        query = across[:, top : top + rows].unflatten(2, (tiles, _TILE))
        query = query.permute(2, 1, 3, 0).flatten(1, 2)  # [tiles, q, D]
        low, high = max(top - rules.reach, 0), min(top + rows + rules.reach, height)
        outside = ~_neighbours((top, rows), (low, high), width, tiles, rules).to(cells.device)
        scores, labels = [], []
        if rules.whole_first:
            scores.append(query @ first.cells.flatten(1))
            labels.append(first.labels.flatten(1).expand(tiles, -1, -1))
        for frame in near:
            windows = _windows(frame.cells[:, low:high], tiles, rules.reach)
            scores.append((query @ windows).masked_fill_(outside, -math.inf))
            labels.append(_windows(frame.labels[:, low:high], tiles, rules.reach))
        mixed = _mixed(torch.cat(scores, 2), torch.cat(labels, 2), rules)  # [tiles, C, q]
        strip = mixed.unflatten(2, (rows, _TILE)).permute(1, 2, 0, 3).flatten(2)
        out.append(strip[..., :width])
    return torch.cat(out, dim=1)


def _mixed(scores: Tensor, labels: Tensor, rules: Rules) -> Tensor:
    """Mean labels [tiles, C, q] of sources [tiles, C, n], by the largest of scores [tiles, q, n]."""
    best, index = scores.topk(min(rules.topk, scores.shape[2]), dim=2)
    if rules.ties:
        return _mixed_with_ties(scores, labels, best, rules.temperature)
    weights = (best / rules.temperature).softmax(2)  # [tiles, q, k]
    taken = labels.gather(2, index.flatten(1)[:, None].expand(-1, labels.shape[1], -1))
    return (taken.unflatten(2, index.shape[1:]) * weights[:, None]).sum(3)


def _mixed_with_ties(scores: Tensor, labels: Tensor, best: Tensor, temperature: float) -> Tensor:
    """The same by all scores that are not below the least of `best` [tiles, q, k], however many."""
    kept = (scores >= best[..., -1:]) & (scores > -math.inf)
    tile, target, source = kept.nonzero(as_tuple=True)
    weights = ((scores[tile, target, source] - best[tile, target, 0]) / temperature).exp()
    row = tile * best.shape[1] + target
    total = scores.new_zeros(best.shape[0] * best.shape[1]).index_add_(0, row, weights)
    shares = (weights / total[row])[:, None] * labels[tile, :, source]
    mixed = labels.new_zeros(len(total), labels.shape[1]).index_add_(0, row, shares)
    return mixed.unflatten(0, best.shape[:2]).transpose(1, 2)


def _windows(rows: Tensor, tiles: int, reach: int) -> Tensor:
    """What each of a row of tiles may see of rows [D, r, w]: [tiles, D, r * (_TILE + 2 * reach)]."""
    right = tiles * _TILE - rows.shape[2] + reach
    wide = F.pad(rows, (reach, right)).unfold(2, _TILE + 2 * reach, _TILE)  # [D, r, tiles, side]
    return wide.permute(2, 0, 1, 3).flatten(2)


def _neighbours(
    target: tuple[int, int], source: tuple[int, int], width: int, tiles: int, rules: Rules
) -> Tensor:
    """Which cells of a window are neighbours of which targets, bool [tiles, q, n].

    target: first row and number of rows; source: first row and the one after the last.
    """
    y = torch.arange(target[0], target[0] + target[1])
    x = torch.arange(_TILE)
    from_y = torch.arange(*source)
    from_x = torch.arange(_TILE + 2 * rules.reach) - rules.reach  # relative to the tile
    dy = (y[:, None] - from_y).abs()[:, None, :, None]
    dx = (x[:, None] - from_x).abs()[None, :, None, :]
    if rules.shape == "square":
        near = (dy <= rules.radius) & (dx <= rules.radius)
    else:
        near = dy**2 + dx**2 < rules.radius**2
    place = from_x + _TILE * torch.arange(tiles)[:, None]  # [tiles, side] in the frame
    within = (place >= 0) & (place < width)
    return (near & within[:, None, None, None]).flatten(3).flatten(1, 2)
