"""The head over class tokens in a training file of DINO, iBOT, SERE, UDI or ours: layers and prototypes."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dense_ssl.backbones import ClassHead
from dense_ssl.weights.layouts import Part, select, tensors

_LAYERS = (0, 2, 4)  # of the MLP; heads with BatchNorm have others, and are not read
_HEADS = ("{part}.head.", "head.0.", "head.")  # ours, UDI's, DINO's and its relatives'
_TINY = 1e-12  # of norms


def class_head(checkpoint: Mapping[str, Any], part: Part, dim: int) -> ClassHead | None:
    """Return the head of one network of a checkpoint; None where it has none for tokens of width `dim`."""
    state = tensors(checkpoint, part)
    found = (select(state, prefix.format(part=part)) for prefix in _HEADS)
    head = next(filter(None, found), {})
    layers: list[tuple[Tensor, Tensor]] = []
    width = dim
    for number in _LAYERS:
        weight, bias = head.get(f"mlp.{number}.weight"), head.get(f"mlp.{number}.bias")
        if weight is None or bias is None or weight.ndim != 2 or weight.shape[1] != width:
            return None
        if bias.shape != weight.shape[:1]:
            return None
        layers.append((weight, bias))
        width = weight.shape[0]
    directions, norms = head.get("last_layer.weight_v"), head.get("last_layer.weight_g")
    if directions is None or norms is None or directions.ndim != 2 or norms.ndim != 2:
        return None
    if directions.shape[1] != width or norms.shape != (len(directions), 1):
        return None
    lengths = directions.float().norm(dim=1, keepdim=True).clamp(min=_TINY)
    return ClassHead(tuple(layers), norms.float() * directions.float() / lengths)
