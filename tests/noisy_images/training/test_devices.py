"""One run on several devices, or in micro-batches, is the same run, in float64 to rounding.

In float32 a rounding difference can flip a bit of SANER's mask, after which trajectories part.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.noisy_images import models
from examples.noisy_images.config import check, configure, replace
from examples.noisy_images.errors import UserError
from examples.noisy_images.models import layers
from examples.noisy_images.training import devices, methods
from examples.noisy_images.training.accumulation import accumulate
from examples.noisy_images.training.step import epoch_order
from examples.noisy_images.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("quick_compile")

# Everything random switched on, and BatchNorm.
NORMALISED = configure(
    model="normalised64",
    dropout=0.3,
    epochs=4,
    batch_size=16,
    rho=0.2,
    alpha=0.9,
    alpha_ramp=0.0,
    learning_rate=0.07,
    weight_decay=0.01,
    seed=5,
    scan_epochs=False,
)
PLAIN = replace(NORMALISED, model="plain64", augment=False, dropout=0.0)


class Network(nnx.Module):
    """One hidden layer in float64, with BatchNorm or without."""

    def __init__(self, layers_, *, num_classes, image_shape, width, dropout, normalise):
        wide = dict(dtype=jnp.float64, param_dtype=jnp.float64, rngs=layers_.rngs)
        # A bias before BatchNorm has no gradient but rounding errors.
        self.hidden = nnx.Linear(math.prod(image_shape), 8, use_bias=not normalise, **wide)
        self.norm = layers.BatchNorm(8, groups=layers_.batch_norm_groups, **wide) if normalise else None
        self.dropout = nnx.Dropout(dropout)
        self.classifier = nnx.Linear(8, num_classes, **wide)

    def __call__(self, x, train, rngs=None):
        x = self.hidden(x.reshape(x.shape[0], -1))
        x = nnx.relu(x if self.norm is None else self.norm(x, train))
        return self.classifier(self.dropout(x, deterministic=not train, rngs=rngs))


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    for name in ("normalised64", "plain64"):

        def build(layers, name=name, **options):
            return Network(layers, normalise=name == "normalised64", **options)

        monkeypatch.setitem(models.MODELS, name, models.Model("", build, layers.TORCH_DEFAULT))
    with jax.enable_x64(True):
        yield


def trained(config, dataset, count=1, steps=4):
    """Train some steps on some devices."""
    trainer = Trainer(config, dataset, devices.mesh(count))
    start_epoch = trainer._functions.start_epoch
    # The running sums, too, so that a second epoch does not compile again.
    trainer._functions = trainer._functions._replace(start_epoch=lambda state: in_float64(start_epoch(state)))
    trainer.state = in_float64(trainer.state)
    while trainer.step < steps:
        list(trainer.train_epoch(lambda: trainer.step == steps))
    return trainer


def in_float64(state):
    return jax.tree.map(lambda x: x.astype(float) if x.dtype == jnp.float32 else x, state)


def assert_same(actual, expected, rtol=1e-12):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, atol=rtol * np.abs(b).max(), rtol=0, err_msg=jax.tree_util.keystr(path))


CO_TEACHING = {"companion": "co-teaching", "forget_ramp_epochs": 1}
UNCHANGED = {"augment": False, "dropout": 0.0}
VARIANTS = {
    "saner": {},
    "sam": UNCHANGED | {"method": "sam"},
    "sgd": UNCHANGED | {"method": "sgd"},
    # Two networks, an average of the method's own, BatchNorm in groups that are not the devices.
    "co-teaching": UNCHANGED
    | CO_TEACHING
    | {"method": "vasso+saner", "batch_norm_groups": 4, "batch_norm_pass": "perturbed"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "counts"), [("saner", (2, 4, 8)), ("sam", (2,)), ("co-teaching", (4,)), ("sgd", (8,))]
)
def test_several_devices_take_the_steps_of_one(variant, counts, tiny):
    config, dataset = replace(NORMALISED, **VARIANTS[variant]), tiny(train=40)
    one = trained(config, dataset)
    for count in counts:
        several = trained(config, dataset, count)
        assert_same(several.state, one.state)
        for leaf in jax.tree.leaves(several.state):
            assert leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == count
    if variant == "saner":
        # Ten images cannot be divided among eight devices.
        for of_several, of_one in zip(several.evaluate(dataset.test), one.evaluate(dataset.test), strict=True):
            np.testing.assert_allclose(of_several, of_one, rtol=1e-6)


def compiled(trainer):
    train = trainer.dataset.train
    order = devices.replicate(trainer.mesh, jnp.arange(len(train)))
    return trainer._functions.train_step.lower(trainer.state, trainer._seed, trainer._place(train), order).compile()


def test_devices_share_the_batch_and_not_its_images(tiny):
    program = compiled(Trainer(NORMALISED, tiny(train=40), devices.mesh(8))).as_text()
    # Two of the sixteen images on each of eight devices, and no device sends images to another one.
    assert "u8[2,6,6,1]" in program and "u8[16,6,6,1]" not in program
    assert "all-reduce" in program and not re.search("all-gather|all-to-all|collective-permute", program)


def test_one_device_has_nothing_of_several(tiny):
    config = replace(NORMALISED, method="sgd")
    program = compiled(Trainer(config, tiny(train=40), devices.mesh(1))).as_text()
    assert not re.search("all-reduce|all-gather|Sharding|num_partitions=[^1]|copy-start", program)


def reference_batch_norm(x, scale, bias, groups, epsilon=1e-5):
    """A loop over the groups; the output and the mean of the groups' statistics."""
    parts = [(part, part.mean(0), part.var(0)) for part in np.split(x, groups)]
    y = np.concatenate([(part - mean) / np.sqrt(var + epsilon) * scale + bias for part, mean, var in parts])
    return y, np.mean([mean for _, mean, _ in parts], 0), np.mean([var for *_, var in parts], 0)


def test_batch_norm_in_groups_is_a_loop_over_them():
    rng = np.random.default_rng(0)
    norm = layers.BatchNorm(3, groups=4, dtype=jnp.float64, param_dtype=jnp.float64, momentum=0.9, rngs=nnx.Rngs(0))
    x, scale, bias = rng.normal(size=(8, 3)), rng.normal(size=3), rng.normal(size=3)
    norm.scale[...], norm.bias[...] = scale, bias
    expected, mean, var = reference_batch_norm(x, scale, bias, groups=4)
    np.testing.assert_allclose(norm(x, train=True), expected, rtol=1e-12)
    # Flax makes these in float32.
    np.testing.assert_allclose(norm.mean[...], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * var, rtol=1e-5)
    # In evaluation there are none.
    assert norm(x[:3], train=False).shape == (3, 3)


def test_statistics_per_device_need_no_other_device(tiny):
    """On as many devices as groups, only gradients and scalars are summed over devices."""
    counts = {}
    for groups in (1, 8):
        config = replace(NORMALISED, **UNCHANGED, batch_norm_groups=groups, method="sgd")
        program = compiled(Trainer(config, tiny(train=40), devices.mesh(8))).as_text()
        assert not re.search("all-gather|all-to-all|collective-permute", program)
        counts[groups] = len(re.findall(r"all-reduce(?:-start)?\(", program))
    assert counts[8] < counts[1]


# --- micro-batches ------------------------------------------------------------------------------------------------


def test_a_sum_over_micro_batches():
    batch = {"x": jnp.arange(12.0).reshape(6, 2)}
    seen = []

    def f(part, key):
        seen.append(part["x"].shape)
        return part["x"].sum() + key, part["x"][:, 0] * 2

    total, rows = jax.jit(lambda batch: accumulate(f, batch, jnp.array([100.0, 200.0, 300.0]), 3))(batch)
    assert set(seen) == {(2, 2)} and total == 66 + 600
    np.testing.assert_array_equal(rows, 2 * batch["x"][:, 0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "count", "devices"), [({}, 4, 1), ({}, 2, 8), (CO_TEACHING | {"method": "sgd"}, 4, 2)]
)
def test_micro_batches_take_the_steps_of_the_whole_batch(variant, count, devices, tiny):
    config, dataset = replace(PLAIN, **variant), tiny(train=40)
    accumulated = trained(replace(config, accumulate=count), dataset, devices)
    assert_same(accumulated.state, trained(config, dataset).state)


def test_batch_norm_sees_one_micro_batch_at_a_time(tiny):
    """Micro-batches of every fourth sample are groups of a batch that holds these samples one after the other."""
    config = replace(NORMALISED, dropout=0.0, augment=False, batch_norm_pass="perturbed")
    dataset = tiny(train=16)
    accumulated = trained(replace(config, accumulate=4), dataset, steps=1)
    images, labels = dataset.train.images, dataset.train.labels
    order = np.asarray(epoch_order(config.seed, 0, 16)).reshape(4, 4).T.ravel()
    grouped = Trainer(replace(config, batch_norm_groups=4), dataset, devices.mesh(1))
    batch = jnp.asarray(images[order]), jnp.asarray(labels[order])
    assert_same(accumulated.state, grouped._functions.train_batch(in_float64(grouped.state), grouped._seed, *batch))


def test_dropout_masks_are_the_same_in_both_passes_over_micro_batches(tiny):
    """So that without a perturbation there is no difference between the gradients."""
    config = replace(PLAIN, dropout=0.3, accumulate=2, method="sam", rho=0.0)
    monitored = methods.monitored(trained(config, tiny(train=40), steps=1).state.networks[0].opt_state)
    np.testing.assert_allclose(monitored.perturbed_gradient_norm, monitored.gradient_norm, rtol=1e-12)
    np.testing.assert_allclose(monitored.cosine, 1, rtol=1e-12)


def test_micro_batches_in_a_loop_need_less_memory(tiny, monkeypatch):
    """As on accelerators. Where the loop is written out, on CPUs, XLA keeps as much as for the whole batch."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    needed = {}
    for count in (1, 4):
        config = replace(PLAIN, method="sgd", batch_size=512, accumulate=count)
        trainer = Trainer(config, tiny(train=512), devices.mesh(1))
        needed[count] = compiled(trainer).memory_analysis().temp_size_in_bytes
    assert needed[4] < 0.5 * needed[1], needed


# --- what cannot be -----------------------------------------------------------------------------------------------


def test_batches_that_cannot_be_divided(tiny):
    config = replace(PLAIN, batch_size=20, accumulate=2)
    with pytest.raises(UserError, match=r"--batch-size 20 is not a multiple of 16, the number of devices \(8\) times"):
        Trainer(config, tiny(), devices.mesh(8))
    with pytest.raises(UserError, match=r"--batch-size 20 is not a multiple of 8, --accumulate \(2\) times"):
        check(replace(config, batch_norm_groups=4))


@pytest.mark.parametrize("count", [0, 9, -1])
def test_more_devices_than_there_are(count):
    with pytest.raises(UserError, match=rf"--devices {count} cannot be shared out.*up to 8"):
        devices.mesh(count)
