"""What lies behind the objects of a scene: light, colours, and backdrops with and without a floor.

Images are float32 [3, h, w], planes first: numpy is several times faster that way.
"""

import colorsys
import math
from dataclasses import dataclass

import numpy as np

from dataprep.scene_surfaces import Field
from dataprep.scene_textures import sample, texture

Colour = tuple[float, float, float]  # linear mixing weights per channel, 0..1

_WALLS = ("bricks", "planks", "tiles", "weave", "stripes", "dots", "marble", "stone", "cracks")
_GROUNDS = ("blades", "grain", "stone", "cells", "planks", "tiles", "bricks", "weave", "patches")


@dataclass(frozen=True, slots=True)
class Light:
    """A directional light: unit vector towards it (x right, y down, z to the viewer), and tint."""

    x: float
    y: float
    z: float
    ambient: float
    tint: Colour


def draw_light(rng: np.random.Generator) -> Light:
    """Return a light from above, left to right, more or less warm."""
    turn = rng.uniform(-math.pi, 0)  # from above, left to right
    rise = rng.uniform(0.45, 1.1)
    warmth = rng.normal(0, 0.06)
    return Light(
        math.cos(turn) * math.cos(rise),
        math.sin(turn) * math.cos(rise),
        math.sin(rise),
        rng.uniform(0.25, 0.5),
        (1 + warmth, 1.0, 1 - warmth),
    )


def draw_colour(rng: np.random.Generator) -> Colour:
    """Return any colour but the darkest."""
    return colorsys.hsv_to_rgb(rng.random(), rng.beta(1.3, 1.9), rng.uniform(0.22, 0.95))


def contrasting(rng: np.random.Generator, colour: Colour) -> Colour:
    """Return a second colour for the same surface: lighter or darker, and often of another hue."""
    hue, saturation, value = colorsys.rgb_to_hsv(*colour)
    value = value - rng.uniform(0.18, 0.45) if value > 0.55 else value + rng.uniform(0.18, 0.45)
    hue = hue + rng.normal(0, 0.12)
    saturation = min(max(saturation + rng.normal(0, 0.15), 0), 1)
    return colorsys.hsv_to_rgb(hue % 1, saturation, value)


def pick(rng: np.random.Generator, pool: list[Colour]) -> Colour:
    """Return a colour of the scene's pool as often as any other."""
    return pool[int(rng.integers(len(pool)))] if rng.random() < 0.5 else draw_colour(rng)


def mix(first: Colour, second: Colour, share: Field) -> np.ndarray:
    """Return the first colour where `share` is 0, the second where it is 1; float32 [3, h, w]."""
    return np.stack([a + share * (b - a) for a, b in zip(first, second)])


def _relief(height: Field, light: Light, depth: float) -> Field:
    """Brightness of a bumpy plane facing the viewer, about 1 where it is flat."""
    slope = np.zeros_like(height)
    slope[:, 1:-1] += (height[:, 2:] - height[:, :-2]) * -light.x
    slope[1:-1] += (height[2:] - height[:-2]) * -light.y
    return 1 + depth * slope


def _textured(
    rng: np.random.Generator, name: str, s: Field, t: Field, light: Light, pool: list[Colour]
) -> np.ndarray:
    """A flat textured area in two related colours, with relief; float32 [3, h, w]."""
    value = texture(name, s, t)
    colour = pick(rng, pool)
    area = mix(colour, contrasting(rng, colour), value * rng.uniform(0.5, 1))
    return area * _relief(value, light, rng.uniform(0.1, 0.5))


def backdrop(
    rng: np.random.Generator, height: int, width: int, light: Light, pool: list[Colour]
) -> tuple[np.ndarray, float | None]:
    """Return the empty scene, float32 [3, H, W], and the row of its horizon if it has one."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    kind = rng.integers(4)
    horizon = height * rng.uniform(0.22, 0.5) if kind < 2 else None
    x0, y0 = rng.uniform(0, 512, 2).tolist()
    if kind == 0:  # sky, hills and ground
        assert horizon is not None
        clouds = np.clip(
            sample("cloud", x0 + x * 1.3, y0 + y * 2.5) * 2 - rng.uniform(0, 1.4), 0, 1
        )
        top = draw_colour(rng)
        canvas = mix(top, draw_colour(rng), np.clip(y / horizon, 0, 1))
        canvas += clouds * rng.uniform(0.3, 1) * (0.92 - canvas)
        ridge = sample("cloud", x0 + x[:1] * 1.2, np.full_like(x[:1], y0)) * height * 0.2
        hills = y > horizon - ridge
        canvas = np.where(hills, _textured(rng, "blades", x, y, light, pool) * 0.8, canvas)
    elif kind == 1:  # a wall
        scale = 1 / rng.uniform(0.7, 2.2)
        canvas = _textured(
            rng, str(rng.choice(_WALLS)), x0 + x * scale, y0 + y * scale, light, pool
        )
    elif kind == 2:  # seen from straight above
        turn, scale = rng.uniform(0, math.pi), 1 / rng.uniform(0.6, 2.0)
        c, s = math.cos(turn) * scale, math.sin(turn) * scale
        name = str(rng.choice(_GROUNDS + _WALLS))
        canvas = _textured(rng, name, x0 + c * x + s * y, y0 + c * y - s * x, light, pool)
    else:  # out of focus: soft clouds of colour and discs
        share = sample("cloud", x0 + x * 0.6, y0 + y * 0.6)
        colour = pick(rng, pool)
        canvas = mix(colour, contrasting(rng, colour), share)
        for _ in range(int(rng.integers(5, 25))):
            _add_disc(rng, canvas, pick(rng, pool))
    if horizon is not None:
        canvas = _with_floor(rng, canvas, horizon, light, pool)
    glow_x, glow_y = rng.uniform(0, width), rng.uniform(0, height)
    reach = rng.uniform(0.5, 1.5) * width
    glow = np.exp(-(((x[0] - glow_x) / reach) ** 2)) * np.exp(-(((y[:, :1] - glow_y) / reach) ** 2))
    canvas *= rng.uniform(0.65, 0.95) + 0.4 * glow
    return canvas, horizon


def _add_disc(rng: np.random.Generator, canvas: np.ndarray, colour: Colour) -> None:
    """Blend in a disc of light, as lamps out of focus are."""
    height, width = canvas.shape[1:]
    cx, cy, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(6, 40)
    left, right = max(int(cx - r - 3), 0), min(int(cx + r + 4), width)
    top, bottom = max(int(cy - r - 3), 0), min(int(cy + r + 4), height)
    dx = np.arange(left, right, dtype=np.float32) - cx
    dy = np.arange(top, bottom, dtype=np.float32)[:, None] - cy
    disc = np.clip((r - np.sqrt(dx * dx + dy * dy)) / 4 + 0.5, 0, 1) * rng.uniform(0.05, 0.3)
    for plane, value in zip(canvas[:, top:bottom, left:right], colour):
        plane += disc * (value - plane)


def _with_floor(
    rng: np.random.Generator, canvas: np.ndarray, horizon: float, light: Light, pool: list[Colour]
) -> np.ndarray:
    """Lay a floor in perspective below the row `horizon`."""
    height, width = canvas.shape[1:]
    first = math.ceil(horizon)
    y, x = np.mgrid[first:height, :width].astype(np.float32)
    away = height / (y - horizon + 0.12 * height)  # 1 at the feet of the viewer, about 8 at the end
    s = (x - width * rng.uniform(0.2, 0.8)) * away * 0.6 + rng.uniform(1000, 1512)
    t = away * height * rng.uniform(0.4, 0.8)
    floor = _textured(rng, str(rng.choice(_GROUNDS)), s, t, light, pool)
    haze = np.clip((away - 2) / 12, 0, 0.5)  # texture beyond the pixel grid fades out
    canvas[:, first:] = floor + haze * (floor.mean((1, 2), keepdims=True) - floor)
    return canvas
