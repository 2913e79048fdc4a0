"""A trunk as transformers' `ResNetModel` or `Dinov2WithRegistersModel` names it, and back.

The names are those of files on the hub, which transformers 4 and 5 both read. A ViT goes into the DINOv2
layout whatever its method: it has LayerNorm's epsilon and the bicubic resampling of positions that timm has,
no pooler that would have to be invented, and it serves as a backbone for dense tasks. What timm lacks is
written so that it does nothing: layer scales of 1, a mask token that nobody asks for.

Registers have no positions there. timm's second class token has one, which is added into it.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# (timm, transformers) of a block of a ViT; each has a weight and a bias.
_BLOCK = (
    ("norm1", "norm1"),
    ("attn.proj", "attention.output.dense"),
    ("norm2", "norm2"),
    ("mlp.fc1", "mlp.fc1"),
    ("mlp.fc2", "mlp.fc2"),
)
_QKV = tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))
_PATCHES = "embeddings.patch_embeddings.projection"
_STEM = "embedder.embedder"
_KINDS = ("weight", "bias")


def is_transformers(state: Mapping[str, Tensor]) -> bool:
    """Return whether these are tensors as transformers names them."""
    return f"{_PATCHES}.weight" in state or f"{_STEM}.convolution.weight" in state


def to_transformers(trunk: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a plain ResNet's or ViT's trunk under transformers' names.

    Tensors that have no place there are left out; `from_transformers` then gives a smaller trunk.
    """
    if "conv1.weight" in trunk:
        return {_resnet_name(name): value for name, value in trunk.items()}
    return _vit(trunk)


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the trunk of `to_transformers` under timm's names.

    A second class token comes back with its position in it, and a position of zero: the same network.
    """
    if f"{_STEM}.convolution.weight" in state:
        return {_timm_resnet_name(name): value for name, value in state.items()}
    positions = state["embeddings.position_embeddings"]
    registers = state.get("embeddings.register_tokens", positions[:, :0])
    trunk = {
        "cls_token": state["embeddings.cls_token"],
        "pos_embed": torch.cat(
            (positions[:, :1], torch.zeros_like(registers), positions[:, 1:]), dim=1
        ),
    }
    if registers.shape[1]:
        trunk["reg_token"] = registers
    for kind in _KINDS:
        trunk[f"patch_embed.proj.{kind}"] = state[f"{_PATCHES}.{kind}"]
        trunk[f"norm.{kind}"] = state[f"layernorm.{kind}"]
        for block in range(_depth(state, "encoder.layer.")):
            here, there = f"blocks.{block}", f"encoder.layer.{block}"
            for ours, theirs in _BLOCK:
                trunk[f"{here}.{ours}.{kind}"] = state[f"{there}.{theirs}.{kind}"]
            parts = [state[f"{there}.{name}.{kind}"] for name in _QKV]
            trunk[f"{here}.attn.qkv.{kind}"] = torch.cat(parts)
    return trunk


def _vit(trunk: Mapping[str, Tensor]) -> dict[str, Tensor]:
    width = trunk["norm.weight"].shape[0]
    tokens = 1 + (trunk["reg_token"].shape[1] if "reg_token" in trunk else 0)
    positions = trunk["pos_embed"]
    registers = trunk.get("reg_token", positions[:, :0])
    state = {
        "embeddings.cls_token": trunk["cls_token"],
        "embeddings.mask_token": positions.new_zeros(1, width),
        "embeddings.register_tokens": registers + positions[:, 1:tokens],
        "embeddings.position_embeddings": torch.cat((positions[:, :1], positions[:, tokens:]), 1),
    }
    for kind in _KINDS:
        state[f"{_PATCHES}.{kind}"] = trunk[f"patch_embed.proj.{kind}"]
        state[f"layernorm.{kind}"] = trunk[f"norm.{kind}"]
        for block in range(_depth(trunk, "blocks.")):
            here, there = f"blocks.{block}", f"encoder.layer.{block}"
            for ours, theirs in _BLOCK:
                state[f"{there}.{theirs}.{kind}"] = trunk[f"{here}.{ours}.{kind}"]
            for name, part in zip(_QKV, trunk[f"{here}.attn.qkv.{kind}"].chunk(3), strict=True):
                state[f"{there}.{name}.{kind}"] = part
            for number in (1, 2):
                state[f"{there}.layer_scale{number}.lambda1"] = positions.new_ones(width)
    return {name: value.contiguous() for name, value in state.items()}


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    blocks = (name.removeprefix(prefix) for name in state if name.startswith(prefix))
    return len({name.partition(".")[0] for name in blocks})


def _resnet_name(name: str) -> str:
    """Return transformers' name of a torchvision-named trunk tensor."""
    where, _, kind = name.rpartition(".")
    if "layer" not in where:
        return f"{_STEM}.{'convolution' if where == 'conv1' else 'normalization'}.{kind}"
    stage, block, rest = re.fullmatch(r"layer(\d+)\.(\d+)\.(.*)", where).groups()  # pyright: ignore
    place = f"encoder.stages.{int(stage) - 1}.layers.{block}"
    if rest.startswith("downsample"):
        part = "convolution" if rest == "downsample.0" else "normalization"
        return f"{place}.shortcut.{part}.{kind}"
    part, number = ("convolution" if rest.startswith("conv") else "normalization"), int(rest[-1])
    return f"{place}.layer.{number - 1}.{part}.{kind}"


def _timm_resnet_name(name: str) -> str:
    """Return torchvision's name of a transformers ResNet's tensor."""
    where, _, kind = name.rpartition(".")
    convolution = where.endswith("convolution")
    if where.startswith(_STEM):
        return f"{'conv1' if convolution else 'bn1'}.{kind}"
    numbers = re.findall(r"\.(\d+)", where)
    place = f"layer{int(numbers[0]) + 1}.{numbers[1]}"
    if ".shortcut." in where:
        return f"{place}.downsample.{0 if convolution else 1}.{kind}"
    return f"{place}.{'conv' if convolution else 'bn'}{int(numbers[2]) + 1}.{kind}"
