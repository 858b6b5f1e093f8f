"""What every benchmark's command line shares: options, the record around the results, where they go."""

import argparse
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.machinery import environment
from benchmarks.machinery.timing import Budget
from examples.noisy_images import files
from examples.noisy_images.errors import UserError


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    result = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    result.add_argument("--seconds", type=positive, help="time to keep to; what does not fit is left out (no limit)")
    result.add_argument("--output", type=pathlib.Path, help="JSON file to write (none)")
    return result


def at_least_one(text: str) -> int:
    """Read an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def positive(text: str) -> float:
    """Read a positive number."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def run(
    name: str,
    args: argparse.Namespace,
    argv: Sequence[str] | None,
    measure: Callable[[argparse.Namespace, Budget], dict[str, Any]],
    report: Callable[[dict[str, Any]], str],
    packages: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Measure, print and, if asked, write; returns the results with their environment.

    A user's error is one line and exit status 2, as in the training program.
    """
    arguments = None if argv is None else list(argv)
    budget = Budget(args.seconds)
    try:
        results = environment.record(f"benchmarks.{name}", arguments, packages) | measure(args, budget)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(report(results), flush=True)
    if args.output is not None:
        files.write_json(args.output, results)
    return results


def progress(message: str) -> None:
    """Say what is being done, beside the report."""
    print(message, file=sys.stderr, flush=True)
