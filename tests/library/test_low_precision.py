"""bfloat16 and float16 gradients and parameters: what is computed in float32, and what leaves in which type."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import saner_jax
from saner_jax import downweight

METHODS = {
    "sam": lambda **kw: saner_jax.sam(0.5, **kw),
    "asam+saner": lambda **kw: saner_jax.asam(0.5, reweight=downweight(0.3), **kw),
    "gsam+saner": lambda **kw: saner_jax.gsam(0.5, reweight=downweight(0.3), **kw),
    "fsam+saner": lambda **kw: saner_jax.fsam(0.5, reweight=downweight(0.3), **kw),
    "vasso+saner": lambda **kw: saner_jax.vasso(0.5, 0.3, reweight=downweight(0.3), **kw),
    "sgd_d": lambda **kw: saner_jax.sgd_d(0.5, **kw),
}
LOW = ("bfloat16", "float16")


def draw(seed, dtype=jnp.bfloat16):
    rng = np.random.default_rng(seed)
    return {"w": jnp.asarray(rng.normal(size=(9, 5)), dtype), "b": jnp.asarray(rng.normal(size=5), dtype)}


def dtypes(tree):
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", METHODS)
def test_the_arithmetic_is_float32s(name, dtype):
    """On the same g and h, every step is the float32 step, rounded once at the end; so is the perturbed point."""
    tx = METHODS[name]()
    params = draw(0, dtype)
    low_state, state = tx.init(params), tx.init(optax.tree.cast(params, jnp.float32))
    for step in range(3):
        g, h = draw(1 + 2 * step, dtype), draw(2 + 2 * step, dtype)
        points = []

        def grad_fn(w, h=h, points=points):
            points.append(w)
            return jax.tree.map(lambda h, w: h.astype(w.dtype), h, w)

        low, low_state = tx.update(g, low_state, params, grad_fn=grad_fn)
        wide = optax.tree.cast((g, params), jnp.float32)
        full, state = tx.update(wide[0], state, wide[1], grad_fn=grad_fn)
        assert dtypes(low) == {dtype}
        assert dtypes(points[0]) == {dtype}
        jax.tree.map(np.testing.assert_array_equal, low, optax.tree.cast(full, dtype))
        jax.tree.map(np.testing.assert_array_equal, points[0], optax.tree.cast(points[1], dtype))
        jax.tree.map(np.testing.assert_array_equal, low_state, state)
    assert "float32" in dtypes(low_state)
    assert not dtypes(low_state) & set(LOW)


@pytest.mark.parametrize(("dtype", "value"), [("bfloat16", 1e-2), ("float16", 300.0), ("float16", 1e-5)])
def test_norms_are_accumulated_in_float32(dtype, value):
    """In the type itself a sum of this many squares would stall, overflow or vanish."""
    g = jnp.full(100_000, value, dtype)
    eps, _ = saner_jax.scale_to_norm(1.0).update(g, saner_jax.scale_to_norm(1.0).init(g))
    np.testing.assert_allclose(eps, 100_000**-0.5, rtol=1e-3)


def test_averages_stay_in_float32():
    """In bfloat16, 0.9 m + 0.1 g would stop short of a constant g."""
    tx = saner_jax.fsam(decay=0.99)
    params = jnp.zeros(3, jnp.bfloat16)
    state = tx.init(params)
    update = jax.jit(lambda g, state: tx.update(g, state, params, grad_fn=jnp.cos)[1])
    state = update(jnp.zeros_like(params), state)
    for _ in range(400):
        state = update(jnp.ones_like(params), state)
    (ema,) = (s.ema for s in state.ascent if hasattr(s, "ema"))
    assert ema.dtype == jnp.float32
    np.testing.assert_allclose(ema, 1 - 0.99**400, rtol=1e-4)


def test_each_leaf_keeps_its_own_type():
    params = {"half": jnp.ones(3, jnp.bfloat16), "single": jnp.ones(2, jnp.float32)}
    seen = []

    def grad_fn(w):
        seen.append(jax.tree.map(lambda x: str(x.dtype), w))
        return jax.tree.map(jnp.cos, w)

    for make in METHODS.values():
        tx = make()
        updates, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
        assert jax.tree.map(lambda x: str(x.dtype), updates) == {"half": "bfloat16", "single": "float32"}
    assert all(types == {"half": "bfloat16", "single": "float32"} for types in seen)


def test_gradient_of_another_type_than_the_parameters():
    """float32 parameters with bfloat16 gradients: the point is float32, the update bfloat16."""
    params = jnp.ones(3)
    points = []

    def grad_fn(w):
        points.append(w)
        return jnp.cos(w).astype(jnp.bfloat16)

    tx = saner_jax.saner()
    updates, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
    assert updates.dtype == jnp.bfloat16
    assert points[-1].dtype == jnp.float32


def test_float64_beside_float32():
    with jax.enable_x64(True):
        params = {"double": jnp.ones(3, jnp.float64), "single": jnp.ones(2, jnp.float32)}
        for make in METHODS.values():
            tx = make(monitor=True)
            updates, state = tx.update(params, tx.init(params), params, grad_fn=lambda w: jax.tree.map(jnp.cos, w))
            assert jax.tree.map(lambda x: str(x.dtype), updates) == {"double": "float64", "single": "float32"}
            assert state.monitored.cosine.dtype == jnp.float64


# -- perturbed_dtype ---------------------------------------------------------------------------------------------------


def test_bfloat16_swallows_a_small_perturbation_and_perturbed_dtype_keeps_it():
    params = jnp.ones(1000, jnp.bfloat16)
    points = []

    def grad_fn(w):
        points.append(w)
        return jnp.cos(w)

    g = jnp.cos(params)
    for perturbed_dtype in (None, jnp.float32):
        tx = saner_jax.saner(rho=0.05, perturbed_dtype=perturbed_dtype)
        updates, _ = tx.update(g, tx.init(params), params, grad_fn=grad_fn)
        assert updates.dtype == jnp.bfloat16
    assert points[0].dtype == jnp.bfloat16
    assert jnp.all(points[0] == 1)
    assert points[1].dtype == jnp.float32
    np.testing.assert_allclose(points[1] - 1, 0.05 / 1000**0.5, rtol=1e-4)


@pytest.mark.parametrize("returned", [jnp.float32, jnp.bfloat16])
def test_h_is_compared_in_the_type_of_g(returned):
    """A bfloat16 g would differ from a finer h by its rounding alone, and half of the elements look down-weighted."""
    params = draw(0)
    tx = saner_jax.saner(rho=0.0, alpha=1.0, perturbed_dtype=jnp.float32, monitor=True)

    def gradient(w):
        return optax.tree.cast(jax.tree.map(jnp.cos, optax.tree.cast(w, jnp.float32)), returned)

    g = optax.tree.cast(gradient(params), jnp.bfloat16)
    updates, state = tx.update(g, tx.init(params), params, grad_fn=gradient)
    assert state.monitored.downweighted_share == 0
    jax.tree.map(np.testing.assert_array_equal, updates, g)


def test_perturbed_dtype_of_float32_parameters_may_be_lower():
    params = jnp.ones(3)
    tx = saner_jax.saner(perturbed_dtype="bfloat16")
    updates, _ = tx.update(params, tx.init(params), params, grad_fn=lambda w: jnp.cos(w))
    assert updates.dtype == jnp.float32
