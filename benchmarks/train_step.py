"""Measure the training program's own step: both passes through the network, augmentation, optimizer, running sums.

    python -m benchmarks.train_step --models resnet18 --methods sgd sam saner --precisions float32 bfloat16

Every method takes steps on random images that lie on the device. Methods are timed in turn, in a new random order every
round, and compared within rounds. The program monitors every method of two passes (norms, cosine, share of
down-weighted elements); ``sam-unmonitored``, ``saner-unmonitored`` and ``optax.contrib.sam`` take the same step with
nothing monitored. On accelerators a call is a scan over several steps, as the program's epochs are.

Operations are counted from the layers, and divided by the median time and by the rate that this device reached in the
same run in a matrix product or a convolution of the same precision, whichever was faster.
"""

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.machinery import command, environment, peak, statistics, tables, targets, timing, workload
from benchmarks.machinery.statistics import Ratio
from examples.noisy_images import config as configuration
from examples.noisy_images import models
from examples.noisy_images.config import PAPER, replace

# Those of the targets first: they are compiled in this order, as long as there is time.
DEFAULT_METHODS = ("sgd", "sam", "saner", "sam-unmonitored", "optax.contrib.sam", "saner-unmonitored")
# A method under other settings of the program.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "saner-not-augmented": ("saner", {"augment": False}),
    "saner-every-5": ("saner", {"every": 5}),
}
METHODS = (*workload.METHODS, *VARIANTS)
# Measured where nothing is asked for, by the device's own; a CPU has no TF32.
PRECISIONS = {"float32": ("float32",), "bfloat16": ("bfloat16", "float32", "tf32")}
# What a target is about; the first pair of model and precision counts.
TARGET_RATIOS = {
    "saner_over_sam": Ratio("saner", "sam", 1.02),
    "sam_over_two_sgd": Ratio("sam", "sgd", 1.02, factor=2),
    "sam_over_optax_sam": Ratio("sam-unmonitored", "optax.contrib.sam", 1.01),
}
RATIOS = (
    *TARGET_RATIOS.values(),
    Ratio("sam", "sam-unmonitored"),
    Ratio("saner", "saner-unmonitored"),
    Ratio("saner", "saner-not-augmented"),
    Ratio("saner-every-5", "sgd"),
    Ratio("saner-every-5", "saner"),
    Ratio("saner-unmonitored", "sam-unmonitored"),
    Ratio("sam-unmonitored", "sgd", factor=2),
    *(Ratio(f"{base}+saner", base) for base in ("asam", "gsam", "fsam", "vasso")),
)


def measure_pair(
    model: str, precision: str, args: argparse.Namespace, budget: timing.Budget, trace: pathlib.Path | None
) -> dict[str, Any]:
    """Measure all methods with one model in one precision."""
    compiling = budget.share(0.75)
    subjects, steps, methods, left_out, slowest = {}, {}, {}, [], 0.0
    for method in args.methods:
        if compiling.remaining() < slowest:
            left_out.append(method)
            continue
        command.progress(f"{model}, {precision}: compiling {method}")
        name, settings = VARIANTS.get(method, (method, {}))
        config = replace(
            PAPER,
            model=model,
            width=args.width,
            precision=precision,
            method=name,
            batch_size=args.batch_size,
            **settings,
        )
        work = workload.Workload(config, args.steps_per_call, (args.side, args.side, 3))
        compiled = work.compile()
        slowest = max(slowest, compiled.trace_s + compiled.compile_s)
        methods[method] = {
            "trace_s": compiled.trace_s,
            "compile_s": compiled.compile_s,
            "flops": work.flops / work.steps_per_call,
            **compiled.memory(),
            **compiled.cost(),
        }
        subjects[method], steps[method] = work.repeated(compiled), work.steps_per_call
    peaks = peak.measure(precision)
    command.progress(f"{model}, {precision}: timing {', '.join(subjects)}")
    with timing.trace(trace):
        seconds = timing.interleaved(subjects, rounds=args.rounds, warm_up=args.warm_up, budget=budget)
    seconds = {method: values / steps[method] for method, values in seconds.items()}
    for method, values in seconds.items():
        subjects[method].check_finite(method)
        median = float(np.median(values))
        rate = methods[method]["flops"] / median
        methods[method] |= statistics.quartiles(values) | {
            "images_per_s": args.batch_size / median,
            "flops_per_s": rate,
            "share_of_peak": rate / peak.flops_per_s(peaks),
        }
    ratios = {str(r): r.of(seconds) | {"target": r.target} for r in RATIOS if r.measured_in(seconds)}
    return {
        "model": model,
        "precision": precision,
        "rounds": len(next(iter(seconds.values()))),
        "peak": peaks,
        "methods": methods,
        "left_out": left_out,
        "ratios": ratios,
    }


def measure(args: argparse.Namespace, budget: timing.Budget) -> dict[str, Any]:
    """Measure every model in every precision, as far as the time goes."""
    environment.keep_freed_memory()
    pairs = [(model, precision) for model in args.models for precision in args.precisions]
    measured, left_out = [], []
    for position, (model, precision) in enumerate(pairs):
        # The first pair is the one that the targets are about.
        share = 1 / (len(pairs) - position) if position or len(pairs) == 1 else 0.8
        if measured and budget.remaining() < args.least_seconds:
            left_out.append(f"{model} in {precision}")
            continue
        folder = args.trace / f"{model}-{precision}" if args.trace else None
        measured.append(measure_pair(model, precision, args, budget.share(share), folder))
    ratios = measured[0]["ratios"]
    return {
        "setting": {
            "width": args.width,
            "batch_size": args.batch_size,
            "side": args.side,
            "steps_per_call": args.steps_per_call,
        },
        "pairs": measured,
        "left_out": left_out,
        "targets": {name: ratios[str(r)] for name, r in TARGET_RATIOS.items() if str(r) in ratios},
    }


def report(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    setting = results["setting"]
    lines = [
        f"Width {setting['width']:g}, batches of {setting['batch_size']}, images of side {setting['side']}, "
        f"{setting['steps_per_call']} steps a call.",
        "",
    ]
    for pair in results["pairs"]:
        peaks = pair["peak"]
        lines += [
            f"**{pair['model']}, {pair['precision']}**, {pair['rounds']} rounds. Reached by a matrix product "
            f"{peaks['product_flops_per_s'] / 1e12:.3g} TFLOP/s, by a convolution "
            f"{peaks['convolution_flops_per_s'] / 1e12:.3g} TFLOP/s, by a copy {peaks['copied_bytes_per_s'] / 1e9:.3g} "
            "GB/s.",
            "",
        ]
        lines += [*_table_of_methods(pair["methods"]), ""]
        rows = []
        for name, ratio in pair["ratios"].items():
            target = "" if ratio["target"] is None else f"at most {ratio['target']:.2f}"
            rows.append((name, tables.interval(ratio), target))
        if rows:
            lines += [*tables.table(("ratio", "time (95 %)", "target"), rows), ""]
        if pair["left_out"]:
            lines += [f"Left out for want of time: {', '.join(pair['left_out'])}.", ""]
    if results["left_out"]:
        lines += [f"Left out for want of time: {', '.join(results['left_out'])}.", ""]
    return "\n".join(lines + targets.printed(TARGET_RATIOS, results["targets"]))


def _table_of_methods(methods: dict[str, dict[str, Any]]) -> list[str]:
    header = (
        "method",
        "step, ms (quartiles)",
        "images/s",
        "of the peak",
        "temporary, MB",
        "accessed, MB",
        "compile, s",
    )
    rows = []
    for method, m in methods.items():
        accessed = "" if m["xla_bytes_accessed"] is None else f"{m['xla_bytes_accessed'] / 1e6:.0f}"
        rows.append(
            (
                method,
                tables.milliseconds(m),
                f"{m['images_per_s']:.0f}",
                f"{m['share_of_peak']:.1%}",
                f"{m['temporary_bytes'] / 1e6:.1f}",
                accessed,
                f"{m['trace_s'] + m['compile_s']:.1f}",
            )
        )
    return tables.table(header, rows)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = command.parser("train_step", "Measure the training program's step for methods, models and precisions.")
    parser.add_argument("--models", nargs="+", choices=sorted(models.MODELS), metavar="MODEL", help="(resnet18)")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=DEFAULT_METHODS,
        metavar="METHOD",
        help=f"of {', '.join(METHODS)} ({' '.join(DEFAULT_METHODS)})",
    )
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=configuration.PRECISIONS,
        metavar="PRECISION",
        help="of float32, tf32, bfloat16; a CPU has no TF32 (on CPUs float32, else bfloat16 float32 tf32)",
    )
    parser.add_argument("--width", type=command.positive, help="factor on channels (on CPUs 0.25, else 1)")
    parser.add_argument("--batch-size", type=command.at_least_one, help="images a step (on CPUs 32, else 128)")
    parser.add_argument("--side", type=command.at_least_one, default=32, help="of the images, in pixels (32)")
    parser.add_argument("--steps-per-call", type=command.at_least_one, help="steps timed together (on CPUs 1, else 20)")
    parser.add_argument("--rounds", type=command.at_least_one, default=50, help="timed calls of every method (50)")
    parser.add_argument("--warm-up", type=command.at_least_one, default=2, help="calls before the timed ones (2)")
    parser.add_argument(
        "--least-seconds", type=float, default=60.0, help="time below which no further pair is begun (60)"
    )
    parser.add_argument("--trace", type=pathlib.Path, help="folder for a trace of the JAX profiler of the timed calls")
    args = workload.choose(parser.parse_args(argv))
    size = workload.device_size()
    args.models = args.models or [size.model]
    # A CPU has no TF32.
    args.precisions = args.precisions or (
        ["float32"] if size.precision == "float32" else ["bfloat16", "float32", "tf32"]
    )
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and, if asked, write."""
    return command.run("train_step", parse(argv), argv, measure, report)


if __name__ == "__main__":
    main()
