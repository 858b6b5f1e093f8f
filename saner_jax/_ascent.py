"""Ascent stages: gradient -> perturbation.

Each is an Optax transformation whose update is the perturbation ``eps``, with ascending sign: ``w + eps`` raises the
loss. Inside :func:`saner_jax.sharpness_aware` a stage receives the gradient in float32 (float64 where the gradient is),
and under ``axis_name`` the extra argument ``mean_over_groups``, a function that averages a tree over the groups. What a
stage keeps of its input it averages so first: groups must not differ in their state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from saner_jax._checks import check_state
from saner_jax._hyperparameters import Hyperparameter, check_hyperparameter, value_at
from saner_jax._leaves import PyTree, divide, scale_to, scaled_norm, select_leaves, unit_scale, widen, zeros_like


class ScaleToNormState(NamedTuple):
    """State of :func:`scale_to_norm`."""

    step: jax.Array
    """Steps taken, int32 ()."""
    rho: jax.Array
    """Radius of the last step (of the first one before any), float ()."""


def scale_to_norm(rho: Hyperparameter) -> optax.GradientTransformationExtraArgs:
    """Scale the gradient to the norm rho: SAM's perturbation.

    ::

        eps = rho * g / ||g||

    with the global L2 norm over all leaves, accumulated in float32 and right for every finite gradient, also where its
    square would overflow or underflow. A zero gradient gives ``eps = 0`` (subnormal numbers count as zero); a
    non-finite gradient gives a non-finite ``eps``. Where the norm or rho is zero, derivatives are zero or those of the
    formula, never NaN.

    Args:
      rho: radius of the perturbation in the unit of the weights (SANER's paper: 0.1; SAM's: 0.05); a number, a schedule
        or a traced value.

    Returns:
      An ascent stage, to be given to :func:`sharpness_aware` or chained after another one.

    Raises:
      ValueError: rho is a negative Python number.

    Example:
      >>> stage = saner_jax.scale_to_norm(0.1)
      >>> g = {"w": jnp.array([3.0, 4.0])}
      >>> eps, _ = stage.update(g, stage.init(g))
      >>> eps["w"].tolist()
      [0.06, 0.08]

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving Generalization
      <https://arxiv.org/abs/2010.01412>`_, 2021, equation 2.

    .. note::
      The official code divides by ``||g|| + 1e-12``; here the guard is exact, so ``||eps||`` is rho for every gradient
      but zero. The price is one more reduction, for the largest entry.
    """
    check_hyperparameter("rho", rho, "[0, inf)")

    def init_fn(params: optax.Params) -> ScaleToNormState:
        del params
        step = jnp.zeros([], jnp.int32)
        return ScaleToNormState(step, value_at("rho", rho, step))

    def update_fn(
        updates: optax.Updates, state: ScaleToNormState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, ScaleToNormState]:
        del params, extra_args
        check_state("scale_to_norm", state, ScaleToNormState)
        g = widen(updates)
        rho_now = _radius(rho, state.step)
        scale = unit_scale(g)
        eps = scale_to(g, scale, divide(rho_now, scaled_norm(g, scale)))
        return eps, ScaleToNormState(optax.safe_increment(state.step), rho_now)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class ScaleToAdaptiveNormState(NamedTuple):
    """State of :func:`scale_to_adaptive_norm`."""

    step: jax.Array
    """Steps taken, int32 ()."""
    rho: jax.Array
    """Radius of the last step (of the first one before any), float ()."""
    eta: jax.Array
    """Offset of the last step (of the first one before any), float ()."""


def scale_to_adaptive_norm(
    rho: Hyperparameter, eta: Hyperparameter = 0.01, *, adaptive_mask: PyTree | None = None
) -> optax.GradientTransformationExtraArgs:
    """Scale the gradient to a radius measured relative to the weights: ASAM's perturbation.

    ::

        eps = rho * T^2 g / ||T g||,    T = |w| + eta on the leaves of adaptive_mask, 1 on the others

    element by element, with the global L2 norm. With ``T = 1`` everywhere this is :func:`scale_to_norm`; with ``eta =
    0`` the relative perturbation ``eps / w`` does not change when weights are rescaled.

    Args:
      rho: radius, dimensionless where ``T = |w|`` (ASAM's paper: 0.5 for CIFAR-10, 1.0 for CIFAR-100); a number, a
        schedule or a traced value.
      eta: offset that lets weights near zero move, in the unit of the weights (ASAM's paper: 0.01); likewise.
      adaptive_mask: pytree of bools (or a prefix of one), or a function of params that returns it; None for all leaves.

    Returns:
      An ascent stage; its update needs params.

    Raises:
      ValueError: rho or eta is a negative Python number; update is called without params; the mask has another
        structure than params.
      TypeError: the mask holds something other than bools.

    Example:
      >>> stage = saner_jax.scale_to_adaptive_norm(0.5, eta=0.0)
      >>> w = {"w": jnp.array([3.0, 4.0])}
      >>> g = {"w": jnp.array([1.0, 1.0])}
      >>> eps, _ = stage.update(g, stage.init(w), w)
      >>> eps["w"].tolist()
      [0.9, 1.6]

    References:
      Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks
      <https://arxiv.org/abs/2102.11600>`_, 2021, algorithm 1.

    .. note::
      ASAM's official code takes ``T = 1`` on biases (an ``adaptive_mask`` that is False there) and adds 1e-16 to the
      norm. SANER's code takes ``T = |w|`` on every parameter: ``eta=0`` and no mask.
    """
    check_hyperparameter("rho", rho, "[0, inf)")
    check_hyperparameter("eta", eta, "[0, inf)")

    def init_fn(params: optax.Params) -> ScaleToAdaptiveNormState:
        del params
        step = jnp.zeros([], jnp.int32)
        return ScaleToAdaptiveNormState(step, value_at("rho", rho, step), value_at("eta", eta, step))

    def update_fn(
        updates: optax.Updates, state: ScaleToAdaptiveNormState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, ScaleToAdaptiveNormState]:
        del extra_args
        check_state("scale_to_adaptive_norm", state, ScaleToAdaptiveNormState)
        if params is None:
            raise ValueError("scale_to_adaptive_norm measures the radius by the weights: pass params to update.")
        g = widen(updates)
        adaptive = select_leaves("adaptive_mask", True if adaptive_mask is None else adaptive_mask, params)
        rho_now = _radius(rho, state.step)
        eta_now = value_at("eta", eta, state.step)

        def times_t(x: jax.Array, w: jax.Array, is_adaptive: bool) -> jax.Array:
            return x * (jnp.abs(w).astype(x.dtype) + eta_now.astype(x.dtype)) if is_adaptive else x

        tg = jax.tree.map(times_t, g, params, adaptive)
        scale = unit_scale(tg)
        eps = scale_to(tg, scale, divide(rho_now, scaled_norm(tg, scale)))
        eps = jax.tree.map(times_t, eps, params, adaptive)
        return eps, ScaleToAdaptiveNormState(optax.safe_increment(state.step), rho_now, eta_now)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class SubtractEmaState(NamedTuple):
    """State of :func:`subtract_ema`."""

    step: jax.Array
    """Steps taken, int32 ()."""
    sigma: jax.Array
    """Share of the average that the last step subtracted (the first one before any), float ()."""
    decay: jax.Array
    """Decay of the last step (of the first one before any), float ()."""
    ema: optax.Params
    """Moving average of the gradient, in float32 (float64 where params are); zeros before the first step."""


def subtract_ema(sigma: Hyperparameter = 1.0, decay: Hyperparameter = 0.9) -> optax.GradientTransformationExtraArgs:
    """Subtract the moving average of past gradients: Friendly SAM's direction.

    What is left is the part of the gradient that is particular to this mini-batch::

        d_t = g_t - sigma * m_{t-1}            (d_0 = g_0: nothing to subtract yet)
        m_t = decay * m_{t-1} + (1 - decay) * g_t        (m_0 = g_0)

    ``sigma = 0`` passes the gradient on unchanged. Under ``axis_name`` every group subtracts the same average, which is
    updated with the gradient averaged over the groups. Behind another stage, ``g_t`` is what that stage makes of the
    gradient.

    Args:
      sigma: share of the average that is subtracted, dimensionless (FSAM's paper: 1); a number, a schedule or a traced
        value.
      decay: weight of the past in the average, in [0, 1) (FSAM's code: 0.9); likewise.

    Returns:
      An ascent stage, to be chained before :func:`scale_to_norm` or :func:`scale_to_adaptive_norm`.

    Raises:
      ValueError: decay is a Python number outside [0, 1).

    Example:
      >>> ascent = optax.chain(saner_jax.subtract_ema(), saner_jax.scale_to_norm(0.1))
      >>> tx = saner_jax.sharpness_aware(ascent)  # FSAM

    References:
      Li et al., `Friendly Sharpness-Aware Minimization <https://arxiv.org/abs/2403.12350>`_, 2024, algorithm 1.

    .. note::
      The average starts at the first gradient, as in the released code, rather than at zero with a bias correction.
    """
    check_hyperparameter("sigma", sigma)
    check_hyperparameter("decay", decay, "[0, 1)")

    def init_fn(params: optax.Params) -> SubtractEmaState:
        step = jnp.zeros([], jnp.int32)
        return SubtractEmaState(
            step, value_at("sigma", sigma, step), value_at("decay", decay, step), zeros_like(params)
        )

    def update_fn(
        updates: optax.Updates,
        state: SubtractEmaState,
        params: optax.Params | None = None,
        *,
        mean_over_groups: Callable[[optax.Updates], optax.Updates] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SubtractEmaState]:
        del params, extra_args
        check_state("subtract_ema", state, SubtractEmaState)
        g = widen(updates)
        sigma_now = value_at("sigma", sigma, state.step)
        decay_now = value_at("decay", decay, state.step)
        # The average is zero before the first step, so the first direction is the gradient itself.
        direction = jax.tree.map(lambda x, m: x - sigma_now.astype(x.dtype) * m.astype(x.dtype), g, state.ema)
        mean = g if mean_over_groups is None else mean_over_groups(g)
        ema = _next_average(state.step, state.ema, mean, decay_now, 1 - decay_now)
        return direction, SubtractEmaState(optax.safe_increment(state.step), sigma_now, decay_now, ema)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class FollowEmaState(NamedTuple):
    """State of :func:`follow_ema`."""

    step: jax.Array
    """Steps taken, int32 ()."""
    theta: jax.Array
    """Weight of the new gradient in the last step (in the first one before any), float ()."""
    ema: optax.Params
    """Moving average of the gradient, in float32 (float64 where params are); zeros before the first step."""


def follow_ema(theta: Hyperparameter = 0.9) -> optax.GradientTransformationExtraArgs:
    """Replace the gradient by its moving average: VaSSO's direction.

    ::

        d_t = (1 - theta) * d_{t-1} + theta * g_t        (d_0 = g_0)

    The average is updated before it is used, so ``theta = 1`` passes the gradient on unchanged. Under ``axis_name``
    every group follows its own ``d_t`` formed from the common ``d_{t-1}``; what is stored is formed from the gradient
    averaged over the groups.

    Args:
      theta: weight of the new gradient, in (0, 1] (VaSSO's code: 0.9; SANER's: 0.2); a number, a schedule or a traced
        value.

    Returns:
      An ascent stage, to be chained before :func:`scale_to_norm` or :func:`scale_to_adaptive_norm`.

    Raises:
      ValueError: theta is a Python number outside (0, 1].

    Example:
      >>> ascent = optax.chain(saner_jax.follow_ema(theta=0.2), saner_jax.scale_to_norm(0.1))
      >>> tx = saner_jax.sharpness_aware(ascent)  # VaSSO

    References:
      Li and Giannakis, `Enhancing Sharpness-Aware Optimization Through Variance Suppression
      <https://arxiv.org/abs/2309.15639>`_, 2024.
    """
    check_hyperparameter("theta", theta, "(0, 1]")

    def init_fn(params: optax.Params) -> FollowEmaState:
        step = jnp.zeros([], jnp.int32)
        return FollowEmaState(step, value_at("theta", theta, step), zeros_like(params))

    def update_fn(
        updates: optax.Updates,
        state: FollowEmaState,
        params: optax.Params | None = None,
        *,
        mean_over_groups: Callable[[optax.Updates], optax.Updates] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, FollowEmaState]:
        del params, extra_args
        check_state("follow_ema", state, FollowEmaState)
        g = widen(updates)
        theta_now = value_at("theta", theta, state.step)
        direction = ema = _next_average(state.step, state.ema, g, 1 - theta_now, theta_now)
        if mean_over_groups is not None:
            ema = _next_average(state.step, state.ema, mean_over_groups(g), 1 - theta_now, theta_now)
        return direction, FollowEmaState(optax.safe_increment(state.step), theta_now, ema)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _radius(rho: Hyperparameter, step: jax.Array) -> jax.Array:
    # A schedule that falls to 0 may end a rounding error below it under jit, which would turn the ascent round.
    # Not jnp.maximum, whose derivative at 0 is a half.
    value = value_at("rho", rho, step)
    return jnp.where(value < 0, 0, value)


def _next_average(
    step: jax.Array, average: PyTree, g: PyTree, weight_of_past: jax.Array, weight_of_new: jax.Array
) -> PyTree:
    """Average once more in the average's own dtype; the first gradient becomes the average itself."""

    def next_leaf(m: jax.Array, x: jax.Array) -> jax.Array:
        x = x.astype(m.dtype)
        return jnp.where(step == 0, x, weight_of_past.astype(m.dtype) * m + weight_of_new.astype(m.dtype) * x)

    return jax.tree.map(next_leaf, average, g)
