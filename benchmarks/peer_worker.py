"""One side of a comparison between frameworks, in a process of its own: it does what it is asked, line by line.

Both sides stay alive and take turns, so that they are measured in the same minutes on the same device, and neither's
libraries, threads or memory pool are in the other's way. Requests and answers are lines of JSON.
"""

import argparse
import dataclasses
import json
import sys
from typing import Any, Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Problem:
    """What both sides train: the same network, optimizer, batch and augmentation, on the same random images."""

    width: float
    batch_size: int
    steps: int
    """Steps that one call takes, and batches of images on the device."""
    precision: str
    """float32, tf32, bfloat16; for one step that is compared, float64."""
    compile: bool
    """Whether PyTorch compiles its network; JAX always does."""
    convolution: str = "auto"
    """The program's setting, which PyTorch's side does not see."""
    crop_padding: int = 4
    flip: bool = True
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    rho: float = 0.1
    alpha: float = 0.5
    num_classes: int = 10
    side: int = 32
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.25, 0.25, 0.25)

    def data(self) -> tuple[np.ndarray, np.ndarray]:
        """Return uint8 images (N, H, W, 3) and int32 labels (N,)."""
        rng = np.random.default_rng(0)
        count = self.steps * self.batch_size
        images = rng.integers(0, 256, (count, self.side, self.side, 3), np.uint8)
        return images, rng.integers(0, self.num_classes, count, np.int32)


class Side(Protocol):
    """What a worker drives. `before` and what `one_step` returns are tensors by PyTorch's names and layout."""

    packages: tuple[str, ...]

    def describe(self) -> dict[str, Any]: ...

    def prepare(self, method: str) -> None: ...

    def run(self, method: str, steps: int) -> None: ...

    def one_step(self, method: str, before: dict[str, np.ndarray]) -> dict[str, np.ndarray]: ...


class Ours:
    """The training program's step, several in a call on accelerators."""

    packages = ("jax", "flax", "optax")

    def __init__(self, problem: Problem):
        from benchmarks import workload
        from examples.noisy_images.config import PAPER, replace

        self._workload = workload
        self._problem = problem
        self._replace = replace
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
        self._calls: dict[str, tuple[Any, int]] = {}

    def describe(self) -> dict[str, Any]:
        """Return what this side runs."""
        import jax

        return {"device": jax.devices()[0].device_kind, "jax": jax.__version__}

    def prepare(self, method: str) -> None:
        """Compile the step of a method."""
        import jax

        steps = 1 if jax.default_backend() == "cpu" else self._problem.steps
        config = self._replace(self._config, method=method)
        work = self._workload.Workload(config, steps, (self._problem.side, self._problem.side, 3))
        self._calls[method] = (work.repeated(work.compile()), steps)

    def run(self, method: str, steps: int) -> None:
        """Take steps and wait for them."""
        call, steps_per_call = self._calls[method]
        for _ in range(max(steps // steps_per_call, 1)):
            call()

    def first(self) -> dict[str, np.ndarray]:
        """Return the tensors that a run starts from."""
        return _by_name(self._trainer("sgd").state.networks[0])

    def one_step(self, method: str, before: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Take one float64 step on the first batch from what a run starts from; return what is then, and the loss."""
        import jax
        import jax.numpy as jnp

        from benchmarks import rounding

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
        images = self._workload.dataset(self._problem.batch_size, 1, (side, side, 3))
        return self._workload.trainer(self._replace(self._config, method=method), images)


def _by_name(network: Any) -> dict[str, np.ndarray]:
    """Name and lay out a network's variables as PyTorch does: (out, in, height, width) and (out, in)."""
    from flax import nnx

    names = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    tensors = {}
    for state in (network.params, network.statistics):
        for path, variable in nnx.to_flat_state(state):
            array = np.asarray(variable.get_value() if hasattr(variable, "get_value") else variable)
            name = ".".join(map(str, (*path[:-1], names[path[-1]])))
            tensors[name] = np.ascontiguousarray(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T)
    return tensors


def answer(side: Side, request: dict[str, Any]) -> Any:
    """Do what a request asks; returns JSON values."""
    match request:
        case {"do": "describe"}:
            return side.describe()
        case {"do": "prepare", "method": method}:
            side.prepare(method)
        case {"do": "run", "method": method, "steps": steps}:
            side.run(method, steps)
        case {"do": "first", "to": path}:
            np.savez(path, **side.first())
        case {"do": "one step", "method": method, "from": source, "to": path}:
            with np.load(source) as archive:
                before = dict(archive)
            np.savez(path, **side.one_step(method, before))
        case _:
            raise ValueError(f"no such request: {request}")
    return {}


def main() -> None:
    """Serve one side until the requests end."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_worker")
    parser.add_argument("side", choices=("ours", "pytorch"))
    parser.add_argument("problem", help="JSON")
    args = parser.parse_args()
    problem = Problem(**json.loads(args.problem))
    # What libraries print goes elsewhere.
    answers, sys.stdout = sys.stdout, sys.stderr
    if args.side == "ours":
        side: Side = Ours(problem)
    else:
        from benchmarks.pytorch_peer import Peer

        side = Peer(problem)
    for line in sys.stdin:
        try:
            reply = {"answer": answer(side, json.loads(line))}
        # Whatever a framework raises is for the parent to say.
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
