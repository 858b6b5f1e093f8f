"""Sharpness against dense Hessians and known spectra; what a run leaves behind."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.noisy_images import cli, files
from examples.noisy_images import config as configuration
from examples.noisy_images.config import configure, replace
from examples.noisy_images.errors import UserError
from examples.noisy_images.measures import sharpness as lanczos
from examples.noisy_images.paper import sharpness
from examples.noisy_images.training import run

pytestmark = pytest.mark.usefixtures("quick_compile")


def symmetric(spectrum, seed=0):
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(spectrum), len(spectrum))))
    return rotation @ np.diag(spectrum) @ rotation.T


# The largest one, not the largest in size; a negative one where all are negative.
@pytest.mark.parametrize(
    ("spectrum", "largest"),
    [
        (np.linspace(-1, 3, 60), 3),
        ([*np.linspace(0, 1, 59), 2.5], 2.5),
        ([-9, *np.linspace(-1, 2, 59)], 2),
        (np.linspace(-5, -1, 60), -1),
        ([1, 4], 4),
        ([0.5, 2, 3], 3),
    ],
)
def test_a_known_spectrum(spectrum, largest):
    matrix = symmetric(np.array(spectrum, float))
    seen = []
    found = lanczos.largest_eigenvalue(lambda v: seen.append(v) or matrix @ v, len(matrix), tolerance=1e-8)
    assert found.eigenvalue == pytest.approx(largest, rel=1e-7)
    assert found.residual < 1e-6 and found.products == len(seen) and found.seconds > 0
    # The residual is that of the vector it came with, the last one that was multiplied.
    expected = np.linalg.norm(matrix @ seen[-1] - found.eigenvalue * seen[-1]) / abs(found.eigenvalue)
    assert found.residual == pytest.approx(expected)


def test_a_quadratic():
    matrix = symmetric(np.linspace(-2, 7, 30))
    with jax.enable_x64(True):

        def loss(w, batch):
            return w["a"] @ batch @ w["a"] / 2 + jnp.sum(w["b"] ** 2)

        params = {"a": jnp.ones(30), "b": jnp.ones((2, 2))}
        product, size = lanczos.hessian_product(loss, params, [jnp.asarray(matrix)])
        assert size == 34
        found = lanczos.largest_eigenvalue(product, size, tolerance=1e-10)
    assert found.eigenvalue == pytest.approx(7, rel=1e-9)


def mlp(dtype):
    rng = np.random.default_rng(1)
    params = {
        "hidden": jnp.asarray(rng.normal(size=(4, 5)), dtype),
        "bias": jnp.asarray(rng.normal(size=5), dtype),
        "out": jnp.asarray(rng.normal(size=(5, 3)), dtype),
    }
    images, labels = jnp.asarray(rng.normal(size=(12, 4)), dtype), jnp.asarray(rng.integers(0, 3, 12))

    def loss(params, batch):
        x, y = batch
        logits = jnp.tanh(x @ params["hidden"] + params["bias"]) @ params["out"]
        return -jnp.sum(jax.nn.log_softmax(logits)[jnp.arange(len(y)), y]) / 12

    return loss, params, images, labels


def dense(loss, params, batch):
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    return np.asarray(jax.jit(jax.hessian(lambda flat: loss(unravel(flat), batch)))(flat), np.float64)


def test_a_dense_hessian_of_a_network():
    with jax.enable_x64(True):
        loss, params, images, labels = mlp(jnp.float64)
        hessian = dense(loss, params, (images, labels))
        product, size = lanczos.hessian_product(loss, params, [(images, labels)])
        vector = np.random.default_rng(2).normal(size=size)
        np.testing.assert_allclose(product(vector), hessian @ vector, rtol=1e-10)
        found = lanczos.largest_eigenvalue(product, size, tolerance=1e-9)
    values = np.linalg.eigvalsh(hessian)
    assert found.eigenvalue == pytest.approx(values[-1], rel=1e-8)
    # Saddle points have curvature below zero, too.
    assert values[0] < -1e-3


def test_batches_add_up_and_float32_is_enough():
    with jax.enable_x64(True):
        loss, params, images, labels = mlp(jnp.float64)
        largest = np.linalg.eigvalsh(dense(loss, params, (images, labels)))[-1]
        whole, size = lanczos.hessian_product(loss, params, [(images, labels)])
        parts, _ = lanczos.hessian_product(loss, params, [(images[i : i + 4], labels[i : i + 4]) for i in (0, 4, 8)])
        vector = np.random.default_rng(3).normal(size=size)
        np.testing.assert_allclose(parts(vector), whole(vector), rtol=1e-12)
    loss, params, images, labels = mlp(jnp.float32)
    product, size = lanczos.hessian_product(loss, params, [(images[:5], labels[:5]), (images[5:], labels[5:])])
    assert product(vector).dtype == np.float64
    with jax.default_matmul_precision("float32"):
        found = lanczos.largest_eigenvalue(product, size)
    assert found.eigenvalue == pytest.approx(largest, rel=1e-3) and found.residual < 1e-3


def test_what_cannot_be_measured():
    matrix = symmetric(np.linspace(0, 1, 400))
    with pytest.raises(UserError, match=r"did not converge to a relative 1e-12 in \d+ products: give a larger --tol"):
        lanczos.largest_eigenvalue(lambda v: matrix @ v, 400, tolerance=1e-12, max_products=20)
    with pytest.raises(UserError, match="Hessian of this checkpoint is not finite"):
        lanczos.largest_eigenvalue(lambda v: v * np.nan, 30)


# --- runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(npz, tmp_path_factory):
    """Two seeds of SGD and one of SAM, three steps each."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_optional", lambda write: None)
        config = configure(
            dataset="npz",
            data_dir=str(npz(train=32, wrong=10)),
            noise="none",
            model="mlp",
            width=1 / 128,
            dropout=0.5,
            batch_size=8,
            epochs=1,
            rho=0.2,
        )
        for method, seed in (("sgd", 0), ("sgd", 1), ("sam", 0)):
            run.train(replace(config, method=method, seed=seed), out / f"{method}{seed}")
    return out


def test_a_run_is_measured_on_its_given_labels_in_evaluation_mode(runs):
    measured = sharpness.of_run(runs / "sgd0", samples=32, batch_size=10, tolerance=1e-5)
    trainer, prepared = run.restored(runs / "sgd0")
    dataset, params = prepared.dataset, trainer.state.networks[0].params
    assert (dataset.train.labels != dataset.train.clean_labels).any()
    x = (dataset.train.images.reshape(32, -1) / np.float32(255) - np.repeat(dataset.mean, 36)) / np.repeat(
        dataset.std, 36
    )

    def loss(params, batch):
        hidden = x
        for name in ("hidden1", "hidden2"):
            hidden = jax.nn.relu(hidden @ params[name]["kernel"][...] + params[name]["bias"][...])
        logits = hidden @ params["classifier"]["kernel"][...] + params["classifier"]["bias"][...]
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(32), dataset.train.labels])

    values = np.linalg.eigvalsh(dense(loss, params, None))
    assert measured["eigenvalue"] == pytest.approx(values[-1], rel=1e-4)
    assert measured["samples"] == 32 and measured["epoch"] == 1 and measured["residual"] < 1e-4
    # In one batch as in several, the last of which is short.
    assert sharpness.of_run(runs / "sgd0", samples=99, tolerance=1e-5)["eigenvalue"] == pytest.approx(
        measured["eigenvalue"], rel=1e-5
    )


def test_the_command_measures_runs_and_compares_methods(runs, tmp_path, capsys):
    folders = [runs / name for name in ("sgd0", "sgd1", "sam0")]
    table = tmp_path / "table.md"
    cli.main(["sharpness", *map(str, folders), "--samples", "20", "--seed", "3", "--output", str(table)])
    written = [json.loads((folder / "sharpness.json").read_text()) for folder in folders]
    assert [w["samples"] for w in written] == [20] * 3 and [w["seed"] for w in written] == [3] * 3
    assert written[0].keys() >= {"eigenvalue", "residual", "products", "seconds", "tolerance", "epoch", "step", "of"}
    assert written == [
        w | {k: v for k, v in sharpness.of_run(f, samples=20, seed=3).items() if k != "seconds"}
        for w, f in zip(written, folders, strict=True)
    ]
    text = table.read_text()
    assert text in capsys.readouterr().out
    values = [w["eigenvalue"] for w in written]
    assert f"| sgd | 2 | {np.mean(values[:2]):.4g} ± {np.std(values[:2], ddof=1):.2g} |" in text
    assert f"| sam | 1 | {values[2]:.4g} |" in text
    assert f"| {folders[1]} | sgd | 1 | 1 | {values[1]:.5g} |" in text
    assert not [path for folder in folders for path in folder.glob(".*")]


def test_runs_that_cannot_be_measured(runs, tmp_path, capsys):
    files.write_json(tmp_path / "config.json", json.loads((runs / "sgd0" / "config.json").read_text()))
    assert configuration.read(tmp_path / "config.json").optimizer.method == "sgd"
    for arguments, message in (
        ((tmp_path,), "has no checkpoint yet; train it first"),
        ((runs / "nowhere",), "nowhere is not the folder of a run"),
        ((runs / "sgd0", "--by", "methid"), "unknown setting 'methid': did you mean 'method'"),
        ((runs / "sgd0", "--samples", "0"), "--samples must be at least 1, got 0"),
        ((runs / "sgd0", "--tolerance", "1"), r"--tolerance must be in (0, 1), got 1"),
        ((), "sharpness needs folders of runs"),
    ):
        with pytest.raises(SystemExit) as exit:
            cli.main(["sharpness", *map(str, arguments)])
        assert exit.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "sharpness.json").exists()


def test_a_run_measures_it_on_the_way_and_is_the_same_run(runs, tmp_path):
    config = configuration.read(runs / "sam0" / "config.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_optional", lambda write: None)
        run.train(replace(config, sharpness_samples=20), tmp_path / "sam0")
    (plain,), (measured,) = (
        files.read_json_lines(folder / "metrics.jsonl") for folder in (runs / "sam0", tmp_path / "sam0")
    )
    at_the_end = sharpness.of_run(runs / "sam0", samples=20)["eigenvalue"]
    assert measured.pop("sharpness") == pytest.approx(at_the_end, rel=1e-6)
    for timed in ("seconds", "steps_per_second"):
        del plain[timed], measured[timed]
    assert measured == plain


def test_a_rounded_hessian_is_refused():
    with pytest.raises(UserError, match="--sharpness-samples needs float32"):
        configuration.check(configure(sharpness_samples=10, precision="bfloat16"))
