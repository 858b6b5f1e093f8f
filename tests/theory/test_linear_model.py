"""The linear model of the paper's section 3.2: by formula, through the library, over a training run; the script."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import saner_jax
from examples.noisy_images.errors import UserError
from examples.theory import command, lemma, linear_model
from examples.theory.linear_model import Problem

pytestmark = pytest.mark.usefixtures("quick_compile")

settings_ = settings(max_examples=100, deadline=None, derandomize=True, database=None)
logits = st.floats(-8.0, -0.05)
vectors = st.lists(st.floats(-2, 2), min_size=4, max_size=4).map(np.array)

PROBLEM = Problem(samples=20, noisy=6, dimension=40, steps=200)


@settings_
@given(w=vectors, x=vectors, y=st.integers(0, 1), rho=st.floats(0.01, 2))
def test_one_sam_perturbation(w, x, y, rho):
    """``eps_i = rho (-1)^{y_i} x_i / ||x_i||``: away from the label's side, whatever the logit."""
    assume(np.linalg.norm(x) > 1e-3)
    with jax.enable_x64(True):
        eps = np.asarray(jax.jit(linear_model.perturbation)(*map(jnp.float64, (w, x, y, rho))))
    np.testing.assert_allclose(eps, rho * (-1) ** y * x / np.linalg.norm(x), rtol=0, atol=1e-9)


# Two samples that share a feature and have opposite labels: what a noisy sample is to a clean one of its true class.
# Both have the true class 0, and logits below 0 say that the model knows: the clean one is labelled 0, the noisy one 1.
#
#     x1 = (1, a, 0)  label 0, logit z1        x2 = (1, 0, a)  label 1, logit z2
#
# On the shared feature h / g is the fraction of the lemma, with C = rho ||x|| = rho sqrt(1 + a^2). On its own feature
# the clean sample has s(z1 + C) / s(z1) > 1 and the noisy one (1 - s(z2 - C)) / (1 - s(z2)) > 1: only what is shared is
# masked.


@jax.jit
def two_samples(w, a, rho):
    """Emitted gradients of 1-SAM: raw, plain, and SANER's with all the masked removed."""
    one, zero = jnp.ones_like(a), jnp.zeros_like(a)
    x = jnp.stack([jnp.stack([one, a, zero]), jnp.stack([one, zero, a])])
    y = jnp.array([0.0, 1.0])
    gradient = jax.grad(linear_model.loss)

    def per_sample(tx):
        def update(x, y):
            def grad_fn(v):
                return gradient(v, x, y)

            return tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)[0]

        return jax.vmap(update, out_axes=None, axis_name="samples")(x, y)

    return (
        jnp.mean(jax.vmap(gradient, in_axes=(None, 0, 0))(w, x, y), axis=0),
        per_sample(saner_jax.sam(rho, axis_name="samples")),
        per_sample(saner_jax.saner(rho, alpha=1.0, axis_name="samples")),
    )


def gradients_at(z1, z2, shared, a, rho):
    """At weights whose logits are ``z1`` and ``z2``; ``shared`` is the weight of the shared feature."""
    with jax.enable_x64(True):
        w = jnp.array([shared, (z1 - shared) / a, (z2 - shared) / a])
        return map(np.asarray, two_samples(w, jnp.float64(a), jnp.float64(rho)))


@settings_
@given(z1=logits, z2=logits, shared=st.floats(-2, 2), a=st.floats(0.3, 2), rho=st.floats(0.05, 2))
def test_shared_feature_is_down_weighted_in_the_transitional_phase(z1, z2, shared, a, rho):
    c = rho * np.sqrt(1 + a**2)
    assume(z1 > z2 - c + 1e-3)
    g, h, saner = gradients_at(z1, z2, shared, a, rho)
    np.testing.assert_allclose(h[0] / g[0], lemma.fraction(z1, z2, c), rtol=1e-6)
    assert 0 < h[0] / g[0] < 1 and h[1] / g[1] > 1 and h[2] / g[2] > 1
    np.testing.assert_array_equal(saner, [0.0, h[1], h[2]])


@settings_
@given(z2=logits, below=st.floats(0.01, 4), shared=st.floats(-2, 2), a=st.floats(0.3, 2), rho=st.floats(0.05, 2))
def test_shared_feature_is_kept_outside_that_phase(z2, below, shared, a, rho):
    """Once the clean sample is fitted so much better that ``z1 < z2 - C``, its 1-SAM gradient grows more."""
    z1 = z2 - rho * np.sqrt(1 + a**2) - below
    g, h, saner = gradients_at(z1, z2, shared, a, rho)
    assert h[0] / g[0] > 1
    np.testing.assert_array_equal(saner, h)


def test_data_is_what_the_lemma_needs():
    data = linear_model.make_data(PROBLEM)
    x, k = np.asarray(data.x), data.noisy
    np.testing.assert_array_equal(np.flatnonzero(data.y != data.true), np.arange(k))
    np.testing.assert_array_equal(data.true[:k], data.true[k : 2 * k])
    assert 0 < np.mean(data.true[k:]) < 1  # clean samples of both classes
    # Each shared feature belongs to one mislabelled sample and its partner, whose inputs have one norm.
    for pair in range(k):
        holders = np.flatnonzero(x[:, data.shared][:, pair])
        np.testing.assert_array_equal(holders, [pair, k + pair])
    np.testing.assert_allclose(PROBLEM.rho * np.linalg.norm(x[: 2 * k], axis=1), linear_model.shift(PROBLEM), rtol=1e-6)


class Run(NamedTuple):
    """A training run, in float64."""

    data: linear_model.Data
    weights: np.ndarray
    fitted: linear_model.Fit
    gradients: linear_model.Gradients


@pytest.fixture(scope="module")
def runs(quick_compile):
    """A run of every method."""
    with jax.enable_x64(True):
        data = linear_model.make_data(PROBLEM)
        weights = {method: linear_model.train(method, PROBLEM, data) for method in linear_model.METHODS}
        return {
            method: Run(data, np.asarray(w), linear_model.fit(w, data), linear_model.gradients(w, data, PROBLEM.rho))
            for method, w in weights.items()
        }


def test_gradient_is_split_into_clean_and_noisy(runs):
    """At a shared feature of size b in n samples: ``b (1 - s(z2)) / n`` from the noisy one, ``-b s(z1) / n`` clean."""
    run, c = runs["1-SAM"].gradients, linear_model.shift(PROBLEM)
    scale, shared = PROBLEM.shared_size / PROBLEM.samples, runs["1-SAM"].data.shared
    for total, clean, up in ((run.g, run.clean_g, 0), (run.h, run.clean_h, c)):
        np.testing.assert_allclose(clean, -scale * lemma.logistic(run.z1 + up), rtol=1e-9)
        np.testing.assert_allclose(total[:, shared] - clean, scale * lemma.logistic(up - run.z2), rtol=1e-9)


def test_every_method_descends_what_is_measured(runs):
    """The run takes its groups from ``axis_name``, the measurement averages single samples: they agree."""
    for method, (_, weights, _, gradients) in runs.items():
        step = -np.diff(weights, axis=0) / PROBLEM.learning_rate
        g, h, r = (each[:-1] for each in (gradients.g, gradients.h, gradients.r))
        expected = {
            "SGD": g,
            "1-SAM": h,
            "1-SAM + SANER": np.where((r > 0) & (r < 1), 1 - PROBLEM.alpha, 1) * h,
        }[method]
        # From step 1 on: at zero weights g at the shared features is zero up to rounding, which the mask may follow.
        np.testing.assert_allclose(step[1:], expected[1:], rtol=0, atol=1e-12, err_msg=method)


def test_ratio_along_a_run_is_the_lemmas(runs):
    data, _, _, gradients = runs["1-SAM"]
    c, r = linear_model.shift(PROBLEM), gradients.r[1:, data.shared]
    z1, z2 = gradients.z1[1:], gradients.z2[1:]
    np.testing.assert_allclose(r, lemma.ratio(z1, z2, c), rtol=1e-6)
    np.testing.assert_array_equal((r > 0) & (r < 1), z1 > z2 - c)
    np.testing.assert_array_equal(r > 1, z1 < z2 - c)
    assert 0.1 < np.mean(r < 1) < 0.9  # the run leaves the region of the lemma


def test_transitional_phase(runs):
    data, _, fitted, gradients = runs["1-SAM"]
    phase = linear_model.transitional_phase(fitted, gradients, data)
    assert 10 < phase.last - phase.first < PROBLEM.steps
    assert fitted.memorized() == phase.last + 1
    assert np.all(fitted.clean[phase.steps] >= 0.99) and np.all(fitted.noisy[phase.steps] < 0.5)
    assert np.all(gradients.g[phase.steps, data.shared].mean(axis=1) > 0)
    # What the noise dominates shrinks, on every shared feature, from where the phase begins.
    assert np.all(gradients.r[phase.first : phase.first + 10, data.shared] < 1)


def test_a_run_without_such_a_phase_is_refused(runs):
    data, _, fitted, gradients = runs["1-SAM"]
    with pytest.raises(UserError, match="no transitional phase"):
        linear_model.transitional_phase(fitted._replace(clean=fitted.noisy), gradients, data)


@pytest.mark.parametrize(
    "noisy, step", [((0.5, 0.0, 0.2, 0.6, 0.4, 0.5), 5), ((0.5, 0.0, 0.2), None), ((0.5, 0.6, 0.7), 0)]
)
def test_memorized_is_the_step_from_which_half_are_fitted(noisy, step):
    noisy = np.array(noisy)
    assert linear_model.Fit(noisy, noisy, noisy).memorized() == step


def test_larger_perturbations_delay_memorization_and_small_ones_do_not():
    """What the README of the folder says of its table, on the small problem: no claim that 1-SAM always helps."""
    sgd = linear_model.memorization(PROBLEM, "SGD", 3)
    small, large = (
        linear_model.memorization(dataclasses.replace(PROBLEM, rho=rho, steps=400), "1-SAM", 3) for rho in (0.25, 2.0)
    )
    assert np.all(small[:, 0] <= sgd[:, 0]) and np.all(large[:, 0] > 1.2 * sgd[:, 0])
    # At the same fit of the noisy samples, 1-SAM's clean ones are ahead.
    assert np.all(sgd[:, 1] < small[:, 1]) and np.all(small[:, 1] < large[:, 1])


def test_command_prints_what_it_found_and_draws(tmp_path, capsys):
    arguments = "--samples 20 --noisy 6 --dimension 40 --steps 200 --seeds 1 --rhos 1.0 --output".split()
    command.run("linear_model", linear_model.main, [*arguments, str(tmp_path)])
    printed = capsys.readouterr().out
    assert "transitional phase from step 1" in printed and "1-SAM + SANER, rho 1" in printed
    assert (tmp_path / "linear_model.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--samples 10 --noisy 6", "--noisy is 6 of 10 samples"),
        ("--seeds 0", "--seeds must be at least 1"),
        ("--rho 0", "--rho and --rhos must be positive"),
    ],
)
def test_command_refuses_nonsense_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.run("linear_model", linear_model.main, arguments.split())
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
