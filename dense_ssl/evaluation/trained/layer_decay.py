"""Learning rates that fall from the head towards the pixels (ELECTRA's, in BEiT's and MAE's fine-tuning)."""

import re
from typing import Any

from torch import nn

_STAGE = re.compile(r"layer(\d)\.")
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_EMBEDDING = ("cls_token", "reg_token", "pos_embed", "patch_embed.", "norm_pre.")
_STEM = ("conv1.", "bn1.")


def layer_of(name: str, num_layers: int) -> int:
    """Return a parameter's layer, counted from the pixels.

    0 for class tokens, positions, patch embedding and a ResNet's stem; k + 1 for block k, k for stage k of
    a ResNet; num_layers + 1 for everything else (final norm, head).
    """
    name = name.removeprefix("backbone.").removeprefix("trunk.")
    block, stage = _BLOCK.match(name), _STAGE.match(name)
    if name.startswith((*_EMBEDDING, *_STEM)):
        return 0
    if block:
        return int(block[1]) + 1
    return int(stage[1]) if stage else num_layers + 1


def layer_decay_scale(name: str, num_layers: int, decay: float) -> float:
    """Return the factor on a parameter's learning rate: decay^(num_layers + 1 - its layer)."""
    return decay ** (num_layers + 1 - layer_of(name, num_layers))


def freeze_all_but(model: nn.Module, blocks: int) -> None:
    """Stop training of all but the last `blocks` blocks and what stands above them (MAE, section 5.4).

    0 leaves the final norm and the head.
    """
    names = [name for name, _ in model.named_parameters()]
    layers = len({m[0] for name in names if (m := _BLOCK.search(name))})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(layer_of(name, layers) > layers - blocks)


def parameter_groups(
    model: nn.Module, layer_decay: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Return AdamW's groups of what is trained, one per learning rate and decay.

    `lr_scale` is the layer's factor.
    """
    names = [name for name, _ in model.named_parameters()]
    layers = len({m[0] for name in names if (m := _BLOCK.search(name) or _STAGE.search(name))})
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = layer_decay_scale(name, layers, layer_decay)
        bare = parameter.ndim == 1 or name.endswith(("pos_embed", "cls_token", "reg_token"))
        decay = 0.0 if bare else weight_decay
        group = groups.setdefault(
            (scale, decay), {"params": [], "lr_scale": scale, "weight_decay": decay}
        )
        group["params"].append(parameter)
    return list(groups.values())
