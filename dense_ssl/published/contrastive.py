"""MoCo-v2 and DenseCL as published: positive and negatives side by side, then a cross-entropy."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dense_ssl.crops import MultiCropBatch
from dense_ssl.distributed import BatchShuffle
from dense_ssl.methods import densecl
from dense_ssl.methods.parts import unit
from dense_ssl.schedule import Step


def nce(q: Tensor, k: Tensor, queue: Tensor, T: float) -> Tensor:
    """Return the mean loss of queries [M, D] among their keys [M, D] and a queue [K, D]."""
    positive = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
    negatives = torch.einsum("nc,kc->nk", q, queue.clone())
    logits = torch.cat([positive, negatives], dim=1) / T
    labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return F.cross_entropy(logits, labels)


def moco_losses(method: Any, batch: MultiCropBatch, step: Step) -> dict[str, Tensor]:
    """Return the total."""
    x_q, x_k = batch.views["global"].images

    def encode(network: Any, images: Tensor) -> Tensor:
        return unit(network["global_head"](network["backbone"](images).cls[:, 0]))

    q = encode(method.student, x_q)
    groups = method.config.backbone.bn_groups
    with torch.no_grad(), BatchShuffle(x_k, step.seed, step.index, step.micro, groups) as shuffle:
        (k,) = shuffle.restore(encode(method.teacher, shuffle.images))
    return {"loss": nce(q, k, method.queue.keys, method.config.temperature)}


def densecl_losses(method: Any, batch: MultiCropBatch, step: Step) -> dict[str, Tensor]:
    """Return {"global", "dense"} and the total."""
    cfg, (x_q, x_k) = method.config, batch.views["global"].images
    q = densecl.encode(method.student, x_q)
    k = densecl.encode_keys(method.teacher, x_k, step, cfg.backbone.bn_groups)
    cells = (F.normalize(x.float(), dim=2) for x in (q.x, k.x))
    match = torch.einsum("bnc,bmc->bnm", *cells).argmax(2)
    keys = k.d.gather(1, match[..., None].expand(-1, -1, k.d.shape[2]))
    losses = {
        "global": nce(q.g, k.g, method.queue.keys, cfg.temperature),
        "dense": nce(
            q.d.flatten(0, 1), keys.flatten(0, 1), method.dense_queue.keys, cfg.temperature
        ),
    }
    weight = densecl.lambda_at(step.index, cfg.dense_weight, cfg.dense_start_step)
    return {**losses, "loss": (1 - weight) * losses["global"] + weight * losses["dense"]}
