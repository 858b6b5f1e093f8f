"""What only the optimizer sees, held in the state of a stage that changes nothing."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from saner_jax._checks import check_state, check_tree
from saner_jax._descent import require_unperturbed
from saner_jax._leaves import PyTree, cast_like, cosine_and_norms, cut_like, vary_like, widen, zero_of
from saner_jax._masks import is_downweighted, shares


class Monitored(NamedTuple):
    """State of :func:`observe_gradients`: what it saw in the last step (zeros before the first); float arrays."""

    downweighted_share: jax.Array
    """Share of all elements with ``0 < h / g < 1``, of shape (); ``h`` as it enters this stage."""
    downweighted_share_per_leaf: jax.Array
    """The same share in each leaf, in the order of ``jax.tree.leaves(params)``, of shape (number of leaves,)."""
    cosine: jax.Array
    """Cosine of ``g`` and ``h`` as it came from ``grad_fn``, of shape (); 0 where either is zero."""
    gradient_norm: jax.Array
    """L2 norm of ``g``, of shape ()."""
    perturbed_gradient_norm: jax.Array
    """L2 norm of ``h`` as it came from ``grad_fn``, of shape ()."""
    perturbation_norm: jax.Array
    """L2 norm of the perturbation of all params as ``grad_fn`` saw it (in bfloat16 a small one is swallowed), of shape
    (); under ``axis_name`` its mean over the groups; that of the last step that had one where a step has none (an
    update without ``grad_fn``), so 0 outside :func:`sharpness_aware`."""


def observe_gradients() -> optax.GradientTransformationExtraArgs:
    """Observe the two gradients of a step and pass the second one on unchanged.

    ::

        update = h

    The state is :class:`Monitored`: the share of down-weighted elements of what enters this stage, which may stand
    anywhere among the descent stages, and norms and cosine of the gradients that the wrapper received. The keyword
    ``monitor`` of :func:`sharpness_aware` puts it first, that of an alias puts it before the reweighting;
    ``optax.tree.get(state, "downweighted_share")`` finds its scalars wherever it stands.

    Returns:
      A descent stage.

    Raises:
      ValueError: update is called without ``unperturbed_grads``.

    Example:
      >>> stage = saner_jax.observe_gradients()
      >>> g, h = {"w": jnp.array([2.0, 2.0])}, {"w": jnp.array([1.0, 3.0])}
      >>> update, seen = stage.update(h, stage.init(h), unperturbed_grads=g)
      >>> seen.downweighted_share.item()
      0.5

    References:
      Luong et al., `Understanding SAM's Robustness to Noisy Labels through Gradient Down-weighting
      <https://arxiv.org/abs/2411.17132>`_, 2026, figure 2a (the share).
    """

    def init_fn(params: optax.Params) -> Monitored:
        # From params, so that scalars are placed, and vary over mapped axes, as the norms of a step will.
        zero = zero_of(params).astype(jnp.result_type(float))
        # One array each: a donated state must not hold the same buffer twice.
        scalars = (jnp.zeros_like(zero) for _ in range(4))
        return Monitored(zero, jnp.broadcast_to(zero, (len(jax.tree.leaves(params)),)), *scalars)

    def update_fn(
        updates: optax.Updates,
        state: Monitored,
        params: optax.Params | None = None,
        *,
        unperturbed_grads: optax.Updates | None = None,
        perturbed_grads: optax.Updates | None = None,
        perturbation_norm: Callable[[], jax.Array] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Monitored]:
        del params, extra_args
        check_state("observe_gradients", state, Monitored)
        g = widen(require_unperturbed("observe_gradients", updates, unperturbed_grads))
        entering = cast_like(updates, g)
        h = entering if perturbed_grads is None else cut_like(perturbed_grads, updates)
        check_tree("perturbed_grads", h, "the gradient", updates, "floating")
        share, per_leaf = shares(is_downweighted, entering, g)
        cosine, g_norm, h_norm = cosine_and_norms(g, cast_like(h, g))
        eps_norm = state.perturbation_norm if perturbation_norm is None else perturbation_norm()
        seen = Monitored(share, per_leaf, cosine, g_norm, h_norm, eps_norm)
        return updates, jax.tree.map(_like, seen, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def find_monitored(state: PyTree) -> Monitored | None:
    """Return the first state of :func:`observe_gradients` within ``state``, None where there is none."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Monitored))
    return next((node for node in nodes if isinstance(node, Monitored)), None)


def _like(new: jax.Array, old: jax.Array) -> jax.Array:
    return vary_like(new.astype(jnp.result_type(float)), old)
