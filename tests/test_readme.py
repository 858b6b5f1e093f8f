"""Every Python block of the README runs on its own, and what the text claims about them is true."""

import functools
import importlib.util
import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import saner_jax

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SANER = "saner_jax.saner(rho=0.1, alpha=0.5)"
NEEDS = {"Gradient accumulation": "optax.microbatching"}


def python_blocks():
    """Name each block after the heading above it; lines keep their numbers, for tracebacks."""
    blocks, heading = {}, ""
    for match in re.finditer(r"^(#+ (?P<heading>[^\n]*)|```python\n(?P<code>.*?)^```)$", README, re.M | re.S):
        if match["heading"] is not None:
            heading = match["heading"]
        else:
            name = heading if heading not in blocks else f"{heading} (second)"
            blocks[name] = "\n" * README[: match.start("code")].count("\n") + match["code"]
    return blocks


BLOCKS = python_blocks()


def run(name, replacements=None):
    """Execute a block, with some of its text replaced, and return its names."""
    return execute(name, tuple((replacements or {}).items()))


@functools.cache
def execute(name, replacements):
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not in Optax {optax.__version__}")
    code = BLOCKS[name]
    if not hasattr(jax.lax, "pcast"):
        code = code.replace('jax.lax.pcast(params, "data", to="varying")', 'jax.lax.pvary(params, "data")')
    for old, new in replacements:
        assert old in code
        code = code.replace(old, new)
    names = {"__name__": name}
    exec(compile(code, "README.md", "exec"), names)
    return names


def assert_close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), *jax.device_get((actual, expected)))


@pytest.mark.parametrize("name", BLOCKS)
def test_block_runs(name):
    run(name)


@pytest.mark.parametrize("name", ["Flax NNX (second)", "Flax Linen"])
def test_second_pass_leaves_no_trace_and_repeats_the_dropout(name):
    """Against SGD: alike after a step at rho = 0, with one dropout mask; statistics alike after one at a large rho."""
    shorter = {"range(20)": "range(2)", "losses[-1] < losses[0] / 2": "True"}
    sam = run(name, shorter | {SANER: "saner_jax.sam(rho=lambda step: 5.0 * step)"})
    sgd = run(name, shorter | {SANER: "optax.with_extra_args_support(optax.identity())"})

    def trained(names):
        if "statistics" in names:
            return names["params"], names["statistics"]
        return names["state"].params, names["state"].batch_stats

    assert_close(sam["losses"], sgd["losses"])
    (params, statistics), (sgd_params, sgd_statistics) = trained(sam), trained(sgd)
    assert_close(statistics, sgd_statistics)
    assert optax.tree.norm(optax.tree.sub(params, sgd_params)) > 1e-3


def test_both_nnx_recipes_train_alike():
    np.testing.assert_allclose(run("Flax NNX")["losses"], run("Flax NNX (second)")["losses"], rtol=1e-3)


def test_micro_batches_equal_one_big_batch():
    accumulated = run("Gradient accumulation")
    assert_close(
        accumulated["params"],
        run("Gradient accumulation", {"microbatch_size=16": "microbatch_size=64"})["params"],
    )
    whole = run("Gradient accumulation", {"accumulated_grad(params, batch)": "jax.grad(loss_fn)(params, batch)"})
    assert_close(accumulated["params"], whole["params"])
    assert_close(accumulated["state"], whole["state"])


def test_sharded_batch_equals_one_device():
    name = "Two devices, one batch: `jit`"
    two, one = run(name), run(name, {"jax.devices()[:2]": "jax.devices()[:1]"})
    assert two["params"]["w"].sharding.device_set == set(jax.devices()[:2])
    assert_close(two["params"], one["params"])


def test_pmap_and_shard_map_are_m_sam_of_vmap():
    name = "Two devices, a group each: `pmap` and `shard_map`"
    weight_decay = {'"data"), optax.sgd(0.1': '"data"), optax.add_decayed_weights(5e-4), optax.sgd(0.1'}
    by_pmap = run(name, weight_decay)
    by_shard_map = run(
        f"{name} (second)", {"(jax.random.key(0), (64, 8))": "(jax.random.key(0), (2, 32, 8)).reshape(64, 8)"}
    )
    by_vmap = run(
        "Groups of a batch with a perturbation each (m-SAM)",
        {
            '"groups"), optax.sgd(0.1': '"groups"), optax.add_decayed_weights(5e-4), optax.sgd(0.1',
            "(jax.random.key(0), (64, 8))": "(jax.random.key(0), (2, 32, 8)).reshape(64, 8)",
            "reshape(4, 16": "reshape(2, 32",
        },
    )
    for names in (by_pmap, by_shard_map):
        assert_close(names["params"], by_vmap["params"])


def test_sharded_parameters_equal_one_device():
    name = "Sharded parameters"
    two, one = run(name), run(name, {"jax.devices()[:2]": "jax.devices()[:1]"})
    assert two["params"]["in"].addressable_shards[0].data.shape == (4, 16)
    assert_close(two["params"], one["params"])


def test_groups_with_sharded_parameters_equal_those_with_whole_ones():
    name = "Sharded parameters (second)"
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


def test_readme_is_about_the_product():
    for word in ("/work", "shared/", "issue", "TODO", "helper agent"):
        assert word not in README
    top = README[:600]
    assert 'pip install -e ".[examples]" && python -m examples.noisy_images\n' in top
    assert 'pip install -e ".[test]" && python -m pytest\n' in top


def test_table_of_methods_names_every_alias_with_its_defaults():
    for alias in ("sam", "asam", "gsam", "fsam", "vasso", "saner", "sgd_d"):
        call = re.search(rf"^\| `{alias}\((.*?)\)`", README, re.M)[1]
        named = dict(part.split("=") for part in call.split(", "))
        defaults = {key: p.default for key, p in inspect.signature(getattr(saner_jax, alias)).parameters.items()}
        assert named == {key: str(value) for key, value in defaults.items() if isinstance(value, float)}
