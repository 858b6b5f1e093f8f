"""Measure the memory of the training step: what each method needs beside the others.

    python -m benchmarks.memory --methods sgd sam saner

XLA plans the memory of a compiled step exactly: arguments, results that do not take an argument's place, temporary
memory. Their sum is the peak of the step. Counted in copies of the gradient (one float32 for every parameter), SANER
may need one more than SAM: ``g`` has to outlive the second pass, because the mask compares it with ``h``.

Where the device counts what is allocated, as GPUs do, every method also takes a few steps in a process of its own, and
the peak of that is reported. The process finds the step compiled, so that no trial of the compiler is counted.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks.machinery import command, environment, tables, targets, timing, workload

DEFAULT_METHODS = ("sgd", "sam", "saner", "sam-unmonitored", "saner-unmonitored", "optax.contrib.sam")
STEPS = 3


def measure(args: argparse.Namespace, budget: timing.Budget) -> dict[str, Any]:
    """Compile every method's step and read its memory; on devices that count, run it too."""
    if args.probe:
        return _probe(args)
    counts = jax.local_devices()[0].memory_stats() is not None
    methods: dict[str, Any] = {}
    left_out, slowest = [], 0.0
    with tempfile.TemporaryDirectory() as temporary:
        cache = jax.config.jax_compilation_cache_dir or temporary
        if counts:
            jax.config.update("jax_compilation_cache_dir", cache)
        for method in args.methods:
            if budget.remaining() < slowest:
                left_out.append(method)
                continue
            command.progress(f"compiling {method}")
            work = workload.Workload(workload.config(args, method=method))
            compiled = work.compile()
            slowest = max(slowest, compiled.trace_s + compiled.compile_s)
            methods[method] = compiled.memory()
        gradient = sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(work.state.networks[0].params))
        if counts:
            for method in methods:
                command.progress(f"steps of {method} in a process of its own")
                methods[method] |= _in_own_process(args, method, cache)
    measured = {}
    if {"sam", "saner"} <= set(methods):
        extra = (methods["saner"]["peak_bytes"] - methods["sam"]["peak_bytes"]) / gradient
        # Planned, not timed: the same in every run.
        measured["saner_extra_memory"] = {"median": extra, "low": extra, "high": extra}
    return {
        "setting": {
            "model": args.model,
            "width": args.width,
            "batch_size": args.batch_size,
            "precision": args.precision,
            "gradient_bytes": gradient,
        },
        "methods": methods,
        "left_out": left_out,
        "targets": measured,
    }


def _in_own_process(args: argparse.Namespace, method: str, cache: str) -> dict[str, Any]:
    options = ("--model", args.model, "--width", str(args.width), "--batch-size", str(args.batch_size))
    line = [sys.executable, "-m", "benchmarks.memory", *options, "--precision", args.precision, "--probe", method]
    result = subprocess.run([*line, "--cache", cache], stdout=subprocess.PIPE, text=True)
    if result.returncode:
        command.progress(f"the process of {method} ended with status {result.returncode}")
        return {}
    return json.loads(result.stdout)


def _probe(args: argparse.Namespace) -> dict[str, Any]:
    if args.cache:
        jax.config.update("jax_compilation_cache_dir", args.cache)
    work = workload.Workload(workload.config(args, method=args.probe))
    step = work.repeated(work.compile())
    for _ in range(STEPS):
        step()
    stats = jax.local_devices()[0].memory_stats() or {}
    return {"allocated_peak_bytes": stats.get("peak_bytes_in_use")}


def report(results: dict[str, Any]) -> str:
    """Return the results as Markdown; those of a probe, which another process reads, as JSON."""
    if "allocated_peak_bytes" in results:
        return json.dumps({"allocated_peak_bytes": results["allocated_peak_bytes"]})
    setting, gradient = results["setting"], results["setting"]["gradient_bytes"]
    lines = [
        f"{setting['model']}, width {setting['width']:g}, batches of {setting['batch_size']}, {setting['precision']}; "
        f"a copy of the gradient is {gradient / 1e6:.1f} MB.",
        "",
    ]
    base = results["methods"].get("sam")
    rows = []
    for method, m in results["methods"].items():
        over = "" if base is None else f"{(m['peak_bytes'] - base['peak_bytes']) / gradient:+.3f}"
        allocated = m.get("allocated_peak_bytes")
        rows.append(
            (
                method,
                f"{m['argument_bytes'] / 1e6:.1f}",
                f"{m['temporary_bytes'] / 1e6:.1f}",
                f"{m['peak_bytes'] / 1e6:.1f}",
                over,
                "" if allocated is None else f"{allocated / 1e6:.1f}",
            )
        )
    header = ("method", "arguments, MB", "temporary, MB", "peak, MB", "over SAM's, copies", "peak allocated, MB")
    lines += [*tables.table(header, rows), ""]
    if results["left_out"]:
        lines += [f"Left out for want of time: {', '.join(results['left_out'])}.", ""]
    return "\n".join(lines + targets.printed(["saner_extra_memory"], results["targets"]))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = command.parser("memory", "Measure arguments, temporary memory and peak of the training step by method.")
    workload.add_options(parser)
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=workload.METHODS,
        default=DEFAULT_METHODS,
        metavar="METHOD",
        help=f"of {', '.join(workload.METHODS)} ({' '.join(DEFAULT_METHODS)})",
    )
    # What the command starts itself for every method.
    parser.add_argument("--probe", choices=workload.METHODS, metavar="METHOD", help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    return workload.choose(parser.parse_args(argv))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and, if asked, write."""
    environment.share_device()
    return command.run("memory", parse(argv), argv, measure, report)


if __name__ == "__main__":
    main()
