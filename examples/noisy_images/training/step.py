"""One training step, read top to bottom: initialise, losses and gradient of a batch, the step of a method, evaluation.

Pure functions of a setup, which is fixed when a step is compiled, and of arrays; where the arrays live is the business
of whoever compiles them. Every random choice is derived from the training seed and the step.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from .. import models
from ..config import Config
from ..data import augmentation
from ..measures import gradient_analysis
from . import accumulation, companions, methods


class Network(NamedTuple):
    """What training changes in one network."""

    params: Any
    """nnx.State of nnx.Param, float32."""
    statistics: Any
    """nnx.State of nnx.BatchStat, float32."""
    opt_state: Any


class Running(NamedTuple):
    """Sums over the steps of the epoch so far, in training mode, of the first network; scalars."""

    steps: jax.Array
    loss: jax.Array
    correct: jax.Array
    monitored: Any
    """Sums of the method's monitored scalars, by name; empty for a method of one pass."""


class State(NamedTuple):
    """Everything that a checkpoint holds."""

    step: jax.Array
    """Optimizer steps taken, int32 ()."""
    networks: tuple[Network, ...]
    """One network, two for Co-teaching."""
    running: Running
    first_non_finite: jax.Array
    """Step whose loss was the first that is not finite, int32 (); -1 while there is none."""
    last_finite_loss: jax.Array


class Images(NamedTuple):
    """A batch, or a whole split on the device."""

    images: jax.Array
    """uint8 (N, H, W, C), or float32 features (N, D)."""
    labels: jax.Array
    """Given labels, int32 (N,)."""


class Pass(NamedTuple):
    """What a pass through the network and back gives."""

    gradient: Any
    """Of the weighted sum of the samples' losses."""
    statistics: Any
    """BatchNorm's running statistics after the pass."""
    losses: jax.Array
    """(B,)."""
    logits: jax.Array
    """(B, K)."""


class Evaluation(NamedTuple):
    """What samples are measured by in evaluation mode, (B,) each, or (N,) of a whole split."""

    losses: Any
    """Cross-entropy against the given label."""
    predictions: Any
    """Predicted label."""
    margins: Any
    """Logit of the given label minus the largest other."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a step depends on beside the configuration."""

    num_classes: int
    image_shape: tuple[int, ...]
    steps_per_epoch: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int
    flip: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """What a step is made of, once for all runs that compile alike; static under `jax.jit`, by identity."""

    config: Config
    """Its network, optimizer and training count."""
    spec: Spec
    graphdef: Any
    optimizer: optax.GradientTransformationExtraArgs


def setup(config: Config, spec: Spec) -> Setup:
    """Build everything but the arrays."""
    graphdef = nnx.split(nnx.eval_shape(lambda: build(config, spec, seed=0)), nnx.Param, nnx.BatchStat)[0]
    return Setup(config, spec, graphdef, methods.create(config, spec.steps_per_epoch, spec.num_classes))


def build(config: Config, spec: Spec, seed: int) -> nnx.Module:
    """Build the network of a configuration, initialised from a seed."""
    settings = config.network
    return models.create(
        settings.model,
        num_classes=spec.num_classes,
        image_shape=spec.image_shape,
        seed=seed,
        width=settings.width,
        padding=settings.padding,
        initialisation=settings.initialisation,
        batch_norm_momentum=settings.batch_norm_momentum,
        batch_norm_epsilon=settings.batch_norm_epsilon,
        batch_norm_groups=settings.batch_norm_groups,
        dropout=settings.dropout,
        rematerialise=config.training.rematerialise,
        dtype="bfloat16" if settings.precision == "bfloat16" else "float32",
        convolution=settings.convolution,
    )


def initialise(setup: Setup, seed: int) -> State:
    """Return the state that training starts from."""
    config, spec = setup.config, setup.spec
    networks = []
    for member in range(2 if config.training.companion == "co-teaching" else 1):
        # Members of a pair differ in their initial weights and in what their methods draw.
        _, params, statistics = nnx.split(build(config, spec, seed + 2**31 * member), nnx.Param, nnx.BatchStat)
        # The optimizer of this seed differs from the compiled one in its initial state alone.
        own = methods.create(config, spec.steps_per_epoch, spec.num_classes, jax.random.bits(key(seed, METHOD, member)))
        networks.append(Network(params, statistics, own.init(params)))
    state = State(
        step=jnp.zeros([], jnp.int32),
        networks=tuple(networks),
        running=empty_running(networks[0]),
        first_non_finite=jnp.full([], -1, jnp.int32),
        last_finite_loss=jnp.full([], jnp.nan, jnp.float32),
    )
    # Leaves of their own buffers: the state is donated to every step.
    return jax.tree.map(lambda x: jnp.array(x, copy=True), state)


# --- a batch ------------------------------------------------------------------------------------------------------

# Streams of random numbers, each derived from the training seed and a counter of its own.
ORDER, AUGMENTATION, DROPOUT, METHOD, ANALYSIS = range(5)


def key(seed: jax.Array | int, stream: int, counter: jax.Array | int) -> jax.Array:
    """Return the key of one draw of a stream."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), counter)


def epoch_order(seed: int | jax.Array, epoch: int, size: int) -> jax.Array:
    """Return the order in which an epoch visits the training set, int32 (N,)."""
    return jax.random.permutation(key(jnp.uint32(seed), ORDER, epoch), size)


def augment(setup: Setup, seed: jax.Array, step: jax.Array, batch: Images) -> tuple[Images, jax.Array | None]:
    """Return the batch as a step takes it, its images still uint8, and the key of the step's dropout masks."""
    spec = setup.spec
    images = augmentation.augment(
        key(seed, AUGMENTATION, step), batch.images, crop_padding=spec.crop_padding, flip=spec.flip
    )
    return batch._replace(images=images), key(seed, DROPOUT, step) if setup.config.network.dropout else None


def apply(
    setup: Setup, params: Any, statistics: Any, images: jax.Array, train: bool, dropout_key: jax.Array | None = None
) -> tuple[jax.Array, Any]:
    """Return logits (B, K) and the running statistics after the pass."""
    # A copy: inside jax.grad a model must not share variables with the trace outside.
    model = nnx.merge(setup.graphdef, params, statistics, copy=True)
    rngs = None if dropout_key is None else nnx.Rngs(dropout=dropout_key)
    logits = model(augmentation.normalise(images, setup.spec.mean, setup.spec.std), train=train, rngs=rngs)
    return logits, nnx.state(model, nnx.BatchStat)


# One function to JAX, whose second pass takes the first one's trace; the compiler sees no difference.
@functools.partial(jax.jit, static_argnums=0)
def sample_losses(
    setup: Setup, params: Any, statistics: Any, batch: Images, dropout_key: jax.Array | None
) -> tuple[jax.Array, tuple[jax.Array, Any]]:
    """Return the samples' losses in training mode, and logits and running statistics beside them."""
    logits, statistics = apply(setup, params, statistics, batch.images, True, dropout_key)
    return companions.sample_loss(setup.config.training.companion)(logits, batch.labels), (logits, statistics)


def forward(
    setup: Setup, params: Any, statistics: Any, batch: Images, dropout_key: jax.Array | None
) -> tuple[jax.Array, Callable[[jax.Array], Pass]]:
    """Go through the network; return the samples' losses and the way back, weights of the samples -> `Pass`."""

    def linearise(rows: Images, key: jax.Array | None) -> Any:
        return jax.vjp(lambda params: sample_losses(setup, params, statistics, rows, key), params, has_aux=True)

    if setup.config.training.accumulate > 1:
        return accumulation.forward(linearise, batch, dropout_key, setup.config.training.accumulate)
    losses, pullback, (logits, moved) = linearise(batch, dropout_key)
    return losses, lambda weights: Pass(pullback(weights.astype(losses.dtype))[0], moved, losses, logits)


# --- a step -------------------------------------------------------------------------------------------------------


def train_batch(setup: Setup, state: State, seed: jax.Array, batch: Images) -> State:
    """Take one step of the configuration's method."""
    batch, dropout_key = augment(setup, seed, state.step, batch)
    # The losses of all networks come first, because Co-teaching weighs the samples by them.
    passes = [forward(setup, n.params, n.statistics, batch, dropout_key) for n in state.networks]
    losses = tuple(of_samples for of_samples, _ in passes)
    weights = companions.sample_weights(setup.config.training, losses, state.step // setup.spec.steps_per_epoch)
    stepped = [
        descend(setup, network, backward, weight, batch, dropout_key)
        for network, (_, backward), weight in zip(state.networks, passes, weights, strict=True)
    ]
    return advance(state, stepped, weights[0], batch.labels)


def descend(
    setup: Setup,
    network: Network,
    backward: Callable[[jax.Array], Pass],
    weights: jax.Array,
    batch: Images,
    dropout_key: jax.Array | None,
) -> tuple[Network, Pass]:
    """Move one network along its method's gradient; the method takes the second one through `grad_fn`, if at all."""
    perturbed: list[Pass] = []

    def grad_fn(params: Any) -> Any:
        perturbed.append(forward(setup, params, network.statistics, batch, dropout_key)[1](weights))
        return perturbed[-1].gradient

    unperturbed = backward(weights)
    updates, opt_state = setup.optimizer.update(
        unperturbed.gradient, network.opt_state, network.params, grad_fn=grad_fn
    )
    keeps = perturbed if setup.config.training.batch_norm_pass == "perturbed" and perturbed else [unperturbed]
    params = jax.tree.map(lambda p, u: p + u, network.params, updates)
    return Network(params, keeps[0].statistics, opt_state), unperturbed


def advance(state: State, stepped: list[tuple[Network, Pass]], weights: jax.Array, labels: jax.Array) -> State:
    """Return the state after a step, with what is watched on the way: the first network's means, non-finite losses."""
    networks, passes = zip(*stepped, strict=True)
    # A sum, not a product of vectors, which TF32 or bfloat16 compute would round.
    loss = jnp.sum(passes[0].losses * weights)
    is_finite = jnp.isfinite(jnp.stack([one.losses for one in passes])).all()
    unseen = state.first_non_finite < 0
    return State(
        step=state.step + 1,
        networks=networks,
        running=_add(state.running, loss, passes[0].logits, labels, methods.monitored(networks[0].opt_state)),
        first_non_finite=jnp.where(unseen & ~is_finite, state.step, state.first_non_finite),
        last_finite_loss=jnp.where(unseen & is_finite, loss, state.last_finite_loss),
    )


def take(split: Images, positions: jax.Array) -> Images:
    """Return the samples at some positions of a split."""
    return jax.tree.map(lambda x: x[positions], split)


def batch_positions(setup: Setup, step: jax.Array, order: jax.Array) -> jax.Array:
    """Return the positions of a step's batch in the training set."""
    batch_size = setup.config.training.batch_size
    return jax.lax.dynamic_slice_in_dim(order, (step % setup.spec.steps_per_epoch) * batch_size, batch_size)


# --- what is measured on the way ----------------------------------------------------------------------------------

MONITORED = ("downweighted_share", "cosine", "gradient_norm", "perturbed_gradient_norm", "perturbation_norm")


def empty_running(network: Network) -> Running:
    """Return the sums of an epoch before its first step."""
    names = () if methods.monitored(network.opt_state) is None else MONITORED
    zero = np.zeros([], np.float32)
    return Running(steps=np.zeros([], np.int32), loss=zero, correct=zero, monitored=dict.fromkeys(names, zero))


def _add(running: Running, loss: jax.Array, logits: jax.Array, labels: jax.Array, monitored: Any) -> Running:
    correct = jnp.mean(jnp.argmax(logits, axis=-1) == labels)
    sums = {name: total + getattr(monitored, name) for name, total in running.monitored.items()}
    return Running(running.steps + 1, running.loss + loss, running.correct + correct, sums)


def running_metrics(state: State) -> dict[str, float]:
    """Return the means over the epoch so far, in training mode: loss, accuracy on given labels, monitored scalars."""
    running = jax.device_get(state.running)
    if not running.steps:
        return {}
    values = {"loss": running.loss, "accuracy": running.correct} | running.monitored
    return {f"running_{name}": float(total / running.steps) for name, total in values.items()}


def evaluate(setup: Setup, network: Network, batch: Images) -> Evaluation:
    """Measure every sample of a batch in evaluation mode."""
    logits, _ = apply(setup, network.params, network.statistics, batch.images, train=False)
    is_given = batch.labels[:, None] == jnp.arange(logits.shape[-1])
    # Choices, not products: minus infinity times zero is not a number.
    given = jnp.max(logits, axis=-1, where=is_given, initial=-jnp.inf)
    largest_other = jnp.max(logits, axis=-1, where=~is_given, initial=-jnp.inf)
    return Evaluation(
        companions.cross_entropy(logits, batch.labels), jnp.argmax(logits, axis=-1), given - largest_other
    )


def probabilities(setup: Setup, network: Network, images: jax.Array) -> jax.Array:
    """Return predicted probabilities, float32 (B, K), in evaluation mode."""
    logits, _ = apply(setup, network.params, network.statistics, images, train=False)
    return jax.nn.softmax(logits.astype(jnp.float32))


def analyse(
    setup: Setup, network: Network, seed: jax.Array, step: jax.Array, batch: Images, is_noisy: jax.Array | None
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Analyse the gradients that a step would take, see `gradient_analysis.measure`."""
    batch, dropout_key = augment(setup, seed, step, batch)

    def linearise(params: Any) -> tuple[jax.Array, Callable[[jax.Array], Any]]:
        losses, backward = forward(setup, params, network.statistics, batch, dropout_key)
        return losses, lambda weights: backward(weights).gradient

    rho = setup.config.optimizer.rho
    gradients = gradient_analysis.gradients(
        linearise, network.params, is_noisy, gradient_analysis.RHO if rho is None else rho
    )
    return gradient_analysis.measure(gradients, key(seed, ANALYSIS, step))
