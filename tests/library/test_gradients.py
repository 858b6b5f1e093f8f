"""From a loss function to the value, the gradient and ``grad_fn``: what ``jax.value_and_grad`` gives, and once more."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import saner_jax
from tests.library.test_contract import METHODS

PARAMS = {"w": jnp.array([[0.3, -0.2], [1.0, 0.4]]), "b": jnp.array([0.1, -0.5])}
X = jnp.array([[1.0, 2.0], [-1.0, 0.5], [0.2, 0.3]])


def loss_fn(params, x, *, key=None, power=2):
    keep = 1.0 if key is None else jax.random.bernoulli(key, 0.5, x.shape)
    return jnp.mean(jnp.abs(jnp.tanh((x * keep) @ params["w"]) + params["b"]) ** power)


def with_aux(params, x):
    out = x @ params["w"]
    return jnp.mean(out**2), {"logits": out, "count": 3}


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("jit", [False, True])
def test_it_reads_like_value_and_grad(jit):
    moved = jax.tree.map(lambda p: p + 0.1, PARAMS)

    def ours(params, moved, x, key):
        value, grads, grad_fn = saner_jax.value_and_grads(loss_fn)(params, x, key=key, power=3)
        return value, grads, grad_fn(moved)

    def theirs(params, moved, x, key):
        value_and_grad = jax.value_and_grad(loss_fn)
        return *value_and_grad(params, x, key=key, power=3), value_and_grad(moved, x, key=key, power=3)[1]

    ours, theirs = (jax.jit(f) if jit else f for f in (ours, theirs))
    key = jax.random.key(3)
    assert_equal(ours(PARAMS, moved, X, key), theirs(PARAMS, moved, X, key))


def test_auxiliary_data_are_those_of_the_first_pass():
    (value, aux), grads, grad_fn = saner_jax.value_and_grads(with_aux, has_aux=True)(PARAMS, X)
    (expected, expected_aux), expected_grads = jax.value_and_grad(with_aux, has_aux=True)(PARAMS, X)
    assert_equal((value, aux, grads), (expected, expected_aux, expected_grads))
    doubled = jax.tree.map(lambda p: 2 * p, PARAMS)
    assert_equal(grad_fn(doubled), jax.grad(with_aux, has_aux=True)(doubled, X)[0])


def test_the_loss_is_not_evaluated_before_it_is_asked_for():
    calls = []

    def counted(params, x):
        calls.append(params)
        return loss_fn(params, x)

    saner_jax.value_and_grads(counted)(PARAMS, X)
    assert len(calls) == 1


@pytest.mark.parametrize("name", METHODS)
def test_it_drives_every_method(name):
    params = {"layer": {"kernel": PARAMS["w"], "bias": PARAMS["b"]}, "scale": jnp.array(1.0)}
    tx = METHODS[name]()

    def loss(params, x):
        return jnp.mean(jnp.tanh(x @ params["layer"]["kernel"] + params["layer"]["bias"]) ** 2) * params["scale"]

    def step(params, state, x):
        _, grads, grad_fn = saner_jax.value_and_grads(loss)(params, x)
        return tx.update(grads, state, params, grad_fn=grad_fn)

    def by_hand(params, state, x):
        grad_fn = functools.partial(jax.grad(loss), x=x)
        return tx.update(grad_fn(params), state, params, grad_fn=grad_fn)

    state = tx.init(params)
    assert_equal(step(params, state, X)[0], by_hand(params, state, X)[0])


def test_groups_by_vmap():
    tx = optax.chain(saner_jax.saner(0.1, axis_name="groups"), optax.sgd(0.1))

    @functools.partial(jax.vmap, in_axes=(None, 0), out_axes=None, axis_name="groups")
    def step(params, x):
        _, grads, grad_fn = saner_jax.value_and_grads(loss_fn)(params, x[None])
        return tx.update(grads, tx.init(params), params, grad_fn=grad_fn)[0]

    assert jax.tree.map(jnp.shape, step(PARAMS, X)) == jax.tree.map(jnp.shape, PARAMS)


@pytest.mark.parametrize("loss", [None, 0.5, PARAMS])
def test_a_loss_that_is_no_function(loss):
    with pytest.raises(TypeError, match="loss_fn must be a function of params"):
        saner_jax.value_and_grads(loss)
