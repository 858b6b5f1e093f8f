"""Descent stages on their own: from the gradient at ``w + eps`` to the update."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import saner_jax

G = {"w": jnp.array([2.0, 2.0, -2.0, 2.0, 0.0, 2.0]), "b": jnp.array(-1.0)}
H = {"w": jnp.array([1.0, 3.0, -1.0, -1.0, 1.0, 0.0]), "b": jnp.array(-0.5)}
MASK = {"w": np.array([True, False, True, False, False, False]), "b": np.array(True)}

STAGES = {
    "downweight": saner_jax.downweight(0.25),
    "restore_downweighted": saner_jax.restore_downweighted(),
    "subtract_orthogonal": saner_jax.subtract_orthogonal(0.5),
}


def apply(stage, h=H, g=G, params=None):
    return stage.update(h, stage.init(h), params, unperturbed_grads=g)[0]


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.25, 1.0])
def test_downweight(alpha):
    factors = jax.tree.map(lambda m: np.where(m, np.float32(1 - alpha), np.float32(1)), MASK)
    assert_equal(apply(saner_jax.downweight(alpha)), jax.tree.map(np.multiply, H, factors))


def test_restore_downweighted():
    assert_equal(apply(saner_jax.restore_downweighted()), jax.tree.map(np.where, MASK, G, H))


@pytest.mark.parametrize("make", [lambda mask: saner_jax.downweight(1.0, mask), saner_jax.restore_downweighted])
@pytest.mark.parametrize("params", [None, H])
def test_mask_limits_the_leaves(make, params):
    whole = apply(make(None))
    only_b = apply(make({"w": False, "b": True}), params=params)
    assert_equal(only_b, {"w": H["w"], "b": whole["b"]})
    assert_equal(apply(make(False), params=params), H)
    assert_equal(apply(make(True), params=params), whole)


def test_mask_as_function_of_params():
    stage = saner_jax.downweight(1.0, mask=lambda params: jax.tree.map(lambda p: p.ndim == 0, params))
    assert_equal(apply(stage, params=H), {"w": H["w"], "b": jnp.array(0.0)})


@pytest.mark.parametrize("name", STAGES)
def test_h_keeps_its_dtype(name):
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        out = apply(STAGES[name], optax.tree.cast(H, dtype), optax.tree.cast(G, dtype))
        assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("name", STAGES)
def test_stages_are_chained_and_ignore_other_arguments(name):
    tx = optax.chain(STAGES[name], optax.scale(2.0))
    out, _ = tx.update(H, tx.init(H), None, unperturbed_grads=G, value=1.0)
    assert_equal(out, jax.tree.map(lambda x: 2 * x, apply(STAGES[name])))


def test_subtract_orthogonal():
    h, g = {"a": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}, {"a": jnp.array([1.0, 2.0]), "b": jnp.array(-1.0)}
    flat_h, flat_g = np.array([3.0, 0.0, 4.0]), np.array([1.0, 2.0, -1.0])
    g_perp = flat_g - flat_h @ flat_g / (flat_h @ flat_h) * flat_h
    out = apply(saner_jax.subtract_orthogonal(0.7), h, g)
    flat = np.append(out["a"], out["b"])
    np.testing.assert_allclose(flat, flat_h - 0.7 * g_perp, rtol=1e-6)
    # What is taken away does not change the part along h.
    np.testing.assert_allclose(flat @ flat_h, flat_h @ flat_h, rtol=1e-6)


def test_subtract_orthogonal_from_parallel_gradients_changes_nothing():
    out = apply(saner_jax.subtract_orthogonal(1.0), H, jax.tree.map(lambda x: -2 * x, H))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), out, H)


def test_subtract_orthogonal_from_zero_takes_all_of_g():
    zeros = jax.tree.map(jnp.zeros_like, H)
    assert_equal(apply(saner_jax.subtract_orthogonal(0.5), zeros, G), jax.tree.map(lambda g: -0.5 * g, G))


@pytest.mark.parametrize("exponent", [-25, -15, 15])
def test_subtract_orthogonal_where_the_square_of_the_norm_leaves_float32(exponent):
    """1e-25 has a square of zero and is treated as zero; the others are not touched by it."""
    scale = 10.0**exponent
    h, g = jnp.array([scale, 0.0]), jnp.array([scale, scale])
    out = apply(saner_jax.subtract_orthogonal(0.5), h, g)
    expected = [scale, -0.5 * scale] if exponent > -20 else [0.5 * scale, -0.5 * scale]
    np.testing.assert_allclose(out, expected, rtol=1e-6)


@pytest.mark.parametrize("make", [saner_jax.downweight, saner_jax.subtract_orthogonal])
def test_alpha_moves_with_the_stages_own_steps(make):
    stage = make(lambda step: 0.25 * step)
    state = stage.init(H)
    assert (state.step, state.alpha) == (0, 0.0)
    for used in (0.0, 0.25, 0.5):
        out, state = stage.update(H, state, unperturbed_grads=G)
        assert state.alpha == used
        assert_equal(out, apply(make(used)))
    assert state.step == 3
