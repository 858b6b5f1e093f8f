"""The contract that every public method keeps: one list of methods, and for each clause one test over all of it."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import saner_jax
from saner_jax import downweight, downweight_random, restore_downweighted, sharpness_aware

DEVICES = 4


def falling(start):
    """A schedule that needs no implicit promotion."""
    return lambda step: start / (1 + jnp.asarray(step, jnp.result_type(float)))


# Every entry: keywords of the wrapper -> the method. rho is large enough for both values of the mask to occur.
METHODS = {
    "sam": functools.partial(saner_jax.sam, 0.4),
    "asam": functools.partial(saner_jax.asam, 0.6),
    "gsam": functools.partial(saner_jax.gsam, 0.4, 0.3),
    "fsam": functools.partial(saner_jax.fsam, 0.4),
    "vasso": functools.partial(saner_jax.vasso, 0.4, 0.3),
    "saner": functools.partial(saner_jax.saner, 0.4, 0.5),
    "sgd_d": functools.partial(saner_jax.sgd_d, 0.4),
    "asam+saner": functools.partial(saner_jax.asam, 0.6, reweight=downweight(0.5)),
    "gsam+saner": functools.partial(saner_jax.gsam, 0.4, reweight=downweight(-0.5)),
    "fsam+saner": functools.partial(saner_jax.fsam, 0.4, reweight=downweight(1.0)),
    "vasso+sgd_d": functools.partial(saner_jax.vasso, 0.4, reweight=restore_downweighted()),
    "fsam+saner on r < 0": functools.partial(saner_jax.fsam, 0.4, reweight=downweight(0.5, where=saner_jax.is_turned)),
    "sam+saner on r > 1": functools.partial(saner_jax.sam, 0.4, reweight=downweight(0.5, where=saner_jax.is_grown)),
    "sam+saner, random": functools.partial(
        saner_jax.sam, 0.4, reweight=downweight_random(falling(0.5), seed=3), monitor=True
    ),
    "saner, scheduled and monitored": functools.partial(
        saner_jax.saner, falling(0.4), saner_jax.alpha_ramp(0.5, steps=3), monitor=True
    ),
    "fsam+saner, every keyword": functools.partial(
        saner_jax.fsam,
        0.4,
        reweight=downweight(0.5, mask={"layer": True, "scale": False}),
        perturb_mask=lambda params: jax.tree.map(lambda p: p.ndim > 0, params),
        monitor=True,
        perturbed_dtype=jnp.float32,
    ),
    "asam, masked": functools.partial(
        saner_jax.asam, 0.6, 0.1, adaptive_mask={"layer": {"kernel": True, "bias": False}, "scale": True}
    ),
    "composition": functools.partial(
        sharpness_aware,
        optax.chain(
            saner_jax.subtract_ema(decay=0.5), saner_jax.follow_ema(0.5), saner_jax.scale_to_adaptive_norm(0.6)
        ),
        saner_jax.subtract_orthogonal(0.2),
        downweight(0.5),
        optax.clip_by_global_norm(1.0),
    ),
    "saner, reusing": functools.partial(saner_jax.saner, 0.4, 0.5, reuse=True),
    "fsam+saner, reusing in bfloat16": functools.partial(
        saner_jax.fsam, 0.4, reweight=downweight(0.5), reuse=jnp.bfloat16
    ),
    "plain stages": functools.partial(
        sharpness_aware, optax.chain(optax.normalize_by_update_norm(0.4), optax.clip(0.3)), optax.trace(0.5)
    ),
}

# Exceptions, as data.
PARAMETER_LIKE_TREES = {"fsam": 1, "vasso": 1, "fsam+saner": 1, "vasso+sgd_d": 1, "composition": 2, "plain stages": 1}
PARAMETER_LIKE_TREES["fsam+saner on r < 0"] = 1
PARAMETER_LIKE_TREES["fsam+saner, every keyword"] = 1
PARAMETER_LIKE_TREES |= {"saner, reusing": 1, "fsam+saner, reusing in bfloat16": 2}
MASKS_FOLLOW_THE_TREE = {"fsam+saner, every keyword", "asam, masked"}
DIVIDES_BY_ZERO_NORM = {"plain stages"}  # optax.normalize_by_update_norm does.
ADDS_UP_MIXED_NORMS = {"plain stages", "composition"}  # Optax's norm promotes float32 beside float64.
HYPERPARAMETERS = {  # name -> the function and, for each hyperparameter, two values it moves between
    "sam": (saner_jax.sam, {"rho": (0.4, 0.1)}),
    "asam": (saner_jax.asam, {"rho": (0.6, 0.3), "eta": (0.1, 0.01)}),
    "gsam": (saner_jax.gsam, {"rho": (0.4, 0.1), "alpha": (0.4, -0.1)}),
    "fsam": (saner_jax.fsam, {"rho": (0.4, 0.1), "sigma": (1.0, 0.5), "decay": (0.9, 0.5)}),
    "vasso": (saner_jax.vasso, {"rho": (0.4, 0.1), "theta": (0.9, 0.2)}),
    "saner": (saner_jax.saner, {"rho": (0.4, 0.1), "alpha": (0.5, -0.5)}),
    "sgd_d": (saner_jax.sgd_d, {"rho": (0.4, 0.1)}),
}

each_method = pytest.mark.parametrize("name", METHODS)
observed_or_not = pytest.mark.parametrize("monitor", [False, True], ids=["", "monitored"])
each_alias = pytest.mark.parametrize("name", HYPERPARAMETERS)


def make_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    tree = {"layer": {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)}, "scale": rng.normal()}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def make_batch(seed=0, size=8):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(size, 4)), jnp.float32), jnp.asarray(rng.normal(size=(size, 3)), jnp.float32)


def loss_fn(params, batch):
    x, y = batch
    out = jnp.tanh(x @ params["layer"]["kernel"] + params["layer"]["bias"]) * params["scale"]
    return jnp.mean((out - y) ** 2)


def make_step(tx, **extra_args):
    def step(params, state, batch):
        def grad_fn(params):
            return jax.grad(loss_fn)(params, batch)

        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn, **extra_args)
        return jax.tree.map(lambda p, u: (p - 0.1 * u).astype(p.dtype), params, updates), state

    return step


@functools.cache
def compiled(name):
    """The method, its step compiled once for all tests (it donates params and state), and what was traced meanwhile."""
    tx, traced = METHODS[name](), []

    def step(params, state, batch):
        traced.append(name)
        return make_step(tx)(params, state, batch)

    return tx, jax.jit(step, donate_argnums=(0, 1)), traced


def step_on_lines(name, params, slope, offset, perturbed_offset):
    """One step on the gradient ``slope * w + offset``, the offset of its own at ``w + eps``: update, state, w + eps."""
    tx, points = METHODS[name](), []

    def grad_fn(w):
        points.append(w)
        return jax.tree.map(lambda w, a, b: a * w + b, w, slope, perturbed_offset)

    grads = jax.tree.map(lambda w, a, b: a * w + b, params, slope, offset)
    updates, state = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
    return updates, state, points[0]


def follow(name, batches):
    """Params and state after a step on each batch."""
    tx, step, _ = compiled(name)
    carry = make_params(), tx.init(make_params())
    for batch in batches:
        carry = step(*carry, batch)
    return carry


def constants(value):
    return jax.tree.map(lambda p: jnp.full_like(p, value), make_params())


def specs(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def assert_close(actual, expected, rtol=1e-5):
    chex.assert_trees_all_close(actual, expected, rtol=0, atol=rtol)


# -- 1. the call -------------------------------------------------------------------------------------------------------


@each_method
def test_unknown_extra_arguments_are_accepted(name):
    tx = optax.chain(METHODS[name](), optax.sgd(0.1))
    params, batch = make_params(), make_batch()
    jax.eval_shape(make_step(tx, value=1.0, unheard_of="of"), params, tx.init(params), batch)


def test_extra_arguments_reach_every_stage():
    received = []

    def listener(name):
        def update_fn(updates, state, params=None, **extra_args):
            received.append((name, extra_args["value"], sorted(extra_args.keys() - {"value"})))
            return updates, state

        return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)

    tx = sharpness_aware(optax.chain(listener("ascent")), listener("descent"), listener("last"))
    params = make_params()
    jax.eval_shape(make_step(tx, value=3.0), params, tx.init(params), make_batch())
    assert received == [
        ("ascent", 3.0, []),
        ("descent", 3.0, ["perturbation_norm", "perturbed_grads", "unperturbed_grads"]),
        ("last", 3.0, ["perturbation_norm", "perturbed_grads", "unperturbed_grads"]),
    ]


@each_method
def test_grad_fn_is_keyword_only(name):
    parameter = inspect.signature(METHODS[name]().update).parameters["grad_fn"]
    assert parameter.kind is inspect.Parameter.KEYWORD_ONLY


@each_method
def test_grad_fn_is_called_once_in_the_trace_of_the_caller(name):
    tx = METHODS[name]()
    params, batch = make_params(), make_batch()
    calls = []

    def step(params, state, batch):
        kept = []

        def grad_fn(params):
            calls.append(params)
            loss, grads = jax.value_and_grad(loss_fn)(params, batch)
            kept.append(loss)
            return grads

        tx.update(jax.grad(loss_fn)(params, batch), state, params, grad_fn=grad_fn)
        return kept[0]  # An escaped tracer would raise.

    assert jax.eval_shape(step, params, tx.init(params), batch).shape == ()
    assert len(calls) == 1


@each_method
def test_a_positive_gradient_goes_uphill_and_comes_out_positive(name):
    params = constants(9.0)
    updates, _, point = step_on_lines(name, params, constants(2.0), constants(0.0), constants(0.0))
    assert all(jnp.all(leaf > 0) for leaf in jax.tree.leaves(updates))
    eps = optax.tree.sub(point, params)
    assert all(jnp.all(leaf >= 0) for leaf in jax.tree.leaves(eps))
    assert optax.tree.norm(eps) > 0


# -- 4. types, structure, buffers --------------------------------------------------------------------------------------


@each_method
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_types_and_structure_never_change(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        tx = METHODS[name]()
        params = make_params(dtype)
        state = tx.init(params)

        def update(grads, state, params):
            return tx.update(grads, state, params, grad_fn=lambda w: optax.tree.cast(jax.tree.map(jnp.cos, w), dtype))

        updates, new_state = jax.eval_shape(update, params, state, params)
        assert specs(updates) == specs(params)
        assert specs(new_state) == specs(state)
        assert not any(leaf.weak_type for leaf in jax.tree.leaves((updates, new_state)))


@each_method
def test_state_shares_no_buffer(name):
    """Eagerly too: not with the parameters, the gradients, the update, nor within itself."""
    tx = METHODS[name]()
    params, batch = make_params(), make_batch()
    grads = jax.grad(loss_fn)(params, batch)
    state = tx.init(params)
    _, later = tx.update(grads, state, params, grad_fn=lambda w: jax.grad(loss_fn)(w, batch))
    for own in (state, later):
        pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((own, params, grads))]
        assert len(set(pointers)) == len(pointers)


@each_alias
def test_state_does_not_take_the_hyperparameters_own_arrays(name):
    function, values = HYPERPARAMETERS[name]
    arrays = {key: jnp.float32(first) for key, (first, _) in values.items()}
    tx = function(**arrays)
    params = make_params()
    state = tx.init(params)
    _, later = make_step(tx)(params, state, make_batch())
    pointers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state, later))}
    assert not pointers & {array.unsafe_buffer_pointer() for array in arrays.values()}


@each_method
def test_params_and_state_can_be_donated(name):
    tx, step, _ = compiled(name)
    params = make_params()
    carry = params, tx.init(params)
    for _ in range(2):
        donated = carry
        carry = step(*donated, make_batch())
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated[0]))
    chex.assert_tree_all_finite(carry)


@each_method
@observed_or_not
def test_scan_and_cond_carry_the_state(name, monitor):
    """They accept a carry of fixed types only; that the values are those of a loop is tested with the training."""
    tx = METHODS[name](monitor=monitor)
    params, step = make_params(), make_step(tx)

    def scanned(params, state, batch):
        def body(carry, skip):
            return jax.lax.cond(skip, lambda carry: carry, lambda carry: step(*carry, batch), carry), None

        return jax.lax.scan(body, (params, state), jnp.array([False, True, False]))[0]

    carry = params, tx.init(params)
    assert specs(jax.eval_shape(scanned, *carry, make_batch())) == specs(carry)


@each_method
@observed_or_not
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["automatic", "explicit"])
def test_scan_carries_a_state_that_lies_as_the_parameters_do(name, monitor, kind):
    """The averages have the sharding of their parameters from ``init`` on, in either kind of mesh."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))
    tx = METHODS[name](monitor=monitor)
    with jax.set_mesh(mesh):
        specs_of = {"layer": {"kernel": P("x"), "bias": P()}, "scale": P()}
        params = jax.tree.map(lambda p, spec: jax.device_put(p, NamedSharding(mesh, spec)), make_params(), specs_of)
        state = tx.init(params)

        def check(leaf, param):
            assert leaf.sharding.is_equivalent_to(param.sharding, leaf.ndim)

        if PARAMETER_LIKE_TREES.get(name):
            optax.tree.map_params(tx, check, state, params)

        def grad_fn(w):
            return jax.tree.map(lambda x: jnp.cos(3 * x), w)

        def body(carry, _):
            params, state = carry
            updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
            return (jax.tree.map(lambda p, u: p - 0.1 * u, params, updates), state), None

        scanned = jax.jit(lambda *carry: jax.lax.scan(body, carry, length=2)[0])
        # Tracing checks the types, of which an explicit sharding is part; running is left to one kind of mesh.
        shapes = jax.eval_shape(scanned, params, state)
        assert specs(shapes) == specs((params, state))
        if kind is AxisType.Explicit:
            carry = scanned(params, state)
            assert_close(jax.device_get(carry[0]), jax.device_get(alone(name, monitor)))


@functools.cache
def alone(name, monitor):
    """The parameters after the two steps above, on one device."""
    tx, params = METHODS[name](monitor=monitor), make_params()
    state = tx.init(params)
    for _ in range(2):
        grads = jax.tree.map(lambda x: jnp.cos(3 * x), params)
        updates, state = tx.update(grads, state, params, grad_fn=lambda w: jax.tree.map(lambda x: jnp.cos(3 * x), w))
        params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
    return params


@each_method
@observed_or_not
@pytest.mark.parametrize("varying", ["params", "gradients"])
def test_scan_in_shard_map_carries_the_state(name, monitor, varying):
    """Parameters that vary over a mapped axis (each device its own), and replicated ones with groups of gradients."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("axis",))
    tx = METHODS[name](monitor=monitor, axis_name="axis" if varying == "gradients" else None)

    def scanned(shift):
        params = make_params()
        if varying == "params":
            params = jax.tree.map(lambda p: p + shift[0].astype(p.dtype), params)

        def grad_fn(w):
            return jax.tree.map(lambda x: jnp.cos(3 * x + shift[0]), w)

        def body(carry, _):
            params, state = carry
            updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
            return (jax.tree.map(lambda p, u: p - 0.1 * u, params, updates), state), None

        params, _ = jax.lax.scan(body, (params, tx.init(params)), length=2)[0]
        return jax.tree.map(lambda p: p[None], params) if varying == "params" else params

    out = P("axis") if varying == "params" else P()
    jax.eval_shape(jax.shard_map(scanned, mesh=mesh, in_specs=P("axis"), out_specs=out), jnp.arange(2.0))


@each_method
@observed_or_not
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16", "mixed"])
def test_strict_promotion(name, monitor, dtype):
    """No operation relies on an implicit promotion, and what the state holds keeps its type."""
    if dtype == "mixed" and name in ADDS_UP_MIXED_NORMS:
        return
    with jax.enable_x64(dtype in ("float64", "mixed")), jax.numpy_dtype_promotion("strict"):
        tx = METHODS[name](monitor=monitor)
        params = make_params("float32" if dtype == "mixed" else dtype)
        if dtype == "mixed":
            params["layer"]["bias"] = params["layer"]["bias"].astype("float64")
        state = tx.init(params)

        def update(grads, state, params):
            return tx.update(grads, state, params, grad_fn=functools.partial(jax.tree.map, jnp.cos))

        updates, new_state = jax.eval_shape(update, params, state, params)
        assert specs(updates) == specs(params)
        assert specs(new_state) == specs(state)


@each_method
@pytest.mark.parametrize("map_params", [optax.tree.map_params, optax.tree_utils.tree_map_params])
def test_map_params_finds_the_parameter_like_leaves(name, map_params):
    tx = METHODS[name]()
    params = make_params()
    marked = map_params(tx, lambda leaf: "marked", tx.init(params))
    found = sum(leaf == "marked" for leaf in jax.tree.leaves(marked) if isinstance(leaf, str))
    assert found == PARAMETER_LIKE_TREES.get(name, 0) * len(jax.tree.leaves(params))


@each_method
def test_compiles_once(name):
    follow(name, [make_batch(seed) for seed in range(3)])
    assert len(compiled(name)[2]) == 1


# -- 5. hyperparameters ------------------------------------------------------------------------------------------------


def run(tx, steps=2):
    """Params after each step, eagerly: many small programs that are compiled once for all methods."""
    params = make_params()
    state, step, history = tx.init(params), make_step(tx), []
    for seed in range(steps):
        params, state = step(params, state, make_batch(seed))
        history.append(params)
    return history


@each_alias
def test_number_schedule_array_and_traced_value_are_one(name):
    function, values = HYPERPARAMETERS[name]
    numbers = {key: first for key, (first, _) in values.items()}
    expected = run(function(**numbers))
    assert_close(run(function(**{key: lambda step, x=x: x for key, x in numbers.items()})), expected)
    assert_close(run(function(**{key: np.float64(x) for key, x in numbers.items()})), expected)
    assert_close(run(function(**{key: jnp.float32(x) for key, x in numbers.items()})), expected)
    assert_close(jax.jit(lambda traced: run(function(**traced)))(numbers), expected)


@each_alias
def test_schedules_count_from_zero_and_the_state_holds_what_was_used(name):
    function, values = HYPERPARAMETERS[name]
    schedules = {key: lambda step, a=a, b=b: jnp.where(step == 0, a, b) for key, (a, b) in values.items()}
    tx = function(**schedules)
    params = make_params()
    state, step = tx.init(params), make_step(tx)
    for used in (0, 0, 1, 1):  # As initialised, then after steps 0, 1 and 2.
        for key, candidates in values.items():
            np.testing.assert_allclose(optax.tree.get(state, key), candidates[used], rtol=1e-6)
        params, state = step(params, state, make_batch())
    steps = [count for _, count in optax.tree.get_all_with_path(state, "step")]
    assert steps
    assert all(count == 4 for count in steps)


@each_alias
def test_inject_hyperparams(name):
    """Schedules, and numbers set from outside, give what the plain method gives."""
    function, values = HYPERPARAMETERS[name]
    injected = optax.inject_hyperparams(function, static_args=("perturb_mask", "perturbed_dtype"))
    moving = {key: lambda step, a=a, b=b: jnp.where(step == 0, a, b) for key, (a, b) in values.items()}
    expected = run(function(**moving))
    assert_close(run(injected(**moving)), expected)

    tx = injected(**{key: a for key, (a, _) in values.items()})
    params, step = make_params(), make_step(tx)
    params, state = step(params, tx.init(params), make_batch(0))
    assert_close(params, expected[0])
    for key, (_, b) in values.items():
        state.hyperparams[key] = jnp.asarray(b, state.hyperparams[key].dtype)
    params, state = step(params, state, make_batch(1))
    assert_close(params, expected[1])


# -- 7. ensembles and devices ------------------------------------------------------------------------------------------


@each_method
def test_vmap_over_an_ensemble(name):
    tx, step, _ = compiled(name)
    members = [jax.tree.map(lambda p, s=s: p + 0.1 * s, make_params()) for s in range(2)]
    batches = [make_batch(seed) for seed in range(2)]

    def stack(trees):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    states = stack([tx.init(params) for params in members])
    actual = jax.vmap(make_step(tx))(stack(members), states, stack(batches))
    expected = [step(params, tx.init(params), batch) for params, batch in zip(members, batches, strict=True)]
    assert_close(actual, stack(expected))


@each_method
def test_sharded_arrays_under_jit(name):
    """Parameters split over devices: norms, inner products and masks are those of the whole."""
    tx, _, _ = compiled(name)
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("model",))
    split = {"layer": {"kernel": P("model"), "bias": P()}, "scale": P()}
    params = jax.tree.map(lambda p, spec: jax.device_put(p, NamedSharding(mesh, spec)), make_params(), split)
    actual = jax.jit(make_step(tx))(params, tx.init(params), make_batch())
    assert_close(jax.device_get(actual), jax.device_get(follow(name, [make_batch()])))


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, with_pmap=True)
    def test_variants(self):
        params, batch = make_params(), make_batch()
        for name in ("saner, scheduled and monitored", "fsam+saner, every keyword", "composition"):
            with self.subTest(name):
                tx, _, _ = compiled(name)
                actual = self.variant(make_step(tx))(params, tx.init(params), batch)
                expected = follow(name, [batch])
                assert_close(jax.device_get(actual), jax.device_get(expected))


# -- 9. values at the edge ---------------------------------------------------------------------------------------------


@each_method
def test_non_finite_gradient_is_never_turned_finite(name):
    good = constants(1.0)
    for value in (np.nan, np.inf, -np.inf):
        kernel = good["layer"]["kernel"].at[1, 2].set(value)
        bad = {**good, "layer": {**good["layer"], "kernel": kernel}}
        for g_offset, h_offset in ((bad, bad), (good, bad), (bad, good)):
            updates, _, _ = step_on_lines(name, make_params(), constants(2.0), g_offset, h_offset)
            # A bad g spoils the perturbed point, and so the gradient there.
            assert not jnp.isfinite(updates["layer"]["kernel"][1, 2])


@each_method
def test_zero_gradient(name):
    zeros = constants(0.0)
    updates, state, point = step_on_lines(name, make_params(), zeros, zeros, zeros)
    if name not in DIVIDES_BY_ZERO_NORM:
        chex.assert_trees_all_equal(point, make_params())
        chex.assert_trees_all_equal(updates, zeros)
        chex.assert_tree_all_finite(state)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in MASKS_FOLLOW_THE_TREE])
@pytest.mark.parametrize("params", [{}, (), {"w": {}}, np.float32(0.5), {"w": np.zeros((0, 3), np.float32)}], ids=str)
def test_small_trees(name, params):
    """Empty trees, a scalar, an empty leaf; NumPy arrays are as good as JAX's."""
    tx = METHODS[name]()
    state = tx.init(params)
    grad_fn = functools.partial(jax.tree.map, jnp.cos)
    for _ in range(2):
        updates, new_state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert specs(new_state) == specs(state)
        state = new_state
    if name not in DIVIDES_BY_ZERO_NORM:
        chex.assert_tree_all_finite((updates, state))


# -- traps -------------------------------------------------------------------------------------------------------------


def test_multi_steps_descends_on_the_last_micro_batch_alone():
    """What the README warns of: the step takes its direction from the last ``h``, not from the average."""
    params = make_params()
    first, last = make_batch(1), make_batch(2)
    ours = saner_jax.sam(0.4)
    tx = optax.MultiSteps(ours, every_k_schedule=2)
    state = tx.init(params)

    @jax.jit
    def micro_step(state, batch):
        grad_fn = functools.partial(jax.grad(loss_fn), batch=batch)
        return tx.update(grad_fn(params), state, params, grad_fn=grad_fn)

    for batch in (first, last):
        updates, state = micro_step(state, batch)

    mean_g = jax.tree.map(lambda a, b: (a + b) / 2, *(jax.grad(loss_fn)(params, batch) for batch in (first, last)))

    def descent(grad_fn):
        return ours.update(mean_g, ours.init(params), params, grad_fn=grad_fn)[0]

    both = tuple(jnp.concatenate(pair) for pair in zip(first, last, strict=True))
    assert_close(updates, descent(functools.partial(jax.grad(loss_fn), batch=last)))
    wanted = descent(functools.partial(jax.grad(loss_fn), batch=both))
    assert optax.tree.norm(optax.tree.sub(updates, wanted)) > 0.1 * optax.tree.norm(wanted)
