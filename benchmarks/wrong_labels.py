"""Measure what finds wrong labels best: methods, scores, cross-validation and estimates of their number.

    pip install -e ".[suspects]" && python -m benchmarks.wrong_labels --choose --output choice.json
    python -m benchmarks.wrong_labels --data-dir ~/tensorflow_datasets --human-labels CIFAR-10_human.pt

Every cell is a data set with wrong labels that are known, and a seed: of the noise, of the network and of the subset of
CIFAR. On each, the configuration of the command `suspects` is trained with SGD, SAM and SANER, which ranks samples by
their histories (*in-sample*), and by the folds of a cross-validation, which ranks them by probabilities of the one
network that did not train on them (*out-of-sample*). Of SGD these are cleanlab's own pipeline: `self_confidence`,
`normalized_margin` and the count of confident learning. `area_under_margin` is AUM.

There are two sets of cells. `--choose` are those that the defaults are chosen on: another part of the digits, data sets
and rates of their own, and seeds from 300. The other set is reported; nothing is chosen on it. The criterion, written
down before either was measured:

* The default method, score and whether to cross-validate are the combination with the highest mean precision at the
  true number of wrong labels over the choosing cells. Of those from which it does not differ (the 95 % interval of the
  mean difference, paired by cell, holds zero) the cheapest is taken, by passes through the data and back, and among
  equally cheap ones the one of the highest mean.
* The default estimate of the number is that with the smallest mean of |log(estimated / true)|, none counting as half a
  sample; cheaper ones are preferred likewise.

A measured training is a file in `--folder`: a measurement that was stopped goes on with the same command.
"""

import argparse
import dataclasses
import functools
import importlib.util
import math
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.machinery import command, tables, timing
from examples.noisy_images import data, files
from examples.noisy_images.config import OWN, Config, replace
from examples.noisy_images.data.dataset import pixel_statistics, stratified_positions
from examples.noisy_images.errors import UserError
from examples.noisy_images.labels import human_labels, noise
from examples.noisy_images.measures.sample_history import History
from examples.noisy_images.measures.tables import Difference, paired, points
from examples.noisy_images.suspects import estimate, ranking, scores, search, suspicion
from examples.noisy_images.training import preparation
from examples.noisy_images.training.trainer import Trainer

METHODS = ("sgd", "sam", "saner")
# Passes through the network and back for each sample and epoch.
PASSES = {"sgd": 1, "sam": 2, "saner": 2}
FOLDS = 5
IN, OUT = "in-sample", "out-of-sample"
INSTALL = 'pip install -e ".[suspects]"'
CIFAR = {"cifar10": ("aggre_label", "worse_label"), "cifar100": ("noisy_label",)}


class Training(NamedTuple):
    """What is trained: one run on all samples, or one a fold on the others."""

    method: str
    where: str

    @property
    def cost(self) -> int:
        """Passes for each sample and epoch; folds come on top of the run on all samples, as in `suspects`."""
        return PASSES[self.method] * (1 if self.where == IN else FOLDS)

    def __str__(self) -> str:
        return f"{self.method}, {self.where}"


class Combination(NamedTuple):
    """What samples are ranked by, or their number of wrong labels is estimated by."""

    training: Training
    name: str

    def __str__(self) -> str:
        return f"{self.training}, {self.name}"


# What `suspects` does unasked.
DEFAULT = Combination(Training(OWN.optimizer.method, IN), ranking.OF_HISTORIES)
DEFAULT_ESTIMATE = Combination(Training(OWN.optimizer.method, IN), "histories")


class Cell(NamedTuple):
    """A data set with wrong labels, and a seed."""

    dataset: str
    noise: str
    rate: float | None
    """Nominal; None of human labels, which are as wrong as they are."""
    seed: int

    @property
    def setting(self) -> str:
        """What the cell is, whatever the seed."""
        return f"{self.dataset}, {self.noise}" + ("" if self.rate is None else f" {100 * self.rate:g} %")

    @property
    def file_name(self) -> str:
        return f"{self.setting.replace(', ', '-').replace(' %', '').replace(' ', '_')}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Material:
    """What the cells are made of, and how long they are trained."""

    digits: int
    """Images of either part of the digits."""
    cifar: int
    """Images of a subset of CIFAR."""
    epochs: int | None
    """As the protocol has them if None."""
    data_dir: str | None = None
    """Of CIFAR."""
    human_labels: tuple[tuple[str, str], ...] = ()
    """Pairs of a data set and its file of human labels."""

    @property
    def sizes(self) -> dict[str, int | None]:
        """What a measurement depends on; where the files lie is not part of it."""
        return {"digits": self.digits, "cifar": self.cifar, "epochs": self.epochs}


# --- cells --------------------------------------------------------------------------------------------------------


def choosing_cells(seeds: Iterable[int]) -> list[Cell]:
    """Return the cells that the defaults are chosen on."""
    digits = (("symmetric", 0.15), ("asymmetric", 0.15), ("instance", 0.3))
    rows = ("breast cancer", "wine")
    settings = [("other digits", *one) for one in digits] + [(name, "symmetric", 0.15) for name in rows]
    return [Cell(*setting, seed) for seed in seeds for setting in settings]


def reported_cells(seeds: Iterable[int], human: Iterable[str]) -> list[Cell]:
    """Return the cells that are reported, seed by seed, so that a part of them is whole seeds."""
    digits = [
        (name, kind, rate)
        for name in ("digits", "digits as features")
        for kind in ("symmetric", "asymmetric", "instance")
        for rate in (0.05, 0.1, 0.2, 0.4)
    ]
    people = [(name, label_set, None) for name in human for label_set in CIFAR[name]]
    return [Cell(*setting, seed) for seed in seeds for setting in (*digits, *people)]


def trainings(cell: Cell, choosing: bool) -> list[Training]:
    """Return what is trained on a cell: SANER's folds, half of the cost, on fewer of those that are reported."""
    folds_of_saner = choosing or (cell.seed < 3 and (cell.dataset == "cifar10" or cell.rate in (0.1, 0.4)))
    folds_of_saner &= cell.dataset not in ("digits as features", "cifar100")
    return [
        *(Training(method, IN) for method in METHODS),
        Training("sgd", OUT),
        *([Training("saner", OUT)] if folds_of_saner else []),
    ]


@functools.lru_cache(maxsize=8)
def samples(dataset: str, seed: int, material: Material) -> tuple[data.Split, tuple[str, ...], np.ndarray]:
    """Return the samples of a data set with their true labels, their classes and, for noise that sees them, images.

    Embeddings are principal components of the pixels; another seed is another subset of CIFAR.
    """
    if dataset in CIFAR and material.data_dir is not None:
        whole = _cifar(dataset, material.data_dir)
        split = data.stratified_subset(whole.train, material.cifar, whole.num_classes, seed)
        halved = split.images.reshape(-1, 16, 2, 16, 2, 3).mean((2, 4))
        return dataclasses.replace(split, images=_components(halved, 64)), whole.class_names, split.images
    from sklearn import datasets

    if dataset in ("breast cancer", "wine"):
        bunch = {"breast cancer": datasets.load_breast_cancer, "wine": datasets.load_wine}[dataset]()
        features = bunch.data.astype(np.float32)
        return _split(features, bunch.target), tuple(map(str, bunch.target_names)), features
    bunch = datasets.load_digits()
    chosen, rest = stratified_positions(bunch.target, material.digits, 10, seed=0)
    if dataset == "other digits":
        chosen = rest[stratified_positions(bunch.target[rest], material.digits, 10, seed=0)[0]]
    images = np.rint(bunch.images[chosen] * (255 / 16)).astype(np.uint8)[..., None]
    seen = _components(images, 32) if dataset == "digits as features" else images
    return _split(seen, bunch.target[chosen]), tuple(map(str, range(10))), images


def _split(images: np.ndarray, labels: np.ndarray) -> data.Split:
    return data.Split(images, labels.astype(np.int32), labels.astype(np.int32), np.arange(len(labels)))


@functools.cache
def _cifar(dataset: str, data_dir: str) -> data.Dataset:
    return data.load(dataset, data_dir=data_dir)


def _components(images: np.ndarray, count: int) -> np.ndarray:
    from sklearn.decomposition import PCA

    pixels = images.reshape(len(images), -1).astype(np.float64)
    return PCA(min(count, len(pixels)), svd_solver="full").fit_transform(pixels).astype(np.float32)


def write_cell(cell: Cell, material: Material, path: pathlib.Path) -> None:
    """Write the samples of a cell with their wrong and their true labels, as a user's own .npz."""
    split, class_names, images = samples(cell.dataset, cell.seed if cell.dataset in CIFAR else 0, material)
    if cell.dataset in CIFAR:
        labels = human_labels.human_labels(dict(material.human_labels)[cell.dataset], cell.noise, split)
    else:
        mean, std = pixel_statistics(images) if images.dtype == np.uint8 else (None, None)
        labels = noise.corrupt(
            split.clean_labels,
            kind=cell.noise,
            rate=cell.rate,
            num_classes=len(class_names),
            seed=cell.seed,
            images=images,
            mean=mean,
            std=std,
            class_names=class_names,
        )
    of = "images" if split.images.ndim == 4 else "features"
    np.savez(path, labels=labels, clean_labels=split.clean_labels, class_names=class_names, **{of: split.images})


# --- training -----------------------------------------------------------------------------------------------------


def in_sample(config: Config) -> History:
    """Train on all samples and return their history, that of a run of the program, without its files."""
    prepared = preparation.prepare(config)
    train, trainer = prepared.dataset.train, Trainer(prepared.config, prepared.dataset)
    measured = [trainer.evaluate(train) for _ in _epochs(trainer)]
    losses, predictions, margins = map(np.stack, zip(*measured, strict=True))
    epochs = np.arange(1, len(losses) + 1)
    return History(epochs, losses, predictions, train.labels, train.clean_labels, train.index, margins)


def out_of_sample(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities (N, K) by the folds of `suspects --cross-validate`, without its files, and given labels."""
    parts, places, labels = [], [], []
    for fold in range(FOLDS):
        prepared = preparation.prepare(replace(config, folds=FOLDS, fold=fold))
        trainer, left_out = Trainer(prepared.config, prepared.dataset), prepared.left_out
        for _ in _epochs(trainer):
            pass
        parts.append(trainer.probabilities(left_out))
        places.append(left_out.index)
        labels.append(left_out.labels)
    order = np.argsort(np.concatenate(places))
    return np.concatenate(parts)[order], np.concatenate(labels)[order]


def _epochs(trainer: Trainer) -> Iterable[int]:
    for epoch in range(trainer.config.training.epochs or 0):
        for _ in trainer.train_epoch():
            pass
        yield epoch
    if int(trainer.state.first_non_finite) >= 0:
        raise FloatingPointError(f"{trainer.config.optimizer.method} left a loss that is not finite.")


def train(cell: Cell, training: Training, material: Material) -> dict[str, Any]:
    """Return how well every score of one training finds the wrong labels, and how many it says there are."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "cell.npz"
        write_cell(cell, material, path)
        config = replace(OWN, method=training.method, seed=cell.seed, epochs=material.epochs)
        config = search.of_source(path, config)
        wrong = _wrong(path)
        started = time.perf_counter()
        if training.where == IN:
            history = in_sample(config)
            seconds = time.perf_counter() - started
            values = {name: measure(history) for name, measure in (scores.SCORES | scores.MARGIN_SCORES).items()}
            estimates = {"histories": estimate.by_histories([history]).wrong}
        else:
            probabilities, labels = out_of_sample(config)
            seconds = time.perf_counter() - started
            values = {name: measure(probabilities, labels) for name, measure in scores.PROBABILITY_SCORES.items()}
            estimates = counted(labels, probabilities)
    return {
        "samples": len(wrong),
        "wrong": int(wrong.sum()),
        "seconds": seconds,
        "scores": {
            name: suspicion.quality_of_score(wrong, -x if name in scores.LOW else x) for name, x in values.items()
        },
        "estimates": estimates,
    }


def _wrong(path: pathlib.Path) -> np.ndarray:
    with np.load(path) as archive:
        return archive["labels"] != archive["clean_labels"]


def counted(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, int]:
    """Return the number of wrong labels by confident learning: as `suspects` counts, and as cleanlab by default."""
    if importlib.util.find_spec("cleanlab") is None:
        return {}
    from cleanlab import count

    return {
        "confident_learning": estimate.by_confident_learning(labels, probabilities, resamples=0).wrong,
        "off_diagonal": int(count.num_label_issues(labels, probabilities)),
    }


# --- measuring ----------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, budget: timing.Budget) -> dict[str, Any]:
    """Train everything on every cell, as far as the time goes; what is in the folder already is read."""
    files_of = _files_of(args.human_labels)
    material = Material(args.digits, args.cifar, args.epochs, args.data_dir, tuple(sorted(files_of.items())))
    human = [name for name in CIFAR if name in files_of and _is_prepared(name, args.data_dir)]
    cells = choosing_cells(args.seeds) if args.choose else reported_cells(args.seeds, human)
    setting = {"choose": args.choose, "seeds": list(args.seeds)} | material.sizes
    results: dict[str, Any] = {"setting": setting, "skipped": {}, "left_out": 0, "measured": []}
    if importlib.util.find_spec("cleanlab") is None:
        results["skipped"]["counts of confident learning"] = f"cleanlab is not installed (`{INSTALL}`)"
    if not args.choose:
        results["skipped"] |= {
            f"human labels of {name}": "--data-dir and --human-labels do not give both images and labels"
            for name in CIFAR
            if name not in human
        }
    for cell in cells:
        for training in trainings(cell, args.choose):
            path = args.folder / f"{cell.file_name}-{training.method}-{training.where}.json"
            if not path.exists() and not budget.remaining():
                results["left_out"] += 1
                continue
            record = kept(path, material, functools.partial(train, cell, training, material))
            results["measured"].append({**cell._asdict(), **training._asdict(), **record})
            command.progress(f"{cell.setting}, seed {cell.seed}, {training}: {record['seconds']:.1f} s")
    return results


def kept(path: pathlib.Path, material: Material, measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what the file holds, or else measure and write it."""
    if not path.exists():
        files.write_json(path, {"setting": material.sizes} | measured())
    record = files.read_json(path)
    if record.pop("setting") != material.sizes:
        raise UserError(f"{path} was measured in another setting: give another --folder.")
    return record


def _files_of(paths: Sequence[str]) -> dict[str, str]:
    """Return the data set that each file has human labels of."""
    found = {}
    for path in paths:
        held = human_labels.read_human_labels(path)
        found |= {name: str(path) for name, label_sets in CIFAR.items() if label_sets[0] in held}
    return found


def _is_prepared(dataset: str, data_dir: str | None) -> bool:
    return data_dir is not None and (pathlib.Path(data_dir).expanduser() / dataset).is_dir()


# --- reading ------------------------------------------------------------------------------------------------------


class Values:
    """A number for every combination on every cell."""

    def __init__(
        self, measured: Sequence[Mapping[str, Any]], of_record: Callable[[Mapping[str, Any]], dict[str, float]]
    ):
        self._by_combination: dict[Combination, dict[Cell, float]] = {}
        for record in measured:
            cell = Cell(*(record[name] for name in Cell._fields))
            training = Training(*(record[name] for name in Training._fields))
            for name, value in of_record(record).items():
                self._by_combination.setdefault(Combination(training, name), {})[cell] = value
        self.ordered = list(dict.fromkeys(cell for values in self._by_combination.values() for cell in values))
        self.cells = set(self.ordered)

    def __iter__(self) -> Iterator[Combination]:
        return iter(self._by_combination)

    def __contains__(self, combination: Combination) -> bool:
        return combination in self._by_combination

    def of(self, combination: Combination, group: str | None = None) -> dict[Cell, float]:
        """Return the values of a combination by cell, of all cells or of one group."""
        values = self._by_combination[combination]
        return {cell: value for cell, value in values.items() if group in (None, group_of(cell))}

    def by_cell(self, ours: Combination, theirs: Combination) -> Difference | None:
        """Return how far two combinations are apart, paired by cell."""
        place = {cell: number for number, cell in enumerate(self.ordered)}
        first, second = ({place[cell]: value for cell, value in self.of(one).items()} for one in (ours, theirs))
        return paired(first, second)

    def by_seed(self, ours: Combination, theirs: Combination) -> Difference | None:
        """Return how far two combinations are apart on the cells that both have, paired by seed."""
        common = self.of(ours).keys() & self.of(theirs).keys()

        def means(one: Combination) -> dict[int, float]:
            by_seed: dict[int, list[float]] = {}
            for cell in common:
                by_seed.setdefault(cell.seed, []).append(self.of(one)[cell])
            return {seed: float(np.mean(values)) for seed, values in by_seed.items()}

        return paired(means(ours), means(theirs))


def group_of(cell: Cell) -> str:
    """Return the column of a table that a cell belongs to."""
    return cell.setting if cell.rate is None else cell.dataset


def precisions(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: of_score["precision"] for name, of_score in record["scores"].items()}


def areas(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: of_score["auc"] for name, of_score in record["scores"].items()}


def log_ratios(record: Mapping[str, Any]) -> dict[str, float]:
    """Return log(estimated / true) of every estimate, where none counts as half a sample."""
    return {name: math.log(max(number, 0.5) / record["wrong"]) for name, number in record["estimates"].items()}


def errors(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: -abs(ratio) for name, ratio in log_ratios(record).items()}


def choose(values: Values) -> tuple[Combination, dict[Combination, Difference | None]]:
    """Return the default by the criterion above, and how far every combination is from the best; larger is better."""
    everywhere = [one for one in values if values.of(one).keys() == values.cells]
    mean = {one: float(np.mean(list(values.of(one).values()))) for one in everywhere}
    best = max(everywhere, key=mean.__getitem__)
    behind = {one: values.by_cell(one, best) for one in sorted(everywhere, key=lambda one: -mean[one])}
    # A single cell has no interval, and the best differs from itself by nothing.
    near = [one for one, gap in behind.items() if one == best or (gap and gap.high is not None and gap.high >= 0)]
    return min(near, key=lambda one: (one.training.cost, -mean[one])), behind


def report(results: dict[str, Any]) -> str:
    """Return the Markdown: what was chosen, or the tables of what was reported, and where it was measured."""
    setting, measured = results["setting"], results["measured"]
    versions = {name: version for name, version in results["versions"].items() if version is not None}
    cells = len({tuple(record[name] for name in Cell._fields) for record in measured})
    lines = [
        f"{cells} cells, seeds {', '.join(map(str, setting['seeds']))}; {setting['digits']:,} digits, subsets of "
        f"{setting['cifar']:,} of CIFAR; {results['device']}, {results['date'][:10]}; "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}.",
        "",
        f"    {results['command']}",
    ]
    if measured:
        whole = not results["left_out"]
        lines += _report_choice(measured, whole) if setting["choose"] else _report_tables(measured)
    lines += [line for what, why in results["skipped"].items() for line in ("", f"Left out, {what}: {why}.")]
    if results["left_out"]:
        lines += ["", f"Left out for want of time: {results['left_out']} trainings; the same command goes on."]
    return "\n".join(lines)


def _report_choice(measured: Sequence[Mapping[str, Any]], whole: bool) -> list[str]:
    lines = []
    for title, of_record, default in (
        ("precision at the true number, %", precisions, DEFAULT),
        ("100 log(estimated / true), mean size", errors, DEFAULT_ESTIMATE),
    ):
        values = Values(measured, of_record)
        if not values.cells:
            continue
        chosen, behind = choose(values)
        rows = []
        for one, gap in behind.items():
            name = f"**{one}**" if whole and one == chosen else str(one)
            mean = abs(float(np.mean(list(values.of(one).values()))))
            rows.append([name, f"{100 * mean:.1f}", points(gap), str(one.training.cost)])
        lines += ["", *tables.table(["combination", title, "beside the best (95 %)", "passes"], rows)]
        before = "the default" if chosen == default else f"the default is {default}"
        found = f"Chosen on {len(values.cells)} cells: **{chosen}** ({before})."
        lines += ["", found if whole else "Nothing is chosen on a part of the cells."]
    return lines


def _report_tables(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    precision, area = Values(measured, precisions), Values(measured, areas)
    lines = ["", "Precision at the true number of wrong labels, %:", "", *_by_group(precision, DEFAULT, _percent)]
    lines += ["", "Area under the ROC curve, %:", "", *_by_group(area, DEFAULT, _percent)]
    lines += ["", "Precision on the digits by noise and rate, %:", "", *_by_noise(precision)]
    ratio, error = Values(measured, log_ratios), Values(measured, errors)
    if ratio.cells:
        lines += [
            "",
            "Estimated over true number, geometric mean; the last column is of -100 times the size of its logarithm:",
            "",
        ]
        lines += _by_group(ratio, DEFAULT_ESTIMATE, lambda x: f"{math.exp(x):.2f}", difference_of=error)
    seconds = Values(measured, lambda record: {"seconds": record["seconds"]})
    lines += ["", "Seconds of training (of folds: all of them, without the run on all samples), median:", ""]
    return lines + _by_group(seconds, None, lambda x: f"{x:.1f}", average=np.median)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _by_group(
    values: Values,
    default: Combination | None,
    form: Callable[[float], str],
    difference_of: Values | None = None,
    average: Callable[[list[float]], Any] = np.mean,
) -> list[str]:
    """Return a table of combinations by group of cells, and how far each is from the default.

    A star says that a combination was measured on a part of the cells of a group only.
    """
    groups = list(dict.fromkeys(group_of(cell) for cell in values.ordered))
    rows = []
    for one in values:
        row = [f"**{one}**" if one == default else str(one)]
        for group in groups:
            found = list(values.of(one, group).values())
            of_all = len(found) == sum(group_of(cell) == group for cell in values.cells)
            row.append(form(float(average(found))) + ("" if of_all else " *") if found else "")
        if default is not None and default in values:
            row.append("" if one == default else points((difference_of or values).by_seed(one, default)))
        rows.append(row)
    beside = [] if default is None or default not in values else ["beside the default (95 %)"]
    return tables.table(["combination", *groups, *beside], rows)


# Of every kind of ranking one or two.
BY_NOISE = (
    *(Combination(Training(method, IN), "disagreement") for method in METHODS),
    *(Combination(Training(method, IN), "mean_loss") for method in METHODS),
    *(Combination(Training(method, IN), "area_under_margin") for method in ("sgd", "saner")),
    *(Combination(Training("sgd", OUT), name) for name in ("self_confidence", "normalized_margin")),
)


def _by_noise(values: Values) -> list[str]:
    settings = list(dict.fromkeys((cell.noise, cell.rate) for cell in values.ordered if cell.rate is not None))
    rows = []
    for one in BY_NOISE:
        if one not in values:
            continue
        by_setting: dict[tuple[str, float | None], list[float]] = {}
        for cell, value in values.of(one).items():
            by_setting.setdefault((cell.noise, cell.rate), []).append(value)
        found = (by_setting.get(setting) for setting in settings)
        rows.append([str(one), *(_percent(float(np.mean(some))) if some else "" for some in found)])
    return tables.table(["combination", *(f"{kind} {100 * rate:g} %" for kind, rate in settings)], rows)


# --- command ------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = command.parser("wrong_labels", "Measure what finds wrong labels best.")
    count: Callable[[str], int] = command.at_least_one
    parser.add_argument("--choose", action="store_true", help="measure the cells that the defaults are chosen on")
    parser.add_argument("--seeds", nargs="+", type=int, help="(0 to 4; 300 to 304 with --choose)")
    parser.add_argument("--data-dir", help="where CIFAR is prepared; left out if not given")
    parser.add_argument("--human-labels", nargs="+", default=[], metavar="FILE", help="of CIFAR-10N and CIFAR-100N")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/wrong_labels"), help="of records")
    parser.add_argument("--digits", type=count, default=800, help="images of either part of the digits (800)")
    parser.add_argument("--cifar", type=count, default=2000, help="images of a subset of CIFAR (2000)")
    parser.add_argument("--epochs", type=count, help="of every training (those of the protocol)")
    parser.add_argument("--read", type=pathlib.Path, metavar="JSON", help="print the report of an --output and stop")
    args = parser.parse_args(argv)
    first = 300 if args.choose else 0
    args.seeds = range(first, first + 5) if args.seeds is None else args.seeds
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and, if asked, write."""
    args = parse(argv)
    if args.read is not None:
        results = files.read_json(args.read)
        print(report(results))
        return results
    return command.run("wrong_labels", args, argv, measure, report, packages=("cleanlab", "scikit-learn"))


if __name__ == "__main__":
    main()
