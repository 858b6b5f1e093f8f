"""Measure what one optimizer step costs beside the network: time, compile time, temporary memory, traffic.

    python -m benchmarks.update_cost --output benchmarks/results/update_cost.json

Every method takes steps on the parameter tree of ResNet-18, with the same weight decay, momentum and learning rate
after it, and the same trivial gradient. Methods are timed in turn, in a new random order every round, and compared
within rounds, so that what else the machine does hits all of them alike.

The gradient is that of ``sum((w**2 - 1)**2) / 4``: element by element ``w**3 - w``, three operations that XLA fuses
freely, bounded weights, and a share of elements that shrink under ascent (``|w|`` below 0.58; at first 44 % of normally
distributed weights) like that of a network. It comes in two forms:

* ``fused``: left to XLA, which recomputes it inside the kernels of the optimizer. What is left is the optimizer's own
  arithmetic. No network's gradient can be had this way.
* ``stored``: ``g``, ``w + eps`` and ``h`` each pass through memory, as those of a network must. Counted in trees of
  parameters, the least that can be moved is then

  =====================================  ========================  ===========
  pass                                   reads                     writes
  =====================================  ========================  ===========
  gradient at the weights                w                         g
  norm                                   g
  perturbation                           w, g                      w + eps
  gradient at the perturbed weights      w + eps                   h
  weight decay, momentum, learning rate  h, w, momentum            w, momentum
  =====================================  ========================  ===========

  13 trees for SAM (15 on CPUs, where XLA writes momentum and weights in two kernels, and the second reads both again).
  SANER compares ``h`` with ``g`` in the last pass and so reads ``g`` once more, and ``g`` must outlive the second
  gradient: one tree more moved, and one tree more of temporary memory, since ``w + eps`` can no longer overwrite ``g``.
  Where memory is the limit, 14 / 13 = 1.077 (16 / 15 = 1.067) is therefore the floor of this ratio, whatever the code;
  a CPU that reads a cache line before it fills it pays for the fresh tree as well, and its floor is 18 / 16 = 1.125.

Neither form has a network in it. What the difference amounts to in training is measured apart: SAM's whole training
step on random images, of which the differences between methods are a share.
"""

import argparse
import ctypes
import datetime
import functools
import json
import math
import os
import pathlib
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import saner_jax
from examples.noisy_images import models

RHO = 0.1
IMAGE_SHAPE = (32, 32, 3)
NUM_CLASSES = 10

SGD = "SGD"
OPTAX_SAM = "optax.contrib.sam"


def then_momentum(*stages: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Chain the stages with what follows every method here."""
    return optax.chain(*stages, optax.add_decayed_weights(5e-4), optax.sgd(1e-3, momentum=0.9))


def optax_sam() -> optax.GradientTransformationExtraArgs:
    """Give ``optax.contrib.sam`` in its opaque mode the signature of the other methods."""
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    tx = optax.contrib.sam(then_momentum(), ascent, opaque_mode=True)

    def update(updates: Any, state: Any, params: Any, *, grad_fn: Callable[[Any], Any]) -> Any:
        return tx.update(updates, state, params, grad_fn=lambda w, _: grad_fn(w))

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _methods() -> dict[str, Callable[[], optax.GradientTransformationExtraArgs]]:
    methods = {
        SGD: then_momentum,
        OPTAX_SAM: optax_sam,
        "SAM": lambda: then_momentum(saner_jax.sam(RHO)),
        "SAM, monitored": lambda: then_momentum(saner_jax.sam(RHO, monitor=True)),
        "SANER": lambda: then_momentum(saner_jax.saner(RHO, 0.5)),
        "SANER, monitored": lambda: then_momentum(saner_jax.saner(RHO, 0.5, monitor=True)),
    }
    for alias in (saner_jax.asam, saner_jax.gsam, saner_jax.fsam, saner_jax.vasso):
        name = alias.__name__.upper().replace("VASSO", "VaSSO")
        methods[name] = lambda alias=alias: then_momentum(alias())
        methods[f"{name} + SANER"] = lambda alias=alias: then_momentum(alias(reweight=saner_jax.downweight(0.5)))
    return methods


METHODS = _methods()


class Ratio(NamedTuple):
    """Two methods to compare, and the ratio not to exceed."""

    numerator: str
    denominator: str
    target: float | None = None

    def __str__(self) -> str:
        return f"{self.numerator} / {self.denominator}"


RATIOS = (
    Ratio("SANER", "SAM", 1.02),
    Ratio("SAM", OPTAX_SAM, 1.02),
    Ratio("SAM, monitored", "SAM"),
    Ratio("SANER, monitored", "SANER"),
    Ratio("ASAM + SANER", "ASAM"),
    Ratio("GSAM + SANER", "GSAM"),
    Ratio("FSAM + SANER", "FSAM"),
    Ratio("VaSSO + SANER", "VaSSO"),
)


def trivial_gradient(params: Any) -> Any:
    """Return the gradient of ``sum((w**2 - 1)**2) / 4`` over all leaves."""
    return jax.tree.map(lambda w: w * (w * w - 1), params)


def stored_gradient(params: Any) -> Any:
    """Return the trivial gradient; its argument and its result pass through memory as whole trees."""
    return jax.lax.optimization_barrier(trivial_gradient(jax.lax.optimization_barrier(params)))


GRADIENTS = {"fused": trivial_gradient, "stored": stored_gradient}


def barriers_hold() -> bool:
    """Return whether this XLA keeps barriers until kernels are fused (on CPUs, JAX 0.12 does, 0.10 does not)."""
    x = jnp.zeros(1024)
    once = jax.jit(trivial_gradient).lower(x).compile().cost_analysis()["bytes accessed"]
    stored = jax.jit(lambda x: trivial_gradient(stored_gradient(x))).lower(x).compile().cost_analysis()
    return stored["bytes accessed"] >= 2 * once


class Prepared(NamedTuple):
    """A method, compiled, with parameters and state of its own."""

    run: Callable[[Any, Any], Any]
    params: Any
    state: Any
    measured: dict[str, float]


def parameter_shapes(model: str, width: float) -> Any:
    """Return shapes and dtypes of a model's parameters, without computing them."""
    create = functools.partial(models.create, model, num_classes=NUM_CLASSES, image_shape=IMAGE_SHAPE, seed=0)
    network = nnx.eval_shape(lambda: create(width=width))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), nnx.state(network, nnx.Param))


def normal_params(shapes: Any, seed: int = 0) -> Any:
    """Draw every leaf from the standard normal distribution."""
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    return structure.unflatten([jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype) for leaf in leaves])


def prepare(method: str, gradient: str, params: Any, steps_per_call: int, compiles: int) -> Prepared:
    """Compile one step of a method, and as many in one call as are timed together."""
    tx, grad_fn = METHODS[method](), GRADIENTS[gradient]

    def step(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    def steps(params: Any, state: Any) -> tuple[Any, Any]:
        return jax.lax.fori_loop(0, steps_per_call, lambda _, carry: step(*carry), (params, state))

    params = jax.tree.map(jnp.copy, params)
    state = jax.tree.map(jnp.copy, tx.init(params))
    seconds = []
    for _ in range(compiles):
        jax.clear_caches()
        start = time.perf_counter()
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state).compile()
        seconds.append(time.perf_counter() - start)
    cost = compiled.cost_analysis()
    measured = {
        "compile_s": float(np.median(seconds)),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "bytes_accessed": cost["bytes accessed"],
        "flops": cost["flops"],
    }
    if steps_per_call > 1:
        compiled = jax.jit(steps, donate_argnums=(0, 1)).lower(params, state).compile()
    return Prepared(compiled, params, state, measured)


def time_interleaved(prepared: dict[str, Prepared], rounds: int, warm_up: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return seconds per call, one entry a round; every round runs every method once, in random order."""
    names = list(prepared)
    carries = {name: (p.params, p.state) for name, p in prepared.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    rng = np.random.default_rng(seed)
    for round_ in range(warm_up + rounds):
        for name in rng.permutation(names):
            start = time.perf_counter()
            carries[name] = jax.block_until_ready(prepared[name].run(*carries[name]))
            elapsed = time.perf_counter() - start
            if round_ >= warm_up:
                seconds[name].append(elapsed)
    for name, carry in carries.items():
        if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(carry)):
            raise FloatingPointError(f"{name} left non-finite values: its times mean nothing.")
    return {name: np.array(values) for name, values in seconds.items()}


def median_with_interval(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> dict[str, float]:
    """Return the median and a 95 % bootstrap interval of it."""
    draws = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.percentile(np.median(values[draws], axis=1), [2.5, 97.5])
    return {"median": float(np.median(values)), "low": float(low), "high": float(high)}


def measure(gradient: str, params: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Measure every method with one form of the gradient."""
    prepared = {}
    for name in args.methods or METHODS:
        _progress(f"{gradient}: compiling {name}")
        prepared[name] = prepare(name, gradient, params, args.steps_per_call, args.compiles)
    _progress(f"{gradient}: {args.rounds} rounds of {len(prepared)} methods")
    seconds = {k: v / args.steps_per_call for k, v in time_interleaved(prepared, args.rounds, args.warm_up).items()}
    methods = {}
    for name, values in seconds.items():
        quartiles = dict(
            zip(("q1_s", "median_s", "q3_s"), map(float, np.percentile(values, [25, 50, 75])), strict=True)
        )
        methods[name] = quartiles | prepared[name].measured
    ratios = {}
    for ratio in RATIOS:
        if ratio.numerator not in seconds or ratio.denominator not in seconds:
            continue
        numerator, denominator = seconds[ratio.numerator], seconds[ratio.denominator]
        ratios[str(ratio)] = median_with_interval(numerator / denominator) | {
            "target": ratio.target,
            "difference_s": median_with_interval(numerator - denominator),
            "bytes_accessed": (
                prepared[ratio.numerator].measured["bytes_accessed"]
                / prepared[ratio.denominator].measured["bytes_accessed"]
            ),
        }
    return {"methods": methods, "ratios": ratios}


def time_training_step(model: str, width: float, batch_size: int, repeats: int) -> dict[str, float]:
    """Time SAM's whole training step on random images: both passes through the network, and the optimizer."""
    network = models.create(model, num_classes=NUM_CLASSES, image_shape=IMAGE_SHAPE, seed=0, width=width)
    graph, params, statistics = nnx.split(network, nnx.Param, nnx.BatchStat)
    tx = METHODS["SAM"]()
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((batch_size, *IMAGE_SHAPE)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, NUM_CLASSES, batch_size))

    def step(params: Any, state: Any, statistics: Any, images: jax.Array, labels: jax.Array) -> Any:
        def loss(params: Any) -> Any:
            network = nnx.merge(graph, params, statistics, copy=True)
            logits = network(images, train=True)
            value = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return value, nnx.state(network, nnx.BatchStat)

        grads, new_statistics = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params, grad_fn=lambda w: jax.grad(loss, has_aux=True)(w)[0])
        return optax.apply_updates(params, updates), state, new_statistics

    carry = (params, tx.init(params), statistics)
    compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*carry, images, labels).compile()
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        carry = jax.block_until_ready(compiled(*carry, images, labels))
        seconds.append(time.perf_counter() - start)
    return median_with_interval(np.array(seconds[1:])) | {"batch_size": batch_size, "repeats": repeats}


def keep_freed_memory() -> bool:
    """Have the C library keep memory that a step frees for the next one; return whether it could (Linux with glibc).

    XLA allocates temporary memory on CPUs anew in every call. By default blocks of this size go back to the system each
    time, and fetching them again costs a page fault for every 4 KiB: several times what the step itself costs, and more
    the more temporary memory a method has. Accelerators have pools, and a training process has much larger blocks.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8
        settings = ((m_arena_max, 1), (m_mmap_max, 0), (m_trim_threshold, -1))
        return all(libc.mallopt(parameter, value) for parameter, value in settings)
    except (OSError, AttributeError):
        return False


def environment() -> dict[str, Any]:
    """Return what a reader needs to place the numbers: command, date, versions, device."""
    device = jax.devices()[0]
    host = {"system": platform.platform(), "cpu": _cpu_model(), "cores": os.cpu_count(), "load": list(os.getloadavg())}
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "optax", "flax", "numpy")}
    return {
        "command": shlex.join(["python", "-m", "benchmarks.update_cost", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "saner_jax": saner_jax.__version__} | versions,
        "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
        "host": host,
    }


def report(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    tree = results["parameters"]["bytes"]
    lines = []
    for gradient, measured in results["gradients"].items():
        lines += [f"### Gradient {gradient}", ""]
        rows = []
        for name, m in measured["methods"].items():
            quartiles = f"{m['median_s'] * 1e3:.2f} ({m['q1_s'] * 1e3:.2f} to {m['q3_s'] * 1e3:.2f})"
            memory, traffic = m["temporary_bytes"] / tree, m["bytes_accessed"] / tree
            rows.append((name, quartiles, f"{m['compile_s']:.2f}", f"{memory:.2f}", f"{traffic:.2f}", m["flops"]))
        rows = [(*row[:-1], f"{row[-1] / results['parameters']['count']:.1f}") for row in rows]
        header = (
            "method",
            "step, ms (quartiles)",
            "compile, s",
            "temporary, trees",
            "accessed, trees",
            "FLOP per weight",
        )
        lines += [*_markdown(header, rows), ""]
        rows = []
        for name, r in measured["ratios"].items():
            target = "" if r["target"] is None else f"at most {r['target']:.2f}"
            difference = r["difference_s"]["median"]
            share = ""
            if results["training_step"]:
                share = f"{difference / results['training_step']['median']:+.2%}"
            interval = f"{r['median']:.3f} ({r['low']:.3f} to {r['high']:.3f})"
            rows.append((name, interval, target, f"{r['bytes_accessed']:.3f}", f"{difference * 1e3:+.2f}", share))
        header = ("ratio", "time (95 %)", "target", "bytes accessed", "difference, ms", "of a training step")
        lines += [*_markdown(header, rows), ""]
    if results["training_step"]:
        step = results["training_step"]
        lines.append(f"SAM's training step at batch size {step['batch_size']}: {step['median']:.3f} s.")
    return "\n".join(lines)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    table = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return ["| " + " | ".join(row) + " |" for row in table]


def _cpu_model() -> str:
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def _progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.update_cost",
        description="Measure time, compile time, temporary memory and memory traffic of one optimizer step of every "
        "method, on the parameter tree of a network and with a trivial gradient.",
    )
    parser.add_argument(
        "--model", default="resnet18", choices=sorted(models.MODELS), help="whose parameter tree (resnet18)"
    )
    parser.add_argument("--width", type=float, default=1.0, help="factor on the network's channels (1)")
    parser.add_argument(
        "--gradient", choices=(*GRADIENTS, "both"), default="both", help="form of the trivial gradient (both)"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help="only these (all)")
    parser.add_argument("--rounds", type=int, default=200, help="timed calls of every method (200)")
    parser.add_argument("--warm-up", type=int, default=5, help="calls of every method before the timed ones (5)")
    parser.add_argument("--steps-per-call", type=int, help="steps timed in one call (default: 1 on CPUs, else 50)")
    parser.add_argument("--compiles", type=int, default=3, help="compilations of every method; the median counts (3)")
    parser.add_argument("--batch-size", type=int, default=128, help="images of the training step (128); 0: none")
    parser.add_argument("--training-steps", type=int, default=5, help="timed training steps (5)")
    parser.add_argument(
        "--return-memory",
        action="store_true",
        help="let the C library return freed memory to the system after every call, as it does by default, which on "
        "CPUs makes page faults the larger part of what is measured",
    )
    parser.add_argument("--output", type=pathlib.Path, default=None, help="JSON file to write (none)")
    args = parser.parse_args(argv)
    for name in ("rounds", "steps_per_call", "compiles", "training_steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and, if asked, write."""
    args = parse(argv)
    memory_kept = not args.return_memory and keep_freed_memory()
    if args.steps_per_call is None:
        args.steps_per_call = 1 if jax.default_backend() == "cpu" else 50
    params = normal_params(parameter_shapes(args.model, args.width))
    leaves = jax.tree.leaves(params)
    gradients = list(GRADIENTS) if args.gradient == "both" else [args.gradient]
    if "stored" in gradients and not barriers_hold():
        _progress("XLA drops optimization barriers here (on CPUs, JAX 0.12 keeps them): no stored gradient.")
        gradients.remove("stored")
    results: dict[str, Any] = environment() | {
        "parameters": {
            "model": args.model,
            "count": sum(math.prod(leaf.shape) for leaf in leaves),
            "bytes": sum(leaf.nbytes for leaf in leaves),
            "leaves": len(leaves),
        },
        "rounds": args.rounds,
        "freed_memory_kept": memory_kept,
        "steps_per_call": args.steps_per_call,
        "gradients": {gradient: measure(gradient, params, args) for gradient in gradients},
        "training_step": None,
    }
    if args.batch_size:
        _progress(f"training step at batch size {args.batch_size}")
        results["training_step"] = time_training_step(args.model, args.width, args.batch_size, args.training_steps)
    print(report(results))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
