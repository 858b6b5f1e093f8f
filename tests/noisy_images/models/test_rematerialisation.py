"""Rematerialisation: the same gradients from less that is kept for them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.noisy_images import models

pytestmark = pytest.mark.usefixtures("quick_compile")


def forward(name, x, rematerialise):
    """Return the network's parameters, and the function from them to logits and statistics, with dropout."""
    model = models.create(
        name, dropout=0.5, rematerialise=rematerialise, image_shape=(8, 8, 1), num_classes=10, width=0.25, seed=0
    )
    graphdef, params, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)

    def apply(params):
        copied = nnx.merge(graphdef, params, statistics, copy=True)
        logits = copied(x, train=True, rngs=nnx.Rngs(dropout=jax.random.key(1)))
        return logits, nnx.state(copied, nnx.BatchStat)

    return params, apply


@pytest.mark.parametrize("name", ["mlp", "small_cnn"])
def test_rematerialisation_changes_nothing(name):
    def gradient(rematerialise):
        params, apply = forward(
            name, np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32), rematerialise
        )

        def loss(params):
            logits, statistics = apply(params)
            return jnp.sum(logits**2), statistics

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), gradient(True), gradient(False))


SHALLOW = {
    "resnet18": functools.partial(models.ResNet, blocks=(1, 1, 1, 1)),
    "wrn_40_2": functools.partial(models.WideResNet, depth=10, widening=1),
    "densenet121": functools.partial(models.DenseNet, blocks=(2, 2), growth=32),
}


@pytest.mark.parametrize("name", ["small_cnn", *SHALLOW])
def test_rematerialisation_keeps_less_for_the_backward_pass(name, monkeypatch):
    if name in SHALLOW:
        monkeypatch.setitem(models.MODELS, name, models.MODELS[name]._replace(build=SHALLOW[name]))

    def kept(rematerialise):
        params, apply = forward(name, jnp.zeros((64, 8, 8, 1)), rematerialise)
        held = jax.eval_shape(lambda params: jax.vjp(apply, params)[1], params)
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(held)) - sum(
            x.nbytes for x in jax.tree.leaves(params)
        )

    assert kept(True) < 0.6 * kept(False)
