"""Procedural surface textures for rendered scenes: tileable noise and what is built from it.

A texture maps coordinates in texels (about one pixel where nothing is scaled) to a value in 0..1
that mixes two colours and serves as relief. Shapes and backdrops draw from the same list, so a
texture alone does not tell an object from what is behind it.
"""

from collections.abc import Callable
from functools import cache

import numpy as np

Field = np.ndarray  # float32 [h, w]

SIDE = 512  # texels; a power of two, so that wrapping is a bit mask
_ATLAS_SEED = 20_170  # the textures are the same for every seed of a scene


@cache
def atlas() -> dict[str, Field]:
    """Return the tileable noise fields by name, each float32 [SIDE, SIDE] uniform in 0..1."""
    rng = np.random.default_rng(_ATLAS_SEED)
    first, second = _cell_distances(rng, 220)
    fields = {
        "cloud": _power_noise(rng, 2.4),
        "stone": _power_noise(rng, 1.1),
        "grain": _power_noise(rng, 0.45),
        "fibre": _power_noise(rng, 1.0, stretch=14.0),
        "blades": _power_noise(rng, 0.7, stretch=0.2),
        "cells": first,
        "cracks": second - first,
    }
    return {name: _equalised(field) for name, field in fields.items()}


def sample(name: str, s: Field, t: Field) -> Field:
    """Return the noise field `name` at column s and row t (texels, wrapped, nearest)."""
    column = s.astype(np.int32) & (SIDE - 1)
    row = t.astype(np.int32) & (SIDE - 1)
    return atlas()[name].ravel()[(row << 9) | column]


def texture(name: str, s: Field, t: Field) -> Field:
    """Return the texture `name` (a key of `TEXTURES`) at texel coordinates (s, t), in 0..1."""
    return TEXTURES[name](s, t)


def _power_noise(rng: np.random.Generator, slope: float, stretch: float = 1.0) -> Field:
    """Noise with amplitude 1 / frequency**slope; `stretch` > 1 draws it out along the columns."""
    fx = np.fft.rfftfreq(SIDE)[None, :] * SIDE
    fy = np.fft.fftfreq(SIDE)[:, None] * SIDE
    radius = np.hypot(fx * stretch**0.5, fy / stretch**0.5)
    radius[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((SIDE, SIDE))) / (radius + 1.0) ** slope
    return np.fft.irfft2(spectrum, (SIDE, SIDE)).astype(np.float32)


def _cell_distances(rng: np.random.Generator, points: int) -> tuple[Field, Field]:
    """Distance to the nearest and the second nearest of random points, on the torus."""
    axis = np.arange(SIDE, dtype=np.float32)
    first = np.full((SIDE, SIDE), np.inf, np.float32)
    second = first.copy()
    for x, y in rng.uniform(0, SIDE, (points, 2)).astype(np.float32):
        dx, dy = np.abs(axis - x), np.abs(axis - y)
        dx, dy = np.minimum(dx, SIDE - dx), np.minimum(dy, SIDE - dy)
        distance = (dx * dx)[None, :] + (dy * dy)[:, None]
        np.minimum(second, np.maximum(first, distance), out=second)
        np.minimum(first, distance, out=first)
    return np.sqrt(first), np.sqrt(second)


def _equalised(field: Field) -> Field:
    """Replace values by their rank, so that every field has the same, uniform histogram."""
    order = np.argsort(field, axis=None, kind="stable")
    ranks = np.empty(field.size, np.float32)
    ranks[order] = np.linspace(0, 1, field.size, dtype=np.float32)
    return ranks.reshape(field.shape)


def _fraction(x: Field) -> Field:
    return x - np.floor(x)


def _soft_step(x: Field, edge: float, width: float) -> Field:
    """0 below `edge`, 1 above, a ramp of `width` between."""
    return np.clip((x - edge) / width + 0.5, 0, 1)


def _tint(column: Field, row: Field) -> Field:
    """A value per integer cell, scattered over the noise so that neighbours differ."""
    return sample("grain", column * 37, row * 61)


def _bricks(s: Field, t: Field) -> Field:
    row = np.floor(t / 16)
    along = s / 36 + 0.5 * (row % 2)
    across = _fraction(t / 16)
    joint = np.minimum(_soft_step(_fraction(along), 0.06, 0.05), _soft_step(across, 0.14, 0.1))
    body = 0.55 + 0.25 * _tint(np.floor(along), row) + 0.2 * sample("stone", s, t)
    return joint * body


def _planks(s: Field, t: Field) -> Field:
    row = np.floor(t / 26)
    joint = _soft_step(_fraction(t / 26), 0.07, 0.06)
    shift = _tint(row, row) * 400
    return joint * (0.3 + 0.25 * _tint(row, row + 3) + 0.45 * sample("fibre", s + shift, t * 1.5))


def _tiles(s: Field, t: Field) -> Field:
    column, row = np.floor(s / 30), np.floor(t / 30)
    joint = np.minimum(
        _soft_step(_fraction(s / 30), 0.05, 0.05), _soft_step(_fraction(t / 30), 0.05, 0.05)
    )
    return joint * (0.25 + 0.55 * ((column + row) % 2) + 0.2 * sample("cloud", s * 2, t * 2))


def _stripes(s: Field, t: Field) -> Field:
    wobble = sample("cloud", s, t) * 4
    return 0.85 * _soft_step(_fraction((t + wobble) / 20), 0.5, 0.1) + 0.15 * sample("grain", s, t)


def _dots(s: Field, t: Field) -> Field:
    row = np.floor(t / 18)
    dx = _fraction(s / 18 + 0.5 * (row % 2)) - 0.5
    dy = _fraction(t / 18) - 0.5
    return _soft_step(0.3 - np.hypot(dx, dy), 0, 0.12) * 0.85 + 0.15 * sample("stone", s, t)


def _weave(s: Field, t: Field) -> Field:
    over = np.sin(s * 0.9) * np.sin(t * 0.9)
    return 0.5 + 0.3 * over + 0.2 * (sample("grain", s, t) - 0.5) * 2


def _marble(s: Field, t: Field) -> Field:
    vein = np.sin(s * 0.06 + 14 * sample("cloud", s, t))
    return np.abs(vein) ** 0.6


def _spots(s: Field, t: Field) -> Field:
    return _soft_step(sample("cells", s * 2, t * 2), 0.45, 0.12)


def _patches(s: Field, t: Field) -> Field:
    patch = _soft_step(sample("cloud", s * 2.5, t * 2.5), 0.5, 0.08)
    return 0.85 * patch + 0.15 * sample("fibre", s, t)


def _scales(s: Field, t: Field) -> Field:
    row = np.floor(t / 9)
    dx = _fraction(s / 12 + 0.5 * (row % 2)) - 0.5
    dy = _fraction(t / 9)
    return np.clip(1.15 - np.hypot(dx * 1.6, dy), 0, 1)


def _noise(name: str) -> Callable[[Field, Field], Field]:
    return lambda s, t: sample(name, s, t)


TEXTURES: dict[str, Callable[[Field, Field], Field]] = {
    "cloud": _noise("cloud"),
    "stone": _noise("stone"),
    "grain": _noise("grain"),
    "fibre": _noise("fibre"),
    "blades": _noise("blades"),
    "cells": _noise("cells"),
    "cracks": lambda s, t: np.clip(sample("cracks", s, t) * 3, 0, 1),
    "bricks": _bricks,
    "planks": _planks,
    "tiles": _tiles,
    "stripes": _stripes,
    "dots": _dots,
    "weave": _weave,
    "marble": _marble,
    "spots": _spots,
    "patches": _patches,
    "scales": _scales,
}
