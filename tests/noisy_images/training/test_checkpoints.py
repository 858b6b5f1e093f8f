"""Checkpoints: whole, of this configuration, and the state bit for bit."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.noisy_images.config import configure, replace
from examples.noisy_images.errors import UserError
from examples.noisy_images.training import devices
from examples.noisy_images.training.checkpoints import Checkpoints
from examples.noisy_images.training.step import Spec
from examples.noisy_images.training.trainer import compiled_functions

# Two networks, BatchNorm, a method with averages of its own.
CONFIG = configure(model="small_cnn", width=1 / 32, batch_size=8, method="vasso+saner", companion="co-teaching")


@pytest.fixture(scope="module")
def state():
    """A state whose every leaf is different."""
    spec = Spec(3, (6, 6, 1), 3, (0.5,), (0.25,), 0, False)
    state = compiled_functions(CONFIG, spec, devices.mesh()).create(0)
    leaves = jax.tree.leaves(state)
    rng = np.random.default_rng(0)
    leaves = [jnp.asarray(100 * rng.normal(size=x.shape), x.dtype) for x in leaves]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def at(state, step):
    return state._replace(step=jnp.int32(step))


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array) and a.dtype == b.dtype and a.weak_type == b.weak_type
        np.testing.assert_array_equal(a, b)


def test_a_state_comes_back_bit_for_bit(tmp_path, state):
    checkpoints = Checkpoints(tmp_path / "c", CONFIG)
    assert checkpoints.latest_step is None and checkpoints.restore(state) is None
    first, second = at(state, 3), at(jax.tree.map(lambda x: x + 1, state), 6)
    checkpoints.save(first, {"epoch": 1})
    checkpoints.save(second, {"epoch": 2, "best_epoch": 1})
    # A step that is already there, or on its way there.
    checkpoints.save(second, {"epoch": 2})
    checkpoints.close()
    for again in (Checkpoints(tmp_path / "c", CONFIG), Checkpoints(tmp_path / "c", CONFIG)):
        assert again.latest_step == 6
        restored, run = again.restore(jax.tree.map(jnp.zeros_like, state))
        assert_equal(restored, second)
        assert (run["epoch"], run["best_epoch"]) == (2, 1)
        again.close()


def test_what_is_written_is_what_was_there_when_asked(tmp_path, state):
    # On the CPU a donated buffer is overwritten in place.
    host = jax.tree.map(lambda x: np.array(x), at(state, 1))
    expected = jax.tree.map(jnp.array, host)
    checkpoints = Checkpoints(tmp_path, CONFIG)
    checkpoints.save(host, {})
    for leaf in jax.tree.leaves(host):
        leaf[...] = 0
    assert_equal(checkpoints.restore(state)[0], expected)
    checkpoints.close()


def test_the_newest_two_are_kept(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, CONFIG)
    for step in (1, 2, 5):
        checkpoints.save(at(state, step), {})
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "5"]


def test_a_write_that_was_cut_off_does_not_count(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, CONFIG)
    checkpoints.save(at(state, 1), {})
    checkpoints.close()
    unfinished = tmp_path / "2.orbax-checkpoint-tmp"
    (tmp_path / "1").rename(unfinished)
    checkpoints = Checkpoints(tmp_path, CONFIG)
    assert checkpoints.latest_step is None and checkpoints.restore(state) is None
    # It does not stand in the way of the next.
    checkpoints.save(at(state, 2), {})
    checkpoints.close()
    assert_equal(Checkpoints(tmp_path, CONFIG).restore(state)[0], at(state, 2))


def test_another_configuration_is_named(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, CONFIG)
    checkpoints.save(at(state, 1), {})
    checkpoints.close()
    other = Checkpoints(tmp_path, replace(CONFIG, rate=0.2, seed=3))
    with pytest.raises(UserError, match=r"another configuration \(rate: 0.2 here, 0.5 there; seed: 3 here, 0 there\)"):
        other.restore(state)


def test_a_damaged_checkpoint_is_named(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, CONFIG)
    for step in (1, 2):
        checkpoints.save(at(state, step), {})
    checkpoints.close()
    for path in (tmp_path / "2" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"the checkpoint .*/2 cannot be read .*remove it") as error:
        Checkpoints(tmp_path, CONFIG).restore(state)
    assert "\n" not in str(error.value)
    shutil.rmtree(tmp_path / "2")
    assert_equal(Checkpoints(tmp_path, CONFIG).restore(state)[0], at(state, 1))
