"""Descent stages: perturbed gradient -> update.

Each is an Optax transformation that acts on ``h``, the gradient at ``w + eps``, and receives ``g``, the gradient at
``w``, as the extra argument ``unperturbed_grads``, of which it takes the leaves that it sees: ``optax.masked`` and
``optax.partition`` may stand around it. Where the two are compared, they are compared in float32 (float64 where the
gradients are); the update leaves in the dtype of ``h``.
"""

import functools
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from saner_jax._checks import brief, check_state, check_tree
from saner_jax._hyperparameters import Hyperparameter, check_hyperparameter, value_at
from saner_jax._leaves import (
    PyTree,
    cast_like,
    cut_like,
    leafwise,
    only_selected,
    projection,
    put_back,
    select_leaves,
    widen,
)
from saner_jax._masks import is_downweighted, leaf_keys, shuffle


class SubtractOrthogonalState(NamedTuple):
    """State of :func:`subtract_orthogonal`."""

    step: jax.Array
    """Steps taken, int32 ()."""
    alpha: jax.Array
    """Share subtracted in the last step (in the first one before any), float ()."""


def subtract_orthogonal(alpha: Hyperparameter) -> optax.GradientTransformationExtraArgs:
    """Subtract the part of the unperturbed gradient that is orthogonal to the perturbed one: GSAM's descent.

    ::

        g_perp = g - (<g, h> / ||h||^2) h
        update = h - alpha * g_perp

    with global inner products. Stepping against ``-g_perp`` raises the loss at ``w`` a little without touching, to
    first order, the loss at ``w + eps``, so the gap between the two closes. ``alpha = 0`` is the identity. A zero ``h``
    leaves ``g_perp = g``. The projection is right for every finite gradient, also where ``||h||^2`` would overflow or
    underflow.

    Args:
      alpha: share of the orthogonal part, dimensionless (GSAM's code: 0.4 for CIFAR); a number, a schedule or a traced
        value.

    Returns:
      A descent stage.

    Raises:
      ValueError: update is called without ``unperturbed_grads``.

    Example:
      >>> stage = saner_jax.subtract_orthogonal(0.5)
      >>> h, g = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([2.0, 3.0])}
      >>> update, _ = stage.update(h, stage.init(h), unperturbed_grads=g)
      >>> update["w"].tolist()
      [1.0, -1.5]

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, 2022, algorithm 1.
    """
    check_hyperparameter("alpha", alpha)

    def init_fn(params: optax.Params) -> SubtractOrthogonalState:
        del params
        step = jnp.zeros([], jnp.int32)
        return SubtractOrthogonalState(step, value_at("alpha", alpha, step))

    def update_fn(
        updates: optax.Updates,
        state: SubtractOrthogonalState,
        params: optax.Params | None = None,
        *,
        unperturbed_grads: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SubtractOrthogonalState]:
        del params, extra_args
        check_state("subtract_orthogonal", state, SubtractOrthogonalState)
        h = widen(updates)
        g = cast_like(require_unperturbed("subtract_orthogonal", updates, unperturbed_grads), h)
        alpha_now = value_at("alpha", alpha, state.step)
        along = projection(g, h)

        corrected = jax.tree.map(functools.partial(_less_orthogonal, alpha_now, along), h, g)
        return cast_like(corrected, updates), SubtractOrthogonalState(optax.safe_increment(state.step), alpha_now)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class DownweightState(NamedTuple):
    """State of :func:`downweight`."""

    step: jax.Array
    """Steps taken, int32 ()."""
    alpha: jax.Array
    """Down-weighting of the last step (of the first one before any), float ()."""


def downweight(
    alpha: Hyperparameter,
    *,
    mask: PyTree | None = None,
    where: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Damp the elements that the perturbation itself shrank: SANER's descent.

    Where noisy labels dominate a direction, the perturbation amplifies the clean part of the gradient against them and
    the element shrinks. SANER shrinks it further::

        r = h / g
        update = (1 - alpha) * h  where 0 < r < 1,  h elsewhere

    The test is by comparison: same sign, ``|h| < |g|``, both non-zero; subnormal numbers count as zero. A NaN, a
    non-finite ``h``, ``r = 1`` and zeros are not masked; a finite ``h`` under an infinite ``g`` of the same sign is. A
    non-finite element of ``h`` is never turned finite. ``alpha = 0`` is the identity, ``alpha = 1`` removes the masked
    elements, and a negative alpha magnifies them (as in the paper's figure 3). ``where`` puts another group of elements
    in place of this one, as an ablation.

    Args:
      alpha: how much of a masked element is removed, dimensionless (paper: 0.5, after a ramp: :func:`alpha_ramp`); a
        number, a schedule or a traced value.
      mask: leaves that are reweighted: pytree of bools (or a prefix of one), or a function of params; None for all.
      where: elements that are reweighted: a function of the same leaf of ``h`` and ``g`` that returns bools of its
        shape, such as :func:`is_turned` or :func:`is_grown`; None for :func:`is_downweighted`.

    Returns:
      A descent stage; as ``reweight=`` of the aliases it is SANER on that method.

    Raises:
      ValueError: update is called without ``unperturbed_grads``; the mask has another structure than params; where
        returns another shape.
      TypeError: the mask holds something other than bools; where is not a function, or returns something else.

    Example:
      >>> stage = saner_jax.downweight(0.5)
      >>> g = {"w": jnp.array([2.0, 2.0, -2.0, 2.0, 0.0])}
      >>> h = {"w": jnp.array([1.0, 3.0, -1.0, -1.0, 1.0])}
      >>> update, _ = stage.update(h, stage.init(h), unperturbed_grads=g)
      >>> update["w"].tolist()
      [0.5, 3.0, -0.5, -1.0, 1.0]
      >>> stage = saner_jax.downweight(0.5, where=saner_jax.is_turned)
      >>> update, _ = stage.update(h, stage.init(h), unperturbed_grads=g)
      >>> update["w"].tolist()
      [1.0, 3.0, -1.0, -0.5, 1.0]

    References:
      Luong et al., `Understanding SAM's Robustness to Noisy Labels through Gradient Down-weighting
      <https://arxiv.org/abs/2411.17132>`_, 2026; equations 16 and 17 for the variants of SAM.

    .. note::
      The released code tests ``h / (g + 1e-8)``, whose sign is wrong near ``g = -1e-8``, and its ``alpha`` is
      ``1 - alpha`` of the paper; here alpha is the paper's.
    """
    check_hyperparameter("alpha", alpha)
    if where is not None and not callable(where):
        raise TypeError(
            f"where must be a function of h and g that returns bools, such as is_turned, got {brief(where)}."
        )

    def init_fn(params: optax.Params) -> DownweightState:
        del params
        step = jnp.zeros([], jnp.int32)
        return DownweightState(step, value_at("alpha", alpha, step))

    def update_fn(
        updates: optax.Updates,
        state: DownweightState,
        params: optax.Params | None = None,
        *,
        unperturbed_grads: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, DownweightState]:
        del extra_args
        check_state("downweight", state, DownweightState)
        alpha_now = value_at("alpha", alpha, state.step)
        g = require_unperturbed("downweight", updates, unperturbed_grads)
        updates = _replace(functools.partial(_damp, alpha_now), updates, g, params, mask, where=where)
        return updates, DownweightState(optax.safe_increment(state.step), alpha_now)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class DownweightRandomState(NamedTuple):
    """State of :func:`downweight_random`."""

    step: jax.Array
    """Steps taken, int32 ()."""
    alpha: jax.Array
    """Down-weighting of the last step (of the first one before any), float ()."""
    seed: jax.Array
    """Seed of the draws, uint32 (); with ``step`` it determines the next one."""


def downweight_random(
    alpha: Hyperparameter, *, seed: jax.typing.ArrayLike = 0, mask: PyTree | None = None
) -> optax.GradientTransformationExtraArgs:
    """Damp as many elements as :func:`downweight` does, at random places: the control for SANER's choice of elements.

    ::

        n = number of elements of the leaf with 0 < h / g < 1
        update = (1 - alpha) * h  at n random places of the leaf,  h elsewhere

    The count is exact in every leaf and at every step, so that what differs from SANER is the choice alone. Every step
    draws afresh: the key is ``fold_in(key(seed), step)``, split into one a leaf, with the stage's own step, so a run
    that goes on from its state draws what it would have drawn. ``alpha = 0`` is the identity.

    The draw costs a random number an element and several passes over these, where all other stages take one pass over
    the elements: a part of a training step on a CPU that can be felt. Every device draws the numbers of whole leaves.

    Args:
      alpha: how much of a chosen element is removed, dimensionless, as in :func:`downweight`; a number, a schedule or a
        traced value.
      seed: seed of the draws, an integer in [0, 2**32) or a traced one. ``init`` puts it into the state, and ``update``
        takes it from there.
      mask: leaves that are reweighted: pytree of bools (or a prefix of one), or a function of params; None for all.

    Returns:
      A descent stage. Under ``axis_name``, and over sharded arrays, all devices draw alike.

    Raises:
      ValueError: seed is out of range; update is called without ``unperturbed_grads``; the mask has another structure
        than params.
      TypeError: seed is not an integer; the mask holds something other than bools.

    Example:
      >>> stage = saner_jax.downweight_random(1.0)
      >>> g, h = {"w": jnp.full(8, 4.0)}, {"w": jnp.arange(1.0, 9.0)}  # the first three have 0 < r < 1
      >>> update, _ = stage.update(h, stage.init(h), unperturbed_grads=g)
      >>> jnp.sum(update["w"] == 0).item()
      3

    References:
      Luong et al., `Understanding SAM's Robustness to Noisy Labels through Gradient Down-weighting
      <https://arxiv.org/abs/2411.17132>`_, 2026, for the method; the control is not in the paper.
    """
    check_hyperparameter("alpha", alpha)
    _check_seed(seed)

    def init_fn(params: optax.Params) -> DownweightRandomState:
        del params
        step = jnp.zeros([], jnp.int32)
        return DownweightRandomState(step, value_at("alpha", alpha, step), jnp.array(seed, jnp.uint32))

    def update_fn(
        updates: optax.Updates,
        state: DownweightRandomState,
        params: optax.Params | None = None,
        *,
        unperturbed_grads: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, DownweightRandomState]:
        del extra_args
        check_state("downweight_random", state, DownweightRandomState)
        alpha_now = value_at("alpha", alpha, state.step)
        g = require_unperturbed("downweight_random", updates, unperturbed_grads)
        keys = leaf_keys(jax.random.fold_in(jax.random.key(state.seed), state.step), updates)

        updates = _replace(functools.partial(_damp_at_random, alpha_now), updates, g, params, mask, keys)
        return updates, DownweightRandomState(optax.safe_increment(state.step), alpha_now, state.seed)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def restore_downweighted(*, mask: PyTree | None = None) -> optax.GradientTransformationExtraArgs:
    """Put the unperturbed gradient back where the perturbation shrank it: the descent of SGD-D.

    ::

        update = g  where 0 < h / g < 1,  h elsewhere

    It undoes exactly the elements that :func:`downweight` acts on, by the same test: the paper's ablation, which
    memorizes noisy labels nearly as fast as SGD.

    Args:
      mask: leaves that are restored: pytree of bools (or a prefix of one), or a function of params; None for all.

    Returns:
      A descent stage without state.

    Raises:
      ValueError: update is called without ``unperturbed_grads``; the mask has another structure than params.
      TypeError: the mask holds something other than bools.

    Example:
      >>> stage = saner_jax.restore_downweighted()
      >>> g, h = {"w": jnp.array([2.0, 2.0])}, {"w": jnp.array([1.0, 3.0])}
      >>> update, _ = stage.update(h, stage.init(h), unperturbed_grads=g)
      >>> update["w"].tolist()
      [2.0, 3.0]

    References:
      Luong et al., `Understanding SAM's Robustness to Noisy Labels through Gradient Down-weighting
      <https://arxiv.org/abs/2411.17132>`_, 2026, figure 2.
    """

    def init_fn(params: optax.Params) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        *,
        unperturbed_grads: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del extra_args
        g = require_unperturbed("restore_downweighted", updates, unperturbed_grads)
        return _replace(_restore, updates, g, params, mask), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def require_unperturbed(stage: str, updates: optax.Updates, unperturbed_grads: optax.Updates | None) -> optax.Updates:
    """Return the leaves of ``unperturbed_grads`` that ``updates`` has."""
    if unperturbed_grads is None:
        raise ValueError(
            f"{stage} compares two gradients and received one: give it to sharpness_aware as a descent stage (in no "
            "wrapper that drops extra arguments), or pass unperturbed_grads to update."
        )
    g = cut_like(unperturbed_grads, updates)
    check_tree("unperturbed_grads", g, "the gradient", updates, "floating")
    return g


def _check_seed(seed: Any) -> None:
    """Raise if ``seed`` is no integer, or a Python one that 32 bits do not hold; values of arrays pass unseen."""
    if isinstance(seed, numbers.Integral) and not isinstance(seed, bool):
        if not 0 <= int(seed) < 2**32:
            raise ValueError(f"seed must be at least 0 and below 2**32, got {seed}.")
    elif not (hasattr(seed, "dtype") and jnp.issubdtype(seed.dtype, jnp.integer) and seed.shape == ()):
        raise TypeError(f"seed must be an integer, got {brief(seed)}.")


# One expression of h and g: neither a unit vector nor g_perp is kept as a tree of its own.
@leafwise
def _less_orthogonal(alpha: jax.Array, along: jax.Array, h: jax.Array, g: jax.Array) -> jax.Array:
    return h - alpha.astype(h.dtype) * (g - along.astype(h.dtype) * h)


@leafwise
def _damp(alpha: jax.Array, h: jax.Array, g: jax.Array, chosen: jax.Array | None = None) -> jax.Array:
    chosen = is_downweighted(h, g) if chosen is None else chosen
    return jnp.where(chosen, (1 - alpha).astype(h.dtype) * h, h)


@leafwise
def _damp_at_random(alpha: jax.Array, h: jax.Array, g: jax.Array, key: jax.Array) -> jax.Array:
    return _damp(alpha, h, g, shuffle(key, is_downweighted(h, g)))


@leafwise
def _restore(h: jax.Array, g: jax.Array) -> jax.Array:
    return jnp.where(is_downweighted(h, g), g, h)


def _replace(
    leaf: Callable[..., jax.Array],
    updates: PyTree,
    unperturbed_grads: PyTree,
    params: PyTree | None,
    mask: PyTree | None,
    *more: PyTree,
    where: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> PyTree:
    """Replace the leaves that ``mask`` selects by ``leaf(h, g, *more)``, to which ``where(h, g)`` is added if given."""
    h = widen(updates)
    trees = (h, cast_like(unperturbed_grads, h), *more)
    if mask is not None:
        selected = select_leaves("mask", mask, updates if params is None else params)
        trees = tuple(only_selected(selected, tree) for tree in trees)
    if where is not None:
        chosen = jax.tree.map(where, *trees[:2])
        check_tree("what where returns", chosen, "the gradient", trees[0], "bool")
        trees = (*trees, chosen)
    replaced = jax.tree.map(leaf, *trees)
    return cast_like(replaced if mask is None else put_back(replaced, h), updates)
