"""Updates without a second gradient: what is kept of the last one, and what the stages are handed in its place.

That every method then equals its float64 reference is tested with the methods, that the state of a step with both
gradients keeps its types and places with the contract.
"""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import saner_jax
from saner_jax import downweight, sharpness_aware

pytestmark = pytest.mark.usefixtures("quick_compile")

METHODS = {
    "sam": functools.partial(saner_jax.sam, 0.4),
    "asam": functools.partial(saner_jax.asam, 0.6),
    "gsam": functools.partial(saner_jax.gsam, 0.4, 0.3),
    "fsam": functools.partial(saner_jax.fsam, 0.4, reweight=downweight(0.5)),
    "vasso": functools.partial(saner_jax.vasso, 0.4, 0.3, monitor=True),
    "saner": functools.partial(saner_jax.saner, saner_jax.alpha_ramp(0.4, 3), saner_jax.alpha_ramp(0.5, 3)),
    "sgd_d": functools.partial(saner_jax.sgd_d, 0.4),
    "wrapper": functools.partial(sharpness_aware, saner_jax.scale_to_norm(0.4), downweight(0.5)),
}
each_method = pytest.mark.parametrize("name", METHODS)


def make_params(dtype="float32"):
    rng = np.random.default_rng(3)
    tree = {"layer": {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)}, "scale": rng.normal()}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def gradient(params, shift=0.0):
    """Every element depends on all, and the sign of the whole on the shift."""
    total = sum(jnp.sum(x).astype("float32") for x in jax.tree.leaves(params))
    return jax.tree.map(lambda x: jnp.cos(3 * x + (0.1 * total + shift).astype(x.dtype)), params)


def update(tx, params, state, second, shift=0.0):
    grad_fn = functools.partial(gradient, shift=shift)
    return tx.update(grad_fn(params), state, params, grad_fn=grad_fn if second else None)


def follow(tx, params, state, seconds, step=update):
    """Updates of a step each, at params that move."""
    updates = []
    for number, second in enumerate(seconds):
        one, state = step(tx, params, state, second, 0.5 * number)
        params = jax.tree.map(lambda p, u: (p - 0.1 * u).astype(p.dtype), params, one)
        updates.append(one)
    return updates, state


def vector(tree):
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])


def specs(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def after_one(tx, params=None):
    params = make_params() if params is None else params
    return update(tx, params, tx.init(params), second=True)[1]


@each_method
@pytest.mark.parametrize("reuse", [True, "bfloat16"])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_with_every_second_gradient_it_is_the_method_bit_for_bit(name, reuse, jit):
    outcomes = []
    for tx in (METHODS[name](), METHODS[name](reuse=reuse)):
        step = jax.jit(update, static_argnums=(0, 3)) if jit else update
        updates, state = follow(tx, make_params(), tx.init(make_params()), [True] * 3, step)
        outcomes.append((updates, state.ascent, state.descent))
    chex.assert_trees_all_equal(*outcomes)


@each_method
def test_before_any_second_gradient_it_descends_on_the_first(name):
    """As the descent stages make of ``h = g``, of which SANER's mask has no element."""
    tx = METHODS[name](reuse=True)
    params = make_params()
    updates, state = update(tx, params, tx.init(params), second=False)
    # GSAM divides by ||g||^2 to find that nothing of g is orthogonal to g.
    chex.assert_trees_all_close(updates, gradient(params), rtol=1e-6 if name == "gsam" else 0)
    assert not vector(state.kept).any()


def test_the_estimate_and_what_is_kept():
    records = []

    def record(updates, state, params=None, **extra_args):
        records.append((updates, extra_args))
        return updates, state

    stage = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), record)
    tx = sharpness_aware(saner_jax.scale_to_norm(0.4), stage, reuse=True)
    params = make_params()
    _, state = update(tx, params, tx.init(params), second=True)
    g, h = vector(gradient(params)), vector(records[0][0])
    part = h - (g @ h) / (g @ g) * g
    assert np.linalg.norm(part) > 0.1 * np.linalg.norm(g)
    np.testing.assert_allclose(vector(state.kept.direction), part / np.linalg.norm(part), atol=1e-6)
    np.testing.assert_allclose(state.kept.ratio, np.linalg.norm(part) / np.linalg.norm(g), rtol=1e-5)

    moved = jax.tree.map(lambda p: 1.1 * p, params)
    _, later = update(tx, moved, state, second=False, shift=2.0)
    g = vector(gradient(moved, 2.0))
    expected = g + np.linalg.norm(g) * float(state.kept.ratio) * vector(state.kept.direction)
    handed, extra_args = records[1]
    np.testing.assert_allclose(vector(handed), expected, atol=1e-6)
    np.testing.assert_array_equal(vector(extra_args["perturbed_grads"]), vector(handed))
    np.testing.assert_array_equal(vector(extra_args["unperturbed_grads"]), g)
    assert "perturbation_norm" not in extra_args
    chex.assert_trees_all_equal(later.kept, state.kept)


@each_method
def test_schedules_and_averages_see_every_step(name):
    tx, all_second = METHODS[name](reuse=True), METHODS[name]()
    params = make_params()
    state, expected = tx.init(params), all_second.init(params)
    for number in range(4):
        _, state = update(tx, params, state, number == 0, shift=number)
        _, expected = update(all_second, params, expected, second=True, shift=number)
    chex.assert_trees_all_close(state.ascent, expected.ascent)


def test_what_is_observed_of_an_estimate():
    tx = saner_jax.saner(0.4, 0.5, monitor=True, reuse=True)
    params = make_params()
    state = after_one(tx)
    first = state.monitored
    _, state = update(tx, params, state, second=False, shift=1.0)
    g = vector(gradient(params, 1.0))
    h = g + np.linalg.norm(g) * float(state.kept.ratio) * vector(state.kept.direction)
    seen = state.monitored
    np.testing.assert_allclose(seen.downweighted_share, np.mean((h / g > 0) & (h / g < 1)), rtol=1e-6)
    assert 0 < seen.downweighted_share < 1
    np.testing.assert_allclose(seen.gradient_norm, np.linalg.norm(g), rtol=1e-6)
    np.testing.assert_allclose(seen.perturbed_gradient_norm, np.linalg.norm(h), rtol=1e-6)
    np.testing.assert_allclose(seen.cosine, g @ h / np.linalg.norm(g) / np.linalg.norm(h), rtol=1e-6)
    # That of the last perturbation, since this step had none.
    np.testing.assert_allclose(seen.perturbation_norm, 0.4, rtol=1e-5)
    assert seen.perturbation_norm == first.perturbation_norm


# -- types -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vasso", "saner", "gsam"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("reuse", [True, "float32", "bfloat16"])
def test_types_never_change(name, dtype, reuse):
    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("strict"):
        params = make_params(dtype)
        tx = METHODS[name](reuse=reuse)
        state = tx.init(params)
        kept = {"float64": "float64"}.get(dtype, "float32") if reuse is True else reuse
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state.kept.direction)} == {kept}
        for second in (True, False):
            grads = jax.tree.map(jnp.cos, params)
            grad_fn = functools.partial(jax.tree.map, jnp.sin) if second else None
            updates, new_state = jax.eval_shape(functools.partial(tx.update, grad_fn=grad_fn), grads, state, params)
            assert specs(updates) == specs(params)
            assert specs(new_state) == specs(state)
            assert not any(leaf.weak_type for leaf in jax.tree.leaves((updates, new_state)))


def test_mixed_types():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        params = make_params()
        params["layer"]["bias"] = params["layer"]["bias"].astype("float64")
        params["scale"] = params["scale"].astype("bfloat16")
        tx = saner_jax.saner(0.4, 0.0, reuse=True)
        g = jax.tree.map(jnp.cos, params)
        _, state = tx.update(g, tx.init(params), params, grad_fn=functools.partial(jax.tree.map, jnp.sin))
        updates, later = tx.update(g, state, params)
        assert specs(updates) == specs(params)
        assert specs(later) == specs(state)
        np.testing.assert_allclose(np.linalg.norm(vector(state.kept.direction)), 1, rtol=1e-6)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state.kept.direction)} == {"float32", "float64"}


def test_bfloat16_gradients_lose_nothing_of_the_mask():
    """The estimate is compared with g in float32: which elements shrank is told by the signs of ``v``."""
    params = make_params("bfloat16")
    tx = saner_jax.saner(0.01, 1.0, monitor=True, reuse=True)
    state = after_one(tx, params)
    _, later = update(tx, params, state, second=False)
    g, v, q = vector(gradient(params)), vector(state.kept.direction), float(state.kept.ratio)
    shrunk = (g * v < 0) & (np.abs(g) > q * np.linalg.norm(g) * np.abs(v))
    np.testing.assert_allclose(later.monitored.downweighted_share, shrunk.mean(), rtol=1e-6)
    assert shrunk.any()


def test_a_direction_in_bfloat16_has_the_same_mask():
    params = make_params()
    steps = []
    for reuse in ("float32", "bfloat16"):
        tx = saner_jax.saner(0.4, 1.0, reuse=reuse)
        steps.append(vector(update(tx, params, after_one(tx), second=False, shift=1.0)[0]))
    exact, rounded = steps
    np.testing.assert_array_equal(exact == 0, rounded == 0)
    assert 0 < np.mean(exact == 0) < 1
    np.testing.assert_allclose(rounded, exact, atol=2**-8 * np.abs(exact).max())
    assert not np.array_equal(rounded, exact)


# -- values at the edge ------------------------------------------------------------------------------------------------


def on_vectors(g, h, later, dtype=np.float32):
    """State after a step on ``g`` and ``h``, and the update of the next step on ``later`` alone."""
    tx = saner_jax.sam(0.1, reuse=True)
    g, h, later = (jnp.asarray(x, dtype) for x in (g, h, later))
    params = jnp.ones_like(g)
    _, state = tx.update(g, tx.init(params), params, grad_fn=lambda w: h)
    return state, tx.update(later, state, params)[0]


G, H, LATER = np.array([3.0, -1.0, 2.0]), np.array([1.0, 2.0, 2.5]), np.array([-1.0, 4.0, 0.5])


@pytest.mark.parametrize("power", [-110, -60, 60, 110])
def test_scaled_gradients_give_scaled_estimates(power):
    """Where squares would overflow or vanish in float32; a power of two rounds nothing."""
    state, expected = on_vectors(G, H, LATER)
    scaled, update = on_vectors(G * 2.0**power, H * 2.0**power, LATER * 2.0**power)
    chex.assert_trees_all_equal(scaled.kept, state.kept)
    np.testing.assert_array_equal(update, np.asarray(expected) * 2.0**power)


@pytest.mark.parametrize("power", [-60, 60])
def test_gradients_of_very_different_size(power):
    """A second gradient far larger or smaller than the first: so is the estimate, and nothing overflows on the way."""
    state, update = on_vectors(G, H * 2.0**power, LATER)
    part = (H - (G @ H) / (G @ G) * G) * 2.0**power
    np.testing.assert_allclose(state.kept.ratio, np.linalg.norm(part) / np.linalg.norm(G), rtol=1e-5)
    estimate = LATER + np.linalg.norm(LATER) / np.linalg.norm(G) * part
    np.testing.assert_allclose(update, estimate, rtol=1e-4)


@pytest.mark.parametrize(
    "g, h, later",
    [(0 * G, 0 * H, LATER), (0 * G, H, LATER), (G, 0 * H, LATER), (G, G, LATER), (G, H, 0 * LATER), (G, -2 * G, 0 * G)],
    ids=["no gradient", "no first", "no second", "two alike", "none later", "two opposed"],
)
def test_zero_gradients_are_finite(g, h, later):
    state, update = on_vectors(g, h, later)
    chex.assert_tree_all_finite((state, update))
    if not later.any():
        np.testing.assert_array_equal(update, 0)
    if not g.any() or not np.cross(g, h).any():  # Nothing across, but for rounding.
        np.testing.assert_allclose(update, later, rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["first", "second", "later"])
@pytest.mark.parametrize("reuse", [True, "bfloat16"])
def test_what_is_not_finite_is_never_turned_finite(value, which, reuse):
    tx = saner_jax.saner(0.1, 0.5, reuse=reuse)
    bad = jnp.asarray(G, jnp.float32).at[1].set(value)
    g, h, later = (bad if name == which else jnp.asarray(x, jnp.float32) for name, x in zip(
        ("first", "second", "later"), (G, H, LATER), strict=True
    ))  # fmt: skip
    params = jnp.ones(3)
    _, state = tx.update(g, tx.init(params), params, grad_fn=lambda w: h)
    updates, _ = tx.update(later, state, params)
    assert not jnp.isfinite(updates[1])
    # A second gradient that is finite again ends it.
    good = jnp.asarray(LATER, jnp.float32)
    _, state = tx.update(good, state, params, grad_fn=lambda w: jnp.asarray(H, jnp.float32))
    chex.assert_tree_all_finite(tx.update(good, state, params))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_first_step_alone_that_is_not_finite(value):
    tx = saner_jax.saner(0.1, 0.5, reuse=True)
    bad = jnp.asarray(G, jnp.float32).at[1].set(value)
    updates, _ = tx.update(bad, tx.init(bad), jnp.ones(3))
    assert not jnp.isfinite(updates[1])


@pytest.mark.parametrize("params", [{}, (), np.float32(0.5), {"w": np.zeros((0, 3), np.float32)}], ids=str)
def test_small_trees(params):
    tx = saner_jax.fsam(0.1, reweight=downweight(0.5), monitor=True, reuse=True)
    state = tx.init(params)
    for second in (False, True, False):
        grad_fn = functools.partial(jax.tree.map, jnp.cos)
        updates, new_state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn if second else None)
        assert specs(new_state) == specs(state)
        state = new_state
        chex.assert_tree_all_finite((updates, state))


# -- loops, devices, groups --------------------------------------------------------------------------------------------

PATTERN = [True, False, False] * 2


def train(tx, params, state, second, shift):
    updates, state = update(tx, params, state, second, shift)
    return jax.tree.map(lambda p, u: p - 0.1 * u, params, updates), state


def looped(tx, params):
    """Two compiled steps in turn, each of which is given the buffers of the last one."""
    steps = {second: jax.jit(functools.partial(train, tx, second=second), donate_argnums=(0, 1)) for second in PATTERN}
    carry = params, tx.init(params)
    for number, second in enumerate(PATTERN):
        donated = carry
        carry = steps[second](*donated, shift=jnp.float32(number))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated[0]))
    return carry


@each_method
def test_a_scan_over_blocks_is_the_loop_over_two_compiled_steps(name):
    tx = METHODS[name](reuse=True)

    @jax.jit
    def scanned(params):
        def block(carry, numbers):
            carry = train(tx, *carry, True, numbers[0])

            def alone(carry, number):
                return train(tx, *carry, False, number), None

            return jax.lax.scan(alone, carry, numbers[1:])[0], None

        numbers = jnp.arange(float(len(PATTERN))).reshape(-1, 3)
        return jax.lax.scan(block, (params, tx.init(params)), numbers)[0]

    actual, expected = scanned(make_params()), looped(tx, make_params())
    chex.assert_trees_all_close(actual, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["saner", "gsam", "fsam"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["automatic", "explicit"])
def test_sharded_parameters(name, kind):
    """The direction lies as the parameters do, on both kinds of steps, and norms are of the whole."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))
    tx = METHODS[name](reuse=True)
    with jax.set_mesh(mesh):
        split = {"layer": {"kernel": P("x"), "bias": P()}, "scale": P()}

        def place(tree):
            return jax.tree.map(lambda p, spec: jax.device_put(p, NamedSharding(mesh, spec)), tree, split)

        def grad_fn(w, shift):
            return jax.tree.map(lambda x: jnp.cos(3 * x + shift), w)

        def step(params, state, second, shift):
            h = functools.partial(grad_fn, shift=shift)
            updates, state = tx.update(h(params), state, params, grad_fn=h if second else None)
            return jax.tree.map(lambda p, u: p - 0.1 * u, params, updates), state

        params = place(make_params())
        carry, alone = (params, tx.init(params)), (make_params(), tx.init(make_params()))
        jitted = jax.jit(step, static_argnums=2)
        for number, second in enumerate(PATTERN):
            new = jitted(*carry, second, jnp.float32(number))
            if kind is AxisType.Explicit:
                assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, carry)
            carry = new
            for v, p in zip(jax.tree.leaves(carry[1].kept.direction), jax.tree.leaves(params), strict=True):
                assert v.sharding.is_equivalent_to(p.sharding, v.ndim)
    for number, second in enumerate(PATTERN):
        alone = step(*alone, second, jnp.float32(number))
    chex.assert_trees_all_close(jax.device_get(carry), jax.device_get(alone), atol=1e-5)


def test_groups_share_what_is_kept():
    """Under ``axis_name`` it is made of the averages, and the estimate as well: a single group with both averages."""
    shifts = jnp.array([0.0, 0.7, 1.9])
    tx, params = saner_jax.saner(0.4, 0.5, axis_name="groups", monitor=True, reuse=True), make_params()

    def step(params, state, shift, second):
        return update(tx, params, state, second, shift)

    def over_groups(second):
        return jax.vmap(
            functools.partial(step, second=second), in_axes=(None, None, 0), out_axes=None, axis_name="groups"
        )

    _, state = over_groups(True)(params, tx.init(params), shifts)
    updates, later = over_groups(False)(params, state, shifts)

    g = np.mean([vector(gradient(params, s)) for s in shifts], axis=0)
    points = [vector(gradient(params, s)) for s in shifts]
    eps = [0.4 * x / np.linalg.norm(x) for x in points]
    treedef, sizes = jax.tree.structure(params), [leaf.size for leaf in jax.tree.leaves(params)]

    def tree(flat):
        parts = np.split(flat, np.cumsum(sizes)[:-1])
        leaves = [jnp.asarray(x.reshape(p.shape), p.dtype) for x, p in zip(parts, jax.tree.leaves(params), strict=True)]
        return jax.tree.unflatten(treedef, leaves)

    h = np.mean([vector(gradient(tree(vector(params) + e), s)) for e, s in zip(eps, shifts, strict=True)], axis=0)
    part = h - (g @ h) / (g @ g) * g
    estimate = g + np.linalg.norm(g) * np.linalg.norm(part) / np.linalg.norm(g) * part / np.linalg.norm(part)
    shrunk = (estimate / g > 0) & (estimate / g < 1)
    np.testing.assert_allclose(vector(updates), np.where(shrunk, 0.5 * estimate, estimate), atol=1e-5)
    assert shrunk.any()
    np.testing.assert_allclose(later.monitored.perturbation_norm, 0.4, rtol=1e-5)


@pytest.mark.parametrize("varying", ["params", "gradients"])
def test_scan_in_shard_map_carries_the_state(varying):
    mesh = Mesh(np.array(jax.devices()[:2]), ("axis",))
    axis_name = "axis" if varying == "gradients" else None
    tx = saner_jax.fsam(0.4, reweight=downweight(0.5), monitor=True, axis_name=axis_name, reuse=True)

    def scanned(shift):
        params = make_params()
        if varying == "params":
            params = jax.tree.map(lambda p: p + shift[0].astype(p.dtype), params)

        def block(carry, _):
            for second in (True, False):
                carry = train(tx, *carry, second, shift[0])
            return carry, None

        params, _ = jax.lax.scan(block, (params, tx.init(params)), length=2)[0]
        return jax.tree.map(lambda p: p[None], params) if varying == "params" else params

    out = P("axis") if varying == "params" else P()
    jax.eval_shape(jax.shard_map(scanned, mesh=mesh, in_specs=P("axis"), out_specs=out), jnp.arange(2.0))


def test_masked_and_partitioned_stages_act_on_the_estimate():
    params = make_params()
    kernels = {"layer": {"kernel": True, "bias": False}, "scale": False}
    labels = {"layer": {"kernel": "damped", "bias": "left"}, "scale": "left"}
    stages = [
        downweight(0.5, mask=kernels),
        optax.masked(downweight(0.5), kernels),
        optax.partition({"damped": downweight(0.5), "left": optax.identity()}, labels),
    ]
    outcomes = []
    for stage in stages:
        tx = saner_jax.sam(0.4, reweight=stage, reuse=True)
        outcomes.append(update(tx, params, after_one(tx), second=False, shift=1.0)[0])
    for one, other in itertools.pairwise(outcomes):
        chex.assert_trees_all_equal(one, other)
    plain = saner_jax.sam(0.4, reuse=True)
    everywhere = update(plain, params, after_one(plain), second=False, shift=1.0)[0]
    chex.assert_trees_all_equal(outcomes[0]["layer"]["bias"], everywhere["layer"]["bias"])
    assert not np.array_equal(outcomes[0]["layer"]["kernel"], everywhere["layer"]["kernel"])
