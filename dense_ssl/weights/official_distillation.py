"""Whole training states of the official DINO, iBOT, denseSSL and SERE code, to our names.

| ours                                     | theirs                                                      |
|------------------------------------------|-------------------------------------------------------------|
| student.backbone.trunk.*                 | student: module.backbone.*                                  |
| masking.token                            | student: module.backbone.masked_embed, iBOT                 |
| student.head.mlp.{0,2,4}.*               | student: module.head.mlp.{0,2,4}.*                          |
| student.head.last_layer.*, last_layer2.* | student: module.head.*; shared, iBOT lists both, equal      |
| student.{pixel,channel}_sere*.*          | student: module.backbone.*, SERE; convolutions [C, C, 1, 1] |
| teacher.*                                | teacher: backbone.*, head.*, with module. or without        |
| objective.center [K]                     | ibot_loss or dino_loss: center [1, K]                       |
| objective.patch_center [K_patch]         | ibot_loss: center2 [1, 1, K_patch]                          |

Optimiser states are not converted.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dense_ssl.config import UserError
from dense_ssl.weights.layouts import Part, extract_backbone, listed, select, tensors

_HEAD = [f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]
_LAST = ("last_layer.weight_g", "last_layer.weight_v")
_LAST2 = ("last_layer2.weight_g", "last_layer2.weight_v")


def from_distillation(checkpoint: Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """Return (method name, our method state) of an official DINO, iBOT or SERE training checkpoint.

    denseSSL's are iBOT's: de-coupling has no weights of its own.

    Raises:
        UserError: a part is missing, or a tensor has no place in ours.
    """
    ibot = isinstance(checkpoint.get("ibot_loss"), Mapping)
    centers = checkpoint.get("ibot_loss" if ibot else "dino_loss", {})
    missing = [c for c in (("center", "center2") if ibot else ("center",)) if c not in centers]
    if missing:
        raise UserError(
            f"no full official training state: {listed(missing)} of its loss missing; only a backbone "
            "can be read"
        )
    out: dict[str, Tensor] = {"objective.center": centers["center"].flatten()}
    sides: tuple[Part, ...] = ("student", "teacher")
    heads = {side: head_tensors(tensors(checkpoint, side), side) for side in sides}
    if heads["student"].keys() != heads["teacher"].keys():
        raise UserError(
            "patches share the prototypes of class tokens in one of student and teacher only; a run "
            "cannot continue from that, only a backbone can be read"
        )
    for side in sides:
        state = tensors(checkpoint, side)
        trunk = extract_backbone(checkpoint, side)
        known = ("head.", "backbone.")
        beside = {n: v for n, v in select(state, "backbone.").items() if n not in trunk}
        relations = {
            n: v for n, v in beside.items() if n.startswith(("pixel_sere", "channel_sere"))
        }
        strange = [name for name in state if not name.startswith(known)]
        strange += [n for n in beside if n not in relations and n != "masked_embed"]
        if strange:
            raise UserError(f"{len(strange)} tensors of {side} have no place ({listed(strange)})")
        out |= {f"{side}.backbone.trunk.{name}": value for name, value in trunk.items()}
        out |= {f"{side}.head.{name}": value for name, value in heads[side].items()}
        for name, value in relations.items():
            out[f"{side}.{name}"] = value.flatten(1) if value.ndim == 4 else value
    if ibot:
        token = tensors(checkpoint, "student").get("backbone.masked_embed")
        if token is None:
            raise UserError("its student has no masked_embed; only a backbone can be read")
        out |= {"objective.patch_center": centers["center2"].flatten(), "masking.token": token}
    sere = any(".pixel_sere." in name for name in out)
    return "sere" if sere else "ibot" if ibot else "dino", out


def head_tensors(state: Mapping[str, Tensor], side: str) -> dict[str, Tensor]:
    """Return the tensors of a head; prototypes of patches only where they are not those of class tokens."""
    head = select(state, "head.")
    shared = all(name in head for name in _LAST2) and all(
        torch.equal(head[a], head[b]) for a, b in zip(_LAST, _LAST2, strict=True)
    )
    names = [*_HEAD, *_LAST]
    if not shared and any(name in head for name in _LAST2):
        names += _LAST2
    missing = [name for name in names if name not in head]
    strange = [name for name in head if name not in (*names, *_LAST2)]
    if missing or strange:
        raise UserError(
            f"head of {side}: {len(missing)} tensors missing ({listed(missing)}), {len(strange)} unknown "
            f"({listed(strange)}); heads of three layers without norms can be read, else only a backbone"
        )
    return {name: head[name] for name in names}
