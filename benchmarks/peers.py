"""Measure the training step against a well-tuned PyTorch equivalent, on the same device in the same minutes.

    pip install -e ".[examples,bench]" && python -m benchmarks.peers

Each framework runs in a process of its own that stays alive (`machinery/sides`); they take turns, in a new random
order every round, and are compared within rounds. First both take one step without augmentation from the same weights
on the same batch, in float64, where no ReLU and no bit of the mask hangs on rounding: if losses or updates differ,
nothing is timed. That PyTorch keeps the unbiased variance in BatchNorm's running statistics and Flax the biased one is
the one known difference; no step sees it.

PyTorch's side is described in `machinery/sides/pytorch.py`. A peer that is not installed is skipped by name.
"""

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.machinery import command, environment, statistics, tables, targets, timing, workload
from benchmarks.machinery.sides.problem import Problem
from benchmarks.machinery.statistics import Ratio
from examples.noisy_images import compilation

METHODS = ("saner", "sam", "sgd")
OURS, PYTORCH = "ours", "PyTorch"
# Import name, and what installs it.
PEERS = {"torch": "torch", "pytorch_optimizer": "pytorch-optimizer"}
INSTALL = 'pip install -e ".[bench]"'

# Of the loss, and of the norm of the update. Constants such as the learning rate are float32 on one side: 3e-8 apart.
TOLERANCE = 1e-6


class WorkerError(RuntimeError):
    """The other process could not do what it was asked."""


class Worker:
    """A side in its own process; closed at the end of a with block."""

    def __init__(self, side: str, problem: Problem):
        line = [
            sys.executable,
            "-m",
            "benchmarks.machinery.sides.worker",
            side,
            json.dumps(dataclasses.asdict(problem)),
        ]
        self._process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._side = side

    def ask(self, do: str, **parts: Any) -> Any:
        """Return the answer to a request."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **parts}) + "\n")
            self._process.stdin.flush()
            reply = json.loads(self._process.stdout.readline() or '{"error": "its process ended"}')
        except BrokenPipeError:
            reply = {"error": "its process ended"}
        if "error" in reply:
            raise WorkerError(f"{self._side}, asked to {do}: {reply['error']}")
        return reply["answer"]

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def missing() -> dict[str, str]:
    """Return the peers that are not installed, and how to install them."""
    return {package: INSTALL for module, package in PEERS.items() if importlib.util.find_spec(module) is None}


def measure(args: argparse.Namespace, budget: timing.Budget) -> dict[str, Any]:
    """Check that both sides compute the same, then time them."""
    problem = Problem(
        width=args.width,
        batch_size=args.batch_size,
        steps=args.steps_per_call,
        precision=args.precision,
        compile=args.compile,
        convolution=args.convolution,
    )
    results: dict[str, Any] = {
        "setting": dataclasses.asdict(problem),
        "skipped": missing(),
        "checks": {},
        "methods": {},
        "ratios": {},
        "targets": {},
    }
    for package, install in results["skipped"].items():
        command.progress(f"skipping PyTorch: {package} is not installed ({install})")
    if results["skipped"]:
        return results
    results["checks"] = check(args.check)
    if not all(checked["agrees"] for checked in results["checks"].values()):
        return results
    return results | compare(problem, args, budget)


def check(methods: Sequence[str]) -> dict[str, Any]:
    """Take one step of each method on both sides, and compare losses, updates and running means."""
    small = Problem(
        width=0.125,
        batch_size=8,
        steps=1,
        precision="float64",
        # What is compared is the two programs; compiling them in float64 too would take minutes.
        compile=False,
        crop_padding=0,
        flip=False,
        side=16,
    )
    checks = {}
    with tempfile.TemporaryDirectory() as name, Worker("ours", small) as ours, Worker("pytorch", small) as theirs:
        folder = pathlib.Path(name)
        before = folder / "before.npz"
        ours.ask("first", to=str(before))
        for method in methods:
            command.progress(f"checking that both sides compute the same: {method}")
            after = {}
            for label, worker in ((OURS, ours), (PYTORCH, theirs)):
                path = folder / f"{label}.npz"
                worker.ask("one step", method=method, **{"from": str(before), "to": str(path)})
                after[label] = dict(np.load(path))
            checks[method] = agreement(dict(np.load(before)), after[OURS], after[PYTORCH])
    return checks


def agreement(
    before: Mapping[str, np.ndarray], ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Return how far two steps from the same tensors are apart, relative to ours, and whether that is rounding."""
    loss = float(abs(theirs["loss"] - ours["loss"]) / abs(ours["loss"]))
    updated = [name for name in before if not name.endswith(("running_mean", "running_var"))]
    means = [name for name in before if name.endswith("running_mean")]

    def apart(names: list[str]) -> float:
        squares = [
            (np.sum(np.square(theirs[n] - ours[n], dtype=float)), np.sum(np.square(ours[n] - before[n], dtype=float)))
            for n in names
        ]
        difference, size = np.sqrt(np.sum(squares, axis=0))
        return float(difference / size)

    apart_by = {"loss": loss, "update": apart(updated), "running_mean": apart(means)}
    return apart_by | {"agrees": max(apart_by.values()) <= TOLERANCE}


def compare(problem: Problem, args: argparse.Namespace, budget: timing.Budget) -> dict[str, Any]:
    """Time both sides in turns."""
    preparing, slowest = budget.share(0.6), 0.0
    left_out, notes = [], []
    with Worker("ours", problem) as ours, Worker("pytorch", problem) as theirs:
        workers = {OURS: ours, PYTORCH: theirs}
        subjects = {}
        for method in args.methods:
            if subjects and preparing.remaining() < slowest:
                left_out.append(method)
                continue
            start = time.monotonic()
            for label, worker in workers.items():
                command.progress(f"{label}: preparing {method}")
                call = _Call(worker, method, problem.steps)
                try:
                    worker.ask("prepare", method=method)
                    call()
                except WorkerError as error:
                    notes.append(str(error))
                    continue
                subjects[f"{label}, {method}"] = call
            slowest = max(slowest, time.monotonic() - start)
        sides = {label: worker.ask("describe") for label, worker in workers.items()}
        command.progress(f"timing {len(subjects)} steps")
        seconds = timing.interleaved(subjects, rounds=args.rounds, warm_up=args.warm_up, budget=budget)
    seconds = {name: values / problem.steps for name, values in seconds.items()}
    ratios = [Ratio(f"{PYTORCH}, {method}", f"{OURS}, {method}") for method in args.methods]
    measured = {str(ratio): ratio.of(seconds) for ratio in ratios if ratio.measured_in(seconds)}
    name = "pytorch_over_ours_cpu" if jax.default_backend() == "cpu" else "pytorch_over_ours_gpu"
    on_saner = str(Ratio(f"{PYTORCH}, saner", f"{OURS}, saner"))
    return {
        "sides": sides,
        "rounds": len(next(iter(seconds.values()), [])),
        "methods": {name: statistics.quartiles(values) for name, values in seconds.items()},
        "ratios": measured,
        "left_out": left_out,
        "notes": notes,
        "targets": {name: measured[on_saner]} if on_saner in measured else {},
    }


class _Call:
    """Steps of one method on one side, as a call that waits for them."""

    def __init__(self, worker: Worker, method: str, steps: int):
        self._worker, self._method, self._steps = worker, method, steps

    def __call__(self) -> None:
        self._worker.ask("run", method=self._method, steps=self._steps)


def report(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    setting = results["setting"]
    lines = [
        f"ResNet-18, width {setting['width']:g}, batches of {setting['batch_size']}, {setting['precision']}, "
        f"{setting['steps']} steps a call; PyTorch {'with' if setting['compile'] else 'without'} `torch.compile`.",
        "",
    ]
    for package, install in results["skipped"].items():
        lines += [f"PyTorch was skipped: {package} is not installed (`{install}`).", ""]
    if results["checks"]:
        header = ("one float64 step", "loss apart", "update apart", "running mean apart", "allowed", "same")
        rows = [
            (
                method,
                f"{c['loss']:.1e}",
                f"{c['update']:.1e}",
                f"{c['running_mean']:.1e}",
                f"{TOLERANCE:.0e}",
                "yes" if c["agrees"] else "**no: not timed**",
            )
            for method, c in results["checks"].items()
        ]
        lines += [*tables.table(header, rows), ""]
    if results["methods"]:
        rows = [(name, tables.milliseconds(m)) for name, m in results["methods"].items()]
        lines += [*tables.table(("step", "ms (quartiles)"), rows), ""]
        rows = [(name, tables.interval(ratio)) for name, ratio in results["ratios"].items()]
        lines += [*tables.table(("ratio", "time (95 %)"), rows), ""]
        lines += [f"{label}: {side}." for label, side in results["sides"].items()] + [""]
        if results["left_out"]:
            lines += [f"Left out for want of time: {', '.join(results['left_out'])}.", ""]
        lines += [f"Note: {note}." for note in results["notes"]]
    return "\n".join(lines + targets.printed(list(results["targets"]), results["targets"]))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = command.parser("peers", "Measure the training step of ResNet-18 against PyTorch's.")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD", help="(all)")
    parser.add_argument(
        "--check", nargs="*", choices=METHODS, default=("saner",), metavar="METHOD", help="compared first (saner)"
    )
    workload.add_options(parser)
    parser.add_argument("--steps-per-call", type=command.at_least_one, help="steps timed together (on CPUs 1, else 20)")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="have PyTorch compile its network (yes)"
    )
    parser.add_argument("--convolution", choices=compilation.CONVOLUTIONS, default="auto", help="the program's (auto)")
    parser.add_argument("--rounds", type=command.at_least_one, default=30, help="timed calls of every step (30)")
    parser.add_argument("--warm-up", type=command.at_least_one, default=2, help="calls before the timed ones (2)")
    return workload.choose(parser.parse_args(argv))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and, if asked, write."""
    environment.share_device()
    return command.run("peers", parse(argv), argv, measure, report, packages=tuple(PEERS.values()))


if __name__ == "__main__":
    main()
