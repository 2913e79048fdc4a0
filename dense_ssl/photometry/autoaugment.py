"""AutoAugment's ImageNet policy on batches of 8-bit crops (Cubuk et al. 2019, arXiv:1805.09501, table 9).

One of 25 pairs of operations, each done with its own probability; some move pixels. Which, with which
sign, comes from the caller: nothing here draws a random number. `autoaugment_ops` has the operations,
which are Pillow's to the bit.

Two definitions of the strengths: `torchvision`'s, and the one `published` with "Revisiting Contrastive
Methods" (arXiv:2106.05967), whose solarising thresholds start at 256 instead of 255 and whose shear has
its centre in the middle of the image and takes the strength as an angle.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dense_ssl.photometry import autoaugment_ops as ops

Definition = Literal["torchvision", "published"]
Kind = Literal[
    "shear_x", "rotate", "color", "contrast", "sharpness",
    "posterize", "solarize", "autocontrast", "equalize", "invert",
]  # fmt: skip

# (operation, probability, bin of its strength) twice; a bin of 0 stands where there is no strength
SUB_POLICIES: tuple[tuple[tuple[Kind, float, int], tuple[Kind, float, int]], ...] = (
    (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
    (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
    (("equalize", 0.4, 0), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, 0)),
    (("posterize", 0.8, 5), ("equalize", 1.0, 0)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
    (("equalize", 0.6, 0), ("posterize", 0.4, 6)),
    (("rotate", 0.8, 8), ("color", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalize", 0.6, 0)),
    (("equalize", 0.0, 0), ("equalize", 0.8, 0)),
    (("invert", 0.6, 0), ("equalize", 1.0, 0)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("color", 1.0, 2)),
    (("color", 0.8, 8), ("solarize", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 0)),
    (("shear_x", 0.6, 5), ("equalize", 1.0, 0)),
    (("color", 0.4, 0), ("equalize", 0.6, 0)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("invert", 0.6, 0), ("equalize", 1.0, 0)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
)
_BINS = 10
_POSTERIZE_BITS = (8, 8, 7, 7, 6, 6, 5, 5, 4, 4)
# float32 as torchvision has them: an enhancement's factor is rounded to float32 once more
_STRONGEST = {"shear_x": 0.3, "rotate": 30.0, "color": 0.9, "contrast": 0.9, "sharpness": 0.9}
_STRENGTHS = {kind: torch.linspace(0, end, _BINS).tolist() for kind, end in _STRONGEST.items()}
_THRESHOLDS: dict[Definition, list[float]] = {
    "torchvision": torch.linspace(255, 0, _BINS).tolist(),
    "published": torch.linspace(256, 0, _BINS).tolist(),
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation on some crops of a batch."""

    kind: Kind
    rows: np.ndarray  # int64 [m], ascending: the crops
    numbers: np.ndarray  # [m, ...] what the operation needs for each of them


def drawn(u: np.ndarray, rows: np.ndarray, size: tuple[int, int]) -> list[Operation]:
    """Return what training does with the crops `rows`, given uniform numbers [m, at least 5] in [0, 1)."""
    sub_policy = (u[:, 0] * len(SUB_POLICIES)).astype(np.int64)
    return operations(sub_policy, u[:, 1:3], u[:, 3:5] < 0.5, rows, size)


def operations(
    sub_policy: np.ndarray,
    u: np.ndarray,
    positive: np.ndarray,
    rows: np.ndarray,
    size: tuple[int, int],
    definition: Definition = "torchvision",
) -> list[Operation]:
    """Return what to do with the crops `rows`, in order.

    Args:
        sub_policy: int [m], which of SUB_POLICIES each crop takes.
        u: float [m, 2]; an operation is done where its number is at most its probability.
        positive: bool [m, 2], the signs of strengths that have one.
        rows: int64 [m], where the crops stand in their batch, ascending.
        size: (height, width) of the crops.
        definition: of the strengths.
    """
    done: list[Operation] = []
    for place in range(2):
        chosen: dict[Kind, tuple[list[int], list[Sequence[float]]]] = {}
        for crop, (pair, number, sign) in enumerate(
            zip(sub_policy.tolist(), u[:, place].tolist(), positive[:, place].tolist(), strict=True)
        ):
            kind, probability, strength = SUB_POLICIES[pair][place]
            if number <= probability:
                crops, numbers = chosen.setdefault(kind, ([], []))
                crops.append(crop)
                numbers.append(_numbers(kind, strength, 1 if sign else -1, size, definition))
        for kind, (crops, numbers) in chosen.items():
            integer = kind not in ("color", "contrast", "sharpness")
            values = np.array(numbers, np.int64 if integer else np.float32)
            done.append(Operation(kind, rows[crops], values))
    return done


def apply_(images: Tensor, kind: Kind, rows: Tensor, numbers: Tensor) -> None:
    """Do one operation, in place, to crops of uint8 images [n, 3, H, W]; rows int64 [m], numbers [m, ...]."""
    x = images.index_select(0, rows)
    images.index_copy_(0, rows, _apply(kind, x, numbers))


def _apply(kind: Kind, x: Tensor, numbers: Tensor) -> Tensor:
    match kind:
        case "shear_x" | "rotate":
            return ops.warp(x, numbers)
        case "color":
            return ops.color(x, numbers[:, 0])
        case "contrast":
            return ops.contrast(x, numbers[:, 0])
        case "sharpness":
            return ops.sharpness(x, numbers[:, 0])
        case "posterize":
            return ops.posterize(x, numbers[:, 0])
        case "solarize":
            return ops.solarize(x, numbers[:, 0])
        case "autocontrast":
            return ops.autocontrast(x)
        case "equalize":
            return ops.equalize(x)
        case "invert":
            return 255 - x


@lru_cache(maxsize=1024)  # 25 pairs, two signs, a few sizes: crops share them
def _numbers(
    kind: Kind, strength: int, sign: int, size: tuple[int, int], definition: Definition
) -> Sequence[float]:
    """Return what an operation of a bin of strength needs to know, for one crop."""
    match kind:
        case "rotate":
            return ops.fixed_point(_rotation(sign * _STRENGTHS[kind][strength], size))
        case "shear_x":
            return ops.fixed_point(_shear(sign * _STRENGTHS[kind][strength], size, definition))
        case "color" | "contrast" | "sharpness":
            return (1 + sign * _STRENGTHS[kind][strength],)
        case "posterize":
            return (_POSTERIZE_BITS[strength],)
        case "solarize":
            return (math.ceil(_THRESHOLDS[definition][strength]),)  # i < t as i < ceil(t)
        case "autocontrast" | "equalize" | "invert":
            return ()


def _rotation(degrees: float, size: tuple[int, int]) -> tuple[float, ...]:
    """Return the matrix of Pillow's `Image.rotate`, from output to input pixels (x, y)."""
    angle = -math.radians(degrees % 360)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = size[1] / 2, size[0] / 2
    return cos, sin, -x * cos - y * sin + x, -sin, cos, x * sin - y * cos + y


def _shear(strength: float, size: tuple[int, int], definition: Definition) -> tuple[float, ...]:
    """Return the matrix of a shear along x, from output to input pixels (x, y)."""
    if definition == "torchvision":
        return 1, strength, 0, 0, 1, 0
    tangent = math.tan(strength)
    return 1, tangent, -tangent * size[0] / 2, 0, 1, 0
