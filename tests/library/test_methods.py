"""Every public method against its float64 NumPy reference, step by step, with weight decay and momentum after it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import saner_jax
from tests import references as ref

pytestmark = pytest.mark.usefixtures("quick_compile")

STEPS = 21
WEIGHT_DECAY, LEARNING_RATE, MOMENTUM = 5e-4, 0.03, 0.9
ALPHAS = (-0.5, 0, 0.25, 0.5, 1)
RHO = 0.4  # Large: many ratios outside (0, 1), so that the mask has both values on every step.

# Not small in float32 alone: rounding grows over the steps. What two correct runs may differ by, of the largest entry.
TOLERANCE = {np.float64: 1e-10, np.float32: 1e-5}
TREE_SEED = {np.float64: 9, np.float32: 18}


def random_tree(rng, depth=3):
    """Dicts, tuples and lists nested in each other, with one leaf of 0 to 3 dimensions each."""
    leaf = rng.normal(size=tuple(rng.integers(1, 4, rng.integers(0, 4))))
    if depth == 0:
        return leaf
    children = [random_tree(rng, depth - 1), leaf][:: rng.choice([1, -1])]
    return [list, tuple, lambda leaves: dict(zip("ba", leaves, strict=True))][rng.integers(3)](children)


def as_type(tree, dtype):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def matrices(params):
    """A mask over leaves: those of two and more dimensions."""
    return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)


def not_matrices(params):
    return jax.tree.map(lambda p: jnp.ndim(p) <= 1, params)


def flat(mask, params):
    """A mask over leaves as a bool vector over elements."""
    return np.concatenate(
        [np.full(np.size(p), m) for p, m in zip(jax.tree.leaves(params), jax.tree.leaves(mask(params)), strict=True)]
    )


def falling(step):
    """A learning rate between 0.15 and 0.01, to the digits of either type."""
    return 0.15 - 0.007 * step


def rising(step):
    return 0.3 + 0.01 * step


# name: (the package's ascent part with extra keywords, the reference's, its GSAM coefficient)
BASES = {
    "sam": (
        lambda **kw: saner_jax.sam(rho=RHO, **kw),
        lambda: (ref.SAM(RHO), None),
    ),
    "asam": (
        lambda **kw: saner_jax.asam(rho=1.5 * RHO, eta=0.01, **kw),
        lambda: (ref.ASAM(1.5 * RHO, 0.01), None),
    ),
    "gsam": (
        lambda **kw: saner_jax.gsam(rho=RHO, alpha=0.4, **kw),
        lambda: (ref.SAM(RHO), 0.4),
    ),
    "fsam": (
        lambda **kw: saner_jax.fsam(rho=RHO, sigma=0.9, decay=0.7, **kw),
        lambda: (ref.FSAM(RHO, 0.9, 0.7), None),
    ),
    "vasso": (
        lambda **kw: saner_jax.vasso(rho=RHO, theta=0.3, **kw),
        lambda: (ref.VaSSO(RHO, 0.3), None),
    ),
}


def reference(parts, reweight=None, **more):
    ascent, gsam = parts
    return ref.Optimizer(
        ascent,
        gsam,
        reweight,
        learning_rate=LEARNING_RATE,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        **more,
    )


def base(name):
    ours, theirs = BASES[name]
    return lambda params: ours(), lambda params: reference(theirs())


def reweighted(name, alpha):
    ours, theirs = BASES[name]
    return (
        lambda params: ours(reweight=saner_jax.downweight(alpha)),
        lambda params: reference(theirs(), ref.Downweight(alpha)),
    )


# Every entry: params -> the package's transformation, params -> the reference.
CASES = {name: base(name) for name in BASES}
CASES |= {f"{name}+saner({alpha})": reweighted(name, alpha) for name in BASES for alpha in ALPHAS}
CASES |= {
    "saner": (
        lambda params: saner_jax.saner(rho=RHO, alpha=0.5),
        lambda params: reference((ref.SAM(RHO), None), ref.Downweight(0.5)),
    ),
    "sgd_d": (
        lambda params: saner_jax.sgd_d(rho=RHO),
        lambda params: reference((ref.SAM(RHO), None), ref.Restore()),
    ),
    "defaults of sam": (
        lambda params: saner_jax.sam(),
        lambda params: reference((ref.SAM(0.1), None)),
    ),
    "defaults of asam": (
        lambda params: saner_jax.asam(),
        lambda params: reference((ref.ASAM(0.5, 0.01), None)),
    ),
    "defaults of gsam": (
        lambda params: saner_jax.gsam(),
        lambda params: reference((ref.SAM(0.1), 0.4)),
    ),
    "defaults of fsam": (
        lambda params: saner_jax.fsam(),
        lambda params: reference((ref.FSAM(0.1, 1.0, 0.9), None)),
    ),
    "defaults of vasso": (
        lambda params: saner_jax.vasso(),
        lambda params: reference((ref.VaSSO(0.1, 0.9), None)),
    ),
    "defaults of saner": (
        lambda params: saner_jax.saner(),
        lambda params: reference((ref.SAM(0.1), None), ref.Downweight(0.5)),
    ),
    "defaults of sgd_d": (
        lambda params: saner_jax.sgd_d(),
        lambda params: reference((ref.SAM(0.1), None), ref.Restore()),
    ),
    "asam, T on matrices (function)": (
        lambda params: saner_jax.asam(rho=RHO, eta=0.1, adaptive_mask=matrices),
        lambda params: reference((ref.ASAM(RHO, 0.1, flat(matrices, params)), None)),
    ),
    "asam, T on the others (tree), eta 0, saner": (
        lambda params: saner_jax.asam(
            rho=RHO, eta=0.0, adaptive_mask=not_matrices(params), reweight=saner_jax.downweight(0.5)
        ),
        lambda params: reference((ref.ASAM(RHO, 0.0, flat(not_matrices, params)), None), ref.Downweight(0.5)),
    ),
    "saner, perturb matrices (function)": (
        lambda params: saner_jax.saner(rho=RHO, alpha=0.5, perturb_mask=matrices),
        lambda params: reference((ref.SAM(RHO), None), ref.Downweight(0.5), perturb=flat(matrices, params)),
    ),
    "fsam, perturb matrices (function)": (
        lambda params: saner_jax.fsam(rho=RHO, perturb_mask=matrices),
        lambda params: reference((ref.FSAM(RHO, 1.0, 0.9), None), perturb=flat(matrices, params)),
    ),
    "asam, perturb the others (tree), T on matrices": (
        lambda params: saner_jax.asam(rho=RHO, perturb_mask=not_matrices(params), adaptive_mask=matrices),
        lambda params: reference(
            (ref.ASAM(RHO, 0.01, flat(matrices, params)), None), perturb=flat(not_matrices, params)
        ),
    ),
    "gsam, perturb matrices (tree), saner": (
        lambda params: saner_jax.gsam(rho=RHO, reweight=saner_jax.downweight(0.5), perturb_mask=matrices(params)),
        lambda params: reference((ref.SAM(RHO), 0.4), ref.Downweight(0.5), perturb=flat(matrices, params)),
    ),
    "saner on matrices (function)": (
        lambda params: saner_jax.sam(rho=RHO, reweight=saner_jax.downweight(0.5, mask=matrices)),
        lambda params: reference((ref.SAM(RHO), None), ref.Downweight(0.5, flat(matrices, params))),
    ),
    "vasso, saner on the others (tree)": (
        lambda params: saner_jax.vasso(rho=RHO, reweight=saner_jax.downweight(0.5, mask=not_matrices(params))),
        lambda params: reference((ref.VaSSO(RHO, 0.9), None), ref.Downweight(0.5, flat(not_matrices, params))),
    ),
    "sgd_d on matrices (function)": (
        lambda params: saner_jax.sam(rho=RHO, reweight=saner_jax.restore_downweighted(mask=matrices)),
        lambda params: reference((ref.SAM(RHO), None), ref.Restore(flat(matrices, params))),
    ),
    "saner on r < 0": (
        lambda params: saner_jax.sam(rho=RHO, reweight=saner_jax.downweight(0.5, where=saner_jax.is_turned)),
        lambda params: reference((ref.SAM(RHO), None), ref.Downweight(0.5, group=ref.turned)),
    ),
    "gsam, saner on r > 1 of matrices (function)": (
        lambda params: saner_jax.gsam(
            rho=RHO, reweight=saner_jax.downweight(0.5, mask=matrices, where=saner_jax.is_grown)
        ),
        lambda params: reference((ref.SAM(RHO), 0.4), ref.Downweight(0.5, flat(matrices, params), ref.grown)),
    ),
    "saner, alpha ramp": (
        lambda params: saner_jax.saner(rho=RHO, alpha=saner_jax.alpha_ramp(0.7, steps=13)),
        lambda params: reference((ref.SAM(RHO), None), ref.Downweight(ref.linear_ramp(0.7, 13))),
    ),
    "saner, alpha staircase": (
        lambda params: saner_jax.saner(rho=RHO, alpha=saner_jax.alpha_ramp(0.7, steps=17, steps_per_epoch=5)),
        lambda params: reference((ref.SAM(RHO), None), ref.Downweight(ref.staircase_ramp(0.7, 17, 5))),
    ),
    "gsam, rho from the learning rate": (
        lambda params: saner_jax.gsam(
            rho=saner_jax.rho_from_learning_rate(falling, lr_min=0.03, lr_max=0.12, rho_min=0.1, rho_max=0.5),
            alpha=rising,
        ),
        lambda params: reference((ref.SAM(ref.rho_from_learning_rate(falling, 0.03, 0.12, 0.1, 0.5)), rising)),
    ),
    "asam, every schedule": (
        lambda params: saner_jax.asam(rho=rising, eta=falling, reweight=saner_jax.downweight(rising)),
        lambda params: reference((ref.ASAM(rising, falling), None), ref.Downweight(rising)),
    ),
    "fsam, every schedule": (
        lambda params: saner_jax.fsam(rho=rising, sigma=rising, decay=falling),
        lambda params: reference((ref.FSAM(rising, rising, falling), None)),
    ),
    "vasso, every schedule": (
        lambda params: saner_jax.vasso(rho=rising, theta=rising),
        lambda params: reference((ref.VaSSO(rising, rising), None)),
    ),
    "stages chained by hand: asam's norm of fsam's residual, gsam, saner": (
        lambda params: saner_jax.sharpness_aware(
            optax.chain(saner_jax.subtract_ema(decay=0.8, sigma=0.5), saner_jax.scale_to_adaptive_norm(RHO, eta=0.2)),
            saner_jax.subtract_orthogonal(0.3),
            saner_jax.downweight(0.5),
        ),
        lambda params: reference((FriendlyASAM(RHO, 0.2, ref.FSAM(1.0, 0.5, 0.8)), 0.3), ref.Downweight(0.5)),
    ),
}


class FriendlyASAM(ref.ASAM):
    """ASAM's perturbation of FSAM's residual: what the stages give when chained."""

    def __init__(self, rho, eta, residual):
        super().__init__(rho, eta)
        self.residual = residual
        self.observe = residual.observe

    def eps(self, g, w, step):
        d = g if self.residual.m is None else g - self.residual.sigma * self.residual.m
        return super().eps(d, w, step)


def loss(params, batch):
    """``references.Batch``, again, for JAX to differentiate."""
    a, b = batch
    w, _ = ravel_pytree(params)
    return jnp.mean((jnp.tanh(a @ w) - b) ** 2) + jnp.mean(jnp.cos(3 * w))


def remember():
    """Keep in the state what arrives: the method's gradient, before weight decay and momentum."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda updates, state, params=None: (updates, updates)
    )


gradient = jax.jit(jax.grad(loss))


def step_of(transformation, params, state, batch, second=True):
    """One training step. The gradient is jitted by itself: without an outer jit only the package runs eagerly."""
    tx = chain(transformation)

    def grad_fn(w):
        return gradient(w, batch)

    updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn if second else None)
    return optax.apply_updates(params, updates), state


def chain(transformation):
    return optax.chain(
        transformation,
        remember(),
        optax.add_decayed_weights(WEIGHT_DECAY),
        optax.sgd(LEARNING_RATE, momentum=MOMENTUM),
    )


@functools.cache
def jitted_with_traced_alpha(name):
    """Compiled once for all values of alpha."""
    ours, _ = BASES[name]
    step = jax.jit(lambda alpha, *arguments: step_of(ours(reweight=saner_jax.downweight(alpha)), *arguments))
    return lambda alpha: functools.partial(step, alpha)


def assert_close(actual, desired, tolerance):
    np.testing.assert_allclose(actual, desired, rtol=0, atol=tolerance * np.max(np.abs(desired)))


def as_vector(tree):
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])


def compare(case, dtype, step=None, jit=True, steps=STEPS, tree_seed=None, lacks_second=lambda number: False):
    """Follow one training with both, and compare every emitted gradient and every new parameter."""
    ours, theirs = case
    # The same numbers in both types: float32's.
    tree = as_type(random_tree(np.random.default_rng(tree_seed or TREE_SEED[dtype])), np.float32)
    start = w = as_vector(tree)
    batches = [[x.astype(np.float32) for x in (b.a, b.b)] for b in ref.batches(1, steps, 5, len(w))]
    with jax.enable_x64(dtype == np.float64):
        params = as_type(tree, dtype)
        transformation = ours(params)
        state = chain(transformation).init(params)
        step = step or functools.partial(step_of, transformation)
        step = jax.jit(step, static_argnames="second") if jit else step
        expected, shares = theirs(params), []
        # In float32 rounding may decide a mask bit differently where h is within it of 0 or of g, and either is right:
        # there, and only there, the reference follows the decision (the value is still compared). In float64 nowhere.
        rounding = TOLERANCE[dtype] if dtype == np.float32 else -1.0
        for number, batch in enumerate(batches):
            alone = {"second": False} if lacks_second(number) else {}
            params, state = step(params, state, tuple(jnp.asarray(x, dtype) for x in batch), **alone)
            emitted = as_vector(state[1])
            gradients = [ref.Batch(*(x.astype(np.float64) for x in batch)).gradient]
            w = expected.step(w, gradients, emitted, rounding, **alone)
            assert_close(emitted, expected.u, TOLERANCE[dtype])
            assert_close(as_vector(params), w, TOLERANCE[dtype])
            shares.append(expected.share)
    assert expected.undecided <= 0.01 * steps * len(w)
    if expected.reweight is not None:  # Both values of the mask were put to the test,
        assert 0.05 < np.mean(shares) < 0.95
    assert np.max(np.abs(w - start)) > 0.003 * steps  # and training went somewhere.


both_types = pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])


# Compiling is most of this file's time. So alpha is traced here, compiled once for its five values (as a number it is
# below), and of the masks, the schedules and the other trees one of each kind is compiled.


@both_types
@pytest.mark.parametrize("name", [*BASES, "saner", "sgd_d"])
def test_method_equals_its_reference(name, dtype):
    compare(CASES[name], dtype)


@both_types
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", BASES)
def test_saner_on_every_method_equals_its_reference(name, alpha, dtype):
    compare(CASES[f"{name}+saner({alpha})"], dtype, jitted_with_traced_alpha(name)(alpha), jit=False)


# One operation at a time is slow as well: every value of alpha on SAM alone, a half on the others.
WITHOUT_JIT = [name for name in CASES if "+" not in name or name.startswith("sam+") or name.endswith("(0.5)")]


@pytest.mark.parametrize("name", WITHOUT_JIT)
def test_method_equals_its_reference_without_jit(name):
    compare(CASES[name], np.float64, jit=False)


@pytest.mark.parametrize(
    "name",
    [
        "asam, T on the others (tree), eta 0, saner",
        "fsam, perturb matrices (function)",
        "saner on matrices (function)",
        "saner, alpha staircase",
        "gsam, rho from the learning rate",
    ],
)
def test_masks_and_schedules_equal_their_reference(name):
    compare(CASES[name], np.float64)


REUSING = {
    **{
        f"{name}+saner": (
            lambda params, ours=ours: ours(reweight=saner_jax.downweight(0.5), reuse=True),
            lambda params, theirs=theirs: reference(theirs(), ref.Downweight(0.5)),
        )
        for name, (ours, theirs) in BASES.items()
    },
    "sgd_d": (
        lambda params: saner_jax.sgd_d(rho=RHO, reuse=True),
        lambda params: reference((ref.SAM(RHO), None), ref.Restore()),
    ),
    "fsam, every schedule, perturb matrices, saner on the others": (
        lambda params: saner_jax.fsam(
            rho=rising,
            sigma=rising,
            decay=falling,
            reweight=saner_jax.downweight(rising, mask=not_matrices),
            perturb_mask=matrices,
            reuse=True,
        ),
        lambda params: reference(
            (ref.FSAM(rising, rising, falling), None),
            ref.Downweight(rising, flat(not_matrices, params)),
            perturb=flat(matrices, params),
        ),
    ),
}


@both_types
@pytest.mark.parametrize("name", REUSING)
def test_steps_without_a_second_gradient_equal_their_reference(name, dtype):
    """In blocks of four; schedules and averages take every step."""
    compare(REUSING[name], dtype, lacks_second=lambda number: number % 4)


def test_steps_without_a_second_gradient_equal_their_reference_without_jit():
    """Of uneven distance, and with two before there is anything to reuse."""
    compare(REUSING["gsam+saner"], np.float64, jit=False, lacks_second=lambda number: number not in (2, 3, 7, 13))


@pytest.mark.parametrize("seed", [4, 26])
def test_other_trees(seed):
    """Nothing depends on which leaves a tree has, nor on how it nests them."""
    compare(CASES["fsam+saner(0.5)"], np.float64, steps=3, tree_seed=seed)


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (saner_jax.alpha_ramp(0.7, steps=13), ref.linear_ramp(0.7, 13)),
        (saner_jax.alpha_ramp(-0.5, steps=10, steps_per_epoch=3), ref.staircase_ramp(-0.5, 10, 3)),
        (saner_jax.alpha_ramp(0.5, steps=50, steps_per_epoch=50), lambda step: 0.5),
        (
            saner_jax.rho_from_learning_rate(falling, 0.03, 0.12, 0.1, 0.5),
            ref.rho_from_learning_rate(falling, 0.03, 0.12, 0.1, 0.5),
        ),
    ],
    ids=["ramp", "staircase", "one step", "rho"],
)
def test_schedules_equal_their_formulas(ours, theirs):
    """The steps after the ramp's end and outside the learning rate's range included; of a number and of an array."""
    for step in range(25):
        np.testing.assert_allclose(ours(step), theirs(step), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(ours(jnp.int32(step)), theirs(step), rtol=1e-6, atol=1e-9)
