"""Scores by which a given label looks wrong: of a sample's history over training, or of its probabilities.

The measures of histories stand beside the history itself, in `measures.sample_history`. Those of probabilities take
float (N, K), one row a sample, and the given labels, int (N,), and return float64 (N,). Most grow with the suspicion;
those in `LOW` fall with it.
"""

from collections.abc import Callable

import numpy as np

from ..measures import sample_history
from ..measures.sample_history import History

# Networks learn what most labels agree on before they memorize the rest, so a wrong label is learned later and has a
# high loss for longer. No score picks an epoch by the test set. The default was chosen by measurement
# (docs/wrong_labels.md).
SCORES: dict[str, Callable[[History], np.ndarray]] = {
    "mean_loss": sample_history.mean_loss,
    "last_loss": sample_history.last_loss,
    "disagreement": sample_history.disagreement,
    "forgetting_events": sample_history.forgetting_events,
    "first_learned": sample_history.first_learned,
}

# Of histories that hold margins.
MARGIN_SCORES: dict[str, Callable[[History], np.ndarray]] = {"area_under_margin": sample_history.area_under_margin}


def given_loss(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return `-log p_y`, the cross-entropy of the given label, finite also where float32 has rounded `p_y` to zero."""
    tiny = np.finfo(np.float32).tiny
    return -np.log(np.maximum(self_confidence(probabilities, labels), tiny))


def self_confidence(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return `p_y`, the probability of the given label, in [0, 1] (Northcutt et al., JAIR 2021)."""
    return probabilities[np.arange(len(labels)), labels].astype(np.float64)


def normalized_margin(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return `(p_y - max_{k != y} p_k + 1) / 2`, in [0, 1] (Northcutt et al., JAIR 2021)."""
    return (self_confidence(probabilities, labels) - _largest_other(probabilities, labels) + 1) / 2


def _largest_other(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    others = np.array(values, np.float64)
    others[np.arange(len(labels)), labels] = -np.inf
    return others.max(axis=1)


OUT_OF_SAMPLE = "out_of_sample_loss"
PROBABILITY_SCORES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    OUT_OF_SAMPLE: given_loss,
    "self_confidence": self_confidence,
    "normalized_margin": normalized_margin,
}
LOW = frozenset({*MARGIN_SCORES, "self_confidence", "normalized_margin"})
