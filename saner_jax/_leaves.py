"""Leaves of parameter-like trees: the precision of their arithmetic, their norms, which of them a mask selects."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from saner_jax._checks import brief, dtype_of, name_of

PyTree = Any
_Function = TypeVar("_Function", bound=Callable[..., Any])


def leafwise(function: _Function) -> _Function:
    """Trace ``function`` of leaves once for each shape, and call it by one equation: tracing a step is per leaf."""
    return jax.jit(function)  # type: ignore[return-value]


# -- dtypes ------------------------------------------------------------------------------------------------------------


def wide_dtype(*arrays: jax.typing.ArrayLike) -> Any:
    """Return the dtype of the arithmetic on ``arrays``: float32, or float64 where one of them is."""
    is_double = any(dtype_of(array) == jnp.float64 for array in arrays)
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)


def widen(tree: PyTree) -> PyTree:
    """Cast every leaf to its ``wide_dtype``; float32 and float64 leaves are passed on untouched."""
    return jax.tree.map(lambda x: _as_dtype(x, wide_dtype(x)), tree)


def cast_like(tree: PyTree, reference: PyTree) -> PyTree:
    """Cast every leaf of ``tree`` to the dtype of the same leaf of ``reference``."""
    return jax.tree.map(lambda x, r: _as_dtype(x, dtype_of(r)), tree, reference)


def zeros_like(params: PyTree, dtype: jnp.dtype | None = None) -> PyTree:
    """Return zeros in a dtype, or in the ``wide_dtype`` of every leaf, placed as it is."""
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype or wide_dtype(p)), params)


def zero_of(params: PyTree) -> jax.Array:
    """Return a zero in the ``wide_dtype`` of all leaves, placed, and varying over mapped axes, as their norm will."""
    zeros = [jnp.sum(x) for x in jax.tree.leaves(zeros_like(params))]
    return _total(zeros)


def _as_dtype(x: Any, dtype: jnp.dtype) -> jax.Array:
    if isinstance(x, jax.Array) and x.dtype == dtype and not x.weak_type:
        return x
    return jnp.asarray(x, dtype)


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Return the mapped axes over which JAX knows ``x`` to vary (the attribute was renamed by JAX 0.10)."""
    aval: Any = jax.typeof(x)
    return frozenset(aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying)


def vary_like(x: jax.Array, reference: jax.Array) -> jax.Array:
    """Let ``x`` vary over the mapped axes over which ``reference`` does: a carry of ``lax.scan`` must not change."""
    axes = tuple(varying_axes(reference) - varying_axes(x))
    if not axes:
        return x
    lax: Any = jax.lax
    return lax.pcast(x, axes, to="varying") if hasattr(lax, "pcast") else lax.pvary(x, axes)  # type: ignore[no-any-return]


# -- norms and products ------------------------------------------------------------------------------------------------
#
# No two passes scale one tree by one number: what they shared, XLA would keep as a tree of its own on CPUs.


def unit_scale(tree: PyTree) -> jax.Array:
    """Return the power of two that brings the largest entry of ``tree`` to between 1 and 2, where that is possible.

    Squares of entries scaled by it neither overflow nor all vanish, and a power of two rounds nothing. It is a constant
    for differentiation: what it scales is divided by it again.
    """
    leaves = jax.tree.leaves(tree)
    dtype = wide_dtype(*leaves)
    largest = functools.reduce(jax.lax.max, [_as_dtype(_largest(x), dtype) for x in leaves], jnp.zeros([], dtype))
    scale = _reciprocal_power_of_two(jax.lax.stop_gradient(largest))
    if dtype == jnp.float64 and any(x.dtype != dtype for x in leaves):
        scale = jnp.clip(scale, 2.0**-126, 2.0**126)  # What the float32 leaves can be scaled by.
    return scale


def scaled_norm(tree: PyTree, scale: jax.Array) -> jax.Array:
    """Return ``||scale * tree||``, the L2 norm over all leaves; its derivative at 0 is 0."""
    return _root(_total([_scaled_square(x, scale) for x in jax.tree.leaves(tree)]))


def scale_to(tree: PyTree, scale: jax.Array, factor: jax.Array) -> PyTree:
    """Return ``scale * tree * factor``, in the dtypes of the leaves; the product of the two may leave them."""
    scale, factor = scale * 2, factor / 2
    return jax.tree.map(lambda x: _times(x, scale, factor), tree)


def scaled_product(tree: PyTree, other: PyTree, scale: jax.Array) -> jax.Array:
    """Return ``<tree, scale * other>``, the sum over all leaves of the products of their elements."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return _total([_scaled_product(x, y, scale) for x, y in pairs])


def projection(tree: PyTree, onto: PyTree) -> jax.Array:
    """Return ``<tree, onto> / ||onto||^2``, what ``onto`` is multiplied by in the part of ``tree`` along it; or 0."""
    scale = unit_scale(onto)
    return divide(scaled_product(onto, tree, scale), scaled_norm(onto, scale) ** 2) * scale


def divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return ``a / b`` in the wider of their dtypes; 0 where b is zero, NaN where b is NaN."""
    dtype = wide_dtype(a, b)
    a, b = a.astype(dtype), b.astype(dtype)
    is_zero = b == 0
    return jnp.where(is_zero, 0, a / jnp.where(is_zero, 1, b))


def cosine_and_norms(a: PyTree, b: PyTree) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the cosine of two trees, within [-1, 1] and 0 where either is zero, and their L2 norms.

    For observation: nothing is scaled, so a norm beyond the root of what the dtype holds is infinite, or 0.
    """
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    product, a_squared, b_squared = _total([_products(x, y) for x, y in pairs], length=3)
    a_norm, b_norm = _root(a_squared), _root(b_squared)
    return jnp.clip(divide(product, a_norm * b_norm), -1, 1), a_norm, b_norm


def distance(tree: PyTree, other: PyTree) -> jax.Array:
    """Return the L2 norm of the difference of two trees, with no scaling either."""
    return _root(_total(jax.tree.leaves(jax.tree.map(_squared_difference, tree, other))))


def _total(sums: Sequence[jax.Array], length: int | None = None) -> jax.Array:
    """Add up the scalars of all leaves, or their vectors of ``length``, in the widest of their dtypes."""
    dtype = wide_dtype(*sums)
    start = jnp.zeros([] if length is None else [length], dtype)
    return functools.reduce(jax.lax.add, [_as_dtype(x, dtype) for x in sums], start)


def _root(x: jax.Array) -> jax.Array:
    is_zero = x == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, x)))


def _reciprocal_power_of_two(x: jax.Array) -> jax.Array:
    """Return ``2**-k`` of an ``x >= 0`` in [2**k, 2**(k + 1)) by its exponent's bits; at most half the largest."""
    info: Any = jnp.finfo(x.dtype)  # type: ignore[no-untyped-call]
    bias, bits = -int(info.minexp) + 1, jnp.int32 if info.bits == 32 else jnp.int64
    exponent = jax.lax.bitcast_convert_type(x, bits) >> int(info.nmant)
    return jax.lax.bitcast_convert_type(jnp.clip(2 * bias - exponent, 1, 2 * bias - 1) << int(info.nmant), x.dtype)


@leafwise
def _largest(x: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(x), initial=0)


@leafwise
def _scaled_square(x: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(x * scale.astype(x.dtype)))


# Not vdot: it flattens every leaf, for which XLA gathers a sharded one whole on every device, and accelerators may
# compute it in the lower precision of their matrix products.
@leafwise
def _scaled_product(x: jax.Array, y: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.sum(x * (scale.astype(y.dtype) * y))


@leafwise
def _products(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.stack([jnp.sum(x * y), jnp.sum(jnp.square(x)), jnp.sum(jnp.square(y))])


@leafwise
def _squared_difference(x: jax.Array, y: jax.Array) -> jax.Array:
    dtype = wide_dtype(x, y)
    return jnp.sum(jnp.square(x.astype(dtype) - y.astype(dtype)))


@leafwise
def _times(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return x * a.astype(x.dtype) * b.astype(x.dtype)


# -- which leaves ------------------------------------------------------------------------------------------------------


def cut_like(tree: PyTree, seen: PyTree) -> PyTree:
    """Mask out of ``tree`` what ``optax.masked`` or ``optax.partition`` masked out of ``seen``."""
    return jax.tree.map(lambda s, x: s if _is_masked(s) else x, seen, tree, is_leaf=_is_masked)


def only_selected(selected: PyTree, tree: PyTree) -> PyTree:
    """Mask out of ``tree`` the leaves that are not ``selected``."""
    return jax.tree.map(lambda keep, x: x if keep else optax.MaskedNode(), selected, tree)


def put_back(tree: PyTree, whole: PyTree) -> PyTree:
    """Fill what was masked out of ``tree`` with what ``whole`` holds there."""
    return jax.tree.map(lambda x, w: w if _is_masked(x) else x, tree, whole, is_leaf=_is_masked)


def select_leaves(argument: str, mask: PyTree, params: PyTree) -> PyTree:
    """Expand ``mask`` (bools at the leaves of a prefix of ``params``, or a function of params) to one bool a leaf."""
    if _is_function(mask):
        if params is None:
            raise ValueError(f"{argument} is a function of params, but update was called without params; pass them.")
        mask = mask(params)
    bools: dict[Any, Any] = dict(jax.tree_util.tree_leaves_with_path(mask))
    for path, leaf in bools.items():
        if not isinstance(leaf, (bool, np.bool_)):
            raise TypeError(
                f"{argument} must hold Python bools, got {brief(leaf)} at {name_of(path)}; "
                "which leaves take part is decided when the step is traced."
            )
    nodes, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_masked)
    whole = f"{argument} must have the structure of params, or a prefix of it"
    used: set[Any] = set()
    selected: list[Any] = []
    for path, node in nodes:
        above = [path[:depth] for depth in range(len(path) + 1) if path[:depth] in bools]
        if _is_masked(node):  # Of a masked stage, whose mask may be one of all leaves.
            used.update(above, [other for other in bools if other[: len(path)] == path])
            selected.append(node)
        elif above:
            used.add(above[0])
            selected.append(bool(bools[above[0]]))
        else:
            raise ValueError(f"{whole}, but says nothing of {name_of(path)}.")
    for path in bools:
        if path not in used and nodes:
            raise ValueError(f"{whole}, but has {name_of(path)}, where params have no leaf.")
    return jax.tree.unflatten(treedef, selected)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _is_function(mask: PyTree) -> bool:
    """Tell a function of params from a tree of bools that can be called as well, as a model is."""
    if not callable(mask) or isinstance(mask, jax.tree_util.Partial):
        return callable(mask)
    leaves = jax.tree.leaves(mask)
    return not leaves or (len(leaves) == 1 and leaves[0] is mask)
