"""Whole training states of official MoCo, DenseCL and Revisiting code, to our names and back.

| ours                              | MoCo, Revisiting        | DenseCL (OpenSelfSup)                 |
|-----------------------------------|-------------------------|---------------------------------------|
| student.backbone.trunk.*          | encoder_q.*             | encoder_q.0.*, again as backbone.*    |
| student.global_head.{0,2}.*       | encoder_q.fc.{0,2}.*    | encoder_q.1.mlp.{0,2}.*               |
| student.dense_head.{0,2}.* [o, i] |                         | encoder_q.1.mlp2.{0,2}.* [o, i, 1, 1] |
| teacher.*                         | encoder_k.*             | encoder_k.*                           |
| queue.keys [K, D], pointer []     | queue [D, K], queue_ptr | queue [D, K], queue_ptr [1]           |
| dense_queue.keys, pointer         |                         | queue2, queue2_ptr                    |
| backbone_queue.keys, pointer      | queue_backbone, its pointer is queue_ptr, too                   |

MoCo's and Revisiting's files put `module.` before every name; a Revisiting run without neighbours has MoCo's
layout. DINO's, iBOT's and SERE's are in `official_distillation`, UDI's in `official_udi`.
Optimiser states are not converted. The official codes move the key encoder at the start of the next
iteration, ours after the step: a file of theirs is one such move behind ours, which a run that continues
from it makes up within its first steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dense_ssl.config import UserError
from dense_ssl.weights.layouts import extract_backbone, is_distillation, listed, select, tensors
from dense_ssl.weights.official_distillation import from_distillation
from dense_ssl.weights.official_udi import from_udi, is_udi

_SIDES = (("student.", "encoder_q."), ("teacher.", "encoder_k."))


@dataclass(frozen=True)
class _Layout:
    """How one code base names the parts of a method; pairs are (ours, theirs)."""

    method: str
    parts: tuple[tuple[str, str], ...]  # within an encoder, the empty prefix last
    queues: tuple[tuple[str, str], ...]
    prefix: str = ""
    alias: bool = False  # the query trunk once more as `backbone.`
    one_pointer: bool = False  # `queue_ptr` is that of all queues

    def pointer(self, queue: str) -> str:
        """Return their name of a queue's pointer."""
        return "queue_ptr" if self.one_pointer else f"{queue}_ptr"


_MOCO = _Layout(
    "moco", (("global_head.", "fc."), ("backbone.trunk.", "")), (("queue", "queue"),), "module."
)
_DENSECL = _Layout(
    "densecl",
    (("global_head.", "1.mlp."), ("dense_head.", "1.mlp2."), ("backbone.trunk.", "0.")),
    (("queue", "queue"), ("dense_queue", "queue2")),
    alias=True,
)
_REVISITING = _Layout(
    "revisiting",
    _MOCO.parts,
    (("queue", "queue"), ("backbone_queue", "queue_backbone")),
    "module.",
    one_pointer=True,
)
_OPENSELFSUP_MOCO = _Layout(
    "moco",
    (("global_head.", "1.mlp."), ("backbone.trunk.", "0.")),
    (("queue", "queue"),),
    alias=True,
)
_WRITTEN = {"moco": _MOCO, "densecl": _DENSECL, "revisiting": _REVISITING}
OFFICIAL_METHODS = tuple(_WRITTEN)  # what `to_official` can write


def layout_name(method_name: str, state: Mapping[str, Tensor]) -> str:
    """Return the method whose official layout a state has: Revisiting's without neighbours is MoCo's."""
    plain = method_name == "revisiting" and "backbone_queue.keys" not in state
    return "moco" if plain else method_name


def to_official(method_name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the `state_dict` of the official code for the state of one of our methods.

    Raises:
        UserError: the method has no official layout, the trunk is no ResNet, or names do not fit.
    """
    layout = _WRITTEN.get(layout_name(method_name, state))
    if layout is None:
        known = ", ".join(_WRITTEN)
        raise UserError(f"{method_name} has no official layout to write; those with one: {known}")
    if "student.backbone.trunk.conv1.weight" not in state:
        raise UserError(
            f"the official {method_name} layout holds ResNets only; take TO=timm for a ViT"
        )
    missing = [f"{ours}.keys" for ours, _ in layout.queues if f"{ours}.keys" not in state]
    if missing:
        raise UserError(f"the state of {method_name} lacks {listed(missing)}")
    out: dict[str, Tensor] = {}
    for ours, theirs in layout.queues:
        out[layout.prefix + theirs] = state[f"{ours}.keys"].T.contiguous()
        out[layout.prefix + layout.pointer(theirs)] = state[f"{ours}.pointer"].reshape(1)
    for our_side, their_side in _SIDES:
        for our_part, their_part in layout.parts[::-1]:
            for name, value in select(state, our_side + our_part).items():
                convolution = our_part == "dense_head." and value.ndim == 2
                out[f"{layout.prefix}{their_side}{their_part}{name}"] = (
                    value[:, :, None, None] if convolution else value
                )
    shared = len(layout.queues) - 1 if layout.one_pointer else 0
    if len(out) + shared != len(state):
        raise UserError(
            f"{len(state) - len(out) - shared} of {len(state)} tensors have no place in the official "
            f"{method_name} layout"
        )
    if layout.alias:
        trunk = select(state, "student.backbone.trunk.")
        out |= {f"backbone.{name}": value for name, value in trunk.items()}
    return out


def from_official(checkpoint: Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """Return (method name, our method state) of an official training checkpoint.

    Of MoCo, OpenSelfSup, DenseCL, Revisiting, DINO, iBOT, denseSSL, SERE or UDI.

    Raises:
        UserError: it is no full training state: a part is missing, or a tensor has no place in ours.
    """
    if is_distillation(checkpoint):
        return from_udi(checkpoint) if is_udi(checkpoint) else from_distillation(checkpoint)
    theirs = tensors(checkpoint)
    layout = _layout_of(theirs)
    out: dict[str, Tensor] = {}
    for our_side, their_side in _SIDES:
        rest = select(theirs, their_side)
        for our_part, their_part in layout.parts:
            found = select(rest, their_part)
            rest = {name: value for name, value in rest.items() if not name.startswith(their_part)}
            if our_part == "backbone.trunk.":
                found = extract_backbone(found)
            elif set(found) != {f"{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}:
                raise UserError(
                    f"{their_side}{their_part}* is not a head of two layers ({listed(found)}); "
                    "only its backbone can be used"
                )
            if our_part == "dense_head.":
                found = {n: v.flatten(1) if v.ndim == 4 else v for n, v in found.items()}
            out |= {our_side + our_part + name: value for name, value in found.items()}
        if rest:
            raise UserError(f"{len(rest)} unknown tensors in {their_side}* ({listed(rest)})")
    for ours, name in layout.queues:
        out[f"{ours}.keys"] = theirs[name].T.contiguous()
        out[f"{ours}.pointer"] = theirs[layout.pointer(name)].reshape(())
    known = set(_queue_names(layout))
    sides = ("encoder_q.", "encoder_k.", "backbone.")
    strange = [name for name in theirs if not name.startswith(sides) and name not in known]
    if strange:
        raise UserError(
            f"{len(strange)} tensors have no place in {layout.method} ({listed(strange)})"
        )
    return layout.method, out


def _queue_names(layout: _Layout) -> list[str]:
    """Return their names of all queues and pointers."""
    names = [name for _, theirs in layout.queues for name in (theirs, layout.pointer(theirs))]
    return list(dict.fromkeys(names))


def _layout_of(theirs: Mapping[str, Tensor]) -> _Layout:
    """Return the layout of an official state dict by the names in it."""
    if any(name.startswith("encoder_q.0.") for name in theirs):
        layout = _DENSECL if "queue2" in theirs else _OPENSELFSUP_MOCO
    else:
        layout = _REVISITING if "queue_backbone" in theirs else _MOCO
    missing = [name for name in _queue_names(layout) if name not in theirs]
    missing += [f"{side}*" for _, side in _SIDES if not select(theirs, side)]
    if missing:
        raise UserError(
            f"no full official training state: {', '.join(missing)} missing; only a backbone can be read"
        )
    return layout
