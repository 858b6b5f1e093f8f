"""Measure how the optimizer's own cost grows with leaves, parameters and devices.

    python -m benchmarks.scaling --output benchmarks/results/scaling.json --figure benchmarks/results/scaling.png

* **Leaves**: time to trace and to compile a step on trees of small leaves, in seconds of processor time (of all
  threads), which other work on the machine hardly changes, and without Python's garbage collector, as `timeit` does it.
* **Parameters**: wall-clock time and temporary memory of a step, with the trivial gradient.
* **Devices**: memory of a device, and the size of what collectives give it, in the step of the sharded transformer;
  compiled for virtual CPU devices, never run: their times would say nothing about devices. With ``--topology v5e:2x4``
  and libtpu installed, compiled for TPUs, which need not be there.

SANER stands beside the same chain without it, beside two passes without a norm, and beside these with Optax's own
global norm. What grows is fitted by a power of the size, over its upper half.
"""

import argparse
import functools
import gc
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import saner_jax
from benchmarks.machinery import collectives, command, environment, tables, timing
from examples.noisy_images.errors import UserError
from examples.noisy_images.measures.plots import save
from examples.sharded_transformer import training

LEAVES = (10, 30, 100, 300, 1000, 3000)
PARAMETERS = (10**5, 10**6, 10**7, 10**8)
DEVICES = (1, 2, 4, 8)
LEAF_SIZE = 8
RHO = 0.1
TRANSFORMER = training.Config(vocabulary=256, length=64, embedding=512, heads=8, layers=8, batch=8)


def perturbed(rho: float) -> optax.GradientTransformationExtraArgs:
    """Return the plainest step of two passes, without a norm or a mask: ``h = grad(w + rho g)``."""

    def update(updates: Any, state: Any, params: Any, *, grad_fn: Callable[[Any], Any]) -> Any:
        return grad_fn(jax.tree.map(lambda w, g: w + rho * g, params, updates)), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


METHODS = {
    "without": lambda: optax.identity(),
    "two passes": lambda: perturbed(RHO),
    "two passes, clipped": lambda: optax.chain(perturbed(RHO), optax.clip_by_global_norm(1.0)),
    "SANER": lambda: saner_jax.saner(RHO, 0.5),
}


def then_momentum(name: str) -> optax.GradientTransformationExtraArgs:
    """Return a method with weight decay, momentum and the learning rate after it."""
    return optax.with_extra_args_support(
        optax.chain(METHODS[name](), optax.add_decayed_weights(5e-4), optax.sgd(1e-3, momentum=0.9))
    )


def step_of(tx: optax.GradientTransformationExtraArgs) -> Callable[[Any], Any]:
    """Return a step on (params, state) with the gradient of ``sum((w**2 - 1)**2) / 4``, element by element."""

    def grad_fn(params: Any) -> Any:
        return jax.tree.map(lambda w: w * (w * w - 1), params)

    def step(carry: tuple[Any, Any]) -> tuple[Any, Any]:
        params, state = carry
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    return step


def over_leaves(counts: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Return the processor time of tracing and of compiling, the least of the repeats, for every number of leaves."""
    rows = []
    for count in counts:
        command.progress(f"{count} leaves")
        params = [jax.ShapeDtypeStruct((LEAF_SIZE,), jnp.float32)] * count
        row: dict[str, Any] = {"leaves": count}
        for name in METHODS:
            tx, seconds = then_momentum(name), []
            state = jax.eval_shape(tx.init, params)
            for _ in range(repeats):
                jax.clear_caches()
                gc.collect()
                gc.disable()
                start = time.process_time()
                lowered = jax.jit(step_of(tx)).lower((params, state))
                traced = time.process_time()
                lowered.compile()
                seconds.append((traced - start, time.process_time() - traced))
                gc.enable()
            trace, compilation = np.min(seconds, axis=0)
            row[name] = {"trace_s": float(trace), "compile_s": float(compilation)}
        rows.append(row)
    return rows


def over_parameters(counts: Sequence[int], rounds: int, budget: timing.Budget) -> list[dict[str, Any]]:
    """Return the median time and the temporary memory of a step for every number of parameters, in ten leaves."""
    rows = []
    for count in counts:
        command.progress(f"{count:,} parameters")
        rng = np.random.default_rng(0)
        # Between the minima at -1 and 1, where no step grows, however many there are.
        weights = rng.uniform(-1, 1, count // 10).astype(np.float32)
        row: dict[str, Any] = {"parameters": count}
        subjects = {}
        for name in METHODS:
            tx = then_momentum(name)
            params = [jnp.array(weights) for _ in range(10)]
            carry = params, jax.tree.map(jnp.copy, tx.init(params))
            compiled = jax.jit(step_of(tx), donate_argnums=0).lower(carry).compile()
            subjects[name] = timing.Repeated(compiled, carry)
            row[name] = {"temporary_bytes": compiled.memory_analysis().temp_size_in_bytes}
        seconds = timing.interleaved(subjects, rounds=rounds, warm_up=2, budget=budget)
        for name, subject in subjects.items():
            subject.check_finite(name)
            row[name]["median_s"] = float(np.median(seconds[name]))
        rows.append(row)
    return rows


def over_devices(
    config: training.Config,
    counts: Sequence[int],
    devices: Sequence[Any],
    methods: Sequence[str] = ("two passes", "SANER"),
) -> list[dict[str, Any]]:
    """Return memory and collectives of one device in the transformer's step, for every number of devices."""
    rows = []
    for count in counts:
        row: dict[str, Any] = {"devices": count}
        for name in methods:
            command.progress(f"{count} devices: {name}")
            compiled = compiled_step(config, devices[:count], optax.chain(METHODS[name](), optax.adamw(1e-3)))
            memory, counted = compiled.memory_analysis(), collectives.moved(compiled)
            row[name] = {
                "state_bytes": memory.argument_size_in_bytes,
                "temporary_bytes": memory.temp_size_in_bytes,
                # As XLA states it: on TPUs the peak of all that the step holds, on CPUs less than the temporary memory.
                "stated_peak_bytes": memory.peak_memory_in_bytes,
                "received_bytes": collectives.received(counted),
                "arrays": sum(counted.values()),
            }
        rows.append(row)
    return rows


def compiled_step(config: training.Config, devices: Sequence[Any], tx: optax.GradientTransformation) -> Any:
    """Compile the transformer's step for these devices, which need not be there to run it."""
    mesh = training.device_mesh(list(devices))
    tokens = jax.ShapeDtypeStruct((config.batch, config.length), jnp.int32)
    with jax.set_mesh(mesh):
        program = training.program(config, mesh, tx)
        return program.step.lower(program.abstract, tokens, tokens).compile()


def devices_of(topology: str | None, count: int) -> list[Any]:
    """Return the devices to compile for: those of a TPU topology, or virtual ones."""
    if topology is not None:
        from jax.experimental import topologies

        devices = list(topologies.get_topology_desc(topology_name=topology, platform="tpu").devices)
    else:
        devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(f"{len(devices)} devices are here where {count} are asked for; choose fewer --devices.")
    return devices


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Return p of the power ``size ** p`` that fits the upper half of the values; None if a value is not positive."""
    half = len(sizes) // 2
    sizes, values = sizes[half:], values[half:]
    if len(sizes) < 2 or min(values) <= 0:
        return None
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def exponents(results: dict[str, Any]) -> dict[str, float | None]:
    """Return how each cost grows: of the chain without SANER, and of what SANER and the others add to it."""

    def fit(rows: list[dict[str, Any]], size: str, name: str, quantity: str) -> float | None:
        values = [row[name][quantity] - (0 if name == "without" else row["without"][quantity]) for row in rows]
        return exponent([row[size] for row in rows], values)

    fits = {}
    for size, quantities in (("leaves", ("trace_s", "compile_s")), ("parameters", ("median_s", "temporary_bytes"))):
        for quantity in quantities:
            for name in METHODS:
                what = "the chain without SANER" if name == "without" else f"what {name} adds"
                fits[f"{quantity} over {size}, {what}"] = fit(results[size], size, name, quantity)
    return fits


def measure(args: argparse.Namespace, budget: timing.Budget) -> dict[str, Any]:
    """Measure all three, what takes longest last, and fit."""
    devices = devices_of(args.topology, max(args.devices))
    results: dict[str, Any] = {
        "setting": {"transformer": vars(TRANSFORMER), "topology": args.topology, "freed_memory_kept": args.memory_kept},
        "devices": over_devices(TRANSFORMER, args.devices, devices),
        "parameters": over_parameters(args.parameters, args.rounds, budget),
        "leaves": over_leaves(args.leaves, args.repeats),
    }
    return results | {"exponents": exponents(results)}


def report(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    names = list(METHODS)
    rows = [
        (f"{row['leaves']:,}", *(f"{row[name][key]:.3f}" for key in ("trace_s", "compile_s") for name in names))
        for row in results["leaves"]
    ]
    lines = tables.table(("leaves", *(f"{what}, s: {name}" for what in ("trace", "compile") for name in names)), rows)
    rows = [
        (
            f"{row['parameters']:,}",
            *(f"{1e3 * row[name]['median_s']:.2f}" for name in names),
            *(f"{row[name]['temporary_bytes'] / (4 * row['parameters']):.2f}" for name in names),
        )
        for row in results["parameters"]
    ]
    header = ("parameters", *(f"step, ms: {name}" for name in names), *(f"temporary, trees: {name}" for name in names))
    lines += ["", *tables.table(header, rows), ""]
    rows = []
    for row in results["devices"]:
        for name in ("two passes", "SANER"):
            measured = row[name]
            moved = ", ".join(f"{kind} {size / 1e6:.2f}" for kind, size in measured["received_bytes"].items()) or "none"
            state, temporary = (f"{measured[key] / 1e6:.1f}" for key in ("state_bytes", "temporary_bytes"))
            rows.append((f"{row['devices']}, {name}", state, temporary, moved))
    lines += tables.table(("devices", "state, MB", "temporary, MB", "results of collectives, MB"), rows)
    rows = [
        (name, "none: too few sizes, or lost in the noise" if value is None else f"{value:.2f}")
        for name, value in results["exponents"].items()
    ]
    return "\n".join([*lines, "", *tables.table(("grows as a power", "exponent"), rows)])


def figure(results: dict[str, Any]) -> Any:
    """Return four panels: compilation over leaves, a step over parameters, memory and traffic over devices."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(7.2, 5.6), layout="constrained")
    compilation, step, memory, traffic = drawn.subplots(2, 2).flat
    styles = {
        "without": ("#000000", "o", "-"),
        "two passes": ("#D55E00", "s", "--"),
        "two passes, clipped": ("#009E73", "D", ":"),
        "SANER": ("#0072B2", "^", "-"),
    }

    def lines(
        axes: Any, size: str, value: Callable[[dict[str, Any]], float], title: str, label: str, scale: str = "log"
    ) -> None:
        for name, (colour, marker, style) in styles.items():
            rows = [row for row in results[size] if name in row]
            if rows:
                points = [row[size] for row in rows], [value(row[name]) for row in rows]
                axes.plot(*points, color=colour, marker=marker, linestyle=style, label=name, markersize=4)
        axes.set_xscale("log", base=2 if size == "devices" else 10)
        axes.set_yscale(scale)
        axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
        axes.set_xlabel(size, fontsize=9)
        axes.set_ylabel(label, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(color="0.88", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)

    lines(compilation, "leaves", lambda m: m["trace_s"] + m["compile_s"], "Trace and compile", "processor time (s)")
    lines(step, "parameters", lambda m: 1e3 * m["median_s"], "Step", "wall-clock time (ms)")
    lines(
        memory, "devices", lambda m: (m["state_bytes"] + m["temporary_bytes"]) / 1e6,
        "Memory of a device", "state and temporary (MB)", "linear",
    )  # fmt: skip
    lines(
        traffic, "devices", lambda m: sum(m["received_bytes"].values()) / 1e6,
        "Collectives of a device", "results in a step (MB)", "linear",
    )  # fmt: skip
    for axes in (memory, traffic):
        axes.set_xticks([row["devices"] for row in results["devices"]])
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_ylim(bottom=0)
    return drawn


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = command.parser("scaling", "Measure how the optimizer's own cost grows with leaves, parameters, devices.")
    several = functools.partial(parser.add_argument, nargs="+", type=command.at_least_one)
    several("--leaves", default=LEAVES, help="numbers of leaves (10 to 3,000)")
    several("--parameters", default=PARAMETERS, help="numbers of parameters (1e5 to 1e8)")
    several("--devices", default=DEVICES, help="numbers of devices (1 to 8)")
    parser.add_argument("--repeats", type=command.at_least_one, default=2, help="compilations, the least counts (2)")
    parser.add_argument("--rounds", type=command.at_least_one, default=15, help="timed steps (15)")
    parser.add_argument("--topology", help="TPU topology to compile for, such as v5e:2x4; needs libtpu (CPU devices)")
    parser.add_argument("--figure", type=pathlib.Path, help="PNG or PDF file to draw (none)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and, if asked, write and draw."""
    args = parse(argv)
    if args.topology is None:
        jax.config.update("jax_num_cpu_devices", max(args.devices))
    args.memory_kept = environment.keep_freed_memory()
    results = command.run("scaling", args, argv, measure, report, packages=("libtpu",))
    if args.figure is not None:
        save(figure(results), args.figure)
    return results


if __name__ == "__main__":
    main()
