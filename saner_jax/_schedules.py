"""Schedules of the papers: step -> alpha, step -> rho."""

import numbers

import jax
import jax.numpy as jnp
import optax

from saner_jax._checks import brief
from saner_jax._hyperparameters import as_float, check_number


def alpha_ramp(
    alpha: jax.typing.ArrayLike, steps: jax.typing.ArrayLike, *, steps_per_epoch: jax.typing.ArrayLike | None = None
) -> optax.Schedule:
    """Raise alpha linearly from 0 to its final value, then hold it.

    Early in training the network has not begun to memorize and every element of the gradient is wanted; the paper
    therefore lets the down-weighting grow::

        alpha(step) = alpha * min(step / steps, 1)

    With ``steps_per_epoch`` the value moves once an epoch, as in the released code, whose epochs count from 1::

        alpha(step) = alpha * min((step // steps_per_epoch + 1) * steps_per_epoch / steps, 1)

    Args:
      alpha: final value, dimensionless (paper: 0.5); negative values are legal; a number or a traced value.
      steps: length of the ramp in optimizer steps (paper: 50 epochs of 390 steps); likewise.
      steps_per_epoch: length of a tread of the staircase in steps; None for the straight ramp.

    Returns:
      A schedule: step, counted from 0, to a scalar.

    Raises:
      ValueError: alpha is not finite; ``steps`` or ``steps_per_epoch`` is not positive.
      TypeError: one of them is not a number: a schedule has no final value to rise to.

    Example:
      >>> ramp = saner_jax.alpha_ramp(0.5, steps=50 * 390)
      >>> [float(ramp(step)) for step in (0, 25 * 390, 50 * 390, 200 * 390)]
      [0.0, 0.25, 0.5, 0.5]
      >>> staircase = saner_jax.alpha_ramp(0.5, steps=50 * 390, steps_per_epoch=390)
      >>> [round(float(staircase(step)), 4) for step in (0, 389, 390)]
      [0.01, 0.01, 0.02]

    References:
      `Understanding SAM's Robustness to Noisy Labels through Gradient Down-weighting
      <https://arxiv.org/abs/2411.17132>`_, training protocol of the experiments.
    """
    check_number("alpha", alpha)
    check_number("steps", steps, "(0, inf)")
    if steps_per_epoch is not None:
        check_number("steps_per_epoch", steps_per_epoch, "(0, inf)")

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        if steps_per_epoch is not None:
            tread = jnp.asarray(steps_per_epoch, step.dtype)
            step = (step // tread + 1) * tread
        # A quotient of int32 would be float32, also where floats are float64.
        return as_float(alpha) * jnp.minimum(as_float(step) / as_float(steps), 1)

    return schedule


def rho_from_learning_rate(
    learning_rate: optax.Schedule,
    lr_min: jax.typing.ArrayLike,
    lr_max: jax.typing.ArrayLike,
    rho_min: jax.typing.ArrayLike,
    rho_max: jax.typing.ArrayLike,
) -> optax.Schedule:
    """Let rho follow a learning-rate schedule linearly.

    ::

        rho(step) = rho_min + (rho_max - rho_min) * clip((lr(step) - lr_min) / (lr_max - lr_min), 0, 1)

    rho never leaves the interval between its two values, whatever the learning rate does (a warm-up from zero, say).

    Args:
      learning_rate: the schedule that the optimizer uses.
      lr_min: learning rate at which rho is ``rho_min``; a number or a traced value, as the following.
      lr_max: learning rate at which rho is ``rho_max``.
      rho_min: radius at ``lr_min``, in the unit of the weights (GSAM's paper: 0.01 for ResNets on ImageNet).
      rho_max: radius at ``lr_max`` (GSAM's paper: 0.04).

    Returns:
      A schedule for the ``rho`` of any method.

    Raises:
      TypeError: ``learning_rate`` is not a schedule, or another argument not a number.
      ValueError: ``lr_max`` does not exceed ``lr_min``, or a rho is negative.

    Example:
      >>> learning_rate = optax.linear_schedule(0.1, 0.0, transition_steps=100)
      >>> rho = saner_jax.rho_from_learning_rate(learning_rate, lr_min=0.0, lr_max=0.1, rho_min=0.02, rho_max=0.1)
      >>> [round(float(rho(step)), 4) for step in (0, 50, 100)]
      [0.1, 0.06, 0.02]

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, 2022, section 4.1.
    """
    if not callable(learning_rate):
        raise TypeError(
            f"learning_rate must be a schedule, got {brief(learning_rate)}; a constant needs a constant rho."
        )
    check_number("lr_min", lr_min)
    check_number("lr_max", lr_max)
    if isinstance(lr_min, numbers.Real) and isinstance(lr_max, numbers.Real) and not lr_max > lr_min:
        raise ValueError(f"lr_max must exceed lr_min, got lr_min={lr_min} and lr_max={lr_max}.")
    check_number("rho_min", rho_min, "[0, inf)")
    check_number("rho_max", rho_max, "[0, inf)")

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        lr, lowest, highest = (as_float(x) for x in (learning_rate(step), lr_min, lr_max))
        start, end = as_float(rho_min), as_float(rho_max)
        rho = start + (end - start) * jnp.clip((lr - lowest) / (highest - lowest), 0, 1)
        # Once more: rounding may leave the interval by a digit.
        return jnp.clip(rho, jnp.minimum(start, end), jnp.maximum(start, end))

    return schedule
