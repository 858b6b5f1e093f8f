"""The same function in another arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.machinery import rounding

pytestmark = pytest.mark.usefixtures("quick_compile")
UNIT = 2.0**-rounding.TF32_MANTISSA_BITS


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (1.0, 1.0),
        (1 + UNIT, 1 + UNIT),
        (1 + UNIT / 4, 1.0),
        (1 + 3 * UNIT / 4, 1 + UNIT),
        # Half-way: to the even neighbour.
        (1 + UNIT / 2, 1.0),
        (1 + 3 * UNIT / 2, 1 + 2 * UNIT),
        (-(1 + 3 * UNIT / 2), -(1 + 2 * UNIT)),
        (2 - UNIT / 2, 2.0),
        (2.0**-100 * (1 + UNIT / 4), 2.0**-100),
        (np.inf, np.inf),
        (-np.inf, -np.inf),
        (0.0, 0.0),
    ],
)
def test_tf32_rounds_to_nearest_even(value, rounded):
    assert float(rounding.to_tf32(jnp.float32(value))) == rounded


def test_tf32_leaves_other_dtypes_and_not_a_number():
    assert jnp.isnan(rounding.to_tf32(jnp.float32(jnp.nan)))
    x = jnp.bfloat16(1.5)
    assert rounding.to_tf32(x) is x


def convolution(x, kernel):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions)


def classifier(weights, images, labels):
    """Convolution, ReLU, linear layer, cross-entropy: what the networks are made of."""
    kernel, linear = weights
    features = jax.nn.relu(convolution(images, kernel)).mean((1, 2))
    logits = jax.jit(lambda x: x @ linear)(features)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean()


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((3, 3, 2, 4)), rng.standard_normal((4, 3))
    images, labels = rng.standard_normal((5, 4, 4, 2)), np.array([0, 1, 2, 0, 1], np.int32)
    return *jax.tree.map(jnp.float32, (weights, images)), jnp.asarray(labels)


def test_operands_are_rounded_in_both_passes():
    """A product of two numbers has the other operand as its gradient: all three are seen rounded, inside jit too."""
    x, w = jnp.float32(1 + UNIT / 4).reshape(1, 1), jnp.float32(1 + 3 * UNIT / 4).reshape(1, 1)
    product = jax.jit(lambda x, w: (x @ w).sum())
    value, (dx, dw) = rounding.with_tf32_operands(jax.value_and_grad(product, argnums=(0, 1)))(x, w)
    assert (float(value), float(dx[0, 0]), float(dw[0, 0])) == (1 + UNIT, 1 + UNIT, 1.0)
    image, kernel = x.reshape(1, 1, 1, 1), w.reshape(1, 1, 1, 1)
    rounded = rounding.with_tf32_operands(jax.grad(lambda x, w: convolution(x, w).sum(), argnums=(0, 1)))
    assert [float(leaf.sum()) for leaf in rounded(image, kernel)] == [1 + UNIT, 1.0]


def test_functions_without_products_are_as_they_were(problem):
    weights = problem[0]
    function = jax.grad(lambda weights: sum(jnp.sum(jnp.tanh(w)) for w in weights))
    jax.tree.map(np.testing.assert_array_equal, rounding.with_tf32_operands(function)(weights), function(weights))


def test_float64_is_the_function_itself_in_float64(problem):
    gradient = jax.value_and_grad(classifier)
    with jax.enable_x64(True):
        weights, images, labels = problem
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), (weights, images))
        expected = jax.jit(gradient)(*wide, labels)
        computed = jax.jit(rounding.in_float64(gradient))(*problem)
        for a, b in zip(jax.tree.leaves(computed), jax.tree.leaves(expected), strict=True):
            assert a.dtype == b.dtype == np.float64
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-13, atol=1e-15)


def test_tf32_is_as_far_from_float64_as_its_mantissa_says(problem):
    gradient = jax.grad(classifier)
    with jax.enable_x64(True):
        exact = jax.device_get(jax.jit(rounding.in_float64(gradient))(*problem))
    rounded = jax.device_get(jax.jit(rounding.with_tf32_operands(gradient))(*problem))
    for a, b in zip(jax.tree.leaves(rounded), jax.tree.leaves(exact), strict=True):
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert 1e-5 < error < 4 * UNIT


def test_a_scan_is_evaluated_like_what_it_repeats():
    w = jnp.float32(1 + UNIT / 4).reshape(1, 1)

    def scanned(w, xs):
        total, products = jax.lax.scan(lambda total, x: (total + x @ w, x @ w), jnp.zeros((1, 1)), xs, reverse=True)
        return total.sum(), products

    xs = jnp.float32(1 + 3 * UNIT / 4) * jnp.arange(1.0, 4.0).reshape(3, 1, 1)
    total, products = rounding.with_tf32_operands(scanned)(w, xs)
    np.testing.assert_array_equal(products[:, 0, 0], [rounding.to_tf32(x[0, 0]) for x in xs])
    assert float(total) == float(products.sum())
    with jax.enable_x64(True):
        exact, _ = rounding.in_float64(jax.grad(scanned, has_aux=True))(w, xs)
        assert exact.dtype == np.float64
        np.testing.assert_allclose(exact, np.asarray(xs, float).sum(0), rtol=1e-15)


def test_a_loop_is_evaluated_until_its_condition_says_so():
    def multiplied(x, most, factor):
        """Return x times the factor until it is above `most`, and how often."""
        return jax.lax.while_loop(
            lambda state: state[0][0, 0] <= most, lambda state: (state[0] @ factor, state[1] + 1), (x, 0)
        )

    x = jnp.float32(1 + UNIT / 4).reshape(1, 1)
    found, steps = rounding.with_tf32_operands(multiplied)(x, jnp.float32(1.5), 2 * x)
    assert (float(found[0, 0]), int(steps)) == (2.0, 1)
    with jax.enable_x64(True):
        exact, steps = rounding.in_float64(multiplied)(x, jnp.float32(1.5), 2 * x)
        assert exact.dtype == np.float64 and int(steps) == 1
        assert float(exact[0, 0]) == 2 * (1 + UNIT / 4) ** 2


# Without 64 bits JAX says that it rounds, which is what the refusal here is about.
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64:UserWarning")
def test_what_cannot_be_done_is_said():
    def branching(x):
        return jax.lax.cond(x[0, 0] < 2, lambda y: y @ y, lambda y: y, x)

    with pytest.raises(NotImplementedError, match="a matrix product inside"):
        rounding.with_tf32_operands(branching)(jnp.eye(2))
    with pytest.raises(NotImplementedError, match="reduce_precision of float32"):
        rounding.in_float64(lambda x: jax.lax.reduce_precision(x, 8, 10))(jnp.float32(1))


def test_bits_stay_those_of_float32():
    def scaled(x):
        """Divide by three, then by the power of two below."""
        third = x / 3
        exponent = jax.lax.bitcast_convert_type(third, jnp.int32) >> 23
        return third * jax.lax.bitcast_convert_type((254 - exponent) << 23, jnp.float32)

    x = np.array([1.0, 10.0, 7e-20], np.float32)
    with jax.enable_x64():
        found = rounding.in_float64(scaled)(x)
    assert found.dtype == np.float64
    expected = x.astype(np.float64) / 3
    # XLA may multiply by the reciprocal of a constant, which rounds once more.
    np.testing.assert_allclose(found, expected / 2.0 ** np.floor(np.log2(expected)), rtol=4e-16)


def test_draws_are_those_of_float32():
    def draw(key):
        return jax.random.uniform(key, (100,), jnp.float32)

    with jax.enable_x64():
        found = rounding.in_float64(draw)(jax.random.key(0))
    np.testing.assert_array_equal(found, draw(jax.random.key(0)))
