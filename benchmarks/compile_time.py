"""Measure how long a user waits: tracing and compiling the step, and from the command line to the first step.

    python -m benchmarks.compile_time

Cold: the training step of a method is traced and compiled with nothing kept, its parts apart. Warm: the training
program's real command line is started in a fresh process, whose compiled programs an earlier start has left on disk, up
to the end of its first call, which is one step on a CPU and a whole epoch elsewhere. Stages of the way are marked (see
`first_step`), and imports are counted by package. The cache is a temporary one, the images are random ones in a file.
"""

import argparse
import collections
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.machinery import command, environment, statistics, tables, targets, timing, workload

DEFAULT_METHODS = ("sgd", "sam", "saner")
IMPORTED = "from examples.noisy_images import cli; from examples.noisy_images.training import run"
IMPORTED_WITHOUT_COMMAND_LINE = "from examples.noisy_images.training import run"
PACKAGES_SHOWN = 10
STAGES = (
    "python",
    "command line imported",
    "program imported",
    "data and noise ready",
    "network ready",
    "run set up",
    "first step started",
    "first step done",
)


def measure(args: argparse.Namespace, budget: timing.Budget) -> dict[str, Any]:
    """Measure compilation, then starts, then imports."""
    # Cold is cold, also where the caller keeps compiled programs.
    jax.config.update("jax_enable_compilation_cache", False)
    cold = compilations(args, budget.share(0.5))
    command.progress("starting the program without compiled programs, then with them")
    starts = first_steps(args, budget)
    done = np.array([start["first step done"] for start in starts["warm"]])
    name = "first_step_cpu" if jax.default_backend() == "cpu" else "first_step_gpu"
    return {
        "setting": {
            "model": args.model,
            "width": args.width,
            "batch_size": args.batch_size,
            "precision": args.precision,
            "images": args.images,
        },
        "compilation": cold,
        "starts": starts,
        "imports": imports(),
        "targets": {name: statistics.median_with_interval(done)},
    }


def compilations(args: argparse.Namespace, budget: timing.Budget) -> dict[str, dict[str, float]]:
    """Return the median times of tracing and of compiling each method's step."""
    times: dict[str, list[tuple[float, float]]] = {method: [] for method in args.methods}
    slowest = 0.0
    for _ in range(args.repeats):
        for method in args.methods:
            if any(times.values()) and budget.remaining() < slowest:
                break
            command.progress(f"compiling {method}")
            jax.clear_caches()
            compiled = workload.Workload(workload.config(args, method=method)).compile()
            slowest = max(slowest, compiled.trace_s + compiled.compile_s)
            times[method].append((compiled.trace_s, compiled.compile_s))
    medians = {method: np.median(pairs, axis=0) for method, pairs in times.items() if pairs}
    return {method: {"trace_s": float(t), "compile_s": float(c)} for method, (t, c) in medians.items()}


def first_steps(args: argparse.Namespace, budget: timing.Budget) -> dict[str, Any]:
    """Start the program once cold and several times warm; return the stages in seconds since each start."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        images = workload.dataset(args.images, args.batch_size)
        np.savez(
            folder / "random.npz",
            images=images.train.images,
            labels=images.train.labels,
            test_images=images.test.images,
            test_labels=images.test.labels,
        )
        cold = _start(args, folder, "cold")
        warm = []
        for repeat in range(args.starts):
            if warm and budget.remaining() < warm[-1]["first step done"]:
                break
            warm.append(_start(args, folder, f"warm{repeat}"))
    return {"cold": cold, "warm": warm}


def _start(args: argparse.Namespace, folder: pathlib.Path, name: str) -> dict[str, float]:
    options = {
        "dataset": "npz",
        "data-dir": folder / "random.npz",
        "noise": "none",
        "method": "saner",
        "model": args.model,
        "width": args.width,
        "batch-size": args.batch_size,
        "precision": args.precision,
        "out": folder / "runs",
        "name": name,
    }
    arguments = [part for option, value in options.items() for part in (f"--{option}", str(value))]
    # The temporary cache in place of the user's; settings of the user's own would point elsewhere.
    variables = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    variables["XDG_CACHE_HOME"] = str(folder / "cache")
    if "JAX_PLATFORMS" in os.environ:
        variables["JAX_PLATFORMS"] = os.environ["JAX_PLATFORMS"]
    line = [sys.executable, "-m", "benchmarks.machinery.first_step", str(time.time()), "train", *arguments]
    result = subprocess.run(line, capture_output=True, text=True, env=variables)
    if result.returncode:
        raise RuntimeError(f"the program did not start:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def imports() -> dict[str, float]:
    """Return the seconds that importing the program spends in modules of each top-level package, the most first."""
    for code in (IMPORTED, IMPORTED_WITHOUT_COMMAND_LINE):
        result = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True)
        if result.returncode == 0:
            break
    return import_times(result.stderr)


def import_times(report: str) -> dict[str, float]:
    """Add up the own times in a report of ``python -X importtime`` by top-level package, in seconds."""
    seconds: collections.Counter[str] = collections.Counter()
    for own, module in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s*(\S+)$", report, re.M):
        seconds[module.partition(".")[0]] += int(own) / 1e6
    return dict(seconds.most_common())


def report(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    setting, starts = results["setting"], results["starts"]
    lines = [
        f"{setting['model']}, width {setting['width']:g}, batches of {setting['batch_size']}, {setting['precision']}.",
        "",
    ]
    rows = [
        (method, f"{times['trace_s']:.2f}", f"{times['compile_s']:.2f}")
        for method, times in results["compilation"].items()
    ]
    lines += [*tables.table(("step", "traced, s", "compiled, s"), rows), ""]
    warm = {stage: float(np.median([start[stage] for start in starts["warm"]])) for stage in STAGES}
    rows, previous = [], 0.0
    for stage in STAGES:
        rows.append((stage, f"{starts['cold'][stage]:.2f}", f"{warm[stage]:.2f}", f"{warm[stage] - previous:+.2f}"))
        previous = warm[stage]
    header = ("since the start, s", "nothing compiled before", f"warm (median of {len(starts['warm'])})", "stage alone")
    lines += [*tables.table(header, rows), ""]
    shown = list(results["imports"].items())[:PACKAGES_SHOWN]
    total = sum(results["imports"].values())
    lines += [
        f"Imports take {total:.2f} s: " + ", ".join(f"{package} {seconds:.2f}" for package, seconds in shown) + ".",
        "",
    ]
    return "\n".join(lines + targets.printed(list(results["targets"]), results["targets"]))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = command.parser("compile_time", "Measure compilation, and the program's start up to its first step.")
    workload.add_options(parser)
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=workload.METHODS,
        default=DEFAULT_METHODS,
        metavar="METHOD",
        help=f"whose step is compiled ({' '.join(DEFAULT_METHODS)})",
    )
    parser.add_argument("--images", type=command.at_least_one, default=50_000, help="of the started run (50000)")
    parser.add_argument("--repeats", type=command.at_least_one, default=3, help="compilations; their median counts (3)")
    parser.add_argument("--starts", type=command.at_least_one, default=5, help="warm starts; their median counts (5)")
    return workload.choose(parser.parse_args(argv))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and, if asked, write."""
    environment.share_device()
    return command.run("compile_time", parse(argv), argv, measure, report)


if __name__ == "__main__":
    main()
