"""One scene: a lit backdrop, objects placed from far to near, their shadows, and who owns each pixel.

A scene is a pure function of (seed, index). As in the world, things have a look of their own: most
objects of a class wear its usual hue and texture, and a scene is mostly of one kind of thing. The rest
takes any colour, from the same pool as the backdrop as often as not, so that neither colour nor
brightness gives an object away.
"""

import colorsys
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from dataprep.scene_backdrops import (
    Colour,
    Light,
    backdrop,
    contrasting,
    draw_colour,
    draw_light,
    mix,
    pick,
)
from dataprep.scene_shapes import CLASSES, ShapeClass
from dataprep.scene_surfaces import Field, Surface
from dataprep.scene_textures import sample, texture

SIZES = ((256, 256), (256, 320), (320, 256), (288, 288), (256, 288))  # (height, width)
MIN_VISIBLE_PX = 60  # an object with less to see is not placed
MIN_VISIBLE_SHARE = 0.3  # of its own outline inside the image
USUAL = 0.75  # share of objects of their class's hue, of its texture, of the scene's kind
HUE_SPREAD = 0.03  # standard deviation of a class's usual hue, in turns


@dataclass(frozen=True, slots=True)
class Scene:
    """A rendered image and its truth."""

    image: np.ndarray  # uint8 [H, W, 3]
    owner: np.ndarray  # uint8 [H, W]: 0 is the backdrop, k the k-th object
    categories: tuple[int, ...]  # index into CLASSES of object 1, 2, ...


@dataclass(frozen=True, slots=True)
class _Placement:
    """Where one object goes; lengths in pixels."""

    x: float
    y: float
    radius: float
    angle: float
    mirrored: bool


def paint_scene(seed: int, index: int) -> Scene:
    """Return scene `index` of the set `seed`: three to ten objects before a backdrop."""
    rng = np.random.default_rng([seed, index])
    height, width = SIZES[int(rng.integers(len(SIZES)))]
    light = draw_light(rng)
    pool = [draw_colour(rng) for _ in range(4)]
    canvas, horizon = backdrop(rng, height, width, light, pool)
    owner = np.zeros((height, width), np.uint8)
    categories: list[int] = []
    kind = CLASSES[int(rng.integers(len(CLASSES)))].supercategory
    depths = np.sort(rng.random(int(rng.integers(4, 10))))[::-1].tolist()  # far objects first
    for depth in depths:
        category = _draw_category(rng, kind)
        for _ in range(3):  # places that would hide too much of an earlier object are given up
            place = _draw_place(rng, CLASSES[category], depth, horizon, height, width)
            if _paint_object(rng, canvas, owner, len(categories) + 1, category, place, light, pool):
                categories.append(category)
                break
    return Scene(_develop(rng, canvas), owner, tuple(categories))


def _draw_category(rng: np.random.Generator, kind: str) -> int:
    """A class of the scene's kind as a rule, else any."""
    alike = [number for number, shape in enumerate(CLASSES) if shape.supercategory == kind]
    if rng.random() < USUAL:
        return alike[int(rng.integers(len(alike)))]
    return int(rng.integers(len(CLASSES)))


def _draw_place(
    rng: np.random.Generator,
    shape: ShapeClass,
    depth: float,
    horizon: float | None,
    height: int,
    width: int,
) -> _Placement:
    """A place for an object at `depth` (0 near, 1 far): far ones are small and near the horizon."""
    side = min(height, width)
    radius = side * 0.38 / (1 + 2.4 * depth) * rng.uniform(0.75, 1.3)
    x = rng.uniform(0, width)
    if horizon is None:
        y = rng.uniform(0, height)
    else:
        feet = horizon + (height * 1.02 - horizon) / (1 + 4 * depth) + rng.normal(0, 6)
        lifted = 0.0 if rng.random() < 0.8 else rng.uniform(0, height * 0.4)  # in the air
        y = feet - radius * 0.85 - lifted
    if shape.upright and (horizon is not None or rng.random() < 0.5):
        angle = rng.normal(0, 0.15)
    else:
        angle = rng.uniform(-math.pi, math.pi)
    return _Placement(x, y, radius, angle, rng.random() < 0.5)


def _paint_object(
    rng: np.random.Generator,
    canvas: np.ndarray,
    owner: np.ndarray,
    number: int,
    category: int,
    place: _Placement,
    light: Light,
    pool: list[Colour],
) -> bool:
    """Paint object `number` with its shadow in place; False, with nothing done, if it fits badly."""
    height, width = owner.shape
    reach = place.radius * 1.25 + 3
    left, right = max(int(place.x - reach), 0), min(int(place.x + reach) + 2, width)
    top, bottom = max(int(place.y - reach), 0), min(int(place.y + reach) + 2, height)
    if right - left < 8 or bottom - top < 8:
        return False
    y, x = np.mgrid[top:bottom, left:right].astype(np.float32)
    dx, dy = (x - place.x) / place.radius, (y - place.y) / place.radius
    c, s = math.cos(place.angle), math.sin(place.angle)
    sign = -1.0 if place.mirrored else 1.0
    stretch = rng.uniform(0.88, 1.14)
    u, v = (c * dx + s * dy) * sign * stretch, (c * dy - s * dx) / stretch
    shape = CLASSES[category]
    surface = shape.draw(u, v, rng)
    cover = _coverage(surface.inside)
    mask = cover >= 0.5
    here = owner[top:bottom, left:right]
    if not _leaves_enough(owner, here, mask, place.radius):
        return False
    nu, nv, nz = surface.normal
    normal = (c * nu * sign - s * nv, s * nu * sign + c * nv, nz)
    colours = _object_colours(rng, shape, surface, place.radius, pool)
    shaded = _lit(rng, colours, normal, light)
    _cast_shadow(rng, canvas, cover, (left, top), place.radius, light)
    patch = canvas[:, top:bottom, left:right]
    patch += cover * (shaded - patch)
    here[mask] = number
    return True


def _coverage(inside: Field) -> Field:
    """Share of each pixel that lies inside: the implicit function over its own slope, clipped."""
    across = np.zeros_like(inside)
    across[:, 1:-1] = (inside[:, 2:] - inside[:, :-2]) / 2
    down = np.zeros_like(inside)
    down[1:-1] = (inside[2:] - inside[:-2]) / 2
    return np.clip(0.5 + inside / np.maximum(np.hypot(across, down), 1e-4), 0, 1)


def _leaves_enough(owner: np.ndarray, here: np.ndarray, mask: np.ndarray, radius: float) -> bool:
    """Whether the newcomer is well inside the image and hides no earlier object too much."""
    area = int(mask.sum())
    if area < MIN_VISIBLE_PX or area < MIN_VISIBLE_SHARE * radius * radius:
        return False
    before = np.bincount(owner.ravel(), minlength=256)
    hidden = np.bincount(here[mask], minlength=256)
    touched = np.flatnonzero(hidden[1:]) + 1
    left = before[touched] - hidden[touched]
    return bool(((left >= MIN_VISIBLE_PX) & (left >= 0.5 * before[touched])).all())


def _object_colours(
    rng: np.random.Generator, shape: ShapeClass, surface: Surface, radius: float, pool: list[Colour]
) -> np.ndarray:
    """Colour of every pixel before light, float32 [3, h, w]."""
    base = _usual_colour(rng, shape) if rng.random() < USUAL else pick(rng, pool)
    second = contrasting(rng, base)
    accent = contrasting(rng, base) if rng.random() < 0.5 else pick(rng, pool)
    scale = rng.uniform(0.8, 1.3) * (45 + 0.35 * radius)  # texels per object unit
    s = surface.s * scale + rng.uniform(1000, 1512)
    t = surface.t * scale + rng.uniform(1000, 1512)
    usual = rng.random() < USUAL
    value = texture(shape.textures[0 if usual else int(rng.integers(len(shape.textures)))], s, t)
    colours = mix(base, second, value * rng.uniform(0.4, 1))
    for plane, value in zip(colours, accent):
        plane += surface.mark * (value - plane)
    return colours


def _usual_colour(rng: np.random.Generator, shape: ShapeClass) -> Colour:
    """A colour of the class's hue; lighter or darker, more or less pale."""
    hue = CLASSES.index(shape) * 0.381966 + rng.normal(0, HUE_SPREAD)  # far apart on the circle
    return colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.35, 0.9), rng.uniform(0.3, 0.95))


def _lit(
    rng: np.random.Generator, colours: np.ndarray, normal: tuple[Field, Field, Field], light: Light
) -> np.ndarray:
    """Colours under ambient, diffuse and specular light (Blinn-Phong), float32 [3, h, w]."""
    nx, ny, nz = normal
    diffuse = np.maximum(nx * light.x + ny * light.y + nz * light.z, 0)
    strength = light.ambient * (0.75 - 0.25 * ny) + (1.15 - light.ambient) * diffuse
    strength *= rng.uniform(1.0, 1.9)  # as bright as the backdrop as often as not
    half = math.hypot(light.x, light.y, light.z + 1)
    towards = np.maximum((nx * light.x + ny * light.y + nz * (light.z + 1)) / half, 0)
    gloss = rng.uniform(0, 0.6) * towards ** rng.uniform(8, 50)
    return np.stack([plane * strength * tint + gloss for plane, tint in zip(colours, light.tint)])


def _cast_shadow(
    rng: np.random.Generator,
    canvas: np.ndarray,
    cover: Field,
    corner: tuple[int, int],
    radius: float,
    light: Light,
) -> None:
    """Darken the canvas where the object keeps the light off, softly, away from the light."""
    blur = radius * rng.uniform(0.08, 0.2) + 1
    distance = radius * rng.uniform(0.12, 0.45)
    pad = math.ceil(2 * blur)
    padded = np.pad(np.rint(cover * 255).astype(np.uint8), pad)
    soft = (
        Image.fromarray(padded)
        .filter(ImageFilter.BoxBlur(blur))
        .filter(ImageFilter.BoxBlur(blur / 2))
    )
    shade = np.asarray(soft, np.float32) * (
        rng.uniform(0.35, 0.7) * (1 - light.ambient) / 0.75 / 255
    )
    left = corner[0] - pad - round(light.x * distance)
    top = corner[1] - pad - round(light.y * distance)
    height, width = canvas.shape[1:]
    x0, x1 = max(left, 0), min(left + shade.shape[1], width)
    y0, y1 = max(top, 0), min(top + shade.shape[0], height)
    if x0 < x1 and y0 < y1:
        canvas[:, y0:y1, x0:x1] *= 1 - shade[y0 - top : y1 - top, x0 - left : x1 - left]


def _develop(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Exposure, contrast, slight defocus and sensor noise; returns uint8 [H, W, 3]."""
    height, width = canvas.shape[1:]
    canvas *= rng.uniform(0.85, 1.2)
    canvas += rng.uniform(-0.03, 0.05)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x0, y0 = rng.uniform(0, 512, 2).tolist()
    noise = sample("grain", x + x0, y + y0) - 0.5
    canvas += noise * rng.uniform(0.01, 0.06)
    planes = (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
    return np.asarray(image)
