"""iBOT with de-coupling as published: lists of masks with the values 0, 1 and 2, and loops over rows."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dense_ssl.backbones.features import grid_of
from dense_ssl.crops import MultiCropBatch
from dense_ssl.methods.masks import draw_masks
from dense_ssl.published.distillation import cross_entropy
from dense_ssl.schedule import Step


def ibot_dc_losses(method: Any, batch: MultiCropBatch, step: Step) -> dict[str, Tensor]:
    """Return {"cls", "patch", "dc"}, the centres after the step, and the total."""
    config, backbone = method.config, method.student["backbone"]
    images, again = batch.views["global"].images, batch.views[config.extras.name].images
    grid = grid_of(images, backbone.stride)
    masks = [
        [torch.from_numpy(m).long().to(images.device) for m in crop]
        for crop in draw_masks(config.mask, step, batch.index, 2, grid)
    ]
    count = len(masks[0])
    chosen = [m for m in masks[0] if m.sum() > 0] + [m for m in masks[1] if m.sum() > 0]
    chosen = chosen[: 2 * int(count * config.extras.part)]
    n = len(chosen) // 4
    masks[0] += [2 * m for m in chosen[:n]] + [2 * (1 - m) for m in chosen[n : 2 * n]]
    masks[1] += [2 * m for m in chosen[2 * n : 3 * n]]
    masks[1] += [2 * (1 - m) for m in chosen[3 * n : 4 * n]]
    rows = count + 2 * n
    seen = [torch.cat([images[v], again[v][len(again[v]) - 2 * n :]]) for v in range(2)]
    clean = seen
    if config.dc_photometric == "independent":
        clean = [torch.cat([images[v], images[v][count - 2 * n :]]) for v in range(2)]

    with torch.no_grad():
        t = method.teacher["backbone"](torch.cat(clean))
        t_cls, t_patch = method.teacher["head"](torch.cat([t.cls, t.dense], dim=1))
    maps = backbone.embed(torch.cat(seen)).permute(0, 3, 1, 2)
    mask = torch.stack(masks[0] + masks[1])
    source, mixed = maps.flip(0).detach(), maps.clone()
    mixed.permute(0, 2, 3, 1)[mask == 2] = source.permute(0, 2, 3, 1)[mask == 2]
    mixed.permute(0, 2, 3, 1)[mask == 1] = method.masking.token[0].to(mixed.dtype)
    s = backbone.encode(mixed.permute(0, 2, 3, 1))
    s_cls, s_patch = method.student["head"](torch.cat([s.cls, s.dense], dim=1))

    center, patch_center = method.objective.center, method.objective.patch_center
    targets = F.softmax((t_cls - center) / config.teacher_temperature.at(step), dim=-1)
    patches = F.softmax((t_patch - patch_center) / config.patch_temperature.at(step), dim=-1)
    T = config.student_temperature

    def own(x: Tensor, crop: int) -> Tensor:
        return x[crop * rows : crop * rows + count]

    cls = sum(cross_entropy(own(targets, q), own(s_cls, 1 - q) / T).mean() / 2 for q in range(2))
    patch = dc = torch.zeros((), device=images.device)
    for row, m in enumerate(masks[0] + masks[1]):
        losses = cross_entropy(patches[row], s_patch[row] / T).view(grid)
        if (m == 2).any():
            kept = (m != 2).float()
            dc = dc + (losses * kept).sum() / kept.sum().clamp(min=1) / (2 * 2 * n)
        else:
            patch = patch + (losses * m).sum() / m.sum().clamp(min=1) / (2 * count)
    loss = config.cls_weight * cls + config.patch_weight * (patch + config.dc_weight * dc)
    assert isinstance(cls, Tensor)
    return {
        "cls": cls,
        "patch": patch,
        "dc": dc,
        "center": 0.9 * center + 0.1 * t_cls.mean(0),
        "patch_center": 0.9 * patch_center + 0.1 * t_patch.mean((0, 1)),
        "loss": loss,
    }
