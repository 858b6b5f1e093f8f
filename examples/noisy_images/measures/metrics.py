"""Metrics of an epoch, each on a stated set in evaluation mode; accuracies are fractions in [0, 1].

*noisy accuracy*: relabelled training samples against their given, wrong labels (memorization). *true accuracy on
noisy*: the same samples against their true labels. *clean accuracy*: untouched training samples. *gap*: clean minus
noisy accuracy. *generalization gap*: training minus test accuracy. A metric that needs what is not there (clean labels
that are unknown, relabelled samples where there are none) is absent.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


def on_training_set(
    predictions: np.ndarray, losses: np.ndarray, given: np.ndarray, clean: np.ndarray | None
) -> dict[str, float]:
    """Return the metrics of the training set, from predicted labels and losses against given labels, (N,) each."""
    correct = predictions == given
    values = {"train_accuracy": correct.mean(), "train_loss": losses.mean()}
    if clean is not None:
        noisy = given != clean
        if noisy.any():
            values["noisy_accuracy"] = correct[noisy].mean()
            values["true_accuracy_on_noisy"] = (predictions == clean)[noisy].mean()
        if not noisy.all():
            values["clean_accuracy"] = correct[~noisy].mean()
        if noisy.any() and not noisy.all():
            values["gap"] = values["clean_accuracy"] - values["noisy_accuracy"]
    return {name: float(value) for name, value in values.items()}


def summary(epochs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Reduce the metrics of all epochs to the numbers that are reported: best, chosen on held-out labels, and last.

    The best epoch on the test set is the paper's habit; choosing on the test set flatters every method. The epoch
    chosen by the accuracy on the held-out noisy split is absent where there is no such split, and all three where there
    is no test set.
    """
    epochs = list(epochs)
    last = dict(epochs[-1])
    values = {"epochs": last["epoch"]}
    if "test_accuracy" in last:
        best = max(epochs, key=lambda e: e["test_accuracy"])
        values |= {"best_test_accuracy": best["test_accuracy"], "best_epoch": best["epoch"]}
        values["last_test_accuracy"] = last["test_accuracy"]
    if "test_accuracy" in last and "heldout_accuracy" in last:
        chosen = max(epochs, key=lambda e: e["heldout_accuracy"])
        values |= {"chosen_test_accuracy": chosen["test_accuracy"], "chosen_epoch": chosen["epoch"]}
    for name in ("train_accuracy", "noisy_accuracy", "true_accuracy_on_noisy", "clean_accuracy", "gap"):
        if name in last:
            values[f"last_{name}"] = last[name]
    return values
