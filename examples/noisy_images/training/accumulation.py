"""Batches larger than memory: one micro-batch after the other, inside the compiled step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# What a pass sums over a batch, and what it returns for each sample.
Sums, OfSamples = Any, Any


def accumulate(
    f: Callable[[Any, jax.Array | None], tuple[Sums, OfSamples]], batch: Any, keys: jax.Array | None, count: int
) -> tuple[Sums, OfSamples]:
    """Return the sums of ``f`` over the micro-batches of a batch, and what it returns for each sample, in their order.

    Micro-batch k holds the samples k, k + count, k + 2 count and so on: every device cuts its own share of it from its
    own share of the batch, and what a micro-batch holds does not depend on the number of devices.

    Args:
      f: function of a micro-batch and a key.
      batch: pytree of arrays (B, ...).
      keys: one a micro-batch, or None.
      count: number of micro-batches, a divisor of B.
    """

    def add(total: Sums, part: tuple[Any, jax.Array | None]) -> tuple[Sums, OfSamples]:
        sums, of_samples = f(*part)
        return jax.tree.map(jnp.add, total, sums), of_samples

    parts = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1), batch), keys
    sums, _ = jax.eval_shape(f, *jax.tree.map(lambda x: x[0], parts))
    total, of_samples = jax.lax.scan(
        add,
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums),
        parts,
    )
    return total, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), of_samples)


def forward(
    linearise: Callable[[Any, jax.Array | None], Any], batch: Any, dropout_key: jax.Array | None, count: int
) -> tuple[jax.Array, Callable[[jax.Array], Any]]:
    """Go through the network by micro-batches; return the samples' losses, and the way back, weights -> `step.Pass`.

    Dropout has masks of its own in each micro-batch, the same in all passes. BatchNorm's statistics are averaged.

    Args:
      linearise: (micro-batch, key) -> losses, pullback, (logits, running statistics).
      batch: pytree of arrays (B, ...).
      dropout_key: key of the step's dropout masks, or None.
      count: number of micro-batches.
    """
    from .step import Pass

    keys = None if dropout_key is None else jax.random.split(dropout_key, count)

    def losses_alone(part: Any, key: jax.Array | None) -> Any:
        return (), linearise(part, key)[0]

    def backward(weights: jax.Array) -> Pass:
        def of_part(part: tuple[Any, jax.Array], key: jax.Array | None) -> Any:
            rows, weights = part
            losses, pullback, (logits, moved) = linearise(rows, key)
            return (pullback(weights.astype(losses.dtype))[0], moved), (losses, logits)

        (gradient, moved), (losses, logits) = accumulate(of_part, (batch, weights), keys, count)
        return Pass(gradient, jax.tree.map(lambda x: x / count, moved), losses, logits)

    # A pass of its own, which the compiler drops where nothing depends on the losses before the weights.
    return accumulate(losses_alone, batch, keys, count)[1], backward
