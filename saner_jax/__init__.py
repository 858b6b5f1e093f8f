"""SANER and the SAM family for JAX, as composable Optax gradient transformations.

One wrapper strings two kinds of stages around a second gradient::

    g = grad L(w)  ->  ascent: eps(g)  ->  h = grad L(w + eps)  ->  descent: h corrected, reweighted  ->  next in chain

Every stage is an ordinary Optax transformation; every method below is one composition of them.
"""

# What pairs of gradients, and the mask, are made of.
from saner_jax import analysis

# Aliases: the papers' methods, each one visible composition.
from saner_jax._alias import asam, fsam, gsam, sam, saner, sgd_d, vasso

# Ascent: gradient -> perturbation.
from saner_jax._ascent import (
    FollowEmaState,
    ScaleToAdaptiveNormState,
    ScaleToNormState,
    SubtractEmaState,
    follow_ema,
    scale_to_adaptive_norm,
    scale_to_norm,
    subtract_ema,
)

# Descent: perturbed gradient -> update.
from saner_jax._descent import (
    DownweightRandomState,
    DownweightState,
    SubtractOrthogonalState,
    downweight,
    downweight_random,
    restore_downweighted,
    subtract_orthogonal,
)

# From a loss function to both gradients.
from saner_jax._gradients import value_and_grads

# Groups of elements, by their ratio of the two gradients.
from saner_jax._masks import is_downweighted, is_grown, is_turned

# Observation: a descent stage that changes nothing.
from saner_jax._monitor import Monitored, observe_gradients

# What is kept of a second gradient for the steps without one.
from saner_jax._reuse import OrthogonalPart

# Schedules of the papers.
from saner_jax._schedules import alpha_ramp, rho_from_learning_rate

# The wrapper: the one place where the gradient is taken a second time.
from saner_jax._sharpness_aware import SharpnessAwareState, sharpness_aware

__version__ = "0.1.0"

__all__ = [
    # descent
    "DownweightRandomState",
    "DownweightState",
    # ascent
    "FollowEmaState",
    "Monitored",
    "OrthogonalPart",
    "ScaleToAdaptiveNormState",
    "ScaleToNormState",
    # the wrapper, and what it is called with
    "SharpnessAwareState",
    "SubtractEmaState",
    "SubtractOrthogonalState",
    # schedules
    "alpha_ramp",
    # analysis beside training
    "analysis",
    # aliases
    "asam",
    "downweight",
    "downweight_random",
    "follow_ema",
    "fsam",
    "gsam",
    # groups of elements
    "is_downweighted",
    "is_grown",
    "is_turned",
    "observe_gradients",
    "restore_downweighted",
    "rho_from_learning_rate",
    "sam",
    "saner",
    "scale_to_adaptive_norm",
    "scale_to_norm",
    "sgd_d",
    "sharpness_aware",
    "subtract_ema",
    "subtract_orthogonal",
    "value_and_grads",
    "vasso",
]
