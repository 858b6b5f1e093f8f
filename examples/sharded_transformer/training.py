"""The training step over sharded state: plain ``jit``, with the placement of everything derived from the model's.

Nothing in the step mentions devices. XLA gathers the weights that a pass needs, reduces its gradients to the shards of
the parameters, and adds for SANER the sum of the shards' squared norms.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import saner_jax
from examples.sharded_transformer.model import DEVICES, Transformer


@dataclasses.dataclass(frozen=True)
class Config:
    """A model, its text and how it is trained; a run is a function of it alone, on any number of devices."""

    vocabulary: int = 16
    length: int = 32
    """Symbols of a sequence that are predicted."""
    embedding: int = 64
    """Width of the model; the number of devices must divide it."""
    heads: int = 4
    layers: int = 2
    sequences: int = 2048
    """Training sequences."""
    noise: float = 0.0
    """Share of the training targets that are replaced by a wrong symbol, once and for all."""
    batch: int = 32
    """Sequences of a step; the number of devices must divide it."""
    steps: int = 600
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    rho: float = 0.05
    alpha: float = 0.5
    """Down-weighting, after a ramp over the first quarter of the steps."""
    seed: int = 0


class State(NamedTuple):
    """What training changes and a checkpoint holds."""

    step: jax.Array
    params: Any
    opt_state: Any


class Program(NamedTuple):
    """Functions over sharded state; call them inside ``jax.set_mesh(mesh)``."""

    init: Callable[[], State]
    step: Callable[[State, Any, Any], tuple[State, jax.Array]]
    """State, tokens and targets, int (batch, length), to the next state and the loss; the state is donated."""
    loss: Callable[[Any, Any, Any], jax.Array]
    """Parameters, tokens and targets to the mean loss from the third symbol on."""
    abstract: State
    """Shapes, dtypes and placement of the state."""


def device_mesh(devices: list[Any] | None = None) -> Mesh:
    """Return the mesh of all devices, or of these."""
    return Mesh(np.array(jax.devices() if devices is None else devices), (DEVICES,))


def saner_adamw(config: Config) -> optax.GradientTransformationExtraArgs:
    """Return SANER in front of AdamW."""
    return optax.chain(
        saner_jax.saner(config.rho, saner_jax.alpha_ramp(config.alpha, max(config.steps // 4, 1))),
        optax.adamw(
            optax.schedules.cosine_decay_schedule(config.learning_rate, config.steps),
            weight_decay=config.weight_decay,
        ),
    )


def program(
    config: Config,
    mesh: Mesh,
    tx: optax.GradientTransformation | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Program:
    """Return the program of a configuration on a mesh; ``tx`` is :func:`saner_adamw` unless given."""
    tx = optax.with_extra_args_support(saner_adamw(config) if tx is None else tx)

    def create() -> Transformer:
        return Transformer(
            config.vocabulary, config.length, config.embedding, config.heads, config.layers, dtype,
            rngs=nnx.Rngs(config.seed),
        )  # fmt: skip

    def init() -> State:
        params = nnx.state(create())
        return State(jnp.zeros([], jnp.int32), params, tx.init(params))

    with jax.set_mesh(mesh):
        graphdef = nnx.graphdef(nnx.eval_shape(create))
        shapes = jax.eval_shape(init)
    # Averages and momenta are trees of the model's own variables, and so say where they belong; scalars are replicated.
    shardings = nnx.get_named_sharding(shapes, mesh)
    whole, by_sample = NamedSharding(mesh, P()), NamedSharding(mesh, P(DEVICES))

    def mean_loss(params: Any, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, params)(tokens)
        # Nothing predicts the first two symbols of a second-order source; position i predicts symbol i + 1.
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)[:, 1:].mean()

    def step(state: State, tokens: jax.Array, targets: jax.Array) -> tuple[State, jax.Array]:
        def grad_fn(params: Any) -> Any:
            return jax.grad(mean_loss)(params, tokens, targets)

        loss, grads = jax.value_and_grad(mean_loss)(state.params, tokens, targets)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, grad_fn=grad_fn)
        return State(state.step + 1, optax.apply_updates(state.params, updates), opt_state), loss

    return Program(
        init=jax.jit(init, out_shardings=shardings),
        step=jax.jit(
            step, donate_argnums=0, in_shardings=(shardings, by_sample, by_sample), out_shardings=(shardings, whole)
        ),
        loss=jax.jit(mean_loss, in_shardings=(shardings.params, by_sample, by_sample), out_shardings=whole),
        abstract=jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
        ),
    )


def batch_indices(config: Config, step: int) -> np.ndarray:
    """Return which training sequences a step takes: those of its epoch's own order."""
    epoch, position = divmod(step, config.sequences // config.batch)
    order = np.random.default_rng((config.seed, epoch)).permutation(config.sequences)
    return order[position * config.batch : (position + 1) * config.batch]
