"""Label propagation over the frames of a video, by both published sets of rules."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from dense_ssl.evaluation.matching.label_propagation import (
    DINO,
    REVISITING,
    Labelled,
    carried,
    propagate,
)


def label_propagate(
    feats: Tensor, lbl0: Tensor, n: int, radius: int, T: float, topk: int
) -> Tensor:
    """Return the labels [frames, L, H, W] that the first frame's give, by the rules of Jabri et al.

    feats: [C, frames, H, W], normalised inside. lbl0: of the first frame, a class a cell, int [H, W], or
    one-hot [L, H, W]. n: recent frames, where the first one stands in for those before it.
    """
    rules = replace(REVISITING, recent=n, radius=radius, temperature=T, topk=topk)
    first = F.one_hot(lbl0.long()).permute(2, 0, 1) if lbl0.ndim == 2 else lbl0
    return torch.stack(list(propagate(feats.unbind(1), first.to(feats), rules)))


def propagate_labels(
    feat_tar: Tensor,
    ctx_feats: Sequence[Tensor],
    ctx_segs: Sequence[Tensor],
    radius: int,
    topk: int,
    T: float = 0.1,
) -> Tensor:
    """Return the labels [C, h, w] of a target from its context, by DINO's rules.

    feat_tar: [hw, D]; ctx_feats: [D, hw] each; ctx_segs: [1, C, h, w] each. Normalised inside.
    """
    rules = replace(DINO, radius=radius, topk=topk, temperature=T)
    height, width = ctx_segs[0].shape[2:]
    first, *recent = [
        Labelled(F.normalize(cells, dim=0).unflatten(1, (height, width)), labels[0])
        for cells, labels in zip(ctx_feats, ctx_segs, strict=True)
    ]
    cells = F.normalize(feat_tar.T, dim=0).unflatten(1, (height, width))
    return carried(cells, first, recent, rules)
