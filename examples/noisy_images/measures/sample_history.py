"""What a network learns when: the history of every training sample over a run, and what can be read off it.

samples/samples.npz               labels (N,), clean_labels (N,) where they are known, index (N,): once
samples/epochs-00001-00010.npz    epochs (E,), losses float32 (E, N), predictions (E, N) and, where they were measured,
                                  margins float16 (E, N): the epochs since the last file

Losses are cross-entropies against the given labels. All are measured after the epoch in evaluation mode on images
without augmentation, by the evaluation that the metrics of the training set come from.

The measures of a sample take `History` and return (N,). E is the number of evaluated epochs. A sample *is learned* in
an epoch when its predicted label is its given label.
"""

import dataclasses
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data import Split
from ..errors import UserError
from ..files import replacing

FOLDER = "samples"


@dataclasses.dataclass(frozen=True, eq=False)
class History:
    """The training samples of a run over its evaluated epochs.

    Attributes:
      epochs: int (E,), completed epochs at each evaluation, ascending.
      losses: float32 (E, N), cross-entropy against the given label.
      predictions: int16 or int32 (E, N), predicted label.
      labels: int32 (N,), given labels.
      clean_labels: int32 (N,), true labels; None where they are unknown.
      index: int64 (N,), each sample's place in the source's own order.
      margins: float16 (E, N), logit of the given label minus the largest other; None where they were not measured.
    """

    epochs: np.ndarray
    losses: np.ndarray
    predictions: np.ndarray
    labels: np.ndarray
    clean_labels: np.ndarray | None
    index: np.ndarray
    margins: np.ndarray | None = None


class Recorder:
    """Write the history of a run; epochs later than `last_epoch` that an earlier start wrote are dropped.

    `write` belongs before every checkpoint: the files then end where checkpoints were taken, and none is newer than
    what is on the disk, so that a run that goes on from any checkpoint measures each epoch exactly once.
    """

    def __init__(self, folder: Path, train: Split, num_classes: int, last_epoch: int):
        self._folder = folder / FOLDER
        self._dtype = np.int16 if num_classes <= np.iinfo(np.int16).max else np.int32
        self._pending: list[dict[str, int | np.ndarray]] = []
        for path in _parts(folder):
            if int(path.stem.split("-")[2]) > last_epoch:
                path.unlink()
        clean = {} if train.clean_labels is None else {"clean_labels": train.clean_labels}
        with replacing(self._folder / "samples.npz") as temporary:
            np.savez(temporary, labels=train.labels, index=train.index, **clean)

    def add(self, epoch: int, losses: np.ndarray, predictions: np.ndarray, margins: np.ndarray | None = None) -> None:
        """Keep what was measured after an epoch, (N,) each, until it is written; margins every time or never."""
        measured = {
            "epochs": epoch,
            "losses": losses.astype(np.float32),
            "predictions": predictions.astype(self._dtype),
        }
        if margins is not None:
            largest = np.finfo(np.float16).max
            measured["margins"] = np.clip(margins, -largest, largest).astype(np.float16)
        self._pending.append(measured)

    def write(self) -> None:
        """Write the epochs since the last write, whole or not at all."""
        if not self._pending:
            return
        measured = {name: np.stack([one[name] for one in self._pending]) for name in self._pending[0]}
        epochs = measured["epochs"]
        with replacing(self._folder / f"epochs-{epochs[0]:05d}-{epochs[-1]:05d}.npz") as temporary:
            np.savez(temporary, **measured)
        self._pending.clear()


def _parts(run: Path) -> list[Path]:
    # By the first epoch, also where more than five digits are needed.
    return sorted((run / FOLDER).glob("epochs-*-*.npz"), key=lambda path: int(path.stem.split("-")[1]))


def read(run: Path) -> History:
    """Read the history that a run has written so far.

    Raises:
      UserError: There is none, or it is damaged.
    """
    parts = _parts(run)
    if not parts:
        raise UserError(f"{run} has no history of its samples: train it with --sample-history to its first checkpoint.")
    try:
        samples = _arrays(run / FOLDER / "samples.npz")
        history = [_arrays(path) for path in parts]
        epochs, losses, predictions = (
            np.concatenate([part[name] for part in history]) for name in ("epochs", "losses", "predictions")
        )
        # A run that was begun without margins has none of its first epochs.
        margins = np.concatenate([p["margins"] for p in history]) if all("margins" in p for p in history) else None
        clean = samples.get("clean_labels")
        read = History(epochs, losses, predictions, samples["labels"], clean, samples["index"], margins)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"the history in {run / FOLDER} cannot be read ({error}): restore it or train again."
        ) from error
    if (np.diff(epochs) <= 0).any() or losses.shape != (len(epochs), len(read.labels)):
        raise UserError(f"the history in {run / FOLDER} holds epochs twice or other samples: train the run again.")
    if not np.isfinite(losses).all():
        raise UserError(f"the history in {run / FOLDER} holds losses that are not finite: train with a smaller rate.")
    return read


def _arrays(path: Path) -> dict[str, np.ndarray]:
    # Opened here: NumPy leaves a damaged archive open.
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def mean_loss(history: History) -> np.ndarray:
    """Return the mean of the loss over the epochs, float64: `sum_e l_e / E`.

    The area under the loss curve. O2U-Net (Huang et al., ICCV 2019) averages so over a cyclical learning rate; AUM
    (Pleiss et al., NeurIPS 2020) averages the margin instead of the loss.
    """
    return history.losses.mean(axis=0, dtype=np.float64)


def area_under_margin(history: History) -> np.ndarray:
    """Return the mean over the epochs of the margin `z_y - max_{k != y} z_k` of the logits, float64; low is suspicious.

    AUM (Pleiss et al., NeurIPS 2020, definition 1), which takes the logits of the training steps: here they are those
    after each epoch, in evaluation mode.

    Raises:
      ValueError: The margins were not measured.
    """
    if history.margins is None:
        raise ValueError("the history has no margins.")
    return history.margins.mean(axis=0, dtype=np.float64)


def last_loss(history: History) -> np.ndarray:
    """Return the loss after the last epoch, float64."""
    return history.losses[-1].astype(np.float64)


def disagreement(history: History) -> np.ndarray:
    """Return the share of the epochs in which the sample is not learned, float64 in [0, 1]."""
    return (~_learned(history)).mean(axis=0)


def forgetting_events(history: History) -> np.ndarray:
    """Return how often the sample is learned in one epoch and not in the next, int; E where it is never learned.

    Between two epochs rather than between two visits of the sample, and never learned counts as more than any number
    of events instead of as infinitely many (Toneva et al., ICLR 2019, section 3).
    """
    learned = _learned(history)
    events = (learned[:-1] & ~learned[1:]).sum(axis=0)
    return np.where(learned.any(axis=0), events, len(learned))


def first_learned(history: History) -> np.ndarray:
    """Return the first epoch in which the sample is learned, int; one more than the last where it never is."""
    learned = _learned(history)
    return np.where(learned.any(axis=0), history.epochs[learned.argmax(axis=0)], history.epochs[-1] + 1)


def most_predicted(histories: Sequence[History], num_classes: int) -> np.ndarray:
    """Return the label that is predicted in most epochs of all runs, int (N,); the smallest of several."""
    counts = np.zeros((num_classes, len(histories[0].labels)), np.int64)
    samples = np.arange(counts.shape[1])
    for history in histories:
        for predictions in history.predictions:
            counts[predictions, samples] += 1
    return counts.argmax(axis=0)


def _learned(history: History) -> np.ndarray:
    return history.predictions == history.labels
