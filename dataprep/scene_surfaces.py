"""What a rendered object is before colour and light: outline, relief, texture frame, markings.

A shape is drawn in its own frame: `u` to the right and `v` downwards, the object inside the unit
square, the viewer along +z. Two builders serve most classes: unions of ellipsoids and solids of
revolution.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Field = np.ndarray  # float32 [h, w]
_EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class Surface:
    """What a shape looks like at every pixel of its patch, before colour and light."""

    inside: Field  # > 0 inside, 0 on the outline, falling off outside; any unit
    normal: tuple[Field, Field, Field]  # (u, v, z), unit length where inside
    s: Field  # texture coordinates, object units
    t: Field
    mark: Field  # 0..1, share of the accent colour


@dataclass(frozen=True, slots=True)
class Blob:
    """An ellipsoid: centre, radii, angle of its long axis, height towards the viewer, marking."""

    u: float
    v: float
    along: float
    across: float
    angle: float = 0.0
    lift: float = 0.0
    mark: float = 0.0


def step(x: Field, width: float = 0.04) -> Field:
    """Return 0 below zero, 1 above, and a ramp of `width` between."""
    return np.clip(x / width + 0.5, 0, 1)


def unit(nu: Field, nv: Field, nz: Field) -> tuple[Field, Field, Field]:
    """Return the vectors at unit length."""
    scale = 1 / np.sqrt(nu * nu + nv * nv + nz * nz + _EPSILON)
    return nu * scale, nv * scale, nz * scale


def blob_union(u: Field, v: Field, blobs: Sequence[Blob]) -> Surface:
    """Return the union of ellipsoids: at every pixel the one nearest to the viewer is seen."""
    inside = np.full_like(u, -1e3)
    height = np.full_like(u, -1e3)
    nu, nv, nz, mark = np.zeros_like(u), np.zeros_like(u), np.ones_like(u), np.zeros_like(u)
    for blob in blobs:
        c, s = math.cos(blob.angle), math.sin(blob.angle)
        du, dv = u - blob.u, v - blob.v
        a = (c * du + s * dv) / blob.along
        b = (c * dv - s * du) / blob.across
        q = 1 - a * a - b * b
        np.maximum(inside, q * blob.across, out=inside)
        z = np.sqrt(np.maximum(q, 0))
        top = np.where(q > 0, blob.lift + z * blob.across, -1e3)
        front = top > height
        height = np.where(front, top, height)
        a, b = a / blob.along, b / blob.across
        nu = np.where(front, c * a - s * b, nu)
        nv = np.where(front, s * a + c * b, nv)
        nz = np.where(front, z / blob.across, nz)
        mark = np.where(front, blob.mark, mark)
    return Surface(inside, unit(nu, nv, nz), u, v, mark)


def lathe(
    u: Field, v: Field, heights: Sequence[float], radii: Sequence[float], tilt: float
) -> tuple[Surface, Field]:
    """Return the solid of revolution about the v axis, seen from slightly above, with its top disc.

    Returns the surface, whose texture wraps around the axis, and the height along the axis of every
    pixel, curved as the rings of the solid are.
    """
    knots = np.linspace(heights[0], heights[-1], 96)
    profile = np.interp(knots, heights, radii)
    slope = np.gradient(profile, knots)
    radius = np.interp(v, knots, profile).astype(np.float32)
    x = np.clip(u / np.maximum(radius, _EPSILON), -1, 1)
    depth = np.sqrt(1 - x * x)
    axial = v - tilt * radius * depth
    bottom = heights[-1] + tilt * radii[-1] * depth - v
    body = np.minimum(np.minimum(radius - np.abs(u), bottom), v - heights[0])
    nu, nv, nz = unit(x, -np.interp(axial, knots, slope).astype(np.float32) + 0.3 * tilt, depth)
    disc = 1 - np.hypot(u / radii[0], (v - heights[0]) / (radii[0] * tilt + _EPSILON))
    on_top = disc > 0
    nv = np.where(on_top, -0.9, nv)
    nz = np.where(on_top, 0.45, nz)
    nu = np.where(on_top, 0, nu)
    inside = np.maximum(body, disc * radii[0] * tilt)
    wrapped = np.where(on_top, u, np.arcsin(x) * radius)
    return Surface(inside, (nu, nv, nz), wrapped, axial, np.zeros_like(u)), axial
