"""Functions of a pair of gradients against float64 NumPy, and where nothing can be divided."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from saner_jax import analysis
from tests import references as ref

pytestmark = pytest.mark.usefixtures("quick_compile")

ratio_shares, alignment = jax.jit(analysis.ratio_shares), jax.jit(analysis.alignment)
SHAPES = {"a": {"kernel": (7, 5), "bias": (3,)}, "c": (), "d": (2, 3, 2)}
EMPTY = {"w": jnp.zeros((0, 3))}


def normal(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: np.asarray(rng.normal(size=shape), dtype), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


def leaves(tree):
    return [np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)]


def flat(tree):
    return np.concatenate(leaves(tree))


def zeros():
    return jax.tree.map(np.zeros_like, normal(0))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16])
def test_ratio_shares(dtype):
    with jax.enable_x64(dtype == np.float64):
        g, h = normal(0, dtype), normal(1, dtype)
        actual = ratio_shares(g, h)
        for name, group in (("turned", ref.turned), ("downweighted", ref.down_weighted), ("grown", ref.grown)):
            share, per_leaf = getattr(actual, name), getattr(actual, f"{name}_per_leaf")
            assert share.dtype == per_leaf.dtype == (np.float64 if dtype == np.float64 else np.float32)
            np.testing.assert_allclose(share, np.mean(group(flat(h), flat(g))), rtol=1e-6)
            expected = [np.mean(group(*pair)) for pair in zip(leaves(h), leaves(g), strict=True)]
            np.testing.assert_allclose(per_leaf, expected, rtol=1e-6)
            assert 0 < share < 1
        # Drawn from a density, every element is in one group.
        np.testing.assert_allclose(actual.turned + actual.downweighted + actual.grown, 1, rtol=1e-6)


def test_shares_of_zeros_ones_and_nothing():
    nan = jax.tree.map(lambda x: x * np.nan, normal(0))
    for g, h in ((zeros(), normal(0)), (normal(0), zeros()), (normal(0), normal(0)), (nan, normal(0)), (EMPTY, EMPTY)):
        for share in ratio_shares(g, h):
            np.testing.assert_array_equal(share, 0)
    assert analysis.ratio_shares({}, {}).turned_per_leaf.shape == (0,)


def test_downweighted():
    g, h = normal(0), normal(1)
    mask = jax.jit(analysis.downweighted)(g, h)
    assert {leaf.dtype for leaf in jax.tree.leaves(mask)} == {jnp.dtype(bool)}
    jax.tree.map(lambda m, h, g: np.testing.assert_array_equal(m, ref.down_weighted(h, g)), mask, h, g)


@pytest.mark.parametrize("key", [jax.random.key(3), jax.random.PRNGKey(3)], ids=["key", "raw key"])
def test_random_like_has_as_many_true_in_every_leaf(key):
    mask = analysis.downweighted(normal(0), normal(1))
    drawn = jax.jit(analysis.random_like)(key, mask)
    assert jax.tree.map(lambda m: (m.shape, m.dtype, int(m.sum())), drawn) == jax.tree.map(
        lambda m: (m.shape, m.dtype, int(m.sum())), mask
    )
    assert not np.array_equal(drawn["a"]["kernel"], mask["a"]["kernel"])


def test_random_like_of_small_masks():
    for mask in ({}, {"w": np.zeros((0, 3), bool)}, {"w": np.array(True)}, {"w": True}):
        drawn = analysis.random_like(jax.random.key(0), mask)
        jax.tree.map(np.testing.assert_array_equal, drawn, mask)


def test_random_like_gives_every_place_its_share():
    """4000 draws of 3 of 10 places: within five standard deviations each, and pairs of places as well."""
    draws = 4000
    mask = jnp.arange(10) < 3
    keys = jax.random.split(jax.random.key(0), draws)
    drawn = np.asarray(jax.jit(jax.vmap(analysis.random_like, in_axes=(0, None)))(keys, mask))
    assert set(drawn.sum(axis=1)) == {3}
    together = drawn.T.astype(float) @ drawn / draws
    expected = np.where(np.eye(10, dtype=bool), 3 / 10, 3 / 10 * 2 / 9)
    assert np.max(np.abs(together - expected) / np.sqrt(expected * (1 - expected) / draws)) < 5


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16])
def test_alignment(dtype):
    with jax.enable_x64(dtype == np.float64):
        g, h, noisy = (normal(seed, dtype) for seed in range(3))
        mask = analysis.downweighted(g, h)
        actual = alignment(g, mask, noisy)
        restricted = [m * x for m, x in zip(leaves(mask), leaves(g), strict=True)]
        tolerance = 1e-12 if dtype == np.float64 else 1e-6
        expected = ref.cosine(np.concatenate(restricted), flat(noisy))
        np.testing.assert_allclose(actual.cosine, expected, rtol=0, atol=tolerance)
        per_leaf = [ref.cosine(*pair) for pair in zip(restricted, leaves(noisy), strict=True)]
        np.testing.assert_allclose(actual.mean_leaf_cosine, np.mean(per_leaf), rtol=0, atol=tolerance)
        assert abs(actual.cosine - actual.mean_leaf_cosine) > 0.01


def test_alignment_of_a_gradient_with_itself_is_one():
    everything = jax.tree.map(lambda x: np.ones_like(x, bool), normal(0))
    for scale in (1.0, 1e-15, 1e15):
        g = jax.tree.map(lambda x, s=scale: np.asarray(s * x, np.float32), normal(0))
        np.testing.assert_allclose(alignment(g, everything, normal(0)), 1, rtol=1e-6)
        opposite = jax.tree.map(np.negative, g)
        np.testing.assert_allclose(alignment(opposite, everything, normal(0)), -1, rtol=1e-6)


def test_alignment_where_a_side_is_zero():
    g = normal(0)
    nothing, everything = (jax.tree.map(lambda x, v=v: np.full_like(x, v, bool), g) for v in (False, True))
    for sides in ((g, nothing, g), (zeros(), everything, g), (g, everything, zeros())):
        np.testing.assert_array_equal(alignment(*sides), 0)
    np.testing.assert_array_equal(alignment({}, {}, {}), 0)
    np.testing.assert_array_equal(alignment(EMPTY, {"w": np.zeros((0, 3), bool)}, EMPTY), 0)
    # A leaf of zeros counts as 0 in the mean, as in the released code, and not at all in the cosine of the whole.
    half = {**everything, "a": nothing["a"]}
    reference = {**g, "a": zeros()["a"]}
    actual = alignment(g, half, reference)
    np.testing.assert_allclose(actual, (1, 2 / 4), rtol=1e-6)


def test_what_a_mask_hides_is_not_seen():
    """A NaN outside the mask does not spoil the cosine; one inside it does."""
    g = normal(0)
    bad = {**g, "c": np.float32(np.nan)}
    everything = jax.tree.map(lambda x: np.ones_like(x, bool), g)
    hidden = {**everything, "c": np.array(False)}
    assert np.isfinite(alignment(bad, hidden, g)).all()
    assert np.isnan(alignment(bad, everything, g)).all()


def test_everything_maps_over_an_ensemble():
    g, h, noisy = (jax.tree.map(lambda *x: np.stack(x), normal(i), normal(i + 10)) for i in range(3))
    mask = jax.vmap(analysis.downweighted)(g, h)
    for function, trees in ((ratio_shares, (g, h)), (alignment, (g, mask, noisy))):
        mapped = jax.vmap(function)(*trees)
        for member in range(2):
            pick = functools.partial(jax.tree.map, lambda x, i=member: x[i])
            for actual, expected in zip(pick(mapped), function(*map(pick, trees)), strict=True):
                np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["automatic", "explicit"])
@pytest.mark.parametrize("jit", [False, True])
def test_everything_takes_sharded_arrays(kind, jit):
    """In either kind of mesh, as the values that one device computes, and random masks that lie as their masks do."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))
    specs = {"w": P("x", "y"), "v": P(("x", "y")), "s": P()}
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 6), "v": (8,), "s": ()}
    plain = [{k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()} for _ in range(3)]

    def measure(g, h, noisy):
        mask = analysis.downweighted(g, h)
        drawn = analysis.random_like(jax.random.key(0), mask)
        return ratio_shares(g, h), analysis.alignment(g, mask, noisy), analysis.alignment(g, drawn, noisy), drawn

    measure_it = jax.jit(measure) if jit else measure
    with jax.set_mesh(mesh):
        put = [{k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in tree.items()} for tree in plain]
        actual = measure_it(*put)
        if kind is AxisType.Explicit:
            for key, leaf in actual[-1].items():
                assert leaf.sharding.is_equivalent_to(put[0][key].sharding, leaf.ndim)
        actual = jax.device_get(actual)
    expected = measure(*plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, jax.device_get(expected))


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (7,), (50, 41)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_random_masks_keep_the_count_whatever_it_is(shape, share):
    mask = {"w": jax.random.uniform(jax.random.key(1), shape) < share}
    drawn = jax.jit(analysis.random_like)(jax.random.key(2), mask)["w"]
    assert drawn.shape == shape and drawn.dtype == bool
    assert int(drawn.sum()) == int(mask["w"].sum())


def test_random_masks_keep_the_count_where_random_numbers_are_equal(monkeypatch):
    numbers = jnp.array([8, 4, 8, 8, 12, 8, 2**32 - 1, 2**32 - 1], jnp.uint32)
    monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype: numbers)
    expected = [[], [1], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 5], [0, 1, 2, 3, 4, 5]]
    expected += [[0, 1, 2, 3, 4, 5, 6], list(range(8))]
    for count, places in enumerate(expected):
        drawn = analysis.random_like(jax.random.key(0), jnp.arange(8) < count)
        assert jnp.flatnonzero(drawn).tolist() == places
