"""Measure what this machine can in the time given, and write the results with the targets they meet or miss.

All benchmarks that have targets and fit the time; the others are started alone.

    python -m benchmarks --minutes 10

Every benchmark runs in a process of its own and keeps to its share of the time that is left; each chooses its sizes by
the device. Writes ``RESULTS.md`` and, under ``results/``, one JSON file each. Programs that one benchmark has compiled
are found by the next, in a folder that is removed at the end.
"""

import argparse
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any, TextIO

from benchmarks.machinery import command, targets
from examples.noisy_images import files

# What is run, in this order, with the share that each is worth; the targets that weigh most come first.
WEIGHTS = {
    "train_step": 4.0,
    "memory": 0.7,
    "epoch": 2.2,
    "peers": 2.5,
    "compile_time": 1.8,
    "precision": 2.5,
    "update_cost": 0.5,
}
TITLES = {
    "train_step": "The training step",
    "memory": "Memory",
    "epoch": "Epochs, and seeds in one program",
    "peers": "Beside PyTorch",
    "compile_time": "From the start to the first step",
    "precision": "Compute precision",
    "update_cost": "One optimizer step",
}
# update_cost measures every method when it is started alone; here, those of its targets.
OPTIONS = {
    "update_cost": ["--methods", "optax.contrib.sam", "SAM", "SANER", "--compiles", "1", "--batch-size", "0"],
}
# A benchmark that takes more than twice its share, and this, is stopped; so is one at the end of the whole time.
GRACE_S = 30.0


def measure(names: Sequence[str], minutes: float, folder: pathlib.Path, options: dict[str, list[str]]) -> str:
    """Run the benchmarks; returns the Markdown of `RESULTS.md`, which it also writes."""
    end = time.monotonic() + 60 * minutes
    results: dict[str, dict[str, Any]] = {}
    sections: dict[str, str] = {}
    why_not: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
        }
        for position, name in enumerate(names):
            left = end - time.monotonic()
            share = left * WEIGHTS[name] / sum(WEIGHTS[later] for later in names[position:])
            if left <= 0:
                why_not[name] = "no time was left"
                continue
            output = folder / "results" / f"{name}.json"
            line = [sys.executable, "-m", f"benchmarks.{name}", "--seconds", f"{share:.0f}", "--output", str(output)]
            command.progress(f"--- {name}, {share:.0f} s")
            # A measurement of earlier is not one of this run.
            output.unlink(missing_ok=True)
            limit = min(left, 2 * share) + GRACE_S
            printed, said, status = run([*line, *options.get(name, [])], environment, limit)
            if status is None:
                why_not[name] = f"stopped after {limit:.0f} s"
                continue
            if status:
                why_not[name] = f"ended with status {status} ({said})"
                continue
            results[name] = files.read_json(output)
            sections[name] = printed.strip()
    text = document(results, sections, why_not, minutes)
    files.write_text(folder / "RESULTS.md", text)
    return text


def run(line: Sequence[str], environment: dict[str, str], limit: float) -> tuple[str, str, int | None]:
    """Run a command, with all processes that it starts, for some seconds at most.

    Returns:
      What it printed, the last line that it said beside that (all lines are passed on), and its exit status: None where
      it was stopped.
    """
    said = [""]

    def pass_on(lines: TextIO) -> None:
        for text in lines:
            said[0] = text.strip() or said[0]
            sys.stderr.write(text)

    with tempfile.TemporaryFile("w+") as printed:
        # A session of its own: what is stopped must not go on beside the next measurement, nor may its processes.
        with subprocess.Popen(
            line, stdout=printed, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
        ) as process:
            assert process.stderr is not None
            reader = threading.Thread(target=pass_on, args=(process.stderr,))
            reader.start()
            try:
                status: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                reader.join()
        printed.seek(0)
        return printed.read(), said[0], status


def document(
    results: dict[str, dict[str, Any]], sections: dict[str, str], why_not: dict[str, str], minutes: float
) -> str:
    """Return the Markdown: where it was measured, the targets, one section a benchmark."""
    lines = ["# Results", "", f"Written by `python -m benchmarks --minutes {minutes:g}`; do not edit.", ""]
    platform = None
    for recorded in results.values():
        platform = "cpu" if recorded["platform"] == "cpu" else "gpu"
        lines += [where(recorded), ""]
        break
    lines += ["## Targets", "", *targets.report(results, platform, why_not), ""]
    for name, title in TITLES.items():
        if name in sections:
            lines += [f"## {title}: `{name}`", "", f"`{results[name]['command']}`", "", sections[name], ""]
        elif name in why_not:
            lines += [f"## {title}: `{name}`", "", f"Not measured: {why_not[name]}.", ""]
    return "\n".join(lines)


def where(recorded: dict[str, Any]) -> str:
    """Return device, versions, date and load in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in recorded["versions"].items() if version)
    host = recorded["host"]
    return (
        f"{recorded['device']} ({recorded['devices']}), {host['system']}; {versions}; {recorded['date']}, commit "
        f"{recorded['commit']}. Load at the start {host['load'][0]:.1f} on {host['cores']} cores."
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure what this machine can in the time given."
    )
    parser.add_argument("--minutes", type=command.positive, default=10.0, help="time to keep to (10)")
    parser.add_argument(
        "--only", nargs="+", choices=WEIGHTS, metavar="BENCHMARK", help=f"of {', '.join(WEIGHTS)} (all)"
    )
    parser.add_argument(
        "--folder",
        type=pathlib.Path,
        # As seen from here: the path stands in the commands that are recorded.
        default=pathlib.Path(os.path.relpath(pathlib.Path(__file__).parent)),
        help="where RESULTS.md and results/ go (beside this program)",
    )
    parser.add_argument("--data-dir", help="prepared CIFAR-10 for `precision`; handwritten digits if not given")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write and print."""
    args = parse(argv)
    options = OPTIONS | ({"precision": ["--data-dir", args.data_dir]} if args.data_dir else {})
    print(measure(args.only or list(WEIGHTS), args.minutes, args.folder, options))


if __name__ == "__main__":
    main()
