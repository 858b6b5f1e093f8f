"""Numbers over seeds, and tables of them as Markdown."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Spread = dict[str, float]
"""`mean` and, of two values or more, `std` (n - 1)."""


def spread(values: Sequence[float]) -> Spread:
    """Return mean and standard deviation (n - 1; absent for one value)."""
    return {"mean": statistics.fmean(values)} | ({"std": statistics.stdev(values)} if len(values) > 1 else {})


def spreads(runs: Sequence[Mapping[str, Any]], names: Iterable[str]) -> dict[str, Spread]:
    """Return the spread over runs of every number that runs have."""
    values = {name: [one[name] for one in runs if name in one] for name in names}
    return {name: spread(found) for name, found in values.items() if found}


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
