"""The samples of a data set in the order of suspicion: the record, how it is made, how good it is, and its table."""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import data, files
from ..data.file_names import printable
from ..errors import UserError, unknown_name
from ..measures import sample_history
from ..measures.sample_history import History
from . import estimate, scores
from .estimate import Confusion, Estimate


@dataclasses.dataclass(frozen=True, eq=False)
class Curves:
    """The loss of every sample over epochs, as it is drawn.

    Attributes:
      epochs: int (E,), completed epochs, ascending.
      losses: float32 (E, N), cross-entropy against the given label, averaged over runs.
    """

    epochs: np.ndarray
    losses: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Ranking:
    """The training samples of one or several runs, in the order of the training set unless said otherwise.

    Attributes:
      order: int (N,), positions of the samples, the most suspicious first; those that the score cannot tell apart by
        their mean loss where there is one, and then in the order of the training set.
      score: The name of the score that the order is by.
      suspicion: By score, float64 (N,) in (0, 1]: the share of the samples that are at most as suspicious, a tie
        counting half, averaged over the runs.
      values: By score, float64 (N,): the score itself, averaged over the runs.
      suggested: int (N,), the label predicted most often over epochs and runs.
      train: The training split.
      class_names: One name per class.
      ids: The identity of each sample.
      fingerprints: The fingerprint of each sample's content.
      estimate: How many labels are wrong.
      confusions: The pairs of classes that samples are mistaken between.
      curves: Of the histories; None where there are none.
    """

    order: np.ndarray
    score: str
    suspicion: dict[str, np.ndarray]
    values: dict[str, np.ndarray]
    suggested: np.ndarray
    train: data.Split
    class_names: tuple[str, ...]
    ids: tuple[str, ...]
    fingerprints: tuple[str, ...]
    estimate: Estimate
    confusions: list[Confusion]
    curves: Curves | None = None

    @property
    def is_suspect(self) -> np.ndarray:
        """Whether a sample is among as many of the most suspicious as labels are estimated to be wrong, bool (N,)."""
        return estimate.most_suspicious(self.order, self.estimate.wrong)


def from_histories(
    histories: Sequence[History],
    out_of_sample: Sequence[np.ndarray],
    score: str,
    train: data.Split,
    class_names: tuple[str, ...],
    hashes: Path | None = None,
) -> Ranking:
    """Rank samples by their histories in several runs, and by their probabilities out of sample where there are any.

    The number of wrong labels is estimated from the probabilities where there are any and confident learning can
    use them, else from the histories. `hashes` is the file that keeps what of the samples has been hashed before.
    """
    measures = scores.SCORES | (scores.MARGIN_SCORES if all(one.margins is not None for one in histories) else {})
    values = {name: np.stack([measure(history) for history in histories]) for name, measure in measures.items()}
    values |= _of_probabilities(out_of_sample, train.labels)
    suggested = sample_history.most_predicted(histories, len(class_names))
    if out_of_sample and estimate.why_not(train.labels, len(class_names)) is None:
        found = _by_confident_learning(train.labels, np.mean(out_of_sample, axis=0))
    else:
        found = (
            estimate.by_histories(histories),
            estimate.confused_suggestions(train.labels, suggested, len(class_names)),
        )
    alike = [history for history in histories if np.array_equal(history.epochs, histories[0].epochs)]
    losses = np.mean([history.losses for history in alike], axis=0, dtype=np.float32)
    return _ranking(score, values, suggested, train, class_names, found, Curves(alike[0].epochs, losses), hashes)


def from_probabilities(
    probabilities: np.ndarray, score: str, train: data.Split, class_names: tuple[str, ...]
) -> Ranking:
    """Rank samples by probabilities float (N, K) of any model that never saw them; the most probable is suggested.

    Raises:
      UserError: They are no probabilities of these samples and classes, or cleanlab is missing.
    """
    check_probabilities(probabilities, len(train), len(class_names))
    found = _by_confident_learning(train.labels, probabilities)
    values = _of_probabilities([probabilities], train.labels)
    return _ranking(score, values, probabilities.argmax(axis=1), train, class_names, found, None)


def check_probabilities(probabilities: np.ndarray, samples: int, classes: int) -> None:
    """Raise an error unless the array holds probabilities of so many samples and classes."""
    if probabilities.shape != (samples, classes):
        raise UserError(
            f"the probabilities have the shape {probabilities.shape} where {(samples, classes)} is expected, samples "
            "by classes: give one row a sample, in the order of the data."
        )
    if probabilities.dtype.kind != "f" or not np.isfinite(probabilities).all():
        raise UserError(f"the probabilities ({probabilities.dtype}) must be finite floats: compute them again.")
    sums = probabilities.sum(axis=1, dtype=np.float64)
    if probabilities.size and (probabilities.min() < 0 or np.abs(sums - 1).max() > 1e-2):
        raise UserError(
            f"the probabilities range from {probabilities.min():.3g} to {probabilities.max():.3g} and a row of them "
            f"sums to {sums[np.abs(sums - 1).argmax()]:.3g} where 1 is expected: take the softmax of logits."
        )


def _of_probabilities(arrays: Sequence[np.ndarray], labels: np.ndarray) -> dict[str, np.ndarray]:
    """Return every score of probabilities, (R, N), for those of R runs; nothing for none."""
    return {
        name: np.stack([measure(array, labels) for array in arrays])
        for name, measure in scores.PROBABILITY_SCORES.items()
        if arrays
    }


def _by_confident_learning(labels: np.ndarray, probabilities: np.ndarray) -> tuple[Estimate, list[Confusion]]:
    return estimate.by_confident_learning(labels, probabilities), estimate.confused_classes(labels, probabilities)


def _ranking(
    score: str,
    by_run: dict[str, np.ndarray],
    suggested: np.ndarray,
    train: data.Split,
    class_names: tuple[str, ...],
    found: tuple[Estimate, list[Confusion]],
    curves: Curves | None,
    hashes: Path | None = None,
) -> Ranking:
    """Average ranks over the runs and put the samples in order."""
    from scipy.stats import rankdata

    if score not in by_run:
        raise unknown_name("score", score, by_run)
    suspicion = {
        name: (rankdata(-values if name in scores.LOW else values, axis=1) / len(train)).mean(axis=0)
        for name, values in by_run.items()
    }
    # Counts of epochs leave many samples alike, above all where few epochs were evaluated.
    among_alike = suspicion.get("mean_loss", np.zeros(len(train)))
    return Ranking(
        order=np.lexsort((-among_alike, -suspicion[score])),
        score=score,
        suspicion=suspicion,
        values={name: values.mean(axis=0) for name, values in by_run.items()},
        suggested=suggested,
        train=train,
        class_names=class_names,
        ids=tuple(data.identities(train)),
        fingerprints=tuple(data.fingerprints(train, hashes)),
        estimate=found[0],
        confusions=found[1],
        curves=curves,
    )


def quality(ranking: Ranking) -> dict[str, Any] | None:
    """Return how well every score finds the wrong labels; None where no truth is known, or none or all are wrong.

    `auc` is the area under the ROC curve: the probability that a wrong label is more suspicious than a right one, a tie
    counting half. `precision` is the share of wrong labels among the n most suspicious samples, where n is the true
    number of wrong labels; ties at the border count by their own share. `suggestion_is_true` is the share of the wrong
    labels for which the suggested label is the true one, `suspects_are_wrong` the share of wrong labels among suspects.
    """
    train = ranking.train
    if train.clean_labels is None:
        return None
    wrong = train.labels != train.clean_labels
    if wrong.all() or not wrong.any():
        return None
    return {
        "samples": len(train),
        "wrong": int(wrong.sum()),
        "suggestion_is_true": float((ranking.suggested == train.clean_labels)[wrong].mean()),
        "estimated_wrong": ranking.estimate.wrong,
        "suspects_are_wrong": float(wrong[ranking.is_suspect].mean()) if ranking.is_suspect.any() else None,
        "score": ranking.score,
        "scores": {name: quality_of_score(wrong, values) for name, values in ranking.suspicion.items()},
    }


def quality_of_score(wrong: np.ndarray, suspicion: np.ndarray) -> dict[str, float]:
    """Return `auc` and `precision` of one score; both classes of bool (N,) `wrong` have samples."""
    from sklearn.metrics import roc_auc_score

    return {"auc": float(roc_auc_score(wrong, suspicion)), "precision": precision(wrong, suspicion)}


def precision(wrong: np.ndarray, suspicion: np.ndarray) -> float:
    """Return the precision at the true number of wrong labels, samples of equal suspicion taken in random order."""
    count = int(wrong.sum())
    border = np.sort(suspicion)[-count]
    above, at = suspicion > border, suspicion == border
    return float((wrong[above].sum() + (count - above.sum()) * wrong[at].mean()) / count)


def write_csv(ranking: Ranking, path: Path) -> None:
    """Write one line a sample, the most suspicious first."""
    train, names, is_suspect = ranking.train, ranking.class_names, ranking.is_suspect
    header = ["rank", "index", "id", "fingerprint", *(["file"] if train.paths is not None else [])]
    header += ["given_label", "given_name", "suggested_label", "suggested_name", "is_suspect", "suspicion"]
    header += ranking.values
    if train.clean_labels is not None:
        header += ["true_label", "true_name", "is_wrong"]
    # A file name that is no UTF-8 is written as it is.
    with (
        files.replacing(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(header)
        for place, i in enumerate(ranking.order, start=1):
            given, suggested = int(train.labels[i]), int(ranking.suggested[i])
            line = [place, int(train.index[i]), ranking.ids[i], ranking.fingerprints[i]]
            line += [printable(train.paths[i])] if train.paths is not None else []
            line += [given, names[given], suggested, names[suggested], int(is_suspect[i])]
            line += [f"{values[i]:.6g}" for values in (ranking.suspicion[ranking.score], *ranking.values.values())]
            if train.clean_labels is not None:
                true = int(train.clean_labels[i])
                line += [true, names[true], int(given != true)]
            writer.writerow(line)
