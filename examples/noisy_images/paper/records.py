"""What is kept of runs: the numbers of each and the mean curves over their seeds, from folders or from a small record.

A record stands for the folders of many runs where those are too large to keep. It is two files in one folder:

runs.csv     one line a run: its folder's name, which says its configuration, its numbers, and where it was made
curves.json  for every cell, metrics over the epochs: mean and standard deviation over its seeds
"""

import csv
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import files
from ..config import Config, replace, run_name
from ..errors import UserError
from ..measures import metrics, plots
from ..measures.plots import Line

RUNS, CURVES = "runs.csv", "curves.json"
# What is kept of the epoch that is best on the test set, of that chosen on the held-out labels, and of the last one.
_EPOCHS = {"best": "best_epoch", "chosen": "chosen_epoch", "last": "epochs"}
_ACCURACIES = (
    *("test_accuracy", "heldout_accuracy", "noisy_accuracy", "true_accuracy_on_noisy", "clean_accuracy", "gap"),
    "generalization_gap",
)
_DIGITS = 8


@dataclasses.dataclass(frozen=True)
class Run:
    """The numbers of a complete run."""

    name: str
    seed: int
    numbers: Mapping[str, float]
    """Metrics of the last, the best and the chosen epoch, as `last_test_accuracy`; which epochs the last two are."""
    seconds: float
    device: str
    commit: str
    history: Sequence[Mapping[str, Any]] = ()
    """Metrics of every epoch; empty where a record stands for the run."""


def of_folder(folder: Path, seed: int) -> Run:
    """Read a complete run from its folder."""
    history = files.read_json_lines(folder / "metrics.jsonl")
    seconds = files.read_json(folder / "summary.json")["seconds"]
    environment = files.read_json(folder / "environment.json")
    where = (str(environment["device"]), str(environment["commit"])[:7])
    return Run(folder.name, seed, numbers(history), seconds, *where, history)


def numbers(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return what is kept of the metrics of a run's epochs; of the last epoch, all of them."""
    summary = metrics.summary(history)
    kept: dict[str, float] = {name: summary[name] for name in ("best_epoch", "chosen_epoch") if name in summary}
    at = {record["epoch"]: record for record in history}
    for when, name in _EPOCHS.items():
        record = at.get(summary.get(name), {})
        measured = record if when == "last" else {metric: record[metric] for metric in _ACCURACIES if metric in record}
        kept |= {f"{when}_{metric}": value for metric, value in measured.items() if metric != "epoch"}
    return kept


def lines(curves: plots.Runs, metrics: Iterable[str]) -> dict[str, Line]:
    """Return mean and standard deviation over seeds of every metric that there is."""
    found = {metric: plots.line(curves, metric) for metric in metrics}
    return {metric: line for metric, line in found.items() if line is not None}


# --- records ------------------------------------------------------------------------------------------------------


def cell_name(config: Config) -> str:
    """Return the name that the runs of a cell share."""
    return run_name(replace(config, seed=0)).removesuffix("-seed0")


def write(folder: Path, runs: Iterable[Run], curves: Mapping[str, Mapping[str, Line]]) -> None:
    """Write the record of runs, and mean curves by the name of their cell."""
    rows = [
        {"run": run.name, "seed": run.seed}
        | {name: _rounded(value) for name, value in run.numbers.items() if _is_kept(name)}
        | {"seconds": round(run.seconds, 1), "device": run.device, "commit": run.commit}
        for run in runs
    ]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with files.replacing(folder / RUNS) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    values = {
        name: {panel: [_listed(part) for part in line] for panel, line in of_cell.items()}
        for name, of_cell in curves.items()
    }
    text = ",\n".join(f"{json.dumps(name)}: {json.dumps(of_cell)}" for name, of_cell in values.items())
    files.write_text(folder / CURVES, f"{{\n{text}\n}}\n")


def _is_kept(name: str) -> bool:
    when, _, metric = name.partition("_")
    return metric == "epoch" or (when in _EPOCHS and metric in _ACCURACIES)


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.{_DIGITS}g}")


def _listed(part: np.ndarray | None) -> list[float] | None:
    return None if part is None else [_rounded(value) for value in part.tolist()]


class Record(NamedTuple):
    """What a folder keeps of runs whose own folders are elsewhere; nothing where there is no record."""

    runs: Mapping[str, Run] = {}
    """By the names of their folders."""
    curves: Mapping[str, Mapping[str, Line]] = {}
    """By the name of their cell and the metric."""


NOTHING = Record()


def read(folder: Path) -> Record:
    """Return the record in a folder.

    Raises:
      UserError: A file is not a record.
    """
    return Record(_read(folder / RUNS, _runs), _read(folder / CURVES, _curves))


def _read(path: Path, read: Callable[[str], Mapping[str, Any]]) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    try:
        return read(path.read_text(encoding="utf-8"))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a record of runs ({error}): restore it, or remove it.") from error


def _runs(text: str) -> Mapping[str, Run]:
    found = {}
    for row in csv.DictReader(text.splitlines()):
        values = {name: float(value) for name, value in row.items() if value and _is_kept(name)}
        where = (float(row["seconds"]), row["device"], row["commit"])
        found[row["run"]] = Run(row["run"], int(row["seed"]), values, *where)
    return found


def _curves(text: str) -> Mapping[str, Mapping[str, Line]]:
    return {
        name: {
            panel: (np.asarray(epochs), np.asarray(mean), None if std is None else np.asarray(std))
            for panel, (epochs, mean, std) in of_cell.items()
        }
        for name, of_cell in json.loads(text).items()
    }
