"""The wrapper: an ascent stage, the one call of ``grad_fn`` at the perturbed weights, the descent stages."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from saner_jax._descent import Reweighting
from saner_jax._leaves import (
    PyTree,
    cast_like,
    check_floating,
    check_same_tree,
    cosine,
    inner_product,
    select_leaves,
    widen,
)
from saner_jax._masks import is_downweighted, shares

AxisName = str | tuple[str, ...]


class Monitored(NamedTuple):
    """What only the optimizer sees, from the last step (zeros before the first); float arrays."""

    downweighted_share: jax.Array
    """Share of all elements with ``0 < h / g < 1``, of shape ()."""
    downweighted_share_per_leaf: jax.Array
    """The same share in each leaf, in the order of ``jax.tree.leaves(params)``, of shape (number of leaves,)."""
    cosine: jax.Array
    """Cosine of ``g`` and ``h``, of shape (); 0 where either is zero."""
    gradient_norm: jax.Array
    """L2 norm of ``g``, of shape ()."""
    perturbed_gradient_norm: jax.Array
    """L2 norm of ``h`` as it came from ``grad_fn``, of shape ()."""
    perturbation_norm: jax.Array
    """L2 norm of ``eps``, of shape (); under ``axis_name`` its mean over the groups."""


class SharpnessAwareState(NamedTuple):
    """State of :func:`sharpness_aware` and of every alias."""

    ascent: optax.OptState
    """State of the ascent stage."""
    descent: tuple[optax.OptState, ...]
    """States of the descent stages, in their order."""
    monitored: Monitored | None
    """The monitored scalars, or None where they were not asked for."""


def sharpness_aware(
    ascent: optax.GradientTransformation,
    *descent: optax.GradientTransformation,
    axis_name: AxisName | None = None,
    perturb_mask: PyTree | None = None,
    monitor: bool = False,
    perturbed_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """String ascent and descent stages around a second gradient, taken at perturbed weights.

    ::

        g (given)  ->  eps = ascent(g)  ->  h = grad_fn(w + eps)  ->  descent stages on h  ->  update

    The transformation stands first in a chain: it takes the raw gradient and emits a gradient of positive sign, which
    clipping, weight decay, momentum and the learning rate may follow. Its update is called as
    ``tx.update(grads, state, params, grad_fn=grad_fn)``, where ``grad_fn`` maps params to the gradient of the same
    batch (same augmentation, same dropout key) and is called exactly once, in the caller's own trace. Other keyword
    arguments are passed on to the stages.

    Norms, perturbations, averages and comparisons are computed in float32, or in float64 where the gradients are; the
    update leaves in the dtype of the gradient it came with. ``grad_fn`` receives params in their own dtypes.

    Args:
      ascent: any Optax transformation from ``g`` to ``eps``, with ascending sign; chain several with ``optax.chain``.
        A stage with a state must form it from the extra argument ``averaged_grads``, the gradient averaged over
        ``axis_name``, so that groups do not differ; those of this package do.
      *descent: Optax transformations that act on ``h`` in order, with ``g`` as the extra argument
        ``unperturbed_grads``.
      axis_name: name (or names) of a mapped axis of ``jax.vmap``, ``jax.pmap`` or ``jax.shard_map`` whose members are
        groups of one batch: each perturbs along its own gradient (m-SAM), then ``g`` and ``h`` are averaged over the
        axis, and descent stages see the averages. None for one perturbation of the whole batch.
      perturb_mask: leaves that are perturbed, and over which an ascent stage takes its norm: pytree of bools (or a
        prefix of one), or a function of params; None for all.
      monitor: whether the state carries :class:`Monitored` from the last step. The share of down-weighted elements is
        taken on what enters the reweighting stage, or on the final gradient where there is none.
      perturbed_dtype: dtype of the params that ``grad_fn`` receives; None for their own. bfloat16 weights swallow most
        of a small ``eps``: with ``jnp.float32`` the perturbed point is exact and ``h`` is cast back to the dtype of
        ``g``.

    Returns:
      An Optax transformation whose ``update`` requires ``params`` and the keyword ``grad_fn``.

    Raises:
      TypeError: a stage is not an Optax transformation; ``grad_fn`` is missing, or returns a pair or another dtype than
        ``g``; params are not floating-point; a mask holds something other than bools.
      ValueError: params are missing or masked out by ``optax.masked``; ``grad_fn`` returns another structure or other
        shapes than ``g``; ``axis_name`` is not bound, or ``g`` was already summed over it.

    Example:
      >>> tx = optax.chain(
      ...     saner_jax.sharpness_aware(saner_jax.scale_to_norm(0.1), saner_jax.downweight(0.5)),  # SANER
      ...     optax.sgd(0.5),
      ... )
      >>> params = jnp.array([1.0, -2.0])
      >>> state = tx.init(params)
      >>> grad_fn = jax.grad(lambda w: jnp.sum(w**2))
      >>> updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
      >>> params = optax.apply_updates(params, updates)

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving Generalization
      <https://arxiv.org/abs/2010.01412>`_, 2021, equation 3 and, for m-SAM, section 4.1.
    """
    ascent = _stage("ascent", ascent)
    descent = tuple(_stage(f"descent stage {i}", stage) for i, stage in enumerate(descent))

    def init_fn(params: optax.Params) -> SharpnessAwareState:
        check_floating("params", params)
        wide = widen(params)
        return SharpnessAwareState(
            ascent=ascent.init(wide),
            descent=tuple(stage.init(wide) for stage in descent),
            monitored=_nothing_monitored(params) if monitor else None,
        )

    def update_fn(
        updates: optax.Updates,
        state: SharpnessAwareState,
        params: optax.Params | None = None,
        *,
        grad_fn: Callable[[optax.Params], optax.Updates] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SharpnessAwareState]:
        if grad_fn is None:
            raise TypeError(
                "grad_fn is missing: call update(grads, state, params, grad_fn=grad_fn), where grad_fn maps params "
                "to the gradient of the same batch."
            )
        if not callable(grad_fn):
            raise TypeError(f"grad_fn must be a function of params, got {type(grad_fn).__name__}.")
        if params is None:
            raise ValueError(
                "params are missing: the gradient is taken again at perturbed params; pass them to update."
            )
        check_floating("params", params)
        check_floating("the gradient", updates)
        check_same_tree("the gradient", updates, "params", params, dtypes=False)
        if axis_name is not None:
            _check_groups("the gradient", updates, axis_name)

        wide_params = widen(params)
        group_g = widen(updates)
        g = _mean(group_g, axis_name)

        perturbed_leaves = select_leaves("perturb_mask", True if perturb_mask is None else perturb_mask, params)
        eps, ascent_state = ascent.update(
            _keep(perturbed_leaves, group_g),
            state.ascent,
            wide_params,
            **(extra_args | {"averaged_grads": _keep(perturbed_leaves, g)}),
        )
        check_same_tree("the perturbation of the ascent stage", eps, "params", params, dtypes=False)
        # Once more: a stage may make something of a zero gradient.
        eps = _keep(perturbed_leaves, eps)

        h = grad_fn(_perturb(params, wide_params, eps, perturbed_dtype))
        _check_perturbed_gradient(h, updates, perturbed_dtype)
        if axis_name is not None:
            _check_groups("the gradient that grad_fn returns", h, axis_name)
        # In the dtype of g first: a bfloat16 g against a finer h would differ by g's rounding alone.
        h = _mean(widen(cast_like(h, updates)), axis_name)

        corrected = h
        enters_reweighting = None
        descent_states = []
        for stage, stage_state in zip(descent, state.descent, strict=True):
            if isinstance(stage, Reweighting):
                enters_reweighting = corrected
            corrected, stage_state = stage.update(
                corrected, stage_state, wide_params, **(extra_args | {"unperturbed_grads": g})
            )
            descent_states.append(stage_state)

        monitored = None
        if monitor:
            compared = corrected if enters_reweighting is None else enters_reweighting
            monitored = _monitor(g, h, _mean(optax.tree.norm(eps), axis_name), compared)
        return cast_like(corrected, updates), SharpnessAwareState(ascent_state, tuple(descent_states), monitored)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _stage(name: str, stage: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    if not isinstance(stage, optax.GradientTransformation):
        raise TypeError(f"{name} must be an Optax transformation, such as scale_to_norm(0.1), got {stage!r}.")
    return optax.with_extra_args_support(stage)


def _keep(selected: PyTree, tree: PyTree) -> PyTree:
    return jax.tree.map(lambda keep, x: x if keep else jnp.zeros_like(x), selected, tree)


def _mean(tree: PyTree, axis_name: AxisName | None) -> PyTree:
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)  # type: ignore[no-untyped-call]


def _perturb(params: PyTree, wide_params: PyTree, eps: PyTree, perturbed_dtype: jax.typing.DTypeLike | None) -> PyTree:
    perturbed = jax.tree.map(jnp.add, wide_params, eps)
    if perturbed_dtype is None:
        return cast_like(perturbed, params)
    return jax.tree.map(lambda x: x.astype(perturbed_dtype), perturbed)


def _check_groups(what: str, g: PyTree, axis_name: AxisName) -> None:
    """Raise unless ``axis_name`` is bound and, where JAX tracks it, every leaf of ``g`` belongs to one group."""
    for axis in (axis_name,) if isinstance(axis_name, str) else axis_name:
        try:
            index = jax.lax.axis_index(axis)
        except NameError as error:
            raise ValueError(
                f"axis_name={axis!r} is not bound here: call update inside jax.vmap, jax.pmap or jax.shard_map over an "
                "axis of that name, or leave axis_name out."
            ) from error
        # Only shard_map with its default check tracks over which axes a value varies; elsewhere the set is empty.
        if axis not in _varying_axes(index):
            continue
        for leaf in jax.tree.leaves(g):
            if axis not in _varying_axes(leaf):
                raise ValueError(
                    f"{what} does not vary over axis_name={axis!r}: inside jax.shard_map the gradient of replicated "
                    f"params is already summed over the axis; take it at jax.lax.pcast(params, {axis!r}, to='varying') "
                    "(jax.lax.pvary before JAX 0.8.2)."
                )


def _varying_axes(x: jax.Array) -> frozenset[str]:
    """Return the mapped axes over which JAX knows ``x`` to vary (the attribute was renamed by JAX 0.10)."""
    aval: Any = jax.typeof(x)
    return frozenset(aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying)


def _check_perturbed_gradient(h: Any, g: PyTree, perturbed_dtype: jax.typing.DTypeLike | None) -> None:
    what = "the gradient that grad_fn returns"
    got: Any = jax.tree.structure(h)
    if isinstance(h, tuple) and len(h) == 2 and got != jax.tree.structure(g):
        raise TypeError(
            "grad_fn returned a pair: it must return the gradient alone, with jax.grad in place of jax.value_and_grad "
            "and what else it computes kept by the closure."
        )
    check_same_tree(what, h, "the gradient given to update", g, dtypes=perturbed_dtype is None)
    if perturbed_dtype is not None:
        check_floating(what, h)


def _nothing_monitored(params: optax.Params) -> Monitored:
    zero = jnp.zeros([], jnp.result_type(float))
    per_leaf = jnp.zeros([len(jax.tree.leaves(params))], zero.dtype)
    # One array each: a donated state must not hold the same buffer twice.
    return Monitored(zero, per_leaf, *(jnp.zeros_like(zero) for _ in range(4)))


def _monitor(g: PyTree, h: PyTree, perturbation_norm: jax.Array, compared: PyTree) -> Monitored:
    dtype = jnp.result_type(float)
    share, share_per_leaf = shares(jax.tree.map(is_downweighted, compared, g))
    g_norm, h_norm = optax.tree.norm(g), optax.tree.norm(h)
    scalars = (cosine(inner_product(g, h), g_norm, h_norm), g_norm, h_norm, perturbation_norm)
    return Monitored(share, share_per_leaf, *(jnp.asarray(x, dtype) for x in scalars))
