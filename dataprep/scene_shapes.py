"""The classes of rendered objects: each a shape with its own outline, relief and markings.

What tells classes apart is form, shading and markings; colours and textures are drawn from pools
that classes share. Every shape fills about the unit square of its own frame (see `scene_surfaces`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dataprep.scene_surfaces import Blob, Field, Surface, blob_union, lathe, step, unit
from dataprep.scene_textures import sample


@dataclass(frozen=True, slots=True)
class ShapeClass:
    """One category of the data set."""

    name: str
    supercategory: str
    draw: Callable[[Field, Field, np.random.Generator], Surface]
    upright: bool  # stands on its base; others lie at any angle
    textures: tuple[str, ...]  # the usual one first


def _ball(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    radius2 = u * u + v * v
    z = np.sqrt(np.maximum(1 - radius2, 0))
    yaw, pitch = rng.uniform(-np.pi, np.pi, 2).tolist()
    a = math.cos(yaw) * u + math.sin(yaw) * z
    depth = math.cos(yaw) * z - math.sin(yaw) * u
    b = math.cos(pitch) * v + math.sin(pitch) * depth
    c = math.cos(pitch) * depth - math.sin(pitch) * v
    match rng.integers(4):
        case 0:  # one band round the middle
            mark = step(rng.uniform(0.12, 0.3) - np.abs(b))
        case 1:  # sectors from pole to pole
            mark = step(np.sin(np.arctan2(a, c) * int(rng.integers(2, 4))), 0.1)
        case 2:  # seams
            mark = step(0.05 - np.minimum(np.abs(b), np.abs(np.abs(a) - 0.55)))
        case _:
            mark = np.zeros_like(u)
    return Surface(1 - np.sqrt(radius2), (u, v, z), a, b, mark)


def _crate(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    """A box seen from above: three faces, each an affine image of the unit square."""
    yaw, pitch = rng.uniform(0.35, 1.2), rng.uniform(0.3, 0.7)
    wide, deep, high = rng.uniform(0.75, 1.05, 3).tolist()
    right = (math.cos(yaw) * wide, -math.sin(yaw) * math.sin(pitch) * wide)
    left = (-math.sin(yaw) * deep, -math.cos(yaw) * math.sin(pitch) * deep)
    up = (0.0, -math.cos(pitch) * high)
    edges = (right, left, up)
    inside = np.full_like(u, 1e3)
    for edge in edges:  # the outline of a box is the sum of its three edges: six half planes
        length = math.hypot(*edge)
        across = (-edge[1] / length, edge[0] / length)
        reach = sum(abs(other[0] * across[0] + other[1] * across[1]) for other in edges) / 2
        inside = np.minimum(inside, reach - np.abs(u * across[0] + v * across[1]))
    front = tuple(-(a + b + c) / 2 for a, b, c in zip(*edges))  # the lower corner in front
    tilt, lean = math.sin(pitch), math.cos(pitch)
    faces = (
        (front, right, up, (-math.sin(yaw) * 0.9, -tilt * 0.3, math.cos(yaw) * lean)),
        (front, left, up, (math.cos(yaw) * 0.9, -tilt * 0.3, math.sin(yaw) * lean)),
        ((front[0] + up[0], front[1] + up[1]), right, left, (0.0, -lean, tilt)),
    )
    nu, nv, nz = np.zeros_like(u), np.zeros_like(u), np.ones_like(u)
    s, t, mark = np.zeros_like(u), np.zeros_like(u), np.zeros_like(u)
    frame = rng.uniform(0.08, 0.16)
    brace = rng.random() < 0.5
    for origin, first, second, normal in faces:
        det = first[0] * second[1] - first[1] * second[0]
        du, dv = u - origin[0], v - origin[1]
        a = (du * second[1] - dv * second[0]) / det
        b = (dv * first[0] - du * first[1]) / det
        border = np.minimum(np.minimum(a, 1 - a), np.minimum(b, 1 - b))
        here = border >= -0.01
        face_mark = step(frame - border)
        if brace:
            face_mark = np.maximum(face_mark, step(frame * 0.8 - np.abs(a - b)))
        s, t = np.where(here, a, s), np.where(here, b, t)
        mark = np.where(here, face_mark, mark)
        nu, nv, nz = (np.where(here, n, old) for n, old in zip(normal, (nu, nv, nz)))
    return Surface(inside, unit(nu, nv, nz), s * 1.6, t * 1.6, mark)


def _can(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    radius = rng.uniform(0.42, 0.62)
    rim = radius * 0.94
    surface, axial = lathe(
        u, v, (-0.85, -0.8, -0.74, 0.72), (rim, radius, rim, radius), rng.uniform(0.18, 0.38)
    )
    low, high = sorted(rng.uniform(-0.75, 0.5, 2).tolist())
    label = step(axial - low) * step(high + 0.15 - axial)
    return Surface(surface.inside, surface.normal, surface.s, surface.t, label)


def _bottle(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    neck, body = rng.uniform(0.1, 0.16), rng.uniform(0.32, 0.46)
    shoulder = rng.uniform(-0.45, -0.1)
    heights = (-0.95, -0.8, -0.78, shoulder - 0.15, shoulder, shoulder + 0.2, 0.85)
    radii = (neck * 1.3, neck * 1.3, neck, neck, body * 0.65, body, body * rng.uniform(0.85, 1))
    surface, axial = lathe(u, v, heights, radii, 0.22)
    cap = step(-0.78 - axial)
    label = step(axial - shoulder - 0.35) * step(rng.uniform(0.4, 0.6) - axial)
    return Surface(
        surface.inside, surface.normal, surface.s, surface.t, np.maximum(cap, label * 0.9)
    )


def _cone(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    base = rng.uniform(0.5, 0.75)
    surface, axial = lathe(u, v, (-0.95, 0.75), (0.04, base), rng.uniform(0.2, 0.32))
    bands = step(np.sin(axial * rng.uniform(5, 9) + rng.uniform(0, 6)) - 0.2, 0.15)
    return Surface(surface.inside, surface.normal, surface.s, surface.t, bands)


def _ring(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    tube = rng.uniform(0.17, 0.29)
    v = v / rng.uniform(0.5, 1.0)  # seen at a slant
    radius = np.hypot(u, v) + 1e-6
    across = (radius - (0.98 - tube)) / tube
    z = np.sqrt(np.maximum(1 - across * across, 0))
    turn = np.arctan2(v, u)
    twisted = np.sin(turn * int(rng.integers(5, 12)) + 2.5 * int(rng.integers(2)) * across)
    mark = step(twisted - rng.uniform(-0.3, 0.6), 0.2)
    normal = unit(across * u / radius, across * v / radius, z)
    return Surface((1 - np.abs(across)) * tube, normal, turn * 0.7, across * tube, mark)


def _folded_angle(u: Field, v: Field, points: int) -> tuple[Field, Field]:
    """Angle from the nearest of `points` evenly spaced directions, and the radius."""
    period = 2 * np.pi / points
    angle = np.arctan2(u, -v)
    return angle - period * np.rint(angle / period), np.hypot(u, v)


def _star(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    points = int(rng.integers(4, 8))
    angle, radius = _folded_angle(u, v, points)
    notch, half = rng.uniform(0.36, 0.5), np.pi / points
    a, b = np.abs(angle), radius
    x, y = b * np.cos(a), b * np.sin(a)  # one half ray, from the tip (1, 0) to the notch
    nx, ny = notch * math.cos(half), notch * math.sin(half)
    inside = ((1 - x) * ny - y * (1 - nx)) / math.hypot(ny, 1 - nx)
    side = np.sign(angle)
    around = np.arctan2(u, -v) - angle  # direction of the ray itself
    slope = rng.uniform(0.5, 0.9)
    nu, nv = side * slope * np.cos(around), side * slope * np.sin(around)
    style = rng.integers(3)
    if style == 0:
        mark = (side > 0).astype(np.float32)
    elif style == 1:
        mark = step(0.09 - inside)
    else:
        mark = step(rng.uniform(0.2, 0.35) - radius)
    return Surface(inside, unit(nu, nv, np.ones_like(u) * 0.9), u, v, mark)


def _gear(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    teeth = int(rng.integers(7, 14))
    angle = np.arctan2(v, u)
    radius = np.hypot(u, v) + 1e-6
    tooth = np.clip(np.sin(angle * teeth) * 2.5, -1, 1)
    rim = 0.86 + 0.13 * tooth
    hole = rng.uniform(0.18, 0.34)
    outer = rim - radius
    inside = np.minimum(outer, radius - hole)
    bevel = np.clip(1 - outer / 0.1, 0, 1) - np.clip(1 - (radius - hole) / 0.08, 0, 1)
    groove = np.exp(-(((radius - (hole + 0.7) / 2) / 0.05) ** 2))
    normal = unit(u / radius * bevel, v / radius * bevel, np.ones_like(u) * 0.8)
    holes = float(rng.random() < 0.5)
    spokes = step(np.cos(angle * 5) - 0.4, 0.2) * step(0.12 - np.abs(radius - 0.55))
    return Surface(inside, normal, u, v, np.maximum(groove, spokes * holes) * 0.9)


def _leaf(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    width, skew = rng.uniform(0.3, 0.55), rng.uniform(-0.35, 0.35)
    bend = rng.uniform(-0.25, 0.25)
    v = v - bend * (1 - u * u)
    span = np.maximum(1 - u * u, 0)
    half = width * span * (1 + skew * u)
    if rng.random() < 0.4:  # saw-toothed edge
        half = half * (1 - 0.16 * np.abs(np.sin(u * rng.uniform(14, 20))))
    blade = np.where(np.abs(u) < 1, half - np.abs(v), -np.abs(v) - 0.1)
    stalk = np.minimum(0.035 - np.abs(v), np.minimum(u + 1, -0.75 - u))
    midrib = step(0.025 - np.abs(v), 0.02)
    pairs = rng.uniform(5, 8)
    phase = u * pairs - np.abs(v) * pairs * 1.1
    veins = step(0.1 - np.abs(phase - np.rint(phase)), 0.1)
    fold = np.sign(v) * 0.45
    normal = unit(0.25 * np.sin(phase * 2 * np.pi), fold, np.ones_like(u))
    inside = np.maximum(blade, stalk)
    return Surface(inside, normal, u, v, np.maximum(midrib, veins * 0.8) * (half > 0.02))


def _flower(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    petals = int(rng.integers(5, 9))
    angle, radius = _folded_angle(u, v, petals)
    centre = rng.uniform(0.2, 0.32)
    across = angle / (np.pi / petals)
    edge = 0.97 - rng.uniform(0.3, 0.45) * np.abs(across) ** rng.uniform(1.6, 3)
    disc = centre - radius
    around = np.arctan2(u, -v)
    nu = np.where(disc > 0, u / centre, across * 0.7 * np.cos(around))
    nv = np.where(disc > 0, v / centre, across * 0.7 * np.sin(around) - 0.2)
    nz = np.where(disc > 0, np.sqrt(np.maximum(1 - (radius / centre) ** 2, 0)), 0.8)
    crease = step(0.12 - np.abs(across), 0.1) * 0.45 * (radius < 0.75)
    mark = np.where(disc > 0, 1.0, crease).astype(np.float32)
    return Surface(edge - radius, unit(nu, nv, nz), radius, across * 0.3, mark)


def _mushroom(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    height, brim = rng.uniform(0.7, 1.0), rng.uniform(-0.05, 0.2)
    stem, _ = lathe(u, v, (brim - 0.15, 0.4, 0.9), (0.16, rng.uniform(0.16, 0.22), 0.26), 0.2)
    q = 1 - (u / 0.97) ** 2 - ((v - brim) / (height * 0.97)) ** 2
    under = brim + 0.13 * np.sqrt(np.maximum(1 - (u / 0.97) ** 2, 0)) - v
    cap = np.minimum(q * 0.5, under)
    seen = cap > 0
    z = np.sqrt(np.maximum(q, 0))
    cap_normal = unit(u, (v - brim) / height, z)
    normal = tuple(np.where(seen, a, b) for a, b in zip(cap_normal, stem.normal))
    spots = step(0.3 - sample("cells", u * 110 + rng.uniform(0, 500), v * 110), 0.1)
    mark = np.where(seen, spots, 0.75).astype(np.float32)
    return Surface(np.maximum(cap, stem.inside), (normal[0], normal[1], normal[2]), u, v, mark)


def _fish(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    tall, tail = rng.uniform(0.34, 0.52), rng.uniform(0.4, 0.6)
    fin = rng.uniform(0.25, 0.45)
    return blob_union(
        u,
        v,
        (
            Blob(0.12, 0, 0.78, tall),
            Blob(-0.78, -tail * 0.42, 0.36, 0.13, 0.85, -0.1, 0.8),
            Blob(-0.78, tail * 0.42, 0.36, 0.13, -0.85, -0.1, 0.8),
            Blob(0.0, -tall, fin, 0.14, 0.25, -0.15, 0.8),
            Blob(-0.1, tall * 0.95, fin * 0.7, 0.1, -0.5, -0.1, 0.8),
            Blob(0.15, 0.12, 0.2, 0.1, 0.6, 0.25, 0.6),
            Blob(0.62, -0.1, 0.09, 0.09, 0, 0.5, 1.0),
        ),
    )


def _beast(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    """A four-legged animal in profile; neck, legs and girth vary from dog to giraffe."""
    girth, leg = rng.uniform(0.22, 0.32), rng.uniform(0.36, 0.55)
    neck, head = rng.uniform(0.12, 0.4), rng.uniform(0.15, 0.2)
    top = 0.9 - leg - girth
    head_u, head_v = 0.62 + 0.12 * neck, top - girth * 0.3 - neck
    legs = [
        Blob(
            at + swing * 0.15,
            top + girth * 0.5 + leg * 0.5,
            leg * 0.75,
            0.085,
            np.pi / 2 - swing,
            lift,
        )
        for at, swing, lift in zip(
            (-0.46, -0.32, 0.3, 0.44),
            rng.uniform(-0.3, 0.3, 4).tolist(),
            (-0.05, -0.25, -0.25, -0.05),
        )
    ]
    aim = math.atan2(head_v - top, head_u - 0.45)
    length = math.hypot(head_v - top, head_u - 0.45)
    ears = rng.uniform(0.08, 0.17)
    return blob_union(
        u,
        v,
        (
            *legs,
            Blob(0, top, 0.62, girth),
            Blob((head_u + 0.45) / 2, (head_v + top) / 2, length * 0.62, 0.13, aim),
            Blob(head_u + 0.08, head_v, head * 1.35, head * 0.8, 0.35, 0.1),
            Blob(head_u + 0.2, head_v + 0.07, head * 0.6, head * 0.45, 0.35, 0.16, 0.7),
            Blob(head_u - 0.06, head_v - head, ears, 0.05, -1.1, 0.05, 0.6),
            Blob(-0.68, top - 0.02, rng.uniform(0.15, 0.32), 0.05, rng.uniform(-1.2, 0.9), 0, 0.6),
            Blob(head_u + 0.1, head_v - 0.04, 0.035, 0.035, 0, 0.4, 1.0),
        ),
    )


def _bird(u: Field, v: Field, rng: np.random.Generator) -> Surface:
    plump, lean = rng.uniform(0.28, 0.42), rng.uniform(-0.6, 0.1)
    wing = rng.uniform(0.36, 0.55)
    head_u, head_v = 0.48, -0.42 + 0.25 * lean
    return blob_union(
        u,
        v,
        (
            Blob(-0.05, 0.7, 0.28, 0.03, 1.45, -0.3, 0.9),
            Blob(0.12, 0.7, 0.28, 0.03, 1.65, -0.3, 0.9),
            Blob(-0.7, 0.12 - lean * 0.4, 0.34, 0.1, lean * 0.6 - 0.1, -0.1, 0.5),
            Blob(0, 0.08, 0.58, plump, lean),
            Blob(head_u, head_v, 0.24, 0.22, 0, 0.05),
            Blob(head_u + 0.32, head_v + 0.04, rng.uniform(0.14, 0.22), 0.06, 0.1, 0, 1.0),
            Blob(-0.12, 0.04, wing, plump * 0.55, lean + 0.25, 0.3, 0.55),
            Blob(head_u + 0.08, head_v - 0.05, 0.045, 0.045, 0, 0.4, 1.0),
        ),
    )


CLASSES: tuple[ShapeClass, ...] = (
    ShapeClass("ball", "toy", _ball, False, ("dots", "cloud", "marble", "patches", "grain")),
    ShapeClass("ring", "toy", _ring, False, ("weave", "grain", "cloud", "dots")),
    ShapeClass("star", "toy", _star, False, ("stone", "cloud", "dots", "weave")),
    ShapeClass("cone", "toy", _cone, True, ("cloud", "grain", "stone")),
    ShapeClass("crate", "container", _crate, True, ("planks", "fibre", "weave", "stone")),
    ShapeClass("can", "container", _can, True, ("stripes", "dots", "cloud", "tiles")),
    ShapeClass("bottle", "container", _bottle, True, ("marble", "cloud", "grain", "stripes")),
    ShapeClass("gear", "tool", _gear, False, ("grain", "stone", "fibre", "patches")),
    ShapeClass("leaf", "plant", _leaf, False, ("cracks", "cloud", "stone", "patches")),
    ShapeClass("flower", "plant", _flower, False, ("fibre", "cloud", "grain", "stripes")),
    ShapeClass(
        "mushroom", "plant", _mushroom, True, ("patches", "cloud", "grain", "stone", "fibre")
    ),
    ShapeClass("fish", "animal", _fish, False, ("scales", "stripes", "cells", "spots")),
    ShapeClass("beast", "animal", _beast, True, ("spots", "patches", "stripes", "fibre", "cracks")),
    ShapeClass("bird", "animal", _bird, True, ("blades", "fibre", "scales", "grain")),
)
