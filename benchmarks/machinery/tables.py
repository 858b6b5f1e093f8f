"""Tables and numbers as Markdown."""

from collections.abc import Mapping, Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table whose first column is text and whose others are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def interval(measured: Mapping[str, float], digits: int = 3) -> str:
    """Return a median with its interval."""
    return f"{measured['median']:.{digits}f} ({measured['low']:.{digits}f} to {measured['high']:.{digits}f})"


def milliseconds(measured: Mapping[str, float]) -> str:
    """Return a median with its quartiles, in milliseconds."""
    median, q1, q3 = (1e3 * measured[name] for name in ("median_s", "q1_s", "q3_s"))
    digits = 2 if median < 100 else 0
    return f"{median:.{digits}f} ({q1:.{digits}f} to {q3:.{digits}f})"


def percent(measured: Mapping[str, float | None], sign: str = "") -> str:
    """Return a mean with its standard deviation, where there is one, in percent."""
    mean = format(measured["mean"], f"{sign}.2%")
    return mean if measured["std"] is None else f"{mean} +- {measured['std']:.2%}"
