"""What a method keeps beside its networks: prototypes and queues, and whether they are alive."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dense_ssl.methods.ibot_objective import IBotObjective
from dense_ssl.methods.method import Method
from dense_ssl.methods.parts import KeyQueue
from dense_ssl.methods.prototype_head import PrototypeHead
from dense_ssl.methods.udi_objective import UdiObjective
from dense_ssl.schedule import Step
from dense_ssl.watch.measures import rankme, similarity, usage

_TOKENS = 4096  # at most so many, evenly spaced
_CHUNK = 512  # tokens whose logits are made at once: 128 MB with 65,536 prototypes


def prototype_measures(
    method: Method, tokens: Tensor, cells: Tensor, step: Step
) -> dict[str, float]:
    """Return how the teacher uses its prototypes, {} for a method without.

    tokens [n, D] are class tokens of the teacher's backbone, cells [m, D] its patches. Targets are made as
    training makes them, centred and sharpened. `prototypes_dead` is the percentage that no token is
    nearest to, which with few tokens is high in health too; `prototypes_used` and `prototypes_each` are
    those of `measures.usage`. With `patch_` in front: of patches, where they are trained against prototypes.
    """
    head = dict(method.teacher.items()).get("head")
    objective: Any = getattr(method, "objective", None)
    if not isinstance(head, PrototypeHead) or not isinstance(
        objective, IBotObjective | UdiObjective
    ):
        return {}
    config: Any = objective.config
    T = config.teacher_temperature.at(step)
    kinds = [("", tokens, head.prototypes(), objective.center, T)]
    if isinstance(objective, IBotObjective) and objective.patch is not None:
        T = objective.patch.patch_temperature.at(step)
        kinds.append(("patch_", cells, head.patch_prototypes(), objective.patch_center, T))
    found: dict[str, float] = {}
    for prefix, seen, prototypes, center, T in kinds:
        some = seen[:: -(-len(seen) // _TOKENS)]
        parts, nearest = [], torch.zeros(len(prototypes), device=some.device)
        for chunk in some.split(_CHUNK):
            logits = F.linear(head.project(chunk).float(), prototypes.float())
            parts.append(((logits - center) / T).softmax(1))
            nearest.index_fill_(0, parts[-1].argmax(1), 1.0)
        used, each = usage(torch.cat(parts))
        dead = 100 * (1 - float(nearest.mean()))
        found |= {
            f"{prefix}prototypes_used": used, f"{prefix}prototypes_each": each,
            f"{prefix}prototypes_dead": dead, f"{prefix}prototypes": float(len(prototypes)),
        }  # fmt: skip
    return found


def queue_measures(method: Method) -> dict[str, float]:
    """Return, for each queue of a method, the mean cosine of its keys and their effective rank."""
    found: dict[str, float] = {}
    for name, queue in method.named_children():
        if isinstance(queue, KeyQueue):
            keys = queue.keys[:: -(-len(queue.keys) // _TOKENS)].float()
            found |= {f"{name}_similarity": similarity(keys), f"{name}_rankme": rankme(keys)}
    return found
