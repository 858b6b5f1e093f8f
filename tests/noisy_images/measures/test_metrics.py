"""Metrics on stated sets, and what is reported of a run."""

import numpy as np
import pytest

from examples.noisy_images.measures import metrics

# Six training samples: the first three relabelled.
CLEAN = np.array([0, 0, 1, 1, 2, 2])
GIVEN = np.array([1, 2, 0, 1, 2, 2])
PREDICTED = np.array([1, 0, 1, 1, 2, 0])
LOSSES = np.arange(6.0)


def test_each_metric_on_its_own_set():
    values = metrics.on_training_set(PREDICTED, LOSSES, GIVEN, CLEAN)
    assert values == {
        "train_accuracy": 3 / 6,
        "train_loss": 2.5,
        "noisy_accuracy": pytest.approx(1 / 3),
        "true_accuracy_on_noisy": pytest.approx(2 / 3),
        "clean_accuracy": pytest.approx(2 / 3),
        "gap": pytest.approx(1 / 3),
    }
    assert all(type(value) is float for value in values.values())


def test_what_cannot_be_known_is_absent():
    unknown = metrics.on_training_set(PREDICTED, LOSSES, GIVEN, None)
    assert set(unknown) == {"train_accuracy", "train_loss"}
    no_noise = metrics.on_training_set(PREDICTED, LOSSES, CLEAN, CLEAN)
    assert set(no_noise) == {"train_accuracy", "train_loss", "clean_accuracy"}
    all_noise = metrics.on_training_set(PREDICTED, LOSSES, (CLEAN + 1) % 3, CLEAN)
    assert set(all_noise) == {"train_accuracy", "train_loss", "noisy_accuracy", "true_accuracy_on_noisy"}


EPOCHS = [
    {"epoch": 1, "test_accuracy": 0.5, "heldout_accuracy": 0.3},
    {"epoch": 2, "test_accuracy": 0.9, "heldout_accuracy": 0.4, "noisy_accuracy": 0.1},
    {"epoch": 3, "test_accuracy": 0.7, "heldout_accuracy": 0.6, "noisy_accuracy": 0.2},
    {"epoch": 4, "test_accuracy": 0.9, "heldout_accuracy": 0.6, "train_accuracy": 0.8, "noisy_accuracy": 0.3},
]


def test_best_chosen_and_last():
    assert metrics.summary(EPOCHS) == {
        "epochs": 4,
        # The first of equals, each time.
        "best_test_accuracy": 0.9,
        "best_epoch": 2,
        "chosen_test_accuracy": 0.7,
        "chosen_epoch": 3,
        "last_test_accuracy": 0.9,
        "last_train_accuracy": 0.8,
        "last_noisy_accuracy": 0.3,
    }


def test_nothing_is_chosen_without_held_out_labels():
    epochs = [{k: v for k, v in e.items() if k != "heldout_accuracy"} for e in EPOCHS]
    assert not {"chosen_test_accuracy", "chosen_epoch"} & set(metrics.summary(epochs))
