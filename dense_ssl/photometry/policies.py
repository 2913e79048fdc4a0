"""Photometric policies as data: which operations, in which order, how probable, how strong.

`augment` draws their random numbers and applies them; `photometry_ops` has the formulas.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, product

from dense_ssl.config import UserError
from dense_ssl.views import ViewSpec


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast, saturation and hue, in an order of its own for every crop.

    The factors are uniform in 1 -+ their strengths, the turn of the hue in 0 -+ its strength.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float
    p: float = 1.0


@dataclass(frozen=True)
class Grayscale:
    """Luma in all three channels."""

    p: float


@dataclass(frozen=True)
class GaussianBlur:
    """Pillow's GaussianBlur; its radius, the standard deviation in pixels, is uniform in `sigma`."""

    p: float
    sigma: tuple[float, float] = (0.1, 2.0)


@dataclass(frozen=True)
class Solarize:
    """Values from the threshold up are inverted."""

    p: float
    threshold: float = 0.5  # the published 128 of 255: between the 8-bit values 127 and 128


@dataclass(frozen=True)
class AutoAugment:
    """The ImageNet policy of `autoaugment`, on 8-bit values: nothing may come before it."""

    p: float = 1.0


Op = ColorJitter | Grayscale | GaussianBlur | Solarize | AutoAugment


@dataclass(frozen=True)
class OneOf:
    """One of several sequences of operations, each with the same probability."""

    branches: tuple[tuple[Op, ...], ...]


@dataclass(frozen=True)
class Policy:
    """What happens to the colours of a crop, in this order."""

    ops: tuple[Op | OneOf, ...] = ()

    @property
    def moves_pixels(self) -> bool:
        """Whether it may shear or rotate a crop: a method that uses boxes refuses such a policy."""
        return any(isinstance(op, AutoAugment) for path in self.paths() for op in path)

    def paths(self) -> Iterator[tuple[Op, ...]]:
        """Yield every sequence of operations that a crop may go through."""
        for choice in product(*(branches(op) for op in self.ops)):
            yield tuple(chain.from_iterable(choice))


def branches(op: Op | OneOf) -> tuple[tuple[Op, ...], ...]:
    """Return the sequences of operations that one entry of a policy stands for."""
    return op.branches if isinstance(op, OneOf) else ((op,),)


_JITTER_MOCO = ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8)
_JITTER_DINO = ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8)
_GREY = Grayscale(p=0.2)
_MOCO_V2 = (_JITTER_MOCO, _GREY, GaussianBlur(p=0.5))
_BLUR_SOLARIZE = (GaussianBlur(p=0.1), Solarize(p=0.2))

POLICIES: dict[str, Policy] = {
    "none": Policy(),
    # He et al. 2019, arXiv:1911.05722, section 3.3, in the order of the published code
    "moco_v1": Policy((_GREY, ColorJitter(0.4, 0.4, 0.4, 0.4))),
    # Chen et al. 2020, arXiv:2003.04297, section 3
    "moco_v2": Policy(_MOCO_V2),
    # Van Gansbeke et al. 2021, arXiv:2106.05967: what queries get, and either half of it alone
    "autoaugment": Policy((AutoAugment(),)),
    "moco_v2_autoaugment": Policy((OneOf((_MOCO_V2, (AutoAugment(),))),)),
    # Caron et al. 2021, arXiv:2104.14294, after BYOL: first global view, the other ones, local views
    "dino_1": Policy((_JITTER_DINO, _GREY, GaussianBlur(p=1.0))),
    "dino_2": Policy((_JITTER_DINO, _GREY, *_BLUR_SOLARIZE)),
    "dino_local": Policy((_JITTER_DINO, _GREY, GaussianBlur(p=0.5))),
    # Qiu et al. 2024, "Mind Your Augmentation": DINO's for global views, blurred before the colours change
    "dc_1": Policy((GaussianBlur(p=1.0), _JITTER_DINO, _GREY)),
    "dc_2": Policy((GaussianBlur(p=0.1), _JITTER_DINO, _GREY, Solarize(p=0.2))),
    # UDI's published code blurs a crop of the first branch with probability 1/2 * 1/2 + 1/2 * 1
    "udi": Policy((_JITTER_DINO, _GREY, OneOf(((GaussianBlur(p=0.75),), _BLUR_SOLARIZE)))),
}


def view_policies(view: ViewSpec) -> tuple[Policy, ...]:
    """Return one policy per crop of a view.

    Raises:
        UserError: there is no policy of that name; the message has the nearest one.
    """
    names = view.photometric
    names = (names,) * view.count if isinstance(names, str) else names
    for name in names:
        if name not in POLICIES:
            near = difflib.get_close_matches(name, POLICIES, n=1, cutoff=0)[0]
            raise UserError(
                f"view {view.name!r}: no photometric policy {name!r}; did you mean {near}? "
                f"(known: {', '.join(POLICIES)})"
            )
    return tuple(POLICIES[name] for name in names)
