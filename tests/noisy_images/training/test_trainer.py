"""The trainer against a plain loop, and its promises: one batch in both passes, one compilation, every sample once."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import saner_jax
from examples.noisy_images import data, models
from examples.noisy_images.config import configure, replace
from examples.noisy_images.data import augmentation
from examples.noisy_images.errors import UserError
from examples.noisy_images.models import layers
from examples.noisy_images.training import companions, methods
from examples.noisy_images.training.step import running_metrics
from examples.noisy_images.training.trainer import Trainer, _steps_per_call, check_memory

# Everything random switched on; settings without a round number, so that none can be mistaken for another.
MLP = configure(
    model="mlp",
    width=1 / 64,
    dropout=0.3,
    epochs=4,
    batch_size=8,
    rho=0.2,
    alpha=0.9,
    alpha_ramp=0.0,
    learning_rate=0.07,
    momentum=0.8,
    weight_decay=0.01,
    seed=5,
    scan_epochs=False,
)
NORMALISED = replace(MLP, model="normalised")


class Normalised(nnx.Module):
    """The smallest network with BatchNorm and dropout."""

    def __init__(self, layers, *, num_classes, image_shape, width, dropout):
        self.hidden = layers.linear(math.prod(image_shape), 8)
        self.norm = layers.batch_norm(8)
        self.dropout = nnx.Dropout(dropout)
        self.classifier = layers.linear(8, num_classes)

    def __call__(self, x, train, rngs=None):
        x = nnx.relu(self.norm(self.hidden(x.reshape(x.shape[0], -1)), train))
        return self.classifier(self.dropout(x, deterministic=not train, rngs=rngs))


@pytest.fixture(autouse=True)
def normalised(monkeypatch):
    monkeypatch.setitem(models.MODELS, "normalised", models.Model("", Normalised, layers.TORCH_DEFAULT))


def assert_close(actual, expected, rtol=1e-5):
    """Leaf by leaf, measured by the largest entry."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=rtol * np.abs(b).max(), rtol=0, err_msg=jax.tree_util.keystr(path))


def assert_equal(actual, expected):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


@pytest.fixture
def train(eager):
    """Train some steps, or an epoch."""

    def run(config, dataset, steps=None, jit=False):
        trainer = Trainer(config, dataset)
        if not jit:
            eager(trainer)
        steps = steps or trainer.steps_per_epoch
        while trainer.step < steps:
            list(trainer.train_epoch(lambda: trainer.step >= steps))
        return trainer

    return run


class Plain:
    """What a training script would say: a model, a loss, an optimizer, the library."""

    def __init__(self, config, dataset, stage, seed=None):
        self.config, self.dataset = config, dataset
        model = models.create(
            config.network.model,
            num_classes=dataset.num_classes,
            image_shape=dataset.image_shape,
            seed=config.seed if seed is None else seed,
            width=config.network.width,
            dropout=config.network.dropout,
        )
        self.graphdef, self.params, self.statistics = nnx.split(model, nnx.Param, nnx.BatchStat)
        self.tx = optax.chain(
            stage,
            optax.add_decayed_weights(config.optimizer.weight_decay),
            optax.sgd(config.optimizer.learning_rate, momentum=config.optimizer.momentum),
        )
        self.opt_state = self.tx.init(self.params)

    def batch(self, step):
        """Images and labels of a step, and its dropout key."""
        root = jax.random.key(self.config.seed)
        order_key, augment_key, dropout_key = (jax.random.fold_in(root, stream) for stream in range(3))
        size, train = self.config.training.batch_size, self.dataset.train
        epoch, number = divmod(step, len(train) // size)
        order = jax.random.permutation(jax.random.fold_in(order_key, epoch), len(train))
        chosen = np.asarray(order)[number * size : (number + 1) * size]
        images = augmentation.augment(
            jax.random.fold_in(augment_key, step),
            jnp.asarray(train.images[chosen]),
            crop_padding=self.dataset.crop_padding,
            flip=self.dataset.flip,
        )
        images = augmentation.normalise(images, self.dataset.mean, self.dataset.std)
        return images, jnp.asarray(train.labels[chosen]), jax.random.fold_in(dropout_key, step)

    def forward(self, params, images, key):
        model = nnx.merge(self.graphdef, params, self.statistics, copy=True)
        logits = model(images, train=True, rngs=nnx.Rngs(dropout=key))
        return logits, nnx.state(model, nnx.BatchStat)

    def step(self, step, sample_loss=companions.cross_entropy, picks=slice(None), statistics_at="w"):
        images, labels, key = self.batch(step)

        def loss(params):
            return sample_loss(self.forward(params, images, key)[0], labels)[picks].mean()

        perturbed = []

        def grad_fn(params):
            perturbed.append(params)
            return jax.grad(loss)(params)

        updates, self.opt_state = self.tx.update(
            jax.grad(loss)(self.params), self.opt_state, self.params, grad_fn=grad_fn
        )
        _, self.statistics = self.forward(self.params if statistics_at == "w" else perturbed[0], images, key)
        self.params = optax.apply_updates(self.params, updates)


STAGES = {"sgd": lambda: optax.identity(), "saner": lambda: saner_jax.saner(0.2, 0.9)}


@pytest.mark.slow
@pytest.mark.parametrize("method", STAGES)
def test_a_step_is_what_a_plain_loop_does(method, tiny, train):
    config, dataset = replace(NORMALISED, method=method), tiny()
    plain = Plain(config, dataset, STAGES[method]())
    trainer = train(config, dataset, steps=4)
    for step in range(4):
        plain.step(step)
    network = trainer.state.networks[0]
    assert_close(network.params, plain.params)
    assert_close(network.statistics, plain.statistics)
    assert trainer.step == 4 and trainer.epoch == 1


@pytest.mark.slow
def test_a_compiled_step_is_the_same(tiny, train):
    dataset = tiny()
    compiled, plain = (train(MLP, dataset, steps=4, jit=jit) for jit in (True, False))
    assert_close(compiled.state, plain.state, rtol=1e-4)


def test_both_passes_see_one_batch_and_one_dropout_mask(tiny, train):
    dataset = tiny()
    sgd = train(replace(NORMALISED, method="sgd"), dataset, steps=2)
    sam = train(replace(NORMALISED, method="sam", rho=0.0), dataset, steps=2)
    other = train(replace(NORMALISED, method="sgd", seed=6), dataset, steps=2)
    assert_equal(sam.state.networks[0].params, sgd.state.networks[0].params)
    assert_equal(sam.state.networks[0].statistics, sgd.state.networks[0].statistics)
    assert not np.allclose(other.state.running.loss, sgd.state.running.loss)


@pytest.mark.parametrize(("batch_norm_pass", "at"), [("unperturbed", "w"), ("perturbed", "w + eps")])
def test_batch_norm_statistics_come_from_the_pass_that_was_asked_for(batch_norm_pass, at, tiny, train):
    config, dataset = replace(NORMALISED, batch_norm_pass=batch_norm_pass, rho=2.0), tiny()
    trainer = train(config, dataset, steps=1)
    statistics = {}
    for where in ("w", "w + eps"):
        plain = Plain(config, dataset, saner_jax.saner(2.0, 0.9))
        plain.step(0, statistics_at=where)
        statistics[where] = plain.statistics
    assert_close(trainer.state.networks[0].statistics, statistics.pop(at))
    with pytest.raises(AssertionError):
        assert_close(trainer.state.networks[0].statistics, *statistics.values(), rtol=1e-2)


def test_hard_bootstrapping_trains_on_its_own_loss(tiny, train):
    config, dataset = replace(MLP, companion="bootstrapping"), tiny()
    plain = Plain(config, dataset, saner_jax.saner(0.2, 0.9))
    for step in range(2):
        plain.step(step, companions.hard_bootstrapping)
    assert_close(train(config, dataset, steps=2).state.networks[0].params, plain.params)


@pytest.mark.slow
def test_co_teaching_steps_on_the_others_picks_in_both_passes(tiny, train):
    config = replace(MLP, companion="co-teaching", forget_rate=0.4, forget_ramp_epochs=0)
    dataset = tiny()
    pair = [Plain(config, dataset, saner_jax.saner(0.2, 0.9), seed) for seed in (5, 5 + 2**31)]
    for step in range(2):
        images, labels, key = pair[0].batch(step)
        losses = [companions.cross_entropy(p.forward(p.params, images, key)[0], labels) for p in pair]
        # int((1 - 0.4) 8) = 4 samples of smallest loss.
        picks = [np.argsort(loss)[:4] for loss in losses]
        assert set(picks[0].tolist()) != set(picks[1].tolist())
        for network, of_the_other in zip(pair, reversed(picks), strict=True):
            network.step(step, picks=of_the_other)
    trainer = train(config, dataset, steps=2)
    for network, plain in zip(trainer.state.networks, pair, strict=True):
        assert_close(network.params, plain.params, rtol=1e-4)
    # The first is the one that is reported.
    losses = trainer.evaluate(dataset.test).losses
    logits = [logits_on_test(pair[0], network, dataset) for network in trainer.state.networks]
    first, second = (companions.cross_entropy(x, jnp.asarray(dataset.test.labels)) for x in logits)
    np.testing.assert_allclose(losses, first, rtol=1e-5)
    assert np.abs(losses - second).max() > 1e-2


def logits_on_test(plain, network, dataset):
    model = nnx.merge(plain.graphdef, network.params, network.statistics)
    return model(augmentation.normalise(jnp.asarray(dataset.test.images), dataset.mean, dataset.std), train=False)


def test_co_teaching_compiles_once_while_its_count_moves(tiny, train):
    config = replace(MLP, method="sgd", companion="co-teaching", forget_rate=0.9, forget_ramp_epochs=3, epochs=3)
    trainer = train(config, tiny(), steps=9, jit=True)
    assert trainer._functions.train_step._cache_size() == 1
    shapes = {jax.tree.structure(n) for n in trainer.state.networks}
    assert len(trainer.state.networks) == 2 and len(shapes) == 1


@pytest.mark.parametrize(
    ("scan", "device", "of_epoch", "steps"),
    [
        (None, "cpu", 390, 6),
        (None, "cpu", 56, 8),
        (None, "cpu", 5, 5),
        (None, "cpu", 61, 1),
        (None, "gpu", 61, 61),
        (True, "cpu", 61, 61),
        (False, "gpu", 56, 1),
    ],
)
def test_the_steps_of_a_call_divide_an_epoch(scan, device, of_epoch, steps, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: device)
    assert _steps_per_call(scan, of_epoch) == steps


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, None])
def test_steps_in_one_call_are_the_loop_over_them(scan, tiny, train):
    dataset = tiny()
    looped = train(MLP, dataset, steps=6, jit=True)
    scanned = Trainer(replace(MLP, scan_epochs=scan), dataset)
    assert [list(scanned.train_epoch()) for _ in range(2)] == [[3], [6]]
    assert_close(scanned.state, looped.state, rtol=1e-4)
    # What was left half-way in a call is finished step by step.
    scanned.state = train(MLP, dataset, steps=4, jit=True).state
    assert list(scanned.train_epoch()) == [5, 6]
    assert_close(scanned.state, looped.state, rtol=1e-4)


def test_seeds_share_what_is_compiled(tiny, train):
    dataset = tiny()
    first = train(MLP, dataset, steps=3, jit=True)
    compiled = first._functions.train_step._cache_size()
    others = [
        train(
            replace(MLP, seed=seed, noise_seed=seed, rate=0.1, evaluate_every=3),
            tiny(wrong=seed),
            steps=3,
            jit=True,
        )
        for seed in (6, 7)
    ]
    assert all(o._functions is first._functions for o in others)
    assert first._functions.train_step._cache_size() == compiled == 1
    assert not np.allclose(*(jax.tree.leaves(o.state.networks[0].params)[0] for o in others))


def test_a_seed_is_a_run(tiny, train):
    dataset = tiny()
    once, again = (train(MLP, dataset, steps=4, jit=True) for _ in range(2))
    assert_equal(once.state, again.state)


def test_every_epoch_visits_the_samples_in_an_order_of_its_own(tiny):
    dataset = tiny(train=27)
    trainer = Trainer(MLP, dataset)
    visited = []

    def spy(state, seed, images, order):
        visited.append(np.asarray(order)[8 * (len(visited) % 3) :][:8])
        return state._replace(step=state.step + 1)

    trainer._functions = trainer._functions._replace(train_step=spy)
    for _ in range(2):
        list(trainer.train_epoch())
    first, second = np.concatenate(visited[:3]), np.concatenate(visited[3:])
    # The last short batch is dropped.
    assert len(set(first.tolist())) == len(first) == 24 and len(set(second.tolist())) == 24
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("batch", [4, 5, 9, 10, 500])
def test_evaluation_covers_every_sample_once(batch, tiny, monkeypatch):
    monkeypatch.setattr("examples.noisy_images.training.trainer.EVALUATION_BATCH", batch)
    dataset = tiny()
    split = dataclasses.replace(dataset.test, labels=np.arange(10, dtype=np.int32))
    trainer = Trainer(MLP, dataset)
    shapes = []

    def spy(network, images, labels):
        shapes.append(images.shape)
        # The image, too, must be that of the label.
        return images.astype(jnp.float32).sum((1, 2, 3)), labels, -labels

    trainer._functions = trainer._functions._replace(evaluate=spy)
    sums, labels, negative = trainer.evaluate(split)
    np.testing.assert_array_equal(labels, np.arange(10))
    np.testing.assert_array_equal(negative, -np.arange(10))
    np.testing.assert_array_equal(sums, split.images.sum((1, 2, 3)))
    assert len(set(shapes)) == 1


@pytest.mark.slow
def test_evaluation_is_in_evaluation_mode(tiny, train):
    dataset = tiny()
    trainer = train(NORMALISED, dataset, steps=1)
    losses, predictions, margins = trainer.evaluate(dataset.test)
    logits = logits_on_test(Plain(NORMALISED, dataset, optax.identity()), trainer.state.networks[0], dataset)
    np.testing.assert_allclose(losses, companions.cross_entropy(logits, jnp.asarray(dataset.test.labels)), rtol=1e-5)
    np.testing.assert_array_equal(predictions, np.asarray(logits).argmax(axis=1))
    leads = [z[y] - max(np.delete(z, y)) for z, y in zip(np.asarray(logits), dataset.test.labels, strict=True)]
    np.testing.assert_allclose(margins, leads, rtol=1e-4, atol=1e-5)


def test_no_augmentation_leaves_the_images_alone(tiny, train):
    config = replace(MLP, augment=False, dropout=0.0)
    dataset = tiny()
    trainer = train(config, dataset, steps=1)
    plain = Plain(config, dataclasses.replace(dataset, crop_padding=0, flip=False), saner_jax.saner(0.2, 0.9))
    plain.step(0)
    assert_close(trainer.state.networks[0].params, plain.params)


PRECISIONS = {"float32": ("HIGHEST", "xf32>"), "tf32": ("HIGH", "xf32>"), "bfloat16": ("DEFAULT", "xbf16>")}


def matrix_products(program):
    """The lines of a program's matrix products: those of a function that is called twice, as both passes do, twice."""
    functions = dict(re.findall(r"func\.func \w+ @(\w+)(.*?)\n  }", program, re.DOTALL))

    def of(name):
        for line in functions[name].splitlines():
            if called := re.search(r"\bcall @(\w+)", line):
                yield from of(called[1])
            elif "stablehlo.dot_general" in line:
                yield line

    return list(of("main"))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_compute_precision_is_that_of_the_network_alone(precision, tiny):
    dataset = tiny()
    trainer = Trainer(replace(MLP, method="gsam+saner", precision=precision), dataset)
    order = jnp.arange(24)
    with trainer._precision():
        step = trainer._functions.train_step.lower(trainer.state, trainer._seed, trainer._place(dataset.train), order)
    # Of the network alone: an inner product of gradients is a sum, which no precision of matrix products rounds.
    products = matrix_products(step.as_text())
    assert len(products) == 16 and not any(line.endswith("-> tensor<f32>") for line in products)
    name, dtype = PRECISIONS[precision]
    for line in products:
        assert f"precision = [{name}, {name}]" in line and dtype in line
    out, state = jax.tree.leaves(step.out_info), jax.tree.leaves(trainer.state)
    assert [x.dtype for x in out] == [x.dtype for x in state]
    floating = [x for x in jax.tree.leaves(trainer.state.networks) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floating} == {np.dtype(np.float32)}


@pytest.mark.slow
def test_bfloat16_trains(tiny, train):
    trainer = train(replace(MLP, method="sgd", precision="bfloat16"), tiny(), jit=True)
    assert np.isfinite(running_metrics(trainer.state)["running_loss"])


@pytest.mark.slow
def test_running_values_are_means_over_the_epoch_so_far(tiny, train):
    dataset = tiny()
    config = replace(MLP, dropout=0.0)
    losses, shares = [], []
    for steps in (1, 2, 3):
        trainer = train(config, dataset, steps=steps)
        losses.append(running_metrics(trainer.state)["running_loss"] * steps - sum(losses))
        shares.append(float(methods.monitored(trainer.state.networks[0].opt_state).downweighted_share))
    assert running_metrics(trainer.state)["running_downweighted_share"] == pytest.approx(np.mean(shares), rel=1e-5)
    plain = Plain(config, dataset, saner_jax.saner(0.2, 0.9))
    for step in range(3):
        images, labels, key = plain.batch(step)
        expected = companions.cross_entropy(plain.forward(plain.params, images, key)[0], labels).mean()
        assert losses[step] == pytest.approx(float(expected), rel=1e-4)
        plain.step(step)
    # A new epoch starts anew.
    list(trainer.train_epoch(lambda: True))
    assert int(trainer.state.running.steps) == 1
    trainer.state = trainer._functions.start_epoch(trainer.state)
    assert running_metrics(trainer.state) == {}


def test_the_first_loss_that_is_not_finite_is_remembered(tiny, train):
    config = replace(MLP, method="sgd", learning_rate=1e25, momentum=0.0)
    trainer = train(config, tiny(), steps=3)
    first, last = int(trainer.state.first_non_finite), float(trainer.state.last_finite_loss)
    assert 0 < first < 3 and np.isfinite(last)
    again = train(config, tiny(), steps=first)
    assert int(again.state.first_non_finite) == -1 and float(again.state.last_finite_loss) == last


def test_a_method_of_your_own_is_one_entry(tiny, eager, monkeypatch):
    monkeypatch.setitem(
        methods.METHODS, "signs", lambda p, **options: optax.stateless(lambda g, _: jax.tree.map(jnp.sign, g))
    )
    config = replace(MLP, method="signs", momentum=0.0, weight_decay=0.0)
    trainer = Trainer(config, tiny())
    before = jax.tree.map(np.asarray, trainer.state.networks[0].params)
    list(eager(trainer).train_epoch(lambda: True))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), trainer.state.networks[0].params, before)
    np.testing.assert_allclose(jax.tree.leaves(moved), config.optimizer.learning_rate, rtol=1e-4)


def test_a_batch_larger_than_the_data(tiny):
    with pytest.raises(UserError, match=r"--batch-size 25 is larger than the training set of 24 images"):
        Trainer(replace(MLP, batch_size=25), tiny())


def test_data_that_does_not_fit_on_the_device(tiny, monkeypatch):
    class Device:
        def memory_stats(self):
            return {"bytes_limit": 1000}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    with pytest.raises(UserError, match=r"the data needs .* GiB of the device's .* GiB.*--subset"):
        check_memory(tiny())
    Device.memory_stats = lambda self: None
    check_memory(tiny())


@pytest.fixture
def streamed(tmp_path):
    """A folder of photographs, each of a size of its own."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 3)):
        for label in ("cat", "dog"):
            folder = tmp_path / "photographs" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 256, (20 + i, 30 - i, 3), dtype=np.uint8)
                Image.fromarray(image).save(folder / f"{i}.png")
    return data.load("folder", data_dir=tmp_path / "photographs", image_size=12)


@pytest.mark.slow
def test_streamed_images_train_and_go_on_in_the_middle_of_an_epoch(streamed, train):
    assert streamed.train.streamed and streamed.test.streamed
    config = replace(MLP, method="sgd", batch_size=4, workers=0, precision="float32")
    whole = train(config, streamed, steps=7, jit=True)
    assert whole.epoch == 1 and whole.steps_per_epoch == 5
    halves = train(config, streamed, steps=3, jit=True)
    saved = jax.tree.map(np.array, halves.state)
    resumed = Trainer(config, streamed)
    resumed.state = jax.tree.map(jnp.array, saved)
    assert list(resumed.train_epoch()) == [4, 5]
    list(resumed.train_epoch(lambda: resumed.step == 7))
    assert_equal(resumed.state, whole.state)
    measured = whole.evaluate(streamed.test)
    assert all(x.shape == (6,) for x in measured) and np.isfinite(measured.losses).all()
