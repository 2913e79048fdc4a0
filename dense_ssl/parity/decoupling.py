"""Functions of de-coupling on iBOT.

Conventions are the official code's: masks are int64, 0 seen, 1 masked, 2 foreign; both crops stacked in one
batch axis ([2 * M, ...], M images and extras); channels before cells.
"""

import random
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dense_ssl.augment import Photometry
from dense_ssl.crops import Crops, MultiCropBatch
from dense_ssl.methods import decoupling, rcc
from dense_ssl.methods.ibot_dc import DC_VIEWS, recoloured
from dense_ssl.methods.masks import block_mask, draw_ratio
from dense_ssl.parity.distillation import ibot_loss, patch_loss, update_center


def rcc_mask(boxes: np.ndarray, G: int, r: float, rng: random.Random) -> np.ndarray:
    """Return the region mask, bool [G, G], true where cut, of boxes [n, 4] in fractions of the view."""
    return rcc.rcc_mask(boxes, G, G, r, rng)


def sample_masks(
    shape: Literal["rcc", "block"],
    ratios: Sequence[float],
    variances: Sequence[float],
    rng: random.Random,
    crops: int = 2,
    grid: int = 14,
) -> list[np.ndarray]:
    """Return the masks of one image's crops, each bool [grid, grid], drawn in the official order."""
    masks = []
    for _ in range(crops):
        ratio = draw_ratio(ratios, variances, rng)
        if shape == "block":
            masks.append(block_mask(grid, grid, ratio, rng))
        else:  # draws its ratio after its boxes; the one above is not used
            boxes = rcc.rcc_boxes(rng)
            masks.append(rcc_mask(boxes, grid, draw_ratio(ratios, variances, rng), rng))
    return masks


def build_dc(masks0: Tensor, masks1: Tensor, sample_ratio: float) -> tuple[Tensor, Tensor, int]:
    """Return both crops' masks [N, h, w] with those of 2 n extras appended, and n."""
    masks = torch.stack([masks0, masks1]).long()
    foreign = decoupling.foreign_regions(masks.bool().cpu().numpy(), sample_ratio)
    extended = torch.cat([masks, 2 * torch.from_numpy(foreign).to(masks)], dim=1)
    return extended[0], extended[1], foreign.shape[1] // 2


def mix_tokens(X: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return patch embeddings [2 * M, D, h, w] with foreign ones exchanged, and the mask without its 2s."""
    foreign = mask == 2
    mixed = decoupling.exchange_regions(X.movedim(1, -1), foreign).movedim(-1, 1)
    return mixed, mask.masked_fill(foreign, 0)


def dc_loss(
    s_cls: Tensor,
    s_patch: Tensor,
    t_cls: Tensor,
    t_patch: Tensor,
    masks0: Tensor,
    masks1: Tensor,
    c: Tensor,
    c2: Tensor,
    tau_t: float,
    tau_p: float,
    lambda1: float = 1.0,
    lambda2: float = 1.0,
    dc_ratio: float = 0.3,
    tau_s: float = 0.1,
) -> dict[str, Tensor]:
    """Return {"cls", "patch", "dc", "loss"} and the centres after it, {"center", "center2"}.

    s_cls, t_cls [2 * M, K], s_patch, t_patch [2 * M, T, K_patch], masks two of [M, h, w], c [1, K], c2
    [1, 1, K_patch]. cls, patch and dc are weighted by their lambdas, dc not by dc_ratio.
    """
    masks = torch.stack([masks0, masks1])
    extra = (masks[0] == 2).flatten(1).any(dim=1)

    def of(which: Tensor, logits: Tensor) -> Tensor:
        return logits.unflatten(0, (2, -1))[:, which].flatten(0, 1)

    own = ~extra
    result = ibot_loss(
        of(own, s_cls), of(own, s_patch), None, of(own, t_cls), of(own, t_patch),
        tuple(masks[:, own] == 1), c, c2, tau_t, tau_p, lambda1, lambda2, tau_s,
    )  # fmt: skip
    kept = masks[:, extra] != 2
    dc = lambda2 * patch_loss(of(extra, s_patch), of(extra, t_patch), kept, c2, tau_p, tau_s)
    centers = {"center": update_center(c, t_cls), "center2": update_center(c2, t_patch)}
    return result | {"dc": dc, "loss": result["loss"] + dc_ratio * dc} | centers


def photometric_dc(
    images: Sequence[Tensor], n: int, mode: Literal["shared", "independent"], seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return what teacher and student see of both crops, normalised, each [2, M, 3, S, S].

    images are two of [M, 3, S, S] in [0, 1], the last 2 n of each copies of the 2 n before them.
    """
    pixels = (torch.stack(list(images)) * 255).round().to(torch.uint8)
    own = pixels.shape[1] - 2 * n
    views = [view.model_copy(update={"size": pixels.shape[-1]}) for view in DC_VIEWS]

    def crops(x: Tensor) -> Crops:
        return Crops(x, torch.zeros(*x.shape[:2], 4), torch.zeros(x.shape[:2], dtype=torch.bool))

    shown = dict(zip((view.name for view in views), map(crops, pixels.tensor_split([own], dim=1))))
    batch = MultiCropBatch(shown, torch.arange(own), torch.full((own,), -1))
    first, again = (x.images for x in Photometry(views, seed)(batch, epoch=0).views.values())
    student, teacher = recoloured(first, again, 2 * n, mode)
    return teacher, student
