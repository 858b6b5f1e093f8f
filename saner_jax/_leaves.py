"""Leaves of parameter-like trees: the precision of their arithmetic, which of them a mask selects, what is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

PyTree = Any


def wide_dtype(leaf: jax.typing.ArrayLike) -> jnp.dtype:
    """Return the dtype of the arithmetic on ``leaf``: float32, or float64 where the leaf is."""
    return jnp.promote_types(jnp.result_type(leaf), jnp.float32)


def widen(tree: PyTree) -> PyTree:
    """Cast every leaf to its ``wide_dtype``; float32 and float64 leaves are passed on untouched."""
    return jax.tree.map(lambda x: jnp.asarray(x, wide_dtype(x)), tree)


def cast_like(tree: PyTree, reference: PyTree) -> PyTree:
    """Cast every leaf of ``tree`` to the dtype of the same leaf of ``reference``."""
    return jax.tree.map(lambda x, r: jnp.asarray(x, jnp.result_type(r)), tree, reference)


def multiply(tree: PyTree, scalar: jax.Array) -> PyTree:
    """Multiply every leaf by ``scalar`` in the leaf's own dtype (a float64 scalar must not widen a float32 tree)."""
    return jax.tree.map(lambda x: x * scalar.astype(x.dtype), tree)


def scale_to(tree: PyTree, norm: jax.Array, target: jax.Array) -> PyTree:
    """Multiply ``tree`` by ``target / norm``; a norm of zero gives zeros, a NaN norm gives NaN everywhere."""
    is_zero = norm == 0
    scale = jnp.where(is_zero, 0, target / jnp.where(is_zero, 1, norm))
    return multiply(tree, scale)


def inner_product(tree: PyTree, other: PyTree) -> jax.Array:
    """Return the sum over all leaves of the products of their elements.

    Not ``vdot``: it flattens every leaf, for which XLA gathers a sharded one whole on every device, and accelerators
    may compute it in the lower precision of their matrix products.
    """
    product: jax.Array = optax.tree.sum(jax.tree.map(jnp.multiply, tree, other))
    return product


def cosine(dot: jax.Array, norm: jax.Array, other_norm: jax.Array) -> jax.Array:
    """Return ``dot / (norm * other_norm)`` within [-1, 1]; 0 where a norm is zero, NaN where one is NaN."""
    norms = norm * other_norm
    return jnp.clip(dot / jnp.where(norms == 0, 1, norms), -1, 1)


def select_leaves(argument: str, mask: PyTree, params: PyTree) -> PyTree:
    """Expand ``mask`` (bools at the leaves of a prefix of ``params``, or a function of params) to one bool a leaf."""
    if callable(mask):
        if params is None:
            raise ValueError(f"{argument} is a function of params, but update was called without params; pass them.")
        mask = mask(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(mask):
        if not isinstance(leaf, (bool, np.bool_)):
            raise TypeError(
                f"{argument} must hold Python bools, got {leaf!r} at {_name(path)}; "
                "which leaves take part is decided when the step is traced."
            )
    try:
        return jax.tree.map(lambda keep, subtree: jax.tree.map(lambda _: bool(keep), subtree), mask, params)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{argument} must have the structure of params, or a prefix of it, but has {jax.tree.structure(mask)} "
            f"where params have {jax.tree.structure(params)}."
        ) from error


def check_floating(what: str, tree: PyTree) -> None:
    """Raise unless every leaf is a real floating-point array and none was masked out."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode)):
        if isinstance(leaf, optax.MaskedNode):
            raise ValueError(
                f"{what} holds a MaskedNode at {_name(path)}: optax.masked and optax.partition hand grad_fn another "
                "tree than your params; use perturb_mask, or the mask of a stage, to choose leaves."
            )
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{what} must be floating-point, but the leaf {_name(path)} is {dtype}; keep such leaves out of params."
            )


def check_same_tree(what: str, tree: PyTree, other: str, reference: PyTree, dtypes: bool = True) -> None:
    """Raise unless ``tree`` has the structure, the shapes and, if asked, the dtypes of ``reference``."""
    got: Any = jax.tree.structure(tree)
    expected: Any = jax.tree.structure(reference)
    if got != expected:
        raise ValueError(f"{what} must have the structure of {other}, {expected}, but has {got}.")
    for (path, leaf), expected_leaf in zip(
        jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(reference), strict=True
    ):
        if jnp.shape(leaf) != jnp.shape(expected_leaf):
            raise ValueError(
                f"{what} must have the shapes of {other}, but the leaf {_name(path)} has shape {jnp.shape(leaf)} "
                f"where {jnp.shape(expected_leaf)} was expected."
            )
        if dtypes and jnp.result_type(leaf) != jnp.result_type(expected_leaf):
            raise TypeError(
                f"{what} must have the dtypes of {other}, but the leaf {_name(path)} is {jnp.result_type(leaf)} "
                f"where {jnp.result_type(expected_leaf)} was expected."
            )


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path) or "(the tree itself)"
