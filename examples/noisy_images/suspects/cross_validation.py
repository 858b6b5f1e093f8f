"""Predictions on samples that the network did not train on: one run a fold, each with the configuration of a run."""

from pathlib import Path

import numpy as np

from .. import config as configuration
from ..config import AS_STARTED, Whereabouts, replace
from ..errors import UserError


def out_of_sample(folder: Path, folds: int, whereabouts: Whereabouts = AS_STARTED) -> np.ndarray:
    """Return probabilities float32 (N, K) of a run's training samples, each from the one network that never saw it.

    Trains `folds` runs on the run's own training set, each without one fold of it, with the run's own labels, seed and
    settings, into `cross-validation-FOLDS/fold-0` and so on beside its results. Folds that are complete are read, one
    that was cut off goes on. A sample's probabilities are those of the last epoch.
    """
    from ..training import run

    config, prepared = run.prepared_again(folder, whereabouts)
    if config.data.folds is not None:
        raise UserError(f"{folder} is itself trained without a fold: cross-validate a run on its whole training set.")
    # Nothing that is measured on a fold's training set is part of what comes out.
    of_fold = replace(config, folds=folds, sample_history=False, evaluate_every=config.training.epochs)
    runs = {folder / f"cross-validation-{folds}" / f"fold-{fold}": replace(of_fold, fold=fold) for fold in range(folds)}
    # Before the first of them trains for hours.
    for one, its_config in runs.items():
        configuration.check(its_config)
        configuration.check_same_run(its_config, one)
    train = prepared.dataset.train
    probabilities: np.ndarray | None = None
    predicted_by = np.zeros(len(train), int)
    for one, its_config in runs.items():
        run.run_one(its_config, one)
        trainer, prepared = run.restored(one, whereabouts=whereabouts)
        left_out = prepared.left_out
        # Both in the order of the source.
        positions = np.flatnonzero(np.isin(train.index, left_out.index))
        if not np.array_equal(train.labels[positions], left_out.labels):
            raise UserError(f"the data has changed since {one} was trained: remove {one.parent} and start again.")
        if probabilities is None:
            probabilities = np.empty((len(train), prepared.dataset.num_classes), np.float32)
        probabilities[positions] = trainer.probabilities(left_out)
        predicted_by[positions] += 1
    if probabilities is None or (predicted_by != 1).any():
        raise UserError(f"the folds in {folder} do not hold every sample once: remove them and start again.")
    return probabilities
