"""The optimisers of networks trained end to end: rates by layer, and what is not decayed."""

from typing import Any

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from dense_ssl.evaluation.trained.layer_decay import layer_decay_scale
from dense_ssl.evaluation.trained.settings import TrainedSettings

_POSITIONS = ("pos_embed", "cls_token", "reg_token")


def num_layers(trunk: nn.Module) -> int:
    """Return the layers that rates fall along: a ViT's blocks, a ResNet's four stages."""
    return len(getattr(trunk, "blocks", ())) or 4


def trained_optimizer(model: nn.Module, config: TrainedSettings, *, depth: int) -> Optimizer:
    """Return the protocol's optimiser; every group has `lr_scale`, the factor of its layer."""
    groups = trained_groups(model, config, depth=depth)
    if config.optimizer == "sgd":
        return SGD(groups, lr=0.0, momentum=0.9)
    make = Adam if config.optimizer == "adam" else AdamW
    return make(groups, lr=0.0, betas=(0.9, 0.999))


def trained_groups(
    model: nn.Module, config: TrainedSettings, *, depth: int
) -> list[dict[str, Any]]:
    """Return the trained parameters, a group per layer's factor and weight decay.

    Of the backbone is what is called `trunk. ... backbone.NAME`; all else is trained at the full rate.
    depth: as `num_layers` gives it.
    """
    norms = {
        f"{name}.{inner}"
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm | nn.modules.batchnorm._BatchNorm)
        for inner, _ in module.named_parameters(recurse=False)
    }
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        bare = {
            "none": False,
            "norms": name in norms or name.endswith(_POSITIONS),
            "vectors": parameter.ndim == 1 or name.endswith(_POSITIONS),
            "flat": parameter.ndim == 1,
        }[config.no_decay]
        inside, _, rest = name.partition("backbone.")
        of_backbone = bool(rest) and inside.startswith("trunk.")
        scale = layer_decay_scale(rest, depth, config.layer_decay) if of_backbone else 1.0
        decay = 0.0 if bare else config.weight_decay
        group = groups.setdefault(
            (scale, decay), {"params": [], "lr_scale": scale, "weight_decay": decay}
        )
        group["params"].append(parameter)
    return list(groups.values())
