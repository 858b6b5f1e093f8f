"""Medians, quartiles, and ratios of runs that were paired within rounds."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Ratio(NamedTuple):
    """Two subjects to compare within rounds, and the ratio not to exceed."""

    numerator: str
    denominator: str
    target: float | None = None
    factor: float = 1.0
    """What the denominator is multiplied by: 2 where one step of two passes is compared with two steps of one."""

    def __str__(self) -> str:
        factor = "" if self.factor == 1 else f"{self.factor:g} "
        return f"{self.numerator} / {factor}{self.denominator}"

    def measured_in(self, seconds: Mapping[str, np.ndarray]) -> bool:
        """Return whether both subjects were timed."""
        return self.numerator in seconds and self.denominator in seconds

    def of(self, seconds: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Return the median over rounds of the ratio within a round, and its interval."""
        return median_with_interval(seconds[self.numerator] / (self.factor * seconds[self.denominator]))

    def difference(self, seconds: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Return the median over rounds of the difference within a round, and its interval."""
        return median_with_interval(seconds[self.numerator] - self.factor * seconds[self.denominator])


def quartiles(seconds: np.ndarray) -> dict[str, float]:
    """Return the first quartile, the median and the third quartile of times in seconds."""
    return dict(zip(("q1_s", "median_s", "q3_s"), map(float, np.percentile(seconds, [25, 50, 75])), strict=True))


def median_with_interval(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> dict[str, float]:
    """Return the median and a 95 % bootstrap interval of it."""
    draws = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.percentile(np.median(values[draws], axis=1), [2.5, 97.5])
    return {"median": float(np.median(values)), "low": float(low), "high": float(high)}


def mean_with_spread(values: np.ndarray) -> dict[str, float | None]:
    """Return the mean and the standard deviation (of a sample) of a few values, such as accuracies of seeds.

    One value has no spread.
    """
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else None}
