"""Masks of elements: the groups of the ratio ``r = h / g``, their shares of a tree, a random mask of equal density.

``g`` is the gradient at ``w``, ``h`` that at ``w + eps``. The groups are told apart by comparisons alone, since a
quotient would need a guard that flips signs near zero and a product underflows. Subnormal numbers count as zero,
because accelerators flush them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from saner_jax._leaves import PyTree


def is_turned(h: jax.Array, g: jax.Array) -> jax.Array:
    """Return where the perturbation turned the sign of the gradient.

    ::

        r = h / g < 0

    Opposite signs, both non-zero; NaN is in no group.

    Args:
      h: gradient at the perturbed weights, a floating-point array.
      g: gradient at the weights, an array of the same shape and dtype.

    Returns:
      Bools of the same shape.

    Example:
      >>> h, g = jnp.array([-1.0, 1.0, 3.0, 0.0]), jnp.array([2.0, 2.0, 2.0, 2.0])
      >>> saner_jax.is_turned(h, g).tolist()
      [True, False, False, False]

    References:
      Luong et al., `Understanding SAM's Robustness to Noisy Labels through Gradient Down-weighting
      <https://arxiv.org/abs/2411.17132>`_, 2026.
    """
    return _turned(h, g)


def is_downweighted(h: jax.Array, g: jax.Array) -> jax.Array:
    """Return where the perturbation shrank the gradient without turning it: the elements that SANER acts on.

    ::

        0 < r = h / g < 1

    ``h`` lies strictly between 0 and ``g``; NaN is in no group.

    Args:
      h: gradient at the perturbed weights, a floating-point array.
      g: gradient at the weights, an array of the same shape and dtype.

    Returns:
      Bools of the same shape.

    Example:
      >>> h, g = jnp.array([-1.0, 1.0, 3.0, 0.0]), jnp.array([2.0, 2.0, 2.0, 2.0])
      >>> saner_jax.is_downweighted(h, g).tolist()
      [False, True, False, False]

    References:
      Luong et al., `Understanding SAM's Robustness to Noisy Labels through Gradient Down-weighting
      <https://arxiv.org/abs/2411.17132>`_, 2026, figure 2 (their share).
    """
    return _between_zero_and(h, g)


def is_grown(h: jax.Array, g: jax.Array) -> jax.Array:
    """Return where the perturbation made the gradient grow.

    ::

        r = h / g > 1

    Same sign, ``|h| > |g|``, ``g`` non-zero; NaN is in no group.

    Args:
      h: gradient at the perturbed weights, a floating-point array.
      g: gradient at the weights, an array of the same shape and dtype.

    Returns:
      Bools of the same shape.

    Example:
      >>> h, g = jnp.array([-1.0, 1.0, 3.0, 0.0]), jnp.array([2.0, 2.0, 2.0, 2.0])
      >>> saner_jax.is_grown(h, g).tolist()
      [False, False, True, False]

    References:
      Luong et al., `Understanding SAM's Robustness to Noisy Labels through Gradient Down-weighting
      <https://arxiv.org/abs/2411.17132>`_, 2026.
    """
    return _between_zero_and(g, h)


def shares(where: Callable[[jax.Array, jax.Array], jax.Array], h: PyTree, g: PyTree) -> tuple[jax.Array, jax.Array]:
    """Return the share of ``where(h, g)`` in all elements, of shape (), and in each leaf, of shape (leaves,); float."""
    dtype = jnp.result_type(float)
    pairs = list(zip(jax.tree.leaves(h), jax.tree.leaves(g), strict=True))
    if not pairs:
        return jnp.zeros([], dtype), jnp.zeros([0], dtype)
    # Counted as integers: a float32 count stops at 2**24.
    counts = jnp.stack([_count(where, *pair) for pair in pairs]).astype(dtype)
    sizes = [leaf.size for leaf, _ in pairs]
    per_leaf = counts / jnp.asarray([max(size, 1) for size in sizes], dtype)
    return jnp.sum(counts) / max(sum(sizes), 1), per_leaf


def leaf_keys(key: jax.Array, tree: PyTree) -> PyTree:
    """Return a tree of the same structure with one key a leaf."""
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, list(jax.random.split(key, len(leaves))))


# One past the largest number that is drawn; it fits an int32, as which JAX takes a Python number.
_END = 1 << 30


def shuffle(key: jax.Array, mask: jax.Array) -> jax.Array:
    """Move the True of an array of bools to random places, each place as likely as any other; their count is exact.

    They go where random numbers are smallest; a sort would take many times as long on a CPU.
    """
    count = jnp.count_nonzero(mask)
    numbers = jax.random.bits(key, mask.shape, jnp.uint32) >> 2
    bound = _bound(numbers, count)
    below, at_bound = numbers < bound, numbers == bound
    # Of equal numbers at the bound, which are rare, the first ones.
    places = jnp.where(at_bound, lax.iota(jnp.uint32, mask.size).reshape(mask.shape), _END)
    shuffled = below | (places < _bound(places, count - jnp.count_nonzero(below)))
    sharding: Any = jax.typeof(mask).sharding
    if all(axis is None for axis in sharding.spec):  # The compiler sees to what is not part of the type.
        return shuffled
    return jax.sharding.reshard(shuffled, sharding)  # type: ignore[no-untyped-call,no-any-return]


def _bound(numbers: jax.Array, count: jax.Array) -> jax.Array:
    """Return a number that `count` of the numbers are below of, or the largest one that fewer are; uint32 below `_END`.

    An interpolation search: of random numbers a handful of counts is enough.
    """

    def search(state: Any) -> Any:
        low, below_low, high, below_high = state
        share = ((count - below_low).astype(jnp.float32) + 0.5) / (below_high - below_low).astype(jnp.float32)
        step = (share * (high - low).astype(jnp.float32)).astype(jnp.uint32)
        middle = low + jnp.clip(step, 1, high - low - 1)
        below = jnp.count_nonzero(numbers < middle)
        return jax.tree.map(
            lambda raised, lowered: jnp.where(below <= count, raised, lowered),
            (middle, below, high, below_high),
            (low, below_low, middle, below),
        )

    none = count * 0  # Varies over what the count varies over.
    start = (none.astype(jnp.uint32), none, none.astype(jnp.uint32) + _END, none + jnp.count_nonzero(numbers < _END))
    return lax.while_loop(lambda s: (s[1] != count) & (s[2] - s[0] > 1), search, start)[0]


# Of lax alone: an operator of jax.numpy is a traced function of its own for every shape, and a mask has seven.
def _between_zero_and(x: jax.Array, bound: jax.Array) -> jax.Array:
    tiny = jnp.finfo(x.dtype).tiny  # type: ignore[no-untyped-call]
    above = lax.bitwise_and(lax.ge(x, tiny), lax.lt(x, bound))
    below = lax.bitwise_and(lax.le(x, -tiny), lax.gt(x, bound))
    return lax.bitwise_or(above, below)


def _turned(h: jax.Array, g: jax.Array) -> jax.Array:
    tiny = jnp.finfo(h.dtype).tiny  # type: ignore[no-untyped-call]
    down = lax.bitwise_and(lax.ge(h, tiny), lax.le(g, -tiny))
    up = lax.bitwise_and(lax.le(h, -tiny), lax.ge(g, tiny))
    return lax.bitwise_or(down, up)


@functools.partial(jax.jit, static_argnums=0)
def _count(where: Callable[[jax.Array, jax.Array], jax.Array], h: jax.Array, g: jax.Array) -> jax.Array:
    return jnp.count_nonzero(where(h, g))
