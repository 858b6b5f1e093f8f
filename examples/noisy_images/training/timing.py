"""How long a run takes, from a few of its steps."""

import itertools
import statistics
import time

import jax
import numpy as np

from ..config import replace
from ..measures import sharpness
from .preparation import Prepared
from .trainer import EVALUATION_BATCH, Trainer


def seconds_per_epoch(prepared: Prepared, seconds: float = 2.0, steps: int = 20) -> float:
    """Time a few steps and evaluations of a run, compilation apart, and return what an epoch takes."""
    config, dataset = prepared.config, prepared.dataset
    # Step by step, so that a few of them can be taken.
    trainer = Trainer(replace(config, scan_epochs=False), dataset)
    times = []
    training_steps = itertools.chain.from_iterable(trainer.train_epoch() for _ in itertools.count())
    # The first step of each kind is compiled.
    every = config.optimizer.every
    compiled = min(every, 2)
    while len(times) < every + 2 or (len(times) <= steps and sum(times[compiled:]) < seconds):
        started = time.perf_counter()
        next(training_steps)
        jax.block_until_ready(trainer.state)
        times.append(time.perf_counter() - started)
    with_second = statistics.median(times[every::every])
    alone = statistics.median([t for i, t in enumerate(times) if i >= compiled and i % every] or [0.0])
    step = (with_second + (every - 1) * alone) / every
    few = dataset.train.take(np.arange(min(len(dataset.train), 2 * EVALUATION_BATCH)))
    trainer.evaluate(few)
    started = time.perf_counter()
    trainer.evaluate(few)
    image = (time.perf_counter() - started) / len(few)
    images = len(dataset.test) + len(dataset.train) / config.circumstances.evaluate_every
    analysis = 0.0
    if samples := config.circumstances.sharpness_samples:
        analysis += sharpness.of_trainer(trainer, samples=samples)["seconds"] / config.circumstances.evaluate_every
    if config.circumstances.analyse_batches:
        trainer.analyse_gradients()
        started = time.perf_counter()
        trainer.analyse_gradients()
        analysis += time.perf_counter() - started
    return step * trainer.steps_per_epoch + image * images + analysis


def estimate(seconds: float) -> str:
    """Return how long something takes as a sentence of where it comes from."""
    return f"about {duration(seconds)} on this device, estimated from a few steps; compilation not counted"


def duration(seconds: float) -> str:
    """Return a duration in the two units that matter."""
    if seconds < 60:
        return f"{seconds:.2g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
