"""Paired ratios, medians and spread."""

import numpy as np
import pytest

from benchmarks.machinery import statistics, tables
from benchmarks.machinery.statistics import Ratio


def test_interval_holds_the_median_and_narrows():
    values = np.random.default_rng(0).normal(1.0, 0.1, 1000)
    few, many = statistics.median_with_interval(values[:50]), statistics.median_with_interval(values)
    assert few["low"] <= few["median"] <= few["high"]
    assert many["high"] - many["low"] < few["high"] - few["low"]


def test_ratio_pairs_within_rounds_and_so_cancels_what_slows_a_round():
    slow = np.random.default_rng(0).uniform(1, 10, 200)
    seconds = {"a": 1.5 * slow, "b": slow}
    measured = Ratio("a", "b").of(seconds)
    assert measured == pytest.approx({"median": 1.5, "low": 1.5, "high": 1.5})
    # The ratio of medians of other rounds is far off.
    assert Ratio("a", "b").of({"a": seconds["a"], "b": np.roll(slow, 1)})["high"] > 1.6


def test_factor_multiplies_the_denominator():
    ratio = Ratio("SAM", "SGD", factor=2)
    assert str(ratio) == "SAM / 2 SGD"
    seconds = {"SAM": np.full(5, 6.0), "SGD": np.full(5, 2.0)}
    assert ratio.of(seconds)["median"] == 1.5
    assert ratio.difference(seconds)["median"] == 2.0
    assert ratio.measured_in(seconds) and not ratio.measured_in({"SAM": seconds["SAM"]})


def test_quartiles_and_spread():
    assert statistics.quartiles(np.arange(5.0)) == {"q1_s": 1.0, "median_s": 2.0, "q3_s": 3.0}
    assert statistics.mean_with_spread(np.array([1.0, 3.0])) == {"mean": 2.0, "std": pytest.approx(2**0.5)}
    assert statistics.mean_with_spread(np.array([4.0])) == {"mean": 4.0, "std": None}


def test_a_single_seed_is_shown_without_a_spread():
    assert tables.percent({"mean": 0.5, "std": None}) == "50.00%"
    assert tables.percent({"mean": 0.5, "std": 0.01}, sign="+") == "+50.00% +- 1.00%"
