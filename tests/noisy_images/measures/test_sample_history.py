"""The history of the training samples: what is measured, what a kill leaves, and the measures by hand."""

import dataclasses
import shutil

import numpy as np
import pytest
from PIL import Image

from examples.noisy_images import config as configuration
from examples.noisy_images import data, files
from examples.noisy_images.config import configure, replace
from examples.noisy_images.errors import UserError
from examples.noisy_images.measures import sample_history
from examples.noisy_images.training import run
from examples.noisy_images.training.checkpoints import Checkpoints
from examples.noisy_images.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def config(npz):
    """Thirty-two images, ten with a wrong label; four steps an epoch."""
    return configure(
        dataset="npz",
        data_dir=str(npz(train=32, wrong=10)),
        noise="none",
        model="mlp",
        width=1 / 64,
        method="sgd",
        batch_size=8,
        epochs=6,
        learning_rate=0.05,
        checkpoint_every=2,
    )


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch):
    monkeypatch.setattr(run, "_optional", lambda write: None)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_optional", lambda write: None)
        run.train(config, folder)
    return folder


def assert_same(actual, expected):
    for field in dataclasses.fields(sample_history.History):
        np.testing.assert_array_equal(getattr(actual, field.name), getattr(expected, field.name))


def parts(folder):
    return sorted(path.name for path in (folder / "samples").iterdir())


# --- what a run writes --------------------------------------------------------------------------------------------


def test_the_history_is_what_the_metrics_are_computed_from(finished, config):
    history = sample_history.read(finished)
    assert history.losses.dtype == np.float32 and history.predictions.dtype == np.int16
    assert history.losses.shape == history.predictions.shape == (6, 32)
    assert history.epochs.tolist() == [1, 2, 3, 4, 5, 6]
    train = run.prepare(config).dataset.train
    for name in ("labels", "clean_labels", "index"):
        np.testing.assert_array_equal(getattr(history, name), getattr(train, name))
    for record, losses, predictions in zip(
        files.read_json_lines(finished / "metrics.jsonl"), history.losses, history.predictions, strict=True
    ):
        assert record["train_loss"] == pytest.approx(losses.mean(), rel=1e-6)
        assert record["train_accuracy"] == (predictions == history.labels).mean()
    # A file for every checkpoint.
    assert parts(finished) == [
        *("epochs-00001-00002.npz", "epochs-00003-00004.npz", "epochs-00005-00006.npz", "samples.npz")
    ]


def test_the_last_epoch_is_that_of_the_network_in_the_checkpoint(finished, config):
    trainer = Trainer(config, run.prepare(config).dataset)
    checkpoints = Checkpoints(finished / "checkpoints", config)
    trainer.state, _ = checkpoints.restore(trainer.state)
    checkpoints.close()
    losses, predictions, margins = trainer.evaluate(trainer.dataset.train)
    history = sample_history.read(finished)
    np.testing.assert_array_equal(history.losses[-1], losses)
    np.testing.assert_array_equal(history.predictions[-1], predictions)
    np.testing.assert_array_equal(history.margins[-1], margins.astype(np.float16))


def test_only_evaluated_epochs_are_in_it(config, tmp_path):
    sparse = replace(config, evaluate_every=4, epochs=6, checkpoint_every=1)
    run.train(sparse, tmp_path / "run")
    assert sample_history.read(tmp_path / "run").epochs.tolist() == [4, 6]


def test_co_teaching_records_its_first_network(config, tmp_path):
    pair = replace(config, companion="co-teaching", epochs=1)
    run.train(pair, tmp_path / "run")
    (record,) = files.read_json_lines(tmp_path / "run" / "metrics.jsonl")
    history = sample_history.read(tmp_path / "run")
    assert history.losses.shape == (1, 32)
    assert record["train_accuracy"] == (history.predictions[0] == history.labels).mean()


def test_streamed_images_and_unknown_labels(tmp_path):
    rng = np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 200)):
        for number in range(7):
            path = tmp_path / "photographs" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(level, level + 40, (9, 12, 3), np.uint8)).save(path)
    own = configure(
        dataset="folder",
        data_dir=str(tmp_path / "photographs"),
        image_size=8,
        workers=0,
        noise="none",
        model="mlp",
        width=1 / 64,
        method="sgd",
        batch_size=5,
        epochs=2,
    )
    run.train(own, tmp_path / "run")
    history = sample_history.read(tmp_path / "run")
    train = run.prepare(own).dataset.train
    assert train.streamed and len(train) == 11 and history.clean_labels is None
    np.testing.assert_array_equal(history.index, train.index)
    records = files.read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert [r["train_accuracy"] for r in records] == (history.predictions == train.labels).mean(axis=1).tolist()


def test_a_run_without_history_and_a_configuration_that_has_never_heard_of_it(config, tmp_path, finished):
    run.train(replace(config, sample_history=False, epochs=1), tmp_path / "run")
    assert not (tmp_path / "run" / "samples").exists()
    with pytest.raises(UserError, match="run has no history of its samples: train it with --sample-history"):
        sample_history.read(tmp_path / "run")
    values = configuration.to_json(config)
    del values["circumstances"]["sample_history"]
    assert configuration.from_json(values, "config.json") == config


# --- a kill -------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["before the samples", "between samples and checkpoint", "after the checkpoint"])
@pytest.mark.parametrize("write", [1, 2])
def test_killed_around_a_checkpoint(moment, write, finished, config, tmp_path, monkeypatch):
    calls = []

    def dying(function, kill_first):
        def wrapped(*arguments):
            calls.append(arguments)
            if kill_first and len(calls) == write:
                raise Killed
            function(*arguments)
            if len(calls) == write:
                raise Killed

        return wrapped

    with monkeypatch.context() as patch:
        if moment == "before the samples":
            patch.setattr(sample_history.Recorder, "write", dying(sample_history.Recorder.write, kill_first=True))
        else:
            first = moment == "between samples and checkpoint"
            patch.setattr(Checkpoints, "save", dying(Checkpoints.save, kill_first=first))
        with pytest.raises(Killed):
            run.train(config, tmp_path / "run")
    # What the moment means: epochs in the history and in the checkpoint.
    written = [name for name in parts(tmp_path / "run") if name.startswith("epochs")]
    assert len(written) == (write - 1 if moment == "before the samples" else write)
    checkpoints = len(list((tmp_path / "run" / "checkpoints").iterdir()))
    assert checkpoints == (write if moment == "after the checkpoint" else write - 1)
    run.resume(tmp_path / "run")
    assert_same(sample_history.read(tmp_path / "run"), sample_history.read(finished))
    assert parts(tmp_path / "run") == parts(finished)


def test_going_on_from_the_checkpoint_before_the_newest(finished, config, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "24")
    run.resume(tmp_path / "run")
    assert_same(sample_history.read(tmp_path / "run"), sample_history.read(finished))


def test_a_write_that_was_cut_off_is_no_part_of_it(finished, tmp_path, monkeypatch):
    recorder = sample_history.Recorder(
        tmp_path, run.prepare(configuration.read(finished / "config.json")).dataset.train, num_classes=3, last_epoch=0
    )
    recorder.add(1, np.zeros(32, np.float32), np.zeros(32, np.int32))
    savez = np.savez

    def cut_off(path, **arrays):
        savez(path, **arrays)
        path.write_bytes(path.read_bytes()[:100])
        raise Killed

    monkeypatch.setattr(np, "savez", cut_off)
    with pytest.raises(Killed):
        recorder.write()
    assert parts(tmp_path) == ["samples.npz"]


def test_a_damaged_history_is_named(finished, tmp_path):
    for damage, message in (
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "cannot be read"),
        (lambda path: path.with_name("samples.npz").unlink(), "cannot be read"),
        (lambda path: shutil.copy(path, path.with_name("epochs-00002-00003.npz")), "epochs twice"),
    ):
        folder = tmp_path / message.replace(" ", "")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(finished / "samples", folder / "samples")
        damage(folder / "samples" / "epochs-00001-00002.npz")
        with pytest.raises(UserError, match=message) as error:
            sample_history.read(folder)
        assert "\n" not in str(error.value)


def test_many_classes_need_wider_labels(tmp_path, tiny):
    train = tiny().train
    recorder = sample_history.Recorder(tmp_path, train, num_classes=40000, last_epoch=0)
    recorder.add(1, np.zeros(24), np.full(24, 39999))
    recorder.write()
    history = sample_history.read(tmp_path)
    assert history.predictions.dtype == np.int32 and (history.predictions == 39999).all()


# --- measures -----------------------------------------------------------------------------------------------------


@pytest.fixture
def example():
    """Four evaluations, after epochs 2, 4, 6, 7, of five samples; every label is 1."""
    predictions = [
        #  always, once learned late, on and off, never, forgotten at the end
        [1, 0, 1, 2, 0],
        [1, 2, 0, 2, 1],
        [1, 1, 1, 0, 1],
        [1, 1, 0, 2, 0],
    ]
    losses = [
        [0.5, 4.0, 0.25, 3.0, 2.0],
        [0.5, 2.0, 1.0, 3.0, 0.0],
        [0.25, 0.5, 0.25, 3.0, 0.0],
        [0.25, 0.5, 2.5, 5.0, 2.0],
    ]
    return sample_history.History(
        np.array([2, 4, 6, 7]),
        np.array(losses, np.float32),
        np.array(predictions, np.int16),
        np.ones(5, np.int32),
        None,
        np.arange(5),
    )


def test_measures_by_hand(example):
    assert sample_history.mean_loss(example).tolist() == [0.375, 1.75, 1.0, 3.5, 1.0]
    assert sample_history.last_loss(example).tolist() == [0.25, 0.5, 2.5, 5.0, 2.0]
    assert sample_history.disagreement(example).tolist() == [0.0, 0.5, 0.5, 1.0, 0.5]
    assert sample_history.forgetting_events(example).tolist() == [0, 0, 2, 4, 1]
    assert sample_history.first_learned(example).tolist() == [2, 6, 2, 8, 4]
    # The smallest of several: the third and the fifth sample have two of each.
    assert sample_history.most_predicted([example], 3).tolist() == [1, 1, 0, 2, 0]
    other = dataclasses.replace(example, predictions=np.full((1, 5), 2, np.int16))
    assert sample_history.most_predicted([example, other, other], 3).tolist() == [1, 2, 0, 2, 0]


def test_one_epoch_is_enough(example):
    one = sample_history.History(
        example.epochs[:1], example.losses[:1], example.predictions[:1], example.labels, None, example.index
    )
    assert sample_history.forgetting_events(one).tolist() == [0, 1, 0, 1, 1]
    assert sample_history.first_learned(one).tolist() == [2, 3, 2, 3, 3]
    assert sample_history.mean_loss(one).tolist() == sample_history.last_loss(one).tolist()


# --- margins ------------------------------------------------------------------------------------------------------


def record(folder, margins):
    """The history of three samples over as many epochs as there are margins, a file each; None is an epoch without."""
    labels = np.zeros(3, np.int32)
    split = data.Split(np.zeros((3, 1, 1, 1), np.uint8), labels, None, np.arange(3))
    recorder = sample_history.Recorder(folder, split, 2, last_epoch=0)
    for epoch, values in enumerate(margins, start=1):
        recorder.add(epoch, np.ones(3), labels, None if values is None else np.array(values))
        recorder.write()
    return sample_history.read(folder)


def test_margins_come_back_and_are_averaged(tmp_path):
    history = record(tmp_path, [[1, -2, 1e9], [3, -1, -1e9]])
    assert history.margins.dtype == np.float16 and np.isfinite(history.margins).all()
    np.testing.assert_array_equal(sample_history.area_under_margin(history), [2, -1.5, 0])


@pytest.mark.parametrize("margins", [[None, None], [None, [1, 2, 3]]])
def test_a_history_without_the_margins_of_all_epochs_has_none(tmp_path, margins):
    history = record(tmp_path, margins)
    assert history.margins is None and history.losses.shape == (2, 3)
    with pytest.raises(ValueError, match="has no margins"):
        sample_history.area_under_margin(history)
