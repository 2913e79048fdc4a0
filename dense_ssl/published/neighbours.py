"""Revisiting contrastive methods as published: every product with a queue on a clone of it, stored whole."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dense_ssl.crops import MultiCropBatch
from dense_ssl.distributed import BatchShuffle
from dense_ssl.methods.parts import unit
from dense_ssl.schedule import Step


def revisiting_losses(method: Any, batch: MultiCropBatch, step: Step) -> dict[str, Tensor]:
    """Return {"nce", "knn"} and the total."""
    cfg, (x_q, x_k) = method.config, batch.views["global"].images
    images = len(x_q)

    def encode(network: Any, crops: Tensor) -> tuple[Tensor, Tensor]:
        pooled = network["backbone"](crops).cls[:, 0]
        return unit(network["global_head"](pooled)), unit(pooled)

    rows = [tuple(x[:, None] for x in encode(method.student, x_q))]
    if "small" in batch.views:
        small = batch.views["small"].images.transpose(0, 1).flatten(0, 1)
        rows.append(tuple(x.unflatten(0, (images, -1)) for x in encode(method.student, small)))
    q, features = (torch.cat(parts, dim=1).flatten(0, 1) for parts in zip(*rows))
    groups = cfg.backbone.bn_groups
    with torch.no_grad(), BatchShuffle(x_k, step.seed, step.index, step.micro, groups) as shuffle:
        k, kb = shuffle.restore(*encode(method.teacher, shuffle.images))
    positive = torch.einsum("nc,nc->n", q, k.repeat_interleave(len(q) // images, dim=0))[:, None]
    negatives = torch.einsum("nc,kc->nk", q, method.queue.keys.clone())
    logits = torch.cat([positive, negatives], dim=1) / cfg.temperature
    labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    nce = F.cross_entropy(logits, labels)
    if not cfg.aux_weight or step.epoch < cfg.aux_warmup_epochs:
        return {"nce": nce, "knn": torch.zeros_like(nce), "loss": nce}
    with torch.no_grad():
        others = method.backbone_queue.keys.clone()
        if cfg.aux_queue_order == "official":
            at = (method.backbone_queue.pointer + torch.arange(images, device=k.device)) % len(
                others
            )
            others[at] = kb.to(others.dtype)
        similarity = torch.einsum("nc,kc->nk", features.to(others.dtype).float(), others.float())
        places = torch.topk(similarity, cfg.aux_neighbours, dim=1).indices
    log_softmax = F.log_softmax(negatives / cfg.temperature, dim=1)
    knn = -torch.gather(log_softmax, 1, places).mean()
    return {"nce": nce, "knn": knn, "loss": nce + cfg.aux_weight * knn}
