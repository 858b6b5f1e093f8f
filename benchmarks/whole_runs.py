"""Hold whole training runs to PyTorch's: the same labels and images, the released code's conventions on both sides.

    pip install -e ".[examples,bench]" && python -m benchmarks.whole_runs --data-dir ~/tensorflow_datasets

The optimizers and the networks agree step by step (`peers`); here runs do, as far as chance lets them. Every seed
draws the wrong labels once for both sides, each side its own initial weights and order of the batches. Compared are the
noisy accuracy at the last epoch and the test accuracy at the best one: mean and standard deviation over the seeds of
each side, and the mean difference with its 95 % interval, paired by seed. PyTorch's side is `pytorch_loop`.

Runs that are in `--folder` are read, so that a comparison that was stopped goes on.
"""

import argparse
import importlib.util
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.machinery import command, tables, timing
from examples.noisy_images import files
from examples.noisy_images.config import PAPER, Config, replace, run_name
from examples.noisy_images.measures import metrics
from examples.noisy_images.measures.tables import paired, points, spread
from examples.noisy_images.measures.tables import percent as of_hundred
from examples.noisy_images.training import preparation, run

METHODS = ("sgd", "sam", "saner")
OURS, PYTORCH = "ours", "PyTorch"
INSTALL = 'pip install -e ".[bench]"'
MEASURED = {
    "last_noisy_accuracy": "noisy, last",
    "best_test_accuracy": "test, best",
    "last_test_accuracy": "test, last",
}


def configuration(args: argparse.Namespace) -> Config:
    """Return what both sides train, but for method and seed."""
    return replace(
        PAPER,
        dataset=args.dataset,
        data_dir=args.data_dir,
        subset=args.subset,
        test_subset=args.test_subset,
        augment=False,
        rate=0.4,
        model="resnet18",
        width=args.width,
        # As the released loop keeps them.
        batch_norm_pass="perturbed",
        rho=0.1,
        epochs=args.epochs,
        batch_size=args.batch_size,
        evaluate_every=args.epochs,
        checkpoint_every=args.epochs,
        sample_history=False,
    )


def measure(args: argparse.Namespace, budget: timing.Budget) -> dict[str, Any]:
    """Train every method with every seed on both sides, as far as the time goes: whole runs only."""
    config = configuration(args)
    results: dict[str, Any] = {
        "setting": {"seeds": list(args.seeds), "steps_an_epoch": args.subset // args.batch_size}
        | {
            name: getattr(args, name)
            for name in ("dataset", "methods", "width", "subset", "test_subset", "epochs", "batch_size")
        },
        "skipped": {} if importlib.util.find_spec("torch") else {"torch": INSTALL},
        "runs": [],
    }
    if results["skipped"]:
        command.progress(f"skipping PyTorch: torch is not installed ({INSTALL})")
    sides = {OURS: ours} | ({} if results["skipped"] else {PYTORCH: theirs})
    for seed in args.seeds:
        for method in args.methods:
            for side, train in sides.items():
                if not budget.remaining():
                    return results
                summary = train(replace(config, method=method, seed=seed), args.folder)
                measured = {name: summary[name] for name in MEASURED}
                results["runs"].append({"side": side, "method": method, "seed": seed} | measured)
                command.progress(f"{side}, {method}, seed {seed}: " + ", ".join(f"{v:.3f}" for v in measured.values()))
    return results


def ours(config: Config, folder: pathlib.Path) -> dict[str, Any]:
    """Return the summary of the program's run."""
    return run.run_one(config, folder / run_name(config))


def theirs(config: Config, folder: pathlib.Path) -> dict[str, Any]:
    """Return the summary of PyTorch's run on what the program's is trained on."""
    path = folder / "pytorch" / f"{run_name(config)}.json"
    if not path.exists():
        from benchmarks import pytorch_loop

        files.write_json(path, pytorch_loop.train(config, preparation.prepare(config).dataset))
    return metrics.summary(files.read_json(path))


def report(results: dict[str, Any]) -> str:
    """Return the Markdown: both sides of every method, and their differences."""
    setting = results["setting"]
    values = by_seed(results["runs"])
    rows = []
    for method in setting["methods"]:
        for side in (OURS, PYTORCH):
            if of_side := values.get((method, side)):
                seeds = len(of_side["best_test_accuracy"])
                cells = (of_hundred(spread(list(of_side[name].values()))) for name in MEASURED)
                rows.append([f"{method}, {side}", str(seeds), *cells])
        if (method, OURS) in values and (method, PYTORCH) in values:
            pair = values[method, OURS], values[method, PYTORCH]
            differences = [paired(pair[0][name], pair[1][name]) for name in MEASURED]
            count = "" if differences[0] is None else str(differences[0].pairs)
            rows.append([f"{method}, {OURS} minus {PYTORCH}", count, *map(points, differences)])
    lines = [
        f"ResNet-18 of width {setting['width']:g}, {setting['subset']:,} images of {setting['dataset']}, 40 % "
        f"symmetric noise, no augmentation, {setting['epochs']} epochs of {setting['steps_an_epoch']} steps, "
        f"{setting['test_subset']:,} test images. Percent, mean ± standard deviation over seeds; differences in "
        "points, paired by seed, with 95 % intervals.",
        "",
        *tables.table(["run", "seeds", *MEASURED.values()], rows),
    ]
    for package, install in results["skipped"].items():
        lines += ["", f"PyTorch's side was left out: {package} is not installed (`{install}`)."]
    return "\n".join(lines)


def by_seed(runs: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, dict[int, float]]]:
    """Return the measured numbers by method and side, each by seed."""
    values: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for one in runs:
        numbers = values.setdefault((one["method"], one["side"]), {name: {} for name in MEASURED})
        for name in MEASURED:
            numbers[name][one["seed"]] = one[name]
    return values


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = command.parser("whole_runs", "Hold whole training runs to PyTorch's.")
    count: Callable[[str], int] = command.at_least_one
    parser.add_argument("--dataset", default="cifar10", help="data set of colour images (cifar10)")
    parser.add_argument("--data-dir", help="where it is prepared; its own default if not given")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/whole_runs"), help="of the runs")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD", help="(all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2, 3, 4), help="(0 1 2 3 4)")
    parser.add_argument("--width", type=command.positive, default=0.25, help="factor on channels (0.25)")
    parser.add_argument("--subset", type=count, default=2000, help="training images (2000)")
    parser.add_argument("--test-subset", type=count, default=2000, help="test images (2000)")
    parser.add_argument("--epochs", type=count, default=20, help="of every run (20)")
    parser.add_argument("--batch-size", type=count, default=128, help="images a step (128)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and, if asked, write."""
    return command.run("whole_runs", parse(argv), argv, measure, report, packages=("torch",))


if __name__ == "__main__":
    main()
