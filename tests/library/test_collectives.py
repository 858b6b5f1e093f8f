"""Sharded parameters under ``jit``: what moves between devices for the optimizer's sake is scalars.

The gradient here is element by element and the parameters are sharded along other dimensions than the first, so that
every collective in the compiled step is the optimizer's own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import saner_jax
from benchmarks.machinery import collectives

pytestmark = pytest.mark.usefixtures("quick_compile")

METHODS = {
    "sam": saner_jax.sam,
    "asam+saner": lambda **kw: saner_jax.asam(reweight=saner_jax.downweight(0.5), **kw),
    "gsam+saner": lambda **kw: saner_jax.gsam(reweight=saner_jax.downweight(0.5), **kw),
    "fsam+saner": lambda **kw: saner_jax.fsam(reweight=saner_jax.downweight(0.5), **kw),
    "vasso+saner": lambda **kw: saner_jax.vasso(reweight=saner_jax.downweight(0.5), **kw),
    "saner": saner_jax.saner,
    "sgd_d": saner_jax.sgd_d,
}


@pytest.mark.parametrize("monitor", [False, True], ids=["", "monitored"])
@pytest.mark.parametrize("name", METHODS)
def test_only_scalars_move(name, monitor):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    specs = {"a": P(None, ("x", "y")), "b": P("y", "x"), "c": P("x"), "d": P()}
    params = {"a": jnp.ones((6, 8)), "b": jnp.ones((4, 2)), "c": jnp.ones(4), "d": jnp.ones(3)}
    params = {key: jax.device_put(leaf, NamedSharding(mesh, specs[key])) for key, leaf in params.items()}
    tx = optax.chain(METHODS[name](monitor=monitor), optax.adamw(1e-3))
    state = jax.tree.map(jnp.asarray, tx.init(params))

    def grad_fn(params):
        return jax.tree.map(jnp.sin, params)

    def step(params, state):
        return tx.update(grad_fn(params), state, params, grad_fn=grad_fn)

    compiled = jax.jit(step, donate_argnums=1).lower(params, state).compile()
    moved = collectives.moved(compiled)
    assert moved  # at least the norm
    assert {(kind, array) for kind, array in moved if kind != "all-reduce" or not array.endswith("[]")} == set()
    for update, param in zip(jax.tree.leaves(compiled.output_shardings[0]), jax.tree.leaves(params), strict=True):
        assert update.is_equivalent_to(param.sharding, param.ndim)
