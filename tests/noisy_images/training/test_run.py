"""One run: its data and noise, the files it writes, what it refuses, how it stops and goes on."""

import json
import os
import signal
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.noisy_images import config as configuration
from examples.noisy_images import files
from examples.noisy_images.config import configure, replace
from examples.noisy_images.errors import UserError
from examples.noisy_images.measures import metrics
from examples.noisy_images.training import epochs, logs, methods, run
from examples.noisy_images.training.checkpoints import Checkpoints
from examples.noisy_images.training.trainer import Trainer

TIMES = ("steps_per_second", "seconds")


@pytest.fixture(scope="module")
def config(npz):
    """Thirty-two images, eight of them held out, ten with a wrong label; three steps an epoch."""
    return configure(
        dataset="npz",
        data_dir=str(npz(train=32, wrong=10)),
        noise="none",
        model="mlp",
        width=1 / 64,
        method="saner",
        batch_size=8,
        epochs=4,
        alpha_ramp=0.5,
        holdout=0.25,
        evaluate_every=3,
        rho=0.2,
        scan_epochs=False,
    )


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    summary = run.train(config, folder)
    return folder, summary, files.read_json_lines(folder / "metrics.jsonl")


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(run, "_optional", lambda write: None)


def params(folder):
    config = configuration.read(folder / "config.json")
    trainer = Trainer(config, run.prepare(config).dataset)
    checkpoints = Checkpoints(folder / "checkpoints", config)
    state, extra = checkpoints.restore(trainer.state)
    checkpoints.close()
    return state, extra


def timeless(records):
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


# --- what a run writes --------------------------------------------------------------------------------------------


def test_a_run_writes_one_folder(finished):
    folder, _, _ = finished
    written = {path.name for path in folder.iterdir()}
    assert written == {
        *("config.json", "data.json", "environment.json", "noise.json", "noise.png", "metrics.jsonl", "curves.png"),
        *("tensorboard", "checkpoints", "samples", "summary.json"),
    }
    for name in ("noise.png", "curves.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_config_and_environment(finished, config):
    folder, _, _ = finished
    assert configuration.read(folder / "config.json") == config
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["command"].startswith("python -m examples.noisy_images")
    assert environment["versions"]["jax"] == jax.__version__
    assert {"python", "jaxlib", "optax", "flax", "orbax-checkpoint", "numpy"} <= environment["versions"].keys()
    assert environment["platform"] == "cpu" and environment["device"]
    assert (environment["devices"], environment["processes"]) == (1, 1)
    assert environment["commit"] is None or len(environment["commit"].split()[0]) == 40


def test_metrics_one_line_an_epoch(finished):
    _, _, records = finished
    assert [(r["epoch"], r["step"]) for r in records] == [(1, 3), (2, 6), (3, 9), (4, 12)]
    every = {
        *("epoch", "step", "learning_rate", "rho", "alpha", "running_loss", "running_accuracy"),
        *("running_downweighted_share", "running_cosine", "running_gradient_norm"),
        *("running_perturbed_gradient_norm", "running_perturbation_norm"),
        *("test_accuracy", "test_loss", "heldout_accuracy", *TIMES),
    }
    on_training_set = {
        *("train_accuracy", "train_loss", "noisy_accuracy", "clean_accuracy", "gap"),
        *("true_accuracy_on_noisy", "generalization_gap"),
    }
    # Every third epoch and the last.
    assert [r.keys() for r in records] == [every, every, every | on_training_set, every | on_training_set]
    last = records[-1]
    assert last["gap"] == last["clean_accuracy"] - last["noisy_accuracy"]
    assert last["generalization_gap"] == last["train_accuracy"] - last["test_accuracy"]
    # What the steps of the epoch used: alpha over two of four epochs, a tenth after the second and the third.
    assert [r["alpha"] for r in records] == [0.25, 0.5, 0.5, 0.5]
    assert [r["learning_rate"] for r in records] == pytest.approx([0.1, 0.1, 0.01, 0.001], rel=1e-5)
    assert [r["rho"] for r in records] == [0.2] * 4
    assert [r["running_perturbation_norm"] for r in records] == pytest.approx([0.2] * 4, rel=1e-4)


def test_noise_is_audited(finished):
    folder, summary, _ = finished
    audit = json.loads((folder / "noise.json").read_text())
    assert audit["actual_rate"] == summary["actual_rate"] == 10 / 32


def test_the_summary_is_best_chosen_and_last(finished):
    folder, summary, records = finished
    assert json.loads((folder / "summary.json").read_text()) == summary
    best = max(r["test_accuracy"] for r in records)
    chosen = max(records, key=lambda r: r["heldout_accuracy"])
    assert summary["best_test_accuracy"] == best
    assert summary["chosen_test_accuracy"] == chosen["test_accuracy"]
    assert summary["chosen_epoch"] == chosen["epoch"]
    assert summary["last_test_accuracy"] == records[-1]["test_accuracy"]
    assert summary["last_noisy_accuracy"] == records[-1]["noisy_accuracy"]
    assert (summary["method"], summary["seed"], summary["epochs"]) == ("saner", 0, 4)
    assert summary["seconds"] == pytest.approx(sum(r["seconds"] for r in records))


def scalars(folder):
    """The scalars of TensorBoard's event files: (tag, step) -> value."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    return found


def test_tensorboard_has_the_same_numbers(finished):
    folder, _, records = finished
    expected = {(k, r["step"]): v for r in records for k, v in r.items() if k not in ("epoch", "step")}
    assert scalars(folder) == pytest.approx(expected, rel=1e-6)


def test_checkpoints_of_the_last_two_epochs(finished):
    folder, summary, _ = finished
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["12", "9"]
    state, extra = params(folder)
    assert int(state.step) == 12
    assert extra["epoch"] == 4 and extra["best_epoch"] == summary["best_epoch"]


def test_evaluate_measures_the_last_checkpoint(finished):
    folder, _, records = finished
    values = run.evaluate(folder)
    assert values["epoch"] == 4 and "noisy_accuracy" in values and "heldout_accuracy" in values
    assert {k: records[-1][k] for k in values} == values


# --- data and noise -----------------------------------------------------------------------------------------------


def test_the_subset_is_cut_before_the_noise_and_the_held_out_split_after(config):
    digits = configure(dataset="digits", noise="symmetric", rate=0.4, subset=200, test_subset=50, holdout=0.1)
    prepared = run.prepare(digits)
    train, heldout = prepared.dataset.train, prepared.heldout
    assert (len(train), len(heldout), len(prepared.dataset.test)) == (180, 20, 50)
    wrong = sum(int((s.labels != s.clean_labels).sum()) for s in (train, heldout))
    assert wrong == 80 and prepared.audit.actual_rate == 0.4
    # Held-out labels are as noisy as those that are trained on.
    assert (heldout.labels != heldout.clean_labels).any()
    assert not set(train.index) & set(heldout.index)
    # The noise follows the training seed, the images do not.
    other = run.prepare(replace(digits, seed=1))
    np.testing.assert_array_equal(other.dataset.train.index, train.index)
    assert (other.dataset.train.labels != train.labels).any()
    same = run.prepare(replace(digits, seed=1, noise_seed=0))
    np.testing.assert_array_equal(same.dataset.train.labels, train.labels)
    assert not set(run.prepare(replace(digits, data_seed=1)).dataset.train.index) == set(train.index)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "resnet81"}, "unknown model 'resnet81': did you mean 'resnet18'.*densenet121"),
        ({"method": "sanar"}, "unknown method 'sanar': did you mean 'saner'.*sgd_d"),
        ({"dataset": "cifar"}, "unknown data set 'cifar': did you mean.*choose one of cifar10, cifar100, digits"),
        ({"rate": -0.5}, "--rate"),
        ({"subset": 10**6}, "choose a size from 1 to 1348"),
        ({"subset": 0}, "--subset must be at least 1, got 0"),
        ({"holdout": 1.0}, "--holdout 1.0"),
        ({"holdout": 0.0001}, "--holdout 0.0001"),
        ({"noise": "real"}, "real noise needs --human-labels"),
        ({"batch_size": 1349, "holdout": 0.0}, "--batch-size 1349 is larger than the training set of 1348 images"),
        ({"width": 0.0}, "--width must be above 0, got 0.0"),
        ({"dropout": 1.0}, r"--dropout must be in \[0, 1\), got 1.0"),
        ({"alpha": float("nan")}, "alpha"),
    ],
)
def test_what_cannot_be_leaves_nothing_behind(tmp_path, change, message):
    with pytest.raises(UserError, match=message) as error:
        run.train(replace(configure(dataset="digits", model="mlp"), **change), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_noise_needs_true_labels(npz, config, tmp_path):
    unknown = replace(config, data_dir=str(npz(clean_labels=False)), noise="symmetric")
    with pytest.raises(UserError, match=r"true labels .* are unknown: use --noise none"):
        run.train(unknown, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_metrics_that_need_true_labels_are_absent_without_them(npz, config, tmp_path, no_figures):
    unknown = replace(config, data_dir=str(npz(clean_labels=False)), holdout=0.0, epochs=1, method="sgd")
    summary = run.train(unknown, tmp_path / "run")
    (record,) = files.read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert record["train_accuracy"] >= 0
    names = ("noisy_accuracy", "clean_accuracy", "gap", "true_accuracy_on_noisy", "heldout_accuracy")
    assert not any(name in record for name in names)
    assert summary["actual_rate"] is None and "chosen_test_accuracy" not in summary
    assert not any("noisy" in name or "clean" in name or "gap" in name for name in summary)
    # The figure has what there is.
    run._plot([record], tmp_path)
    assert (tmp_path / "curves.png").exists()


# --- a folder that is already there -------------------------------------------------------------------------------


def test_a_folder_with_a_run_is_not_trained_over(finished, config):
    folder, _, _ = finished
    with pytest.raises(UserError, match=r"already holds a run: go on with `resume .*one`"):
        run.train(config, folder)
    other = replace(config, rate=0.1, learning_rate=0.5)
    with pytest.raises(UserError, match=r"another configuration \(rate: 0.1 here, 0.5 there; learning_rate: 0.5 here"):
        run.train(other, folder)


def test_checkpoints_without_a_configuration_are_not_trained_over(config, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"holds checkpoints but no config\.json"):
        run.train(config, tmp_path)


def test_a_folder_that_cannot_be_made(config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot make the folder .*: choose another --out"):
        run.train(config, tmp_path / "file" / "run")


def test_a_folder_without_a_run(tmp_path):
    for command in (run.resume, run.evaluate):
        with pytest.raises(UserError, match="is not the folder of a run"):
            command(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_run_without_a_checkpoint_cannot_be_evaluated(config, tmp_path):
    files.write_json(tmp_path / "config.json", configuration.to_json(config))
    with pytest.raises(UserError, match="no checkpoint yet"):
        run.evaluate(tmp_path)


# --- stopping and going on ----------------------------------------------------------------------------------------


class Signals(logs._Lines):
    """A display that sends a signal when the run stands after one of these steps."""

    def __init__(self, steps):
        super().__init__("run", 4)
        self.steps = steps

    def step(self, step):
        for _ in range(self.steps.count(step)):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("step", [1, 5, 6, 11])
def test_a_request_to_stop_saves_and_goes_on_bit_for_bit(step, finished, config, tmp_path, monkeypatch, no_figures):
    reference, _, records = finished
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(logs, "progress", lambda *_: Signals([step]))
        with pytest.raises(epochs.Interrupted, match=rf"after step {step}; go on with: .* resume .*run"):
            run.train(config, tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "run" / "summary.json").exists()
    assert int(params(tmp_path / "run")[0].step) == step
    run.resume(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, params(tmp_path / "run")[0], params(reference)[0])
    assert timeless(files.read_json_lines(tmp_path / "run" / "metrics.jsonl")) == timeless(records)
    assert scalars(tmp_path / "run").keys() == scalars(reference).keys()


def test_a_request_in_the_last_step_finds_the_run_complete(config, tmp_path, monkeypatch, no_figures):
    monkeypatch.setattr(logs, "progress", lambda *_: Signals([12]))
    assert run.train(config, tmp_path / "run")["epochs"] == 4


def test_a_second_request_does_not_wait(config, tmp_path, monkeypatch, no_figures):
    monkeypatch.setattr(logs, "progress", lambda *_: Signals([5, 5]))
    with pytest.raises(KeyboardInterrupt):
        run.train(config, tmp_path / "run")
    # What was saved before is there.
    assert int(params(tmp_path / "run")[0].step) == 3


def test_a_complete_run_is_resumed_to_what_it_is(finished, tmp_path, no_figures):
    folder, summary, records = finished
    assert run.resume(folder) == summary
    assert files.read_json_lines(folder / "metrics.jsonl") == records


def test_epochs_measured_after_the_last_checkpoint_are_measured_again(finished, config, tmp_path, no_figures):
    _, _, records = finished
    sparse = replace(config, checkpoint_every=3)
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "progress", lambda *_: Signals([11, 11]))
        with pytest.raises(KeyboardInterrupt):
            run.train(sparse, folder)
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["9"]
    # Killed after a fourth epoch was measured, and in the middle of a line.
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"epoch": 4, "step": 12, "test_accuracy": 2.0}) + '\n{"epoch": 5, "te')
    run.resume(folder)
    assert timeless(files.read_json_lines(folder / "metrics.jsonl")) == timeless(records)


# --- values that are not finite -----------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run(config, tmp_path, no_figures):
    wild = replace(config, method="sgd", learning_rate=1e30, momentum=0.0)
    with pytest.raises(
        UserError, match=r"loss became non-finite at step [12] \(epoch 1; last finite loss [\d.e+]+\)"
    ) as e:
        run.train(wild, tmp_path / "run")
    assert "try a smaller --learning-rate" in str(e.value) and "there is no checkpoint yet" in str(e.value)
    assert files.read_json_lines(tmp_path / "run" / "metrics.jsonl") == []


def test_parameters_that_are_not_finite_are_never_saved(config, tmp_path, monkeypatch, no_figures):
    # The last step of the second epoch ruins the parameters, its loss was still finite.
    schedule = methods.learning_rate

    def ruinous(config, steps_per_epoch):
        return lambda step: jnp.where(step == 5, jnp.inf, schedule(config, steps_per_epoch)(step))

    monkeypatch.setattr(methods, "learning_rate", ruinous)
    odd = replace(config, method="sgd", batch_norm_epsilon=2e-5)
    with pytest.raises(UserError, match=r"test loss became non-finite at step 5 \(epoch 2; last.*step 3 is kept"):
        run.train(odd, tmp_path / "run")
    state, extra = params(tmp_path / "run")
    assert int(state.step) == 3 and extra["epoch"] == 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.networks))
    assert len(files.read_json_lines(tmp_path / "run" / "metrics.jsonl")) == 1


def test_the_reported_summary_is_that_of_the_metrics(finished):
    _, summary, records = finished
    assert metrics.summary(records).items() <= summary.items()
