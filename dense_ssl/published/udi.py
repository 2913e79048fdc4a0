"""UDI as published: maps made cell by cell, logits of every sample, the teacher's trunk run twice."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dense_ssl.crops import Crops, MultiCropBatch
from dense_ssl.methods.udi_maps import draw_cells
from dense_ssl.published.distillation import cross_entropy
from dense_ssl.schedule import Step

Coordinates = tuple[float, float, float, float]  # (i0, j0, i1, j1); a mirrored crop has j0 > j1


def coordinates(crops: Crops, crop: int, image: int) -> Coordinates:
    """Return the corners of one crop of one image, rows first."""
    x0, y0, x1, y1 = crops.boxes[crop, image].tolist()
    return (y0, x1, y1, x0) if crops.flipped[crop, image] else (y0, x0, y1, x1)


def map_of(
    source: Coordinates, target: Coordinates, cells: list[int], grid: int, side: int
) -> tuple[Tensor, Tensor]:
    """Return maps [S, grid^2] and [S, side^2] of sampled cells, those that count first, then zeros."""
    rows, columns = [], []
    for cell in sorted(cells):
        r, c = divmod(cell, grid)
        i = source[0] + r / (grid - 1) * (source[2] - source[0])
        j = source[1] + c / (grid - 1) * (source[3] - source[1])
        ends = (*sorted((target[0], target[2])), *sorted((target[1], target[3])))
        if not (ends[0] < i < ends[1] and ends[2] < j < ends[3]):
            continue
        y = (i - target[0]) * (side - 1) / (target[2] - target[0])
        x = (j - target[1]) * (side - 1) / (target[3] - target[1])
        top, left = math.floor(y), math.floor(x)
        weights = torch.zeros(side, side)
        for row, of_row in ((top, 1 - (y - top)), (min(top + 1, side - 1), y - top)):
            for column, share in ((left, 1 - (x - left)), (min(left + 1, side - 1), x - left)):
                weights[row, column] += of_row * share
        rows.append(F.one_hot(torch.tensor(cell), grid * grid).float())
        columns.append(weights.flatten())
    missing = len(cells) - len(rows)
    rows += [torch.zeros(grid * grid)] * missing
    columns += [torch.zeros(side * side)] * missing
    return torch.stack(rows), torch.stack(columns)


def maps_of(method: Any, batch: MultiCropBatch, step: Step) -> tuple[list[Tensor], list[Tensor]]:
    """Return the student's maps, of both crops and then of the local ones, and the teacher's.

    Each is [B, S, N]; a local crop has two, for the second and for the first global crop.
    """
    crops, local = batch.views["global"], batch.views.get("local")
    stride = method.student["backbone"].stride
    side = crops.images.shape[-1] // stride
    kinds = {"global": (side, method.config.global_window)}
    if local is not None:
        kinds["local"] = (local.images.shape[-1] // stride, method.config.local_window)
    cells = {
        name: draw_cells(step, batch.index, at, *kinds[name]).tolist()
        for at, name in enumerate(kinds)
    }
    pairs = [(crops, 0, 1, "global"), (crops, 1, 0, "global")]
    if local is not None:
        pairs += [(local, at, v, "local") for at in range(len(local.boxes)) for v in (1, 0)]
    source, target = [], []
    for view, at, v, name in pairs:
        rows = [
            map_of(
                coordinates(view, at, b), coordinates(crops, v, b), cells[name][b],
                kinds[name][0], side,
            )
            for b in range(len(batch.index))
        ]  # fmt: skip
        source.append(torch.stack([own for own, _ in rows]).to(crops.images.device))
        target.append(torch.stack([other for _, other in rows]).to(crops.images.device))
    return source, target


def vit(trunk: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return class tokens after the final norm [B, T, D] and patch tokens before it [B, N, D]."""
    maps = trunk.patch_embed.proj(images)
    prefix = torch.cat([t for t in (trunk.cls_token, trunk.reg_token) if t is not None], 1)
    count = prefix.shape[1]
    table, side = trunk.pos_embed[:, count:], maps.shape[-1]
    own = math.isqrt(table.shape[1])
    if side != own:
        square = table.reshape(1, own, own, -1).permute(0, 3, 1, 2)
        square = F.interpolate(square, scale_factor=((side + 0.1) / own,) * 2, mode="bicubic")
        table = square.permute(0, 2, 3, 1).flatten(1, 2)
    prefix = (prefix + trunk.pos_embed[:, :count]).expand(len(images), -1, -1)
    x = trunk.blocks(torch.cat([prefix, maps.flatten(2).transpose(1, 2) + table], 1))
    return trunk.norm(x)[:, :count], x[:, count:]


def attention(sampler: Any, x: Tensor, maps: Tensor) -> Tensor:
    """Return features [m, B, s, D] of patch tokens [B, N, D] at the places of maps [m, B, s, N]."""
    u, attn = sampler.norm1(x), sampler.attn
    q, k, v = (
        part.unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in attn.qkv(u).chunk(3, 2)
    )
    q = maps[:, :, None] @ q
    valid = maps.sum(-1) > 0
    energy = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    energy = energy.masked_fill(~valid[:, :, None, :, None], 1e-9)
    out = (energy.softmax(-1) @ v).transpose(2, 3).flatten(3)
    return attn.norm(attn.proj(out) + maps @ u)


def head(network: Any, x: Tensor) -> Tensor:
    """Return logits of features, whatever their axes."""
    x = F.normalize(network.mlp(x), dim=-1)
    layer = network.last_layer
    norm = layer.weight_v.norm(dim=1, keepdim=True)
    return F.linear(x, layer.weight_v * (layer.weight_g / norm))


def udi_losses(method: Any, batch: MultiCropBatch, step: Step) -> dict[str, Tensor]:
    """Return the levels "cls", "cls_plus" and "patch", the centres after the step, and the total."""
    cfg, objective = method.config, method.objective
    student, teacher = method.student, method.teacher
    a, b = batch.views["global"].images
    local = batch.views.get("local")
    size, crops = len(a), 0 if local is None else len(local.images)
    two, T = cfg.backbone.class_tokens == 2, cfg.teacher_temperature.at(step)
    centers = {
        "cls": objective.center, "plus": objective.plus_center, "patch": objective.patch_center
    }  # fmt: skip

    def compare(target: Tensor, kind: str, logits: Tensor) -> Tensor:
        target = F.softmax((target - centers[kind]) / T, -1)
        return cross_entropy(target, logits / cfg.student_temperature)

    def compare_local(targets: Tensor, kind: str, logits: Tensor) -> Tensor:
        """Targets [L, 2, B, K], of each local crop beside both global ones."""
        terms = [
            compare(targets[at, v], kind, own)
            for at, own in enumerate(logits.split(size))
            for v in (0, 1)
        ]
        return torch.stack(terms).mean()

    tokens, hidden = vit(student["backbone"].trunk, torch.cat([a, b]))
    own = [head(student["head"], tokens[:, at]) for at in range(1 + two)]
    with torch.no_grad():
        tokens, t_hidden = vit(teacher["backbone"].trunk, torch.cat([b, a]))
        t_cls = head(teacher["head"], tokens[:, 0])  # [B; A]
    levels, means = {"cls": [compare(t_cls, "cls", own[0]).mean()]}, {"cls": t_cls.mean(0)}
    of_local, local_hidden = [], hidden
    if local is not None:
        tokens, local_hidden = vit(student["backbone"].trunk, local.images.flatten(0, 1))
        of_local = [head(student["head"], tokens[:, at]) for at in range(1 + two)]
        both = t_cls.view(1, 2, size, -1).expand(crops, -1, -1, -1)
        levels["cls"].append(compare_local(both, "cls", of_local[0]))
    if cfg.patches:
        source, target = maps_of(method, batch, step)
        patches = head(
            student["head"], attention(student["sampler"], hidden, torch.cat(source[:2])[None])
        )[0]
        if crops:  # the published code throws this away
            maps = torch.stack([torch.cat(source[2 + v :: 2]) for v in (0, 1)])
            head(student["head"], attention(student["sampler"], local_hidden, maps))
        with torch.no_grad():
            maps = torch.cat(target[:2])[None]
            t_patches = head(teacher["head"], attention(teacher["sampler"], t_hidden, maps))[0]
            weight = maps[0].sum(-1)
            total, number = (weight[..., None] * t_patches).sum((0, 1)), weight.sum()
            mean = (weight[..., None] * t_patches).sum(1) / (weight.sum(1, keepdim=True) + 1e-5)
            blends = [cfg.blend * mean + (1 - cfg.blend) * t_cls]
            if crops:
                _, t_hidden = vit(teacher["backbone"].trunk, torch.cat([b, a]))
                maps = torch.stack([torch.cat(target[2 + 2 * i : 4 + 2 * i]) for i in range(crops)])
                found = head(teacher["head"], attention(teacher["sampler"], t_hidden, maps))
                w = maps.sum(-1)  # [L, 2 B, R]
                total, number = total + (w[..., None] * found).sum((0, 1, 2)), number + w.sum()
                mean = (w[..., None] * found).sum(2) / (w.sum(2, keepdim=True) + 1e-5)
                blends.append((cfg.blend * mean + (1 - cfg.blend) * t_cls).flatten(0, 1))
        mask = torch.cat(source[:2]).sum(-1)
        means["patch"] = total / number
        if two:
            levels["cls_plus"] = [compare(blends[0], "plus", own[1]).mean()]
            if crops:
                both = blends[1].view(crops, 2, size, -1)
                levels["cls_plus"].append(compare_local(both, "plus", of_local[1]))
            means["plus"] = torch.cat(blends).mean(0)
        levels["patch"] = [(compare(t_patches, "patch", patches) * mask).sum() / mask.sum()]
    losses = {
        name: parts[0] if len(parts) == 1 else (parts[0] + crops * parts[1]) / (1 + crops)
        for name, parts in levels.items()
    }
    total = torch.stack(list(losses.values())).mean()
    names = {"cls": "center", "plus": "plus_center", "patch": "patch_center"}
    moved = {names[kind]: 0.9 * centers[kind] + 0.1 * mean for kind, mean in means.items()}
    return {**losses, **moved, "loss": total}
