"""The analysis of gradients against a plain reference; it changes nothing, and goes on where a run was stopped."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.noisy_images import cli, data, files, models
from examples.noisy_images.config import configure, replace
from examples.noisy_images.data import augmentation
from examples.noisy_images.errors import UserError
from examples.noisy_images.measures import gradient_analysis
from examples.noisy_images.models import layers
from examples.noisy_images.training import companions, devices, logs, run
from examples.noisy_images.training.checkpoints import Checkpoints
from examples.noisy_images.training.step import epoch_order, running_metrics
from examples.noisy_images.training.trainer import Trainer
from saner_jax import analysis

SHARES = {"turned_share", "downweighted_share", "grown_share"}
ALIGNMENTS = {
    f"alignment_{name}{suffix}"
    for name in ("noisy", "clean", "random", "random_clean")
    for suffix in ("", "_per_tensor")
}
# BatchNorm, dropout and augmentation, so that each of them can go wrong.
CONFIG = configure(
    model="normalised",
    method="sgd",
    dropout=0.3,
    batch_size=8,
    epochs=4,
    rho=0.2,
    seed=5,
    analyse_batches=2,
    scan_epochs=False,
)


class Normalised(nnx.Module):
    """A small network with BatchNorm and dropout, in which no parameter has a gradient of zero."""

    def __init__(self, layers, *, num_classes, image_shape, width, dropout):
        self.hidden = layers.linear(math.prod(image_shape), 8)
        self.norm = layers.batch_norm(8)
        self.dropout = nnx.Dropout(dropout)
        self.classifier = layers.linear(8, num_classes)

    def __call__(self, x, train, rngs=None):
        x = self.norm(nnx.tanh(self.hidden(x.reshape(x.shape[0], -1))), train)
        return self.classifier(self.dropout(x, deterministic=not train, rngs=rngs))


pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(autouse=True)
def normalised(monkeypatch):
    monkeypatch.setitem(models.MODELS, "normalised", models.Model("", Normalised, layers.TORCH_DEFAULT))


def steps(trainer, count):
    """Take some steps."""
    until = trainer.step + count
    while trainer.step < until:
        list(trainer.train_epoch(lambda: trainer.step >= until))


class Reference:
    """The quantities of one batch of a trainer that stands at the end of an epoch, in NumPy from JAX's gradients."""

    def __init__(self, trainer, number):
        config, dataset = trainer.config, trainer.dataset
        network = trainer.state.networks[0]
        model = models.create(
            config.network.model, num_classes=3, image_shape=dataset.image_shape, seed=0, dropout=config.network.dropout
        )
        self.graphdef, self.statistics = nnx.graphdef(model), network.statistics
        order_key, augment_key, dropout_key = (
            jax.random.fold_in(jax.random.key(config.seed), stream) for stream in range(3)
        )
        step, size, train = trainer.step + number, config.training.batch_size, dataset.train
        order = np.asarray(jax.random.permutation(jax.random.fold_in(order_key, trainer.epoch), len(train)))
        chosen = order[number * size : (number + 1) * size]
        images = augmentation.augment(
            jax.random.fold_in(augment_key, step),
            jnp.asarray(train.images[chosen]),
            crop_padding=dataset.crop_padding,
            flip=dataset.flip,
        )
        self.images = augmentation.normalise(images, dataset.mean, dataset.std)
        self.labels = train.labels[chosen]
        self.is_noisy = self.labels != train.clean_labels[chosen]
        self.dropout_key = jax.random.fold_in(dropout_key, step)
        self.names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(network.params)]

        self.gradient_of = jax.jit(jax.grad(self.loss))
        self.g = self.gradient(network.params, np.ones(size))
        norm = np.sqrt(sum((leaf**2).sum() for leaf in self.g))
        moved = [
            w + np.float32(config.optimizer.rho / norm) * g.astype(np.float32)
            for w, g in zip(jax.tree.leaves(network.params), self.g, strict=True)
        ]
        self.h = self.gradient(jax.tree.unflatten(jax.tree.structure(network.params), moved), np.ones(size))
        self.noisy = self.gradient(network.params, self.is_noisy)
        self.clean = self.gradient(network.params, ~self.is_noisy)
        self.ratio = [h / np.where(g == 0, np.nan, g) for g, h in zip(self.g, self.h, strict=True)]
        self.downweighted = [(r > 0) & (r < 1) for r in self.ratio]

    def loss(self, params, counted):
        model = nnx.merge(self.graphdef, params, self.statistics, copy=True)
        logits = model(self.images, train=True, rngs=nnx.Rngs(dropout=self.dropout_key))
        log_probabilities = jax.nn.log_softmax(logits)[jnp.arange(len(self.labels)), self.labels]
        return -jnp.sum(log_probabilities * counted) / len(self.labels)

    def gradient(self, params, counted):
        """Gradient of the counted samples' part of the mean loss, one float64 array a parameter."""
        gradient = self.gradient_of(params, counted.astype(np.float32))
        return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(gradient)]

    def shares(self):
        """turned, downweighted, grown: of all elements, and of each parameter."""
        groups = {
            "turned": [r < 0 for r in self.ratio],
            "downweighted": self.downweighted,
            "grown": [r > 1 for r in self.ratio],
        }
        whole = {f"{name}_share": np.concatenate([m.ravel() for m in masks]).mean() for name, masks in groups.items()}
        return whole, {name: [m.mean() for m in masks] for name, masks in groups.items()}

    def alignment(self, masks, reference):
        chosen = [g * m for g, m in zip(self.g, masks, strict=True)]
        flat = [np.concatenate([leaf.ravel() for leaf in tree]) for tree in (chosen, reference)]
        by_leaf = [cosine(a, b) for a, b in zip(chosen, reference, strict=True)]
        return cosine(*flat), by_leaf


def cosine(a, b):
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return (a * b).sum() / norms if norms else 0.0


@pytest.mark.slow
def test_a_batch_against_a_plain_reference(tiny):
    trainer = Trainer(CONFIG, tiny())
    steps(trainer, 3)
    measured = trainer.analyse_gradients()
    references = [Reference(trainer, number) for number in range(2)]
    assert all(0 < r.is_noisy.sum() < 8 for r in references)
    assert set(measured.metrics) == SHARES | ALIGNMENTS
    assert list(measured.leaves) == references[0].names and "norm.scale" in measured.leaves

    # Of the elements nearest to a border of the ratio, one or two may fall on its other side in float32.
    count = sum(leaf.size for leaf in references[0].g)
    for name in SHARES:
        expected = np.mean([r.shares()[0][name] for r in references])
        assert measured.metrics[name] == pytest.approx(expected, abs=2 / count) and 0 < expected < 1
    for name in ("noisy", "clean"):
        whole, by_leaf = zip(*(r.alignment(r.downweighted, getattr(r, name)) for r in references), strict=True)
        assert measured.metrics[f"alignment_{name}"] == pytest.approx(np.mean(whole), abs=2e-3)
        assert measured.metrics[f"alignment_{name}_per_tensor"] == pytest.approx(np.mean(by_leaf), abs=2e-2)
    # The classifier, whose gradients are far from rounding errors.
    (position,) = (i for i, name in enumerate(references[0].names) if name == "classifier.kernel")
    of_classifier = measured.leaves["classifier.kernel"]
    assert set(of_classifier) == {"turned", "downweighted", "grown", "alignment_noisy"}
    for name in ("turned", "downweighted", "grown"):
        expected = np.mean([r.shares()[1][name][position] for r in references])
        assert of_classifier[name] == pytest.approx(expected, abs=1 / 24)
    expected = np.mean([r.alignment(r.downweighted, r.noisy)[1][position] for r in references])
    assert of_classifier["alignment_noisy"] == pytest.approx(expected, abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("micro_batches", "device_count"), [(1, 1), (2, 1), (2, 2)])
def test_the_first_batch_is_that_of_the_next_step(micro_batches, device_count, tiny):
    config = replace(CONFIG, method="saner", companion="bootstrapping", analyse_batches=1, accumulate=micro_batches)
    trainer = Trainer(config, tiny(), devices.mesh(device_count))
    steps(trainer, 6)
    measured = trainer.analyse_gradients().metrics
    steps(trainer, 1)
    running = running_metrics(trainer.state)
    # SANER's own mask, from its own two passes.
    assert measured["downweighted_share"] == pytest.approx(running["running_downweighted_share"], abs=1e-6)
    assert 0.1 < measured["downweighted_share"] < 0.9


def test_noisy_and_clean_samples_make_up_the_gradient():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        images, labels, is_noisy = rng.normal(size=(10, 6)), rng.integers(0, 3, 10), np.arange(10) < 4
        params = {"w": jnp.asarray(rng.normal(size=(6, 3))), "scale": jnp.ones(6)}

        def sample_losses(params):
            # As BatchNorm does it, over all samples.
            x = (images - images.mean(0)) / images.std(0) * params["scale"]
            return companions.cross_entropy(jnp.tanh(x) @ params["w"], labels)

        def linearise(params):
            losses, pullback = jax.vjp(sample_losses, params)
            return losses, lambda weights: pullback(weights)[0]

        g, h, noisy, clean = gradient_analysis.gradients(linearise, params, jnp.asarray(is_noisy), 0.3)
        jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a + b, c, atol=1e-16), noisy, clean, g)
        of_noisy = jax.grad(lambda p: jnp.sum(sample_losses(p)[:4]) / 10)(params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-16), noisy, of_noisy)
        norm = math.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(g)))
        at = jax.tree.map(lambda w, d: w + 0.3 / norm * d, params, g)
        perturbed = jax.grad(lambda p: sample_losses(p).mean())(at)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-15), h, perturbed)


def synthetic(key=0):
    """Two leaves, one of which is down-weighted altogether and is all that noisy samples contribute to."""
    a, b = np.random.default_rng(key).normal(size=(2, 40, 50)).astype(np.float32)
    g = {"grown": jnp.asarray(a), "shrunk": jnp.asarray(b)}
    h = {"grown": 2 * g["grown"], "shrunk": g["shrunk"] / 2}
    noisy = {"grown": jnp.zeros_like(g["grown"]), "shrunk": g["shrunk"]}
    return gradient_analysis.Gradients(g, h, noisy, jax.tree.map(jnp.subtract, g, noisy))


def test_the_control_keeps_the_size_of_every_leaf():
    values, leaves = gradient_analysis.measure(synthetic(), jax.random.key(0))
    # None of one leaf and all of the other: the only random set of these sizes is the down-weighted one.
    assert values["alignment_noisy"] == pytest.approx(1) and values["alignment_clean"] == 0
    assert values["alignment_random"] == pytest.approx(1) and values["alignment_random_clean"] == 0
    np.testing.assert_array_equal(leaves["downweighted"], [0, 1])
    np.testing.assert_allclose(leaves["alignment_noisy"], [0, 1], rtol=1e-6)


def test_the_control_is_random():
    batch = synthetic()
    sign = np.where(np.arange(50) < 15, 0.5, 2).astype(np.float32)
    # The first 15 of 50 columns shrink, and noisy samples contribute to them alone.
    batch = batch._replace(
        perturbed=jax.tree.map(lambda g: g * sign, batch.unperturbed),
        of_noisy=jax.tree.map(lambda g: g * (sign < 1), batch.unperturbed),
    )
    first, second = (gradient_analysis.measure(batch, jax.random.key(seed))[0] for seed in (0, 1))
    assert first["downweighted_share"] == pytest.approx(0.3)
    assert first["alignment_noisy"] == pytest.approx(1) == first["alignment_noisy_per_tensor"]
    # A random set that covers a share of the noisy elements has the cosine of that share: 0.3 of them.
    assert first["alignment_random"] == pytest.approx(0.3, abs=0.05)
    assert first["alignment_random"] != second["alignment_random"]


def test_what_needs_noisy_samples_is_absent_without_them(tiny):
    dataset = tiny()
    unknown = dataclasses.replace(dataset, train=dataclasses.replace(dataset.train, clean_labels=None))
    clean = dataclasses.replace(dataset, train=dataclasses.replace(dataset.train, labels=dataset.train.clean_labels))
    for without in (unknown, clean):
        measured = Trainer(CONFIG, without).analyse_gradients()
        assert set(measured.metrics) == SHARES
        assert all(set(leaf) == {"turned", "downweighted", "grown"} for leaf in measured.leaves.values())


def test_a_mean_is_over_the_batches_that_have_the_quantity(tiny):
    dataset = tiny(wrong=0)
    order = np.asarray(epoch_order(jnp.uint32(CONFIG.seed), 0, 24))
    labels = dataset.train.clean_labels.copy()
    # The first batch has clean samples alone, the second noisy ones alone.
    labels[order[8:16]] = (labels[order[8:16]] + 1) % 3
    dataset = dataclasses.replace(dataset, train=dataclasses.replace(dataset.train, labels=labels))
    trainer = Trainer(CONFIG, dataset)
    measured = trainer.analyse_gradients().metrics
    assert set(measured) == SHARES | {name for name in ALIGNMENTS if "clean" not in name}
    second = Reference(trainer, 1)
    assert second.is_noisy.all() and not Reference(trainer, 0).is_noisy.any()
    assert measured["alignment_noisy"] == pytest.approx(second.alignment(second.downweighted, second.g)[0], abs=2e-3)


def test_streamed_images_are_those_of_the_coming_steps(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for label in ("cat", "dog"):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (14 + i, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    dataset = data.load("folder", data_dir=tmp_path, image_size=8)
    assert dataset.train.streamed
    trainer = Trainer(replace(CONFIG, batch_size=4, workers=0), dataset)
    trainer.state = trainer.state._replace(step=jnp.int32(3))
    analysed, trained = [], []

    def analyse(network, seed, step, images, labels, is_noisy):
        analysed.append((step, images, labels))
        assert is_noisy is None
        return {"turned_share": step / 10}, {"turned": np.zeros(6)}

    def train_batch(state, seed, images, labels):
        trained.append((int(state.step), images, labels))
        return state._replace(step=state.step + 1)

    trainer._functions = trainer._functions._replace(analyse=analyse, train_batch=train_batch)
    assert trainer.analyse_gradients().metrics == {"turned_share": pytest.approx(0.35)}
    list(trainer.train_epoch())
    assert [step for step, *_ in trained] == [3, 4, 5]
    jax.tree.map(np.testing.assert_array_equal, analysed, trained[:2])


# --- runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_config(npz):
    return configure(
        dataset="npz",
        data_dir=str(npz(train=32, wrong=10)),
        noise="none",
        model="mlp",
        width=1 / 64,
        dropout=0.2,
        method="saner",
        batch_size=8,
        epochs=3,
        rho=0.2,
        scan_epochs=False,
        analyse_batches=2,
    )


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(run, "_optional", lambda write: None)


def end_of(folder, config):
    trainer = Trainer(config, run.prepare(config).dataset)
    checkpoints = Checkpoints(folder / "checkpoints", config)
    state, _ = checkpoints.restore(trainer.state)
    checkpoints.close()
    return state


def metrics_of(folder):
    records = files.read_json_lines(folder / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in ("seconds", "steps_per_second")} for record in records]


@pytest.mark.slow
def test_it_changes_nothing_and_is_written(run_config, tmp_path, no_figures, capsys):
    run.train(run_config, tmp_path / "analysed")
    plain = replace(run_config, analyse_batches=0)
    run.train(plain, tmp_path / "plain")
    jax.tree.map(
        np.testing.assert_array_equal, end_of(tmp_path / "analysed", run_config), end_of(tmp_path / "plain", plain)
    )
    analysed, without = metrics_of(tmp_path / "analysed"), metrics_of(tmp_path / "plain")
    assert [{k: v for k, v in r.items() if k not in SHARES | ALIGNMENTS} for r in analysed] == without
    assert all(r.keys() >= SHARES | ALIGNMENTS for r in analysed)
    assert not (tmp_path / "plain" / "analysis.jsonl").exists()
    lines = files.read_json_lines(tmp_path / "analysed" / "analysis.jsonl")
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert list(lines[0]["leaves"]) == [
        f"{layer}.{kind}" for layer in ("classifier", "hidden1", "hidden2") for kind in ("bias", "kernel")
    ]

    # The figures of what was written.
    for figure in ("2", "alignment", "shares", "layers"):
        output = tmp_path / f"{figure}.png"
        cli.main(["plot", str(tmp_path / "analysed"), "--figure", figure, "--output", str(output)])
        assert output.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        cli.main(["plot", str(tmp_path / "plain"), "--figure", "layers", "--output", str(tmp_path / "no.png")])
    assert "plain has no analysis of its gradients: train with --analyse-batches" in capsys.readouterr().err
    assert not (tmp_path / "no.png").exists()


class Impatient(logs._Lines):
    """A display that interrupts twice when the run stands after a step, so that nothing more is saved."""

    def step(self, step):
        if step == 10:
            raise KeyboardInterrupt


def test_a_run_goes_on_with_its_analysis(run_config, tmp_path, no_figures, monkeypatch):
    run.train(run_config, tmp_path / "whole")
    sparse = replace(run_config, checkpoint_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(logs, "progress", lambda label, epochs, *_: Impatient(label, epochs))
        with pytest.raises(KeyboardInterrupt):
            run.train(sparse, tmp_path / "stopped")
    # Killed after an epoch was analysed and before its checkpoint, and in the middle of a line.
    path = tmp_path / "stopped" / "analysis.jsonl"
    with open(path, "a") as file:
        file.write(json.dumps({"epoch": 3, "leaves": {}}) + '\n{"epoch": 4, "le')
    run.resume(tmp_path / "stopped")
    assert path.read_text() == (tmp_path / "whole" / "analysis.jsonl").read_text()
    assert metrics_of(tmp_path / "stopped") == metrics_of(tmp_path / "whole")


def test_numbers_of_batches_that_cannot_be(tiny, run_config):
    with pytest.raises(UserError, match=r"--analyse-batches 4 is more than the 3 batches of an epoch; choose fewer"):
        Trainer(replace(CONFIG, analyse_batches=4), tiny())
    with pytest.raises(UserError, match=r"--analyse-batches must be at least 0, got -1"):
        run.prepare(replace(run_config, analyse_batches=-1))


def test_runs_with_and_without_it_share_what_is_compiled(tiny):
    with_it, without = (Trainer(replace(CONFIG, analyse_batches=count), tiny()) for count in (2, 0))
    assert with_it._functions is without._functions
    with_it.analyse_gradients()
    compiled = with_it._functions.analyse._cache_size()
    steps(with_it, 3)
    with_it.analyse_gradients()
    assert with_it._functions.analyse._cache_size() == compiled


def test_names_of_leaves_are_in_the_order_of_the_leaves():
    params = {"b": jnp.zeros(1), "a": [jnp.zeros(2) for _ in range(11)]}
    assert gradient_analysis.leaf_names(params) == [f"a.{i}" for i in range(11)] + ["b"]
    assert analysis.__name__ == "saner_jax.analysis"
