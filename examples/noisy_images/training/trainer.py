"""The trainer: one jitted step for every method, epochs over data on the device or streamed, evaluation.

A run is a pure function of its configuration: every random choice is derived from the training seed and the step, so a
run that goes on from a checkpoint takes the same steps as one that was never stopped.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import compilation, data
from ..config import Config
from ..data import streaming
from ..errors import UserError
from ..measures import gradient_analysis
from . import devices, step
from .step import Evaluation, Images, Network, Spec, State, epoch_order

EVALUATION_BATCH = 500
# JAX's names: on GPUs and TPUs its own default multiplies float32 matrices in lower precision.
MATMUL_PRECISION = {"float32": "float32", "tf32": "tensorfloat32", "bfloat16": "bfloat16"}


# Steps of a call on CPUs, at most: temporary memory, whose pages cost there, is taken once a call, and nothing stops a
# call half-way.
STEPS_PER_CALL = 8


class Functions(NamedTuple):
    """The compiled functions of a run; they do not depend on its seed.

    State, seed, images of a split and order are replicated, batches are sharded.
    """

    create: Callable[[int], State]
    train_step: Callable[..., State]
    """(state, seed, images, order) -> state, for a split on the device."""
    train_steps: Callable[..., State]
    """(state, seed, images, order, steps=number) -> state, several steps in one call."""
    train_batch: Callable[..., State]
    """(state, seed, batch images, batch labels) -> state, for streamed images."""
    take: Callable[[Images, jax.Array], Images]
    """(images, positions) -> a batch of a split on the device."""
    evaluate: Callable[..., Evaluation]
    """(network, batch images, batch labels) -> what every sample is measured by."""
    probabilities: Callable[..., jax.Array]
    """(network, batch images) -> predicted probabilities, float32 (B, K)."""
    start_epoch: Callable[[State], State]
    analyse: Callable[..., tuple[dict[str, jax.Array], dict[str, jax.Array]]]
    """(network, seed, step, batch images, batch labels, noisy ones) -> what `gradient_analysis.measure` returns."""

    def of_steps(self, steps: int) -> tuple[jax.stages.Wrapped, dict[str, int]]:
        """Return the function that takes so many steps in one call, and the keywords that say so."""
        return (self.train_step, {}) if steps == 1 else (self.train_steps, {"steps": steps})


class Trainer:
    """Train one configuration on one data set whose labels already are the noisy ones."""

    def __init__(self, config: Config, dataset: data.Dataset, mesh: jax.sharding.Mesh | None = None):
        mesh = devices.mesh() if mesh is None else mesh
        self.steps_per_epoch = check_batches(config, dataset, mesh)
        self.config = config
        self.dataset = dataset
        self.mesh = mesh
        spec = Spec(
            num_classes=dataset.num_classes,
            image_shape=tuple(dataset.image_shape),
            steps_per_epoch=self.steps_per_epoch,
            mean=tuple(dataset.mean),
            std=tuple(dataset.std),
            # Streamed images come cropped.
            crop_padding=dataset.crop_padding if config.data.augment and not dataset.train.streamed else 0,
            flip=dataset.flip and config.data.augment,
        )
        # What the compiled functions see: runs that differ in the rest alone share them.
        compiled = Config(network=config.network, optimizer=config.optimizer, training=config.training)
        self._functions = compiled_functions(compiled, spec, mesh)
        self.steps_per_call = _steps_per_call(config.circumstances.scan_epochs, self.steps_per_epoch)
        self._seed = devices.replicate(mesh, jnp.asarray(config.seed, jnp.uint32))
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
                batch_size=self.config.training.batch_size,
                seed=self.config.seed,
                epoch=epoch,
                start_step=done,
                workers=self.config.circumstances.workers,
                train=True,
                augment=self.config.data.augment,
                image_size=train.images.image_size,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
            # Closed also when training stops half-way, so that the workers end with it.
            with contextlib.closing(batches):
                # Neither the copy to the devices nor the step is waited for: while they compute, this loop already
                # decodes and copies what comes next.
                for images, positions in batches:
                    batch = devices.shard(self.mesh, (images, train.labels[positions]))
                    yield lambda state, batch=batch: functions.train_batch(state, self._seed, *batch), 1
            return
        on_device = self._place(train)
        order = epoch_order(self.config.seed, epoch, len(train))[
            : self.steps_per_epoch * self.config.training.batch_size
        ]
        order = devices.replicate(self.mesh, order)
        while done < self.steps_per_epoch:
            # A run that was stopped under other circumstances takes single steps to where a call begins.
            steps = self.steps_per_call if done % self.steps_per_call == 0 else 1
            function, number = functions.of_steps(steps)
            advance = functools.partial(function, **number)
            yield lambda state, advance=advance: advance(state, self._seed, on_device, order), steps
            done += steps

    def analyse_gradients(self) -> gradient_analysis.Analysis:
        """Analyse the gradients of the coming epoch's first batches at the current weights; changes nothing.

        The batches are the ones that the next steps take, in the same order, augmentation and dropout: the first of
        them gives the very gradient of the next step. After the last epoch they are those of one more.
        """
        network = self.state.networks[0]
        split, start = self.dataset.train, self.epoch * self.steps_per_epoch
        noisy = None if split.clean_labels is None else split.labels != split.clean_labels
        batches = []
        for number, (images, positions) in enumerate(self._coming_batches(self.config.circumstances.analyse_batches)):
            is_noisy = None if noisy is None else noisy[positions]
            batch = devices.replicate(self.mesh, (images, split.labels[positions], is_noisy))
            with self._precision():
                measured = self._functions.analyse(network, self._seed, start + number, *batch)
            batches.append(gradient_analysis.only_known(jax.device_get(measured), is_noisy))
        return gradient_analysis.average(batches, gradient_analysis.leaf_names(network.params))

    def _coming_batches(self, count: int) -> Iterator[tuple[Any, np.ndarray]]:
        # Images and positions of the first batches of the epoch after the completed ones.
        split, size = self.dataset.train, self.config.training.batch_size
        if split.streamed:
            batches = streaming.batches(
                split,
                batch_size=size,
                seed=self.config.seed,
                epoch=self.epoch,
                # Processes take longer to start than a few batches to decode; the batches are the same.
                workers=0,
                train=True,
                augment=self.config.data.augment,
                image_size=split.images.image_size,
            )
            with contextlib.closing(batches):
                yield from itertools.islice(batches, count)
            return
        order = np.asarray(epoch_order(self.config.seed, self.epoch, len(split)))
        for positions in order[: count * size].reshape(count, size):
            yield split.images[positions], positions

    def evaluate(self, split: data.Split) -> Evaluation:
        """Measure every sample of a split in evaluation mode; NumPy arrays (N,) each."""
        network = self.state.networks[0]
        results = []
        with self._precision():
            for images, labels, count in self._evaluation_batches(split):
                outputs = self._functions.evaluate(network, images, labels)
                results.append([x[:count] for x in outputs])
        return Evaluation(*map(np.concatenate, zip(*jax.device_get(results), strict=True)))

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
                workers=self.config.circumstances.workers,
                train=False,
                image_size=split.images.image_size,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
            for start, (images, positions) in zip(starts, batches, strict=True):
                batch = devices.shard(self.mesh, (images, split.labels[positions]))
                yield *batch, min(size, len(split) - start)
            return
        on_device = self._place(split)
        for start in starts:
            positions = np.minimum(np.arange(start, start + size), len(split) - 1)
            batch = self._functions.take(on_device, devices.replicate(self.mesh, positions))
            yield *batch, min(size, len(split) - start)

    def _place(self, split: data.Split) -> Images:
        if id(split) not in self._on_device:
            images = Images(split.images, np.asarray(split.labels, np.int32))
            self._on_device[id(split)] = devices.replicate(self.mesh, images)
        return self._on_device[id(split)]

    def _precision(self) -> contextlib.AbstractContextManager:
        return jax.default_matmul_precision(MATMUL_PRECISION[self.config.network.precision])


def check_batches(config: Config, dataset: data.Dataset, mesh: jax.sharding.Mesh) -> int:
    """Return the number of steps of an epoch; raise if the batches cannot be cut from the data or for the devices."""
    batch_size, accumulate = config.training.batch_size, config.training.accumulate
    if batch_size > len(dataset.train):
        raise UserError(
            f"--batch-size {batch_size} is larger than the training set of {len(dataset.train)} images; choose a "
            "smaller one."
        )
    parts = mesh.size * accumulate
    if batch_size % parts:
        raise UserError(
            f"--batch-size {batch_size} is not a multiple of {parts}, the number of devices ({mesh.size}) times "
            f"--accumulate ({accumulate}): choose one that is, or fewer devices (--devices, or CUDA_VISIBLE_DEVICES "
            "for commands without it)."
        )
    steps, analysed = len(dataset.train) // batch_size, config.circumstances.analyse_batches
    if analysed > steps:
        raise UserError(f"--analyse-batches {analysed} is more than the {steps} batches of an epoch; choose fewer.")
    return steps


def check_memory(dataset: data.Dataset) -> None:
    """Raise if the data will not fit on the device, as far as the device says how much it has."""
    needed = data.memory_bytes(dataset)
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is not None and needed > 0.8 * limit:
        raise UserError(
            f"the data needs {needed / 2**30:.1f} GiB of the device's {limit / 2**30:.1f} GiB, too much beside the "
            "network: use --subset, or --image-size with a folder of image files, which streams them."
        )


def _steps_per_call(scan: bool | None, of_epoch: int) -> int:
    """Return how many steps a call takes, a divisor of those of an epoch: all, one, or on CPUs some."""
    if scan is None and jax.default_backend() == "cpu":
        return next(steps for steps in range(STEPS_PER_CALL, 0, -1) if of_epoch % steps == 0)
    return 1 if scan is False else of_epoch


@functools.lru_cache(maxsize=8)
def compiled_functions(config: Config, spec: Spec, mesh: jax.sharding.Mesh) -> Functions:
    """Jit everything that runs on the devices: the functions of `step`, for one setup and one row of devices."""
    setup = step.setup(config, spec)
    replicated, sharded = devices.replicated(mesh), devices.sharded(mesh)

    def initialise(seed: int) -> State:
        return devices.replicate(mesh, step.initialise(setup, seed))

    def train_batch(state: State, seed: jax.Array, images: jax.Array, labels: jax.Array) -> State:
        return step.train_batch(setup, state, seed, jax.lax.with_sharding_constraint(Images(images, labels), sharded))

    def train_step(state: State, seed: jax.Array, split: Images, order: jax.Array) -> State:
        return train_batch(state, seed, *step.take(split, step.batch_positions(setup, state.step, order)))

    def train_steps(state: State, seed: jax.Array, split: Images, order: jax.Array, steps: int) -> State:
        def body(state: State, _: None) -> tuple[State, None]:
            return train_step(state, seed, split, order), None

        return jax.lax.scan(body, state, length=steps)[0]

    def evaluate(network: Network, images: jax.Array, labels: jax.Array) -> Evaluation:
        return step.evaluate(setup, network, Images(images, labels))

    def probabilities(network: Network, images: jax.Array) -> jax.Array:
        return step.probabilities(setup, network, images)

    def analyse(
        network: Network, seed: jax.Array, number: jax.Array, images: Any, labels: Any, is_noisy: Any
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        batch, is_noisy = jax.lax.with_sharding_constraint((Images(images, labels), is_noisy), sharded)
        return step.analyse(setup, network, seed, number, batch, is_noisy)

    def start_epoch(state: State) -> State:
        return state._replace(running=devices.replicate(mesh, step.empty_running(state.networks[0])))

    jit = functools.partial(jax.jit, compiler_options=compilation.options(config.network.convolution))
    training = functools.partial(jit, donate_argnums=0, out_shardings=replicated)
    return Functions(
        create=initialise,
        train_step=training(train_step),
        train_steps=training(train_steps, static_argnames="steps"),
        train_batch=training(train_batch),
        take=jit(step.take, out_shardings=sharded),
        evaluate=jit(evaluate, out_shardings=replicated),
        probabilities=jit(probabilities, out_shardings=replicated),
        start_epoch=start_epoch,
        analyse=jit(analyse, out_shardings=replicated),
    )
