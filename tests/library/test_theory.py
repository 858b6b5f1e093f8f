"""Lemma 3.1 and the linear model of the paper's section 3.2, by formula and through the library."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import saner_jax

settings_ = settings(max_examples=100, deadline=None, derandomize=True, database=None)
logits = st.floats(-8.0, -0.05)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def ratio(z1, z2, c):
    """The lemma's fraction."""
    return (1 - sigmoid(z1 + c) - sigmoid(z2 - c)) / (1 - sigmoid(z1) - sigmoid(z2))


def test_lemma_on_a_grid():
    z = -np.geomspace(1e-3, 20, 25)
    checked = 0
    for z1, z2, c in itertools.product(z, z, np.geomspace(1e-3, 20, 25)):
        if z1 > z2 - c + 1e-9 and c + z1 < 30:
            assert 0 < ratio(z1, z2, c) < 1, (z1, z2, c)
            checked += 1
    assert checked > 5000


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(z1=st.floats(-15, -1e-3), z2=st.floats(-15, -1e-3), above=st.floats(1e-3, 15))
def test_lemma_on_draws(z1, z2, above):
    c = max(z2 - z1, 0) + above
    assert 0 < ratio(z1, z2, c) < 1


@settings_
@given(z2=st.floats(-10, -1e-3), c=st.floats(1e-3, 5), below=st.floats(1e-3, 5))
def test_lemma_needs_its_condition(z2, c, below):
    """Where ``z1 < z2 - C`` the fraction is above 1: the condition is exactly where the mask ends."""
    assert ratio(z2 - c - below, z2, c) > 1


def logistic_gradient(w, x, y):
    """Gradient of the logistic loss of a linear model."""
    return (jax.nn.sigmoid(w @ x) - y) * x


vectors = st.lists(st.floats(-2, 2), min_size=4, max_size=4).map(np.array)


@jax.jit
def perturbation_of_sam(rho, w, x, y):
    seen = []

    def grad_fn(v):
        seen.append(v)
        return logistic_gradient(v, x, y)

    tx = saner_jax.sam(rho)
    tx.update(logistic_gradient(w, x, y), tx.init(w), w, grad_fn=grad_fn)
    (at,) = seen
    return at - w


@settings_
@given(w=vectors, x=vectors, y=st.integers(0, 1), rho=st.floats(0.01, 2))
def test_one_sam_perturbation_of_the_linear_model(w, x, y, rho):
    """``eps_i = rho (-1)^{y_i} x_i / ||x_i||``: away from the label's side, whatever the logit."""
    assume(np.linalg.norm(x) > 1e-3)
    with jax.enable_x64(True):
        eps = np.asarray(perturbation_of_sam(*map(jnp.float64, (rho, w, x, y))))
    np.testing.assert_allclose(eps, rho * (-1) ** y * x / np.linalg.norm(x), rtol=0, atol=1e-9)


# Two samples that share a feature and have opposite labels: what a noisy sample is to a clean one of its true class.
# Both have the true class 0, and logits below 0 say that the model knows: the clean one is labelled 0, the noisy one 1.
#
#     x1 = (1, a, 0)  label 0, logit z1        x2 = (1, 0, a)  label 1, logit z2
#
# On the shared feature the gradient is s(z1) + (s(z2) - 1). 1-SAM adds rho x1 / ||x1|| for the first and subtracts
# rho x2 / ||x2|| for the second, so the logits become z1 + C and z2 - C with C = rho ||x|| = rho sqrt(1 + a^2). Hence
# h / g on the shared feature is the fraction of the lemma: in (0, 1) while z1 > z2 - C. On its own feature the clean
# sample has s(z1 + C) / s(z1) > 1 and the noisy one (1 - s(z2 - C)) / (1 - s(z2)) > 1: only what is shared is masked.


@jax.jit
def two_samples(w, a, rho):
    """Emitted gradients of 1-SAM: raw, plain, and SANER's with all the masked removed."""
    one, zero = jnp.ones_like(a), jnp.zeros_like(a)
    x = jnp.stack([jnp.stack([one, a, zero]), jnp.stack([one, zero, a])])
    y = jnp.array([0.0, 1.0])

    def per_sample(tx):
        def update(x, y):
            def grad_fn(v):
                return logistic_gradient(v, x, y)

            return tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)[0]

        return jax.vmap(update, out_axes=None, axis_name="samples")(x, y)

    raw = jnp.mean(jax.vmap(lambda x, y: logistic_gradient(w, x, y))(x, y), axis=0)
    return (
        raw,
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
    np.testing.assert_allclose(h[0] / g[0], ratio(z1, z2, c), rtol=1e-6)
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
