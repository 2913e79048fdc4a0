"""Functions of "Revisiting Contrastive Methods" (arXiv:2106.05967).

Conventions are the official code's: boxes (top, left, height, width) in pixels, queues as columns
([D, K]), rows image-major (the large query of an image, then its small ones), raw inputs that the
function normalises.
"""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dense_ssl import box_sampling
from dense_ssl.methods.parts import unit
from dense_ssl.methods.revisiting import Order, image_major, pull_losses
from dense_ssl.parity.contrastive import moco_logits
from dense_ssl.photometry import autoaugment
from dense_ssl.photometry.autoaugment import Definition
from dense_ssl.schedule import Schedule, Step
from kernels.queue_neighbours import queue_neighbours

Box = tuple[int, int, int, int]  # top, left, height, width: half-open, in pixels
RATIO = (3 / 4, 4 / 3)


def multicrop_logits(z: Tensor, k: Tensor, queue: Tensor, T: float) -> Tensor:
    """Return logits [B V, 1 + K] over T, image by image, of queries z [B, V, D] and keys k [B, D].

    Column 0 is the image's key; queue [D, K] has unit columns.
    """
    keys = k.repeat_interleave(z.shape[1], dim=0)
    return moco_logits(z.flatten(0, 1), keys, queue, T)[0]


def knn_pull_loss(sim_backbone: Tensor, sim_proj: Tensor, T: float, k: int) -> Tensor:
    """Return the pull to the k columns most similar by sim_backbone [R, K], of sim_proj [R, K] over T.

    Training never builds these matrices; its loss is `revisiting.pull_losses`.
    """
    nearest = sim_backbone.topk(k, dim=1).indices
    return -torch.log_softmax(sim_proj / T, dim=1).gather(1, nearest).mean()


class Losses(NamedTuple):
    """What `van_gansbeke_losses` returns."""

    nce: Tensor
    aux: Tensor  # unweighted
    ptr: int  # after the keys are enqueued


def van_gansbeke_losses(
    q: Tensor, q_small: Tensor | None, qb: Tensor, qb_small: Tensor | None,
    kk: Tensor, kb: Tensor, queue: Tensor, queue_backbone: Tensor, ptr: int,
    T: float, k: int, order: Order,
) -> Losses:  # fmt: skip
    """Return both losses of a step, and the pointer after it.

    q [B, D], q_small [B V, D] or None, kk [B, D]: raw projections; qb, qb_small, kb: raw backbone features
    [., C]; small rows image-major. queue [D, K] and queue_backbone [C, K] have unit columns and stay as
    they are: `enqueue` writes them.
    """
    z = image_major(unit(q), None if q_small is None else unit(q_small))
    b = image_major(unit(qb), None if qb_small is None else unit(qb_small)).detach()
    kk, rows = unit(kk), queue_backbone.T.contiguous()
    at = (ptr + torch.arange(len(kk), device=rows.device)) % len(rows)
    if order == "official":
        rows = rows.index_copy(0, at, unit(kb))
    places = queue_neighbours(b, rows, k)[0]
    losses = pull_losses(z, kk, queue.T.contiguous(), places, T)
    return Losses(losses["nce"], losses["knn"], (ptr + len(kk)) % queue.shape[1])


def free_box(
    W: int, H: int, scale: Sequence[float], ratio: Sequence[float] = RATIO, rng: Any = random
) -> Box:
    """Return a box of an image W x H by torchvision's RandomResizedCrop, from Python's generator."""
    return box_sampling.free_box((H, W), scale, ratio, rng)


def constrained_box(
    W: int, H: int, scale: Sequence[float], anchor: Box, ratio: Sequence[float] = RATIO,
    least: float = 0.1, rng: Any = random,
) -> Box:  # fmt: skip
    """Return a box of which a share `least` of its sampled area lies in `anchor`; free after 10 failures."""
    top, left, height, width = anchor
    edges = (left, top, left + width, top + height)
    return box_sampling.constrained_box((H, W), scale, ratio, edges, least, rng)


def intersection(a: Box, b: Box) -> int:
    """Return how many pixels two boxes share."""
    height = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    width = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(height, 0) * max(width, 0)


def autoaugment_subpolicy(
    img: Image.Image | Tensor,
    id: int,
    u: tuple[float, float],
    sign: tuple[int, int],
    definition: Definition = "published",
) -> Image.Image | Tensor:
    """Return an image, Pillow's or uint8 [3, H, W], after sub-policy `id`.

    Each of its two operations is done where u is at most its probability; a sign of 0 is negative.
    """
    if isinstance(img, Image.Image):
        pixels = torch.from_numpy(np.array(img.convert("RGB"))).permute(2, 0, 1)
        out = autoaugment_subpolicy(pixels, id, u, sign, definition)
        assert isinstance(out, Tensor)
        return Image.fromarray(out.permute(1, 2, 0).numpy())
    done = autoaugment.operations(
        np.array([id]), np.array([u]), np.array([sign]) > 0, np.zeros(1, np.int64),
        (img.shape[1], img.shape[2]), definition,
    )  # fmt: skip
    out = img[None].clone(memory_format=torch.contiguous_format)
    for x in done:
        numbers = torch.from_numpy(x.numbers).to(out.device)
        autoaugment.apply_(out, x.kind, torch.from_numpy(x.rows).to(out.device), numbers)
    return out[0]


def lr_step(e: int, lr0: float = 0.003) -> float:
    """Return the learning rate of epoch e, from 0, of VOC segmentation: a tenth from 31 and from 41 on."""
    return Schedule(start=lr0, shape="multistep", milestones=(31, 41)).at(Step(e, 1, 45))


def lr_poly(e: int, lr0: float = 1e-4, epochs: int = 150) -> float:
    """Return the learning rate of epoch e, from 0, of Cityscapes segmentation: a power of what is left."""
    return lr0 * (1 - e / epochs) ** 0.9
