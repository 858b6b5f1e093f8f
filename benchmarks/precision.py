"""Measure what a compute precision costs: bits of SANER's mask, and accuracy.

    python -m benchmarks.precision --data-dir ~/tensorflow_datasets

**Mask.** The training program trains a network in float32. At several points of it both gradients of the next batch are
taken in float64 and in each precision, from the same weights: how many elements of the mask ``0 < h / g < 1`` agree
with float64, how far the two gradients are off, and how much of the update the flipped bits change. An element is
flipped where ``h`` is within rounding of ``g`` or of zero; flips near zero hardly change the update, those near ``g``
do.

**Accuracy.** Short runs of the program in each precision, with the same seeds, labels and settings.

The data is a subset of CIFAR-10 with `--data-dir`, otherwise the handwritten digits of scikit-learn; half of the labels
are wrong. float64 and, on a CPU, TF32 do not come from the hardware's units: float64 is the program's own function with
every float32 in it a float64, TF32 rounds both operands of every convolution and matrix product, in both passes, to 10
explicit mantissa bits, and is **emulated** wherever the device is not a GPU (see `rounding`).
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import saner_jax
from benchmarks.machinery import command, environment, rounding, statistics, tables, timing, workload
from examples.noisy_images import compilation, models
from examples.noisy_images import config as configuration
from examples.noisy_images.config import PAPER, Config, replace
from examples.noisy_images.data import augmentation
from examples.noisy_images.training import companions, epochs, preparation
from examples.noisy_images.training.step import Images, State, epoch_order
from examples.noisy_images.training.trainer import MATMUL_PRECISION

PRECISIONS = configuration.PRECISIONS
REFERENCE = "float64"

# The paper's.
RHO, ALPHA = 0.1, 0.5
METRICS = ("test_accuracy", "noisy_accuracy")


def emulated(precision: str) -> bool:
    """Return whether a precision is emulated here."""
    return precision == "tf32" and jax.default_backend() != "gpu"


def measure(args: argparse.Namespace, budget: timing.Budget) -> dict[str, Any]:
    """Measure the mask along one training run, then the accuracies of several."""
    environment.keep_freed_memory()
    config = replace(
        PAPER,
        dataset="cifar10" if args.data_dir else "digits",
        data_dir=args.data_dir,
        subset=args.subset if args.data_dir else None,
        test_subset=args.test_subset if args.data_dir else None,
        model=args.model,
        width=args.width,
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        convolution=args.convolution,
        method="saner",
    )
    points = masks(config, args, budget.share(0.5) if args.seeds else budget)
    runs = accuracies(config, args, budget) if args.seeds else []
    return {
        "setting": {
            "dataset": config.data.dataset,
            "model": args.model,
            "width": args.width,
            "epochs": args.epochs,
            "batch_size": args.batch_size,
            "learning_rate": args.learning_rate,
            "convolution": args.convolution,
            "points": args.points,
            "seeds": list(args.seeds),
        },
        "emulated": [precision for precision in args.precisions if emulated(precision)],
        "masks": points,
        "runs": runs,
        "targets": {},
    }


class Training:
    """A run of the program, step by step."""

    def __init__(self, config: Config, seed: int, precision: str):
        self.config = replace(config, seed=seed, precision="float32" if emulated(precision) else precision)
        self.dataset = preparation.prepare(self.config).dataset
        self.trainer = workload.trainer(self.config, self.dataset)
        self._seed = jnp.asarray(seed, jnp.uint32)
        self.images = Images(jnp.asarray(self.dataset.train.images), jnp.asarray(self.dataset.train.labels))
        self._step = self.trainer.functions.train_step
        if emulated(precision):
            self._step = _emulated_step(self._step)
        self.total = config.training.epochs * self.trainer.steps_per_epoch

    def positions(self) -> jax.Array:
        """Return which images the next step sees, int32 (batch size,)."""
        start = self.trainer.step % self.trainer.steps_per_epoch * self.config.training.batch_size
        return self._order[start : start + self.config.training.batch_size]

    def start_epoch(self) -> None:
        """Draw the order of the epoch that begins."""
        self._order = epoch_order(self._seed, self.trainer.epoch, len(self.dataset.train))
        self.trainer.state = self.trainer.functions.start_epoch(self.trainer.state)

    def take_step(self) -> None:
        """Take the next step."""
        with _matmul_precision(self.config.network.precision):
            self.trainer.state = self._step(self.trainer.state, self._seed, self.images, self._order)


@functools.cache  # the program shares its compiled functions between seeds in the same way
def _emulated_step(step: Callable[..., State]) -> Callable[..., State]:
    return jax.jit(rounding.with_tf32_operands(step), donate_argnums=0)


def _matmul_precision(precision: str) -> Any:
    return jax.default_matmul_precision(MATMUL_PRECISION[precision])


def masks(config: Config, args: argparse.Namespace, budget: timing.Budget) -> list[dict[str, Any]]:
    """Return, for several steps of a float32 run, what each precision does to the gradients and the mask of a batch."""
    trained = Training(config, 0, "float32")
    # Denser at the start, where the network changes most.
    chosen = {round((trained.total - 1) * share**2) for share in np.linspace(0, 1, args.points)}
    gradients = {precision: both_gradients(config, precision, trained.dataset) for precision in args.precisions}
    reference = both_gradients(config, REFERENCE, trained.dataset)
    points = []
    for step in range(trained.total):
        if step % trained.trainer.steps_per_epoch == 0:
            trained.start_epoch()
        if step in chosen:
            if not budget.remaining():
                break
            command.progress(f"gradients at step {step}")
            network, positions = trained.trainer.state.networks[0], trained.positions()
            batch = (
                network.params,
                network.statistics,
                trained.images.images[positions],
                trained.images.labels[positions],
            )
            exact = reference(*batch)
            compared = {precision: against(exact, call(*batch)) for precision, call in gradients.items()}
            share = float(mask(*exact).mean())
            points.append({"step": step, "downweighted_share": share, "precisions": compared})
        trained.take_step()
    return points


def both_gradients(config: Config, precision: str, dataset: Any) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Return a function from weights, statistics and a batch to ``g`` and ``h``, flat, computed in a precision.

    The batch comes as uint8 images and labels; it is not augmented.
    """
    graphdef = nnx.split(
        nnx.eval_shape(
            lambda: models.create(
                config.network.model,
                num_classes=dataset.num_classes,
                image_shape=tuple(dataset.image_shape),
                width=config.network.width,
                seed=0,
                dtype="bfloat16" if precision == "bfloat16" else "float32",
            )
        ),
        nnx.Param,
        nnx.BatchStat,
    )[0]
    ascent = saner_jax.scale_to_norm(RHO)

    def gradients(params: Any, statistics: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        def loss(params: Any) -> jax.Array:
            logits = nnx.merge(graphdef, params, statistics, copy=True)(images, train=True)
            return jnp.mean(companions.cross_entropy(logits, labels))

        g = jax.grad(loss)(params)
        eps, _ = ascent.update(g, ascent.init(params), params)
        return g, jax.grad(loss)(jax.tree.map(jnp.add, params, eps))

    if precision == REFERENCE:
        compiled = jax.jit(rounding.in_float64(gradients))
    elif emulated(precision):
        compiled = jax.jit(rounding.with_tf32_operands(gradients))
    else:
        compiled = jax.jit(gradients, compiler_options=compilation.options(config.network.convolution))
    matmul = "float32" if precision == REFERENCE or emulated(precision) else precision

    def flat(params: Any, statistics: Any, images: jax.Array, labels: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        normalised = augmentation.normalise(images, dataset.mean, dataset.std)
        with jax.enable_x64(precision == REFERENCE), _matmul_precision(matmul):
            g, h = jax.device_get(compiled(params, statistics, normalised, labels))
        return _flat(g), _flat(h)

    return flat


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def mask(g: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Return where ``0 < h / g < 1``, bools."""
    return ((h > 0) & (h < g)) | ((h < 0) & (h > g))


def against(exact: tuple[np.ndarray, np.ndarray], rounded: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """Return how far rounded gradients, their mask and their update are from the exact ones."""
    (g, h), (rounded_g, rounded_h) = exact, rounded
    bits, rounded_bits = mask(g, h), mask(rounded_g, rounded_h)
    update, rounded_update = ((1 - ALPHA * m) * x for m, x in ((bits, h), (rounded_bits, rounded_h)))
    flipped = ALPHA * np.where(bits != rounded_bits, h, 0.0)
    return {
        "agreement": float(np.mean(bits == rounded_bits)),
        "gradient_error": _relative(rounded_g - g, g),
        "perturbed_gradient_error": _relative(rounded_h - h, h),
        "update_error": _relative(rounded_update - update, update),
        "update_error_of_flips": _relative(flipped, update),
    }


def _relative(difference: np.ndarray, of: np.ndarray) -> float:
    return float(np.linalg.norm(difference) / np.linalg.norm(of))


def accuracies(config: Config, args: argparse.Namespace, budget: timing.Budget) -> list[dict[str, Any]]:
    """Train with every seed in every precision, as far as the time goes; a seed counts whole or not at all."""
    runs: list[dict[str, Any]] = []
    slowest = 0.0
    for seed in args.seeds:
        if runs and budget.remaining() < slowest:
            break
        before, measured = budget.remaining(), {}
        for precision in args.precisions:
            command.progress(f"seed {seed} in {precision}")
            trained = Training(config, seed, precision)
            for step in range(trained.total):
                if step % trained.trainer.steps_per_epoch == 0:
                    trained.start_epoch()
                trained.take_step()
            prepared = preparation.Prepared(trained.trainer.config, trained.dataset, samples=trained.dataset)
            measured[precision] = epochs.measure(trained.trainer, prepared, on_training_set=True)
        runs.append({"seed": seed, "precisions": measured})
        slowest = max(slowest, before - budget.remaining()) if args.seconds else 0.0
    return runs


def report(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    setting = results["setting"]
    name = {p: f"{p} (emulated)" if p in results["emulated"] else p for p in PRECISIONS}
    lines = [
        f"{setting['model']}, width {setting['width']:g}, {setting['dataset']}, half of the labels wrong, "
        f"{setting['epochs']} epochs in batches of {setting['batch_size']}.",
        "",
    ]
    rows = []
    for point in results["masks"]:
        for precision, m in point["precisions"].items():
            rows.append(
                (
                    str(point["step"]),
                    name[precision],
                    f"{m['agreement']:.4%}",
                    f"{m['gradient_error']:.1e}",
                    f"{m['perturbed_gradient_error']:.1e}",
                    f"{m['update_error']:.1e}",
                    f"{m['update_error_of_flips']:.1e}",
                    f"{point['downweighted_share']:.1%}",
                )
            )
    header = (
        "step",
        "precision",
        "mask as in float64",
        "error of g",
        "of h",
        "of the update",
        "by flips alone",
        "masked",
    )
    lines += [*tables.table(header, rows), ""]
    if results["runs"]:
        rows = []
        base = results["runs"][0]["precisions"]
        for precision in base:
            row = [name[precision]]
            for metric in METRICS:
                values = np.array([one["precisions"][precision][metric] for one in results["runs"]])
                row.append(tables.percent(statistics.mean_with_spread(values)))
                if precision == "float32" or "float32" not in base:
                    row.append("")
                    continue
                against_float32 = values - [one["precisions"]["float32"][metric] for one in results["runs"]]
                row.append(tables.percent(statistics.mean_with_spread(against_float32), sign="+"))
            rows.append(row)
        header = ["precision"]
        for metric in METRICS:
            header += [metric.replace("_", " "), "against float32, by seed"]
        seeds = [str(one["seed"]) for one in results["runs"]]
        which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(seeds)} (mean and standard deviation)"
        lines += [f"After the last epoch, {which}:", ""]
        lines += [*tables.table(header, rows), ""]
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = command.parser("precision", "Measure mask bits and accuracies by compute precision.")
    parser.add_argument("--data-dir", help="prepared CIFAR-10; handwritten digits if not given")
    parser.add_argument("--subset", type=command.at_least_one, default=2560, help="CIFAR-10 training images (2560)")
    parser.add_argument("--test-subset", type=command.at_least_one, default=2000, help="CIFAR-10 test images (2000)")
    parser.add_argument("--model", choices=sorted(models.MODELS), default="small_cnn", help="network (small_cnn)")
    parser.add_argument("--width", type=command.positive, default=0.5, help="factor on channels (0.5)")
    parser.add_argument("--epochs", type=command.at_least_one, default=20, help="of every run (20)")
    parser.add_argument("--batch-size", type=command.at_least_one, default=64, help="images a step (64)")
    parser.add_argument("--learning-rate", type=command.positive, default=0.05, help="at the start (0.05)")
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, metavar="PRECISION", help="(all)"
    )
    parser.add_argument("--convolution", choices=compilation.CONVOLUTIONS, default="auto", help="the program's (auto)")
    parser.add_argument("--points", type=command.at_least_one, default=6, help="steps at which masks are compared (6)")
    parser.add_argument("--seeds", nargs="*", type=int, default=(0, 1, 2), help="of the accuracies (0 1 2)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and, if asked, write."""
    return command.run("precision", parse(argv), argv, measure, report)


if __name__ == "__main__":
    main()
