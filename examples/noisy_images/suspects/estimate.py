"""How many given labels are wrong, between which bounds, and which classes they are mistaken for.

Confident learning (Northcutt et al., JAIR 2021) estimates the joint distribution of given and true labels from
probabilities out of sample; cleanlab computes it. Without such probabilities the histories of the samples vote.
"""

import dataclasses
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import UserError
from ..measures.sample_history import History

# The table of given by true labels is K x K, and a few copies of it are in memory at a time.
MAX_CLASSES = 4096
# Resamples are fewer where each takes long: the time goes with the probabilities and the table.
_RESAMPLES = (20, 200)
_WORK = 4e9
# The share of the epochs that counts as early. Chosen on digits, one seed, none to 40 % of the labels wrong: of 1, 1/2,
# 1/3 and 1/6 the one whose estimates are nearest over SANER and SGD, which memorizes most wrong labels later than this.
EARLY = 1 / 3
# Two classes of which this share of all samples looks like the other are one to the network. Half is chance.
DUPLICATE_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The estimated number of wrong labels.

    Attributes:
      wrong: Number of samples, an estimate between 0 and N.
      low: Lower end of its 95 % interval over resamples of the data.
      high: Upper end. The interval knows nothing of mistakes that the network makes consistently.
      method: `confident_learning` or `histories`.
    """

    wrong: int
    low: int
    high: int
    method: str


@dataclasses.dataclass(frozen=True)
class Confusion:
    """Two classes of which samples look like the other.

    Attributes:
      given: The label of the samples.
      true: The label that they look as if they had.
      samples: Their estimated number.
      share: Of the samples of both classes together, those that look like the other class, in either direction.
    """

    given: int
    true: int
    samples: int
    share: float


def by_confident_learning(
    labels: np.ndarray, probabilities: np.ndarray, *, resamples: int | None = None, seed: int = 0
) -> Estimate:
    """Estimate the number of wrong labels by the calibrated confident joint, with a bootstrap interval.

    Args:
      labels: int (N,), given labels.
      probabilities: float (N, K), out of sample: of networks that never saw the sample.
      resamples: Bootstrap resamples; 20 to 200 by the size of the data if None.
      seed: Of the resamples.

    Raises:
      UserError: cleanlab is missing, there is one class, or there are too many.
    """
    samples, classes = probabilities.shape
    count = _cleanlab_count(labels, classes)
    if resamples is None:
        resamples = int(np.clip(_WORK / (samples * classes + classes**2), *_RESAMPLES))
    # The plain count of confident off-diagonal samples leaves out those that are not confident of any class, which are
    # many where many labels are wrong; the calibrated one gives them their share.
    wrong = _quietly(lambda: _off_diagonal(count, labels, probabilities))
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        chosen = rng.integers(0, samples, samples)
        if len(np.unique(labels[chosen])) > 1:
            drawn.append(_quietly(lambda chosen=chosen: _off_diagonal(count, labels[chosen], probabilities[chosen])))
    return _estimate(wrong, drawn, "confident_learning")


def _off_diagonal(count: Any, labels: np.ndarray, probabilities: np.ndarray) -> int:
    return int(count.num_label_issues(labels, probabilities, estimation_method="off_diagonal_calibrated"))


def by_histories(histories: Sequence[History]) -> Estimate:
    """Estimate the number of wrong labels as that of the samples that are not learned in most early epochs of all runs.

    A network learns what most labels agree on before it memorizes the rest. It is a count, with the interval of a count
    over resamples: a run that memorizes wrong labels within the early epochs sees too few of them.
    """
    early = [history.predictions[: max(1, round(EARLY * len(history.epochs)))] for history in histories]
    unlearned = np.mean([(part != histories[0].labels).mean(axis=0) for part in early], axis=0) > 0.5
    samples = len(unlearned)
    drawn = np.random.default_rng(0).binomial(samples, unlearned.mean(), _RESAMPLES[1])
    return _estimate(int(unlearned.sum()), drawn, "histories")


def _estimate(wrong: int, drawn: Sequence[int], method: str) -> Estimate:
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (wrong, wrong)
    return Estimate(wrong, min(wrong, round(low)), max(wrong, round(high)), method)


def most_suspicious(order: np.ndarray, number: int) -> np.ndarray:
    """Return which samples are among the first `number` of an order of positions, bool (N,)."""
    chosen = np.zeros(len(order), bool)
    chosen[order[:number]] = True
    return chosen


def confused_classes(labels: np.ndarray, probabilities: np.ndarray, most: int = 20) -> list[Confusion]:
    """Return the pairs of classes that samples are mistaken between, the largest first, by the confident joint.

    Args:
      labels: int (N,), given labels.
      probabilities: float (N, K), out of sample.
      most: Number of pairs, those with an estimated sample at least.
    """
    count = _cleanlab_count(labels, probabilities.shape[1])
    joint = _quietly(lambda: count.estimate_joint(labels, probabilities))
    return _pairs(len(labels) * joint, np.bincount(labels, minlength=len(joint)), most)


def confused_suggestions(
    labels: np.ndarray, suggested: np.ndarray, num_classes: int, most: int = 20
) -> list[Confusion]:
    """Return the pairs of classes that samples are mistaken between, by the labels that are suggested for them."""
    pairs, counts = np.unique(np.stack([labels, suggested]), axis=1, return_counts=True)
    sizes = np.bincount(labels, minlength=num_classes)
    number = {(int(given), int(true)): int(n) for (given, true), n in zip(pairs.T, counts, strict=True)}
    confusions = [_confusion(pair, n, number.get(pair[::-1], 0), sizes) for pair, n in number.items()]
    return sorted((c for c in confusions if c.given != c.true), key=lambda c: -c.samples)[:most]


def _pairs(table: np.ndarray, sizes: np.ndarray, most: int) -> list[Confusion]:
    """Return the largest entries beside the diagonal of a table of given by true labels."""
    off_diagonal = table.copy()
    np.fill_diagonal(off_diagonal, 0)
    flat = off_diagonal.ravel()
    largest = np.argpartition(-flat, min(most, flat.size - 1))[:most]
    largest = largest[np.lexsort((largest, -flat[largest]))]
    places = (divmod(int(place), len(table)) for place in largest if flat[place] >= 0.5)
    return [_confusion(pair, flat_value, table[pair[::-1]], sizes) for pair in places for flat_value in (table[pair],)]


def _confusion(pair: tuple[int, int], there: float, back: float, sizes: np.ndarray) -> Confusion:
    return Confusion(*pair, round(float(there)), float((there + back) / max(1, sizes[list(pair)].sum())))


def duplicate_classes(confusions: Sequence[Confusion]) -> list[Confusion]:
    """Return the pairs that look like one class under two names, each once: consider merging them."""
    seen: set[frozenset[int]] = set()
    found = []
    for confusion in sorted(confusions, key=lambda c: -c.share):
        pair = frozenset((confusion.given, confusion.true))
        if confusion.share >= DUPLICATE_SHARE and pair not in seen:
            seen.add(pair)
            found.append(confusion)
    return found


def as_json(estimate: Estimate, confusions: Sequence[Confusion], class_names: Sequence[str]) -> dict[str, Any]:
    """Return an estimate with the pairs of classes by their names, in values that JSON can hold."""

    def named(pairs: Sequence[Confusion]) -> list[dict[str, Any]]:
        return [
            dataclasses.asdict(pair) | {"given": class_names[pair.given], "true": class_names[pair.true]}
            for pair in pairs
        ]

    return dataclasses.asdict(estimate) | {
        "confused_classes": named(confusions),
        "duplicate_classes": named(duplicate_classes(confusions)),
    }


def why_not(labels: np.ndarray, classes: int) -> str | None:
    """Return why confident learning cannot estimate anything here, as a sentence without its end; None where it can."""
    if importlib.util.find_spec("cleanlab") is None:
        return "confident learning needs cleanlab, which is not installed"
    if classes > MAX_CLASSES:
        return f"confident learning keeps a table of {classes:,} x {classes:,} classes, more than {MAX_CLASSES:,}"
    if len(np.unique(labels)) < 2:
        return "confident learning needs samples of two classes or more, and all given labels are the same"
    return None


def _cleanlab_count(labels: np.ndarray, classes: int) -> Any:
    """Return cleanlab's estimators; an error where they cannot be used."""
    reason = why_not(labels, classes)
    if reason is not None:
        needs = 'run `pip install -e ".[suspects]"`' if "cleanlab" in reason else "rank by the history of a run"
        raise UserError(f"{reason}: {needs}.")
    from cleanlab import count

    return count


def _quietly(compute: Callable[[], Any]) -> Any:
    # A class that has no samples in a resample is no news.
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return compute()
