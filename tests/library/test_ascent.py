"""Ascent stages on their own: ordinary Optax transformations from a gradient to a perturbation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import saner_jax

PARAMS = {"w": jnp.array([3.0, -4.0]), "b": jnp.array(0.5)}
STAGES = {
    "scale_to_norm": saner_jax.scale_to_norm(0.1),
    "scale_to_adaptive_norm": saner_jax.scale_to_adaptive_norm(0.5),
    "subtract_ema": saner_jax.subtract_ema(),
    "follow_ema": saner_jax.follow_ema(),
}


def tree(w, b):
    return {"w": jnp.array(w, jnp.float32), "b": jnp.array(b, jnp.float32)}


def follow(stage, gradients, **extra_args):
    state, outputs = stage.init(PARAMS), []
    for g in gradients:
        eps, state = stage.update(g, state, PARAMS, **extra_args)
        outputs.append(eps)
    return outputs, state


def assert_tree(actual, w, b, rtol=1e-6):
    np.testing.assert_allclose(actual["w"], w, rtol=rtol)
    np.testing.assert_allclose(actual["b"], b, rtol=rtol)


@pytest.mark.parametrize("name", STAGES)
def test_stages_are_chained_outside_the_wrapper_too(name):
    """They ignore extra arguments that they do not know, and follow one another in any chain."""
    tx = optax.chain(STAGES[name], optax.scale(2.0))
    doubled, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=1.0)
    plain, _ = STAGES[name].update(PARAMS, STAGES[name].init(PARAMS), PARAMS)
    assert_tree(doubled, 2 * plain["w"], 2 * plain["b"])


@pytest.mark.parametrize("name", STAGES)
def test_a_bfloat16_gradient_gives_a_float32_perturbation(name):
    halves = optax.tree.cast(PARAMS, jnp.bfloat16)
    eps, _ = STAGES[name].update(halves, STAGES[name].init(halves), halves)
    assert {leaf.dtype for leaf in jax.tree.leaves(eps)} == {jnp.dtype("float32")}


def test_norm_is_global():
    (eps,), _ = follow(saner_jax.scale_to_norm(1.3), [tree([3.0, 4.0], 12.0)])
    assert_tree(eps, [0.3, 0.4], 1.2)


def test_adaptive_norm_is_global_and_leaves_masked_ones_alone():
    stage = saner_jax.scale_to_adaptive_norm(2.0, eta=1.0, adaptive_mask={"w": True, "b": False})
    (eps,), _ = follow(stage, [tree([1.0, 2.0], 2.0)])
    t = np.array([4.0, 5.0, 1.0])
    g = np.array([1.0, 2.0, 2.0])
    expected = 2.0 * t**2 * g / np.linalg.norm(t * g)
    assert_tree(eps, expected[:2], expected[2])


@pytest.mark.parametrize(
    "mask",
    [{"w": True, "b": False}, lambda params: jax.tree.map(lambda p: p.ndim > 0, params)],
    ids=["tree", "function"],
)
def test_adaptive_mask_as_tree_and_as_function(mask):
    (eps,), _ = follow(saner_jax.scale_to_adaptive_norm(0.5, 0.1, adaptive_mask=mask), [PARAMS])
    (expected,), _ = follow(
        saner_jax.scale_to_adaptive_norm(0.5, 0.1, adaptive_mask={"w": np.bool_(True), "b": False}), [PARAMS]
    )
    assert_tree(eps, expected["w"], expected["b"], rtol=0)


def test_without_adaptive_leaves_it_is_scale_to_norm():
    g = tree([1.0, -2.0], 0.3)
    (adaptive,), _ = follow(saner_jax.scale_to_adaptive_norm(0.4, adaptive_mask=False), [g])
    (plain,), _ = follow(saner_jax.scale_to_norm(0.4), [g])
    assert_tree(adaptive, plain["w"], plain["b"], rtol=0)


def test_subtract_ema_from_the_first_step_on():
    gradients = [tree([1.0, 2.0], 3.0), tree([2.0, 2.0], 0.0), tree([0.0, -2.0], 1.0)]
    outputs, state = follow(saner_jax.subtract_ema(decay=0.75, sigma=0.5), gradients)
    assert_tree(outputs[0], [1.0, 2.0], 3.0)  # nothing to subtract
    assert_tree(outputs[1], [1.5, 1.0], -1.5)  # less half of the first
    average = 0.75 * np.array([1.0, 2.0, 3.0]) + 0.25 * np.array([2.0, 2.0, 0.0])
    assert_tree(outputs[2], [0.0, -2.0] - 0.5 * average[:2], 1.0 - 0.5 * average[2])
    average = 0.75 * average + 0.25 * np.array([0.0, -2.0, 1.0])
    assert_tree(state.ema, average[:2], average[2])


def test_follow_ema_from_the_first_step_on():
    gradients = [tree([1.0, 2.0], 3.0), tree([2.0, 2.0], 0.0)]
    outputs, state = follow(saner_jax.follow_ema(theta=0.25), gradients)
    assert_tree(outputs[0], [1.0, 2.0], 3.0)
    assert_tree(outputs[1], [1.25, 2.0], 2.25)
    assert_tree(state.ema, [1.25, 2.0], 2.25)


def test_averages_take_the_mean_over_groups_and_directions_the_own():
    own = tree([1.0, 1.0], 1.0)

    def mean(tree):
        return jax.tree.map(lambda x: 3 * x, tree)

    outputs, state = follow(saner_jax.subtract_ema(decay=0.5), [own, own], mean_over_groups=mean)
    assert_tree(outputs[1], [-2.0, -2.0], -2.0)
    assert_tree(state.ema, [3.0, 3.0], 3.0)
    outputs, state = follow(saner_jax.follow_ema(theta=0.5), [own, own], mean_over_groups=mean)
    assert_tree(outputs[1], [2.0, 2.0], 2.0)
    assert_tree(state.ema, [3.0, 3.0], 3.0)


def test_initial_state_is_zero_steps_and_the_first_values():
    state = saner_jax.subtract_ema(decay=lambda step: 0.5 + 0.1 * step, sigma=2.0).init(PARAMS)
    assert (state.step, state.decay, state.sigma) == (0, 0.5, 2.0)
    assert_tree(state.ema, [0.0, 0.0], 0.0)


def test_steps_are_counted_by_each_stage_for_itself():
    """A stage that joins later starts its schedule at 0."""
    stage = saner_jax.scale_to_norm(lambda step: 1.0 + step)
    _, old = follow(stage, [PARAMS] * 3)
    assert (old.step, old.rho) == (3, 3.0)
    _, new = follow(stage, [PARAMS])
    assert (new.step, new.rho) == (1, 1.0)


def test_step_counter_does_not_overflow():
    stage = saner_jax.scale_to_norm(lambda step: jnp.where(step > 0, 0.1, jnp.nan))
    state = stage.init(PARAMS)._replace(step=jnp.int32(2**31 - 1))
    for _ in range(2):
        _, state = stage.update(PARAMS, state)
    assert state.step == 2**31 - 1
    assert state.rho == np.float32(0.1)


def test_a_schedule_that_ends_a_rounding_error_below_zero_ends_at_zero():
    g = {"w": jnp.array([3.0, -4.0])}
    for stage in (saner_jax.scale_to_norm, saner_jax.scale_to_adaptive_norm):
        tx = stage(lambda step: jnp.float32(-1e-8) + 0 * step)
        eps, state = jax.jit(tx.update)(g, tx.init(g), g)
        assert not eps["w"].any()
        assert state.rho == 0
