"""The training program's step, as a side of a comparison."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.machinery import rounding, workload
from benchmarks.machinery.sides.problem import Problem
from examples.noisy_images.config import PAPER, replace


class Ours:
    """The training program's step, as many in a call as the problem says."""

    packages = ("jax", "flax", "optax")

    def __init__(self, problem: Problem):
        self._problem = problem
        self._config = replace(
            PAPER,
            model="resnet18",
            width=problem.width,
            batch_size=problem.batch_size,
            precision="float32" if problem.precision == "float64" else problem.precision,
            convolution=problem.convolution,
            augment=bool(problem.crop_padding or problem.flip),
            learning_rate=problem.learning_rate,
            momentum=problem.momentum,
            weight_decay=problem.weight_decay,
            rho=problem.rho,
            alpha=problem.alpha,
            alpha_ramp=0.0,
        )
        self._calls: dict[str, Any] = {}

    def describe(self) -> dict[str, Any]:
        """Return what this side runs."""
        return {"device": jax.devices()[0].device_kind, "jax": jax.__version__}

    def prepare(self, method: str) -> None:
        """Compile the step of a method."""
        config, side = replace(self._config, method=method), self._problem.side
        work = workload.Workload(config, self._problem.steps, (side, side, 3))
        self._calls[method] = work.repeated(work.compile())

    def run(self, method: str, steps: int) -> None:
        """Take steps and wait for them."""
        for _ in range(steps // self._problem.steps):
            self._calls[method]()

    def first(self) -> dict[str, np.ndarray]:
        """Return the tensors that a run starts from."""
        return _by_name(self._trainer("sgd").state.networks[0])

    def one_step(self, method: str, before: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Take one float64 step on the first batch from what a run starts from; return what is then, and the loss."""
        trainer = self._trainer(method)
        if any((before[name] != array).any() for name, array in _by_name(trainer.state.networks[0]).items()):
            raise ValueError("this side starts from its own initialisation only")
        images, labels = (jnp.asarray(x[: self._problem.batch_size]) for x in self._problem.data())
        with jax.enable_x64(True):
            step = jax.jit(rounding.in_float64(trainer.functions.train_batch))
            state = step(trainer.state, jnp.uint32(0), images, labels)
        return _by_name(state.networks[0]) | {"loss": np.asarray(state.running.loss)}

    def _trainer(self, method: str) -> Any:
        side = self._problem.side
        images = workload.dataset(self._problem.batch_size, 1, (side, side, 3))
        return workload.trainer(replace(self._config, method=method), images)


def _by_name(network: Any) -> dict[str, np.ndarray]:
    """Name and lay out a network's variables as PyTorch does: (out, in, height, width) and (out, in)."""
    names = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    tensors = {}
    for state in (network.params, network.statistics):
        for path, variable in nnx.to_flat_state(state):
            array = np.asarray(variable.get_value() if hasattr(variable, "get_value") else variable)
            name = ".".join(map(str, (*path[:-1], names[path[-1]])))
            tensors[name] = np.ascontiguousarray(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T)
    return tensors
