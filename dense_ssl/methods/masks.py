"""Which patches a student does not see: block-wise (BEiT, arXiv:2106.08254) and random masks of iBOT.

A mask is drawn per image and crop, on the host, as a pure function of (seed, epoch, image, crop): ranks and
resumed runs agree without talking. Each sampler is written once, over the draws it needs, and made twice:
compiled, over this project's counter-based numbers, and in Python over `random.Random` and numpy's legacy
generator, where it repeats the published masks bit for bit. (The sampler of region masks is in `rcc`.)
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numba as nb
import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dense_ssl.config import Config
from dense_ssl.methods.rcc import box_sampler, cut_sampler, rcc_sampler
from dense_ssl.rng import fold_np, key_of, uniform
from dense_ssl.schedule import Step

STREAM = int.from_bytes(b"masks", "big")  # this module's branch of the random numbers of a seed
ATTEMPTS = 10  # to place one more block
_LEAST_LOG_ASPECT, _LARGEST_LOG_ASPECT = (
    math.log(0.3),
    math.log(1 / 0.3),
)  # height / width of a block

Share = Annotated[float, Field(ge=0, le=1)]


class MaskConfig(Config):
    """How patches are masked; defaults are iBOT's: none half of the time, else 10 to 50 % in blocks."""

    shape: Literal["block", "random", "rcc", "rcc_unbiased"] = "block"  # rcc: as de-coupling draws
    ratio: tuple[Share, ...] = (0.0, 0.3)  # one is chosen per crop, each as probable
    spread: tuple[Share, ...] = (0.0, 0.2)  # half-width around each ratio, uniform
    start_epoch: Annotated[int, Field(ge=0)] = 0  # no masks before this epoch

    @model_validator(mode="after")
    def _check(self) -> "MaskConfig":
        if len(self.ratio) != len(self.spread) or not self.ratio:
            raise ValueError(f"{len(self.ratio)} ratios need as many spreads (got {self.spread})")
        for ratio, spread in zip(self.ratio, self.spread, strict=True):
            if not spread <= ratio <= 1 - spread:
                raise ValueError(f"ratio {ratio} with spread {spread} leaves 0 .. 1")
        return self


@dataclass(frozen=True, slots=True)
class PatchRows:
    """Some patches of V crops of B images, as rows of [V * B * h * w, ...], and their weights in a loss."""

    rows: Tensor  # int64 [R], rising
    weight: Tensor  # float32 [R]: 1 / (V * images * patches taken of that crop); each crop's sum is equal

    @staticmethod
    def of(taken: np.ndarray, device: torch.device, images: int | None = None) -> "PatchRows":
        """Return the patches where `taken`, bool [V, B, h, w], is true.

        A crop without any takes no part, but counts: `images` is what the mean of a view divides by,
        all B where it is None. How many rows there are is known without asking the device.
        """
        crops, batch, height, width = taken.shape
        flat = taken.reshape(crops * batch, height * width)
        weight = 1.0 / (crops * (images or batch) * np.maximum(flat.sum(axis=1), 1))
        crop, _ = np.nonzero(flat)
        return PatchRows(
            on_device(np.flatnonzero(flat), device),
            on_device(weight[crop].astype(np.float32), device),
        )


class PatchMasking(nn.Module):
    """Puts a learned vector in the place of patches that are masked, before positions are added."""

    def __init__(self, config: MaskConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Parameter(torch.zeros(1, dim))

    def forward(
        self, patches: Tensor, index: Tensor, step: Step, crops: int
    ) -> tuple[Tensor, PatchRows]:
        """Return patch embeddings [V * B, h, w, D] with some masked, and which of them are.

        V is `crops`, and index [B], on the host, says which images these are.
        """
        grid = (patches.shape[1], patches.shape[2])
        masks = draw_masks(self.config, step, index, crops, grid)
        mask = on_device(masks, patches.device).flatten(0, 1)
        return masked_patches(patches, mask, self.token), PatchRows.of(masks, patches.device)


def masked_patches(patches: Tensor, mask: Tensor, token: Tensor) -> Tensor:
    """Return patch embeddings [B, h, w, D] with `token` [1, D] where mask [B, h, w] is true."""
    return torch.where(mask[..., None], token.to(patches.dtype), patches)


def on_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Return an array on a device; to a GPU it is copied while the host goes on."""
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def draw_masks(
    config: MaskConfig, step: Step, index: Tensor, crops: int, grid: tuple[int, int]
) -> np.ndarray:
    """Return bool [V, B, h, w], true where masked, for V crops of the images `index` [B] (on the host).

    Equal for equal (seed, epoch, image, crop), whatever the batch, the rank or the step.
    """
    epoch = step.index // step.steps_per_epoch
    masks = np.zeros((crops, len(index), *grid), np.bool_)
    if epoch >= config.start_epoch:
        images = fold_np(key_of(step.seed, STREAM, epoch), index.numpy())
        keys = fold_np(images, np.arange(crops)[:, None])  # [V, B]
        ratios, spreads = np.array(config.ratio), np.array(config.spread)
        _fill(masks.reshape(-1, *grid), keys.reshape(-1), ratios, spreads, _SAMPLERS[config.shape])
    return masks


# The samplers, over the draws they need; bounds of integers are both included


def _ratio_sampler(uniform: Callable[..., Any], choice: Callable[..., Any]) -> Callable[..., float]:
    def draw_ratio(ratios, spreads, rng):  # noqa: ANN001, ANN202
        """Return one of the ratios, each moved within its spread first (a draw even if not chosen)."""
        values = [0.0 for _ in range(len(ratios))]
        for i in range(len(ratios)):
            low, high = ratios[i] - spreads[i], ratios[i] + spreads[i]
            values[i] = uniform(rng, low, high) if spreads[i] > 0 else float(ratios[i])
        return choice(rng, values) if len(ratios) > 1 else values[0]

    return draw_ratio


def _block_sampler(uniform: Callable[..., Any], randint: Callable[..., Any]) -> Callable[..., Any]:
    def block_mask(height, width, ratio, rng):  # noqa: ANN001, ANN202
        """Return bool [height, width]: rectangles until ratio * height * width cells are masked.

        Never more than that; fewer where ten attempts in a row do not fit.
        """
        mask = np.zeros((height, width), np.bool_)
        least_area = (min(height, width) // 3) ** 2
        wanted = ratio * height * width
        masked = 0
        placed = True
        while masked < wanted and placed:
            placed = False
            left_over = wanted - masked
            for _ in range(ATTEMPTS):
                area = uniform(rng, least_area, left_over)  # reversed where less is left: so be it
                aspect = math.exp(uniform(rng, _LEAST_LOG_ASPECT, _LARGEST_LOG_ASPECT))
                h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if w < width and h < height:
                    top, left = randint(rng, 0, height - h), randint(rng, 0, width - w)
                    new = h * w - mask[top : top + h, left : left + w].sum()
                    if 0 < new <= left_over:
                        mask[top : top + h, left : left + w] = True
                        masked += new
                        placed = True
                        break
        return mask

    return block_mask


def _random_sampler(shuffle: Callable[..., Any]) -> Callable[..., Any]:
    def random_mask(height, width, ratio, rng):  # noqa: ANN001, ANN202
        """Return bool [height, width] with int(ratio * height * width) cells anywhere."""
        cells = np.zeros(height * width, np.bool_)
        cells[height * width - int(ratio * height * width) :] = True
        shuffle(rng, cells)
        return cells.reshape(height, width)

    return random_mask


draw_ratio = _ratio_sampler(random.Random.uniform, random.Random.choice)
block_mask = _block_sampler(random.Random.uniform, random.Random.randint)
random_mask = _random_sampler(np.random.RandomState.shuffle)


# The same draws from a key and a counter, uint64 [2]


@nb.njit
def _uniform(rng, low, high):  # noqa: ANN001, ANN202
    value = low + (high - low) * uniform(rng[0], rng[1])
    rng[1] += np.uint64(1)
    return value


@nb.njit
def _randint(rng, low, high):  # noqa: ANN001, ANN202
    return low + np.int64(_uniform(rng, 0.0, 1.0) * (high - low + 1))


@nb.njit
def _choice(rng, values):  # noqa: ANN001, ANN202
    return values[_randint(rng, 0, len(values) - 1)]


@nb.njit
def _shuffle(rng, values):  # noqa: ANN001, ANN202
    for i in range(len(values) - 1, 0, -1):
        j = _randint(rng, 0, i)
        values[i], values[j] = values[j], values[i]


_draw_ratio = nb.njit(_ratio_sampler(_uniform, _choice))
_boxes, _cut = nb.njit(box_sampler(_uniform)), nb.njit(cut_sampler(_uniform))
_SAMPLERS = {
    "block": nb.njit(_block_sampler(_uniform, _randint)),
    "random": nb.njit(_random_sampler(_shuffle)),
    "rcc": nb.njit(rcc_sampler(_boxes, _cut, reach=0)),
    "rcc_unbiased": nb.njit(rcc_sampler(_boxes, _cut, reach=1)),
}


@nb.njit
def _fill(masks, keys, ratios, spreads, sampler):  # noqa: ANN001, ANN202
    """Draw masks [m, h, w], one per key."""
    for i in range(len(masks)):
        rng = np.zeros(2, np.uint64)
        rng[0] = keys[i]
        ratio = _draw_ratio(ratios, spreads, rng)
        masks[i] = sampler(masks.shape[1], masks.shape[2], ratio, rng)
