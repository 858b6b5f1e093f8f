"""Companions of every method: hard bootstrapping changes the loss of a sample, Co-teaching which samples count."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from ..config import Training

BOOTSTRAPPING_WEIGHT = 0.2


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the loss of each sample against its given label: (B, C), (B,) -> (B,)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def hard_bootstrapping(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mix the loss against the given label with that against the network's own prediction.

    ::

        0.8 * CE(y) + 0.2 * CE(argmax of the logits)

    The prediction is a constant of the gradient, and is made anew in both passes. Shapes: (B, C), (B,) -> (B,).

    References:
      Reed et al., `Training Deep Neural Networks on Noisy Labels with Bootstrapping
      <https://arxiv.org/abs/1412.6596>`_, 2015, equation 7.
    """
    predicted = jax.lax.stop_gradient(jnp.argmax(logits, axis=-1))
    own = cross_entropy(logits, predicted)
    return (1 - BOOTSTRAPPING_WEIGHT) * cross_entropy(logits, labels) + BOOTSTRAPPING_WEIGHT * own


def sample_loss(companion: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return the loss that a companion trains on."""
    return hard_bootstrapping if companion == "bootstrapping" else cross_entropy


def sample_weights(training: Training, losses: tuple[jax.Array, ...], epoch: jax.Array) -> tuple[jax.Array, ...]:
    """Return what each sample counts in each network's step, by the losses of all networks: (B,) each."""
    if training.companion == "co-teaching":
        return co_teaching_weights(losses, epoch, training.forget_rate, training.forget_ramp_epochs)
    return tuple(jnp.full([len(of_samples)], 1 / len(of_samples)) for of_samples in losses)


def co_teaching_weights(
    losses: tuple[jax.Array, ...], epoch: jax.Array, forget_rate: float, ramp_epochs: int
) -> tuple[jax.Array, jax.Array]:
    """Weigh each network's samples by the other network's choice: its ``int((1 - f) B)`` samples of smallest loss.

    ``f`` rises linearly from 0 in the first epoch to the forget rate in epoch ``ramp_epochs`` (counted from 1, the
    second at the earliest; no ramp is 0). The kept samples weigh one over their number, the others nothing, so shapes
    do not depend on ``f``.

    Args:
      losses: the two networks' losses, (B,) each.
      epoch: epoch, counted from 0, of shape ().

    References:
      Han et al., `Co-teaching: Robust Training of Deep Neural Networks with Extremely Noisy Labels
      <https://arxiv.org/abs/1804.06872>`_, 2018, algorithm 1.
    """
    progress = jnp.minimum(epoch / max(ramp_epochs - 1, 1), 1.0) if ramp_epochs else 1.0
    size = losses[0].shape[0]
    # The small addend keeps a product such as 0.8 * 5 = 3.9999999 from losing a sample; one sample is always kept.
    kept = jnp.maximum(jnp.floor((1 - forget_rate * progress) * size + 1e-3), 1)

    def chosen_by(loss: jax.Array) -> jax.Array:
        rank = jnp.argsort(jnp.argsort(loss))
        return (rank < kept) / kept

    first, second = losses
    return chosen_by(second), chosen_by(first)
