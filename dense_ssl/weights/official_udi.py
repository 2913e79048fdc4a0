"""Whole training states of the official UDI code, to our names and back.

| ours                                | theirs                                                             |
|-------------------------------------|--------------------------------------------------------------------|
| student.backbone.trunk.*            | student: module.backbone.backbone.*, class tokens as one cls_token |
| student.sampler.{attn,norm1}.*      | student: module.backbone.{attn,norm1}.*                            |
| student.head.{mlp,last_layer}.*     | student: module.head.{0,1,2}.*, equal                              |
| teacher.*                           | teacher: the same, with module. or without                         |
| objective.{,plus_,patch_}center [K] | udi_loss: centering.center [3, K]                                  |

Optimiser states are not converted.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dense_ssl.config import UserError
from dense_ssl.weights.layouts import (
    Part,
    class_tokens_of,
    extract_backbone,
    listed,
    select,
    tensors,
)
from dense_ssl.weights.official_distillation import head_tensors

_HEADS = 3  # names of the one head: of class tokens, of second ones, of patches
_SAMPLER = ("backbone.attn.", "backbone.norm1.")
_CENTERS = ("center", "plus_center", "patch_center")


def is_udi(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether a training file with a student and a teacher is UDI's."""
    return isinstance(checkpoint.get("udi_loss"), Mapping)


def from_udi(checkpoint: Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """Return ("udi", our method state) of an official UDI training checkpoint.

    Raises:
        UserError: a part is missing, or a tensor has no place in ours.
    """
    centers = checkpoint["udi_loss"].get("centering.center")
    if centers is None or centers.ndim != 2 or len(centers) != len(_CENTERS):
        raise UserError(
            "no full official training state: centering.center [3, K] of its loss missing; only a "
            "backbone can be read"
        )
    out: dict[str, Tensor] = {}
    sides: tuple[Part, ...] = ("student", "teacher")
    for side in sides:
        state = tensors(checkpoint, side)
        known = ("head.", "backbone.backbone.", *_SAMPLER)
        strange = [name for name in state if not name.startswith(known)]
        if strange:
            raise UserError(f"{len(strange)} tensors of {side} have no place ({listed(strange)})")
        trunk = extract_backbone(checkpoint, side)
        sampler = {name: v for name, v in state.items() if name.startswith(_SAMPLER)}
        out |= {f"{side}.backbone.trunk.{name}": value for name, value in trunk.items()}
        out |= {f"{side}.sampler.{k.removeprefix('backbone.')}": v for k, v in sampler.items()}
        out |= {f"{side}.head.{k}": v for k, v in _shared_head(state, side).items()}
    two = class_tokens_of(select(out, "teacher.backbone.trunk.")) > 1
    kept = (True, two, bool(select(out, "teacher.sampler.")))
    centers = zip(_CENTERS, centers, kept, strict=True)
    out |= {f"objective.{name}": center.clone() for name, center, wanted in centers if wanted}
    return "udi", out


def to_udi(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the "student", "teacher" and "udi_loss" the official code would save of our UDI state.

    Centres of what the method goes without are 0.

    Raises:
        UserError: a tensor has no place in theirs.
    """
    out: dict[str, dict[str, Tensor]] = {}
    placed = 0
    for side, wrapped in (("student", "module."), ("teacher", "")):
        trunk = select(state, f"{side}.backbone.trunk.")
        sampler, head = (select(state, f"{side}.{part}.") for part in ("sampler", "head"))
        placed += len(trunk) + len(sampler) + len(head)
        if "reg_token" in trunk:
            trunk["cls_token"] = torch.cat([trunk["cls_token"], trunk.pop("reg_token")], dim=1)
        names = {f"backbone.backbone.{name}": value for name, value in trunk.items()}
        names |= {f"backbone.{name}": value for name, value in sampler.items()}
        for kind in range(_HEADS):
            names |= {f"head.{kind}.{name}": value for name, value in head.items()}
        out[side] = {wrapped + name: value for name, value in names.items()}
    centers = select(state, "objective.")
    if placed + len(centers) != len(state) or not set(centers) <= set(_CENTERS):
        raise UserError(
            f"{len(state) - placed} of {len(state)} tensors have no place in the official udi layout"
        )
    nothing = torch.zeros_like(centers["center"])
    rows = torch.stack([centers.get(name, nothing) for name in _CENTERS])
    out["udi_loss"] = {"centering.center": rows, "centering.count": torch.zeros(len(rows), 1)}
    return out


def _shared_head(state: Mapping[str, Tensor], side: str) -> dict[str, Tensor]:
    """Return the tensors of the one head, which is stored once for every kind of token."""
    stored = select(state, "head.")
    heads = [select(stored, f"{kind}.") for kind in sorted({name.split(".")[0] for name in stored})]
    first = heads[0] if heads else {}
    if not all(
        head.keys() == first.keys() and all(torch.equal(head[name], first[name]) for name in first)
        for head in heads
    ):
        raise UserError(
            f"head of {side}: its {len(heads)} heads are not one and the same, so a run cannot continue "
            "from them; only a backbone can be read"
        )
    return head_tensors({f"head.{name}": value for name, value in first.items()}, side)
