"""Lemma 3.1: true, with an exact condition; what floating point makes of it; the script."""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from examples.theory import command, lemma

settings_ = settings(max_examples=100, deadline=None, derandomize=True, database=None)
negative = st.floats(-15, -1e-3)
either = st.floats(-15, 15)


@settings_
@given(z1=negative, z2=negative, above=st.floats(1e-3, 15))
def test_lemma_as_stated(z1, z2, above):
    assert 0 < lemma.exact(z1, z2, max(z2 - z1, 0) + above, digits=60) < 1


@settings_
@given(z2=negative, c=st.floats(1e-3, 5), below=st.floats(1e-3, 5))
def test_lemma_needs_its_condition(z2, c, below):
    assert lemma.exact(z2 - c - below, z2, c, digits=60) > 1


@settings_
@given(z1=either, z2=either, c=st.floats(1e-3, 30))
def test_condition_is_exact_whatever_the_signs(z1, z2, c):
    assume(abs(z1 + z2) > 1e-9 and abs(z1 - z2 + c) > 1e-9)
    value = lemma.exact(z1, z2, c, digits=100)
    assert value > 0
    assert (value < 1) == (z1 > z2 - c)


@pytest.mark.parametrize("c", [20.0, 100.0, 1000.0])
def test_numerator_stays_positive_however_large_the_shift(c):
    """It looks negative in floating point, where ``s(z1 + C)`` rounds to 1 and ``s(z2 - C)`` is left."""
    assert lemma.exact(-1.0, -1.0, c) > 0
    assert lemma.fraction(*map(np.float32, (-1.0, -1.0, c))) <= 0


@settings_
@given(z1=negative, z2=negative, c1=st.floats(0.1, 10), c2=st.floats(0.1, 10))
def test_two_shifts_can_turn_the_fraction_negative(z1, z2, c1, c2):
    """The lemma has one ``C``: inputs of equal norm."""
    total = z1 + z2 + c1 - c2
    assume(abs(total) > 1e-3)
    numerator = 1 - lemma.logistic(z1 + c1) - lemma.logistic(z2 - c2)
    assert np.sign(numerator) == -np.sign(total)


def test_grid_and_extremes_do_not_contradict():
    for grid, least in ((lemma.check(25), 4000), (lemma.check_extremes(), 8)):
        assert grid.inside >= least and grid.outside >= least
        assert grid.inside_contradicting == grid.outside_contradicting == 0


def test_grid_would_show_a_contradiction(monkeypatch):
    monkeypatch.setattr(lemma, "fraction", lambda z1, z2, c: 1.5 - 0 * z1)
    grid = lemma.check(10)
    assert grid.inside_contradicting == grid.inside > 0
    assert grid.outside_contradicting == 0


far = st.floats(-300, -1e-30)


@settings_
@given(z1=far, z2=far, c=st.floats(1e-9, 600))
def test_products_are_accurate_in_float64(z1, z2, c):
    assume(z1 > z2 - c)
    value = lemma.exact(z1, z2, c, digits=400)
    assert abs(Decimal(float(lemma.ratio(z1, z2, c))) / value - 1) < 2e-13
    if 1 - value > Decimal("1e-300"):
        assert abs(Decimal(float(lemma.deficit(z1, z2, c))) / (1 - value) - 1) < 2e-13


@settings_
@given(st.lists(st.floats(2.0**-10, 1000, width=32), min_size=3, max_size=3))
def test_margin_keeps_what_a_sum_rounds_off(values):
    z1, z2, c = -np.float32(values[0]), -np.float32(values[1]), np.float32(values[2])
    true = Fraction(float(z1)) - Fraction(float(z2)) + Fraction(float(c))
    assert abs(Fraction(float(lemma.margin(z1, z2, c))) - true) <= abs(true) * Fraction(2) ** -22


def test_ratio_does_not_overflow():
    z1, z2, c = np.meshgrid([-1e4, -1.0, 1e4], [-1e4, -1.0, 1e4], [1.0, 1e4])
    with np.errstate(all="raise", under="ignore"):
        values = lemma.ratio(*(each[z1 > z2 - c] for each in (z1, z2, c)))
    assert np.all((values >= 0) & (values <= 1))


def test_float32_breaks_the_fraction_and_not_the_products():
    as_written = lemma.accuracy(lemma.fraction, lemma.ratio, np.float32, 40)
    assert as_written.not_positive > 0.05 and as_written.not_below_one > 0.2 and as_written.wrong > 0.2
    # R itself rounds to 1 in places; what decides there is 1 - R.
    for formula in (lemma.ratio, lemma.deficit):
        product = lemma.accuracy(formula, formula, np.float32, 40)
        assert product.not_positive == product.wrong == 0
        assert product.worst < 1e-5


def test_float64_breaks_the_fraction_later():
    narrow, wide = (lemma.accuracy(lemma.fraction, lemma.ratio, dtype, 40) for dtype in (np.float32, np.float64))
    assert 0 < wide.not_positive < narrow.not_positive / 2
    assert 0 < wide.wrong < narrow.wrong / 3


@pytest.mark.parametrize("z1, z2, c", lemma.EXAMPLES)
def test_examples_break_float32(z1, z2, c):
    narrow = [np.float32(value) for value in (z1, z2, c)]
    assert not 0 < lemma.fraction(*narrow) < 1
    np.testing.assert_allclose(float(lemma.ratio(*narrow)), float(lemma.exact(*map(float, narrow))), rtol=1e-5)
    assert lemma.deficit(*narrow) > 0


def test_command_prints_what_it_found_and_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lemma, "FIGURE_POINTS", 40)
    command.run("lemma", lemma.main, ["--output", str(tmp_path), "--points", "10"])
    printed = capsys.readouterr().out
    assert "extremes, 1000 digits" in printed and "R as written, float32" in printed
    assert (tmp_path / "lemma.png").read_bytes().startswith(b"\x89PNG")


def test_command_refuses_nonsense_in_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.run("lemma", lemma.main, ["--points", "1"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: --points must be at least 2, got 1.\n"
