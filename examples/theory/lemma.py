"""Lemma 3.1 of the paper: is it true, where exactly, and where does floating point break it?

    python -m examples.theory.lemma

The lemma (Luong et al., 2026) says: for ``z1 < 0``, ``z2 < 0`` and ``C > 0`` with ``z1 > z2 - C``, and ``s`` the
logistic function,

    0 < R < 1   with   R = (1 - s(z1 + C) - s(z2 - C)) / (1 - s(z1) - s(z2)).

It is true, and its condition is exact. Since ``s(a) = e^a / (1 + e^a)``,

    1 - s(a) - s(b) = (1 - e^(a + b)) / ((1 + e^a) (1 + e^b)),

and ``a + b`` is ``z1 + z2`` in the numerator as in the denominator, because one logit gains what the other loses. So
the factor ``1 - e^(z1 + z2)`` cancels:

    R = (1 + e^z1) (1 + e^z2) / ((1 + e^(z1 + C)) (1 + e^(z2 - C))).

This is positive for all real numbers: numerator and denominator of the lemma change sign together, at ``z1 + z2 = 0``,
however large ``z1 + C`` is. What R lacks to 1 factorizes as well,

    1 - R = s(z1 + C) s(C - z2) (1 - e^(-C)) (1 - e^-(z1 - z2 + C)),

and for ``C > 0`` has the sign of ``z1 - z2 + C``. Therefore ``0 < R < 1`` if and only if ``z1 > z2 - C``, and ``R > 1``
if and only if ``z1 < z2 - C``. That both logits are negative is not needed; it keeps ``z1 + z2`` off 0, where the
lemma's fraction is 0 / 0 and the product is its limit.

What is needed, and easily overlooked, is that ``C`` is one number. It stands for ``rho ||x||``, so the two inputs have
the same norm. With ``C1`` for the clean sample and ``C2`` for the noisy one, the numerator has the sign of
``-(z1 + z2 + C1 - C2)``: a clean sample of larger norm can turn the fraction negative. So can several clean samples
against fewer noisy ones.

Evaluated as it is written, the fraction loses its digits in three places: where ``s(z1 + C)`` rounds to 1, where both
logits are so negative that R rounds to 1, and where ``z1 + z2`` is small. The products subtract nothing.
"""

import decimal
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from examples.noisy_images.errors import UserError
from examples.noisy_images.measures import plots
from examples.theory import command

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

# Along each axis of a plot.
FIGURE_POINTS = 200
# A value is called wrong when fewer than three of its digits are right.
TOLERANCE = 1e-3


def logistic(z: Any) -> Any:
    """Return ``1 / (1 + e^-z)``, in the dtype of ``z``."""
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-z))


def fraction(z1: Any, z2: Any, c: Any) -> Any:
    """Evaluate the lemma's fraction as it is written, in the dtype of its arguments."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return (1 - logistic(z1 + c) - logistic(z2 - c)) / (1 - logistic(z1) - logistic(z2))


def ratio(z1: Any, z2: Any, c: Any) -> Any:
    """Evaluate the same number as the product ``(1 + e^z1) (1 + e^z2) / ((1 + e^(z1 + C)) (1 + e^(z2 - C)))``."""
    # The largest term of every sum is taken out, so that no exponential overflows.
    positive = [np.maximum(z, 0) for z in (z1, z2, z1 + c, z2 - c)]
    sums = [1 + np.exp(-np.abs(z)) for z in (z1, z2, z1 + c, z2 - c)]
    scale = np.exp(positive[0] + positive[1] - positive[2] - positive[3])
    return scale * sums[0] * sums[1] / (sums[2] * sums[3])


def deficit(z1: Any, z2: Any, c: Any) -> Any:
    """Evaluate ``1 - R`` as ``s(z1 + C) s(C - z2) (1 - e^-C) (1 - e^-(z1 - z2 + C))``, also where R rounds to 1."""
    return logistic(z1 + c) * logistic(c - z2) * np.expm1(-c) * np.expm1(-margin(z1, z2, c))


def margin(z1: Any, z2: Any, c: Any) -> Any:
    """Return ``z1 - z2 + C``, with what the first sum rounds off added at the end (Knuth's two-sum)."""
    total = z1 + c
    part = total - z1
    rounded_off = (z1 - (total - part)) + (c - part)
    return (total - z2) + rounded_off


def exact(z1: float, z2: float, c: float, digits: int = 1000) -> decimal.Decimal:
    """Evaluate the lemma's fraction as it is written, with so many digits that nothing cancels."""
    with decimal.localcontext(prec=digits, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX):
        one, z1, z2, c = (decimal.Decimal(value) for value in (1, z1, z2, c))
        s = [one / (one + (-z).exp()) for z in (z1 + c, z2 - c, z1, z2)]
        return (one - s[0] - s[1]) / (one - s[2] - s[3])


class Grid(NamedTuple):
    """What a grid says about the lemma, in float64: counts of points, and of those that contradict it."""

    inside: int
    """Points with ``z1 > z2 - C``."""
    inside_contradicting: int
    """Of these, with R outside (0, 1)."""
    outside: int
    """Points with ``z1 < z2 - C``."""
    outside_contradicting: int
    """Of these, with R not above 1."""


def check(points: int) -> Grid:
    """Compare the lemma with ``points**3`` logits and shifts from 0.001 to 30, spaced geometrically.

    R is the fraction as it is written, and within these bounds float64 leaves it at least six digits. Points whose R
    is closer to 1 than 1e-6 are left out: there the algebra decides, not this evaluation.
    """
    z = -np.geomspace(1e-3, 30, points)
    z1, z2, c = np.meshgrid(z, z, -z, indexing="ij")
    known = (z1 + c < 20) & (np.abs(fraction(z1, z2, c) - 1) > 1e-6)
    value, inside = fraction(z1, z2, c), z1 > z2 - c
    return Grid(
        inside=int(np.sum(known & inside)),
        inside_contradicting=int(np.sum(known & inside & ~((value > 0) & (value < 1)))),
        outside=int(np.sum(known & ~inside)),
        outside_contradicting=int(np.sum(known & ~inside & ~(value > 1))),
    )


EXTREMES = tuple(
    itertools.product((-1e-300, -1e-9, -1.0, -700.0), (-1e-300, -1e-9, -1.0, -700.0), (1e-9, 1.0, 700.0, 1500.0))
)


def check_extremes() -> Grid:
    """Compare the lemma with the corners of what float64 can hold, evaluated with a thousand digits."""
    inside = [exact(z1, z2, c) for z1, z2, c in EXTREMES if z1 > z2 - c]
    outside = [exact(z1, z2, c) for z1, z2, c in EXTREMES if z1 < z2 - c]
    return Grid(
        len(inside), sum(not 0 < value < 1 for value in inside), len(outside), sum(not value > 1 for value in outside)
    )


class Accuracy(NamedTuple):
    """How a formula does on points that satisfy the lemma's hypotheses; shares of these points."""

    not_positive: float
    """It gives 0, a negative number or NaN."""
    not_below_one: float
    """It gives 1 or more."""
    wrong: float
    """Its relative error is above a thousandth, or it gives NaN."""
    worst: float
    """Its largest relative error."""


def accuracy(formula: Any, truth: Any, dtype: Any, points: int) -> Accuracy:
    """Measure ``formula`` in ``dtype`` against ``truth`` in float64, both at the same arguments, from 1e-9 to 80.

    Points whose true value is too small for a normal float32 number are left out.
    """
    z = -np.geomspace(1e-9, 80, points).astype(dtype)
    z1, z2, c = np.meshgrid(z, z, -z, indexing="ij")
    wide = [array.astype(np.float64) for array in (z1, z2, c)]
    kept = (margin(*wide) > 0) & (truth(*wide) >= np.finfo(np.float32).tiny)
    value, true = formula(z1, z2, c)[kept].astype(np.float64), truth(*wide)[kept]
    error = np.nan_to_num(np.abs(value / true - 1), nan=np.inf)
    return Accuracy(
        not_positive=float(np.mean(~(value > 0))),
        not_below_one=float(np.mean(value >= 1)),
        wrong=float(np.mean(error > TOLERANCE)),
        worst=float(error.max()),
    )


def figure(points: int) -> "Figure":
    """Draw R over its arguments with the lemma's boundary, and where the fraction breaks in float32 and float64."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8.6, 7.4), layout="constrained")
    drawn.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    slices, planes = drawn.subplots(2, 2)
    _draw_clean_logit_and_shift(slices[0], points)
    _draw_both_logits(slices[1], points)
    for axes, dtype in zip(planes, (np.float32, np.float64), strict=True):
        kinds = _draw_breakdown(axes, dtype, points)
    drawn.legend(handles=kinds, fontsize=9, loc="outside lower center", ncols=len(kinds), frameon=False)
    return drawn


def _draw_ratio(axes: "Axes", x: np.ndarray, y: np.ndarray, r: np.ndarray) -> None:
    """Contours of R: grey below 1, darker for smaller; white above."""
    levels = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
    greys = [str(shade) for shade in (0.45, 0.52, 0.6, 0.68, 0.76, 0.84, 0.92)]
    axes.contourf(x, y, r, levels=(0, *levels), colors=greys)
    lines = axes.contour(x, y, r, levels=(*levels[:-1], 1.5, 3), colors="black", linewidths=0.7)
    axes.clabel(lines, fontsize=7.5, fmt="%g")
    axes.contour(x, y, r, levels=(1.0,), colors="black", linewidths=2.4)


def _draw_clean_logit_and_shift(axes: "Axes", points: int) -> None:
    z2 = -3.0
    z1, c = np.meshgrid(np.linspace(-8, 0, points), np.linspace(0, 8, points)[1:])
    _draw_ratio(axes, z1, c, ratio(z1, z2, c))
    axes.text(-7.6, 0.5, "R > 1", fontsize=10)
    axes.text(-7.9, 2.2, "R = 1:\nC = z2 - z1", fontsize=9)
    _label(axes, f"R at z2 = {z2:g}", "z1, logit of the clean sample", "C, shift by the perturbation")


def _draw_both_logits(axes: "Axes", points: int) -> None:
    c = 2.0
    z1, z2 = np.meshgrid(np.linspace(-6, 6, points), np.linspace(-6, 6, points))
    _draw_ratio(axes, z1, z2, ratio(z1, z2, c))
    axes.plot((-6, 6), (6, -6), color="black", linestyle=":", linewidth=1.4)
    axes.plot((-6, 0, 0), (0, 0, -6), color="black", linestyle="--", linewidth=1.4)
    axes.text(-5.7, -5.6, "the lemma's quadrant", fontsize=8, backgroundcolor="white")
    axes.text(3.3, -3.0, "0 / 0", fontsize=9)
    axes.text(-4.4, 4.9, "R > 1", fontsize=10)
    _label(axes, f"R at C = {c:g}", "z1, logit of the clean sample", "z2, logit of the noisy sample")


def _draw_breakdown(axes: "Axes", dtype: Any, points: int) -> "list[Patch]":
    """Where the fraction is right, wrong, 1 or more, or not positive, on ``z1 = z2``; returns the key of the shades."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    z, c = np.meshgrid(np.geomspace(1e-18, 100, points), np.geomspace(1e-2, 100, points))
    z, c = -z.astype(dtype), c.astype(dtype)
    value, true = fraction(z, z, c), ratio(z.astype(np.float64), z.astype(np.float64), c.astype(np.float64))
    kinds = np.zeros(z.shape)
    kinds[np.abs(value / true - 1) > TOLERANCE] = 1
    kinds[value >= 1] = 2
    kinds[~(value > 0)] = 3
    shades = ("1.0", "0.82", "0.58", "0.25")
    names = ("right to a thousandth", "wrong, but in (0, 1)", "1 or more", "0, negative or NaN")
    axes.pcolormesh(-z, c, kinds, cmap=ListedColormap(shades), vmin=-0.5, vmax=3.5, rasterized=True)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _label(axes, f"The fraction as written, {np.dtype(dtype).name}", "-z1 = -z2", "C, shift by the perturbation")
    return [Patch(facecolor=shade, edgecolor="black", label=name) for shade, name in zip(shades, names, strict=True)]


def _label(axes: "Axes", title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)


# One point for every way to break, for float32 and beyond the reach of float64.
EXAMPLES = ((-1.0, -1.0, 20.0), (-20.0, -20.0, 1.0), (-1e-8, -1e-8, 1.0), (-1.0, -1.0, 40.0), (-40.0, -40.0, 1.0))


def main(output: Path = command.RESULTS, points: int = 80) -> None:
    """Check Lemma 3.1 on a grid and at extremes, and say where floating point breaks it.

    Args:
        output: Folder of the figure, lemma.png.
        points: Points of the grids along each of three axes.
    """
    if points < 2:
        raise UserError(f"--points must be at least 2, got {points}.")
    print("Lemma 3.1 (points: of which contradict it)")
    print(f"{'':34}{'z1 > z2 - C: 0 < R < 1':>24}{'z1 < z2 - C: R > 1':>24}")
    for name, grid in (("grid, float64", check(points)), ("extremes, 1000 digits", check_extremes())):
        inside, outside = (f"{grid[i]:,}: {grid[i + 1]}" for i in (0, 2))
        print(f"  {name:32}{inside:>24}{outside:>24}")

    print(f"\nEvaluated in floating point, on {points}^3 points from 1e-9 to 80, those with z1 > z2 - C")
    print(f"{'':34}{'<= 0 or NaN':>12}{'>= 1':>12}{'wrong':>12}{'worst error':>14}")
    for name, formula, truth, dtype in (
        ("R as written, float32", fraction, ratio, np.float32),
        ("R as written, float64", fraction, ratio, np.float64),
        ("R as a product, float32", ratio, ratio, np.float32),
        ("1 - R as a product, float32", deficit, deficit, np.float32),
    ):
        row = accuracy(formula, truth, dtype, points)
        shares = "".join(f"{share:>12.2%}" for share in row[:3])
        print(f"  {name:32}{shares}{row.worst:>14.1e}")

    print("\nExamples")
    print(
        f"{'z1':>8}{'z2':>8}{'C':>5}{'float32':>13}{'float64':>13}{'product, float32':>18}{'exact R':>13}{'1 - R':>13}"
    )
    for point in EXAMPLES:
        narrow, true = [np.float32(value) for value in point], exact(*point)
        z1, z2, c = (f"{value:g}" for value in point)
        print(
            f"{z1:>8}{z2:>8}{c:>5}{fraction(*narrow):>13.4g}{fraction(*map(np.float64, point)):>13.4g}"
            f"{ratio(*narrow):>18.4g}{float(true):>13.4g}{float(1 - true):>13.4g}"
        )

    path = output / "lemma.png"
    plots.save(figure(FIGURE_POINTS), path)
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    command.run("lemma", main)
