"""The trainer: one jitted step for every method, epochs over data on the device or streamed, evaluation.

A run is a pure function of its configuration: every random choice is derived from the training seed and the step, so a
run that goes on from a checkpoint takes the same steps as one that was never stopped.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.noisy_images import companions, data, devices, gradient_analysis, methods, models
from examples.noisy_images.accumulation import accumulate
from examples.noisy_images.config import PAPER, Config
from examples.noisy_images.data import augmentation, streaming
from examples.noisy_images.errors import UserError

EVALUATION_BATCH = 500
# JAX's names: on GPUs and TPUs its own default multiplies float32 matrices in lower precision.
MATMUL_PRECISION = {"float32": "float32", "tf32": "tensorfloat32", "bfloat16": "bfloat16"}


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
    """A split on the device."""

    images: jax.Array
    """uint8 (N, H, W, C)."""
    labels: jax.Array
    """Given labels, int32 (N,)."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """What the compiled functions depend on beside the configuration."""

    num_classes: int
    image_shape: tuple[int, int, int]
    steps_per_epoch: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int
    flip: bool


class Functions(NamedTuple):
    """The compiled functions of a run; they do not depend on its seed.

    State, seed, images of a split and order are whole on every device, batches are divided.
    """

    create: Callable[[int], State]
    train_step: Callable[..., State]
    """(state, seed, images, order) -> state, for a split on the device."""
    train_epoch: Callable[..., State]
    """(state, seed, images, order) -> state, a whole epoch in one call."""
    train_batch: Callable[..., State]
    """(state, seed, batch images, batch labels) -> state, for streamed images."""
    take: Callable[[Images, jax.Array], Images]
    """(images, positions) -> a batch of a split on the device."""
    evaluate: Callable[..., tuple[jax.Array, jax.Array]]
    """(network, batch images, batch labels) -> losses against given labels, predicted labels."""
    probabilities: Callable[..., jax.Array]
    """(network, batch images) -> predicted probabilities, float32 (B, K)."""
    start_epoch: Callable[[State], State]
    analyse: Callable[..., tuple[dict[str, jax.Array], dict[str, jax.Array]]]
    """(network, seed, step, batch images, batch labels, noisy ones) -> what `gradient_analysis.measure` returns."""


# Settings that the compiled functions do not see: runs that differ in these alone share them.
_NOT_COMPILED = (
    *(
        "dataset",
        "data_dir",
        "validation_dir",
        "image_size",
        "subset",
        "test_subset",
        "holdout",
        "folds",
        "fold",
        "data_seed",
        "skip_corrupt",
        "workers",
    ),
    *("noise", "rate", "noise_seed", "noise_options", "human_labels", "label_set"),
    *("seed", "evaluate_every", "checkpoint_every", "sample_history", "scan_epochs", "analyse_batches"),
)


class Trainer:
    """Train one configuration on one data set whose labels already are the noisy ones."""

    def __init__(self, config: Config, dataset: data.Dataset, mesh: jax.sharding.Mesh | None = None):
        mesh = devices.mesh() if mesh is None else mesh
        if config.batch_size > len(dataset.train):
            raise UserError(
                f"--batch-size {config.batch_size} is larger than the training set of {len(dataset.train)} images; "
                "choose a smaller one."
            )
        parts = mesh.size * config.accumulate
        if config.batch_size % parts:
            raise UserError(
                f"--batch-size {config.batch_size} is not a multiple of {parts}, the number of devices ({mesh.size}) "
                f"times --accumulate ({config.accumulate}): choose one that is, or fewer devices (--devices, or "
                "CUDA_VISIBLE_DEVICES for commands without it)."
            )
        self.config = config
        self.dataset = dataset
        self.mesh = mesh
        self.steps_per_epoch = len(dataset.train) // config.batch_size
        if config.analyse_batches > self.steps_per_epoch:
            raise UserError(
                f"--analyse-batches {config.analyse_batches} is more than the {self.steps_per_epoch} batches of an "
                "epoch; choose fewer."
            )
        spec = Spec(
            num_classes=dataset.num_classes,
            image_shape=tuple(dataset.image_shape),
            steps_per_epoch=self.steps_per_epoch,
            mean=tuple(dataset.mean),
            std=tuple(dataset.std),
            # Streamed images come cropped.
            crop_padding=dataset.crop_padding if config.augment and not dataset.train.streamed else 0,
            flip=dataset.flip and config.augment,
        )
        self._functions = compiled_functions(
            dataclasses.replace(config, **{field: getattr(PAPER, field) for field in _NOT_COMPILED}), spec, mesh
        )
        self.scan_epochs = jax.default_backend() != "cpu" if config.scan_epochs is None else config.scan_epochs
        self._seed = devices.put_whole(mesh, jnp.asarray(config.seed, jnp.uint32))
        self._on_device: dict[int, Images] = {}
        check_memory(dataset)
        self.state = self._functions.create(config.seed)

    @property
    def functions(self) -> Functions:
        """The compiled functions that this run goes through."""
        return self._functions

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self.state.step)

    @property
    def epoch(self) -> int:
        """Completed epochs."""
        return self.step // self.steps_per_epoch

    def train_epoch(self, should_stop: Callable[[], bool] = lambda: False) -> Iterator[int]:
        """Train to the end of the epoch that the state stands in, yielding the step after every compiled call.

        Stops between two calls when ``should_stop`` says so; the state is then one that training goes on from.
        """
        epoch, done = divmod(self.step, self.steps_per_epoch)
        if done == 0:
            self.state = self._functions.start_epoch(self.state)
        for advance, steps in self._epoch_calls(epoch, done):
            with self._precision():
                self.state = advance(self.state)
            done += steps
            yield epoch * self.steps_per_epoch + done
            if should_stop():
                return

    def _epoch_calls(self, epoch: int, done: int) -> Iterator[tuple[Callable[[State], State], int]]:
        # Each call with the number of steps that it takes.
        functions, train = self._functions, self.dataset.train
        if train.streamed:
            batches = streaming.batches(
                train,
                batch_size=self.config.batch_size,
                seed=self.config.seed,
                epoch=epoch,
                start_step=done,
                workers=self.config.workers,
                train=True,
                image_size=train.images.image_size,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
            # Closed also when training stops half-way, so that the workers end with it.
            with contextlib.closing(batches):
                # Neither the copy to the devices nor the step is waited for: while they compute, this loop already
                # decodes and copies what comes next.
                for images, positions in batches:
                    batch = devices.put_divided(self.mesh, (images, train.labels[positions]))
                    yield lambda state, batch=batch: functions.train_batch(state, self._seed, *batch), 1
            return
        on_device = self._place(train)
        order = epoch_order(self.config.seed, epoch, len(train))[: self.steps_per_epoch * self.config.batch_size]
        order = devices.put_whole(self.mesh, order)
        if self.scan_epochs and done == 0:
            yield lambda state: functions.train_epoch(state, self._seed, on_device, order), self.steps_per_epoch
            return
        for _ in range(done, self.steps_per_epoch):
            yield lambda state: functions.train_step(state, self._seed, on_device, order), 1

    def analyse_gradients(self) -> gradient_analysis.Analysis:
        """Analyse the gradients of the coming epoch's first batches at the current weights; changes nothing.

        The batches are the ones that the next steps take, in the same order, augmentation and dropout: the first of
        them gives the very gradient of the next step. After the last epoch they are those of one more.
        """
        network = self.state.networks[0]
        split, start = self.dataset.train, self.epoch * self.steps_per_epoch
        noisy = None if split.clean_labels is None else split.labels != split.clean_labels
        batches = []
        for number, (images, positions) in enumerate(self._coming_batches(self.config.analyse_batches)):
            is_noisy = None if noisy is None else noisy[positions]
            batch = devices.put_whole(self.mesh, (images, split.labels[positions], is_noisy))
            with self._precision():
                measured = self._functions.analyse(network, self._seed, start + number, *batch)
            batches.append(gradient_analysis.only_known(jax.device_get(measured), is_noisy))
        return gradient_analysis.average(batches, gradient_analysis.leaf_names(network.params))

    def _coming_batches(self, count: int) -> Iterator[tuple[Any, np.ndarray]]:
        # Images and positions of the first batches of the epoch after the completed ones.
        split, size = self.dataset.train, self.config.batch_size
        if split.streamed:
            batches = streaming.batches(
                split,
                batch_size=size,
                seed=self.config.seed,
                epoch=self.epoch,
                # Processes take longer to start than a few batches to decode; the batches are the same.
                workers=0,
                train=True,
                image_size=split.images.image_size,
            )
            with contextlib.closing(batches):
                yield from itertools.islice(batches, count)
            return
        order = np.asarray(epoch_order(self.config.seed, self.epoch, len(split)))
        for positions in order[: count * size].reshape(count, size):
            yield split.images[positions], positions

    def evaluate(self, split: data.Split) -> tuple[np.ndarray, np.ndarray]:
        """Return losses against given labels and predicted labels, (N,) each, in evaluation mode."""
        network = self.state.networks[0]
        results = []
        with self._precision():
            for images, labels, count in self._evaluation_batches(split):
                outputs = self._functions.evaluate(network, images, labels)
                results.append([x[:count] for x in outputs])
        losses, predictions = zip(*jax.device_get(results), strict=True)
        return np.concatenate(losses), np.concatenate(predictions)

    def probabilities(self, split: data.Split) -> np.ndarray:
        """Return predicted probabilities of every class, float32 (N, K), in evaluation mode."""
        network = self.state.networks[0]
        with self._precision():
            results = [
                self._functions.probabilities(network, images)[:count]
                for images, _, count in self._evaluation_batches(split)
            ]
        return np.concatenate(jax.device_get(results))

    def _evaluation_batches(self, split: data.Split) -> Iterator[tuple[Any, Any, int]]:
        # Repeats fill up the last batch, at its end, so that all have one shape that can be divided; they are cut off.
        size = -(-min(EVALUATION_BATCH, len(split)) // self.mesh.size) * self.mesh.size
        starts = range(0, len(split), size)
        if split.streamed:
            batches = streaming.batches(
                split,
                batch_size=size,
                seed=0,
                epoch=0,
                workers=self.config.workers,
                train=False,
                image_size=split.images.image_size,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
            for start, (images, positions) in zip(starts, batches, strict=True):
                batch = devices.put_divided(self.mesh, (images, split.labels[positions]))
                yield *batch, min(size, len(split) - start)
            return
        on_device = self._place(split)
        for start in starts:
            positions = np.minimum(np.arange(start, start + size), len(split) - 1)
            batch = self._functions.take(on_device, devices.put_whole(self.mesh, positions))
            yield *batch, min(size, len(split) - start)

    def _place(self, split: data.Split) -> Images:
        if id(split) not in self._on_device:
            images = Images(split.images, np.asarray(split.labels, np.int32))
            self._on_device[id(split)] = devices.put_whole(self.mesh, images)
        return self._on_device[id(split)]

    def _precision(self) -> contextlib.AbstractContextManager:
        return jax.default_matmul_precision(MATMUL_PRECISION[self.config.precision])


def epoch_order(seed: int, epoch: int, size: int) -> jax.Array:
    """Return the order in which an epoch visits the training set, int32 (N,)."""
    return jax.random.permutation(_key(jnp.uint32(seed), _ORDER, epoch), size)


def check_memory(dataset: data.Dataset) -> None:
    """Raise if the data will not fit on the device, as far as the device says how much it has."""
    needed = data.memory_bytes(dataset)
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is not None and needed > 0.8 * limit:
        raise UserError(
            f"the data needs {needed / 2**30:.1f} GiB of the device's {limit / 2**30:.1f} GiB, too much beside the "
            "network: use --subset, or --image-size with a folder of image files, which streams them."
        )


# Streams of random numbers, each derived from the training seed and a counter of its own.
_ORDER, _AUGMENTATION, _DROPOUT, _METHOD, _ANALYSIS = range(5)


def _key(seed: jax.Array, stream: int, counter: jax.Array | int) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), counter)


@functools.lru_cache(maxsize=8)
def compiled_functions(config: Config, spec: Spec, mesh: jax.sharding.Mesh) -> Functions:
    """Build and jit everything that runs on the devices."""
    whole, divided = devices.whole(mesh), devices.divided(mesh)
    build = functools.partial(
        models.create,
        config.model,
        num_classes=spec.num_classes,
        image_shape=spec.image_shape,
        width=config.width,
        padding=config.padding,
        initialisation=config.initialisation,
        batch_norm_momentum=config.batch_norm_momentum,
        batch_norm_epsilon=config.batch_norm_epsilon,
        batch_norm_groups=config.batch_norm_groups,
        dropout=config.dropout,
        rematerialise=config.rematerialise,
        dtype="bfloat16" if config.precision == "bfloat16" else "float32",
        convolution=config.convolution,
    )
    optimizer = methods.create(config, spec.steps_per_epoch, spec.num_classes)
    graphdef = nnx.split(nnx.eval_shape(lambda: build(seed=0)), nnx.Param, nnx.BatchStat)[0]
    sample_loss = companions.hard_bootstrapping if config.companion == "bootstrapping" else companions.cross_entropy
    co_teaching = config.companion == "co-teaching"

    def create(seed: int) -> State:
        networks = []
        for member in range(2 if co_teaching else 1):
            # Members of a pair differ in their initial weights and in what their methods draw.
            _, params, statistics = nnx.split(build(seed=seed + 2**31 * member), nnx.Param, nnx.BatchStat)
            # The optimizer of this seed differs from the compiled one in its initial state alone.
            own = methods.create(
                config, spec.steps_per_epoch, spec.num_classes, jax.random.bits(_key(seed, _METHOD, member))
            )
            networks.append(Network(params, statistics, own.init(params)))
        state = State(
            step=jnp.zeros([], jnp.int32),
            networks=tuple(networks),
            running=empty_running(networks[0].opt_state),
            first_non_finite=jnp.full([], -1, jnp.int32),
            last_finite_loss=jnp.full([], jnp.nan, jnp.float32),
        )
        # Leaves of their own buffers: the state is donated to every step.
        return devices.put_whole(mesh, jax.tree.map(lambda x: jnp.array(x, copy=True), state))

    def empty_running(opt_state: optax.OptState) -> Running:
        names = () if methods.monitored(opt_state) is None else _MONITORED
        zero = np.zeros([], np.float32)
        return Running(steps=np.zeros([], np.int32), loss=zero, correct=zero, monitored=dict.fromkeys(names, zero))

    def apply(params: Any, statistics: Any, images: jax.Array, train: bool, dropout_key: jax.Array | None) -> Any:
        # A copy: inside jax.grad a model must not share variables with the trace outside.
        model = nnx.merge(graphdef, params, statistics, copy=True)
        rngs = None if dropout_key is None else nnx.Rngs(dropout=dropout_key)
        logits = model(images, train=train, rngs=rngs)
        return logits, nnx.state(model, nnx.BatchStat)

    def augmented(seed: jax.Array, step: jax.Array, batch: Images) -> tuple[Images, jax.Array | None]:
        """Return the batch as a step takes it, its images still uint8, and the key of the step's dropout masks."""
        images = augmentation.augment(
            _key(seed, _AUGMENTATION, step), batch.images, crop_padding=spec.crop_padding, flip=spec.flip
        )
        return batch._replace(images=images), _key(seed, _DROPOUT, step) if config.dropout else None

    # One function to JAX, whose second pass takes the first one's trace; the compiler sees no difference.
    @jax.jit
    def of_batch(params: Any, statistics: Any, batch: Images, dropout_key: jax.Array | None) -> Any:
        images = augmentation.normalise(batch.images, spec.mean, spec.std)
        logits, statistics = apply(params, statistics, images, True, dropout_key)
        return sample_loss(logits, batch.labels), (logits, statistics)

    def forward(
        params: Any, statistics: Any, batch: Images, dropout_key: jax.Array | None
    ) -> tuple[jax.Array, Callable[[jax.Array], Any]]:
        """Return the samples' losses, and their backward pass: weights -> gradient, statistics, losses, logits."""

        def linearise(rows: Images, key: jax.Array | None) -> Any:
            return jax.vjp(lambda params: of_batch(params, statistics, rows, key), params, has_aux=True)

        if config.accumulate == 1:
            losses, pullback, (logits, moved) = linearise(batch, dropout_key)
            return losses, lambda weights: (pullback(weights.astype(losses.dtype))[0], moved, losses, logits)

        # Masks of their own for each micro-batch, the same in all passes.
        keys = None if dropout_key is None else jax.random.split(dropout_key, config.accumulate)

        def losses_alone(part: Images, key: jax.Array | None) -> Any:
            return (), linearise(part, key)[0]

        def backward(weights: jax.Array) -> Any:
            def of_part(part: tuple[Images, jax.Array], key: jax.Array | None) -> Any:
                rows, weights = part
                losses, pullback, (logits, moved) = linearise(rows, key)
                return (pullback(weights.astype(losses.dtype))[0], moved), (losses, logits)

            (gradient, moved), (losses, logits) = accumulate(of_part, (batch, weights), keys, config.accumulate)
            return gradient, jax.tree.map(lambda x: x / config.accumulate, moved), losses, logits

        # A pass of its own, which the compiler drops where nothing depends on the losses before the weights.
        return accumulate(losses_alone, batch, keys, config.accumulate)[1], backward

    def train_batch(state: State, seed: jax.Array, images: jax.Array, labels: jax.Array) -> State:
        batch = jax.lax.with_sharding_constraint(Images(images, labels), divided)
        batch, dropout_key = augmented(seed, state.step, batch)

        # The losses of all networks come first, because Co-teaching weighs the samples by them.
        passes = [forward(n.params, n.statistics, batch, dropout_key) for n in state.networks]
        if co_teaching:
            weights = companions.co_teaching_weights(
                tuple(losses for losses, _ in passes),
                state.step // spec.steps_per_epoch,
                config.forget_rate,
                config.forget_ramp_epochs,
            )
        else:
            weights = (jnp.full([config.batch_size], 1 / config.batch_size),)

        networks, losses, logits = [], [], []
        for network, (_, backward), weight in zip(state.networks, passes, weights, strict=True):
            of_perturbed_pass = []

            def grad_fn(params: Any, network=network, weight=weight, kept=of_perturbed_pass) -> Any:
                h, statistics, _, _ = forward(params, network.statistics, batch, dropout_key)[1](weight)
                kept.append(statistics)
                return h

            g, statistics, its_losses, its_logits = backward(weight)
            updates, opt_state = optimizer.update(g, network.opt_state, network.params, grad_fn=grad_fn)
            if config.batch_norm_pass == "perturbed" and of_perturbed_pass:
                statistics = of_perturbed_pass[0]
            params = jax.tree.map(lambda p, u: p + u, network.params, updates)
            networks.append(Network(params, statistics, opt_state))
            losses.append(its_losses)
            logits.append(its_logits)

        # A sum, not a product of vectors, which TF32 or bfloat16 compute would round.
        loss = jnp.sum(losses[0] * weights[0])
        is_finite = jnp.isfinite(jnp.stack(losses)).all()
        unseen = state.first_non_finite < 0
        return State(
            step=state.step + 1,
            networks=tuple(networks),
            running=_add(state.running, loss, logits[0], labels, methods.monitored(networks[0].opt_state)),
            first_non_finite=jnp.where(unseen & ~is_finite, state.step, state.first_non_finite),
            last_finite_loss=jnp.where(unseen & is_finite, loss, state.last_finite_loss),
        )

    def take(split: Images, positions: jax.Array) -> Images:
        return jax.tree.map(lambda x: x[positions], split)

    def train_step(state: State, seed: jax.Array, split: Images, order: jax.Array) -> State:
        start = (state.step % spec.steps_per_epoch) * config.batch_size
        positions = jax.lax.dynamic_slice_in_dim(order, start, config.batch_size)
        return train_batch(state, seed, *take(split, positions))

    def train_epoch(state: State, seed: jax.Array, split: Images, order: jax.Array) -> State:
        def body(state: State, _: None) -> tuple[State, None]:
            return train_step(state, seed, split, order), None

        return jax.lax.scan(body, state, length=spec.steps_per_epoch)[0]

    def evaluation_logits(network: Network, images: jax.Array) -> jax.Array:
        images = augmentation.normalise(images, spec.mean, spec.std)
        return apply(network.params, network.statistics, images, False, None)[0]

    def evaluate(network: Network, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = evaluation_logits(network, images)
        return companions.cross_entropy(logits, labels), jnp.argmax(logits, axis=-1)

    def analyse(
        network: Network,
        seed: jax.Array,
        step: jax.Array,
        images: jax.Array,
        labels: jax.Array,
        is_noisy: jax.Array | None,
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        batch, is_noisy = jax.lax.with_sharding_constraint((Images(images, labels), is_noisy), divided)
        batch, dropout_key = augmented(seed, step, batch)

        def linearise(params: Any) -> tuple[jax.Array, Callable[[jax.Array], Any]]:
            losses, backward = forward(params, network.statistics, batch, dropout_key)
            return losses, lambda weights: backward(weights)[0]

        rho = gradient_analysis.RHO if config.rho is None else config.rho
        gradients = gradient_analysis.gradients(linearise, network.params, is_noisy, rho)
        return gradient_analysis.measure(gradients, _key(seed, _ANALYSIS, step))

    def probabilities(network: Network, images: jax.Array) -> jax.Array:
        return jax.nn.softmax(evaluation_logits(network, images).astype(jnp.float32))

    return Functions(
        create=create,
        train_step=jax.jit(train_step, donate_argnums=0, out_shardings=whole),
        train_epoch=jax.jit(train_epoch, donate_argnums=0, out_shardings=whole),
        train_batch=jax.jit(train_batch, donate_argnums=0, out_shardings=whole),
        take=jax.jit(take, out_shardings=divided),
        evaluate=jax.jit(evaluate, out_shardings=whole),
        probabilities=jax.jit(probabilities, out_shardings=whole),
        start_epoch=lambda state: state._replace(
            running=devices.put_whole(mesh, empty_running(state.networks[0].opt_state))
        ),
        analyse=jax.jit(analyse, out_shardings=whole),
    )


_MONITORED = ("downweighted_share", "cosine", "gradient_norm", "perturbed_gradient_norm", "perturbation_norm")


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
