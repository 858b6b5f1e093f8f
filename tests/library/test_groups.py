"""m-SAM through ``axis_name`` against a reference that loops over the groups: ``vmap``, ``pmap``, ``shard_map``.

With replicated parameters, and with parameters that are sharded over another axis of the mesh or over that of the
groups.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import saner_jax
from tests import references as ref

pytestmark = pytest.mark.usefixtures("quick_compile")

AXIS, SHARDS = "groups", "shards"
STEPS, GROUPS, SIZE, DIMENSION = 6, 4, 3, 12
RHO = 0.4

CASES = {
    "sam": (lambda **kw: saner_jax.sam(RHO, **kw), lambda: (ref.SAM(RHO), None, None)),
    "asam+saner": (
        lambda **kw: saner_jax.asam(RHO, eta=0.1, reweight=saner_jax.downweight(0.5), **kw),
        lambda: (ref.ASAM(RHO, 0.1), None, ref.Downweight(0.5)),
    ),
    "gsam+saner": (
        lambda **kw: saner_jax.gsam(RHO, alpha=0.4, reweight=saner_jax.downweight(0.5), **kw),
        lambda: (ref.SAM(RHO), 0.4, ref.Downweight(0.5)),
    ),
    "saner": (lambda **kw: saner_jax.saner(RHO, alpha=0.5, **kw), lambda: (ref.SAM(RHO), None, ref.Downweight(0.5))),
    "sgd_d": (lambda **kw: saner_jax.sgd_d(RHO, **kw), lambda: (ref.SAM(RHO), None, ref.Restore())),
    "fsam+saner": (
        lambda **kw: saner_jax.fsam(RHO, sigma=0.9, decay=0.7, reweight=saner_jax.downweight(0.5), **kw),
        lambda: (ref.FSAM(RHO, 0.9, 0.7), None, ref.Downweight(0.5)),
    ),
    "vasso+saner": (
        lambda **kw: saner_jax.vasso(RHO, theta=0.3, reweight=saner_jax.downweight(0.5), **kw),
        lambda: (ref.VaSSO(RHO, 0.3), None, ref.Downweight(0.5)),
    ),
}


def to_varying(tree, axis=AXIS):
    """Make replicated parameters per-device, so that their gradients stay per device. ``pvary`` before JAX 0.8.2."""
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(tree, axis, to="varying")
    return jax.lax.pvary(tree, axis)


def loss(params, batch):
    """``references.Batch``, again, for JAX to differentiate."""
    a, b = batch
    w, _ = ravel_pytree(params)
    return jnp.mean((jnp.tanh(a @ w) - b) ** 2) + jnp.mean(jnp.cos(3 * w))


gradient = jax.jit(jax.grad(loss))


def step_of(tx, prepare=lambda params: params):
    """A training step on one group's batch; ``prepare`` is what becomes of the parameters that are differentiated."""

    def step(params, state, batch):
        def grad_fn(w):
            return gradient(w, batch)

        return tx.update(grad_fn(prepare(params)), state, params, grad_fn=grad_fn)

    return step


def by_vmap(tx):
    """Without an outer jit: compiling is most of this file's time."""
    return jax.vmap(step_of(tx), in_axes=(None, None, 0), out_axes=None, axis_name=AXIS)


def by_jitted_vmap(tx):
    return jax.jit(by_vmap(tx))


def by_pmap(tx):
    return jax.pmap(step_of(tx), in_axes=(None, None, 0), out_axes=None, axis_name=AXIS, devices=jax.devices()[:GROUPS])


def sharded(step):
    mesh = Mesh(np.array(jax.devices()[:GROUPS]), (AXIS,))
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P(AXIS)), out_specs=(P(), P())))


def by_shard_map(tx):
    """The gradient is taken at varying parameters; everything else stays replicated."""
    step = step_of(tx, to_varying)
    return sharded(lambda params, state, batch: step(params, state, jax.tree.map(lambda x: x[0], batch)))


def by_shard_map_over_groups_alone(mesh):
    """Parameters are sharded over the mesh's other axis, which ``shard_map`` leaves to XLA: norms stay global."""

    def transform(tx):
        step = step_of(tx, to_varying)
        mapped = jax.shard_map(
            lambda params, state, batch: step(params, state, jax.tree.map(lambda x: x[0], batch)),
            mesh=mesh,
            in_specs=(P(), P(), P(AXIS)),
            out_specs=(P(), P()),
            axis_names={AXIS},
        )
        return with_sharded_params(jax.jit(mapped), tx, mesh, SHARDS)

    return transform


def by_vmap_over_sharded(mesh, axis):
    """Groups lie on the mesh's first axis, parameters are sharded over ``axis``; all of it is left to XLA."""

    def transform(tx):
        return with_sharded_params(by_jitted_vmap(tx), tx, mesh, axis)

    return transform


def with_sharded_params(step, tx, mesh, axis):
    """Shard every parameter, its averages and its momentum along the last dimension; check that updates are, too."""

    def placed(leaf):
        return jax.device_put(leaf, jax.NamedSharding(mesh, P(*(None,) * (jnp.ndim(leaf) - 1), axis)))

    def run(params, state, batch):
        params, state = jax.tree.map(placed, params), optax.tree.map_params(tx, placed, state)
        batch = jax.device_put(batch, jax.NamedSharding(mesh, P(AXIS)))
        updates, state = step(params, state, batch)
        for update, param in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
            assert update.sharding.is_equivalent_to(param.sharding, update.ndim)
        return updates, state

    return run


def mesh_of(groups, shards):
    return Mesh(np.array(jax.devices()[: groups * shards]).reshape(groups, shards), (AXIS, SHARDS))


def tree():
    rng = np.random.default_rng(0)
    return {"a": rng.normal(size=(2, 4)), "b": (rng.normal(size=4),)}


def flat(tree):
    return ravel_pytree(tree)[0].__array__(np.float64)


def grouped_batches(groups=GROUPS, size=SIZE, steps=STEPS):
    """For each step one batch per group."""
    draws = ref.batches(3, steps * groups, size, DIMENSION)
    return [draws[i * groups : (i + 1) * groups] for i in range(steps)]


def stacked(groups):
    return jnp.stack([b.a for b in groups]), jnp.stack([b.b for b in groups])


def follow(transform, tx, expected, all_groups):
    """Every step's update, against the reference."""
    params = jax.tree.map(jnp.asarray, tree())
    w, state, shares = flat(params), tx.init(params), []
    step = transform(tx)
    for groups in all_groups:
        updates, state = step(params, state, stacked(groups))
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
        # Gathered to the host between steps: every transformation then starts from the same plain arrays.
        updates, state = jax.device_get((updates, state))
        params = optax.apply_updates(params, updates)
        w = expected.step(w, [b.gradient for b in groups])
        np.testing.assert_allclose(flat(params), w, rtol=0, atol=1e-10 * np.max(np.abs(w)))
        shares.append(expected.share)
    if expected.reweight is not None:  # Both values of the mask were put to the test.
        assert 0.05 < np.mean(shares) < 0.95


def compare(name, transform, groups, size):
    ours, theirs = CASES[name]
    with jax.enable_x64(True):
        tx = optax.chain(
            ours(axis_name=AXIS), optax.add_decayed_weights(0.01), optax.trace(0.9), optax.scale_by_learning_rate(0.1)
        )
        expected = ref.Optimizer(*theirs(), learning_rate=0.1, momentum=0.9, weight_decay=0.01)
        follow(transform, tx, expected, grouped_batches(groups, size))


@pytest.mark.parametrize("name", CASES)
def test_groups_equal_the_loop_over_groups(name):
    compare(name, by_vmap, GROUPS, SIZE)


@pytest.mark.parametrize("transform", [by_jitted_vmap, by_pmap, by_shard_map])
@pytest.mark.parametrize("name", ["saner", "fsam+saner", "vasso+saner"])
def test_groups_on_devices_equal_the_loop_over_groups(name, transform):
    compare(name, transform, GROUPS, SIZE)


@pytest.mark.parametrize("shape", [(2, 2), (2, 4), (4, 2)], ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("name", ["saner", "gsam+saner", "fsam+saner"])
def test_groups_with_sharded_parameters_equal_the_loop_over_groups(name, shape):
    """Parameters, averages and momentum are sharded over a second axis of the mesh."""
    compare(name, by_shard_map_over_groups_alone(mesh_of(*shape)), shape[0], SIZE)


@pytest.mark.parametrize("axis", [AXIS, SHARDS])
@pytest.mark.parametrize("name", ["saner", "gsam+saner"])
def test_vmapped_groups_with_sharded_parameters_equal_the_loop_over_groups(name, axis):
    """Parameters may then be sharded over the axis on which the groups lie as well."""
    compare(name, by_vmap_over_sharded(mesh_of(4, 2), axis), 4, SIZE)


@pytest.mark.parametrize("name", CASES)
def test_one_sample_a_group(name):
    """1-SAM, by ``vmap`` over samples."""
    compare(name, by_vmap, GROUPS, size=1)


@pytest.mark.parametrize("name", ["sam", "fsam+saner"])
def test_one_group_is_the_ordinary_method(name):
    """The reference with one group is the method itself."""
    compare(name, by_jitted_vmap, groups=1, size=12)


@pytest.mark.parametrize("name", CASES)
def test_groups_are_not_one_big_batch(name):
    """What the tests above would not notice if every group's ``eps`` were that of the whole batch."""
    (groups,) = grouped_batches(steps=1)
    whole = ref.Batch(np.concatenate([b.a for b in groups]), np.concatenate([b.b for b in groups]))
    w = flat(tree())
    apart, together = (ref.Optimizer(*CASES[name][1]()) for _ in range(2))
    assert np.max(np.abs(apart.step(w, [b.gradient for b in groups]) - together.step(w, [whole.gradient]))) > 1e-3


@pytest.mark.parametrize("transform", [by_vmap, by_pmap, by_shard_map])
def test_all_groups_draw_alike(transform):
    """The random control: as many elements of every leaf as SANER, the same ones whichever way the groups are made."""
    (groups,) = grouped_batches(steps=1)
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, tree())

        def updates(reweight, transform=transform):
            tx = saner_jax.sam(RHO, reweight=reweight, axis_name=AXIS)
            return jax.device_get(transform(tx)(params, tx.init(params), stacked(groups))[0])

        control = saner_jax.downweight_random(1.0, seed=2)
        drawn, masked = updates(control), updates(saner_jax.downweight(1.0))
        counts = jax.tree.map(lambda x: int(np.sum(x == 0)), drawn)
        assert counts == jax.tree.map(lambda x: int(np.sum(x == 0)), masked)
        assert 0 < sum(jax.tree.leaves(counts)) < DIMENSION
        np.testing.assert_allclose(flat(drawn), flat(updates(control, by_vmap)), rtol=0, atol=1e-12)


def shard_map_once(tx, prepare):
    (groups,) = grouped_batches(steps=1)
    params = jax.tree.map(jnp.asarray, tree())
    step = step_of(tx, prepare)
    run = sharded(lambda params, state, batch: step(params, state, jax.tree.map(lambda x: x[0], batch)))
    return run(params, tx.init(params), stacked(groups))[0]


def test_unvarying_gradient_in_shard_map_is_an_error():
    """Gradients of replicated parameters arrive summed over the devices; the error says what to do."""
    tx = saner_jax.saner(RHO, axis_name=AXIS)
    with pytest.raises(ValueError, match=r"varying"):
        shard_map_once(tx, lambda params: params)


def test_varying_gradient_in_shard_map_is_what_vmap_computes():
    """Of leaves that are not perturbed as well."""
    tx = saner_jax.saner(RHO, axis_name=AXIS, perturb_mask={"a": False, "b": True})
    (groups,) = grouped_batches(steps=1)
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, tree())
        expected, _ = by_vmap(tx)(params, tx.init(params), stacked(groups))
        np.testing.assert_allclose(flat(shard_map_once(tx, to_varying)), flat(expected), rtol=0, atol=1e-12)


def test_sharded_batch_under_jit_needs_no_axis_name():
    """Without an axis name, ``jit`` over devices computes SAM on the whole batch."""
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, tree())
        tx = saner_jax.saner(RHO, alpha=0.5)
        (groups,) = grouped_batches(steps=1)
        whole = ref.Batch(np.concatenate([b.a for b in groups]), np.concatenate([b.b for b in groups]))
        mesh = Mesh(np.array(jax.devices()[:GROUPS]), (AXIS,))
        put = functools.partial(jax.device_put, device=jax.NamedSharding(mesh, P(AXIS)))
        updates, _ = jax.jit(step_of(tx))(params, tx.init(params), (put(whole.a), put(whole.b)))
        expected = ref.Optimizer(ref.SAM(RHO), None, ref.Downweight(0.5))
        expected.step(flat(params), [whole.gradient])
        np.testing.assert_allclose(flat(updates), expected.u, rtol=0, atol=1e-10)


def scale_to_norm_of_shards(rho, axis):
    """SAM's ascent for parameters that ``shard_map`` has cut: the norm is summed over the axis of the shards."""

    def update(updates, state, params=None, **extra_args):
        norm = jnp.sqrt(jax.lax.psum(optax.tree.norm(updates, squared=True), axis))
        return jax.tree.map(lambda g: rho * g / norm, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def shards_in_shard_map(tx, mesh, params, batches):
    """One update with both axes of the mesh manual: a device sees its shard of the parameters and its group's batch."""

    def step(w, a, b):
        def loss_fn(w):
            prediction = jnp.tanh(jax.lax.psum(a[0] @ w, SHARDS))
            return jnp.mean((prediction - b[0]) ** 2) + jax.lax.psum(jnp.sum(jnp.cos(3 * w)), SHARDS) / DIMENSION

        grads = jax.grad(loss_fn)(to_varying(w))
        return tx.update(grads, tx.init(w), w, grad_fn=jax.grad(loss_fn))[0]

    specs = P(SHARDS), P(AXIS, None, SHARDS), P(AXIS)
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P(SHARDS)))(params, *batches)


@pytest.mark.parametrize("shape", [(2, 2), (2, 4), (4, 2)], ids=lambda shape: "x".join(map(str, shape)))
def test_manually_sharded_parameters_need_an_ascent_that_sums_their_norm(shape):
    """Where the parameters' axis is manual as well, a norm is that of a shard unless the ascent stage sums it."""
    (groups,) = grouped_batches(groups=shape[0], steps=1)
    w = flat(tree())
    expected = ref.Optimizer(ref.SAM(RHO), None, ref.Downweight(0.5))
    expected.step(w, [b.gradient for b in groups])
    with jax.enable_x64(True):
        of_shards, of_one_shard = (
            flat(
                shards_in_shard_map(
                    saner_jax.sharpness_aware(ascent, saner_jax.downweight(0.5), axis_name=AXIS),
                    mesh_of(*shape), jnp.asarray(w), stacked(groups),
                )
            )
            for ascent in (scale_to_norm_of_shards(RHO, SHARDS), saner_jax.scale_to_norm(RHO))
        )  # fmt: skip
    np.testing.assert_allclose(of_shards, expected.u, rtol=0, atol=1e-10)
    assert np.max(np.abs(of_one_shard - expected.u)) > 1e-3
