"""The wrapper: an ascent stage, the one call of ``grad_fn`` at the perturbed weights, the descent stages."""

import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from saner_jax._checks import brief, check_floating, check_state, check_tree, same_structure
from saner_jax._leaves import PyTree, cast_like, distance, select_leaves, varying_axes, widen
from saner_jax._monitor import Monitored, find_monitored, observe_gradients
from saner_jax._reuse import OrthogonalPart, estimate, no_part, orthogonal_part

AxisName = Hashable | tuple[Hashable, ...]


class SharpnessAwareState(NamedTuple):
    """State of :func:`sharpness_aware` and of every alias."""

    ascent: optax.OptState
    """State of the ascent stage."""
    descent: tuple[optax.OptState, ...]
    """States of the descent stages, in their order, with that of :func:`observe_gradients` among them."""
    kept: OrthogonalPart | None = None
    """What updates without ``grad_fn`` take in place of a second gradient, None without ``reuse``."""

    @property
    def monitored(self) -> Monitored | None:
        """The state of the first :func:`observe_gradients` among the descent stages, None where there is none."""
        return find_monitored(self.descent)


def sharpness_aware(
    ascent: optax.GradientTransformation,
    *descent: optax.GradientTransformation,
    axis_name: AxisName | None = None,
    perturb_mask: PyTree | None = None,
    monitor: bool = False,
    perturbed_dtype: jax.typing.DTypeLike | None = None,
    reuse: bool | jax.typing.DTypeLike = False,
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

    With ``reuse`` an update may leave ``grad_fn`` out and costs one gradient. A call with ``grad_fn``, which does what
    it does without ``reuse``, keeps the direction ``v`` and the relative size ``q`` of what the perturbation added
    across ``g``; a call without it takes an estimate made of them in place of the second gradient::

        with grad_fn:      p = h - (<g, h> / ||g||^2) g,    v = p / ||p||,    q = ||p|| / ||g||
        without grad_fn:   h = g + q ||g|| v

    with global norms and products. The descent stages act on the estimate as on ``h``: SANER's mask is taken afresh.
    The ascent stage is called all the same and its perturbation dropped, so its schedules and averages see every step.
    Which steps have a second gradient is the caller's choice in Python: a loop alternates two compiled steps, and
    ``jax.lax.scan`` runs blocks of k. Before any second gradient ``q = 0``, and a call without ``grad_fn`` descends on
    ``g`` alone. One direction in all steps of a block adds up: at a large learning rate training may suffer or diverge
    where it does neither with a second gradient in every step.

    Args:
      ascent: any Optax transformation from ``g`` to ``eps``, with ascending sign; chain several with ``optax.chain``.
        Under ``axis_name`` it receives the extra argument ``mean_over_groups``, a function that averages a tree over
        the groups: what a stage keeps of its input it must average first, so that groups do not differ; those of this
        package do.
      *descent: Optax transformations that act on ``h`` in order, with ``g`` as the extra argument
        ``unperturbed_grads``. (What :func:`observe_gradients` needs beside it is there as well: ``perturbed_grads``,
        ``h`` as ``grad_fn`` returned it or as it is estimated, and, with ``grad_fn``, ``perturbation_norm``, a function
        that computes the norm.)
      axis_name: name (or tuple of names, not integers) of a mapped axis of ``jax.vmap``, ``jax.pmap`` or
        ``jax.shard_map`` whose members are groups of one batch: each perturbs along its own gradient (m-SAM), then
        ``g`` and ``h`` are averaged over the axis, and descent stages see the averages. None for one perturbation of
        the whole batch.
      perturb_mask: leaves that are perturbed, and over which an ascent stage takes its norm: pytree of bools (or a
        prefix of one), or a function of params; None for all.
      monitor: whether :func:`observe_gradients` stands before the descent stages, whose :class:`Monitored` is then
        ``state.monitored``. Elsewhere among the stages, put it there by hand.
      perturbed_dtype: dtype of the params that ``grad_fn`` receives; None for their own. bfloat16 weights swallow most
        of a small ``eps``: with ``jnp.float32`` the perturbed point is exact and ``h`` is cast back to the dtype of
        ``g``.
      reuse: whether updates may leave ``grad_fn`` out; the state is then larger by one tree like params, in float32
        (float64 where params are), or in the dtype that is given here: ``jnp.bfloat16`` for half of that. It rounds
        ``v``, not its signs.

    Returns:
      An Optax transformation whose ``update`` requires ``params`` and, without ``reuse``, the keyword ``grad_fn``.

    Raises:
      TypeError: a stage is not an Optax transformation; ``grad_fn`` is missing, or returns a pair or another dtype than
        ``g``; params are not floating-point; the state is of another method; a mask holds something other than bools;
        ``axis_name`` is an integer; ``perturbed_dtype`` is no float, or ``reuse`` neither a bool nor one.
      ValueError: params are missing or masked out by ``optax.masked``; ``grad_fn`` or a stage returns another structure
        or other shapes than ``g``; a stage, or what stands before this one in a chain, takes a second gradient itself;
        ``axis_name`` is not bound, or ``g`` was already summed over it.

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
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization <https://arxiv.org/abs/2203.02714>`_
      (LookSAM), CVPR 2022, algorithm 1, for ``reuse``.

    .. note::
      LookSAM reuses ``v`` at a fixed share of ``||g||`` (0.7 in its paper) and descends on that; here the share is the
      ``q`` that the last second gradient had, and any descent stages follow.
    """
    ascent = _stage("ascent", ascent)
    named = [(f"descent stage {i}", stage) for i, stage in enumerate(descent)]
    if monitor:
        named = [("observe_gradients", observe_gradients()), *named]
    stages = [(name, _stage(name, stage)) for name, stage in named]
    axes = _axis_names(axis_name)
    dtype = None if perturbed_dtype is None else _float_dtype("perturbed_dtype", perturbed_dtype)
    reuses = reuse is not False
    kept_dtype = _float_dtype("reuse", reuse) if reuses and reuse is not True else None

    def init_fn(params: optax.Params) -> SharpnessAwareState:
        check_floating("params", params)
        wide = widen(params)
        return SharpnessAwareState(
            ascent=_init("ascent", ascent, wide),
            descent=tuple(_init(name, stage, wide) for name, stage in stages),
            kept=no_part(params, kept_dtype) if reuses else None,
        )

    def update_fn(
        updates: optax.Updates,
        state: SharpnessAwareState,
        params: optax.Params | None = None,
        *,
        grad_fn: Callable[[optax.Params], optax.Updates] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SharpnessAwareState]:
        _check_call(updates, state, params, grad_fn, len(stages), reuses)
        _check_groups("the gradient", updates, axes)
        wide_params, group_g = widen(params), widen(updates)
        g = _mean(group_g, axes)

        # Without grad_fn as well, for its step, its averages and its schedules; jit leaves out what nothing uses.
        eps, ascent_state = _ascend(ascent, group_g, state.ascent, params, wide_params, perturb_mask, axes, extra_args)
        kept = state.kept
        if grad_fn is None:
            h = estimate(g, kept)  # type: ignore[arg-type]  # _check_call has seen that it is there.
        else:
            perturbed = _perturb(params, wide_params, eps, dtype)
            h = grad_fn(perturbed)
            _check_perturbed_gradient(h, updates, dtype)
            _check_groups("the gradient that grad_fn returns", h, axes)
            # In the dtype of g first: a bfloat16 g against a finer h would differ by g's rounding alone.
            h = _mean(widen(cast_like(h, updates)), axes)
            kept = None if kept is None else orthogonal_part(h, g, kept)

            def perturbation_norm() -> jax.Array:
                # Of the points, which are there anyway: eps itself would have to be kept until now.
                return _mean(distance(perturbed, wide_params), axes)  # type: ignore[no-any-return]

            extra_args |= {"perturbation_norm": _function(perturbation_norm)}

        extra_args |= {"unperturbed_grads": g, "perturbed_grads": h}
        corrected, states = h, []
        for (name, stage), stage_state in zip(stages, state.descent, strict=True):
            corrected, stage_state = stage.update(corrected, stage_state, wide_params, **extra_args)
            check_tree(f"what {name} returns", corrected, "the gradient", g, "floating")
            corrected = cast_like(corrected, g)
            states.append(stage_state)
        emitted = cast_like(corrected, updates)
        _remember(emitted, updates, grad_fn)
        return emitted, SharpnessAwareState(ascent_state, tuple(states), kept)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _stage(name: str, stage: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    if not isinstance(stage, optax.GradientTransformation):
        raise TypeError(f"{name} must be an Optax transformation, such as scale_to_norm(0.1), got {brief(stage)}.")
    return optax.with_extra_args_support(stage)


def _init(name: str, stage: optax.GradientTransformationExtraArgs, params: PyTree) -> optax.OptState:
    state = stage.init(params)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, SharpnessAwareState))
    if any(isinstance(node, SharpnessAwareState) for node in nodes):
        raise ValueError(
            f"{name} is or holds a method that takes a second gradient itself: give sharpness_aware, and reweight, "
            "stages such as scale_to_norm or downweight, not sam or saner."
        )
    return state


def _axis_names(axis_name: AxisName | None) -> tuple[Hashable, ...]:
    names = axis_name if isinstance(axis_name, tuple) else () if axis_name is None else (axis_name,)
    for name in names:
        # JAX takes an integer for a position, and would average over the elements of every leaf.
        if isinstance(name, int) or not isinstance(name, Hashable):
            raise TypeError(f"axis_name must be the name of a mapped axis or a tuple of names, got {brief(name)}.")
    return names


def _float_dtype(argument: str, dtype: Any) -> Any:
    try:
        resolved = jnp.dtype(bool if dtype is None else dtype)  # NumPy takes None for float64.
    except TypeError:
        resolved = jnp.dtype(bool)
    if not jnp.issubdtype(resolved, jnp.floating):
        raise TypeError(f"{argument} must be a floating-point dtype, such as 'float32', got {brief(dtype)}.")
    return resolved


def _check_call(updates: PyTree, state: Any, params: PyTree, grad_fn: Any, stages: int, reuses: bool) -> None:
    """Raise if an argument of ``update`` is missing, or none of its kind."""
    if grad_fn is None and not reuses:
        raise TypeError(
            "grad_fn is missing: call update(grads, state, params, grad_fn=grad_fn), where grad_fn maps params "
            "to the gradient of the same batch."
        )
    if grad_fn is not None and not callable(grad_fn):
        raise TypeError(f"grad_fn must be a function of params, got {type(grad_fn).__name__}.")
    if params is None:
        raise ValueError("params are missing: the gradient is taken again at perturbed params; pass them to update.")
    check_state("sharpness_aware", state, SharpnessAwareState)
    if len(state.descent) != stages:
        raise ValueError(
            f"the state is of another method: it has {len(state.descent)} descent stages where {stages} were expected; "
            "call init of this optimizer, and keep what its update returns."
        )
    if (state.kept is not None) != reuses:
        theirs, ours = ("without", "with") if reuses else ("with", "without")
        raise ValueError(
            f"the state is of a method {theirs} reuse where one {ours} it was expected; call init of this optimizer, "
            "and keep what its update returns."
        )
    check_floating("params", params)
    check_tree("the gradient", updates, "params", params, "floating")
    if _was_emitted(updates, grad_fn):
        raise ValueError(
            "sharpness_aware must stand first in a chain, and only once: it takes the raw gradient, but received what "
            "another sharpness_aware made of it."
        )


# The first leaf of the last update that the wrapper emitted, and for which grad_fn: two wrappers in one chain would
# call it twice without a word, and nothing else tells an emitted gradient from a raw one.
_last_emitted: tuple[Callable[[], Any], int] = (lambda: None, 0)


def _remember(emitted: PyTree, updates: PyTree, grad_fn: Any) -> None:
    global _last_emitted
    leaves = jax.tree.leaves(emitted)
    is_new = leaves and leaves[0] is not jax.tree.leaves(updates)[0]
    _last_emitted = (weakref.ref(leaves[0]) if is_new else lambda: None, id(grad_fn))


def _was_emitted(updates: PyTree, grad_fn: Any) -> bool:
    leaf, of = _last_emitted
    leaves = jax.tree.leaves(updates)
    return bool(leaves) and leaves[0] is leaf() and of == id(grad_fn)


def _ascend(
    ascent: optax.GradientTransformationExtraArgs,
    g: PyTree,
    state: optax.OptState,
    params: PyTree,
    wide_params: PyTree,
    perturb_mask: PyTree | None,
    axes: tuple[Hashable, ...],
    extra_args: dict[str, Any],
) -> tuple[PyTree, optax.OptState]:
    """Return the perturbation, zero on the leaves that ``perturb_mask`` leaves out."""
    if axes:
        extra_args = extra_args | {"mean_over_groups": _function(lambda tree: _mean(tree, axes))}
    if perturb_mask is None:
        eps, state = ascent.update(g, state, wide_params, **extra_args)
    else:
        selected = select_leaves("perturb_mask", perturb_mask, params)
        eps, state = ascent.update(_keep(selected, g), state, wide_params, **extra_args)
    check_tree("what the ascent stage returns", eps, "params", params, "floating")
    # Once more: a stage may make something of a zero gradient.
    return eps if perturb_mask is None else _keep(selected, eps), state


def _keep(selected: PyTree, tree: PyTree) -> PyTree:
    return jax.tree.map(lambda keep, x: x if keep else jnp.zeros_like(x), selected, tree)


def _function(function: Callable[..., Any]) -> Any:
    """Make a function an extra argument that no wrapper takes for a leaf, to be masked as one."""
    return jax.tree_util.Partial(function)  # type: ignore[no-untyped-call]


def _mean(tree: PyTree, axes: tuple[Hashable, ...]) -> PyTree:
    return jax.lax.pmean(tree, axes) if axes else tree  # type: ignore[no-untyped-call]


def _perturb(params: PyTree, wide_params: PyTree, eps: PyTree, perturbed_dtype: jnp.dtype | None) -> PyTree:
    perturbed = jax.tree.map(jnp.add, wide_params, cast_like(eps, wide_params))
    if perturbed_dtype is None:
        return cast_like(perturbed, params)
    return jax.tree.map(lambda x: x.astype(perturbed_dtype), perturbed)


def _check_groups(what: str, g: PyTree, axes: tuple[Hashable, ...]) -> None:
    """Raise unless every axis is bound and, where JAX tracks it, every leaf of ``g`` belongs to one group."""
    for axis in axes:
        try:
            index = jax.lax.axis_index(axis)
        except NameError as error:
            raise ValueError(
                f"axis_name={axis!r} is not bound here: call update inside jax.vmap, jax.pmap or jax.shard_map over an "
                "axis of that name, or leave axis_name out."
            ) from error
        # Only shard_map with its default check tracks over which axes a value varies; elsewhere the set is empty.
        if axis not in varying_axes(index):
            continue
        for leaf in jax.tree.leaves(g):
            if axis not in varying_axes(leaf):
                raise ValueError(
                    f"{what} does not vary over axis_name={axis!r}: inside jax.shard_map the gradient of replicated "
                    f"params is already summed over the axis; take it at jax.lax.pcast(params, {axis!r}, to='varying') "
                    "(jax.lax.pvary before JAX 0.8.2)."
                )


def _check_perturbed_gradient(h: Any, g: PyTree, perturbed_dtype: jnp.dtype | None) -> None:
    if isinstance(h, tuple) and len(h) == 2 and not same_structure(h, g):
        raise TypeError(
            "grad_fn returned a pair: it must return the gradient alone, with jax.grad in place of jax.value_and_grad "
            "and what else it computes kept by the closure."
        )
    what = "the gradient that grad_fn returns"
    check_tree(what, h, "the gradient given to update", g, "same" if perturbed_dtype is None else "floating")
