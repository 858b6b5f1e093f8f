"""How sharp the minimum is that a run stands in: the largest eigenvalue of the Hessian of its training loss.

The loss is the mean cross-entropy against the given labels of a fixed, class-stratified subset of the training images,
without augmentation, in evaluation mode: BatchNorm normalises with its running statistics, dropout is off. So the
Hessian is a property of the network and the data, and the same samples are measured for all methods.

The eigenvalue is found by ARPACK's implicitly restarted Lanczos method, from products of the Hessian with vectors.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from .. import compilation, data
from ..data import streaming
from ..errors import UserError

# ARPACK's: a Ritz value is accepted when its residual is below this times itself.
TOLERANCE = 1e-3
MAX_PRODUCTS = 2000
# Samples that go through the network at once; a product with the Hessian keeps twice the activations of a gradient.
BATCH = 125
# Lanczos vectors that are kept between two restarts, ARPACK's default.
_VECTORS = 20


class Eigenvalue(NamedTuple):
    """The largest eigenvalue of a symmetric operator, and what it took."""

    eigenvalue: float
    residual: float
    """||H v - lambda v|| / |lambda| of the unit eigenvector v."""
    products: int
    """Products with the operator, the one for the residual among them."""
    seconds: float


def largest_eigenvalue(
    product: Callable[[np.ndarray], np.ndarray],
    size: int,
    *,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    max_products: int = MAX_PRODUCTS,
) -> Eigenvalue:
    """Find the algebraically largest eigenvalue of a symmetric operator.

    Args:
      product: v -> H v, both float64 (size,).
      size: Number of rows; 2 or more.
      seed: Of the vector to start from.
      tolerance: Relative accuracy; H must be multiplied with about this accuracy or better.
      max_products: About how many products are made before it is given up.

    Raises:
      UserError: It did not converge, or a product is not finite.
    """
    from scipy.sparse import linalg

    started, products = time.monotonic(), 0

    def counted(vector: np.ndarray) -> np.ndarray:
        nonlocal products
        products += 1
        result = product(vector.reshape(-1))
        if not np.isfinite(result).all():
            raise UserError("the Hessian of this checkpoint is not finite: its loss or parameters have diverged.")
        return result

    vectors = min(_VECTORS, size)
    try:
        eigenvalues, eigenvectors = linalg.eigsh(
            linalg.LinearOperator((size, size), matvec=counted, dtype=np.float64),
            k=1,
            which="LA",
            v0=np.random.default_rng(seed).standard_normal(size),
            ncv=vectors,
            maxiter=max(1, max_products // vectors),
            tol=tolerance,
        )
    except linalg.ArpackNoConvergence as error:
        raise UserError(
            f"Lanczos did not converge to a relative {tolerance:g} in {products} products: give a larger --tolerance."
        ) from error
    value, vector = float(eigenvalues[0]), eigenvectors[:, 0]
    residual = float(np.linalg.norm(counted(vector) - value * vector))
    return Eigenvalue(value, residual / abs(value), products, time.monotonic() - started)


def hessian_product(
    loss: Callable[..., jax.Array], params: Any, batches: Sequence[Any]
) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
    """Return v -> H v for the Hessian of a sum of losses over batches, and its number of rows.

    ::

        H v = sum over batches of  d/dt grad loss(w + t v, batch)  at t = 0

    The products are computed in the parameters' own precision and summed up in float64.

    Args:
      loss: (params, batch) -> (); the function whose sum over the batches is meant. The same function again, at
        another point and on other batches of the same shapes, is not compiled again.
      params: Point at which the Hessian is taken.
      batches: Batches, best of one shape, so that one function is compiled.
    """
    flat, _ = ravel_pytree(params)

    def product(vector: np.ndarray) -> np.ndarray:
        tangent = jnp.asarray(vector, flat.dtype)
        parts = [_compiled()(loss, params, tangent, batch) for batch in batches]
        return np.sum([np.asarray(part, np.float64) for part in parts], axis=0)

    return product, flat.size


@functools.cache
def _compiled() -> Callable[..., jax.Array]:
    # The point and the batch are arguments: as constants they would be folded into the program.
    return jax.jit(_product_of_batch, static_argnums=0, compiler_options=compilation.options())


def _product_of_batch(loss: Callable[..., jax.Array], params: Any, vector: jax.Array, batch: Any) -> jax.Array:
    flat, unravel = ravel_pytree(params)
    gradient = jax.grad(lambda flat: loss(unravel(flat), batch))
    return jax.jvp(gradient, (flat,), (vector,))[1]


class Batch(NamedTuple):
    """Samples that go through the network at once."""

    images: Any
    """uint8 (B, H, W, C)."""
    labels: Any
    """Given labels, int32 (B,)."""
    weights: Any
    """What each loss counts, float32 (B,); 0 for those that only fill up the last batch."""


def of_trainer(
    trainer: Any,
    *,
    samples: int,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    batch_size: int = BATCH,
) -> dict[str, Any]:
    """Measure the network that a trainer stands at; returns what `sharpness.json` holds.

    Args:
      trainer: A trainer that computes in float32, whatever the run did: a rounded product has other eigenvalues.
      samples: Training samples, class-stratified by their given labels; all if the training set has fewer.
      seed: Of the subset and of the vector to start from.
      tolerance: Relative accuracy of the eigenvalue.
      batch_size: Samples at once.

    Raises:
      UserError: Lanczos did not converge.
    """
    dataset, network = trainer.dataset, trainer.state.networks[0]
    subset = dataset.train
    if samples < len(subset):
        subset = data.stratified_subset(subset, samples, dataset.num_classes, seed)

    loss = _weighted_loss(compilation.uncompiled(trainer.functions.evaluate))
    batches = [(network, batch) for batch in _batches(subset, min(batch_size, len(subset)))]
    product, size = hessian_product(loss, network.params, batches)
    with jax.default_matmul_precision("float32"):
        found = largest_eigenvalue(product, size, seed=seed, tolerance=tolerance)
    return {
        "epoch": trainer.epoch,
        "step": trainer.step,
        **found._asdict(),
        "tolerance": tolerance,
        "samples": len(subset),
        "seed": seed,
        "of": "mean cross-entropy of training samples against given labels, not augmented, evaluation mode",
    }


@functools.lru_cache(maxsize=8)
def _weighted_loss(evaluate: Callable[..., Any]) -> Callable[..., jax.Array]:
    """Return (params, (network, batch)) -> () of an evaluation, one function for all measurements along a run."""

    def loss(params: Any, of_batch: tuple[Any, Batch]) -> jax.Array:
        network, batch = of_batch
        losses = evaluate(network._replace(params=params), batch.images, batch.labels).losses
        return jnp.sum(losses * batch.weights)

    return loss


def _batches(split: data.Split, size: int) -> Iterator[Batch]:
    weight = np.float32(1 / len(split))
    if split.streamed:
        for images, positions in streaming.batches(
            split, batch_size=size, seed=0, epoch=0, workers=0, train=False, image_size=split.images.image_size
        ):
            yield Batch(images, split.labels[positions], weight * (positions >= 0))
        return
    for start in range(0, len(split), size):
        positions = np.arange(start, start + size)
        # Repeats fill up the last batch, so that all have one shape.
        chosen = np.minimum(positions, len(split) - 1)
        yield Batch(split.images[chosen], split.labels[chosen], weight * (positions < len(split)))
