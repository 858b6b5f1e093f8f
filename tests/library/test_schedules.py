"""The papers' schedules: their values, their types, and their bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import saner_jax

EPOCH = 390


def test_alpha_ramp():
    ramp = saner_jax.alpha_ramp(0.5, steps=50 * EPOCH)
    assert ramp(0) == 0
    np.testing.assert_allclose(ramp(1), 0.5 / (50 * EPOCH), rtol=1e-6)
    np.testing.assert_allclose(ramp(25 * EPOCH), 0.25, rtol=1e-6)
    assert ramp(50 * EPOCH) == ramp(200 * EPOCH) == ramp(2**31 - 1) == 0.5


def test_alpha_ramp_by_epochs():
    """The released code counts epochs from 1: the first one has alpha / 50."""
    ramp = saner_jax.alpha_ramp(0.5, steps=50 * EPOCH, steps_per_epoch=EPOCH)
    for epoch in (1, 2, 49, 50, 51, 200):
        for step in ((epoch - 1) * EPOCH, epoch * EPOCH - 1):
            np.testing.assert_allclose(ramp(step), 0.5 * min(epoch / 50, 1), rtol=1e-6)
    assert ramp(49 * EPOCH) == 0.5


@pytest.mark.parametrize("steps_per_epoch", [None, 3])
def test_alpha_ramp_takes_any_step(steps_per_epoch):
    ramp = saner_jax.alpha_ramp(-0.25, steps=12, steps_per_epoch=steps_per_epoch)
    steps = np.arange(20)
    one_by_one = [ramp(int(step)) for step in steps]
    np.testing.assert_allclose(ramp(steps), one_by_one, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(ramp)(steps), one_by_one, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(ramp)(jnp.asarray(steps)), one_by_one, rtol=1e-6)
    assert min(one_by_one) == -0.25
    assert all(np.diff(one_by_one) <= 0)


def test_ramp_shorter_than_an_epoch():
    assert saner_jax.alpha_ramp(0.5, steps=100, steps_per_epoch=EPOCH)(0) == 0.5


def test_rho_follows_the_learning_rate():
    learning_rate = optax.cosine_decay_schedule(0.1, decay_steps=100)
    rho = saner_jax.rho_from_learning_rate(learning_rate, lr_min=0.0, lr_max=0.1, rho_min=0.02, rho_max=0.1)
    for step in (0, 10, 50, 99, 100, 1000):
        np.testing.assert_allclose(rho(step), 0.02 + 0.8 * learning_rate(step), rtol=1e-5)


def test_numbers_of_schedules_may_be_traced():
    """Under ``jit`` and ``vmap`` over every one of them, as NumPy's numbers, and without implicit promotion."""
    learning_rate = optax.linear_schedule(0.1, 0.0, 100)
    numbers = {"lr_min": 0.0, "lr_max": 0.1, "rho_min": 0.01, "rho_max": 0.1}

    def rho(**changed):
        return saner_jax.rho_from_learning_rate(learning_rate, **(numbers | changed))(30)

    def alpha(**changed):
        return saner_jax.alpha_ramp(**({"alpha": 0.5, "steps": 40} | changed))(jnp.int32(30))

    for function, values in ((rho, numbers), (alpha, {"alpha": 0.5, "steps": 40, "steps_per_epoch": 8})):
        for name, value in values.items():
            expected = function(**{name: value})
            several = jnp.asarray([value, value])
            np.testing.assert_allclose(jax.jit(lambda x, f=function, n=name: f(**{n: x}))(value), expected, rtol=1e-6)
            mapped = jax.vmap(lambda x, f=function, n=name: f(**{n: x}))(several)
            np.testing.assert_allclose(mapped, [expected] * 2, rtol=1e-6)
            for kind in (np.float32, np.float64, np.int64, np.asarray):
                if kind is np.int64 and value != int(value):
                    continue
                with jax.numpy_dtype_promotion("strict"):
                    np.testing.assert_allclose(function(**{name: kind(value)}), expected, rtol=1e-6)


def test_rho_may_fall_as_the_learning_rate_rises():
    rho = saner_jax.rho_from_learning_rate(lambda step: 0.1 * step, 0.0, 1.0, rho_min=0.4, rho_max=0.2)
    np.testing.assert_allclose([rho(step) for step in (0, 5, 10, 20)], [0.4, 0.3, 0.2, 0.2], rtol=1e-6)


numbers = st.floats(0, 1, width=32).map(lambda x: round(x, 3))


@settings(max_examples=50, deadline=None)
@given(learning_rate=st.floats(0, 2), lr=st.tuples(numbers, numbers), rho=st.tuples(numbers, numbers))
def test_rho_never_leaves_its_two_values(learning_rate, lr, rho):
    lr_min, lr_max = lr[0], lr[0] + lr[1] + 0.01
    schedule = saner_jax.rho_from_learning_rate(lambda step: jnp.float32(learning_rate), lr_min, lr_max, *rho)
    assert np.float32(min(rho)) <= schedule(0) <= np.float32(max(rho))


def test_schedules_drive_a_method():
    tx = saner_jax.gsam(
        rho=saner_jax.rho_from_learning_rate(lambda step: 0.1 / (1 + step), 0.0, 0.1, 0.0, 0.2),
        reweight=saner_jax.downweight(saner_jax.alpha_ramp(0.5, steps=2)),
    )
    params = jnp.array([1.0, -2.0])
    state = tx.init(params)
    for rho, alpha in ((0.2, 0.0), (0.1, 0.25), (0.2 / 3, 0.5)):
        _, state = tx.update(jnp.cos(params), state, params, grad_fn=jnp.cos)
        np.testing.assert_allclose(state.ascent.rho, rho, rtol=1e-6)
        np.testing.assert_allclose(state.descent[-1].alpha, alpha, rtol=1e-6)
