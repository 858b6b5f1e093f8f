"""Numbers over seeds, and tables of them as Markdown."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Spread = dict[str, float]
"""`mean` and, of two values or more, `std` (n - 1)."""


def spread(values: Sequence[float]) -> Spread:
    """Return mean and standard deviation (n - 1; absent for one value)."""
    return {"mean": statistics.fmean(values)} | ({"std": statistics.stdev(values)} if len(values) > 1 else {})


def spreads(runs: Sequence[Mapping[str, Any]], names: Iterable[str]) -> dict[str, Spread]:
    """Return the spread over runs of every number that runs have."""
    values = {name: [one[name] for one in runs if name in one] for name in names}
    return {name: spread(found) for name, found in values.items() if found}


class Difference(NamedTuple):
    """A mean of differences that are paired by seed, with its 95 % interval; no interval for one pair."""

    mean: float
    low: float | None
    high: float | None
    pairs: int


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Return how far two numbers are apart over the seeds that have both, by Student's t; None where none has.

    >>> paired({0: 0.5, 1: 0.7, 2: 0.6}, {0: 0.4, 1: 0.4, 2: 0.4, 3: 0.9})
    Difference(mean=0.2, low=-0.048, high=0.448, pairs=3)
    """
    from scipy import stats

    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    between = [ours[seed] - theirs[seed] for seed in seeds]
    mean = statistics.fmean(between)
    if len(seeds) == 1:
        return Difference(mean, None, None, 1)
    half = float(stats.t.ppf(0.975, len(seeds) - 1)) * statistics.stdev(between) / math.sqrt(len(seeds))
    return Difference(mean, mean - half, mean + half, len(seeds))


def points(value: Difference | None, digits: int = 1) -> str:
    """Return a difference of fractions in points with its interval; nothing where there is none."""
    return interval(value, f"+.{digits}f", scale=100)


def interval(value: Difference | None, form: str, scale: float = 1) -> str:
    """Return a difference with its interval in a number format; nothing where there is none."""
    if value is None:
        return ""
    ends = "" if value.low is None else f" ({scale * value.low:{form}} to {scale * value.high:{form}})"
    return f"{scale * value.mean:{form}}{ends}"


def percent(value: Mapping[str, float] | None, digits: int = 1) -> str:
    """Return a mean and its spread in percent; nothing where there is none."""
    if value is None:
        return ""
    return number({name: 100 * x for name, x in value.items()}, f".{digits}f")


def number(value: Mapping[str, float], form: str, form_of_std: str | None = None) -> str:
    """Return a mean and its spread, each in a number format."""
    return f"{value['mean']:{form}}" + (f" ± {value['std']:{form_of_std or form}}" if "std" in value else "")


def markdown(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    head, *rows = ("| " + " | ".join(line) + " |" for line in (header, *body))
    return "\n".join([head, "|---" * len(header) + "|", *rows]) + "\n"
