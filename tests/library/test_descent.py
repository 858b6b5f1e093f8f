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
    "downweight elsewhere": saner_jax.downweight(0.25, where=saner_jax.is_grown),
    "downweight_random": saner_jax.downweight_random(0.25),
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


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (None, MASK),
        (saner_jax.is_downweighted, MASK),
        (saner_jax.is_turned, {"w": np.array([False, False, False, True, False, False]), "b": np.array(False)}),
        (saner_jax.is_grown, {"w": np.array([False, True, False, False, False, False]), "b": np.array(False)}),
        (lambda h, g: jnp.abs(g) > 1, {"w": np.array([True, True, True, True, False, True]), "b": np.array(False)}),
    ],
)
def test_downweight_other_elements(where, expected):
    factors = jax.tree.map(lambda m: np.where(m, np.float32(0.75), np.float32(1)), expected)
    assert_equal(apply(saner_jax.downweight(0.25, where=where)), jax.tree.map(np.multiply, H, factors))


def test_inject_hyperparams_takes_the_group_for_a_schedule_unless_told():
    """Without ``where``, and with it named, as the README says of masks."""
    plain = optax.inject_hyperparams(saner_jax.downweight)(alpha=0.25)
    assert_equal(apply(plain, params=H), apply(saner_jax.downweight(0.25)))
    make = optax.inject_hyperparams(saner_jax.downweight, static_args=("where",))
    named = make(alpha=0.25, where=saner_jax.is_grown)
    assert_equal(apply(named, params=H), apply(saner_jax.downweight(0.25, where=saner_jax.is_grown)))


def test_restore_downweighted():
    assert_equal(apply(saner_jax.restore_downweighted()), jax.tree.map(np.where, MASK, G, H))


@pytest.mark.parametrize(
    "make",
    [
        lambda mask: saner_jax.downweight(1.0, mask=mask),
        lambda mask: saner_jax.downweight_random(1.0, mask=mask),
        lambda mask: saner_jax.restore_downweighted(mask=mask),
    ],
)
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


@pytest.mark.parametrize("exponent", [-36, -25, -20.3, -15, 0, 15, 20.3, 37])
def test_subtract_orthogonal_where_the_square_of_the_norm_leaves_float32(exponent):
    scale = 10.0**exponent
    h, g = jnp.array([scale, 0.0]), jnp.array([scale, scale])
    out = apply(saner_jax.subtract_orthogonal(0.5), h, g)
    np.testing.assert_allclose(out, [scale, -0.5 * scale], rtol=1e-6)


# -- the random control ------------------------------------------------------------------------------------------------

MANY_G = {"w": jnp.ones((40, 25)), "b": jnp.ones(30), "c": jnp.ones(8)}
MANY_H = {"w": jnp.linspace(-1.0, 2.0, 1000).reshape(40, 25), "b": jnp.full(30, 0.5), "c": jnp.full(8, 2.0)}


def damped(update, h=MANY_H):
    """Where ``alpha = 1`` removed an element."""
    return jax.tree.map(lambda u, h: np.asarray((u == 0) & (h != 0)), update, h)


def draw(seed, steps=1):
    """The elements removed in each of the first steps."""
    stage = saner_jax.downweight_random(1.0, seed=seed)
    state, drawn = stage.init(MANY_H), []
    for _ in range(steps):
        update, state = stage.update(MANY_H, state, unperturbed_grads=MANY_G)
        drawn.append(damped(update))
    return drawn


def test_downweight_random_damps_as_many_elements_of_every_leaf():
    expected = damped(apply(saner_jax.downweight(1.0), MANY_H, MANY_G))
    counts = jax.tree.map(np.sum, expected)
    assert 0 < counts["w"] < 1000 and (counts["b"], counts["c"]) == (30, 0)
    for drawn in draw(seed=0, steps=3):
        assert jax.tree.map(np.sum, drawn) == counts
        # Of random places a third is down-weighted; every one would be if they were the same.
        assert 0.2 < np.mean(expected["w"][drawn["w"]]) < 0.5


def test_downweight_random_passes_the_others_bit_for_bit_and_scales_the_chosen():
    update = apply(saner_jax.downweight_random(0.25, seed=5), MANY_H, MANY_G)
    chosen = damped(apply(saner_jax.downweight_random(1.0, seed=5), MANY_H, MANY_G))
    assert_equal(update, jax.tree.map(lambda h, m: np.where(m, np.float32(0.75) * h, h), MANY_H, chosen))


def test_downweight_random_draws_afresh_from_its_seed_and_step():
    first, second = draw(seed=0, steps=2)
    assert np.mean(first["w"] == second["w"]) < 0.8
    again, other = draw(seed=0, steps=2), draw(seed=1)
    assert_equal([first, second], again)
    assert np.mean(first["w"] == other[0]["w"]) < 0.8
    # Places of leaves of equal size and count differ as well.
    h = {"a": MANY_H["w"], "b": MANY_H["w"]}
    twins = damped(apply(saner_jax.downweight_random(1.0), h, {"a": MANY_G["w"], "b": MANY_G["w"]}), h)
    assert np.mean(twins["a"] == twins["b"]) < 0.8


def test_downweight_random_draws_what_random_like_draws():
    mask = saner_jax.analysis.downweighted(MANY_G, MANY_H)
    for step, drawn in enumerate(draw(seed=7, steps=2)):
        assert_equal(drawn, saner_jax.analysis.random_like(jax.random.fold_in(jax.random.key(7), step), mask))


def test_alpha_of_the_random_control_moves_with_its_own_steps():
    stage = saner_jax.downweight_random(lambda step: 0.25 * step)
    state = stage.init(MANY_H)
    for used, chosen in zip((0.0, 0.25, 0.5), draw(seed=0, steps=3), strict=True):
        update, state = stage.update(MANY_H, state, unperturbed_grads=MANY_G)
        assert state.alpha == used
        assert_equal(update, jax.tree.map(lambda h, m, a=used: np.where(m, (1 - a) * h, h), MANY_H, chosen))
    assert state.step == 3


def test_the_state_holds_the_seed():
    """An ensemble under ``vmap`` may have one seed each, and inject_hyperparams passes it to ``init``."""
    states = jax.vmap(lambda seed: saner_jax.downweight_random(1.0, seed=seed).init(MANY_H))(jnp.arange(2))
    stage = saner_jax.downweight_random(1.0)
    updates, _ = jax.vmap(lambda state: stage.update(MANY_H, state, unperturbed_grads=MANY_G))(states)
    for seed in (0, 1):
        assert_equal(damped(jax.tree.map(lambda u, i=seed: u[i], updates)), draw(seed)[0])
    injected = optax.inject_hyperparams(saner_jax.downweight_random)(alpha=1.0, seed=1)
    assert_equal(damped(apply(injected, MANY_H, MANY_G, params=MANY_H)), draw(1)[0])


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
