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
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import saner_jax
from benchmarks.machinery import command, environment, statistics, tables, timing, workload
from benchmarks.machinery.statistics import Ratio
from examples.noisy_images import models
from examples.noisy_images.config import PAPER, replace

RHO = 0.1

SGD = "SGD"
OPTAX_SAM = "optax.contrib.sam"


def then_momentum(*stages: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Chain the stages with what follows every method here."""
    return optax.chain(*stages, optax.add_decayed_weights(5e-4), optax.sgd(1e-3, momentum=0.9))


def _methods() -> dict[str, Callable[[], optax.GradientTransformationExtraArgs]]:
    methods = {
        SGD: then_momentum,
        OPTAX_SAM: lambda: workload.optax_sam(RHO, then_momentum()),
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

    call: timing.Repeated
    measured: dict[str, float]


def parameter_shapes(model: str, width: float) -> Any:
    """Return shapes and dtypes of a model's parameters, without computing them."""
    create = functools.partial(
        models.create, model, num_classes=workload.NUM_CLASSES, image_shape=workload.IMAGE_SHAPE, seed=0
    )
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
    return Prepared(timing.Repeated(lambda carry: compiled(*carry), (params, state)), measured)


def measure_gradient(gradient: str, params: Any, args: argparse.Namespace, budget: timing.Budget) -> dict[str, Any]:
    """Measure every method with one form of the gradient."""
    prepared = {}
    for name in args.methods or METHODS:
        command.progress(f"{gradient}: compiling {name}")
        prepared[name] = prepare(name, gradient, params, args.steps_per_call, args.compiles)
    command.progress(f"{gradient}: up to {args.rounds} rounds of {len(prepared)} methods")
    calls = {name: one.call for name, one in prepared.items()}
    seconds = timing.interleaved(calls, rounds=args.rounds, warm_up=args.warm_up, budget=budget)
    for name, call in calls.items():
        call.check_finite(name)
    seconds = {name: values / args.steps_per_call for name, values in seconds.items()}
    methods = {name: statistics.quartiles(values) | prepared[name].measured for name, values in seconds.items()}
    ratios = {}
    for ratio in RATIOS:
        if not ratio.measured_in(seconds):
            continue
        traffic = [methods[name]["bytes_accessed"] for name in (ratio.numerator, ratio.denominator)]
        ratios[str(ratio)] = ratio.of(seconds) | {
            "target": ratio.target,
            "difference_s": ratio.difference(seconds),
            "bytes_accessed": traffic[0] / traffic[1],
        }
    return {"rounds": len(next(iter(seconds.values()))), "methods": methods, "ratios": ratios}


def time_training_step(model: str, width: float, batch_size: int, repeats: int) -> dict[str, float]:
    """Time the training program's step with SAM, unmonitored: both passes through the network, and the optimizer."""
    config = replace(PAPER, model=model, width=width, batch_size=batch_size, method="sam-unmonitored")
    work = workload.Workload(config)
    seconds = timing.interleaved({"SAM": work.repeated(work.compile())}, rounds=repeats, warm_up=1)["SAM"]
    return statistics.median_with_interval(seconds) | {"batch_size": batch_size, "repeats": repeats}


def report(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    tree = results["parameters"]["bytes"]
    lines = []
    for gradient, measured in results["gradients"].items():
        lines += [f"### Gradient {gradient}", ""]
        rows = []
        for name, m in measured["methods"].items():
            memory, traffic = m["temporary_bytes"] / tree, m["bytes_accessed"] / tree
            rows.append(
                (name, tables.milliseconds(m), f"{m['compile_s']:.2f}", f"{memory:.2f}", f"{traffic:.2f}", m["flops"])
            )
        rows = [(*row[:-1], f"{row[-1] / results['parameters']['count']:.1f}") for row in rows]
        header = (
            "method",
            "step, ms (quartiles)",
            "compile, s",
            "temporary, trees",
            "accessed, trees",
            "FLOP per weight",
        )
        lines += [*tables.table(header, rows), ""]
        rows = []
        for name, r in measured["ratios"].items():
            target = "" if r["target"] is None else f"at most {r['target']:.2f}"
            difference = r["difference_s"]["median"]
            share = ""
            if results["training_step"]:
                share = f"{difference / results['training_step']['median']:+.2%}"
            rows.append(
                (name, tables.interval(r), target, f"{r['bytes_accessed']:.3f}", f"{difference * 1e3:+.2f}", share)
            )
        header = ("ratio", "time (95 %)", "target", "bytes accessed", "difference, ms", "of a training step")
        lines += [*tables.table(header, rows), ""]
    if results["training_step"]:
        step = results["training_step"]
        lines.append(f"SAM's training step at batch size {step['batch_size']}: {step['median']:.3f} s.")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = command.parser(
        "update_cost",
        "Measure time, compile time, temporary memory and memory traffic of one optimizer step of every method, on the "
        "parameter tree of a network and with a trivial gradient.",
    )
    parser.add_argument(
        "--model", default="resnet18", choices=sorted(models.MODELS), help="whose parameter tree (resnet18)"
    )
    parser.add_argument("--width", type=float, default=1.0, help="factor on the network's channels (1)")
    parser.add_argument(
        "--gradient", choices=(*GRADIENTS, "both"), default="both", help="form of the trivial gradient (both)"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help="only these (all)")
    parser.add_argument("--rounds", type=command.at_least_one, default=200, help="timed calls of every method (200)")
    parser.add_argument(
        "--warm-up", type=command.at_least_one, default=5, help="calls of every method before the timed ones (5)"
    )
    parser.add_argument(
        "--steps-per-call", type=command.at_least_one, help="steps timed in one call (default: 1 on CPUs, else 50)"
    )
    parser.add_argument(
        "--compiles", type=command.at_least_one, default=3, help="compilations of every method; the median counts (3)"
    )
    parser.add_argument("--batch-size", type=int, default=128, help="images of the training step (128); 0: none")
    parser.add_argument("--training-steps", type=command.at_least_one, default=5, help="timed training steps (5)")
    parser.add_argument(
        "--return-memory",
        action="store_true",
        help="let the C library return freed memory to the system after every call, as it does by default, which on "
        "CPUs makes page faults the larger part of what is measured",
    )
    args = parser.parse_args(argv)
    if args.steps_per_call is None:
        args.steps_per_call = 1 if jax.default_backend() == "cpu" else 50
    return args


def measure(args: argparse.Namespace, budget: timing.Budget) -> dict[str, Any]:
    """Measure every method with every form of the gradient, and a training step to set them beside."""
    memory_kept = not args.return_memory and environment.keep_freed_memory()
    params = normal_params(parameter_shapes(args.model, args.width))
    leaves = jax.tree.leaves(params)
    gradients = list(GRADIENTS) if args.gradient == "both" else [args.gradient]
    if "stored" in gradients and not barriers_hold():
        command.progress("XLA drops optimization barriers here (on CPUs, JAX 0.12 keeps them): no stored gradient.")
        gradients.remove("stored")
    results: dict[str, Any] = {
        "parameters": {
            "model": args.model,
            "count": sum(math.prod(leaf.shape) for leaf in leaves),
            "bytes": sum(leaf.nbytes for leaf in leaves),
            "leaves": len(leaves),
        },
        "freed_memory_kept": memory_kept,
        "steps_per_call": args.steps_per_call,
        "gradients": {},
        "training_step": None,
    }
    for position, gradient in enumerate(gradients):
        share = budget.share(1 / (len(gradients) - position))
        results["gradients"][gradient] = measure_gradient(gradient, params, args, share)
    if args.batch_size and budget.remaining():
        command.progress(f"training step at batch size {args.batch_size}")
        results["training_step"] = time_training_step(args.model, args.width, args.batch_size, args.training_steps)
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and, if asked, write."""
    return command.run("update_cost", parse(argv), argv, measure, report)


if __name__ == "__main__":
    main()
