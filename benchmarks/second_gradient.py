"""Study the second gradient every k-th step: is it needed in each of them, for accuracy and for finding wrong labels?

    python -m benchmarks.second_gradient --data-dir ~/tensorflow_datasets --output second_gradient.json

Four regimes, each with one protocol for every method: the digits of `paper elements`, CIFAR-10 of `paper
memorization`, and principal components of CIFAR-10's pixels as features, through a linear layer and through a
perceptron, under the protocol of one's own data. SGD, and SAM and SANER with a second gradient in every step, every
second, fifth and tenth one; and both with one in every step at their best radius, which is chosen on other seeds by the
test accuracy of the last epoch (`--choose` alone trains those).

The criterion, written down before it was run. A second gradient every fifth step holds if, in all four regimes and at
settings that are equal otherwise, the 95 % interval of the difference in test accuracy at the last epoch, paired by
seed, stays above -0.5 points for SANER, and if a step takes at most 1.3 of the wall time of SGD's and 0.65 of SANER's
(`train_step`). What a larger radius does in its place, and what it does to SAM and to the ranking of wrong labels, is
said beside it. A fifth regime, the digits at five times the learning rate, has no part in the criterion: one direction
kept over several steps was seen to add up there.

A measured run is a file in `--folder`: a study that was stopped goes on with the same command.
"""

import argparse
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.machinery import command, tables, timing
from examples.noisy_images import data, files
from examples.noisy_images.config import OWN, Config, replace
from examples.noisy_images.data.dataset import Split
from examples.noisy_images.measures import sample_history
from examples.noisy_images.measures.sample_history import History
from examples.noisy_images.measures.tables import Difference, paired, percent, points, spread
from examples.noisy_images.paper.presets import FIGURES
from examples.noisy_images.suspects import suspicion
from examples.noisy_images.training import preparation
from examples.noisy_images.training.trainer import Trainer

BOUND = -0.005
EVERY = (1, 5, 2, 10)
METHODS = ("saner", "sam")


class Regime(NamedTuple):
    """A protocol, the seeds that are reported, and the radii and seeds of the choice."""

    protocol: Config
    seeds: Sequence[int]
    radii: Sequence[float] = ()
    choosing: Sequence[int] = ()
    evaluate_every: int = 1
    every: Sequence[int] = EVERY
    decides: bool = True

    @property
    def rho(self) -> float:
        """The radius of the protocol."""
        rho = self.protocol.optimizer.rho
        assert rho is not None
        return rho


class Run(NamedTuple):
    """What is trained: one method in one regime with one seed."""

    regime: str
    method: str
    every: int
    rho: float
    seed: int

    @property
    def curve(self) -> tuple[str, int, float]:
        return self.method, self.every, self.rho

    @property
    def file_name(self) -> str:
        return f"{self.regime.replace(', ', '-').replace(' ', '_')}-{self.method}-{self.every}-{self.rho:g}-{self.seed}"


def regimes(features: pathlib.Path) -> dict[str, Regime]:
    """Return the regimes by name; features lie in an .npz file."""
    digits = replace(FIGURES["elements"].protocol, rate=0.5)
    own = replace(OWN, dataset="npz", data_dir=str(features), noise="symmetric", rate=0.4)
    of_features = ((0.05, 0.1, 0.2, 0.4, 0.8), (100, 101, 102))
    return {
        "digits": Regime(digits, range(200, 220), (0.1, 0.2, 0.4, 0.6, 0.8, 1.2, 1.6), (100, 101, 102)),
        "CIFAR-10": Regime(
            FIGURES["memorization"].protocol, range(300, 308), (0.1, 0.15, 0.2, 0.3), (100, 101), evaluate_every=2
        ),
        "features, linear": Regime(replace(own, model="linear"), range(10), *of_features),
        "features, mlp": Regime(replace(own, model="mlp"), range(10), *of_features),
        "digits, rate 0.1": Regime(replace(digits, learning_rate=0.1), range(200, 205), every=(1, 5), decides=False),
    }


def reported(name: str, regime: Regime, every: int) -> list[Run]:
    """Return the runs of a regime that have a second gradient every so many steps, and with the first of them SGD's."""
    methods = ("sgd", *METHODS) if every == regime.every[0] else METHODS
    return [Run(name, method, every, regime.rho, seed) for method in methods for seed in regime.seeds]


def choosing(name: str, regime: Regime) -> list[Run]:
    """Return the runs that the best radius of each method is chosen among."""
    return [Run(name, method, 1, rho, seed) for method in METHODS for rho in regime.radii for seed in regime.choosing]


def at_their_best(name: str, regime: Regime, measured: Mapping[Run, Mapping[str, float]]) -> list[Run]:
    """Return the reported runs of each method at the radius that was best on the seeds of the choice."""
    runs = []
    for method in METHODS if regime.radii else ():
        rho = best_radius(name, regime, method, measured)
        runs += [] if rho is None else [Run(name, method, 1, rho, seed) for seed in regime.seeds]
    return runs


def best_radius(name: str, regime: Regime, method: str, measured: Mapping[Run, Mapping[str, float]]) -> float | None:
    """Return the radius of the highest mean test accuracy at the last epoch; None before all are measured."""
    means = {}
    for rho in regime.radii:
        runs = [Run(name, method, 1, rho, seed) for seed in regime.choosing]
        if any(run not in measured for run in runs):
            return None
        means[rho] = np.mean([measured[run]["last_test_accuracy"] for run in runs])
    return max(means, key=lambda rho: means[rho], default=None)


# --- training -----------------------------------------------------------------------------------------------------


def write_features(path: pathlib.Path, data_dir: str) -> None:
    """Write 64 principal components of 4,000 training and 2,000 test images of CIFAR-10, at half their side."""
    from sklearn.decomposition import PCA

    whole = data.load("cifar10", data_dir=data_dir)
    parts = (data.stratified_subset(whole.train, 4000, 10, 0), data.stratified_subset(whole.test, 2000, 10, 0))
    pixels = [
        np.asarray(part.images).reshape(-1, 16, 2, 16, 2, 3).mean((2, 4)).reshape(len(part), -1) for part in parts
    ]
    components = PCA(64, svd_solver="full").fit(pixels[0])
    train, test = (components.transform(one).astype(np.float32) for one in pixels)
    arrays = {"features": train, "test_features": test, "test_labels": parts[1].labels}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, labels=parts[0].labels, clean_labels=parts[0].labels, **arrays)


def train(regime: Regime, run: Run, data_dir: str) -> dict[str, float]:
    """Return accuracies of a run, and how well it ranks its wrong labels."""
    changes: dict[str, Any] = {"method": run.method, "every": run.every, "rho": run.rho, "seed": run.seed}
    if regime.protocol.data.dataset == "cifar10":
        changes["data_dir"] = data_dir
    prepared = preparation.prepare(replace(regime.protocol, **changes, scan_epochs=True))
    trainer, split = Trainer(prepared.config, prepared.dataset), prepared.dataset.train
    measured, tests = [], []
    for epoch in _epochs(trainer, regime.evaluate_every):
        measured.append((epoch, *trainer.evaluate(split)))
        tests.append(_accuracy(trainer, prepared.dataset.test))
    epochs, losses, predictions, margins = map(np.stack, zip(*measured, strict=True))
    history = History(epochs, losses, predictions, split.labels, split.clean_labels, split.index, margins)
    wrong = split.labels != split.clean_labels
    memorized = predictions[-1] == split.labels
    found = {
        name: suspicion.quality_of_score(wrong, measure(history))
        for name, measure in (
            ("disagreement", sample_history.disagreement),
            ("mean_loss", sample_history.mean_loss),
        )
    }
    return {
        "last_test_accuracy": tests[-1],
        "best_test_accuracy": max(tests),
        "last_noisy_accuracy": float(memorized[wrong].mean()),
        "last_clean_accuracy": float(memorized[~wrong].mean()),
        "last_loss": float(losses[-1].mean()),
        **{f"{name}_{of}": value for name, one in found.items() for of, value in one.items()},
    }


def _accuracy(trainer: Trainer, split: Split) -> float:
    _, predictions, _ = trainer.evaluate(split)
    return float(np.mean(predictions == split.labels))


def _epochs(trainer: Trainer, evaluate_every: int) -> Iterator[int]:
    # A run that diverges is a result, not an error.
    last = trainer.config.training.epochs or 0
    for epoch in range(1, last + 1):
        for _ in trainer.train_epoch():
            pass
        if epoch % evaluate_every == 0 or epoch == last:
            yield epoch


# --- measuring ----------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, budget: timing.Budget) -> dict[str, Any]:
    """Train what is missing, in the order in which it decides; what is in the folder already is read."""
    features = args.folder / "features.npz"
    if not features.exists():
        write_features(features, args.data_dir)
    all_regimes = regimes(features)
    if args.regimes:
        all_regimes = {name: all_regimes[name] for name in args.regimes}
    measured: dict[Run, dict[str, float]] = {}
    left_out = 0

    def take(runs: Sequence[Run]) -> None:
        nonlocal left_out
        for run in runs:
            path = args.folder / f"{run.file_name}.json"
            if not path.exists():
                if not budget.remaining():
                    left_out += 1
                    continue
                files.write_json(path, train(all_regimes[run.regime], run, args.data_dir))
                command.progress(f"{run.regime}, {run.curve}, seed {run.seed}")
            measured[run] = files.read_json(path)

    for every in EVERY:
        for name, regime in all_regimes.items():
            if every in regime.every:
                take(reported(name, regime, every))
        if every == 5:
            for name, regime in all_regimes.items():
                take(choosing(name, regime))
                take(at_their_best(name, regime, measured))
    return {"left_out": left_out, "measured": [{**run._asdict(), **values} for run, values in measured.items()]}


# --- reading ------------------------------------------------------------------------------------------------------

COLUMNS = {
    "last_noisy_accuracy": "noisy, last",
    "last_test_accuracy": "test, last",
    "best_test_accuracy": "test, best",
    "disagreement_precision": "wrong labels found",
}


def report(results: dict[str, Any]) -> str:
    """Return the Markdown: every curve of every regime, the differences that decide, the radii that were chosen."""
    measured = {Run(*(one[name] for name in Run._fields)): one for one in results["measured"]}
    known = regimes(pathlib.Path("features.npz"))
    lines = []
    for name, regime in known.items():
        curves: dict[tuple[str, int, float], dict[str, dict[int, float]]] = {}
        for run, values in measured.items():
            if run.regime == name and run.seed in regime.seeds:
                of_curve = curves.setdefault(run.curve, {column: {} for column in COLUMNS})
                for column in COLUMNS:
                    of_curve[column][run.seed] = values[column]
        if curves:
            lines += [f"### {name}", "", *_table(regime, curves), ""]
    if results["left_out"]:
        lines += [f"{results['left_out']} runs were left out, for time."]
    return "\n".join(lines)


def _table(regime: Regime, curves: Mapping[tuple[str, int, float], Mapping[str, Mapping[int, float]]]) -> list[str]:
    rho = regime.rho
    rows = []
    order = sorted(curves, key=lambda curve: (("sgd", "sam", "saner").index(curve[0]), curve[2] != rho, curve[1]))
    for curve in order:
        method, every, radius = curve
        values = curves[curve]
        of_reference = curves.get((method, 1, rho)) if curve != (method, 1, rho) else None
        difference: Difference | None = None
        if of_reference is not None:
            difference = paired(values["last_test_accuracy"], of_reference["last_test_accuracy"])
        verdict = ""
        if difference is not None and difference.low is not None and radius == rho:
            verdict = "holds" if difference.low > BOUND else "does not hold"
        label = method if method == "sgd" else f"{method}, every {every}, rho {radius:g}"
        cells = (percent(spread(list(values[column].values()))) for column in COLUMNS)
        rows.append([label, str(len(values["last_test_accuracy"])), *cells, points(difference), verdict])
    return tables.table(["", "seeds", *COLUMNS.values(), "test, last, against every 1", ""], rows)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = command.parser("second_gradient", "Study the second gradient every k-th step.")
    parser.add_argument("--data-dir", required=True, help="where CIFAR-10 is prepared")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/second_gradient"), help="of the runs")
    parser.add_argument("--regimes", nargs="+", default=(), help="(all)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and, if asked, write."""
    return command.run("second_gradient", parse(argv), argv, measure, report)


if __name__ == "__main__":
    main()
