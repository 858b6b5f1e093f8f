"""Figures of runs and of label noise, readable in print, in grey and by the colour-blind.

Matplotlib is imported where it is used, and only through its `Figure` objects: no global state, no display, no backend
to choose. A figure can be looked at before it is saved (`curves_figure`, `transition_figure`), and a saved file is
complete or absent.
"""

import functools
import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import UserError
from ..files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The panels of the paper's figures.
FIGURE_1 = ("noisy_accuracy", "gap", "test_accuracy")
FIGURE_2 = ("downweighted_share", "alignment_noisy", "noisy_accuracy", "clean_accuracy")
FIGURE_3 = ("noisy_accuracy", "true_accuracy_on_noisy")
FIGURES_5_TO_7 = ("noisy_accuracy", "gap", "test_accuracy", "generalization_gap")
# The alignment of figure 2 beside its controls, as one cosine and, in the second row, as the mean over tensors.
ALIGNMENT = tuple(
    f"alignment_{of}{suffix}" for suffix in ("", "_per_tensor") for of in ("noisy", "random", "clean", "random_clean")
)
SHARES = ("turned_share", "downweighted_share", "grown_share", "running_downweighted_share", "running_cosine")


class Axis(NamedTuple):
    """How a metric is named and scaled."""

    title: str
    label: str
    percent: bool = False


Line = tuple[np.ndarray, np.ndarray, np.ndarray | None]
"""A metric over epochs: the epochs, its mean over seeds, and its standard deviation; none of one seed."""
Runs = Sequence[Sequence[Mapping[str, Any]]] | Mapping[str, Line]
"""Runs of several seeds, each one mapping of metrics an epoch; or the lines by metric that they were reduced to."""

# A title says what is plotted, a label on which samples, against which labels, in which unit.
_AXES = {
    "noisy_accuracy": Axis("Noisy accuracy", "relabelled training\nsamples, given labels (%)", percent=True),
    "clean_accuracy": Axis("Clean accuracy", "untouched training samples (%)", percent=True),
    "gap": Axis("Gap", "clean minus noisy\naccuracy (points)", percent=True),
    "true_accuracy_on_noisy": Axis(
        "True accuracy on noisy", "relabelled training\nsamples, true labels (%)", percent=True
    ),
    "train_accuracy": Axis("Training accuracy", "all training samples,\ngiven labels (%)", percent=True),
    "test_accuracy": Axis("Test accuracy", "test samples (%)", percent=True),
    "heldout_accuracy": Axis("Held-out accuracy", "held-out training samples,\ngiven labels (%)", percent=True),
    "running_accuracy": Axis("Running accuracy", "training mode,\ngiven labels (%)", percent=True),
    "generalization_gap": Axis("Generalization gap", "training minus test\naccuracy (points)", percent=True),
    "train_loss": Axis("Training loss", "all training samples,\ngiven labels"),
    "test_loss": Axis("Test loss", "test samples"),
    "running_loss": Axis("Running loss", "training mode, given labels"),
    "turned_share": Axis("Turned share", "elements with h/g < 0 (%)", percent=True),
    "downweighted_share": Axis("Down-weighted share", "elements with 0 < h/g < 1 (%)", percent=True),
    "grown_share": Axis("Grown share", "elements with h/g > 1 (%)", percent=True),
    **{
        f"alignment_{of}{suffix}": Axis(title + where, f"cosine of {part} g with\nthe gradient of {samples} samples")
        for of, title, part, samples in (
            ("noisy", "Alignment with noisy", "down-weighted", "noisy"),
            ("clean", "Alignment with clean", "down-weighted", "clean"),
            ("random", "Random set with noisy", "random part of", "noisy"),
            ("random_clean", "Random set with clean", "random part of", "clean"),
        )
        for suffix, where in (("", ""), ("_per_tensor", ", by tensor"))
    },
    # Of the gradients that a method with two passes took itself, by its own mask, as means over the epoch's steps.
    "running_downweighted_share": Axis("Down-weighted, in steps", "elements of the method's mask (%)", percent=True),
    "running_cosine": Axis("Cosine of g and h", "gradients at w and w + eps"),
    "running_gradient_norm": Axis("Gradient norm", "at w"),
    "running_perturbed_gradient_norm": Axis("Perturbed gradient norm", "at w + eps"),
    "running_perturbation_norm": Axis("Perturbation norm", "norm of eps"),
    "sharpness": Axis("Sharpness", "largest eigenvalue of the\ntraining loss's Hessian"),
    "learning_rate": Axis("Learning rate", "learning rate"),
    "alpha": Axis("Alpha", "alpha"),
    "rho": Axis("Rho", "rho"),
}

# Okabe and Ito's colours in an order of falling contrast with white, without yellow, which vanishes in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#E69F00", "#56B4E9")
# Line styles repeat after five, colours after seven: thirty-five lines before two are alike.
_STYLES = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (9, 2)))

_FONT = 9
_FEW_POINTS = 12
# Images on one contact sheet: more of them are several sheets, each drawn in seconds and readable as a whole.
SHEET = 200


def axis_of(metric: str) -> Axis:
    """Return how a metric is named and scaled, known or not."""
    words = metric.replace("_", " ")
    return _AXES.get(metric, Axis(words.capitalize(), words))


def curves(
    runs: Mapping[str, Runs],
    path: str | Path,
    panels: Sequence[str] = FIGURE_1,
    title: str | None = None,
) -> None:
    """Draw metrics over epochs, the mean over seeds with a band of one standard deviation, into a PNG or PDF file.

    Args:
        runs: For every label the runs of its seeds; a run is one mapping of metrics an epoch, with `epoch` in each.
            What only the lines are left of is given as these.
        path: A file name that ends in .png (200 dpi) or .pdf.
        panels: One metric a panel. A panel that no run has the metric of is left out.
        title: Of the whole figure.

    Raises:
        ValueError: No run has any of the metrics, or the file's ending is another.
    """
    save(curves_figure(runs, panels, title), path)


def curves_figure(
    runs: Mapping[str, Runs],
    panels: Sequence[str] = FIGURE_1,
    title: str | None = None,
) -> "Figure":
    """Return the figure that `curves` saves."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    lines = {panel: {label: line(seeds, panel) for label, seeds in runs.items()} for panel in panels}
    lines = {
        panel: {label: line for label, line in by_label.items() if line is not None}
        for panel, by_label in lines.items()
    }
    lines = {panel: by_label for panel, by_label in lines.items() if by_label}
    if not lines:
        raise ValueError(f"none of the runs has any of the metrics {', '.join(panels)}: there is nothing to draw.")
    # The style belongs to the label, so that a method looks the same in every panel, whichever have it.
    styles = {
        label: (_COLOURS[index % len(_COLOURS)], _STYLES[index % len(_STYLES)]) for index, label in enumerate(runs)
    }

    columns = {1: 1, 2: 2, 4: 2, 8: 4}.get(len(lines), 3)
    rows = math.ceil(len(lines) / columns)
    # Two columns are sized for a page's width of text, so that the type keeps its size in print.
    figure = Figure(figsize=(3.3 * columns if columns > 1 else 4.6, 2.8 * rows + 0.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06, wspace=0.03, hspace=0.04)
    handles = {}
    for position, (panel, by_label) in enumerate(lines.items()):
        axes = figure.add_subplot(rows, columns, position + 1)
        axis = axis_of(panel)
        scale = 100 if axis.percent else 1
        for order, (label, (epochs, mean, deviation)) in enumerate(by_label.items()):
            colour, style = styles[label]
            (handles[label],) = axes.plot(
                epochs,
                scale * mean,
                color=colour,
                linestyle=style,
                linewidth=1.5,
                marker="o" if len(epochs) <= _FEW_POINTS else None,
                markersize=3,
                label=label,
                zorder=3 + order,
            )
            if deviation is not None:
                low, high = scale * (mean - deviation), scale * (mean + deviation)
                axes.fill_between(epochs, low, high, color=colour, alpha=0.25, linewidth=0, zorder=2)
        axes.set_title(plain(axis.title), fontsize=_FONT + 1, loc="left", fontweight="bold")
        axes.set_ylabel(plain(axis.label), fontsize=_FONT)
        axes.set_xlabel("epoch", fontsize=_FONT)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=(1, 2, 2.5, 5, 10)))
        axes.tick_params(labelsize=_FONT - 1)
        axes.grid(color="0.88", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.margins(x=0.02)
        axes.spines[["top", "right"]].set_visible(False)
    shown = [label for label in runs if label in handles]
    spread = any(line[2] is not None for by_label in lines.values() for line in by_label.values())
    legend_rows = math.ceil(len(shown) / max(2, 2 * columns))
    figure.legend(
        [handles[label] for label in shown],
        [plain(label) for label in shown],
        loc="outside lower center",
        ncols=math.ceil(len(shown) / legend_rows),
        fontsize=_FONT,
        handlelength=3.2,
        frameon=False,
        title="line: mean over seeds; band: plus and minus one standard deviation" if spread else None,
        title_fontsize=_FONT - 1,
    )
    if title:
        _head(figure, title)
    return figure


def line(seeds: Runs, metric: str) -> Line | None:
    """Return a metric of runs over the epochs; None if none has it."""
    return seeds.get(metric) if isinstance(seeds, Mapping) else _over_seeds(seeds, metric)


def _over_seeds(seeds: Sequence[Sequence[Mapping[str, Any]]], metric: str) -> Line | None:
    """Return epochs, mean and standard deviation of a metric over the seeds that have it; None if none has.

    Only epochs that all of these seeds have are kept: a mean over those that are left would jump where one run ended.
    """
    values = []
    for run in seeds:
        points = {int(row["epoch"]): row[metric] for row in run if row.get(metric) is not None}
        points = {epoch: float(value) for epoch, value in points.items() if math.isfinite(value)}
        if points:
            values.append(points)
    epochs = sorted(set(values[0]).intersection(*values[1:])) if values else []
    if not epochs:
        return None
    table = np.array([[points[epoch] for epoch in epochs] for points in values])
    deviation = table.std(axis=0, ddof=1) if len(table) > 1 else None
    return np.array(epochs), table.mean(axis=0), deviation


def layers(
    runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    path: str | Path,
    quantity: str = "downweighted",
    title: str | None = None,
) -> None:
    """Draw a quantity of every parameter over epochs as heat maps into a PNG or PDF file.

    Args:
        runs: For every label the runs of its seeds; a run is the records of its `analysis.jsonl`.
        path: A file name that ends in .png (200 dpi) or .pdf.
        quantity: turned, downweighted, grown or alignment_noisy.
        title: Of the whole figure.

    Raises:
        ValueError: No run has the quantity, or the file's ending is another.
    """
    save(layers_figure(runs, quantity, title), path)


def layers_figure(
    runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    quantity: str = "downweighted",
    title: str | None = None,
) -> "Figure":
    """Return the figure that `layers` saves: one heat map a label, the mean over its seeds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    maps = {}
    for label, seeds in runs.items():
        # The mean of each parameter by the rule of the curves: over epochs that all seeds have.
        names = dict.fromkeys(name for run in seeds for row in run for name in row["leaves"])
        of_name = {
            name: _over_seeds(
                [[{"epoch": row["epoch"]} | row["leaves"].get(name, {}) for row in run] for run in seeds], quantity
            )
            for name in names
        }
        if of_name := {name: line for name, line in of_name.items() if line is not None}:
            maps[label] = of_name
    if not maps:
        raise ValueError(f"none of the runs has {quantity} by parameter: there is nothing to draw.")
    percent = quantity != "alignment_noisy"
    scale = 100 if percent else 1
    # All rows of all maps, so that a parameter stands at one height.
    names = list(dict.fromkeys(name for of_name in maps.values() for name in of_name))
    height = max(2.6, 0.135 * len(names) + 1.2)
    figure = Figure(figsize=(2.6 + 2.9 * len(maps), height), layout="constrained")
    axes = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    values = np.concatenate([scale * line[1] for of_name in maps.values() for line in of_name.values()])
    # A share from 0, which is none; a cosine about 0, which is neither with nor against.
    top = max(np.abs(values).max(), 1e-9)
    bottom, colours = (0, "viridis") if percent else (-top, "RdBu_r")
    for panel, (label, of_name) in zip(axes, maps.items(), strict=True):
        epochs = np.unique(np.concatenate([line[0] for line in of_name.values()]))
        table = np.full((len(names), len(epochs)), np.nan)
        for name, (at, mean, _) in of_name.items():
            table[names.index(name), np.searchsorted(epochs, at)] = scale * mean
        image = panel.pcolormesh(_edges(epochs), np.arange(len(names) + 1), table, vmin=bottom, vmax=top, cmap=colours)
        panel.set_title(plain(label), fontsize=_FONT + 1, loc="left", fontweight="bold")
        panel.set_xlabel("epoch", fontsize=_FONT)
        panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        panel.tick_params(labelsize=_FONT - 1)
        panel.tick_params(axis="y", length=0, labelsize=_FONT - 2)
    axes[0].set_yticks(np.arange(len(names)) + 0.5, [plain(name) for name in names])
    axes[0].invert_yaxis()
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, aspect=30)
    bar.set_label(_LAYERS[quantity], fontsize=_FONT)
    bar.ax.tick_params(labelsize=_FONT - 1)
    if title:
        figure.suptitle(plain(title), fontsize=_FONT + 2)
    return figure


# What a colour means.
_LAYERS = {
    "turned": "elements with h/g < 0 (%)",
    "downweighted": "elements with 0 < h/g < 1 (%)",
    "grown": "elements with h/g > 1 (%)",
    "alignment_noisy": "cosine of down-weighted g with the gradient of noisy samples",
}


def _edges(epochs: np.ndarray) -> np.ndarray:
    """Return the edges of cells that have their epochs in the middle."""
    middles = (epochs[1:] + epochs[:-1]) / 2
    return np.concatenate([[epochs[0] - 0.5], middles, [epochs[-1] + 0.5]])


def transition_figure(
    transition: np.ndarray, rate_per_class: np.ndarray, class_names: Sequence[str], title: str
) -> "Figure":
    """Return a heat map of a transition matrix (rows: true classes) with the rate of wrong labels of each class."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    count = len(class_names)
    numbers = count <= 20
    inches = max(3.2, 0.42 * count) if numbers else min(0.125 * count + 2.5, 15)
    # A large figure is looked at from further away, except for the names of its many classes.
    text = _FONT if numbers else _FONT + inches / 2.5
    # No more names than there is height for.
    step = max(1, math.ceil(count * 6.5 / (72 * inches)))
    font = _FONT if numbers else min(7.0, 0.72 * 72 * inches * step / count)
    figure = Figure(figsize=(inches * 1.3 + 2.2, inches + 1.7), layout="constrained")
    heat, bars = figure.subplots(1, 2, sharey=True, width_ratios=(5.5, 1.2))
    percent = 100 * np.asarray(transition)
    top = max(percent.max(), 1e-9)
    # With many classes the wrong ones have a fraction of a percent each: the root makes them visible.
    norm = PowerNorm(1.0 if numbers else 0.5, vmin=0, vmax=top)
    image = heat.imshow(percent, cmap="Blues", norm=norm, aspect="auto", interpolation="nearest")
    ticks = range(0, count, step)
    names = [plain(shortened(class_names[index])) for index in ticks]
    heat.set_xticks(ticks, names, fontsize=font, rotation=90 if count > 6 else 0)
    heat.set_yticks(ticks, names, fontsize=font)
    heat.set_xlabel("given class", fontsize=text)
    heat.set_ylabel("true class", fontsize=text)
    heat.set_xticks(np.arange(count + 1) - 0.5, minor=True)
    heat.set_yticks(np.arange(count + 1) - 0.5, minor=True)
    heat.grid(which="minor", color="0.9" if not numbers else "white", linewidth=0.25 if not numbers else 1.0)
    heat.tick_params(which="minor", length=0)
    heat.tick_params(which="major", length=2)
    if numbers:
        for row, column in np.ndindex(count, count):
            value = percent[row, column]
            if value > 0:
                heat.text(
                    column,
                    row,
                    f"{value:.0f}" if value >= 99.95 else f"{value:.1f}",
                    ha="center",
                    va="center",
                    fontsize=_FONT - 1,
                    color="white" if value > 0.6 * top else "black",
                )
    bar = figure.colorbar(image, ax=[heat, bars], location="right", fraction=0.03, pad=0.02, aspect=40)
    bar.set_label("share of the true class (%)", fontsize=text)
    bar.ax.tick_params(labelsize=text - 1)
    rates = 100 * np.nan_to_num(rate_per_class)
    bars.barh(np.arange(count), rates, height=0.72, color="#E69F00")
    if numbers:
        for row, rate in enumerate(100 * np.asarray(rate_per_class)):
            label = "-" if math.isnan(rate) else f"{rate:.1f}"
            bars.text(0.04 * max(rates.max(), 1), row, label, va="center", fontsize=_FONT - 1)
    bars.set_xlabel("wrong\nlabels (%)", fontsize=text)
    bars.xaxis.set_major_locator(MaxNLocator(nbins=3, steps=(1, 2, 5, 10)))
    bars.set_xlim(0, max(rates.max(), 1) * 1.08)
    bars.tick_params(axis="x", labelsize=text - 1)
    bars.tick_params(axis="y", which="both", length=0, labelleft=False)
    bars.spines[["top", "right"]].set_visible(False)
    figure.suptitle(plain(title), fontsize=text + 1)
    return figure


class Dot(NamedTuple):
    """A row of a dot plot: a published and a measured number, each with its standard deviation, as far as known."""

    label: str
    published: tuple[float, float | None] | None
    measured: tuple[float, float | None] | None


def dots_figure(panels: Mapping[str, Sequence[Dot]], title: str) -> "Figure":
    """Return a dot plot of test accuracies in percent, measured beside published, with one panel a data set."""
    from matplotlib.figure import Figure

    rows = max(len(dots) for dots in panels.values())
    figure = Figure(figsize=(4.6 * len(panels), 0.27 * rows + 1.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    kinds = (
        ("published", "paper", -0.16, {"marker": "s", "color": _COLOURS[3], "markerfacecolor": "white"}),
        ("measured", "measured", 0.16, {"marker": "o", "color": _COLOURS[0]}),
    )
    handles = {}
    for axes, (name, dots) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for attribute, legend, shift, style in kinds:
            there = [(row, getattr(dot, attribute)) for row, dot in enumerate(dots) if getattr(dot, attribute)]
            if there:
                # A point without a deviation has no bar.
                handles[legend] = axes.errorbar(
                    [mean for _, (mean, _) in there],
                    [row + shift for row, _ in there],
                    xerr=[deviation or 0 for _, (_, deviation) in there],
                    linestyle="none",
                    markersize=4.5,
                    elinewidth=1.2,
                    capsize=2,
                    **style,
                )
        axes.set_yticks(range(len(dots)), [plain(dot.label) for dot in dots], fontsize=_FONT - 1)
        axes.set_ylim(len(dots) - 0.5, -0.5)
        axes.set_title(plain(name), fontsize=_FONT + 1, loc="left", fontweight="bold")
        axes.set_xlabel("test accuracy, best epoch (%)", fontsize=_FONT)
        _style_rows(axes, ticks=6)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=2,
        fontsize=_FONT,
        frameon=False,
        title="bar: plus and minus one standard deviation over seeds",
        title_fontsize=_FONT - 1,
    )
    _head(figure, title)
    return figure


class Interval(NamedTuple):
    """A row of a plot of differences: a mean with the ends of its interval, if it has one."""

    label: str
    mean: float
    low: float | None
    high: float | None


def intervals_figure(panels: Mapping[str, Sequence[Interval | None]], labels: Sequence[str], title: str) -> "Figure":
    """Return differences in points with their intervals, a row a label and a panel a quantity, about a line at 0."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 + 2.4 * len(panels), 0.25 * len(labels) + 1.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    drawn = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (name, intervals) in zip(drawn, panels.items(), strict=True):
        axes.axvline(0, color="0.6", linewidth=0.9, zorder=1)
        for row, interval in enumerate(intervals):
            if interval is None:
                continue
            ends = None if interval.low is None else [[interval.mean - interval.low], [interval.high - interval.mean]]
            # What the interval leaves on one side of 0 is filled.
            decided = interval.low is not None and (interval.low > 0 or interval.high < 0)
            style = {"color": _COLOURS[0], "markerfacecolor": _COLOURS[0] if decided else "white"}
            axes.errorbar(interval.mean, row, xerr=ends, fmt="o", markersize=4.5, elinewidth=1.2, capsize=2, **style)
        axes.set_title(plain(name), fontsize=_FONT, loc="left", fontweight="bold")
        axes.set_xlabel("difference (points)", fontsize=_FONT - 1)
        _style_rows(axes, ticks=5)
    drawn[0].set_yticks(range(len(labels)), [plain(label) for label in labels], fontsize=_FONT - 1)
    drawn[0].set_ylim(len(labels) - 0.5, -0.5)
    _head(figure, title)
    return figure


def _style_rows(axes: "Axes", ticks: int) -> None:
    """Style axes whose rows are labelled and whose x axis has values."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=ticks, steps=(1, 2, 2.5, 5, 10)))
    axes.tick_params(axis="x", labelsize=_FONT - 1)
    axes.tick_params(axis="y", length=0)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def contact_sheets(images: Sequence[np.ndarray], captions: Sequence[str], title: str, path: str | Path) -> list[Path]:
    """Save sheets of at most `SHEET` images as PATH, PATH with -2 before its ending, and so on; return their paths."""
    first = Path(path)
    paths = []
    for number, start in enumerate(range(0, len(images), SHEET), start=1):
        part = slice(start, start + SHEET)
        paths.append(first if number == 1 else first.with_stem(f"{first.stem}-{number}"))
        save(contact_sheet_figure(images[part], captions[part], title), paths[-1])
    return paths


def contact_sheet_figure(images: Sequence[np.ndarray], captions: Sequence[str], title: str) -> "Figure":
    """Return a grid of images, uint8 (H, W, 1) or (H, W, 3) each, row by row, with a caption under each.

    Raises:
        UserError: There are more images than one sheet holds; `contact_sheets` makes several.
    """
    from matplotlib.figure import Figure

    if len(images) > SHEET:
        raise UserError(f"{len(images):,} images are too many for one sheet: choose {SHEET} at most.")
    columns = min(8, len(images))
    rows = math.ceil(len(images) / columns)
    width, height, head = max(1.3 * columns, 3.3), 1.65 * rows + 0.5, 0.5
    figure = Figure(figsize=(width, height))
    # Placed by hand: a layout that is solved for takes a time that grows with the square of the images.
    for cell in range(rows * columns):
        row, column = divmod(cell, columns)
        left, bottom = (column + 0.03) / columns, 1 - (head + 1.65 * row + 1.22) / height
        axes = figure.add_axes((left, bottom, 0.94 / columns, 1.22 / height))
        axes.set_axis_off()
        if cell >= len(images):
            continue
        image = images[cell]
        grey = image.shape[-1] == 1
        # The smoothing of a photograph would blur a digit of 8 by 8 pixels beyond recognition.
        smooth = "nearest" if min(image.shape[:2]) < 100 else "antialiased"
        axes.imshow(image[..., 0] if grey else image, cmap="gray", vmin=0, vmax=255, interpolation=smooth)
        below = {"transform": axes.transAxes, "ha": "center", "va": "top", "parse_math": False}
        axes.text(0.5, -0.04, captions[cell], fontsize=_FONT - 2, **below)
    lines = textwrap.wrap(title, width=max(38, 16 * columns))
    figure.suptitle(plain("\n".join(lines)), fontsize=_FONT + 1, y=1 - 0.12 / height, va="top")
    return figure


def plain(text: str) -> str:
    """Return text as matplotlib has to be given it, so that it shows what a name says.

    Dollar signs in pairs would make a formula, and what no encoding can write would end the drawing.
    """
    return text.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")


def _head(figure: "Figure", title: str) -> None:
    # Broken where the figure ends: a letter of this size is about an eleventh of an inch wide.
    lines = [textwrap.fill(line, int(11 * figure.get_figwidth())) for line in title.splitlines()]
    figure.suptitle(plain("\n".join(lines)), fontsize=_FONT + 2)


def shortened(name: str, most: int = 22) -> str:
    """Return a name cut to a number of characters."""
    return name if len(name) <= most else name[: most - 2] + "…"


def save(figure: "Figure", path: str | Path) -> None:
    """Write a figure as PNG (200 dpi) or PDF, by the ending of the path; the file is complete or as it was."""
    import matplotlib

    path = Path(path)
    kind = path.suffix[1:].lower()
    if kind not in ("png", "pdf"):
        raise ValueError(f"{path.name} ends neither in .png nor in .pdf.")
    if letters := _choose_fonts(figure):
        _say_what_no_font_has(letters)
    # Type 42 keeps the text of a PDF as text, which journals ask for; no date, so that equal figures are equal files.
    metadata = {"CreationDate": None} if kind == "pdf" else None
    with replacing(path) as temporary, matplotlib.rc_context({"pdf.fonttype": 42}), warnings.catch_warnings():
        # Said once above, and not once a letter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(temporary, format=kind, dpi=200, metadata=metadata)


# Fonts of matplotlib whose letters stand in places of their own.
_SYMBOL_FONTS = ("cm", "STIXNonUnicode", "STIXSize", "Last Resort")


def _choose_fonts(figure: "Figure") -> str:
    """Let texts fall back on installed fonts where matplotlib's own lacks letters; return those that no font has."""
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.text import Text

    texts = [text for text in figure.findobj(Text) if not text.get_text().isascii()]
    missing = {ord(letter) for text in texts for letter in text.get_text() if letter.isprintable()}
    missing -= _letters(font_manager.findfont(font_manager.FontProperties()))
    if not missing:
        return ""
    covers = {name: missing & _letters(path) for name, path in _installed_fonts().items()}
    families = []
    # First the font that has most, so that the letters of one name come from one font.
    while missing and covers and (best := max(covers, key=lambda name: len(covers[name] & missing))):
        if not covers[best] & missing:
            break
        families.append(best)
        missing -= covers.pop(best)
    for text in texts:
        text.set_fontfamily([*matplotlib.rcParams["font.family"], *families])
    return "".join(map(chr, sorted(missing)))


@functools.cache
def _installed_fonts() -> dict[str, str]:
    """Return the files of the upright fonts by family, each in the weight that is nearest to the normal one."""
    from matplotlib import font_manager

    manager = font_manager.fontManager
    known = {entry.fname for entry in manager.ttflist}
    # Matplotlib keeps a list from its first start, which lacks a font that was installed because of the note below.
    for path in set(font_manager.findSystemFonts()) - known:
        try:
            manager.addfont(path)
        # A font that FreeType cannot open is no font.
        except Exception:
            continue
    fonts: dict[str, str] = {}
    for entry in sorted(manager.ttflist, key=lambda entry: abs(int(entry.weight) - 400)):
        if entry.style == "normal" and not entry.name.startswith(_SYMBOL_FONTS):
            fonts.setdefault(entry.name, entry.fname)
    return fonts


@functools.cache
def _letters(path: str) -> frozenset[int]:
    """Return the code points that a font file has; none where it cannot be drawn at any size."""
    from matplotlib.font_manager import get_font

    try:
        font = get_font(path)
        return frozenset(font.get_charmap()) if font.scalable else frozenset()
    # A font that FreeType cannot open is no font.
    except Exception:
        return frozenset()


@functools.cache
def _say_what_no_font_has(letters: str) -> None:
    # Cached, so that a figure that is drawn after every epoch says it once.
    warnings.warn(
        f"no installed font has {len(letters)} of the letters in names ({letters[:10]}), they are drawn as boxes: "
        "install one that has them, such as Noto Sans CJK",
        stacklevel=3,
    )
