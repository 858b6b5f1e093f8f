"""Cross-validation: folds that leave out correctly, and predictions of the one network that did not see a sample."""

import numpy as np
import pytest

from examples.noisy_images import config as configuration
from examples.noisy_images import data, files
from examples.noisy_images.config import configure, replace
from examples.noisy_images.errors import UserError
from examples.noisy_images.suspects import cross_validation, ranking
from examples.noisy_images.training import run

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = configure(
    dataset="digits",
    subset=240,
    test_subset=40,
    holdout=0.1,
    noise="symmetric",
    rate=0.25,
    model="mlp",
    width=1 / 16,
    method="sgd",
    batch_size=24,
    epochs=8,
    learning_rate=0.05,
    weight_decay=0.0,
    checkpoint_every=1000,
)


@pytest.fixture(autouse=True)
def _no_figures_of_runs(monkeypatch):
    monkeypatch.setattr(run, "_optional", lambda write: None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_optional", lambda write: None)
        run.train(CONFIG, folder)
        probabilities = cross_validation.out_of_sample(folder, 3)
    return folder, probabilities


def test_folds_hold_every_sample_once_and_its_given_label():
    whole = run.prepare(CONFIG)
    left_out = []
    for fold in range(3):
        prepared = run.prepare(replace(CONFIG, folds=3, fold=fold))
        train, out = prepared.dataset.train, prepared.left_out
        assert len(train) + len(out) == 216 and not set(train.index) & set(out.index)
        # The noise and the held-out split are those of the run on all folds.
        np.testing.assert_array_equal(prepared.heldout.index, whole.heldout.index)
        labels = dict(zip(whole.dataset.train.index, whole.dataset.train.labels, strict=True))
        for part in (train, out):
            assert [labels[i] for i in part.index] == part.labels.tolist()
            assert (np.diff(part.index) > 0).all()
        # The class proportions of the given labels.
        shares = np.bincount(whole.dataset.train.labels) / 3
        assert (abs(np.bincount(out.labels, minlength=10) - shares) < 1).all()
        left_out += out.index.tolist()
    assert sorted(left_out) == whole.dataset.train.index.tolist()
    assert whole.left_out is None


def test_folds_are_a_function_of_labels_and_seed():
    train = run.prepare(CONFIG).dataset.train
    first, again, other = (data.leave_out_fold(train, 4, 1, seed)[1].index for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_each_sample_is_predicted_by_the_network_that_did_not_see_it(trained):
    folder, probabilities = trained
    train = run.prepare(CONFIG).dataset.train
    assert probabilities.shape == (216, 10) and probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    assert np.isfinite(probabilities).all()
    for fold in range(3):
        one = folder / "cross-validation-3" / f"fold-{fold}"
        its_config = configuration.read(one / "config.json")
        assert its_config == replace(CONFIG, folds=3, fold=fold, sample_history=False, evaluate_every=8)
        measured = files.read_json_lines(one / "metrics.jsonl")
        assert ["train_loss" in record for record in measured] == [False] * 7 + [True]
        trainer, prepared = run.restored(one)
        out = prepared.left_out
        positions = [train.index.tolist().index(i) for i in out.index]
        np.testing.assert_array_equal(probabilities[positions], trainer.probabilities(out))
        # The other networks say something else about these samples.
        other, _ = run.restored(folder / "cross-validation-3" / f"fold-{(fold + 1) % 3}")
        assert np.abs(probabilities[positions] - other.probabilities(out)).max() > 0.01


def test_complete_folds_are_not_trained_again_and_a_missing_one_is(trained, monkeypatch):
    folder, probabilities = trained
    third = folder / "cross-validation-3" / "fold-2" / "summary.json"
    third.unlink()
    started = []
    resume = run.resume
    monkeypatch.setattr(run, "train", lambda *arguments: pytest.fail("a fold is trained from its start"))
    monkeypatch.setattr(run, "resume", lambda one, *devices: started.append(one.name) or resume(one, *devices))
    np.testing.assert_array_equal(cross_validation.out_of_sample(folder, 3), probabilities)
    assert started == ["fold-2"]


def test_the_ranking_by_them(trained, tmp_path):
    folder, probabilities = trained
    result = ranking.rank([folder], tmp_path, ranking.OUT_OF_SAMPLE, top=4, folds=3)
    np.testing.assert_array_equal(np.load(tmp_path / "pred_probs.npy"), probabilities)
    assert not np.array_equal(np.load(tmp_path / "pred_probs_in_sample.npy"), probabilities)
    train = result.train
    loss = -np.log(probabilities[np.arange(216), train.labels].astype(np.float64))
    assert result.order.tolist() == np.argsort(-loss, kind="stable").tolist()
    # Chance is 0.5.
    assert ranking.quality(result)["scores"][ranking.OUT_OF_SAMPLE]["auc"] > 0.8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folds": 1}, "--folds must be at least 2, got 1"),
        ({"folds": 3, "fold": 3}, "--fold must be at least 0 and below --folds, got 3 of 3"),
        ({"fold": 1}, "--fold must be at least 0 and below --folds"),
        ({"folds": 200}, "the largest class has .* samples, too few for 200 folds"),
    ],
)
def test_folds_that_cannot_be(change, message):
    with pytest.raises(UserError, match=message):
        run.prepare(replace(CONFIG, **change))


def test_a_fold_is_not_cross_validated_itself(trained):
    folder, _ = trained
    with pytest.raises(UserError, match="itself trained without a fold"):
        cross_validation.out_of_sample(folder / "cross-validation-3" / "fold-0", 3)


def test_probabilities_are_those_of_the_losses(tiny):
    from examples.noisy_images.training.trainer import Trainer

    dataset = tiny()
    trainer = Trainer(replace(CONFIG, batch_size=8), dataset)
    probabilities = trainer.probabilities(dataset.train)
    losses, predictions, margins = trainer.evaluate(dataset.train)
    given, others = probabilities[np.arange(24), dataset.train.labels], np.array(probabilities)
    others[np.arange(24), dataset.train.labels] = 0
    np.testing.assert_allclose(np.log(given / others.max(axis=1)), margins, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(-np.log(probabilities[np.arange(24), dataset.train.labels]), losses, rtol=1e-4)
    np.testing.assert_array_equal(probabilities.argmax(axis=1), predictions)
