"""The same weights under others' names: MoCo, OpenSelfSup, DenseCL, DINO, iBOT, UDI, detectron2, ours.

Everything here maps names to names; nothing reads a file or builds a network. In all of them the trunk
is a plain ResNet with torchvision's names (318 tensors for a ResNet-50 without `fc`) or a plain ViT with
timm's, below a prefix. Layouts: `MoCo` module.encoder_q.*, `OpenSelfSup` and `DenseCL` encoder_q.0.*
(trunk) and encoder_q.1.* (neck), `MaskContrast` model_q.backbone.*, `detectron2` stem.* and res2.* to
res5.*; DINO and iBOT have one state each under `student` and `teacher`, with backbone.* and head.*; UDI's
has the trunk as backbone.backbone.*, with all class tokens as `cls_token`: timm's `reg_token` are the others.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dense_ssl.checkpoint import FORMAT
from dense_ssl.config import UserError
from dense_ssl.weights.transformers_names import from_transformers, is_transformers

Part = Literal["student", "teacher"]

# In order of preference: DenseCL's files hold the trunk twice, and `encoder_q.0` is the original.
_PREFIXES = ("encoder_q.0.", "encoder_q.", "backbone.backbone.", "backbone.", "model_q.backbone.")
# What may stand beside a trunk: a classifier, a mask token, SERE's heads, UDI's attention module
_NOT_TRUNK = (
    "fc.", "head.", "masked_embed", "mask_token", "pixel_sere", "channel_sere", "attn.", "norm1.",
)  # fmt: skip
# First layers of projection heads: ours, DINO's and its relatives', UDI's, MoCo-v2's and OpenSelfSup's
_HEADS: dict[str, Literal["gelu", "relu"]] = {
    "{part}.head.mlp.0.": "gelu", "head.mlp.0.": "gelu", "head.0.mlp.0.": "gelu",
    "{part}.global_head.0.": "relu", "encoder_q.fc.0.": "relu", "encoder_q.1.mlp.0.": "relu",
}  # fmt: skip
_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# (bottleneck blocks, blocks per stage, channels of the first 3x3 convolution: out, in) -> timm name
_RESNETS: dict[tuple[bool, tuple[int, ...], tuple[int, ...]], str] = {
    (False, (2, 2, 2, 2), (64, 64)): "resnet18",
    (False, (3, 4, 6, 3), (64, 64)): "resnet34",
    (True, (3, 4, 6, 3), (64, 64)): "resnet50",
    (True, (3, 4, 23, 3), (64, 64)): "resnet101",
    (True, (3, 8, 36, 3), (64, 64)): "resnet152",
    (True, (3, 4, 6, 3), (128, 128)): "wide_resnet50_2",
    (True, (3, 4, 23, 3), (128, 128)): "wide_resnet101_2",
    (True, (3, 4, 6, 3), (128, 4)): "resnext50_32x4d",
}
_VITS = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large"}


def extract_backbone(checkpoint: Mapping[str, Any], part: Part = "student") -> dict[str, Tensor]:
    """Return the trunk of any known checkpoint or state dict under its torchvision (or ViT: timm) names.

    `part` chooses between the two networks of this project's own checkpoints and of DINO's and iBOT's;
    other official files always give the query encoder. Heads and mask tokens are dropped. Counters
    `num_batches_tracked`, which old files lack, are added as zero.

    Raises:
        UserError: nothing looks like a trunk, or tensors of a ResNet are missing or left over.
    """
    state = tensors(checkpoint, part)
    own = select(state, f"{part}.backbone.trunk.")
    found = own or next(filter(None, (select(state, prefix) for prefix in _PREFIXES)), state)
    if is_transformers(found):
        found = from_transformers(found)
    if "stem.conv1.weight" in found:
        found = {from_detectron2_name(name): value for name, value in found.items()}
    trunk = {name: value for name, value in found.items() if not name.startswith(_NOT_TRUNK)}
    if "conv1.weight" in trunk:
        return _complete_resnet(trunk)
    if "conv1.0.weight" in trunk:  # a ResNet with a deep stem, which only timm's names can have
        return trunk
    if own or "patch_embed.proj.weight" in trunk:
        return _with_one_cls_token(trunk)
    raise UserError(
        f"no backbone among its {len(state)} tensors ({listed(state)}); known are ResNets as MoCo, "
        "OpenSelfSup, DenseCL, MaskContrast, torchvision, timm, transformers and detectron2 store them, and "
        "ViTs as DINO, iBOT, timm and our export to transformers do"
    )


def first_projection(
    checkpoint: Mapping[str, Any], part: Part, dim: int
) -> tuple[Tensor, Tensor, Literal["gelu", "relu"]] | None:
    """Return weight, bias and activation of the first layer of a checkpoint's projection head.

    Of this project's files and of the official ones of DINO, iBOT, SERE, UDI, MoCo-v2 and DenseCL; None
    where there is none, or not one for features of width `dim`.
    """
    state = tensors(checkpoint, part)
    for prefix, activation in _HEADS.items():
        prefix = prefix.format(part=part)
        weight, bias = state.get(f"{prefix}weight"), state.get(f"{prefix}bias")
        if weight is not None and bias is not None and weight.ndim == 2 and weight.shape[1] == dim:
            return weight, bias, activation
    return None


def is_distillation(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether this is a training file of DINO, iBOT or what was built on their code."""
    return all(isinstance(checkpoint.get(part), Mapping) for part in ("student", "teacher"))


def tensors(checkpoint: Mapping[str, Any], part: Part = "student") -> dict[str, Tensor]:
    """Return the tensors of a checkpoint's state dict, without the prefix that DDP puts before names.

    Of DINO's and iBOT's training files those of `part`.
    """
    state: Any = checkpoint
    if checkpoint.get("format") == FORMAT:
        state = checkpoint.get("method", {})
    else:
        for key in (part, "state_dict", "model"):
            if isinstance(checkpoint.get(key), Mapping):
                state = checkpoint[key]
                break
    return {
        name.removeprefix("module."): value
        if isinstance(value, Tensor)
        else torch.from_numpy(value)
        for name, value in state.items()
        if isinstance(value, Tensor | np.ndarray)
    }


def select(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries below `prefix`, without it."""
    return {k.removeprefix(prefix): value for k, value in state.items() if k.startswith(prefix)}


def listed(names: Iterable[str], count: int = 3) -> str:
    """Return the first names as text, for a message."""
    names = list(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "") or "none"


def resnet_of(trunk: Mapping[str, Tensor]) -> str:
    """Return the timm name of the ResNet whose torchvision-named tensors these are.

    Raises:
        UserError: numbers of blocks and widths are of no known ResNet.
    """
    bottleneck, blocks = _shape_of(trunk)
    convolution = trunk["layer1.0.conv2.weight"]
    key = (bottleneck, blocks, tuple(convolution.shape[:2]))
    if key not in _RESNETS or trunk["conv1.weight"].shape[0] != 64:
        raise UserError(
            f"a ResNet with {'-'.join(map(str, blocks))} blocks and a first 3x3 convolution of "
            f"{tuple(convolution.shape)} is none of {', '.join(_RESNETS.values())}; name it: FILE?arch=NAME"
        )
    return _RESNETS[key]


def class_tokens_of(trunk: Mapping[str, Tensor]) -> int:
    """Return how many class tokens a ViT's trunk has, those that timm calls registers among them."""
    more = trunk.get("reg_token")
    return 1 if more is None else 1 + more.shape[1]


def _with_one_cls_token(trunk: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a ViT's trunk with its first class token as `cls_token` and the others as `reg_token`.

    Raises:
        UserError: UDI's trunk has positions for another number of class tokens than it has.
    """
    tokens = trunk.get("cls_token")
    if tokens is None or tokens.shape[1] == 1:
        return trunk
    cells = trunk["pos_embed"].shape[1] - tokens.shape[1] if "pos_embed" in trunk else 0
    if cells < 1 or math.isqrt(cells) ** 2 != cells:
        raise UserError(
            f"a ViT with {tokens.shape[1]} class tokens and {cells} positions of patches, which are no "
            "square: its position table is of another network"
        )
    return trunk | {"cls_token": tokens[:, :1], "reg_token": tokens[:, 1:]}


def published_vit_of(trunk: Mapping[str, Tensor]) -> str:
    """Return the timm name of the ViT of DINO's or iBOT's code whose tensors these are.

    Raises:
        UserError: width and depth are of none of them.
    """
    width, _, patch, _ = trunk["patch_embed.proj.weight"].shape
    depth = len({name.split(".")[1] for name in trunk if name.startswith("blocks.")})
    side = patch * math.isqrt(trunk["pos_embed"].shape[1] - class_tokens_of(trunk))
    if (width, depth) not in _VITS:
        raise UserError(
            f"a ViT of width {width} and depth {depth} is none of {', '.join(_VITS.values())}; name "
            "it: FILE?arch=NAME"
        )
    return f"vit_{_VITS[width, depth]}_patch{patch}_{side}"


def _shape_of(trunk: Mapping[str, Tensor]) -> tuple[bool, tuple[int, ...]]:
    """Return whether blocks are bottlenecks, and how many each stage has by its highest block."""
    places = [re.match(r"layer([1-4])\.(\d+)\.", name) for name in trunk]
    pairs = [(int(place[1]), int(place[2])) for place in places if place]
    blocks = tuple(max((b + 1 for s, b in pairs if s == stage), default=0) for stage in range(1, 5))
    return "layer1.0.conv3.weight" in trunk, blocks


def _complete_resnet(trunk: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the trunk in torchvision's order, or say which of its tensors are missing or strange."""
    expected = _resnet_names(*_shape_of(trunk))
    zero = torch.zeros((), dtype=torch.int64)
    complete = {
        name: trunk.get(name, zero) if name.endswith("num_batches_tracked") else trunk.get(name)
        for name in expected
    }
    missing = [name for name, value in complete.items() if value is None]
    strange = [name for name in trunk if name not in complete]
    if missing or strange:
        raise UserError(
            f"only {len(expected) - len(missing)} of {len(expected)} tensors of a plain ResNet: "
            f"{len(missing)} missing ({listed(missing)}), {len(strange)} unknown ({listed(strange)})"
        )
    return {name: value for name, value in complete.items() if value is not None}


def _resnet_names(bottleneck: bool, blocks: tuple[int, ...]) -> list[str]:
    """Return the names of a ResNet's tensors without `fc`, in torchvision's order."""
    names = ["conv1.weight", *(f"bn1.{key}" for key in _NORM)]
    for stage, count in enumerate(blocks, start=1):
        for block in range(max(count, 1)):
            place = f"layer{stage}.{block}"
            for number in range(1, 4 if bottleneck else 3):
                names.append(f"{place}.conv{number}.weight")
                names += [f"{place}.bn{number}.{key}" for key in _NORM]
            if block == 0 and (bottleneck or stage > 1):
                names.append(f"{place}.downsample.0.weight")
                names += [f"{place}.downsample.1.{key}" for key in _NORM]
    return names


def to_detectron2_name(key: str) -> str:
    """Return detectron2's name of a torchvision trunk tensor, e.g. `stem.conv1.norm.bias`."""
    name = key if "layer" in key else f"stem.{key}"
    name = re.sub(r"layer([1-4])", lambda m: f"res{int(m[1]) + 1}", name)
    name = re.sub(r"bn([123])", r"conv\1.norm", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def from_detectron2_name(name: str) -> str:
    """Return torchvision's name of a detectron2 trunk tensor."""
    key = name.removeprefix("stem.")
    key = re.sub(r"^res([2-5])", lambda m: f"layer{int(m[1]) - 1}", key)
    key = re.sub(r"conv([123])\.norm", r"bn\1", key)
    return key.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")


def to_detectron2(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return the trunk of any known state dict as the object that detectron2 reads from a pickle.

    The detector must then use STRIDE_IN_1X1 False, RGB input and ImageNet's mean and deviation.
    """
    trunk = extract_backbone(state_dict)
    if "conv1.weight" not in trunk:
        raise UserError("detectron2 names exist for ResNets only; take timm's for a ViT")
    return {
        "model": {to_detectron2_name(k): v.detach().cpu().numpy() for k, v in trunk.items()},
        "__author__": "dense_ssl",
        "matching_heuristics": True,
    }
