"""The paper's tables and figures as data: what the runs behind each of them are, and what the paper reports.

A *cell* is one number of a table or one curve of a figure: the configuration of its runs, whose seeds are its sample.
The cells of the tables are the rows of `published.csv`; those of the figures, and of the controls and studies that the
paper has not, are entries of `FIGURES`. Cells of several presets whose configurations are equal share their runs.
"""

import csv
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..config import DIGITS, PAPER, Circumstances, Config, flat, replace, run_name
from ..errors import UserError, unknown_name
from ..measures import plots

PUBLISHED = Path(__file__).with_name("published.csv")
PUBLISHED_SEEDS = 3
SEEDS = (0, 1, 2)


class Published(NamedTuple):
    """A number of the paper: test accuracy in percent, best epoch, mean and standard deviation of three seeds."""

    mean: float
    std: float | None


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number of a table, or one curve of a figure."""

    config: Config
    """Its runs but for the seed."""
    setting: str
    """What sets it apart beside data set, noise, model and method, in a word; empty if nothing does."""
    published: Published | None
    """What the paper reports for it, in whichever of its tables."""
    share: float | None = None
    """Share of the training set; None for all of it."""

    def run(self, seed: int) -> Config:
        """Return the configuration of one run."""
        return replace(self.config, seed=seed)


class Curve(NamedTuple):
    """A curve of a figure: its method, and the settings that differ from the figure's protocol."""

    method: str
    setting: str = ""
    settings: Mapping[str, Any] = {}
    share: float | None = None
    """Share of the training set; None for all of it."""


class Figure(NamedTuple):
    """A figure: curves, on the paper's data set and noise rates unless others are asked for.

    A curve is named by its method and its setting, such as `sam` or `sam rho=0.2`.
    """

    title: str
    curves: tuple[Curve, ...]
    rates: tuple[float, ...]
    dataset: str = "cifar10"
    panels: tuple[str, ...] = plots.FIGURES_5_TO_7
    by: str | None = None
    """Column of the report (setting, network or method) whose every value is drawn apart; None for one drawing."""
    protocol: Config = PAPER
    """What the curves change."""
    seeds: tuple[int, ...] = SEEDS
    """Training seeds if none are asked for."""
    drawn: tuple[str, ...] = ()
    """Curves that are drawn over the epochs; all if not given."""
    pairs: tuple[tuple[str, str], ...] = ()
    """Curves that are compared seed by seed, the first minus the second."""
    at_equal_loss: str | None = None
    """Metric that is also compared where the training losses are equal."""
    choice: str | None = None
    """Figure whose seeds each method's setting is chosen on, so that the methods are compared each at its best."""
    beside: tuple[str, ...] = ()
    """Curves that are compared, as they are, with every method at its best."""

    @property
    def is_study(self) -> bool:
        """Whether its protocol is not the paper's, so that no number of the paper stands beside its own."""
        return self.protocol != PAPER


# --- the tables ---------------------------------------------------------------------------------------------------

TABLES = {
    "table1": "Table 1: four kinds of label noise",
    "table2": "Table 2: Tiny-ImageNet and Mini-WebVision",
    "table3": "Table 3: architectures",
    "table4": "Table 4: SANER on variants of SAM",
    "table5": "Table 5: the radius of the perturbation",
    "table6": "Table 6: without label noise",
    "table7": "Table 7: with noise-robust companions",
}
# The paper's words -> settings. What is the protocol anyway changes nothing, so that tables share these runs.
_NOISES = {
    "symmetric": {"noise": "symmetric"},
    "asymmetric": {"noise": "asymmetric"},
    "dependent": {"noise": "instance"},
    "real": {"noise": "real"},
    "none": {"noise": "none"},
}
_MODELS = {"wrn40_2": "wrn_40_2", "wrn28_10": "wrn_28_10"}
_SETTINGS: dict[str, Mapping[str, Any]] = {
    "": {},
    "plain": {},
    "rho=0.05": {"rho": 0.05},
    "rho=0.10": {},
    "rho=0.15": {"rho": 0.15},
    "rho=0.20": {"rho": 0.2},
    "bootstrapping": {"companion": "bootstrapping"},
    "co-teaching": {"companion": "co-teaching"},
}
# Data sets with a protocol of their own. Tiny-ImageNet: the released schedule drops at 40 and 80, so apparently 100
# epochs; alpha rises over the same share of them as on CIFAR. Mini-WebVision: drops at 60 and 90 of 120 epochs, no
# ramp; its labels are noisy as they come, and which of them are wrong is not known.
_PROTOCOLS: dict[str, Mapping[str, Any]] = {
    "tiny_imagenet": {"epochs": 100, "learning_rate_drops": (0.4, 0.8)},
    "mini_webvision": {"epochs": 120, "alpha_ramp": 0.0, "noise": "none", "model": "resnet18_imagenet"},
}
# Batches whose gradients are analysed after every epoch of the runs that Figure 2 and the ablations look into.
ANALYSED_BATCHES = 8
CIRCUMSTANCES = Circumstances(analyse_batches=ANALYSED_BATCHES)
TRAINING_IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "tiny_imagenet": 100_000}


@functools.cache
def published() -> dict[str, tuple[Cell, ...]]:
    """Return the cells of every table, in the paper's order."""
    tables: dict[str, list[Cell]] = {name: [] for name in TABLES}
    with PUBLISHED.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(line for line in file if not line.startswith("#")):
            settings = {
                "dataset": row["dataset"],
                **_NOISES[row["noise"]],
                "model": _MODELS.get(row["model"], row["model"]),
                "method": row["method"],
                **_SETTINGS[row["setting"]],
                **_PROTOCOLS.get(row["dataset"], {}),
            }
            # Where there is no rate to speak of, Config's own stands unused.
            if row["rate_percent"] not in ("", "0"):
                settings["rate"] = float(row["rate_percent"]) / 100
            number = Published(float(row["test_accuracy_percent"]), float(row["std"]) if row["std"] else None)
            tables[f"table{row['table']}"].append(Cell(_configuration(settings), row["setting"], number))
    return {name: tuple(cells) for name, cells in tables.items()}


def _configuration(settings: Mapping[str, Any], protocol: Config = PAPER) -> Config:
    config = replace(protocol, **settings)
    # The analysis belongs to the run, whichever preset it is first made for, so that all of them can share it.
    settings = flat(config)
    varied = {name: settings[name] for name in ("dataset", "rate", "method", "alpha")}
    analysed = config == replace(PAPER, **varied) and config.optimizer.method.startswith(("sgd", "sam", "saner"))
    return replace(config, analyse_batches=ANALYSED_BATCHES if analysed else 0)


# --- the figures --------------------------------------------------------------------------------------------------

_THREE = (Curve("sgd"), Curve("sam"), Curve("saner"))


def _each(curves: Iterable[Curve], setting: str, settings: Mapping[str, Any], share: float | None = None) -> Any:
    return tuple(curve._replace(setting=setting, settings=settings, share=share) for curve in curves)


_WIDTHS = tuple(
    curve
    for width in (1.0, 1.5, 2.0)
    for curve in _each(_THREE, f"width {width:g}", {} if width == 1 else {"width": width})
)
_SUBSETS = tuple(
    curve for share in (0.1, 0.25, 0.5) for curve in _each(_THREE, f"{100 * share:g} % of images", {}, share)
)
# Where this project's record of the paper does not say on which data or rate a figure stands (3, 5, 6 and 7), it is one
# whose runs other presets share; --dataset and --rates draw it on others.
FIGURES = {
    "figure1": Figure("Figure 1: memorization and test accuracy", _THREE, (0.25,), panels=plots.FIGURE_1),
    "figure2": Figure(
        "Figure 2: what SAM down-weights, and SGD-D, which undoes it",
        (Curve("sgd"), Curve("sam"), Curve("sgd_d")),
        (0.25, 0.5),
        panels=plots.FIGURE_2,
    ),
    "figure3": Figure(
        "Figure 3: alpha from magnifying to down-weighting",
        (
            Curve("saner", "alpha=-0.5", {"alpha": -0.5}),
            Curve("saner", "alpha=-0.25", {"alpha": -0.25}),
            Curve("sam", "alpha=0"),
            Curve("saner", "alpha=0.25", {"alpha": 0.25}),
            Curve("saner", "alpha=0.5"),
        ),
        (0.25,),
        panels=plots.FIGURE_3,
    ),
    "figure4": Figure("Figure 4: wider networks (a) and fewer images (b)", (*_WIDTHS, *_SUBSETS), (0.5,), by="setting"),
    "figure5": Figure(
        "Figure 5: variants of SAM, with and without SANER",
        tuple(
            curve
            for base in ("asam", "gsam", "fsam", "vasso")
            for curve in _each((Curve(base), Curve(f"{base}+saner")), f"on {base.upper()}", {})
        ),
        (0.25,),
        by="setting",
    ),
    "figure6": Figure("Figure 6: widths", _WIDTHS, (0.5,), by="setting"),
    "figure7": Figure(
        "Figure 7: architectures",
        tuple(
            curve._replace(settings={"model": model})
            for model in ("resnet34", "densenet121", "wrn_40_2", "wrn_28_10")
            for curve in _THREE
        ),
        (0.25,),
        dataset="cifar100",
        by="network",
    ),
    "ablations": Figure(
        "Ablations (not in the paper): which elements, and as many at random",
        (
            *(Curve(name) for name in ("sam", "saner", "sgd_d")),
            *(Curve(f"saner_{name}") for name in ("turned", "grown", "last_layer", "random")),
            Curve("saner", "alpha=-0.5", {"alpha": -0.5}),
        ),
        (0.5,),
    ),
    "headline": Figure(
        "Headline numbers: symmetric 50 % and the human labels of CIFAR-10N",
        # In the order in which they are worth their time.
        tuple(
            curve
            for setting, settings in (("", {}), ("CIFAR-10N", {"noise": "real"}))
            for curve in _each(_THREE[::-1], setting, settings)
        ),
        (0.5,),
        by="setting",
    ),
}

# --- studies: what the paper leaves open, with enough seeds to answer it ---------------------------------------------

# On handwritten digits, where a run takes seconds; a tenth of the noisy training set is held out to choose an epoch by.
_STUDY = replace(DIGITS, holdout=0.1)
# CIFAR-10 where a perceptron memorizes in the middle of the run, whatever the method: found on seeds 100 and 101, with
# one protocol for all methods (the search stands in RESULTS.md).
_MEMORIZING = replace(
    DIGITS, dataset="cifar10", augment=False, subset=6000, holdout=0.1, width=0.5, rate=0.4, rho=0.15, epochs=40
)
_CONTROLS = ("saner_random", "saner_norm", "saner_grown", "saner_turned", "saner_last_layer", "sgd_d")
_VARIANTS = ("gsam", "fsam", "vasso", "asam")
_EVERY = (2, 5, 10)
_WITH_RADII = ("sam", "saner", "saner_random")


def _radii(radii: Iterable[float]) -> tuple[Curve, ...]:
    return tuple(Curve(method, f"rho={rho:g}", {"rho": rho}) for rho in radii for method in _WITH_RADII)


FIGURES |= {
    "elements": Figure(
        "Elements: is it the choice of what is down-weighted?",
        (
            *_THREE,
            *map(Curve, _CONTROLS),
            *(Curve("saner", f"alpha={alpha:g}", {"alpha": alpha}) for alpha in (0.25, 0.75, 1.0, -0.5)),
            # ASAM's radius is of another kind: its own usual one.
            *(
                Curve(f"{name}{on}", "", {"rho": None} if name == "asam" else {})
                for name in _VARIANTS
                for on in ("", "+saner")
            ),
            *_radii((0.2, 0.8)),
        ),
        (0.5,),
        dataset="digits",
        panels=("noisy_accuracy", "test_accuracy"),
        protocol=_STUDY,
        seeds=tuple(range(200, 220)),
        drawn=("sgd", "sam", "saner", "saner_random", "saner_norm", "saner_grown"),
        pairs=(
            *(("saner", name) for name in ("sgd", "sam", *_CONTROLS)),
            *((f"saner alpha={alpha:g}", "sam") for alpha in (-0.5, 0.25, 0.75, 1.0)),
            *((f"{name}+saner", name) for name in _VARIANTS),
            *((f"saner rho={rho:g}", f"{name} rho={rho:g}") for rho in (0.2, 0.8) for name in ("sam", "saner_random")),
        ),
        choice="radii",
    ),
    # Decided before it is run: a second gradient every fifth step holds here if, at otherwise equal settings, the 95 %
    # interval of "saner every=5 minus saner" in test accuracy at the last epoch stays above -0.5 points, and a step
    # takes at most 1.3 of the wall time of SGD's and 0.65 of SANER's (benchmarks.train_step). A stale direction may
    # act as a larger radius: so it stands beside SAM and SANER at their best one as well.
    "every": Figure(
        "Every k-th step: is a second gradient needed in each of them?",
        (
            *_THREE,
            *(Curve(name, f"every={k}", {"every": k}) for k in _EVERY for name in ("sam", "saner")),
        ),
        (0.5,),
        dataset="digits",
        panels=("noisy_accuracy", "test_accuracy"),
        protocol=_STUDY,
        seeds=tuple(range(200, 220)),
        drawn=("sgd", "sam", "saner", "sam every=5", "saner every=5"),
        pairs=(
            *((f"{name} every={k}", name) for name in ("saner", "sam") for k in _EVERY),
            *((f"saner every={k}", f"sam every={k}") for k in _EVERY),
            ("saner every=5", "sam"),
            ("saner every=5", "sgd"),
        ),
        choice="radii",
        beside=("saner every=5",),
    ),
    "radii": Figure(
        "Radii: the best one of each method, chosen on seeds of their own",
        _radii((0.1, 0.2, 0.4, 0.6, 0.8, 1.2, 1.6)),
        (0.5,),
        dataset="digits",
        protocol=_STUDY,
        # Nothing else is reported on these.
        seeds=tuple(range(100, 105)),
        by="method",
    ),
    "memorization": Figure(
        "Memorization: a perceptron on 6,000 images of CIFAR-10",
        # At the larger radius no method memorizes, and there is nothing that SANER could prevent.
        (*_THREE, Curve("saner_random"), *_radii((0.2,))),
        (0.4,),
        dataset="cifar10",
        panels=("noisy_accuracy", "clean_accuracy", "test_accuracy"),
        protocol=_MEMORIZING,
        seeds=tuple(range(300, 308)),
        drawn=("sgd", "sam", "saner", "saner_random"),
        pairs=(
            *(("saner", name) for name in ("sgd", "sam", "saner_random")),
            *(("saner rho=0.2", f"{name} rho=0.2") for name in ("sam", "saner_random")),
        ),
    ),
    "sharpness": Figure(
        "Sharpness: how sharp the minima are at equal training loss",
        _THREE,
        (0.5,),
        dataset="digits",
        panels=("sharpness", "train_loss", "noisy_accuracy"),
        protocol=DIGITS,
        seeds=tuple(range(200, 210)),
        pairs=(("sam", "sgd"), ("saner", "sgd"), ("saner", "sam")),
        at_equal_loss="sharpness",
    ),
}
NAMES = (*TABLES, *FIGURES)


def title(name: str) -> str:
    """Return the title of a preset."""
    return TABLES[name] if name in TABLES else FIGURES[name].title


# --- what a command asks of a preset ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which part of a preset; all of it by default."""

    dataset: tuple[str, ...] = ()
    """Only these data sets of a table; a figure is drawn on these instead of the paper's."""
    noises: tuple[str, ...] = ()
    """Only these kinds of label noise."""
    rates: tuple[float, ...] = ()
    """Only these noise rates of a table, in [0, 1]; a figure is drawn at these instead of the paper's."""
    models: tuple[str, ...] = ()
    """Only these networks."""
    methods: tuple[str, ...] = ()
    """Only these methods."""
    settings: tuple[str, ...] = ()
    """Only these settings, such as rho=0.05 of table5 or co-teaching of table7."""
    seeds: tuple[int, ...] = ()
    """Training seeds, each with a noise draw of its own; those of the preset if not given (0 1 2 for the paper's)."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """What is changed of the paper's protocol in every run, for a small machine; the report's title says it."""

    epochs: int | None = None
    """Epochs of every run; alpha's ramp and the learning rate's drops keep their shares of them."""
    model: str | None = None
    """Network of every run, instead of the paper's."""
    width: float | None = None
    """Factor on the number of channels of every run's network."""
    subset: int | None = None
    """Number of training images, class-stratified; shares of the training set are shares of these."""
    test_subset: int | None = None
    """Number of test images, class-stratified."""
    augment: bool = True
    """Random crop and flip."""
    precision: str | None = None
    """Compute precision instead of float32: tf32 or bfloat16."""


class _Change(NamedTuple):
    """What one option of a scale does to a configuration, and how a title says it."""

    settings: Callable[[Config, Any], Mapping[str, Any]]
    words: Callable[[Any], str]


_CHANGES = {
    "epochs": _Change(lambda config, value: {"epochs": value}, lambda value: f"{value} epochs"),
    "model": _Change(lambda config, value: {"model": value}, str),
    "width": _Change(
        lambda config, value: {"width": config.network.width * value}, lambda value: f"width times {value:g}"
    ),
    "subset": _Change(lambda config, value: {"subset": value}, lambda value: f"{value:,} training images"),
    "test_subset": _Change(lambda config, value: {"test_subset": value}, lambda value: f"{value:,} test images"),
    "augment": _Change(
        # A protocol that has none is given none.
        lambda config, value: {"augment": config.data.augment and value},
        lambda value: "no augmentation",
    ),
    "precision": _Change(lambda config, value: {"precision": value}, str),
}


ALL, FULL = Selection(), Scale()


def cells(name: str, selection: Selection = ALL, scale: Scale = FULL) -> list[Cell]:
    """Return the cells of a preset, or of the part of it that is selected, at a scale."""
    found = [dataclasses.replace(cell, config=_scaled(cell, scale)) for cell in _selected(name, selection)]
    seen: dict[Config, Cell] = {}
    for cell in found:
        if seen.setdefault(cell.config, cell) is not cell:
            raise UserError(
                f"at this scale several cells of {name} are one run ({run_name(cell.config)}): leave out --model, or "
                "choose a part of the preset with --models."
            )
    return found


def seeds(name: str, selection: Selection = ALL) -> tuple[int, ...]:
    """Return the training seeds that are asked for, or else those of the preset."""
    return selection.seeds or (FIGURES[name].seeds if name in FIGURES else SEEDS)


def described(name: str, selection: Selection = ALL, scale: Scale = FULL) -> str:
    """Return the title of a preset, with all that its runs change of the paper's protocol."""
    words = changes(name, selection, scale)
    return title(name) + (f" (shrunken: {', '.join(words)})" if words else "")


def changes(name: str, selection: Selection = ALL, scale: Scale = FULL) -> list[str]:
    """Say what a scale changes of the paper's protocol; an option that says what the paper does changes nothing."""
    full = [cell.config for cell in _selected(name, selection)]
    return [
        change.words(getattr(scale, option))
        for option, change in _CHANGES.items()
        if any(_changed(config, scale, (option,)) != config for config in full)
    ]


def _selected(name: str, selection: Selection) -> list[Cell]:
    # At the paper's scale.
    if name in TABLES:
        found = list(published()[name])
        found = _only(found, "--dataset", selection.dataset, lambda cell: cell.config.data.dataset)
        found = _only(found, "--rates", selection.rates, _rate)
    elif name in FIGURES:
        found = _curves(FIGURES[name], selection.dataset, selection.rates)
    else:
        raise unknown_name("preset", name, NAMES)
    found = _only(found, "--noises", selection.noises, lambda cell: cell.config.labels.noise)
    found = _only(found, "--models", selection.models, lambda cell: cell.config.network.model)
    found = _only(found, "--methods", selection.methods, lambda cell: cell.config.optimizer.method)
    found = _only(found, "--settings", selection.settings, lambda cell: cell.setting)
    if not found:
        raise UserError(f"no cell of {name} fits all of the options: leave out some.")
    return found


def _curves(figure: Figure, datasets: Sequence[str], rates: Sequence[float]) -> list[Cell]:
    known = {cell.config: cell.published for table in published().values() for cell in table}
    found = []
    for dataset, rate, curve in itertools.product(datasets or (figure.dataset,), rates or figure.rates, figure.curves):
        settings = {"dataset": dataset, "rate": rate, "method": curve.method, **curve.settings}
        if settings.get("noise") in ("none", "real"):
            del settings["rate"]
        config = _configuration({**settings, **_PROTOCOLS.get(dataset, {})}, figure.protocol)
        number = known.get(config) if curve.share is None else None
        found.append(Cell(config, curve.setting, number, curve.share))
    # What has no rate is one cell at all of them.
    return list(dict.fromkeys(found))


def choices(name: str, scale: Scale = FULL) -> list[Cell]:
    """Return the cells among which the methods of a figure have their setting chosen; none if nothing is chosen."""
    figure = FIGURES.get(name)
    if figure is None or figure.choice is None:
        return []
    methods = {curve.method for curve in figure.curves}
    return [cell for cell in cells(figure.choice, ALL, scale) if cell.config.optimizer.method in methods]


def _rate(cell: Cell) -> float | None:
    return None if cell.config.labels.noise in ("none", "real") else cell.config.labels.rate


def _only(found: list[Cell], option: str, wanted: Sequence[Any], value: Callable[[Cell], Any]) -> list[Cell]:
    known = list(dict.fromkeys(str(value(cell)) for cell in found if value(cell) not in (None, "")))
    for one in wanted:
        if str(one) not in known:
            raise unknown_name(f"value of {option}", str(one), known)
    return [cell for cell in found if not wanted or value(cell) in wanted]


def _scaled(cell: Cell, scale: Scale) -> Config:
    config = _changed(cell.config, scale)
    if cell.share is None:
        return config
    images = scale.subset or TRAINING_IMAGES.get(config.data.dataset)
    if images is None:
        raise UserError(
            f"shares of the training set of {config.data.dataset!r} need --subset, the number of its images."
        )
    return replace(config, subset=round(cell.share * images), analyse_batches=0)


def _changed(config: Config, scale: Scale, options: Iterable[str] = _CHANGES) -> Config:
    for option in options:
        if (value := getattr(scale, option)) is not None:
            config = replace(config, **_CHANGES[option].settings(config, value))
    return config
