"""What an update without a second gradient takes in its place: the part of the last one that outlives its step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from saner_jax._leaves import (
    PyTree,
    cast_like,
    divide,
    leafwise,
    projection,
    scale_to,
    scaled_norm,
    unit_scale,
    vary_like,
    zero_of,
    zeros_like,
)


class OrthogonalPart(NamedTuple):
    """What :func:`sharpness_aware` keeps of the last pair of gradients under ``reuse``; zeros before there was one."""

    direction: optax.Params
    """Unit vector ``v``, the direction of ``h - (<g, h> / ||g||^2) g``, in the dtype that ``reuse`` says."""
    ratio: jax.Array
    """``q``, the norm of that part over the norm of ``g``, float (); 0 where g is zero."""


def no_part(params: PyTree, dtype: jnp.dtype | None) -> OrthogonalPart:
    """Return what is kept before any second gradient; dtype of the direction, None for that of the arithmetic."""
    return OrthogonalPart(zeros_like(params, dtype), zero_of(params))


def orthogonal_part(h: PyTree, g: PyTree, last: OrthogonalPart) -> OrthogonalPart:
    """Return what is kept of a pair of gradients, in the types of what was kept before."""
    along = projection(h, g)
    part = jax.tree.map(lambda h, g: _less_along(along, h, g), h, g)
    scale, scale_of_g = unit_scale(part), unit_scale(g)
    norm = scaled_norm(part, scale)
    direction = scale_to(part, scale, divide(jnp.ones_like(norm), norm))
    ratio = divide(norm, scaled_norm(g, scale_of_g)) * (scale_of_g / scale)
    return OrthogonalPart(cast_like(direction, last.direction), vary_like(ratio.astype(last.ratio.dtype), last.ratio))


def estimate(g: PyTree, kept: OrthogonalPart) -> PyTree:
    """Return ``g + q ||g|| v``."""
    scale = unit_scale(g)
    length = kept.ratio * scaled_norm(g, scale)
    return jax.tree.map(lambda g, v: _plus(length, 1 / scale, g, v), g, kept.direction)


@leafwise
def _less_along(along: jax.Array, h: jax.Array, g: jax.Array) -> jax.Array:
    return h - along.astype(h.dtype) * g


# Two factors, whose product may leave the dtype.
@leafwise
def _plus(length: jax.Array, unscale: jax.Array, g: jax.Array, v: jax.Array) -> jax.Array:
    return g + v.astype(g.dtype) * length.astype(g.dtype) * unscale.astype(g.dtype)
