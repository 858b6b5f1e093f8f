"""Stages behind other stages and within Optax's wrappers: what they see, keep and return is what they would alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import saner_jax
from saner_jax import downweight, scale_to_norm, sharpness_aware

PARAMS = {"a": {"k": jnp.array([[1.0, 2.0], [-1.0, 0.3]]), "b": jnp.array([0.5, -2.0])}, "c": jnp.array([3.0, 0.1])}
LABELS = {"a": "first", "c": "second"}


def grad_fn(w):
    total = optax.tree.sum(w)
    return jax.tree.map(lambda x: jnp.cos(3 * x) + 0.1 * total, w)


def gradients(steps=3):
    rng = np.random.default_rng(5)
    return [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), PARAMS) for _ in range(steps)]


def take(tx, steps=2):
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        params = optax.apply_updates(params, jax.tree.map(lambda u: -0.1 * u, updates))
    return updates, state


def assert_close(actual, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), actual, expected)


def averages(**values):
    return {"subtract_ema": saner_jax.subtract_ema(**values), "follow_ema": saner_jax.follow_ema(0.5)}


# -- behind other stages -----------------------------------------------------------------------------------------------

ASCENTS = {
    "clipped by norm": lambda stage: optax.chain(optax.clip_by_global_norm(0.5), stage),
    "signed": lambda stage: optax.chain(optax.scale_by_sign(), stage),
    "behind momentum": lambda stage: optax.chain(optax.trace(0.5), stage),
    "behind its own kind": lambda stage: optax.chain(saner_jax.follow_ema(0.3), saner_jax.subtract_ema(0.5), stage),
    "named": lambda stage: optax.named_chain(("scaled", optax.scale(-2.0)), ("stage", stage)),
    "masked": lambda stage: optax.chain(optax.scale(3.0), optax.masked(stage, {"a": True, "c": False})),
    "partition": lambda stage: optax.chain(
        optax.scale(3.0), optax.partition({"first": stage, "second": optax.scale(2.0)}, LABELS)
    ),
    "in a cond": lambda stage: optax.chain(
        optax.scale(2.0), optax.conditionally_transform(stage, lambda step: step > 0)
    ),
    "behind a norm": lambda stage: optax.chain(scale_to_norm(0.7), stage),
}


@pytest.mark.parametrize("stage", averages())
@pytest.mark.parametrize("name", ASCENTS)
def test_an_ascent_stage_has_the_state_it_has_outside(name, stage):
    inside = sharpness_aware(ASCENTS[name](averages()[stage]))
    outside = ASCENTS[name](averages()[stage])
    inner, outer = inside.init(PARAMS), outside.init(PARAMS)
    for g in gradients():
        _, inner = inside.update(g, inner, PARAMS, grad_fn=grad_fn)
        _, outer = outside.update(g, outer, PARAMS)
    assert_close(inner.ascent, outer)


@pytest.mark.parametrize("stage", averages())
def test_groups_share_the_average_of_what_enters_the_stage(stage):
    """Behind a clip by norm of each group's own gradient, the mean is that of the clipped gradients."""
    clip = optax.clip_by_global_norm(0.5)
    tx = sharpness_aware(optax.chain(clip, averages(decay=0.5)[stage], scale_to_norm(0.1)), axis_name="groups")
    groups = [gradients(6)[i : i + 3] for i in (0, 3)]

    @functools.partial(jax.vmap, in_axes=(0, None), out_axes=None, axis_name="groups")
    def step(g, state):
        return tx.update(g, state, PARAMS, grad_fn=lambda w: g)[1]

    state, expected = tx.init(PARAMS), None
    for pair in zip(*groups, strict=True):
        state = step(jax.tree.map(lambda *leaves: jnp.stack(leaves), *pair), state)
        clipped = [clip.update(g, clip.init(PARAMS))[0] for g in pair]
        mean = jax.tree.map(lambda *leaves: sum(leaves) / 2, *clipped)
        expected = mean if expected is None else jax.tree.map(lambda m, x: 0.5 * m + 0.5 * x, expected, mean)
    assert_close(optax.tree.get(state, "ema"), expected)


# -- cut to some leaves ------------------------------------------------------------------------------------------------

DESCENTS = {
    "downweight": lambda alpha: downweight(alpha),
    "downweight elsewhere": lambda alpha: downweight(alpha, where=saner_jax.is_turned),
    "downweight_random": lambda alpha: saner_jax.downweight_random(alpha, seed=2),
    "masked by its own mask": lambda alpha: downweight(alpha, mask={"a": {"k": True, "b": False}, "c": True}),
    "restore": lambda alpha: saner_jax.restore_downweighted(),
    "subtract_orthogonal": lambda alpha: saner_jax.subtract_orthogonal(alpha),
    "observe": lambda alpha: saner_jax.observe_gradients(),
    "chain": lambda alpha: optax.chain(saner_jax.subtract_orthogonal(0.1), downweight(alpha)),
    "injected": lambda alpha: optax.inject_hyperparams(downweight)(alpha=alpha),
}


def on_leaves(stage, h, g, params):
    """What the stage makes of a tree by itself."""
    return stage.update(h, stage.init(params), params, unperturbed_grads=g)[0]


@pytest.mark.parametrize("name", DESCENTS)
@pytest.mark.parametrize("wrapper", ["partition", "masked", "masked deep"])
def test_a_descent_stage_on_some_leaves(name, wrapper):
    g, h = gradients(2)
    make = DESCENTS[name]
    if wrapper == "partition":
        tx = optax.partition({"first": make(0.9), "second": make(0.2)}, LABELS)
        parts = {"a": (0.9, PARAMS["a"]), "c": (0.2, PARAMS["c"])}
    elif wrapper == "masked":
        tx = optax.masked(make(0.9), {"a": True, "c": False})
        parts = {"a": (0.9, PARAMS["a"])}
    else:
        tx = optax.masked(make(0.9), {"a": {"k": True, "b": True}, "c": False})
        parts = {"a": (0.9, PARAMS["a"])}
    whole = sharpness_aware(optax.scale(0.0), tx)
    updates, _ = whole.update(g, whole.init(PARAMS), PARAMS, grad_fn=lambda w: h)
    expected = dict(h)
    if name == "masked by its own mask":
        return  # Its mask is one of the whole tree; the next test is about it.
    for key, (alpha, params) in parts.items():
        expected[key] = on_leaves(make(alpha), {key: h[key]}, {key: g[key]}, {key: params})[key]
    if name != "downweight_random":  # Keys are drawn for the leaves that a stage sees.
        assert_close(updates, expected)
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)
    if wrapper != "partition":
        assert_close(updates["c"], h["c"])


def test_a_mask_of_the_whole_tree_within_masked_stages():
    """Also where ``optax.masked`` cut a branch above the leaves that the mask names."""
    g, h = gradients(2)
    mask = {"a": {"k": True, "b": False}, "c": True}
    for outer in ({"a": False, "c": True}, {"a": True, "c": False}, {"a": {"k": False, "b": True}, "c": True}):
        tx = sharpness_aware(optax.scale(0.0), optax.masked(downweight(1.0, mask=mask), outer))
        updates, _ = tx.update(g, tx.init(PARAMS), PARAMS, grad_fn=lambda w: h)
        full = on_leaves(downweight(1.0), h, g, PARAMS)
        outer = jax.tree.map(lambda keep, tree: jax.tree.map(lambda _: keep, tree), outer, PARAMS)
        expected = jax.tree.map(lambda o, m, f, h: f if o and m else h, outer, mask, full, h)
        assert_close(updates, expected)


@pytest.mark.parametrize("rho", [0.3, 0.7])
def test_adaptive_norm_within_partition(rho):
    stages = {"first": saner_jax.scale_to_adaptive_norm(rho), "second": scale_to_norm(0.1)}
    tx = sharpness_aware(optax.partition(stages, LABELS))
    points = []

    def recording(w):
        points.append(w)
        return grad_fn(w)

    g = grad_fn(PARAMS)
    tx.update(g, tx.init(PARAMS), PARAMS, grad_fn=recording)
    stage = saner_jax.scale_to_adaptive_norm(rho)
    eps, _ = stage.update(g["a"], stage.init(PARAMS["a"]), PARAMS["a"])
    assert_close(optax.tree.sub(points[0]["a"], PARAMS["a"]), eps)
    np.testing.assert_allclose(np.linalg.norm(points[0]["c"] - PARAMS["c"]), 0.1, rtol=1e-5)


def test_observation_of_some_leaves():
    observe = saner_jax.observe_gradients()
    tx = sharpness_aware(scale_to_norm(0.9), optax.masked(observe, {"a": True, "c": False}))
    whole = sharpness_aware(scale_to_norm(0.9), observe)
    cut, all_of_it = take(tx, 1)[1].monitored, take(whole, 1)[1].monitored
    np.testing.assert_allclose(cut.downweighted_share_per_leaf, all_of_it.downweighted_share_per_leaf[:2])
    np.testing.assert_allclose(cut.perturbation_norm, all_of_it.perturbation_norm)
    np.testing.assert_allclose(cut.gradient_norm, optax.tree.norm(grad_fn(PARAMS)["a"]), rtol=1e-6)


def test_flattened_stages():
    """``optax.flatten`` hands a stage another tree: an average works on any, a comparison with ``g`` is refused."""
    take(sharpness_aware(optax.chain(optax.flatten(saner_jax.follow_ema()), scale_to_norm(0.1))))
    with pytest.raises(ValueError, match="unperturbed_grads must have the structure of the gradient"):
        take(sharpness_aware(scale_to_norm(0.1), optax.flatten(downweight(0.5))))


def test_accumulation_of_a_stage_is_refused():
    steps = optax.MultiSteps(downweight(0.5), 2)
    with pytest.raises(TypeError, match="descent stage 0 must be an Optax transformation"):
        sharpness_aware(scale_to_norm(0.1), steps)
    with pytest.raises(ValueError, match="drops extra arguments"):
        take(sharpness_aware(scale_to_norm(0.1), optax.MultiSteps(downweight(0.5), 1).gradient_transformation()))


# -- masks that can be called ------------------------------------------------------------------------------------------


@functools.partial(jax.tree_util.register_dataclass, data_fields=["kernel", "bias"], meta_fields=["activation"])
@dataclasses.dataclass
class Layer:
    """A model that is a tree and a function, as those of Equinox and NNX are, with a function among its metadata."""

    kernel: jax.Array
    bias: jax.Array
    activation: object = jnp.tanh

    def __call__(self, x):
        return self.activation(x @ self.kernel + self.bias)


MODEL = {"in": Layer(jnp.ones((2, 3)), jnp.zeros(3)), "out": Layer(jnp.full((3, 1), 0.5), jnp.ones(1))}
KERNELS = jax.tree.map(lambda p: p.ndim > 1, MODEL)
MASKED = {
    "perturb_mask": lambda mask: saner_jax.sam(0.1, perturb_mask=mask),
    "adaptive_mask": lambda mask: saner_jax.asam(0.1, adaptive_mask=mask),
    "downweight": lambda mask: saner_jax.sam(0.1, reweight=downweight(0.5, mask=mask)),
    "random": lambda mask: saner_jax.sam(0.1, reweight=saner_jax.downweight_random(0.5, mask=mask)),
    "restore": lambda mask: saner_jax.sam(0.1, reweight=saner_jax.restore_downweighted(mask=mask)),
}


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("part", ["whole", "in", "prefix"])
def test_a_tree_of_bools_is_a_tree_whatever_else_it_is(name, part):
    model = MODEL if part != "in" else MODEL["in"]
    mask = {"whole": KERNELS, "in": KERNELS["in"], "prefix": {"in": KERNELS["in"], "out": False}}[part]
    function = {
        "whole": lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        "in": lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        "prefix": lambda params: {"in": jax.tree.map(lambda p: p.ndim > 1, params["in"]), "out": False},
    }[part]

    def gradient(model):
        return jax.tree.map(lambda p: jnp.sin(3 * p), model)

    for given in (mask, function, jax.tree_util.Partial(function)):
        tx = MASKED[name](given)
        updates, _ = tx.update(gradient(model), tx.init(model), model, grad_fn=gradient)
        if given is mask:
            expected = updates
        assert_close(updates, expected)


def test_params_in_place_of_a_mask():
    with pytest.raises(TypeError, match=r"perturb_mask must hold Python bools, got .*kernel"):
        tx = saner_jax.sam(perturb_mask=MODEL["in"])
        tx.update(MODEL["in"], tx.init(MODEL["in"]), MODEL["in"], grad_fn=lambda w: w)


# -- derivatives and cost ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [saner_jax.scale_to_norm, saner_jax.scale_to_adaptive_norm])
@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_derivative_with_respect_to_rho(make, rho):
    """Of the formula, also at 0."""

    def projected(rho):
        stage = make(rho)
        eps, _ = stage.update(PARAMS, stage.init(PARAMS), PARAMS)
        return sum(jnp.sum(x * jnp.cos(p)) for x, p in zip(*map(jax.tree.leaves, (eps, PARAMS)), strict=True))

    expected = projected(1.0)
    np.testing.assert_allclose(jax.grad(projected)(rho), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jvp(projected, (rho,), (1.0,))[1], expected, rtol=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-25, 1.0, 1e25])
def test_reverse_mode_through_the_norm(size):
    g = jnp.array([3.0, -4.0]) * size

    def projected(g):
        stage = scale_to_norm(0.5)
        return stage.update(g, stage.init(g), g)[0] @ jnp.array([1.0, 1.0])

    unit = np.array([0.6, -0.8]) if size else np.zeros(2)
    expected = 0.5 * (np.ones(2) - unit * np.sum(unit)) / (5 * size) if size else np.zeros(2)
    np.testing.assert_allclose(jax.grad(projected)(g), expected, rtol=1e-4)


def temporary_trees(make):
    """Temporary memory of a compiled step of a network, in copies of its parameters."""
    width = 256
    params = {f"layer{i}": {"kernel": jnp.full((width, width), 0.01), "bias": jnp.zeros(width)} for i in range(8)}
    tx, x = make(), jnp.ones((2, width))

    def loss(params):
        out = x
        for layer in params.values():
            out = jnp.tanh(out @ layer["kernel"] + layer["bias"])
        return jnp.mean(out**2)

    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params, grad_fn=jax.grad(loss))
        return jax.tree.map(lambda p, u: p - 0.1 * u, params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params)).compile()
    return compiled.memory_analysis().temp_size_in_bytes / sum(leaf.nbytes for leaf in jax.tree.leaves(params))


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="the compiler of older releases keeps a tree more")
@pytest.mark.parametrize(
    ("make", "trees"),
    [
        (lambda: saner_jax.sam(), 1),
        (lambda: saner_jax.asam(), 1),
        (lambda: saner_jax.saner(), 2),
        (lambda: saner_jax.gsam(), 2),
        (lambda: saner_jax.sam(monitor=True), 2),
        (lambda: saner_jax.saner(monitor=True), 2),
        (lambda: saner_jax.gsam(monitor=True), 3),
    ],
    ids=["sam", "asam", "saner", "gsam", "sam, monitored", "saner, monitored", "gsam, monitored"],
)
def test_no_tree_is_kept_beside_the_gradients(make, trees):
    """SAM keeps one gradient at a time; what compares the two, or observes them, keeps both; a leaf more is room."""
    assert temporary_trees(make) < trees + 0.3
