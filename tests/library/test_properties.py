"""Properties over drawn inputs: the norm of ``eps``, the mask bit for bit, SANER against SAM, permutations, scales."""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import saner_jax

examples = functools.partial(settings, deadline=None, derandomize=True, database=None)
# Of many pairs at once a failure names those that are wrong; to make the list smaller would take minutes.
as_drawn = functools.partial(examples, phases=[Phase.generate])
seeds = st.integers(0, 2**32 - 1)
radii = st.floats(2**-10, 8, width=32)

METHODS = {
    "sam": saner_jax.sam,
    "asam": saner_jax.asam,
    "gsam": saner_jax.gsam,
    "fsam": saner_jax.fsam,
    "vasso": saner_jax.vasso,
    "saner": saner_jax.saner,
    "sgd_d": saner_jax.sgd_d,
}


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])


def normal_tree(seed, scale=1.0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = [(2, 3), (), (5,), (1, 2, 2)]
    a, b, c, d = ((scale * rng.normal(size=shape)).astype(dtype) for shape in shapes)
    return {"a": a, "b": [b, (c, d)]}


# --- the perturbation ---------------------------------------------------------------------------------------------


def perturbation(tx, params, grads, state=None):
    """``eps``, seen from the only place that can see it: the argument of ``grad_fn``. At ``w = 0`` nothing is lost."""
    seen = []

    def grad_fn(w):
        seen.append(w)
        return jax.tree.map(jnp.ones_like, w)

    _, state = tx.update(grads, tx.init(params) if state is None else state, params, grad_fn=grad_fn)
    (at,) = seen
    return jax.tree.map(lambda x, w: x - w, at, params), state


perturbation_of_sam = jax.jit(lambda rho, p, g: perturbation(saner_jax.sam(rho), p, g)[0])
perturbation_of_vasso = jax.jit(lambda rho, p, g: perturbation(saner_jax.vasso(rho, theta=0.5), p, g)[0])
perturbation_of_fsam = jax.jit(lambda rho, p, g: perturbation(saner_jax.fsam(rho), p, g)[0])


@jax.jit
def stage_of_sam(rho, grads):
    stage = saner_jax.scale_to_norm(rho)
    return stage.update(grads, stage.init(grads), grads)[0]


@jax.jit
def stage_of_asam(rho, grads, params):
    stage = saner_jax.scale_to_adaptive_norm(rho, eta=0.1)
    return stage.update(grads, stage.init(params), params)[0]


@pytest.mark.parametrize(
    "of", [perturbation_of_sam, perturbation_of_vasso, perturbation_of_fsam], ids=["sam", "vasso", "fsam"]
)
@examples(max_examples=60)
@given(seed=seeds, exponent=st.floats(-33, 37), rho=radii)
def test_norm_of_eps_is_rho(of, seed, exponent, rho):
    grads = normal_tree(seed)
    scale = 10.0**exponent / np.linalg.norm(flat(grads))
    grads = jax.tree.map(lambda g: (g * scale).astype(np.float32), grads)
    eps = flat(of(rho, jax.tree.map(np.zeros_like, grads), grads))
    np.testing.assert_allclose(np.linalg.norm(eps), rho, rtol=1e-5)
    # Along the gradient, uphill.
    np.testing.assert_allclose(eps, rho * flat(grads) / np.linalg.norm(flat(grads)), rtol=1e-4, atol=1e-6 * rho)


@examples(max_examples=40)
@given(seed=seeds, exponent=st.floats(-15, 15), rho=radii)
def test_norm_of_asam_in_its_own_metric_is_rho(seed, exponent, rho):
    """``||eps / T|| = rho``, and ``eps`` is ``T^2 g`` up to a positive factor."""
    params, grads = normal_tree(seed), normal_tree(seed + 1)
    scale = 10.0**exponent / np.linalg.norm(flat(grads))
    grads = jax.tree.map(lambda g: (g * scale).astype(np.float32), grads)
    eps = flat(stage_of_asam(rho, grads, params))
    metric = np.abs(flat(params)) + 0.1
    np.testing.assert_allclose(np.linalg.norm(eps / metric), rho, rtol=1e-5)
    expected = metric**2 * flat(grads) / np.linalg.norm(metric * flat(grads))
    np.testing.assert_allclose(eps, rho * expected, rtol=1e-4, atol=1e-6 * rho)


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_eps_is_right_where_the_square_leaves_float32(name, jit):
    """``eps`` depends on the direction of the gradient alone, whatever its norm; a zero gradient gives 0."""
    grads = normal_tree(0)
    ones = jax.tree.map(np.ones_like, grads)

    def of(grads):
        return perturbation(METHODS[name](), ones, grads)[0]

    of = jax.jit(of) if jit else of
    expected = flat(of(grads))
    assert np.max(np.abs(expected)) > 0.01
    for norm in (1e-33, 1e-30, 1e-25, 1e19, 1e25, 1e37, 2e38):
        scaled = jax.tree.map(lambda g, norm=norm: (g * (norm / np.linalg.norm(flat(grads)))).astype(np.float32), grads)
        np.testing.assert_allclose(flat(of(scaled)), expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(flat(of(jax.tree.map(np.zeros_like, grads))), 0.0)


@examples(max_examples=40)
@given(seed=seeds, exponent=st.floats(-300, 300), rho=radii)
def test_norm_of_eps_is_rho_in_float64(seed, exponent, rho):
    with jax.enable_x64(True):
        grads = normal_tree(seed, dtype=np.float64)
        grads = jax.tree.map(lambda g: g * (10.0**exponent / np.linalg.norm(flat(grads))), grads)
        np.testing.assert_allclose(np.linalg.norm(flat(stage_of_sam(rho, grads))), rho, rtol=1e-12)


@functools.cache
def one_step_in_a_bowl(name):
    tx = METHODS[name]()

    def grad_fn(w):
        return jax.tree.map(lambda x: 3 * x, w)

    return jax.jit(lambda params, grads: tx.update(grads, tx.init(params), params, grad_fn=grad_fn)[0])


@examples(max_examples=30)
@given(seed=seeds, bad=st.sampled_from([np.nan, np.inf, -np.inf]), where=st.integers(0, 15))
@pytest.mark.parametrize("name", METHODS)
def test_non_finite_gradient_is_never_turned_finite(name, seed, bad, where):
    """The element is non-finite in what comes out, when the loss is an ordinary one (here a bowl)."""
    params = normal_tree(seed)
    vector, unravel = ravel_pytree(normal_tree(seed + 1))
    grads = unravel(vector.at[where].set(bad))
    assert not np.isfinite(flat(one_step_in_a_bowl(name)(params, grads))[where])


# --- the mask -----------------------------------------------------------------------------------------------------

WIDTH = 32
FLOATS = {
    "float32": (np.float32, 32),
    "float64": (np.float64, 64),
    "bfloat16": (ml_dtypes.bfloat16, 32),
}


def specials(dtype):
    info = ml_dtypes.finfo(dtype)
    tiny, largest = float(info.smallest_normal), float(info.max)
    positive = [0.0, tiny, tiny / 2, tiny * 1.5, tiny * 2, 1e-19, 1e-8, 1.0, 1e8, 1e19, largest / 2, largest, np.inf]
    return [sign * x for x in positive for sign in (1.0, -1.0)] + [np.nan]


def neighbours(x, dtype):
    """Where masks are decided: the number, those next to it, its negative, half and twice of it, and zeros."""
    x = np.asarray(x, dtype)
    with np.errstate(all="ignore"):
        bits = x.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[x.dtype.itemsize])
        one = np.asarray(1, bits.dtype)
        near = [bits, bits + one, bits - one]
        return [float(b.view(dtype)) for b in near] + [float(v) for v in (-x, x / 2, x * 2)] + [0.0, -0.0]


def pairs(name):
    """Pairs ``(g, h)`` of floats of one type, close to each other as often as not."""
    dtype, width = FLOATS[name]

    def rounded(x):
        with np.errstate(all="ignore"):
            return float(np.asarray(x, dtype))

    anything = st.one_of(st.floats(width=width), st.sampled_from(specials(dtype))).map(rounded)
    close = st.tuples(anything, st.integers(0, 7)).map(lambda drawn: (drawn[0], neighbours(drawn[0], dtype)[drawn[1]]))
    return st.lists(st.one_of(close, st.tuples(anything, anything)), min_size=WIDTH, max_size=WIDTH)


def exactly_masked(g, h, tiny):
    """``0 < h / g < 1`` in exact arithmetic. Subnormals count as zero; NaN is never masked; infinity is larger."""
    if np.isnan(g) or np.isnan(h) or np.isinf(h) or abs(g) < tiny or abs(h) < tiny:
        return False
    if np.isinf(g):
        return (g > 0) == (h > 0)
    return 0 < Fraction(h) / Fraction(g) < 1


def exact_group(g, h, tiny):
    """The name of the group of ``h / g`` in exact arithmetic, by the same rules; None where there is none."""
    if np.isnan(g) or np.isnan(h) or abs(g) < tiny or abs(h) < tiny:
        return None
    if (g > 0) != (h > 0):
        return "turned"
    return None if g == h else "downweighted" if abs(h) < abs(g) else "grown"


@pytest.mark.parametrize("name", FLOATS)
def test_groups_of_the_ratio_are_exact(name):
    dtype, _ = FLOATS[name]
    tiny = float(ml_dtypes.finfo(dtype).smallest_normal)
    predicates = {
        "turned": saner_jax.is_turned,
        "downweighted": saner_jax.is_downweighted,
        "grown": saner_jax.is_grown,
    }
    found = jax.jit(lambda h, g: {group: predicate(h, g) for group, predicate in predicates.items()})
    counted = dict.fromkeys(("turned", "downweighted", "grown", None), 0)

    @as_drawn(max_examples=60)
    @given(pairs(name))
    def check(drawn):
        g, h = np.array(drawn, np.float64).T
        groups = [exact_group(*pair, tiny) for pair in drawn]
        with jax.enable_x64(name == "float64"):
            masks = found(jnp.asarray(h.astype(dtype)), jnp.asarray(g.astype(dtype)))
        for group, mask in masks.items():
            np.testing.assert_array_equal(mask, [group == exact for exact in groups])
        for group in groups:
            counted[group] += 1

    check()
    assert min(counted.values()) > 30


@functools.cache
def downweighted(alpha, name):
    stage = saner_jax.downweight(alpha)
    return jax.jit(lambda g, h: stage.update(h, stage.init(g), g, unperturbed_grads=g)[0])


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("name", FLOATS)
def test_mask_is_exact(name, jit):
    """Seen through ``alpha = 1``, which removes what is masked, and ``alpha = 0.5``, which is exact in binary."""
    dtype, _ = FLOATS[name]
    info = ml_dtypes.finfo(dtype)
    tiny = float(info.smallest_normal)
    counted = {True: 0, False: 0}

    @as_drawn(max_examples=60 if jit else 10)
    @given(pairs(name))
    def check(drawn):
        g, h = np.array(drawn, np.float64).T
        masked = np.array([exactly_masked(*pair, tiny) for pair in drawn])
        with jax.enable_x64(name == "float64"), jax.disable_jit(not jit):
            arrays = jnp.asarray(g.astype(dtype)), jnp.asarray(h.astype(dtype))
            removed, halved = (downweighted(alpha, name)(*arrays) for alpha in (1.0, 0.5))
        assert removed.dtype == halved.dtype == arrays[0].dtype
        removed, halved = np.asarray(removed).astype(np.float64), np.asarray(halved).astype(np.float64)
        regular = ~(np.abs(h) < tiny)  # a zero or subnormal h may leave as it came or as zero
        np.testing.assert_array_equal(removed[masked], 0.0)
        np.testing.assert_array_equal(removed[~masked & regular], h[~masked & regular])
        np.testing.assert_array_equal(halved[~masked & regular], h[~masked & regular])
        half_is_regular = masked & (np.abs(h) >= 2 * tiny)
        np.testing.assert_array_equal(halved[half_is_regular], h[half_is_regular] / 2)
        assert np.all(np.abs(removed[~regular]) < tiny) and np.all(np.abs(halved[~regular]) < tiny)
        for value in masked:
            counted[bool(value)] += 1

    check()
    assert min(counted.values()) > 30


@pytest.mark.parametrize("name", FLOATS)
def test_restored_where_masked_is_g(name):
    """SGD-D on drawn pairs: ``g`` exactly where the mask is, ``h`` elsewhere."""
    dtype, _ = FLOATS[name]
    tiny = float(ml_dtypes.finfo(dtype).smallest_normal)
    stage = saner_jax.restore_downweighted()
    restored = jax.jit(lambda g, h: stage.update(h, stage.init(g), g, unperturbed_grads=g)[0])

    @as_drawn(max_examples=20)
    @given(pairs(name))
    def check(drawn):
        g, h = np.array(drawn, np.float64).T
        masked = np.array([exactly_masked(*pair, tiny) for pair in drawn])
        with jax.enable_x64(name == "float64"):
            out = np.asarray(restored(jnp.asarray(g.astype(dtype)), jnp.asarray(h.astype(dtype)))).astype(np.float64)
        regular = ~(np.abs(h) < tiny)
        np.testing.assert_array_equal(out[regular], np.where(masked, g, h)[regular])
        assert np.all(np.abs(out[~regular]) < tiny)

    check()


# --- SANER against SAM --------------------------------------------------------------------------------------------


@jax.jit
def sam_and_saner(alpha, params, grads, perturbed):
    def grad_fn(w):
        return perturbed

    return [
        tx.update(grads, tx.init(params), params, grad_fn=grad_fn)[0]
        for tx in (saner_jax.sam(0.1), saner_jax.saner(0.1, alpha))
    ]


@examples(max_examples=100)
@given(seed=seeds, alpha=st.floats(-2, 2, width=32))
def test_saner_differs_from_sam_on_the_masked_elements_alone(seed, alpha):
    params, g, h = (normal_tree(seed + i) for i in range(3))
    sam, saner = map(flat, sam_and_saner(alpha, params, g, h))
    masked = (0 < flat(h) / flat(g)) & (flat(h) / flat(g) < 1)
    np.testing.assert_array_equal(sam, flat(h))
    np.testing.assert_array_equal(saner[~masked], sam[~masked])
    np.testing.assert_allclose(saner[masked], (1 - alpha) * sam[masked], rtol=1e-6, atol=1e-7)


@examples(max_examples=30)
@given(seed=seeds, alpha=st.floats(-2, 2, width=32))
@pytest.mark.parametrize("name", ["sam", "asam", "gsam", "fsam", "vasso"])
def test_reweight_differs_from_its_method_on_the_masked_elements_alone(name, seed, alpha):
    """On every method, the mask compares its final gradient with the raw one."""
    params, g, h = (normal_tree(seed + i) for i in range(3))
    plain, reweighted = map(flat, method_and_reweighted(name)(alpha, params, g, h))
    masked = (0 < plain / flat(g)) & (plain / flat(g) < 1)
    np.testing.assert_array_equal(reweighted[~masked], plain[~masked])
    np.testing.assert_allclose(reweighted[masked], (1 - alpha) * plain[masked], rtol=1e-6, atol=1e-7)


@functools.cache
def method_and_reweighted(name):
    method = METHODS[name]

    @jax.jit
    def both(alpha, params, grads, perturbed):
        return [
            tx.update(grads, tx.init(params), params, grad_fn=lambda w: perturbed)[0]
            for tx in (method(), method(reweight=saner_jax.downweight(alpha)))
        ]

    return both


# --- symmetries ---------------------------------------------------------------------------------------------------


def leaf_losses(params, data):
    """A loss that couples all leaves and is the same whatever their order, each with its own data."""
    return jnp.tanh(sum(jnp.sum(jnp.sin(p * x)) for p, x in zip(params, data, strict=True))) ** 2 + sum(
        jnp.sum((p - x) ** 2) for p, x in zip(params, data, strict=True)
    )


@functools.cache
def two_steps_of(name):
    """Two steps, so that moving averages take part."""
    tx = METHODS[name](rho=0.3)

    @jax.jit
    def updates(params, data):
        def grad_fn(w):
            return jax.grad(leaf_losses)(w, data)

        first, state = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
        params = jax.tree.map(lambda p, u: p - 0.05 * u, params, first)
        second, _ = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return first, second

    return updates


@pytest.mark.parametrize("name", METHODS)
@examples(max_examples=12)
@given(seed=seeds, order=st.permutations(range(3)))
def test_permuting_leaves_permutes_updates(name, seed, order):
    """To rounding: a sum in another order."""
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):  # In float32 rounding decides a mask bit now and then.
        params, data = ([jnp.asarray(rng.normal(size=(4,))) for _ in range(3)] for _ in range(2))
        straight = two_steps_of(name)(params, data)
        permuted = two_steps_of(name)([params[i] for i in order], [data[i] for i in order])
        for a, b in zip(straight, permuted, strict=True):
            for position, i in enumerate(order):
                np.testing.assert_allclose(b[position], a[i], rtol=0, atol=1e-11)


@functools.cache
def asam_without_eta(reweight):
    tx = saner_jax.asam(rho=0.3, eta=0.0, reweight=saner_jax.downweight(0.5) if reweight else None)

    @jax.jit
    def step(scales, params, data):
        """One step on ``L(w / scales)`` from ``params * scales``: the same function, otherwise parametrized."""
        seen = []

        def grad_fn(w):
            seen.append(w)
            return jax.grad(lambda w: leaf_losses([x / s for x, s in zip(w, scales, strict=True)], data))(w)

        start = [p * s for p, s in zip(params, scales, strict=True)]
        grads = grad_fn(start)
        updates, _ = tx.update(grads, tx.init(start), start, grad_fn=grad_fn)
        return [x / s for x, s in zip(seen[1], scales, strict=True)], [
            u * s for u, s in zip(updates, scales, strict=True)
        ]

    return step


@pytest.mark.parametrize("reweight", [False, True])
@examples(max_examples=40)
@given(seed=seeds, exponents=st.lists(st.integers(-6, 6), min_size=3, max_size=3))
def test_asam_without_eta_is_invariant_to_rescaling_weights(reweight, seed, exponents):
    """``w -> c w`` per leaf, the loss compensated: the perturbed point is the same, so are ``eps / w`` and the mask.

    Powers of two scale without rounding.
    """
    rng = np.random.default_rng(seed)
    params, data = ([jnp.asarray(rng.normal(size=(4,)), jnp.float32) for _ in range(3)] for _ in range(2))
    at, updates = asam_without_eta(reweight)([jnp.float32(1)] * 3, params, data)
    scaled_at, scaled_updates = asam_without_eta(reweight)([jnp.float32(2.0**e) for e in exponents], params, data)
    np.testing.assert_allclose(flat(scaled_at), flat(at), rtol=0, atol=1e-6)
    np.testing.assert_allclose(flat(scaled_updates), flat(updates), rtol=0, atol=1e-5 * np.max(np.abs(flat(updates))))
    assert np.max(np.abs(flat(at) - flat(params))) > 0.01


def test_asam_without_eta_at_zero_weights_moves_nothing():
    """``T = 0`` everywhere: ``eps = 0``, not NaN."""
    grads = normal_tree(0)
    of = jax.jit(lambda params, grads: perturbation(saner_jax.asam(eta=0.0), params, grads)[0])
    np.testing.assert_array_equal(flat(of(jax.tree.map(np.zeros_like, grads), grads)), 0.0)
    assert np.all(flat(of(grads, grads)) != 0.0)


def test_moving_averages_follow_the_raw_gradient():
    """Step by step in closed form: FSAM and VaSSO on gradients that change direction."""
    params = {"w": jnp.zeros(2)}
    gradients = [np.array(x, np.float32) for x in ([1.0, 0.0], [0.0, 2.0], [3.0, 1.0])]
    directions = {
        "fsam": (
            saner_jax.fsam(rho=1.0, sigma=0.5, decay=0.75),
            # m: g0; 0.75 g0 + 0.25 g1
            [gradients[0], gradients[1] - 0.5 * gradients[0], gradients[2] - 0.5 * np.array([0.75, 0.5])],
        ),
        "vasso": (
            saner_jax.vasso(rho=1.0, theta=0.25),
            # d: g0; 0.75 g0 + 0.25 g1; 0.75 of that + 0.25 g2
            [gradients[0], np.array([0.75, 0.5]), np.array([0.5625 + 0.75, 0.375 + 0.25])],
        ),
    }
    for tx, expected in directions.values():
        state = tx.init(params)
        for g, d in zip(gradients, expected, strict=True):
            eps, state = perturbation(tx, params, {"w": g}, state)
            np.testing.assert_allclose(eps["w"], d / np.linalg.norm(d), rtol=1e-6)


def test_any_optax_transformation_can_be_the_ascent():
    """Ascending sign, and nothing added: what the ascent returns is the perturbation."""
    params, grads = normal_tree(0), normal_tree(1)
    eps, _ = perturbation(saner_jax.sharpness_aware(optax.scale(0.25)), jax.tree.map(np.zeros_like, params), grads)
    np.testing.assert_array_equal(flat(eps), 0.25 * flat(grads))
