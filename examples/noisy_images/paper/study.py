"""The report of a study: a protocol of its own, methods compared seed by seed, each also at the setting that suits it.

Two runs of one seed share their noise draw, their held-out samples and their order of the batches, so that the
difference between two methods is judged by the spread of the differences and not by that of the runs. Intervals are
Student's for the mean of paired differences, 95 %, each for itself: of many, one in twenty misses by chance.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .. import files
from ..measures import plots, tables
from .presets import Cell, Figure
from .records import Run

# What is compared, in the order of the columns; the last two are known where the training set was evaluated then.
MEASURED = {
    "last_noisy_accuracy": "noisy, last",
    "last_test_accuracy": "test, last",
    "chosen_test_accuracy": "test, chosen",
    "best_test_accuracy": "test, best",
    "chosen_noisy_accuracy": "noisy, chosen",
    "best_noisy_accuracy": "noisy, best",
}
DRAWN = {
    "last_noisy_accuracy": "Noisy accuracy, last",
    "last_test_accuracy": "Test accuracy, last",
    "chosen_test_accuracy": "Test accuracy, chosen",
}
# By what a setting is chosen, on other seeds, written down before any of them was run: what a user gets who stops by
# held-out labels, and what one gets who trains to the end.
CRITERIA = {
    "chosen_test_accuracy": "mean test accuracy at the epoch chosen on held-out labels",
    "last_test_accuracy": "mean test accuracy at the last epoch",
}


class Sample(NamedTuple):
    """A cell with its complete runs."""

    cell: Cell
    runs: Sequence[Run]

    @property
    def key(self) -> str:
        """Its name among the curves of a figure: method and setting."""
        return f"{self.cell.config.optimizer.method} {self.cell.setting}".strip()

    @property
    def label(self) -> str:
        """Its name for a reader."""
        return _upper(self.key)

    def by_seed(self, number: str) -> dict[int, float]:
        """Return a number of every run that has it."""
        return {run.seed: run.numbers[number] for run in self.runs if number in run.numbers}

    def mean(self, number: str) -> float | None:
        """Return the mean of a number over the runs; None where none has it."""
        spread = tables.spreads([run.numbers for run in self.runs], (number,)).get(number)
        return None if spread is None else spread["mean"]


class Pair(NamedTuple):
    """Two cells, compared seed by seed."""

    label: str
    differences: Mapping[str, tables.Difference | None]


def _upper(key: str) -> str:
    method, _, setting = key.partition(" ")
    return method.upper().replace("_", "-") + (f", {setting}" if setting else "")


# --- tables -------------------------------------------------------------------------------------------------------


def columns(samples: Iterable[Sample]) -> list[str]:
    """Return what the runs have: a number that some of them lack is left out, because its mean would be of others."""
    runs = [run for sample in samples for run in sample.runs]
    return [name for name in MEASURED if runs and all(name in run.numbers for run in runs)]


def table(samples: Sequence[Sample]) -> tuple[list[str], list[list[str]]]:
    """Return mean and standard deviation of every cell."""
    shown = columns(samples)
    body = []
    for sample in samples:
        spreads = tables.spreads([run.numbers for run in sample.runs], shown)
        body.append([sample.label, str(len(sample.runs) or ""), *(tables.percent(spreads.get(c)) for c in shown)])
    return ["method", "n", *(MEASURED[name] for name in shown)], body


def compared(pairs: Iterable[tuple[Sample, Sample]], shown: Sequence[str]) -> list[Pair]:
    """Return the differences of pairs of cells, the first minus the second; none of those without a common seed."""
    found = [
        Pair(
            f"{one.label} minus {other.label}",
            {name: tables.paired(one.by_seed(name), other.by_seed(name)) for name in shown},
        )
        for one, other in pairs
    ]
    return [pair for pair in found if any(pair.differences.values())]


def pairs_of(figure: Figure, samples: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
    """Return the pairs of a figure whose cells both are among the selected ones."""
    by_key = {sample.key: sample for sample in samples}
    return [(by_key[one], by_key[other]) for one, other in figure.pairs if one in by_key and other in by_key]


def table_of_pairs(pairs: Sequence[Pair]) -> str:
    """Return the differences with their intervals as Markdown, in points."""
    shown = [name for name in MEASURED if any(name in pair.differences for pair in pairs)]
    body = [
        [pair.label, _counted(pair), *(tables.points(pair.differences.get(name)) for name in shown)] for pair in pairs
    ]
    return tables.markdown(["difference", "n", *(MEASURED[name] for name in shown)], body)


def _counted(pair: Pair) -> str:
    return str(max(difference.pairs for difference in pair.differences.values() if difference))


# --- choosing -----------------------------------------------------------------------------------------------------


def can_be_chosen_among(samples: Sequence[Sample]) -> bool:
    """Return whether every cell has runs, of the same seeds: means over different seeds are not to be ranked."""
    seeds = {frozenset(run.seed for run in sample.runs) for sample in samples}
    return len(seeds) == 1 and all(seeds)


def chosen(samples: Iterable[Sample], criterion: str) -> dict[str, Sample]:
    """Return for every method the cell with the highest mean of a criterion; cells without runs do not count."""
    best: dict[str, Sample] = {}
    for sample in samples:
        method, mean = sample.cell.config.optimizer.method, sample.mean(criterion)
        if mean is not None and (method not in best or mean > best[method].mean(criterion)):
            best[method] = sample
    return best


def table_of_choice(samples: Sequence[Sample]) -> str:
    """Return as Markdown which setting of every method is best by each criterion."""
    rows = []
    for criterion, words in CRITERIA.items():
        for sample in chosen(samples, criterion).values():
            spread = tables.spreads([run.numbers for run in sample.runs], (criterion,))[criterion]
            rows.append(
                [
                    words,
                    _upper(sample.cell.config.optimizer.method),
                    sample.cell.setting,
                    tables.percent(spread),
                    str(len(sample.runs)),
                ]
            )
    return tables.markdown(["chosen by", "method", "setting", "its mean", "n of each setting"], rows)


def at_its_best(
    choosing: Sequence[Sample], reported: Sequence[Sample], shown: Sequence[str], beside: Sequence[Sample] = ()
) -> tuple[str, list[Pair]]:
    """Return the methods each at the setting chosen on other seeds, as Markdown, and their differences.

    Args:
        choosing: The cells on the seeds that are chosen on.
        reported: The same cells on the seeds that are reported.
        shown: Numbers that are shown.
        beside: Cells that each method at its best is subtracted from.
    """
    of = {sample.cell.config: sample for sample in reported}
    body, pairs = [], []
    for criterion, words in CRITERIA.items():
        best = {method: of[one.cell.config] for method, one in chosen(choosing, criterion).items()}
        for sample in best.values():
            spreads = tables.spreads([run.numbers for run in sample.runs], shown)
            cells = (tables.percent(spreads.get(name)) for name in shown)
            body.append([words, sample.label, str(len(sample.runs)), *cells])
        if "saner" in best:
            others = (other for method, other in best.items() if method != "saner")
            pairs += compared(((best["saner"], other) for other in others), shown)
        pairs += compared(((one, other) for one in beside for other in best.values()), shown)
    header = ["each at its best by", "method", "n", *(MEASURED[name] for name in shown)]
    return tables.markdown(header, body), pairs


# --- files --------------------------------------------------------------------------------------------------------


def draw(pairs: Sequence[Pair], title: str, path: Path) -> None:
    """Draw the differences with their intervals."""
    panels = {
        words: [interval(pair, name) for pair in pairs]
        for name, words in DRAWN.items()
        if any(pair.differences.get(name) for pair in pairs)
    }
    plots.save(plots.intervals_figure(panels, [pair.label for pair in pairs], title), path)


def interval(pair: Pair, name: str) -> plots.Interval | None:
    """Return a difference in points."""
    difference = pair.differences.get(name)
    if difference is None:
        return None
    low, high = (None if end is None else 100 * end for end in (difference.low, difference.high))
    return plots.Interval(pair.label, 100 * difference.mean, low, high)


def write_csv(path: Path, pairs: Sequence[Pair]) -> None:
    """Write the differences, one line a pair and a number, in points."""
    with files.replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["difference", "of", "points", "low", "high", "pairs"])
        for pair in pairs:
            for name, value in pair.differences.items():
                if value is not None:
                    points = (None if x is None else round(100 * x, 4) for x in (value.mean, value.low, value.high))
                    writer.writerow([pair.label, name, *points, value.pairs])
