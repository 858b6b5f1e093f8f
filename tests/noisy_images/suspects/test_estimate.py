"""How many labels are wrong: against the truth, against cleanlab, and on data with little to estimate from."""

import importlib.util
import warnings

import numpy as np
import pytest

from examples.noisy_images.errors import UserError
from examples.noisy_images.measures.sample_history import History
from examples.noisy_images.suspects import estimate
from examples.noisy_images.suspects.estimate import Confusion


def noisy(samples=2000, classes=5, rate=0.2, seed=0, sharpness=6.0):
    """Labels, true labels, and probabilities of a model that mostly knows the true ones."""
    rng = np.random.default_rng(seed)
    clean = rng.integers(0, classes, samples)
    wrong = rng.random(samples) < rate
    labels = np.where(wrong, (clean + rng.integers(1, classes, samples)) % classes, clean)
    logits = rng.normal(size=(samples, classes))
    logits[np.arange(samples), clean] += sharpness
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return labels, clean, probabilities.astype(np.float32)


def history(predictions, labels):
    predictions = np.asarray(predictions, np.int16)
    labels = np.asarray(labels, np.int32)
    losses = np.ones(predictions.shape, np.float32)
    return History(np.arange(1, len(predictions) + 1), losses, predictions, labels, None, np.arange(len(labels)))


# --- confident learning -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.4])
@pytest.mark.parametrize("classes", [2, 5])
def test_the_number_is_that_of_the_truth(rate, classes):
    pytest.importorskip("cleanlab")
    labels, clean, probabilities = noisy(classes=classes, rate=rate)
    found = estimate.by_confident_learning(labels, probabilities, resamples=50)
    wrong = (labels != clean).sum()
    assert abs(found.wrong - wrong) <= 0.01 * len(labels) + 0.05 * wrong
    assert found.low <= found.wrong <= found.high and found.method == "confident_learning"
    # Of the order of a count's own spread.
    spread = np.sqrt(wrong * (1 - wrong / len(labels)))
    assert 0.7 * 3.9 * spread - 2 <= found.high - found.low <= 1.5 * 3.9 * spread + 12
    assert estimate.by_confident_learning(labels, probabilities, resamples=50) == found


def test_the_interval_holds_the_estimates_of_other_samples():
    pytest.importorskip("cleanlab")
    found = estimate.by_confident_learning(*noisy(seed=1)[::2], resamples=100)
    others = [estimate.by_confident_learning(*noisy(seed=seed)[::2], resamples=1).wrong for seed in range(100, 140)]
    inside = [found.low - 20 <= other <= found.high + 20 for other in others]
    assert np.mean(inside) > 0.8 and np.std(others) == pytest.approx((found.high - found.low) / 3.92, rel=0.5)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [([0, 1], 2), ([0, 0, 0, 1], 2), ([0, 0, 3, 3, 3], 5), ([0, 1, 2, 3, 4], 5)],
    ids=["two samples", "a class with one", "classes without any", "one each"],
)
def test_little_data(labels, classes):
    pytest.importorskip("cleanlab")
    labels = np.array(labels)
    probabilities = np.full((len(labels), classes), 1 / classes, np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = estimate.by_confident_learning(labels, probabilities, resamples=20)
        estimate.confused_classes(labels, probabilities)
    assert 0 <= found.low <= found.wrong <= found.high <= len(labels)


def test_what_cannot_be_estimated_is_one_line(monkeypatch):
    pytest.importorskip("cleanlab")
    one = np.zeros(4, int)
    for compute in (estimate.by_confident_learning, estimate.confused_classes):
        with pytest.raises(UserError, match="and all given labels are the same: rank by the history of a run"):
            compute(one, np.full((4, 2), 0.5))
        with pytest.raises(UserError, match="a table of 10,000 x 10,000 classes"):
            compute(np.arange(4), np.zeros((4, 10_000)))
    assert estimate.why_not(np.arange(4), 4) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'cleanlab, which is not installed: run `pip install -e "\.\[suspects\]"`'):
        estimate.by_confident_learning(np.arange(4), np.full((4, 4), 0.25))


# --- histories ----------------------------------------------------------------------------------------------------


def test_what_is_learned_late_counts_as_wrong():
    labels = [0, 0, 1, 1]
    # Nine epochs: the first sample always, the second from the second epoch, the third from the fourth, the last never.
    learned_from = [0, 1, 3, 9]
    predictions = [[y if epoch >= first else 1 - y for y, first in zip(labels, learned_from, strict=True)]
                   for epoch in range(9)]  # fmt: skip
    found = estimate.by_histories([history(predictions, labels)])
    assert found.wrong == 2 and found.method == "histories" and 0 <= found.low <= 2 <= found.high <= 4


def test_runs_vote_together():
    labels = [0, 0]
    # Half of the early epochs of two runs are not most of them; five of six are.
    runs = [history([[1, 1]] * 3, labels), history([[0, 1], [0, 1], [0, 0]] * 3, labels)]
    assert estimate.by_histories(runs).wrong == 1


def test_none_and_all_wrong():
    labels = np.zeros(50, int)
    assert estimate.by_histories([history(np.zeros((6, 50)), labels)]).high == 0
    assert estimate.by_histories([history(np.ones((6, 50)), labels)]).low == 50
    assert estimate.by_histories([history([[1]], [0])]).wrong == 1


# --- suspects and classes -----------------------------------------------------------------------------------------


def test_the_most_suspicious():
    order = np.array([3, 0, 2, 1])
    assert estimate.most_suspicious(order, 2).tolist() == [True, False, False, True]
    assert not estimate.most_suspicious(order, 0).any() and estimate.most_suspicious(order, 9).all()


def test_pairs_by_hand():
    labels = np.array([0, 0, 0, 0, 1, 1, 2])
    suggested = np.array([0, 1, 1, 2, 0, 1, 2])
    assert estimate.confused_suggestions(labels, suggested, 3) == [
        Confusion(0, 1, 2, 3 / 6),
        Confusion(0, 2, 1, 1 / 5),
        Confusion(1, 0, 1, 3 / 6),
    ]
    assert estimate.confused_suggestions(labels, suggested, 3, most=1) == [Confusion(0, 1, 2, 3 / 6)]
    assert estimate.confused_suggestions(labels, labels, 10_000) == []


def test_pairs_are_those_of_cleanlab():
    dataset = pytest.importorskip("cleanlab.dataset")
    labels, _, probabilities = noisy(rate=0.3)
    # Half of the first class is called the second.
    labels[(labels == 0) & (np.arange(len(labels)) % 2 == 0)] = 1
    ours = estimate.confused_classes(labels, probabilities)
    theirs = dataset.find_overlapping_classes(labels, probabilities, asymmetric=True)
    expected = theirs[theirs["Num Overlapping Examples"] >= 1]
    assert (ours[0].given, ours[0].true) == (1, 0)
    table = {(int(a), int(b)): n for a, b, n in expected.iloc[:, :3].itertuples(index=False)}
    assert len(ours) == 20 and [c.samples for c in ours] == sorted((c.samples for c in ours), reverse=True)
    assert all(abs(table[c.given, c.true] - c.samples) <= 1 for c in ours)


def test_one_class_under_two_names():
    pytest.importorskip("cleanlab")
    labels, clean, probabilities = noisy(classes=4, rate=0.02)
    # The last two are the same thing, named by the toss of a coin.
    rng = np.random.default_rng(1)
    labels = np.where(clean >= 2, rng.integers(2, 4, len(labels)), labels)
    both = probabilities[:, 2:].sum(axis=1) * rng.uniform(0.45, 0.55, len(labels))
    probabilities = np.column_stack([probabilities[:, :2], both, probabilities[:, 2:].sum(axis=1) - both])
    found = estimate.duplicate_classes(estimate.confused_classes(labels, probabilities))
    assert [{pair.given, pair.true} for pair in found] == [{2, 3}] and found[0].share > 0.3
    assert estimate.duplicate_classes(estimate.confused_classes(*noisy(rate=0.3)[::2])) == []


def test_as_json_names_classes():
    confusions = [Confusion(0, 1, 3, 0.5), Confusion(1, 0, 1, 0.5)]
    there = estimate.as_json(estimate.Estimate(4, 2, 6, "histories"), confusions, ("a", "b"))
    assert there["wrong"] == 4 and there["confused_classes"][0] == {
        "given": "a",
        "true": "b",
        "samples": 3,
        "share": 0.5,
    }
    assert len(there["duplicate_classes"]) == 1
