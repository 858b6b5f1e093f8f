"""Wall-clock times of calls that take turns, within a budget of time."""

import contextlib
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Fewer say nothing about spread.
MINIMUM_ROUNDS = 3


class Budget:
    """Time that a benchmark may take, counted from here; without a number of seconds there is no limit."""

    def __init__(self, seconds: float | None = None):
        self._end = None if seconds is None else time.monotonic() + seconds

    def remaining(self) -> float:
        """Return the seconds that are left, infinite without a limit and never negative."""
        return float("inf") if self._end is None else max(self._end - time.monotonic(), 0.0)

    def share(self, fraction: float) -> "Budget":
        """Return a budget of its own: a fraction of what is left."""
        return Budget(None if self._end is None else fraction * self.remaining())


class Repeated:
    """A call whose result is its own next argument, as a donated training state is."""

    def __init__(self, function: Callable[[Any], Any], carry: Any):
        self._function, self.carry = function, carry

    def __call__(self) -> None:
        self.carry = jax.block_until_ready(self._function(self.carry))

    def check_finite(self, name: str) -> None:
        """Raise if the floating-point values that are left are not finite: the times would mean nothing."""
        leaves = [leaf for leaf in jax.tree.leaves(self.carry) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        if not all(bool(jnp.isfinite(leaf).all()) for leaf in leaves):
            raise FloatingPointError(f"{name} left non-finite values: its times mean nothing.")


def interleaved(
    subjects: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    warm_up: int,
    budget: Budget | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Return seconds per call, one entry a round; every round calls every subject once, in a new random order.

    So what else the machine does hits all of them alike, and they can be compared within rounds. A call has to wait for
    what it starts. Timing ends after `rounds`, or with the budget, but not before `MINIMUM_ROUNDS`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    rng = np.random.default_rng(seed)
    budget = budget or Budget()
    for round_ in range(-warm_up, rounds):
        if round_ >= MINIMUM_ROUNDS and not budget.remaining():
            break
        for name in rng.permutation(list(subjects)):
            start = time.perf_counter()
            subjects[name]()
            elapsed = time.perf_counter() - start
            if round_ >= 0:
                seconds[name].append(elapsed)
    return {name: np.array(values) for name, values in seconds.items()}


def trace(folder: pathlib.Path | None) -> contextlib.AbstractContextManager:
    """Record a trace of the JAX profiler into the folder, if there is one; TensorBoard, XProf and Perfetto read it."""
    return contextlib.nullcontext() if folder is None else jax.profiler.trace(str(folder))
