"""The wrapper: what each stage is handed, where the second gradient is taken, what is monitored."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import saner_jax
from saner_jax import downweight, restore_downweighted, scale_to_norm, sharpness_aware, subtract_orthogonal

PARAMS = {
    "a": {"kernel": jnp.array([[0.5, -1.0, 2.0], [0.1, 3.0, -0.2]]), "bias": jnp.array([1.0, -1.0, 0.3])},
    "c": jnp.array(0.7),
}


def grad_fn(w):
    """Not separable: each element depends on all."""
    total = optax.tree.sum(w)
    return jax.tree.map(lambda x: jnp.cos(3 * x) + 0.1 * total, w)


def take(tx, params=PARAMS, state=None, grad_fn=grad_fn, **extra_args):
    """One update, and the points at which the second gradient was taken."""
    points = []

    def recording(w):
        points.append(w)
        return grad_fn(w)

    state = tx.init(params) if state is None else state
    updates, state = tx.update(grad_fn(params), state, params, grad_fn=recording, **extra_args)
    return updates, state, points


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def recorder(records):
    """A stage that keeps what it is handed and doubles it."""

    def update_fn(updates, state, params=None, **extra_args):
        records.append((updates, params, extra_args))
        return jax.tree.map(lambda x: 2 * x, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)


def test_the_second_gradient_is_taken_at_w_plus_eps():
    _, _, points = take(sharpness_aware(optax.scale(0.05)))
    assert len(points) == 1
    np.testing.assert_allclose(flat(points[0]), flat(PARAMS) + 0.05 * flat(grad_fn(PARAMS)), rtol=1e-6)


def test_what_the_stages_are_handed():
    ascent, first, second = [], [], []
    updates, _, points = take(sharpness_aware(recorder(ascent), recorder(first), recorder(second)), value=1.0)
    g, h = grad_fn(PARAMS), grad_fn(points[0])
    for records, handed in ((ascent, g), (first, h), (second, jax.tree.map(lambda x: 2 * x, h))):
        ((got, params, extra_args),) = records
        np.testing.assert_array_equal(flat(got), flat(handed))
        np.testing.assert_array_equal(flat(params), flat(PARAMS))
        assert extra_args.pop("value") == 1.0
        if records is ascent:
            assert not extra_args
            continue
        assert extra_args.keys() == {"unperturbed_grads", "perturbed_grads", "perturbation_norm"}
        np.testing.assert_array_equal(flat(extra_args["unperturbed_grads"]), flat(g))
        np.testing.assert_array_equal(flat(extra_args["perturbed_grads"]), flat(h))
        distance = np.linalg.norm(flat(points[0]) - flat(PARAMS))
        np.testing.assert_allclose(extra_args["perturbation_norm"](), distance, rtol=1e-6)
    np.testing.assert_array_equal(flat(updates), 4 * flat(h))


def test_any_optax_transformation_can_be_a_stage():
    tx = sharpness_aware(optax.chain(optax.trace(0.5), optax.normalize_by_update_norm(0.3)), optax.clip(0.2))
    _, state, _ = take(tx)
    updates, _, (point,) = take(tx, state=state)
    g = flat(grad_fn(PARAMS))
    np.testing.assert_allclose(flat(point) - flat(PARAMS), 0.3 * g / np.linalg.norm(g), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(flat(updates), np.clip(flat(grad_fn(point)), -0.2, 0.2), rtol=1e-6)


def test_state_holds_one_state_per_descent_stage():
    tx = sharpness_aware(scale_to_norm(0.1), subtract_orthogonal(0.4), restore_downweighted(), downweight(0.5))
    state = tx.init(PARAMS)
    assert isinstance(state, saner_jax.SharpnessAwareState)
    assert [type(s) for s in state.descent] == [
        saner_jax.SubtractOrthogonalState,
        optax.EmptyState,
        saner_jax.DownweightState,
    ]


# -- perturb_mask ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask",
    [
        {"a": {"kernel": True, "bias": False}, "c": False},
        lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    ],
    ids=["tree", "function"],
)
def test_only_masked_leaves_are_perturbed_and_the_norm_is_taken_over_them(mask):
    _, _, (point,) = take(saner_jax.sam(rho=0.3, perturb_mask=mask))
    np.testing.assert_array_equal(point["a"]["bias"], PARAMS["a"]["bias"])
    np.testing.assert_array_equal(point["c"], PARAMS["c"])
    g = np.asarray(grad_fn(PARAMS)["a"]["kernel"])
    np.testing.assert_allclose(
        point["a"]["kernel"], PARAMS["a"]["kernel"] + 0.3 * g / np.linalg.norm(g), rtol=1e-6, atol=1e-6
    )


def test_mask_may_be_a_prefix():
    _, _, (point,) = take(saner_jax.sam(rho=0.3, perturb_mask={"a": True, "c": False}))
    _, _, (expected,) = take(saner_jax.sam(rho=0.3, perturb_mask={"a": {"kernel": True, "bias": True}, "c": False}))
    np.testing.assert_array_equal(flat(point), flat(expected))


def test_leaves_that_are_not_perturbed_stay_whatever_the_ascent_makes_of_zero():
    plus_one = optax.stateless(lambda updates, params: jax.tree.map(lambda x: x + 1, updates))
    _, _, (point,) = take(sharpness_aware(plus_one, perturb_mask={"a": False, "c": True}))
    np.testing.assert_array_equal(flat(point["a"]), flat(PARAMS["a"]))
    assert point["c"] != PARAMS["c"]


def test_averages_cover_perturbed_leaves_alone():
    _, state, _ = take(saner_jax.fsam(perturb_mask={"a": False, "c": True}))
    (ema,) = (s.ema for s in state.ascent if hasattr(s, "ema"))
    np.testing.assert_array_equal(flat(ema["a"]), 0)
    np.testing.assert_array_equal(ema["c"], grad_fn(PARAMS)["c"])


def test_unperturbed_leaves_are_reweighted_all_the_same():
    """Their ratio moves as well, since the others do."""
    tx = saner_jax.saner(rho=2.0, alpha=1.0, perturb_mask={"a": {"kernel": True, "bias": False}, "c": False})
    updates, _, (point,) = take(tx)
    h, g = grad_fn(point), grad_fn(PARAMS)
    expected = jax.tree.map(lambda h, g: np.where((h / g > 0) & (h / g < 1), 0, h), h, g)
    np.testing.assert_array_equal(flat(updates), flat(expected))


# -- monitored scalars -------------------------------------------------------------------------------------------------


def by_hand(descent):
    """A composition of ``descent(observe)``, where the identity takes the place of what observes unless asked for."""

    def make(monitor=False):
        stage = saner_jax.observe_gradients() if monitor else optax.with_extra_args_support(optax.identity())
        return sharpness_aware(scale_to_norm(0.9), *descent(stage))

    return make


MONITORED = {  # name -> the method and, from g and h, what enters the stage that observes
    "sam": (functools.partial(saner_jax.sam, 0.9), lambda g, h: h),
    "saner": (functools.partial(saner_jax.saner, 0.9, 0.5), lambda g, h: h),
    "saner, alpha 1": (functools.partial(saner_jax.saner, 0.9, 1.0), lambda g, h: h),
    "saner, alpha -0.5": (functools.partial(saner_jax.saner, 0.9, -0.5), lambda g, h: h),
    "sgd_d": (functools.partial(saner_jax.sgd_d, 0.9), lambda g, h: h),
    "gsam": (functools.partial(saner_jax.gsam, 0.9, 0.4), lambda g, h: h - 0.4 * (g - g @ h / (h @ h) * h)),
    "gsam+saner": (
        functools.partial(saner_jax.gsam, 0.9, 0.4, reweight=downweight(1.0)),
        lambda g, h: h - 0.4 * (g - g @ h / (h @ h) * h),
    ),
    "own reweighting": (functools.partial(saner_jax.sam, 0.9, reweight=optax.scale(0.1)), lambda g, h: h),
    "by hand, before the reweighting": (
        by_hand(lambda observe: [optax.scale(2.0), observe, downweight(0.5), optax.scale(0.1)]),
        lambda g, h: 2 * h,
    ),
    "by hand, at the end": (by_hand(lambda observe: [optax.scale(0.1), observe]), lambda g, h: 0.1 * h),
    "by hand, within other wrappers": (
        by_hand(
            lambda observe: [optax.named_chain(("a", optax.scale(3.0)), ("b", optax.chain(observe, downweight(1.0))))]
        ),
        lambda g, h: 3 * h,
    ),
    "by hand, masked with a mask of all": (
        by_hand(lambda observe: [optax.masked(observe, True), downweight(1.0)]),
        lambda g, h: h,
    ),
    "by hand, in a cond": (
        by_hand(lambda observe: [optax.conditionally_transform(observe, lambda step: step >= 0), downweight(1.0)]),
        lambda g, h: h,
    ),
    "the wrapper's keyword": (
        functools.partial(sharpness_aware, scale_to_norm(0.9), optax.scale(2.0), downweight(0.5)),
        lambda g, h: h,
    ),
    "injected": (
        functools.partial(
            sharpness_aware, scale_to_norm(0.9), optax.inject_hyperparams(saner_jax.downweight)(alpha=1.0)
        ),
        lambda g, h: h,
    ),
}


@pytest.mark.parametrize("name", MONITORED)
def test_monitored_scalars(name):
    make, enters = MONITORED[name]
    updates, state, (point,) = take(make(monitor=True))
    g, h, eps = flat(grad_fn(PARAMS)), flat(grad_fn(point)), flat(point) - flat(PARAMS)
    ratio = enters(g, h) / g
    mask = (ratio > 0) & (ratio < 1)
    monitored = state.monitored
    np.testing.assert_allclose(monitored.downweighted_share, mask.mean(), rtol=1e-6)
    sizes = [leaf.size for leaf in jax.tree.leaves(PARAMS)]
    per_leaf = [part.mean() for part in np.split(mask, np.cumsum(sizes)[:-1])]
    np.testing.assert_allclose(monitored.downweighted_share_per_leaf, per_leaf, rtol=1e-6)
    np.testing.assert_allclose(monitored.cosine, g @ h / np.linalg.norm(g) / np.linalg.norm(h), rtol=1e-5)
    np.testing.assert_allclose(monitored.gradient_norm, np.linalg.norm(g), rtol=1e-6)
    np.testing.assert_allclose(monitored.perturbed_gradient_norm, np.linalg.norm(h), rtol=1e-6)
    np.testing.assert_allclose(monitored.perturbation_norm, np.linalg.norm(eps), rtol=1e-5)
    without, _, _ = take(make())
    np.testing.assert_array_equal(flat(updates), flat(without))


def test_the_cases_above_have_both_kinds_of_elements():
    shares = {take(make(monitor=True))[1].monitored.downweighted_share.item() for make, _ in MONITORED.values()}
    assert min(shares) > 0
    assert max(shares) == 1 or len(shares) > 1
    assert take(saner_jax.saner(0.9, monitor=True))[1].monitored.downweighted_share < 1


def test_monitored_scalars_of_a_zero_gradient():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    _, state, _ = take(saner_jax.saner(monitor=True), grad_fn=lambda w: zeros)
    np.testing.assert_array_equal(flat(state.monitored), 0)


def test_monitored_scalars_of_a_gradient_that_is_not_finite():
    _, state, _ = take(saner_jax.saner(monitor=True), grad_fn=lambda w: jax.tree.map(lambda x: x * jnp.nan, w))
    assert jnp.isnan(state.monitored.cosine)
    assert jnp.isnan(state.monitored.gradient_norm)


def test_monitored_norm_under_axis_name_is_the_mean_over_groups():
    groups = {"a": jnp.array([[3.0, 0.0], [0.0, 1.0]])}
    tx = saner_jax.saner(rho=lambda step: 0.5, axis_name="groups", monitor=True)
    params = {"a": jnp.zeros(2)}

    @functools.partial(jax.vmap, in_axes=(0,), out_axes=None, axis_name="groups")
    def step(g):
        _, state = tx.update(g, tx.init(params), params, grad_fn=lambda w: g)
        return state.monitored

    monitored = step(groups)
    np.testing.assert_allclose(monitored.perturbation_norm, 0.5, rtol=1e-6)
    np.testing.assert_allclose(monitored.gradient_norm, np.linalg.norm([1.5, 0.5]), rtol=1e-6)


def test_without_monitor_the_state_holds_nothing_and_nothing_is_computed():
    """As many operations on whole leaves as in SAM written by hand, with a norm that does not overflow."""
    params = jnp.ones((5, 7))

    def sam_by_hand(g, w):
        scale = 1 / jnp.max(jnp.abs(g))
        norm = jnp.sqrt(jnp.sum(jnp.square(g * scale)))
        return jnp.cos(w + (g * scale) * (0.1 / norm))

    def count(jaxpr):
        """Equations that make an array of the leaf's shape; in place of a call, those of what it calls."""
        inner = [eqn.params["jaxpr"].jaxpr for eqn in jaxpr.eqns if "jaxpr" in eqn.params]
        own = [eqn for eqn in jaxpr.eqns if "jaxpr" not in eqn.params and eqn.outvars[0].aval.shape == (5, 7)]
        return len(own) + sum(map(count, inner))

    def operations(function):
        return count(jax.make_jaxpr(function)(params, params).jaxpr)

    def ours(g, w, **keywords):
        tx = saner_jax.sam(rho=0.1, **keywords)
        return tx.update(g, tx.init(w), w, grad_fn=jnp.cos)

    assert saner_jax.sam().init(params).monitored is None
    assert operations(ours) == operations(sam_by_hand)
    assert operations(functools.partial(ours, monitor=True)) > operations(sam_by_hand)
