"""SGD and 1-SAM on a linear model with label noise, and the gradient ratio at the features that samples share.

    python -m examples.theory.linear_model

Section 3.2 of the paper (Luong et al., 2026) looks at a linear model under the logistic loss and at 1-SAM, which
perturbs the weights once for every sample ``x_i`` with label ``y_i`` in {0, 1}:

    eps_i = rho (-1)^y_i x_i / ||x_i||,   which turns the logit w.x_i into   w.x_i + (-1)^y_i rho ||x_i||.

Let a clean and a mislabelled sample of one true class share a feature. Folded so that this class has negative logits,
their logits are ``z1`` and ``z2``, and on the shared feature

    g  is proportional to   1 - s(z1) - s(z2),          h  to   1 - s(z1 + C) - s(z2 - C),      C = rho ||x||.

Once the class is learned both logits are negative: the clean sample is fitted, the mislabelled one is not, and it
dominates ``g``. That is the transitional phase, for which Lemma 3.1 puts ``r = h / g`` between 0 and 1 as long as
``z1 > z2 - C``: what the noise dominates shrinks (see ``examples/theory/lemma.py``).

The data are our choice, made so that ``h / g`` is the fraction of the lemma all through a training run. Every input has
three parts, of lengths ``class_size``, ``shared_size`` and ``own_size``:

* a class feature, plus or minus one by the true class: all samples have it, and clean ones of both classes teach it;
* for every mislabelled sample a feature that it shares with one clean sample of its class, and with no other;
* a direction of its own, drawn at random, by which any label can be memorized.

Remaining clean samples have no partner and the second part is 0. Where ``C`` matters, at a shared feature, both
inputs have the same norm. Every step takes the whole set as its batch.
"""

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import saner_jax
from examples.noisy_images.errors import UserError
from examples.noisy_images.measures import plots
from examples.theory import command, lemma

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Problem:
    """The data set and how it is trained on."""

    samples: int = 100
    """Samples, about half of each class."""
    noisy: int = 30
    """Mislabelled samples; as many clean ones are their partners."""
    dimension: int = 200
    """Dimension in which each sample has a direction of its own."""
    class_size: float = 1.0
    """Length of the class feature."""
    shared_size: float = 1.0
    """Length of a feature that two samples share."""
    own_size: float = 1.0
    """Length of a sample's own part."""
    learning_rate: float = 0.5
    steps: int = 1500
    rho: float = 1.0
    """Length of 1-SAM's perturbation."""
    alpha: float = 0.5
    """What SANER takes off the down-weighted elements."""
    seed: int = 0


class Data(NamedTuple):
    """Samples in the order mislabelled, their partners, the rest."""

    x: jax.Array
    """Inputs, of shape (samples, 1 + noisy + dimension): class feature, shared features, own directions."""
    y: jax.Array
    """Given labels, 0 or 1."""
    true: jax.Array
    """True labels."""
    noisy: int
    """The number of mislabelled samples, of their partners, and of shared features."""

    @property
    def shared(self) -> slice:
        """The shared features among the coordinates."""
        return slice(1, 1 + self.noisy)


def make_data(problem: Problem) -> Data:
    """Draw the data set."""
    n, k = problem.samples, problem.noisy
    if not 0 < 2 * k <= n:
        raise UserError(f"--noisy is {k} of {n} samples: it must be positive and leave every one a clean partner.")
    pair = np.arange(k)
    true = np.concatenate([pair % 2, pair % 2, np.arange(n - 2 * k) % 2])
    sign = 2.0 * true - 1
    own = np.random.default_rng(problem.seed).normal(size=(n, problem.dimension))
    x = np.zeros((n, 1 + k + problem.dimension))
    x[:, 0] = problem.class_size * sign
    for samples in (pair, k + pair):
        x[samples, 1 + pair] = problem.shared_size * sign[samples]
    x[:, 1 + k :] = problem.own_size * own / np.linalg.norm(own, axis=1, keepdims=True)
    y = np.where(np.arange(n) < k, 1 - true, true)
    return Data(jnp.asarray(x, float), jnp.asarray(y, float), jnp.asarray(true), k)


def loss(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the logistic loss of one sample."""
    return optax.sigmoid_binary_cross_entropy(w @ x, y)


def perturbation(w: jax.Array, x: jax.Array, y: jax.Array, rho: jax.typing.ArrayLike) -> jax.Array:
    """Return where the library takes the second gradient of one sample, less ``w``."""
    visited = []

    def grad_fn(v: jax.Array) -> jax.Array:
        visited.append(v)
        return jax.grad(loss)(v, x, y)

    tx = saner_jax.sam(rho)
    tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
    _, perturbed = visited
    return perturbed - w


# The axis over which samples are mapped: each is a group of its own, m = 1.
SAMPLES = "samples"

METHODS = {
    "SGD": lambda rho, alpha: optax.stateless(lambda g, _: jax.lax.pmean(g, SAMPLES)),
    "1-SAM": lambda rho, alpha: saner_jax.sam(rho, axis_name=SAMPLES),
    "1-SAM + SANER": lambda rho, alpha: saner_jax.saner(rho, alpha, axis_name=SAMPLES),
}


def train(method: str, problem: Problem, data: Data) -> jax.Array:
    """Train from zero weights; returns the weights before every step and after the last."""
    hyperparameters = (problem.rho, problem.alpha, problem.learning_rate)
    return _train(method, problem.steps, hyperparameters, data.x, data.y)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _train(method: str, steps: int, hyperparameters: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    rho, alpha, learning_rate = hyperparameters
    tx = optax.chain(METHODS[method](rho, alpha), optax.sgd(learning_rate))

    @functools.partial(jax.vmap, in_axes=(None, None, 0, 0), out_axes=None, axis_name=SAMPLES)
    def step(w: jax.Array, state: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        def grad_fn(v: jax.Array) -> jax.Array:
            return jax.grad(loss)(v, x, y)

        updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        return optax.apply_updates(w, updates), state

    def body(carry: Any, _: None) -> tuple[Any, jax.Array]:
        return step(*carry, inputs, labels), carry[0]

    w = jnp.zeros(inputs.shape[1])
    (last, _), before = jax.lax.scan(body, (w, tx.init(w)), length=steps)
    return jnp.concatenate([before, last[None]])


class Fit(NamedTuple):
    """How well given labels are fitted, at every step."""

    clean: np.ndarray
    """Accuracy on clean samples."""
    noisy: np.ndarray
    """Accuracy on mislabelled samples, against their wrong labels."""
    margin: np.ndarray
    """Mean logit of the clean samples, positive towards their labels."""

    def memorized(self) -> int | None:
        """Return the step from which on at least half of the mislabelled samples are fitted; None if never."""
        below = np.flatnonzero(self.noisy < 0.5)
        step = int(below[-1]) + 1 if len(below) else 0
        return step if step < len(self.noisy) else None


def fit(weights: jax.Array, data: Data) -> Fit:
    """Measure the fit at every step."""
    logits, labels, k = np.asarray(weights @ data.x.T), np.asarray(data.y), data.noisy
    right = (logits > 0) == (labels == 1)
    margins = logits * (2 * labels - 1)
    return Fit(right[:, k:].mean(axis=1), right[:, :k].mean(axis=1), margins[:, k:].mean(axis=1))


class Gradients(NamedTuple):
    """Gradients at every step, of the whole set, at ``w`` (g) and as 1-SAM takes them (h)."""

    g: np.ndarray
    """Of shape (steps, coordinates)."""
    h: np.ndarray
    """Of shape (steps, coordinates)."""
    clean_g: np.ndarray
    """The clean samples' part of ``g`` at the shared features, of shape (steps, features)."""
    clean_h: np.ndarray
    """Their part of ``h``."""
    z1: np.ndarray
    """Logit of the clean sample of each shared feature, folded so that its class is the negative one."""
    z2: np.ndarray
    """Logit of the mislabelled one, folded likewise."""

    @property
    def r(self) -> np.ndarray:
        """``h / g``; NaN or infinite where ``g`` is zero."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.h / self.g


def gradients(weights: jax.Array, data: Data, rho: float) -> Gradients:
    """Take the gradients of every sample through the library, at every step, and split them."""
    k = data.noisy

    def of_sample(w: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        grad_fn = functools.partial(jax.grad(loss), x=x, y=y)
        g, tx = grad_fn(w), saner_jax.sam(rho)
        return g, tx.update(g, tx.init(w), w, grad_fn=grad_fn)[0]

    def of_step(w: jax.Array) -> tuple[jax.Array, ...]:
        g, h = jax.vmap(of_sample, in_axes=(None, 0, 0))(w, data.x, data.y)
        clean_g, clean_h = (jnp.sum(each[k:, data.shared], axis=0) / len(each) for each in (g, h))
        return g.mean(axis=0), h.mean(axis=0), clean_g, clean_h

    measured = jax.jit(lambda weights: jax.lax.map(of_step, weights))(weights)
    folded = np.asarray(weights @ data.x.T * (1 - 2 * data.true))
    return Gradients(*map(np.asarray, measured), z1=folded[:, k : 2 * k], z2=folded[:, :k])


class Phase(NamedTuple):
    """The transitional phase: clean samples fitted, mislabelled ones not, and these dominate the shared features."""

    first: int
    last: int

    @property
    def steps(self) -> slice:
        """Its steps."""
        return slice(self.first, self.last + 1)


def transitional_phase(fitted: Fit, measured: Gradients, data: Data) -> Phase:
    """Find the steps at which 99 % of clean labels and less than half of the wrong ones are fitted.

    Of these, the steps at which the mislabelled samples' part of ``g`` outweighs the clean part, in the mean over the
    shared features.
    """
    dominated = np.mean(measured.g[:, data.shared], axis=1) > 0
    steps = np.flatnonzero((fitted.clean >= 0.99) & (fitted.noisy < 0.5) & dominated)
    if not len(steps):
        raise UserError(
            "there is no transitional phase: wrong labels are fitted along with the clean ones; lower --noisy, "
            "--own-size or --learning-rate, or raise --class-size or --steps."
        )
    return Phase(int(steps[0]), int(steps[-1]))


def shift(problem: Problem) -> float:
    """Return the lemma's C: ``rho ||x||`` of a sample that has all three parts."""
    return problem.rho * float(np.linalg.norm([problem.class_size, problem.shared_size, problem.own_size]))


def figure(problem: Problem, data: Data, fits: dict[str, Fit], measured: Gradients, phase: Phase) -> "Figure":
    """Draw accuracies, the split gradient, the ratio at the shared features, and its distribution."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8.6, 7.0), layout="constrained")
    drawn.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    (top, split), (over_time, distribution) = drawn.subplots(2, 2)
    steps = np.arange(1, problem.steps + 1)  # at step 0 the logits are zero and g at a shared feature too

    for (method, fitted), style in zip(fits.items(), ("-", "--", ":"), strict=True):
        top.plot(steps, 100 * fitted.noisy[1:], color="black", linestyle=style, linewidth=1.6, label=f"noisy, {method}")
        top.plot(steps, 100 * fitted.clean[1:], color="0.6", linestyle=style, linewidth=1.6, label=f"clean, {method}")
    _label(top, "Accuracy on given labels", "training samples (%)")

    mean_g, mean_h = (np.mean(each[1:, data.shared], axis=1) for each in (measured.g, measured.h))
    mean_clean_g, mean_clean_h = (np.mean(each[1:], axis=1) for each in (measured.clean_g, measured.clean_h))
    for name, total, clean, style in (("g", mean_g, mean_clean_g, "-"), ("h", mean_h, mean_clean_h, "--")):
        split.plot(steps, total - clean, color="black", linestyle=style, linewidth=1.2, label=f"{name}, noisy part")
        split.plot(steps, clean, color="0.6", linestyle=style, linewidth=1.2, label=f"{name}, clean part")
        split.plot(steps, total, color="black", linestyle=style, linewidth=2.4, label=f"{name}, sum")
    split.axhline(0, color="black", linewidth=0.6)
    split.set_ylim(bottom=2 * mean_clean_h.min())
    _label(split, "Gradient at shared features", "mean over the features")

    shared = measured.r[1:, data.shared]
    low, median, high = np.quantile(shared, (0.05, 0.5, 0.95), axis=1)
    over_time.fill_between(steps, low, high, color="0.75", linewidth=0, label="shared features, 5 to 95 %")
    over_time.plot(steps, median, color="black", linewidth=2, label="shared features, median")
    # Where g changes sign there, r jumps from one end to the other.
    class_feature = np.where(np.abs(measured.r[1:, 0]) < 5, measured.r[1:, 0], np.nan)
    over_time.plot(steps, class_feature, color="black", linewidth=1, linestyle=":", label="class feature")
    for bound in (0, 1):
        over_time.axhline(bound, color="black", linewidth=0.8)
    over_time.set_ylim(-0.6, 1.8)
    _label(over_time, "Ratio r = h / g along 1-SAM's run", "r")

    for axes in (top, split, over_time):
        axes.axvspan(phase.first, phase.last, color="0.9", zorder=0)
        axes.set_xscale("log")
        axes.set_xlabel("step (shaded: transitional phase)", fontsize=9)
        axes.legend(fontsize=7, loc="lower center" if axes is split else "best", ncols=2 if axes is split else 1)

    in_phase = measured.r[phase.steps]
    bins = np.linspace(-1, 3, 81)
    for name, part, style in (
        ("shared features", in_phase[:, data.shared], {"color": "0.35"}),
        ("own directions", in_phase[:, data.shared.stop :], {"histtype": "step", "color": "black", "linewidth": 1.4}),
    ):
        weights = np.full(part.size, 100 / part.size)
        distribution.hist(np.clip(part, -0.999, 2.999).ravel(), bins, weights=weights.ravel(), label=name, **style)
    for bound in (0, 1):
        distribution.axvline(bound, color="black", linewidth=0.8)
    distribution.set_xlabel("r (beyond the ends: in the last bins)", fontsize=9)
    distribution.legend(fontsize=7)
    _label(distribution, "Distribution of r in that phase", "coordinates and steps (%)")
    return drawn


def _label(axes: "Axes", title: str, y: str) -> None:
    axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)


def main(
    problem: tyro.conf.OmitArgPrefixes[Problem] = Problem(),
    rhos: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0),
    seeds: int = 5,
    output: Path = command.RESULTS,
) -> None:
    """Train a linear model with SGD and 1-SAM on noisy labels, and look at the gradient ratio at shared features.

    Args:
        problem: Data and training.
        rhos: Perturbation lengths that the last table compares.
        seeds: Data sets, seeded from 0, over which it averages.
        output: Folder of the figure, linear_model.png.
    """
    if seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {seeds}.")
    if not min(problem.rho, *rhos) > 0:
        raise UserError(f"--rho and --rhos must be positive, got {problem.rho:g} and {rhos}.")
    data = make_data(problem)
    weights = {method: train(method, problem, data) for method in METHODS}
    fits = {method: fit(run, data) for method, run in weights.items()}
    measured = gradients(weights["1-SAM"], data, problem.rho)
    phase = transitional_phase(fits["1-SAM"], measured, data)

    perturbations = jax.jit(jax.vmap(perturbation, in_axes=(None, 0, 0, None)))
    eps = perturbations(weights["1-SAM"][-1], data.x, data.y, problem.rho)
    formula = problem.rho * (-1.0) ** data.y[:, None] * data.x / jnp.linalg.norm(data.x, axis=1, keepdims=True)
    print(f"eps_i of the library less rho (-1)^y_i x_i / ||x_i||: at most {jnp.abs(eps - formula).max():.1e}")

    _print_phase(problem, data, measured, phase)

    print("\nStep from which half of the wrong labels are fitted; the same over SGD's; mean clean margin then")
    print(f"(mean +- standard deviation over {seeds} seeds)")
    base = memorization(problem, "SGD", seeds)
    _print_memorization("SGD", base, base)
    for rho in rhos:
        for method in ("1-SAM", "1-SAM + SANER"):
            other = memorization(dataclasses.replace(problem, rho=rho), method, seeds)
            _print_memorization(f"{method}, rho {rho:g}", other, base)

    path = output / "linear_model.png"
    plots.save(figure(problem, data, fits, measured, phase), path)
    print(f"\nwritten: {path}")


def _print_phase(problem: Problem, data: Data, measured: Gradients, phase: Phase) -> None:
    c, r = shift(problem), measured.r[phase.steps]
    z1, z2, shared = measured.z1[phase.steps], measured.z2[phase.steps], r[:, data.shared]
    holds = z1 > z2 - c
    error = np.quantile(np.abs(shared / lemma.ratio(z1, z2, c) - 1), 0.99)
    print(
        f"\n1-SAM: transitional phase from step {phase.first} to {phase.last}, C = {c:.3g}; shared features and steps"
    )
    for name, value in (
        ("z1 < 0 and z2 < 0: clean fitted, noisy not", f"{np.mean((z1 < 0) & (z2 < 0)):.2%}"),
        ("z1 > z2 - C: the condition of the lemma", f"{np.mean(holds):.2%}"),
        ("0 < r < 1 where it holds", f"{np.mean((shared > 0) & (shared < 1), where=holds):.2%}"),
        ("r > 1 where it does not", f"{np.mean(shared > 1, where=~holds):.2%}"),
        ("r off the lemma's formula, 99 % of them at most", f"{error:.0e}"),
    ):
        print(f"  {name:48}{value:>8}")

    print(f"\n{'  r = h / g in that phase':26}{'r < 0':>10}{'0 < r < 1':>12}{'r > 1':>10}")
    for name, part in (
        ("shared features", data.shared),
        ("own directions", slice(data.shared.stop, None)),
        ("class feature", slice(1)),
        ("all coordinates", slice(None)),
    ):
        kind = r[:, part]
        shares = np.mean(kind < 0), np.mean((kind > 0) & (kind < 1)), np.mean(kind > 1)
        print(f"  {name:24}{shares[0]:>10.1%}{shares[1]:>12.1%}{shares[2]:>10.1%}")


def memorization(problem: Problem, method: str, seeds: int) -> np.ndarray:
    """Return step and mean clean margin at which half of the wrong labels are fitted, of shape (seeds, 2).

    Both are NaN for a seed that does not get there.
    """
    rows = []
    for seed in range(seeds):
        one = dataclasses.replace(problem, seed=seed)
        data = make_data(one)
        fitted = fit(train(method, one, data), data)
        step = fitted.memorized()
        rows.append((np.nan, np.nan) if step is None else (step, fitted.margin[step]))
    return np.array(rows)


def _print_memorization(name: str, rows: np.ndarray, base: np.ndarray) -> None:
    (steps, margins), over = rows.T, rows[:, 0] / base[:, 0]
    columns = (_spread(steps, 0), _spread(over, 2), _spread(margins, 2))
    print(f"  {name:24}" + "".join(f"{column:>16}" for column in columns))


def _spread(values: np.ndarray, digits: int) -> str:
    # One seed has no standard deviation.
    return f"{values.mean():.{digits}f}" + (f" +- {values.std(ddof=1):.{digits}f}" if len(values) > 1 else "")


if __name__ == "__main__":
    command.run("linear_model", main)
