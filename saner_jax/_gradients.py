"""The gradients that a step needs, from one loss function and one batch."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from saner_jax._checks import brief

GradFn = Callable[[optax.Params], optax.Updates]


def value_and_grads(
    loss_fn: Callable[..., Any], *, has_aux: bool = False
) -> Callable[..., tuple[Any, optax.Updates, GradFn]]:
    """Create a function that evaluates a loss, its gradient, and how to take the gradient again at other params.

    ::

        value = L(w),    grads = grad L(w),    grad_fn = w' -> grad L(w')

    It reads like :func:`jax.value_and_grad`. ``grad_fn`` is made of the same arguments after params (batch, keys,
    statistics), so the second gradient cannot see another batch or another dropout key by mistake; it returns the
    gradient alone. Nothing is computed twice: ``grad_fn`` runs where ``update`` calls it.

    Args:
      loss_fn: a function of params and any other arguments that returns a scalar, or a pair of a scalar and auxiliary
        data under ``has_aux``.
      has_aux: whether ``loss_fn`` returns such a pair; ``value`` is then the pair of the pass at ``w``, and the
        auxiliary data of the pass at ``w'`` are dropped.

    Returns:
      A function of the arguments of ``loss_fn`` that returns ``(value, grads, grad_fn)``.

    Raises:
      TypeError: loss_fn is not a function.

    Example:
      >>> def loss_fn(w, batch):
      ...     return jnp.mean((batch @ w) ** 2)
      >>> tx = optax.chain(saner_jax.saner(rho=0.1), optax.sgd(0.1))
      >>> w = jnp.array([1.0, -1.0])
      >>> loss, grads, grad_fn = saner_jax.value_and_grads(loss_fn)(w, jnp.array([[1.0, 0.0], [1.0, 2.0]]))
      >>> updates, state = tx.update(grads, tx.init(w), w, grad_fn=grad_fn)
      >>> loss.item()
      1.0

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving Generalization
      <https://arxiv.org/abs/2010.01412>`_, 2021, algorithm 1: both gradients are of the same batch.

    .. note::
      Under ``axis_name`` inside :func:`jax.shard_map`, call it at ``jax.lax.pcast(params, axis_name, to="varying")``.
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of params and other arguments, got {brief(loss_fn)}.")

    def evaluate(params: optax.Params, *args: Any, **kwargs: Any) -> tuple[Any, optax.Updates, GradFn]:
        def grad_fn(params: optax.Params) -> optax.Updates:
            grads = jax.grad(loss_fn, has_aux=has_aux)(params, *args, **kwargs)
            return grads[0] if has_aux else grads

        value, grads = jax.value_and_grad(loss_fn, has_aux=has_aux)(params, *args, **kwargs)
        return value, grads, grad_fn

    return evaluate
