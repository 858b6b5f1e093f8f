"""A metric at equal training loss: methods are compared where their networks fit the given labels equally well.

At its last epoch a run that fits every label has hardly a loss left, and with the loss of the cross-entropy its Hessian
vanishes, whatever the method. So a metric is read where the training loss first falls to a level, by a straight line
between the two evaluations about it, at levels that all runs pass.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..measures import plots, tables
from .study import Sample

LEVELS = 5
History = Sequence[Mapping[str, Any]]


def report(samples: Sequence[Sample], pairs: Iterable[tuple[Sample, Sample]], metric: str) -> list[str]:
    """Return the parts of a report: the metric of every cell at each level, and the differences of pairs by seed."""
    curves = {sample.key: {run.seed: _evaluated(run.history, metric) for run in sample.runs} for sample in samples}
    runs = [curve for of_cell in curves.values() for curve in of_cell.values()]
    if not runs or not all(len(curve) > 1 for curve in runs):
        return [f"Nothing is compared at equal training loss: not every run has measured {metric.replace('_', ' ')}."]
    passed = levels(runs)
    if not passed:
        return ["Nothing is compared at equal training loss: there is none that all runs pass."]
    at = {
        key: [{seed: at_loss(curve, level) for seed, curve in of_cell.items()} for level in passed]
        for key, of_cell in curves.items()
        if of_cell
    }
    header = [f"loss {level:.3g}" for level in passed]
    body = [
        [sample.label, str(len(sample.runs)), *(_number(list(values.values())) for values in at[sample.key])]
        for sample in samples
        if sample.key in at
    ]
    title = plots.axis_of(metric).title
    parts = [
        f"{title} where the training loss first falls to a level, mean ± standard deviation over seeds:",
        tables.markdown(["method", "n", *header], body),
    ]
    differences = [
        [
            f"{one.label} minus {other.label}",
            *(tables.interval(tables.paired(*pair), "+.3g") for pair in zip(at[one.key], at[other.key], strict=True)),
        ]
        for one, other in pairs
        if one.key in at and other.key in at
    ]
    if differences:
        parts += [
            "Differences, paired by seed, with 95 % intervals:",
            tables.markdown(["difference", *header], differences),
        ]
    return parts


def levels(curves: Iterable[Sequence[tuple[float, float]]]) -> list[float]:
    """Return losses between those that all runs begin above and those that all of them reach, from high to low."""
    curves = list(curves)
    high = min(curve[0][0] for curve in curves)
    low = max(min(loss for loss, _ in curve) for curve in curves)
    # The ends themselves are the first evaluation of one run and the lowest loss of another.
    return [high + (low - high) * (i + 1) / (LEVELS + 1) for i in range(LEVELS)] if low < high else []


def at_loss(curve: Sequence[tuple[float, float]], level: float) -> float:
    """Return the metric where the loss first falls to a level that the curve passes; pairs are (loss, metric)."""
    after = next(i for i, (loss, _) in enumerate(curve) if loss <= level)
    (loss, value), (next_loss, next_value) = curve[after - 1], curve[after]
    return value + (next_value - value) * (loss - level) / (loss - next_loss)


def _evaluated(history: History, metric: str) -> list[tuple[float, float]]:
    return [(record["train_loss"], record[metric]) for record in history if metric in record]


def _number(values: Sequence[float]) -> str:
    return tables.number(tables.spread(values), ".3g", ".2g")
