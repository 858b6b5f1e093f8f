"""Hyperparameters: a number, a schedule or a traced value, checked once and evaluated once a step."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from saner_jax._checks import brief, is_array

# What rho, alpha, eta, sigma, decay and theta may be: optax.ScalarOrSchedule, and NumPy's numbers and arrays. A
# schedule maps the stage's own step, counted from 0, to a value.
Hyperparameter = jax.typing.ArrayLike | Callable[[jax.Array], jax.typing.ArrayLike]

_INTERVALS = {
    "any": ("a finite number", math.isfinite),
    "[0, inf)": ("a number of at least 0", lambda x: 0 <= x < math.inf),
    "(0, inf)": ("positive and finite", lambda x: 0 < x < math.inf),
    "[0, 1)": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "(0, 1]": ("above 0 and at most 1", lambda x: 0 < x <= 1),
}


def check_hyperparameter(name: str, value: Hyperparameter, interval: str = "any") -> None:
    """Raise if ``value`` is a Python number outside ``interval``; tracers, arrays and schedules pass unseen."""
    if not callable(value):
        check_number(name, value, interval, "a number, a schedule or an array")


def check_number(name: str, value: Any, interval: str = "any", kinds: str = "a number or an array") -> None:
    """Raise if ``value`` is a Python number outside ``interval``, or no number; tracers and arrays pass unseen."""
    if isinstance(value, numbers.Real):
        description, contains = _INTERVALS[interval]
        if not contains(value):
            raise ValueError(f"{name} must be {description}, got {value}; pass such a number or a schedule.")
    elif not hasattr(value, "dtype"):
        raise TypeError(f"{name} must be {kinds}, got {brief(value)} of type {type(value).__name__}.")


def value_at(name: str, value: Hyperparameter, step: jax.Array) -> jax.Array:
    """Evaluate ``value`` at ``step`` as a new scalar array in JAX's default float dtype.

    The array is a copy: it goes into the state, and a donated state must not delete an array of the caller's.
    """
    evaluated = value(step) if callable(value) else value
    if not is_array(evaluated) or jnp.issubdtype(jnp.result_type(evaluated), jnp.complexfloating):
        raise TypeError(f"{name} must be a real number, but its schedule returned {brief(evaluated)}.")
    scalar = jnp.array(evaluated, dtype=jnp.result_type(float))
    if scalar.ndim:
        raise ValueError(f"{name} must be a scalar, got an array of shape {scalar.shape}.")
    return scalar


def as_float(value: jax.typing.ArrayLike) -> jax.Array:
    """Return ``value`` in JAX's default float dtype."""
    return jnp.asarray(value, jnp.result_type(float))
