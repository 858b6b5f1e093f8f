"""Every Python block of the README and of the pages runs on its own, and what the text claims about them is true."""

import functools
import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import saner_jax

ROOT = pathlib.Path(__file__).parents[2]
PAGES = {"README": ROOT / "README.md"} | {
    path.relative_to(ROOT / "docs").with_suffix("").as_posix(): path
    for path in sorted((ROOT / "docs").rglob("*.md"))
    if "_build" not in path.parts
}
SANER = "saner_jax.saner(rho=0.1, alpha=0.5)"
NEEDS = {"recipes/gradient_accumulation": "optax.microbatching"}
# The recipes with BatchNorm and dropout, by what they call the statistics and the parameters.
WITH_STATISTICS = ("recipes/flax_nnx (2)", "recipes/flax_linen", "recipes/equinox", "recipes/haiku")


def python_blocks():
    """Name each block after its page; lines keep their numbers, for tracebacks."""
    blocks = {}
    for page, path in PAGES.items():
        text = path.read_text(encoding="utf-8")
        for number, match in enumerate(re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S), start=1):
            name = page if number == 1 else f"{page} ({number})"
            blocks[name] = path, "\n" * text[: match.start(1)].count("\n") + match[1]
    return blocks


BLOCKS = python_blocks()


def run(name, replacements=None):
    """Execute a block, with some of its text replaced, and return its names."""
    return execute(name, tuple((replacements or {}).items()))


@functools.cache
def execute(name, replacements):
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not in Optax {optax.__version__}")
    path, code = BLOCKS[name]
    if not hasattr(jax.lax, "pcast"):
        code = code.replace('jax.lax.pcast(params, "data", to="varying")', 'jax.lax.pvary(params, "data")')
    for old, new in replacements:
        assert old in code
        code = code.replace(old, new)
    names = {"__name__": name}
    exec(compile(code, path, "exec"), names)
    return names


def assert_close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), *jax.device_get((actual, expected)))


@pytest.mark.parametrize("name", BLOCKS)
def test_block_runs(name):
    run(name)


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_second_pass_leaves_no_trace_and_repeats_the_dropout(name):
    """Against SGD: alike after a step at rho = 0, with one dropout mask; statistics alike after one at a large rho."""
    shorter = {"range(20)": "range(2)", "losses[-1] < losses[0] / 2": "True"}
    sam = run(name, shorter | {SANER: "saner_jax.sam(rho=lambda step: 5.0 * step)"})
    sgd = run(name, shorter | {SANER: "optax.with_extra_args_support(optax.identity())"})

    def trained(names):
        if "statistics" not in names:
            return names["state"].params, names["state"].batch_stats
        # Two runs of a block make two classes of an Equinox model, so that leaves alone compare.
        return [
            [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
            for tree in (names.get("params", names.get("model")), names["statistics"])
        ]

    assert_close(sam["losses"], sgd["losses"])
    (params, statistics), (sgd_params, sgd_statistics) = trained(sam), trained(sgd)
    assert_close(statistics, sgd_statistics)
    assert optax.tree.norm(optax.tree.sub(params, sgd_params)) > 1e-3


def test_both_nnx_recipes_train_alike():
    np.testing.assert_allclose(run("recipes/flax_nnx")["losses"], run("recipes/flax_nnx (2)")["losses"], rtol=1e-3)


def test_micro_batches_equal_one_big_batch():
    accumulated = run("recipes/gradient_accumulation")
    assert_close(
        accumulated["params"],
        run("recipes/gradient_accumulation", {"microbatch_size=16": "microbatch_size=64"})["params"],
    )
    whole = run(
        "recipes/gradient_accumulation", {"accumulated_grad(params, batch)": "jax.grad(loss_fn)(params, batch)"}
    )
    assert_close(accumulated["params"], whole["params"])
    assert_close(accumulated["state"], whole["state"])


def test_sharded_batch_equals_one_device():
    name = "recipes/sharded_batch"
    two, one = run(name), run(name, {"jax.devices()[:2]": "jax.devices()[:1]"})
    assert two["params"]["w"].sharding.device_set == set(jax.devices()[:2])
    assert_close(two["params"], one["params"])


def test_pmap_and_shard_map_are_m_sam_of_vmap():
    name = "recipes/pmap_and_shard_map"
    weight_decay = {'"data"), optax.sgd(0.1': '"data"), optax.add_decayed_weights(5e-4), optax.sgd(0.1'}
    by_pmap = run(name, weight_decay)
    by_shard_map = run(
        f"{name} (2)", {"(jax.random.key(0), (64, 8))": "(jax.random.key(0), (2, 32, 8)).reshape(64, 8)"}
    )
    by_vmap = run(
        "recipes/groups",
        {
            '"groups"), optax.sgd(0.1': '"groups"), optax.add_decayed_weights(5e-4), optax.sgd(0.1',
            "(jax.random.key(0), (64, 8))": "(jax.random.key(0), (2, 32, 8)).reshape(64, 8)",
            "reshape(4, 16": "reshape(2, 32",
        },
    )
    for names in (by_pmap, by_shard_map):
        assert_close(names["params"], by_vmap["params"])


def test_sharded_parameters_equal_one_device():
    name = "recipes/sharded_parameters"
    two, one = run(name), run(name, {"jax.devices()[:2]": "jax.devices()[:1]"})
    assert two["params"]["in"].addressable_shards[0].data.shape == (4, 16)
    assert_close(two["params"], one["params"])


def test_groups_with_sharded_parameters_equal_those_with_whole_ones():
    name = "recipes/sharded_parameters (2)"
    whole = run(name, {"jax.devices()[:4]).reshape(2, 2)": "jax.devices()[:2]).reshape(2, 1)"})
    assert_close(run(name)["params"], whole["params"])


def test_what_is_said_of_clip_after_saner():
    h = jnp.array([jnp.inf, 1.0])
    for clip, hidden in ((optax.clip(1.0), True), (optax.clip_by_global_norm(1.0), False)):
        updates, _ = clip.update(h, clip.init(h))
        assert bool(jnp.all(jnp.isfinite(updates))) == hidden


def test_what_is_said_of_apply_if_finite():
    """It lets a second gradient through that is not finite."""
    tx = optax.apply_if_finite(saner_jax.saner(), max_consecutive_errors=10)
    params = jnp.ones(2)
    updates, _ = tx.update(params, tx.init(params), params, grad_fn=lambda w: w * jnp.nan)
    assert not jnp.isfinite(updates).any()


def test_what_is_said_of_optax_contrib_sam():
    params = jnp.ones(2)
    rho = optax.linear_schedule(0.1, 1.0, transition_steps=2)
    tx = optax.contrib.sam(
        optax.sgd(1.0), optax.chain(optax.contrib.normalize(), optax.sgd(rho)), sync_period=2, opaque_mode=True
    )
    state, points = tx.init(params), []

    def grad_fn(w, i):
        points.append(w)
        return w

    for _ in range(3):
        _, state = tx.update(params, state, params, grad_fn=grad_fn)
    np.testing.assert_allclose([jnp.linalg.norm(point - params) for point in points], 0.1, rtol=1e-5)

    updates, _ = tx.update(jnp.zeros(2), state, params, grad_fn=grad_fn)
    assert jnp.isnan(updates).all()
    with pytest.raises(TypeError, match="value"):
        tx.update(params, state, params, grad_fn=grad_fn, value=1.0)


def test_between_the_chosen_steps_the_gradient_passes_as_it_is():
    names = run("recipes/every_second_step")
    tx, params, state = names["tx"], names["params"], names["state"]
    grad_fn = jax.grad(lambda params: names["loss_fn"](params, names["batch"]))
    for passes in (False, True, False, True):
        grads = grad_fn(params)
        before = optax.tree.get(state, "trace")["w"]
        updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
        emitted = optax.tree.get(state, "trace")["w"] - 0.9 * before
        assert bool(jnp.allclose(emitted, grads["w"], atol=1e-7)) == passes
        params = optax.apply_updates(params, updates)


def test_a_sweep_trains_each_value_as_if_alone():
    names = run("recipes/sweep_over_rho")
    alone = [names["train"](rho) for rho in names["rhos"][jnp.array([0, 3])]]
    np.testing.assert_allclose(names["losses"][jnp.array([0, 3])], alone, rtol=1e-4)


def test_line_searches_refuse_an_argument_that_the_loss_does_not_take():
    with pytest.raises(TypeError, match="grad_fn"):
        run("recipes/line_search", {"lambda params, grad_fn: loss_fn(params)": "loss_fn"})


def test_lbfgs_takes_the_arguments_of_a_line_search():
    search = "optax.sgd(1.0),\n    optax.scale_by_backtracking_linesearch(max_backtracking_steps=15),"
    assert run("recipes/line_search", {search: "optax.lbfgs(),", "range(10)": "range(3)", "/ 10": ""})


def test_the_stock_train_state_does_not_forward_grad_fn():
    from flax.training import train_state

    state = run("recipes/train_state")["state"]
    stock = train_state.TrainState(
        step=state.step, apply_fn=state.apply_fn, params=state.params, tx=state.tx, opt_state=state.opt_state
    )
    with pytest.raises(TypeError, match="grad_fn"):
        stock.apply_gradients(grads=state.params)
