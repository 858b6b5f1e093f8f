"""The training program on random images: its own trainer and training step, for its methods and for others.

What is measured is what a user runs: data of any set's form goes through `Trainer`, and the step is the function that
it calls. Pixels and labels are random; no time depends on them.
"""

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import saner_jax
from benchmarks.machinery import command, flops, timing
from examples.noisy_images import config as configuration
from examples.noisy_images import data, models
from examples.noisy_images.config import PAPER, Config, replace
from examples.noisy_images.training import devices, methods
from examples.noisy_images.training.step import Images, State, epoch_order
from examples.noisy_images.training.trainer import MATMUL_PRECISION, Trainer

NUM_CLASSES = 10
IMAGE_SHAPE = (32, 32, 3)


class Size(NamedTuple):
    """How much is measured where nothing is asked for."""

    model: str
    width: float
    batch_size: int
    precision: str
    steps_per_call: int
    """Steps timed in one call: on accelerators as many as hide the time of starting a call."""


SIZES = {"cpu": Size("resnet18", 0.25, 32, "float32", 1), "gpu": Size("resnet18", 1.0, 128, "bfloat16", 20)}


def device_size(sizes: Mapping[str, Any] = SIZES) -> Any:
    """Return the size for this device; what is not a CPU is taken for a GPU."""
    return sizes.get(jax.default_backend(), sizes["gpu"])


def add_options(parser: argparse.ArgumentParser, sizes: Mapping[str, Any] = SIZES) -> None:
    """Add the options of what is trained, all chosen by the device where not given."""

    def default(field: str) -> str:
        return f"on CPUs {getattr(sizes['cpu'], field)}, else {getattr(sizes['gpu'], field)}"

    models_known, precisions = sorted(models.MODELS), configuration.PRECISIONS
    parser.add_argument("--model", choices=models_known, help=f"network ({default('model')})")
    parser.add_argument("--width", type=command.positive, help=f"factor on channels ({default('width')})")
    parser.add_argument("--batch-size", type=command.at_least_one, help=f"images a step ({default('batch_size')})")
    parser.add_argument("--precision", choices=precisions, help=f"compute precision ({default('precision')})")


def choose(args: argparse.Namespace, sizes: Mapping[str, Any] = SIZES) -> argparse.Namespace:
    """Fill in by the device what was not given."""
    for field, value in device_size(sizes)._asdict().items():
        if getattr(args, field, value) is None:
            setattr(args, field, value)
    return args


def config(args: argparse.Namespace, **settings: Any) -> Config:
    """Return the paper's protocol with what the options say is trained, and other settings."""
    trained = {field: getattr(args, field) for field in ("model", "width", "batch_size", "precision")}
    return replace(PAPER, **trained, **settings)


def optax_sam(rho: float, then: optax.GradientTransformation | None = None) -> optax.GradientTransformationExtraArgs:
    """Give ``optax.contrib.sam`` in its opaque mode the signature of this package's methods.

    Args:
      rho: radius of the perturbation.
      then: what it steps with; nothing if not given, so that it emits the gradient at the perturbed weights.
    """
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
    tx = optax.contrib.sam(then or optax.identity(), ascent, opaque_mode=True)

    def update(updates: Any, state: Any, params: Any, *, grad_fn: Any) -> Any:
        return tx.update(updates, state, params, grad_fn=lambda w, _: grad_fn(w))

    return optax.GradientTransformationExtraArgs(tx.init, update)


# Entries like those of the training program, which monitors every method of two passes.
FURTHER: dict[str, methods.Stage] = {
    "sam-unmonitored": lambda p, **_: saner_jax.sam(p.rho),
    "saner-unmonitored": lambda p, **_: saner_jax.saner(p.rho, p.alpha),
    "optax.contrib.sam": lambda p, **_: optax_sam(p.rho),
}
METHODS = (*methods.METHODS, *FURTHER)


@contextlib.contextmanager
def _further_methods() -> Iterator[None]:
    methods.METHODS.update(FURTHER)
    try:
        yield
    finally:
        for name in FURTHER:
            del methods.METHODS[name]


def passes(method: str) -> int:
    """Return how often a method's step goes through the network, forward and backward."""
    return 1 if method == "sgd" else 2


def dataset(
    train: int,
    test: int,
    image_shape: tuple[int, int, int] = IMAGE_SHAPE,
    num_classes: int = NUM_CLASSES,
    seed: int = 0,
) -> data.Dataset:
    """Return random images with random labels, cropped and flipped like CIFAR's."""
    rng = np.random.default_rng(seed)

    def split(count: int) -> data.Split:
        images = rng.integers(0, 256, (count, *image_shape), np.uint8)
        labels = rng.integers(0, num_classes, count, np.int32)
        return data.Split(images, labels, labels, np.arange(count))

    channels = image_shape[-1]
    return data.Dataset(
        name="random",
        train=split(train),
        test=split(test),
        class_names=tuple(map(str, range(num_classes))),
        superclasses=None,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        crop_padding=4,
        flip=True,
    )


def trainer(config: Config, images: data.Dataset) -> Trainer:
    """Return the program's trainer, also for the methods of `FURTHER`, on one device however many there are."""
    configuration.check(config)
    with _further_methods():
        return Trainer(config, images, devices.mesh(1))


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled call of one or several training steps, what compiling it took, and what XLA says of it."""

    executable: Any
    trace_s: float
    compile_s: float

    def memory(self) -> dict[str, int]:
        """Return the bytes of arguments, results and temporary memory, and their peak."""
        m = self.executable.memory_analysis()
        held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
        return {
            "argument_bytes": m.argument_size_in_bytes,
            "output_bytes": m.output_size_in_bytes,
            "aliased_bytes": m.alias_size_in_bytes,
            "temporary_bytes": m.temp_size_in_bytes,
            "peak_bytes": held + m.temp_size_in_bytes,
        }

    def cost(self) -> dict[str, float | None]:
        """Return the bytes accessed and the operations as far as XLA sees them; it sees no library calls on GPUs."""
        analysis = self.executable.cost_analysis() or {}
        return {"xla_bytes_accessed": analysis.get("bytes accessed"), "xla_flops": analysis.get("flops")}


class Workload:
    """One configuration's training steps, several in a call if asked, and the state that they advance."""

    def __init__(self, config: Config, steps_per_call: int = 1, image_shape: tuple[int, int, int] = IMAGE_SHAPE):
        self.config, self.steps_per_call, self.image_shape = config, steps_per_call, image_shape
        # An epoch is as long as a call.
        images = dataset(steps_per_call * config.training.batch_size, config.training.batch_size, image_shape)
        self.trainer = trainer(config, images)
        self.seed = jnp.asarray(config.seed, jnp.uint32)
        self.images = Images(jnp.asarray(images.train.images), jnp.asarray(images.train.labels))
        self.order = epoch_order(self.seed, 0, len(images.train))

    @property
    def state(self) -> State:
        """The state as it is initialised; a call of what `compile` returns donates it."""
        return self.trainer.state

    @property
    def flops(self) -> int:
        """Operations of one call, see `flops`."""
        network = flops.network(
            self.config.network.model,
            width=self.config.network.width,
            num_classes=NUM_CLASSES,
            image_shape=self.image_shape,
        )
        images = self.config.training.batch_size * self.steps_per_call
        return flops.PER_PASS * passes(self.config.optimizer.method) * images * network

    def compile(self) -> Compiled:
        """Trace and compile one call."""
        function, number = self.trainer.functions.of_steps(self.steps_per_call)
        start = time.perf_counter()
        with jax.default_matmul_precision(MATMUL_PRECISION[self.config.network.precision]):
            lowered = function.lower(self.state, self.seed, self.images, self.order, **number)
        traced = time.perf_counter()
        executable = lowered.compile()
        return Compiled(executable, traced - start, time.perf_counter() - traced)

    def repeated(self, compiled: Compiled) -> timing.Repeated:
        """Return the call to time; it uses up the state."""
        return timing.Repeated(
            lambda state: compiled.executable(state, self.seed, self.images, self.order), self.trainer.state
        )
