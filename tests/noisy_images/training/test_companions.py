"""Hard bootstrapping and Co-teaching against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.noisy_images.training import companions


def _softmax(logits):
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def _samples(size=7, classes=4):
    rng = np.random.default_rng(0)
    return 3 * rng.normal(size=(size, classes)), rng.integers(0, classes, size)


def test_cross_entropy_of_each_sample():
    logits, labels = _samples()
    expected = -np.log(_softmax(logits)[np.arange(7), labels])
    np.testing.assert_allclose(companions.cross_entropy(jnp.array(logits), jnp.array(labels)), expected, rtol=1e-5)


def test_hard_bootstrapping_is_the_formula():
    logits, labels = _samples()
    log_p = np.log(_softmax(logits))
    own = logits.argmax(axis=1)
    expected = -0.8 * log_p[np.arange(7), labels] - 0.2 * log_p[np.arange(7), own]
    actual = companions.hard_bootstrapping(jnp.array(logits), jnp.array(labels))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_hard_bootstrapping_takes_its_prediction_for_a_constant():
    logits, labels = _samples()
    gradient = jax.grad(lambda x: companions.hard_bootstrapping(x, jnp.array(labels)).sum())(jnp.array(logits))
    target = 0.8 * np.eye(4)[labels] + 0.2 * np.eye(4)[logits.argmax(axis=1)]
    np.testing.assert_allclose(gradient, _softmax(logits) - target, atol=1e-6)


def _kept(size, epoch, forget_rate, ramp_epochs):
    """The released code's schedule, `numpy.linspace` over the ramp, and its count."""
    rates = np.full(100, forget_rate)
    rates[:ramp_epochs] = np.linspace(0, forget_rate, ramp_epochs)
    return max(int((1 - rates[epoch]) * size + 1e-9), 1)


@pytest.mark.parametrize("size", [5, 128])
@pytest.mark.parametrize(("forget_rate", "ramp"), [(0.2, 10), (0.2, 1), (0.45, 3), (1.0, 0)])
def test_co_teaching_keeps_the_released_counts(size, forget_rate, ramp):
    losses = tuple(jnp.array(np.random.default_rng(i).normal(size=size), jnp.float32) for i in range(2))
    traced = []

    def co_teaching_weights(*arguments):
        traced.append(1)
        return companions.co_teaching_weights(*arguments, forget_rate, ramp)

    weights = jax.jit(co_teaching_weights)
    for epoch in (0, 1, 2, 4, 9, 10, 50):
        kept = _kept(size, epoch, forget_rate, ramp)
        for weight in weights(losses, jnp.int32(epoch)):
            assert int((weight > 0).sum()) == kept
            np.testing.assert_allclose(weight[weight > 0], 1 / kept, rtol=1e-6)
    # The count moves, the shapes do not.
    assert len(traced) == 1


def test_each_network_picks_for_the_other():
    first, second = np.array([0.1, 5.0, 0.2, 3.0], np.float32), np.array([4.0, 0.3, 2.0, 0.1], np.float32)
    of_first, of_second = companions.co_teaching_weights((jnp.array(first), jnp.array(second)), jnp.int32(9), 0.5, 10)
    np.testing.assert_array_equal(of_first, [0, 0.5, 0, 0.5])
    np.testing.assert_array_equal(of_second, [0.5, 0, 0.5, 0])
