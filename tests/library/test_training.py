"""Training for real: known optima and stationary points, a small network, the named reductions, one ``lax.scan``."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import saner_jax

pytestmark = pytest.mark.usefixtures("quick_compile")

METHODS = {
    "sam": saner_jax.sam,
    "asam": saner_jax.asam,
    "gsam": saner_jax.gsam,
    "fsam": saner_jax.fsam,
    "vasso": saner_jax.vasso,
    "saner": saner_jax.saner,
    "sgd_d": saner_jax.sgd_d,
}


def train(first, rest, gradient, params, steps):
    """The whole training in one ``lax.scan``."""
    tx = optax.chain(first, rest)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(gradient(params), state, params, grad_fn=gradient)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=steps)
    return params


# --- logistic regression: convex, full batch, labels that no line separates ---------------------------------------

DECAY = 0.05


def samples():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4))
    y = (x @ np.array([2.0, -1.0, 0.5, 0.0]) + rng.normal(size=60) > 0).astype(np.float64)
    return x, y


def data_gradient(w):
    x, y = samples()
    return x.T @ (1 / (1 + np.exp(-x @ w)) - y) / len(y)


def root(function, w):
    """Newton's method with a Jacobian by central differences."""
    for _ in range(30):
        columns = [(function(w + 1e-5 * e) - function(w - 1e-5 * e)) / 2e-5 for e in np.eye(len(w))]
        w = w - np.linalg.solve(np.stack(columns, axis=1), function(w))
    assert np.max(np.abs(function(w))) < 1e-9
    return w


def optimum():
    """Of the mean logistic loss plus ``DECAY / 2 ||w||^2``."""
    return root(lambda w: data_gradient(w) + DECAY * w, np.zeros(4))


def loss(params):
    x, y = samples()
    z = x @ jnp.append(params["w"], params["b"])
    return jnp.mean(jnp.logaddexp(0.0, z) - y * z)


# Settings under which every method has the stationary point that is worked out below.
CONVEX = METHODS | {
    "fsam": functools.partial(saner_jax.fsam, sigma=0.5),
    "gsam": functools.partial(saner_jax.gsam, alpha=0.4),
    "asam": functools.partial(saner_jax.asam, eta=0.1),
}
STEPS = 600
FALLING = np.maximum(0.5 * (1 - np.arange(STEPS) / 300), 0.0)
CONSTANT = np.full(STEPS, 0.2)


@functools.cache
def fit(name):
    """Weight decay after the method, as in the paper, then momentum. Takes rho for every step: compiled just once."""
    rest = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(0.4, momentum=0.8))

    def fitted(rhos):
        first = CONVEX[name](rho=lambda step: rhos[step])
        return train(first, rest, jax.grad(loss), {"w": jnp.zeros(3), "b": jnp.zeros(())}, STEPS)

    return jax.jit(fitted)


def weights(params):
    return np.append(params["w"], params["b"])


@pytest.mark.parametrize("name", CONVEX)
def test_optimum_of_logistic_regression_as_rho_falls_to_zero(name):
    """At rho = 0 every method is the base optimizer, whatever it did before: what stays is the loss's own optimum.

    At exactly 0: after it has fallen to rounding (1e-8, of either sign) SANER's mask would be decided by rounding.
    """
    with jax.enable_x64(True):
        np.testing.assert_allclose(weights(fit(name)(FALLING)), optimum(), rtol=0, atol=1e-7)


def along(d, rho):
    return rho * d / np.linalg.norm(d)


def sam_gradient(w):
    return data_gradient(w + along(data_gradient(w), 0.2))


def asam_gradient(w):
    scale = np.abs(w) + 0.1
    return data_gradient(w + scale * along(scale * data_gradient(w), 0.2))


def gsam_gradient(w):
    g, h = data_gradient(w), sam_gradient(w)
    return h - 0.4 * (g - (g @ h) / (h @ h) * h)


STATIONARY = {
    "sam": sam_gradient,
    "asam": asam_gradient,
    "gsam": gsam_gradient,
    "vasso": sam_gradient,  # where nothing moves any more, the moving average is the gradient,
    "fsam": sam_gradient,  # and half of it has its direction.
    "saner": sam_gradient,  # The decay holds the weights below the minimum, where going further up the loss finds more
    "sgd_d": sam_gradient,  # gradient in every element: nothing is masked.
}


@pytest.mark.parametrize("name", STATIONARY)
def test_stationary_point_of_each_method(name):
    """At constant rho a method settles where its own gradient balances the decay: off the optimum, by about rho."""
    expected = root(lambda w: STATIONARY[name](w) + DECAY * w, optimum())
    with jax.enable_x64(True):
        np.testing.assert_allclose(weights(fit(name)(CONSTANT)), expected, rtol=0, atol=1e-7)
    assert 0.05 < np.linalg.norm(expected - optimum()) < 1.0


# --- a small network ----------------------------------------------------------------------------------------------


def network():
    keys = jax.random.split(jax.random.key(0), 2)
    return {"hidden": jax.random.normal(keys[0], (3, 16)), "out": jax.random.normal(keys[1], (17,)) / 4}


def exclusive_or(params):
    """Mean logistic loss on four corners that no linear model separates; the last row of each layer is its bias."""
    x = jnp.array([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    y = jnp.array([0.0, 1.0, 1.0, 0.0])
    hidden = jnp.tanh(x @ params["hidden"])
    z = hidden @ params["out"][:16] + params["out"][16]
    return jnp.mean(jnp.logaddexp(0.0, z) - y * z)


@pytest.mark.parametrize("name", METHODS)
def test_small_network_learns(name):
    """Its optimum is a loss of 0; random guessing is 0.69."""
    rho = {"asam": 0.2}.get(name, 0.05)
    first, rest = METHODS[name](rho=rho), optax.sgd(0.3, momentum=0.9)
    params = jax.jit(lambda p: train(first, rest, jax.grad(exclusive_or), p, 400))(network())
    assert exclusive_or(params) < 0.01


def test_one_scan_equals_a_loop_over_jitted_steps():
    tx = optax.chain(saner_jax.fsam(reweight=saner_jax.downweight(0.5)), optax.sgd(0.1, momentum=0.9))
    gradient = jax.grad(exclusive_or)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(gradient(params), state, params, grad_fn=gradient)
        return optax.apply_updates(params, updates), state

    params = network()
    state = tx.init(params)
    for _ in range(15):
        params, state = step(params, state)
    first = saner_jax.fsam(reweight=saner_jax.downweight(0.5))
    in_scan = jax.jit(lambda p: train(first, optax.sgd(0.1, momentum=0.9), gradient, p, 15))(network())
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(in_scan), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# --- named reductions ---------------------------------------------------------------------------------------------


gradient_of_network = jax.jit(jax.grad(exclusive_or))


def trajectory(tx, needs_grad_fn=True):
    """Parameters of the network after each of five steps of ``tx``, which holds the whole chain.

    Without an outer jit: a compiler may fuse the two passes, or two methods, differently and so differ in the last bit.
    """

    def grad_fn(params, step_of_optax_sam=None):
        return gradient_of_network(params)

    params = network()
    state = tx.init(params)
    points = []
    for _ in range(5):
        keywords = {"grad_fn": grad_fn} if needs_grad_fn else {}
        updates, state = tx.update(grad_fn(params), state, params, **keywords)
        params = optax.apply_updates(params, updates)
        points.append(np.concatenate([np.ravel(p) for p in jax.tree.leaves(params)]))
    return np.stack(points)


def with_sgd(method):
    return optax.chain(method, optax.sgd(0.2, momentum=0.9))


def reweighted(name):
    return lambda **keywords: METHODS[name](reweight=saner_jax.downweight(0.5), **keywords)


RHO_ZERO = METHODS | {f"{name}+saner": reweighted(name) for name in ("asam", "fsam", "vasso")}


# Bit for bit, except that GSAM subtracts a g_perp which is zero up to rounding only. (For the same reason GSAM with
# SANER is left out: there h = g up to rounding, which then decides what counts as 0 < r < 1.)
@pytest.mark.parametrize("name", RHO_ZERO)
def test_rho_zero_is_the_base_optimizer(name):
    base = trajectory(optax.sgd(0.2, momentum=0.9), needs_grad_fn=False)
    tolerance = {"gsam": 1e-6}.get(name, 0.0)
    np.testing.assert_allclose(trajectory(with_sgd(RHO_ZERO[name](rho=0.0))), base, rtol=0, atol=tolerance)


def no_leaf(params):
    return jax.tree.map(lambda _: False, params)


SAM_AGAIN = {
    "saner, alpha 0": saner_jax.saner(0.1, alpha=0.0),
    "gsam, alpha 0": saner_jax.gsam(0.1, alpha=0.0),
    "fsam, sigma 0": saner_jax.fsam(0.1, sigma=0.0),
    "vasso, theta 1": saner_jax.vasso(0.1, theta=1.0),
    "asam, T = 1 everywhere": saner_jax.asam(0.1, adaptive_mask=no_leaf),
    "reweighting no leaf": saner_jax.sam(0.1, reweight=saner_jax.downweight(0.5, mask=no_leaf)),
    "the stage in the wrapper": saner_jax.sharpness_aware(saner_jax.scale_to_norm(0.1)),
}


@pytest.mark.parametrize("name", SAM_AGAIN)
def test_method_reduces_to_sam(name):
    np.testing.assert_array_equal(trajectory(with_sgd(SAM_AGAIN[name])), trajectory(with_sgd(saner_jax.sam(0.1))))


def test_sam_is_optax_contrib_sam_in_opaque_mode():
    """To rounding: it divides by the norm first and multiplies by rho afterwards."""
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
    theirs = optax.contrib.sam(optax.sgd(0.2, momentum=0.9), adversary, opaque_mode=True)
    np.testing.assert_allclose(trajectory(with_sgd(saner_jax.sam(0.1))), trajectory(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "sam"])
def test_no_other_method_is_sam(name):
    """What the reductions would not notice if every method were SAM."""
    ours, sam = (trajectory(with_sgd(method(rho=0.5))) for method in (METHODS[name], saner_jax.sam))
    assert np.max(np.abs(ours - sam)) > 1e-3
