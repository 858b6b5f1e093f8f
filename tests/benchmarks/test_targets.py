"""Verdicts, and the table of all targets."""

import pytest

from benchmarks.machinery import targets
from benchmarks.machinery.targets import Target


def interval(median, low=None, high=None):
    return {"median": median, "low": median if low is None else low, "high": median if high is None else high}


@pytest.mark.parametrize(
    ("bounds", "measured", "verdict"),
    [
        ({"at_most": 1.02}, interval(1.0, 0.9, 1.01), "met"),
        ({"at_most": 1.02}, interval(1.0, 0.9, 1.1), "met, within the noise"),
        ({"at_most": 1.02}, interval(1.1, 1.05, 1.2), "missed"),
        ({"at_most": 1.02}, interval(1.03, 1.01, 1.2), "missed, within the noise"),
        ({"at_most": 1}, interval(1.0), "met"),
        ({"at_least": 1.5}, interval(1.6, 1.55, 1.7), "met"),
        ({"at_least": 1.5}, interval(1.4, 1.3, 1.45), "missed"),
        ({}, interval(3.0), "reported"),
    ],
)
def test_verdict(bounds, measured, verdict):
    assert Target("name", "what", "train_step", **bounds).verdict(measured) == verdict


def test_every_target_has_a_line_that_says_why_it_has_no_number():
    results = {"train_step": {"targets": {"saner_over_sam": interval(1.011, 1.0, 1.018)}}}
    lines = targets.report(results, "cpu", {"peers": "no time was left"})[2:]
    assert len(lines) == len(targets.TARGETS)
    assert "1.011 (1.000 to 1.018) | met |" in lines[0]
    text = "\n".join(lines)
    assert "not measurable here: counts on a GPU" in text
    assert "not measured: no time was left" in text
    assert not any("met" in line for line in lines[1:])
