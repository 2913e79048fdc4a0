"""The published sequences of operations, written out plainly: what our methods are measured beside.

Each function makes the loss of a method's own parameters on a batch the way the published code does: all
patches through the head, one pair of crops at a time, whole relations before they are sampled, logits laid
side by side. Nothing here trains; `bench_step` times it and the tests hold the methods against it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dense_ssl.crops import MultiCropBatch
from dense_ssl.published.contrastive import densecl_losses, moco_losses
from dense_ssl.published.decoupling import ibot_dc_losses
from dense_ssl.published.distillation import ibot_losses
from dense_ssl.published.neighbours import revisiting_losses
from dense_ssl.published.relations import sere_losses
from dense_ssl.published.udi import udi_losses
from dense_ssl.schedule import Step

# method, batch, step -> losses by name; the total under "loss"
Sequence = Callable[[Any, MultiCropBatch, Step], dict[str, Tensor]]

SEQUENCES: Mapping[str, Sequence] = {
    "moco": moco_losses,
    "revisiting": revisiting_losses,
    "densecl": densecl_losses,
    "dino": ibot_losses,
    "ibot": ibot_losses,
    "ibot_dc": ibot_dc_losses,
    "sere": sere_losses,
    "udi": udi_losses,
}
