"""The transformer with sharded state: one trajectory on any number of devices, no traffic but the model's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import scaling
from benchmarks.machinery import collectives
from examples.sharded_transformer import __main__ as command
from examples.sharded_transformer import checkpoints, training
from examples.sharded_transformer.data import Source, with_noise

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = training.Config(
    vocabulary=8, length=6, embedding=16, heads=2, layers=2, sequences=64, batch=8, steps=4, learning_rate=0.01, rho=0.5
)


def batches(steps, config=CONFIG):
    text = Source.random(config.vocabulary, 0).sample(config.sequences, config.length + 1, 1)
    return [(text[i, :-1], text[i, 1:]) for i in (training.batch_indices(config, step) for step in steps)]


@functools.cache
def program(devices):
    """The program in float64 on so many devices, with its mesh; every test that needs it compiles it once."""
    mesh = training.device_mesh(jax.devices()[:devices])
    return mesh, training.program(CONFIG, mesh, dtype=jnp.float64)


def train(devices, steps, state):
    """Return the state after these steps on so many devices, and the losses."""
    mesh, functions = program(devices)
    with jax.set_mesh(mesh):
        # A copy, since a step uses its state up.
        placement = jax.tree.map(lambda leaf: leaf.sharding, functions.abstract)
        state = jax.device_put(jax.tree.map(np.array, state), placement)
        losses = []
        for tokens, targets in batches(steps):
            state, loss = functions.step(state, tokens, targets)
            losses.append(float(loss))
    return state, losses


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def start():
    mesh, functions = program(8)
    with jax.set_mesh(mesh):
        return functions.init()


@pytest.fixture(scope="module")
def alone(start):
    return train(1, range(4), start)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_same_trajectory_on_several_devices(devices, start, alone):
    state, losses = train(devices, range(4), start)
    assert losses == pytest.approx(alone[1], rel=1e-12)
    for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(alone[0]), strict=True):
        assert leaf.dtype == expected.dtype
        # Adam divides by |g| + 1e-8, which enlarges a rounding difference in a gradient near zero.
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=1e-8 * CONFIG.learning_rate)


def test_every_device_holds_its_share(start):
    """All that has the shape of a parameter is cut: parameters, momenta, second moments."""
    arrays = [leaf for leaf in jax.tree.leaves(start) if leaf.ndim]
    assert len(arrays) == 3 * len(jax.tree.leaves(start.params))
    for leaf in arrays:
        assert 8 * leaf.addressable_shards[0].data.size == leaf.size


def test_resumes_on_another_number_of_devices(start, alone, tmp_path):
    checkpoints.save(tmp_path, train(2, range(2), start)[0])
    restored = checkpoints.restore(tmp_path, program(4)[1].abstract)
    assert {leaf.sharding.num_devices for leaf in jax.tree.leaves(restored)} == {4}
    state, losses = train(4, range(2, 4), restored)
    assert losses == pytest.approx(alone[1][2:], rel=1e-12)
    for leaf, expected in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone[0].params), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=1e-8 * CONFIG.learning_rate)


def test_no_checkpoint_is_nothing_to_resume(tmp_path):
    assert checkpoints.restore(tmp_path, None) is None


@pytest.mark.slow
def test_saner_adds_scalars_to_the_traffic_of_two_passes():
    """Beside ``h = grad(w + rho g)``, SANER reduces two scalars for each leaf: its largest entry, which keeps the norm
    inside the range of floats, and the sum of its squares."""
    two_passes, saner = (
        collectives.moved(
            scaling.compiled_step(CONFIG, jax.devices()[:4], optax.chain(scaling.METHODS[name](), optax.adamw(1e-3)))
        )
        for name in ("two passes", "SANER")
    )
    leaves = 10
    assert saner - two_passes == {("all-reduce", "f32[]"): 2 * leaves}
    assert two_passes - saner == {}
    assert collectives.received(two_passes)["all-gather"] > 0  # the passes' own


def test_noise_replaces_the_stated_share():
    targets = Source.random(8, 0).sample(20, 10, 1)
    noisy = with_noise(targets, 0.25, 8, 2)
    assert np.sum(noisy != targets) == 50
    assert noisy.min() >= 0 and noisy.max() < 8


def test_source_is_its_own_best_model():
    source = Source.random(8, 0)
    text = source.sample(200, 50, 1)
    counts = np.zeros((8, 8, 8))
    np.add.at(counts, (text[:, :-2], text[:, 1:-1], text[:, 2:]), 1)
    often = counts.sum(-1) > 100
    frequencies = counts[often] / counts[often].sum(-1, keepdims=True)
    assert often.sum() > 10
    np.testing.assert_allclose(frequencies, source.probabilities[often], atol=0.15)
    assert source.loss(text) < Source.random(8, 1).loss(text)


def test_an_epoch_takes_every_sequence_once():
    steps = CONFIG.sequences // CONFIG.batch
    epochs = [
        np.concatenate([training.batch_indices(CONFIG, step + e * steps) for step in range(steps)]) for e in (0, 1)
    ]
    for epoch in epochs:
        assert sorted(epoch) == list(range(CONFIG.sequences))
    assert list(epochs[0]) != list(epochs[1])


@pytest.mark.slow
def test_command_trains_and_goes_on(tmp_path, capsys):
    config = training.Config(vocabulary=4, length=8, embedding=16, heads=2, layers=1, batch=16, steps=3)
    first = command.run(config, checkpoint=tmp_path / "run", every=2)
    assert command.run(config, checkpoint=tmp_path / "run") == pytest.approx(first, rel=1e-6)
    printed = capsys.readouterr().out
    for text in ("on 8 devices", "the source's own loss", "step     2", "step     3", "goes on from there"):
        assert text in printed


def test_devices_must_divide(monkeypatch):
    with pytest.raises(SystemExit, match="8 devices do not divide the embedding of 12"):
        command.run(training.Config(embedding=12))
