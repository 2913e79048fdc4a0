"""A ViT with two class tokens as one with fewer, for tools that know no more.

| TO           | what is left                                          |
|--------------|-------------------------------------------------------|
| one_token    | the first class token and the patches                 |
| second_token | the second class token, as the only one, and patches  |
| no_token     | the patches alone, for detection and segmentation     |

None of them is the same network: in training every token attends to both class tokens, so all features move
once one is gone. How far is written into the file beside the weights.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FEWER = ("one_token", "second_token", "no_token")


def fewer_tokens(trunk: Mapping[str, Tensor], target: str) -> dict[str, Tensor]:
    """Return the trunk of a ViT with a `reg_token` without the class tokens that `target` leaves out."""
    tokens = torch.cat([trunk["cls_token"], trunk["reg_token"]], dim=1)
    kept = {"one_token": [0], "second_token": [1], "no_token": []}[target]
    positions = trunk["pos_embed"]
    cells = range(tokens.shape[1], positions.shape[1])
    state = {name: value for name, value in trunk.items() if name != "reg_token"}
    state["pos_embed"] = positions[:, [*kept, *cells]].contiguous()
    state["cls_token"] = tokens[:, kept].contiguous()
    if not kept:
        del state["cls_token"]
    return state


def timm_options(target: str, class_tokens: int) -> dict[str, Any]:
    """Return what `timm.create_model` must be told to build the network that a target is of."""
    if target == "no_token":
        return {"class_token": False, "global_pool": ""}
    return {"reg_tokens": class_tokens - 1} if class_tokens > 1 and target not in FEWER else {}
