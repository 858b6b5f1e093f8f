"""Scores of probabilities: by hand, and as cleanlab computes them."""

import numpy as np
import pytest

from examples.noisy_images.suspects import scores

PROBABILITIES = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0, 1, 0], [0.2, 0.4, 0.4]], np.float32)
LABELS = np.array([0, 0, 0, 2])


def test_by_hand():
    np.testing.assert_allclose(scores.self_confidence(PROBABILITIES, LABELS), [0.5, 0.1, 0, 0.4], rtol=1e-6)
    np.testing.assert_allclose(scores.normalized_margin(PROBABILITIES, LABELS), [0.6, 0.15, 0, 0.5], rtol=1e-6)
    loss = scores.given_loss(PROBABILITIES, LABELS)
    np.testing.assert_allclose(loss[[0, 1, 3]], -np.log([0.5, 0.1, 0.4]), rtol=1e-6)
    assert np.isfinite(loss[2]) and loss[2] > 80


def test_the_arrays_stay_as_they_were():
    before = PROBABILITIES.copy()
    for measure in scores.PROBABILITY_SCORES.values():
        measure(PROBABILITIES, LABELS)
    np.testing.assert_array_equal(PROBABILITIES, before)


@pytest.mark.parametrize("name", ["self_confidence", "normalized_margin"])
def test_as_cleanlab(name):
    rank = pytest.importorskip("cleanlab.rank")
    rng = np.random.default_rng(0)
    probabilities, labels = rng.dirichlet(np.ones(7), 200), rng.integers(0, 7, 200)
    ours = scores.PROBABILITY_SCORES[name](probabilities, labels)
    theirs = rank.get_label_quality_scores(labels, probabilities, method=name)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_one_class():
    probabilities, labels = np.ones((3, 1), np.float32), np.zeros(3, int)
    assert np.isfinite(scores.given_loss(probabilities, labels)).all()
