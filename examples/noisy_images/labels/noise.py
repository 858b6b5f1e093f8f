"""Label noise and its audit: which training labels become wrong, and what was actually done to them.

Every kind follows the released SANER code by default, and the variants of the literature are named options
(`NoiseOptions`). The clean labels are never overwritten: `corrupt` returns a new array, and `audit` compares the two.

The nominal rate is what was asked for; the actual rate is the share of labels that differ from the true ones. They are
not the same number for every kind (the released asymmetric noise on CIFAR-10 halves it), so print the audit.
"""

import dataclasses
import json
import math
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import files
from ..config import Kind, NoiseOptions
from ..errors import UserError, unknown_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = typing.get_args(Kind)
RELEASED = NoiseOptions()

# The similar classes of CIFAR-10, by name. The literature goes one way; the released code also turns dogs into cats.
ONE_WAY_PAIRS = {"truck": "automobile", "bird": "airplane", "deer": "horse", "cat": "dog"}
RELEASED_PAIRS = ONE_WAY_PAIRS | {"dog": "cat"}

PDN_STANDARD_DEVIATION = 0.1
_CHUNK_BYTES = 2**25


def corrupt(
    labels: np.ndarray,
    *,
    kind: str,
    rate: float,
    num_classes: int,
    seed: int,
    images: np.ndarray | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    class_names: Sequence[str] | None = None,
    superclasses: np.ndarray | None = None,
    human_labels: np.ndarray | None = None,
    options: NoiseOptions = RELEASED,
) -> np.ndarray:
    """Return noisy labels, a new int32 array determined by the seed and the input alone.

    A lower rate of symmetric or asymmetric noise at the same seed relabels a subset of the samples of a higher one,
    with the same targets. The rate plays no part in "none" and "real"; with the other kinds, rate 0 changes nothing.

    Args:
        labels: The true labels, (N,).
        kind: One of `KINDS`.
        rate: The nominal share of labels to change, in [0, 1].
        num_classes: The number of classes.
        seed: The noise seed; each kind draws from a stream of its own.
        images: uint8 (N, H, W, C); for "instance".
        mean: Per channel, for pixels scaled to [0, 1]; for "instance".
        std: Per channel; for "instance".
        class_names: For "asymmetric" with pairs of named classes.
        superclasses: The superclass of every class; for "asymmetric" with the next class in the superclass.
        human_labels: The annotators' labels in the order of `labels`; for "real".
        options: The variants.
    """
    if kind not in KINDS:
        raise unknown_name("noise", kind, KINDS)
    if not 0 <= rate <= 1:  # Also true of NaN.
        raise UserError(f"the noise rate is {rate}, which is outside [0, 1]: give a share such as 0.5.")
    if seed < 0:
        raise UserError(f"the noise seed is {seed}: give a number that is not negative.")
    labels = _checked(labels, num_classes, "the labels")
    if kind == "none":
        return labels.copy()
    if kind == "real":
        return _real(labels, human_labels, num_classes)
    if num_classes < 2:
        raise UserError(f"{kind} noise needs two classes or more to choose from, and the data set has {num_classes}.")
    streams = _Streams(seed, kind)
    if kind == "symmetric":
        return _symmetric(labels, rate, num_classes, streams, options)
    if kind == "asymmetric":
        targets = _asymmetric_targets(num_classes, class_names, superclasses, options)
        return _asymmetric(labels, rate, targets, streams, options)
    _check_images(labels, images, mean, std)
    return _instance(labels, rate, num_classes, images, mean, std, streams, options)


class _Streams:
    """Random streams that differ by seed, kind and purpose, so that no draw shifts another."""

    def __init__(self, seed: int, kind: str):
        self._seed, self._kind = seed, KINDS.index(kind)

    def __call__(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(self._kind, *purpose)))


_PICKS, _TARGETS, _PROBABILITIES = range(3)


def _pick(candidates: np.ndarray, rate: float, count: str, rng: np.random.Generator) -> np.ndarray:
    """Return those of the candidates that are to be relabelled, in ascending order."""
    if count == "bernoulli":
        return candidates[rng.random(len(candidates)) < rate]
    # The head of a permutation: a lower rate then picks a subset of what a higher one does.
    return np.sort(rng.permutation(candidates)[: int(rate * len(candidates))])


def _symmetric(labels, rate, num_classes, streams, options):
    picked = _pick(np.arange(len(labels)), rate, options.symmetric_count, streams(_PICKS))
    offsets = streams(_TARGETS).integers(1, num_classes, size=len(labels))
    noisy = labels.copy()
    noisy[picked] = (labels[picked] + offsets[picked]) % num_classes
    return noisy


def _asymmetric(labels, rate, targets, streams, options):
    candidates = np.arange(len(labels))
    if options.asymmetric_picks == "affected":
        candidates = candidates[(targets != np.arange(len(targets)))[labels]]
    picked = _pick(candidates, rate, options.asymmetric_count, streams(_PICKS))
    noisy = labels.copy()
    noisy[picked] = targets[labels[picked]]
    return noisy


def _asymmetric_targets(num_classes, class_names, superclasses, options) -> np.ndarray:
    """Return the class that each class turns into; a class that keeps its label maps to itself."""
    choice = options.asymmetric_targets
    classes = np.arange(num_classes)
    if choice == "next_class":
        return np.roll(classes, -1)
    if choice == "next_in_superclass":
        if superclasses is None:
            raise UserError(
                "asymmetric noise to the next class in the superclass needs superclasses, which this data set does not "
                "have: choose 'next_class', or CIFAR-100."
            )
        superclasses = np.asarray(superclasses)
        if superclasses.shape != (num_classes,):
            raise UserError(f"there are {len(superclasses)} superclass entries for {num_classes} classes.")
        targets = classes.copy()
        for superclass in np.unique(superclasses):
            members = np.flatnonzero(superclasses == superclass)
            targets[members] = np.roll(members, -1)
        return targets
    # Without names there is no telling whether this is CIFAR-10, and guessing would change the noise in silence.
    if class_names is None:
        raise UserError(f"asymmetric noise with targets {choice!r} needs the names of the classes.")
    if len(class_names) != num_classes:
        raise UserError(f"there are {len(class_names)} class names for {num_classes} classes.")
    position = {name.casefold(): index for index, name in enumerate(class_names)}
    pairs = ONE_WAY_PAIRS if choice == "one_way_pairs" else RELEASED_PAIRS
    missing = sorted({*pairs, *pairs.values()} - set(position))
    if missing:
        if choice == "released":
            return np.roll(classes, -1)
        raise UserError(
            f"asymmetric noise with targets {choice!r} needs the classes of CIFAR-10, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not in this data set: choose 'next_class'."
        )
    targets = classes.copy()
    for source, target in pairs.items():
        targets[position[source]] = position[target]
    return targets


def _instance(labels, rate, num_classes, images, mean, std, streams, options):
    if options.instance_count == "pdn" and rate > 0:
        probabilities = _truncated_normal(rate, PDN_STANDARD_DEVIATION, len(labels), streams(_PROBABILITIES))
        picked = np.flatnonzero(streams(_PICKS).random(len(labels)) < probabilities)
    else:
        picked = _pick(np.arange(len(labels)), rate, "exact", streams(_PICKS))
    mean, std = (np.asarray(value, np.float64) for value in (mean, std))
    features = math.prod(images.shape[1:])
    chunk = max(1, _CHUNK_BYTES // (8 * features))
    noisy = labels.copy()
    for label in np.unique(labels[picked]):
        rng = streams(_TARGETS, int(label))
        # Float64, so that the rounding of a matrix product, which differs between machines, does not decide a label.
        weights = rng.standard_normal((features, num_classes))
        members = picked[labels[picked] == label]
        for start in range(0, len(members), chunk):
            rows = members[start : start + chunk]
            pixels = ((images[rows] / 255.0 - mean) / std).reshape(len(rows), features)
            scores = pixels @ weights
            scores[:, label] = -np.inf
            # Adding Gumbel noise and taking the largest is a draw from the softmax.
            noisy[rows] = np.argmax(scores + rng.gumbel(size=scores.shape), axis=1)
    return noisy


def _truncated_normal(location: float, scale: float, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw from a normal truncated to [0, 1], around a location in [0, 1]: half the draws or more are kept."""
    values = rng.normal(location, scale, size)
    while (outside := (values < 0) | (values > 1)).any():
        values[outside] = rng.normal(location, scale, outside.sum())
    return values


def _real(labels, human_labels, num_classes):
    if human_labels is None:
        raise UserError("real noise needs human labels: give the file of CIFAR-10N or CIFAR-100N labels.")
    human_labels = np.asarray(human_labels)
    if human_labels.shape != labels.shape:
        raise UserError(
            f"there are {human_labels.size} human labels for {len(labels)} samples: give the matching file."
        )
    return _checked(human_labels, num_classes, "the human labels").copy()


def _checked(labels, num_classes, what):
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{what} have shape {labels.shape} and type {labels.dtype}: give one integer a sample.")
    if labels.size and (labels.min() < 0 or labels.max() >= num_classes):
        raise UserError(
            f"{what} go from {labels.min()} to {labels.max()}, and {num_classes} classes allow 0 to {num_classes - 1}."
        )
    return labels.astype(np.int32, copy=False)


def _check_images(labels, images, mean, std):
    if images is None or mean is None or std is None:
        raise UserError("instance noise depends on the pixels: it needs the images, their mean and standard deviation.")
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4:
        raise UserError(
            "instance noise needs the images in memory as one uint8 array (N, H, W, C): choose another noise."
        )
    if len(images) != len(labels):
        raise UserError(f"there are {len(images)} images for {len(labels)} labels.")
    channels = images.shape[-1]
    if len(mean) not in (1, channels) or len(std) not in (1, channels):
        raise UserError(
            f"the images have {channels} channels, the mean {len(mean)} and the standard deviation {len(std)}."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Audit:
    """What a noise did: rates and transitions, counted from the labels themselves.

    Attributes:
        kind: The noise.
        nominal_rate: What was asked for; None where nothing was (human labels, labels of the user's own).
        actual_rate: The share of labels that are wrong.
        count: The number of wrong labels.
        size: The number of labels.
        class_names: The classes.
        counts: int64 (C, C): samples of true class (row) given a class (column).
        transition: float64 (C, C): the counts, each row divided by its sum; zeros for a class without samples.
        rate_per_class: float64 (C,): the share of wrong labels of each true class; NaN for a class without samples.
        targets_per_class: int64 (C,): how many wrong classes each true class was given.
        effective_targets_per_class: float64 (C,): the exponential of the entropy of those wrong classes: as many evenly
            used targets are as varied. 0 for a class without wrong labels.
    """

    kind: str
    nominal_rate: float | None
    actual_rate: float
    count: int
    size: int
    class_names: tuple[str, ...]
    counts: np.ndarray
    transition: np.ndarray
    rate_per_class: np.ndarray
    targets_per_class: np.ndarray
    effective_targets_per_class: np.ndarray

    def summary(self) -> str:
        """Return one line: the noise, its nominal and its actual rate."""
        nominal = "" if self.nominal_rate is None else f"nominal rate {100 * self.nominal_rate:.2f} %, "
        actual = f"actual rate {100 * self.actual_rate:.2f} % ({self.count:,} of {self.size:,} labels)"
        return f"{self.kind} noise: {nominal}{actual}"

    def table(self, max_rows: int = 20) -> str:
        """Return the summary and a row for every true class as plain text.

        "targets" counts the wrong classes that occur, "effective" weighs them by how often they do (the exponential of
        their entropy). Up to ten classes, a row holds the percentages of the given classes; beyond, the most frequent
        wrong ones. Of more than `max_rows` classes only those of highest and lowest rate are shown; `save` writes all.
        """
        order, omitted = np.arange(len(self.class_names)), 0
        if len(order) > max_rows:
            order = np.argsort(-np.nan_to_num(self.rate_per_class), kind="stable")
            omitted = len(order) - max_rows
            order = np.concatenate([order[: max_rows - max_rows // 2], order[len(order) - max_rows // 2 :]])
        full = len(self.class_names) <= 10
        width = min(24, max(10, *(len(name) for name in self.class_names)))
        header = f"{'true class':<{width + 4}} {'samples':>8} {'wrong %':>8} {'targets':>8} {'effective':>10}  "
        lines = [self.summary(), ""]
        if full:
            lines.append(f"{'':<{len(header)}}given class, %")
            header += "".join(f"{index:>6}" for index in range(len(self.class_names)))
        else:
            header += "most frequent wrong classes, %"
        lines.append(header)
        for row, index in enumerate(order):
            if omitted and row == max_rows - max_rows // 2:
                lines.append(f"... {omitted} more in noise.json")
            samples = self.counts[index].sum()
            rate = f"{100 * self.rate_per_class[index]:.2f}" if samples else "-"
            line = f"{index:>3} {self.class_names[index][:width]:<{width}} {samples:>8} {rate:>8}"
            line += f" {self.targets_per_class[index]:>8} {self.effective_targets_per_class[index]:>10.1f}  "
            if full:
                line += "".join(f"{100 * share:>6.1f}" for share in self.transition[index])
            else:
                wrong = self.transition[index].copy()
                wrong[index] = 0
                top = [target for target in np.argsort(-wrong, kind="stable")[:3] if wrong[target]]
                line += ", ".join(f"{self.class_names[target]} {100 * wrong[target]:.1f}" for target in top)
            lines.append(line.rstrip())
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the audit as plain lists and numbers, shares to six digits; null where a class has no samples."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, value in values.items():
            if isinstance(value, np.ndarray):
                values[name] = (value.round(6) if value.dtype == np.float64 else value).tolist()
        values["rate_per_class"] = [None if math.isnan(rate) else rate for rate in values["rate_per_class"]]
        return values

    def figure(self) -> "Figure":
        """Return the transition matrix as a heat map, with the rate of each class beside it."""
        from ..measures import plots

        title = self.summary().replace(": ", "\n", 1)
        return plots.transition_figure(self.transition, self.rate_per_class, self.class_names, title)

    def save(self, folder: str | Path) -> None:
        """Write noise.json and noise.png into the folder, each complete or not at all."""
        from ..measures import plots

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with files.replacing(folder / "noise.json") as path:
            path.write_text(_dumps(self.to_json()), encoding="utf-8")
        plots.save(self.figure(), folder / "noise.png")


def _dumps(values: dict[str, Any]) -> str:
    """Return JSON with a row of a matrix on each line, which can be read and compared."""
    fields = []
    for name, value in values.items():
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        if text.startswith("[["):
            text = text.replace("[[", "[\n  [").replace("], [", "],\n  [").replace("]]", "]\n ]")
        fields.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(fields) + "\n}\n"


def audit(
    given: np.ndarray,
    clean: np.ndarray,
    class_names: Sequence[str],
    nominal_rate: float | None,
    kind: str,
) -> Audit:
    """Compare the given labels with the true ones."""
    if clean is None:
        raise UserError("the true labels of this data set are unknown, so its noise cannot be audited.")
    num_classes = len(class_names)
    given = _checked(given, num_classes, "the given labels")
    clean = _checked(clean, num_classes, "the true labels")
    if len(given) != len(clean) or not len(given):
        raise UserError(
            f"an audit compares labels of the same samples: {len(given)} are given and {len(clean)} are true."
        )
    counts = np.bincount(clean.astype(np.int64) * num_classes + given, minlength=num_classes**2)
    counts = counts.reshape(num_classes, num_classes)
    totals = counts.sum(axis=1)
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    wrong_totals = wrong.sum(axis=1)
    shares = wrong / np.maximum(wrong_totals, 1)[:, None]
    entropy = -np.sum(shares * np.log(np.where(shares > 0, shares, 1)), axis=1)
    return Audit(
        kind=kind,
        nominal_rate=None if nominal_rate is None else float(nominal_rate),
        actual_rate=float(wrong_totals.sum() / len(clean)),
        count=int(wrong_totals.sum()),
        size=len(clean),
        class_names=tuple(str(name) for name in class_names),
        counts=counts,
        transition=counts / np.maximum(totals, 1)[:, None],
        rate_per_class=np.where(totals > 0, wrong_totals / np.maximum(totals, 1), np.nan),
        targets_per_class=(wrong > 0).sum(axis=1),
        effective_targets_per_class=np.where(wrong_totals > 0, np.exp(entropy), 0.0),
    )
