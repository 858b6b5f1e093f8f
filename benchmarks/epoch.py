"""Measure whole epochs of the training program, and several seeds in one program.

    python -m benchmarks.epoch --precision bfloat16

An epoch goes through the program's own trainer on random images, as a scan over its steps in one call, as a loop of
calls of one step each, or by the program's default (the scan, and on CPUs a loop of calls of some steps), and is
followed by the evaluation of the test set and of the training set. From their medians 200 epochs are extrapolated, with
the test set evaluated after every epoch: an extrapolation, not a run.

Several seeds in one program are the same step under `jax.vmap`, over as many states; against it the same states take
their steps one after another.
"""

import argparse
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machinery import command, environment, peak, statistics, tables, targets, timing, workload
from benchmarks.machinery.statistics import Ratio
from examples.noisy_images import compilation, data
from examples.noisy_images.config import Config, replace
from examples.noisy_images.training.step import State, epoch_order
from examples.noisy_images.training.trainer import MATMUL_PRECISION, Trainer

EPOCHS = 200
# What the program is configured by.
LOOPS = {"scan": True, "loop": False, "default": None}
ONE_PROGRAM, ONE_AFTER_ANOTHER = "in one program", "one after another"


class Size(NamedTuple):
    """How much is measured where nothing is asked for."""

    model: str
    width: float
    batch_size: int
    precision: str
    train: int
    test: int
    loops: tuple[str, ...]
    """The first one is extrapolated."""
    steps_per_call: int
    """Of the seeds."""


SIZES = {
    "cpu": Size("small_cnn", 1.0, 64, "float32", 1024, 500, ("default", "loop", "scan"), 1),
    "gpu": Size("resnet18", 1.0, 128, "bfloat16", 50_000, 10_000, ("scan", "loop"), 20),
}


def measure(args: argparse.Namespace, budget: timing.Budget) -> dict[str, Any]:
    """Measure epochs and evaluations, then seeds."""
    environment.keep_freed_memory()
    # The first calls are timed with their compilation.
    jax.config.update("jax_enable_compilation_cache", False)
    config = workload.config(args, method=args.method)
    images = workload.dataset(args.train, args.test)
    peaks = peak.measure(args.precision)
    epochs_budget = budget.share(0.6) if args.seeds else budget

    seconds, first_s = _time_parts(config, images, args, epochs_budget)
    work = workload.Workload(config)
    steps = args.train // args.batch_size
    flops = steps * work.flops
    main = args.loops[0]
    parts = {name: statistics.quartiles(values) | {"first_s": first_s[name]} for name, values in seconds.items()}
    parts[main] |= {
        "flops": flops,
        "share_of_peak": flops / float(np.median(seconds[main])) / peak.flops_per_s(peaks),
    }
    measured = extrapolate(seconds[main], seconds["test set"], first_s[main] + first_s["test set"])
    # The targets are about the paper's network on its data; on another the numbers are only reported.
    complete = (args.model, args.width, args.train, args.test) == ("resnet18", 1.0, 50_000, 10_000)
    results: dict[str, Any] = {
        "setting": {
            "model": args.model,
            "width": args.width,
            "precision": args.precision,
            "method": args.method,
            "batch_size": args.batch_size,
            "train": args.train,
            "test": args.test,
            "steps": steps,
            "rounds": len(seconds[main]),
        },
        "peak": peaks,
        "parts": parts,
        "extrapolated": measured,
        "seeds": None,
        "targets": measured if complete else {},
    }
    if args.seeds and (args.seconds is None or budget.remaining() > first_s[main]):
        seeds = measure_seeds(config, args, budget)
        results["seeds"] = seeds
        results["targets"]["seeds_one_after_another"] = seeds["ratio"]
    return results


def _time_parts(
    config: Config, images: data.Dataset, args: argparse.Namespace, budget: timing.Budget
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Time epochs, by the loop asked for, and evaluations; returns seconds by round, and of the first call."""
    subjects: dict[str, Callable[[], Any]] = {}
    first_s: dict[str, float] = {}
    for loop in args.loops:
        if loop != args.loops[0] and budget.remaining() < first_s[args.loops[0]]:
            continue
        command.progress(f"{loop}: first epoch, with compilation")
        trainer = workload.trainer(replace(config, scan_epochs=LOOPS[loop]), images)
        subjects[loop] = _epoch(trainer)
        if loop == args.loops[0]:
            evaluated = trainer
        first_s[loop] = _once(subjects[loop])
    for name, split in (("test set", images.test), ("training set", images.train)):
        subjects[name] = _evaluation(evaluated, split)
        first_s[name] = _once(subjects[name])
    command.progress(f"timing {', '.join(subjects)}")
    with timing.trace(args.trace):
        return timing.interleaved(subjects, rounds=args.rounds, warm_up=1, budget=budget), first_s


def extrapolate(epoch: np.ndarray, evaluation: np.ndarray, first: float) -> dict[str, dict[str, float]]:
    """Return the minutes of a run, without and with compilation, from seconds by round and those of the first calls."""
    run = statistics.median_with_interval(EPOCHS / 60 * (epoch + evaluation))
    compilation = (first - float(np.median(epoch)) - float(np.median(evaluation))) / 60
    compiled = {name: value + compilation for name, value in run.items()}
    return {"minutes_200_epochs": run, "minutes_200_epochs_compiled": compiled}


def measure_seeds(config: Config, args: argparse.Namespace, budget: timing.Budget) -> dict[str, Any]:
    """Time the steps of several seeds in one program and one after another."""
    work = workload.Workload(config, args.steps_per_call)
    functions, count = work.trainer.functions, args.seeds
    function, number = functions.of_steps(args.steps_per_call)
    step = functools.partial(compilation.uncompiled(function), **number)
    seeds = jnp.arange(count, dtype=jnp.uint32)
    orders = jnp.stack([epoch_order(seed, 0, len(work.order)) for seed in seeds])
    states = [functions.create(seed) for seed in range(count)]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    command.progress(f"compiling {count} seeds in one program")
    with jax.default_matmul_precision(MATMUL_PRECISION[config.network.precision]):
        vectorised = jax.vmap(step, in_axes=(0, 0, None, 0))
        options = compilation.options(config.network.convolution)
        all_at_once = jax.jit(vectorised, donate_argnums=0, compiler_options=options)
        compiled = all_at_once.lower(together, seeds, work.images, orders).compile()
    single = work.compile().executable

    def one_after_another(states: list[State]) -> list[State]:
        return [single(s, seed, work.images, order) for s, seed, order in zip(states, seeds, orders, strict=True)]

    subjects = {
        ONE_PROGRAM: timing.Repeated(lambda state: compiled(state, seeds, work.images, orders), together),
        ONE_AFTER_ANOTHER: timing.Repeated(one_after_another, states),
    }
    command.progress(f"timing {count} seeds")
    seconds = timing.interleaved(subjects, rounds=args.rounds, warm_up=1, budget=budget)
    for name, subject in subjects.items():
        subject.check_finite(name)
    seconds = {name: values / args.steps_per_call for name, values in seconds.items()}
    ratio = Ratio(ONE_AFTER_ANOTHER, ONE_PROGRAM).of(seconds)
    return {
        "count": count,
        "steps": {name: statistics.quartiles(values) for name, values in seconds.items()},
        "ratio": ratio,
        "faster": ONE_PROGRAM if ratio["median"] > 1 else ONE_AFTER_ANOTHER,
    }


def _epoch(trainer: Trainer) -> Callable[[], None]:
    def train() -> None:
        for _ in trainer.train_epoch():
            pass
        jax.block_until_ready(trainer.state)

    return train


def _evaluation(trainer: Trainer, split: Any) -> Callable[[], Any]:
    return lambda: trainer.evaluate(split)


def _once(call: Callable[[], Any]) -> float:
    return float(timing.interleaved({"call": call}, rounds=1, warm_up=0)["call"][0])


def report(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    setting, parts = results["setting"], results["parts"]
    trained = f"{setting['model']}, width {setting['width']:g}, {setting['precision']}, {setting['method']}"
    images = f"{setting['train']} training images in {setting['steps']} steps of {setting['batch_size']}"
    lines = [f"{trained}: {images}, {setting['test']} test images; {setting['rounds']} rounds.", ""]
    rows = []
    for name, part in parts.items():
        share = f"{part['share_of_peak']:.1%}" if "share_of_peak" in part else ""
        what = f"epoch, {name}" if name in LOOPS else f"evaluating the {name}"
        rows.append((what, tables.milliseconds(part), f"{1e3 * part['first_s']:.0f}", share))
    lines += [*tables.table(("part", "ms (quartiles)", "first call, ms", "of the peak"), rows), ""]
    run, compiled = results["extrapolated"].values()
    lines += [
        f"Extrapolated to {EPOCHS} epochs with the test set after each: {tables.interval(run, 2)} minutes, with "
        f"compilation {tables.interval(compiled, 2)}.",
        "",
    ]
    if results["seeds"]:
        seeds = results["seeds"]
        rows = [(name, tables.milliseconds(part)) for name, part in seeds["steps"].items()]
        lines += [*tables.table((f"a step of {seeds['count']} seeds", "ms (quartiles)"), rows), ""]
        lines += [f"Faster: {seeds['faster']}, by {tables.interval(seeds['ratio'])} one after another / in one.", ""]
    return "\n".join(lines + targets.printed(list(results["targets"]), results["targets"]))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = command.parser("epoch", "Measure epochs and evaluations of the trainer, and several seeds in one program.")
    workload.add_options(parser, SIZES)
    parser.add_argument("--method", choices=workload.METHODS, default="saner", metavar="METHOD", help="(saner)")
    parser.add_argument("--train", type=command.at_least_one, help="training images (on CPUs 1024, else 50000)")
    parser.add_argument("--test", type=command.at_least_one, help="test images (on CPUs 500, else 10000)")
    parser.add_argument("--loops", nargs="+", choices=LOOPS, help="the first is extrapolated (on CPUs all)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds in one program (3); 0: none")
    parser.add_argument("--steps-per-call", type=command.at_least_one, help="of the seeds (on CPUs 1, else 20)")
    parser.add_argument("--rounds", type=command.at_least_one, default=10, help="timed epochs (10)")
    parser.add_argument("--trace", type=pathlib.Path, help="folder for a trace of the JAX profiler of the timed epochs")
    args = workload.choose(parser.parse_args(argv), SIZES)
    if args.seeds < 0:
        parser.error(f"--seeds must not be negative, got {args.seeds}")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and, if asked, write."""
    return command.run("epoch", parse(argv), argv, measure, report)


if __name__ == "__main__":
    main()
