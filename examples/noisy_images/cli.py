"""The command line: one function a sub-command, its options generated from its signature."""

import dataclasses
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from .config import PAPER, Config, run_name
from .errors import Interrupted, UserError
from .paper import comparison, presets
from .paper.presets import Scale, Selection
from .paper.runs import Circumstances
from .training.launch import HERE, Launch, is_first, join

RUNS = Path("runs")
PAPER_RUNS = RUNS / "paper"
Options = tyro.conf.OmitArgPrefixes


def compare_under(protocol: Config) -> Callable[..., None]:
    """Return the sub-command `compare` with a protocol as its default."""

    def compare(
        config: Options[Config] = protocol,
        methods: tuple[str, ...] = ("sgd", "sam", "saner"),
        seeds: tuple[int, ...] = (0, 1, 2),
        name: str | None = None,
        out: Path = RUNS,
        launch: Options[Launch] = HERE,
    ) -> None:
        """Train several methods under one protocol; print a table and write a figure.

        Without options: SGD, SAM and SANER on handwritten digits, half of whose training labels are wrong. With another
        --dataset the defaults are the paper's protocol. Runs that are already complete are read, not run again.

        Args:
            config: Protocol of all runs; its method and seed are replaced.
            methods: Methods to compare.
            seeds: Training seeds, each with a noise draw of its own.
            name: Folder of the comparison; the data set's name if not given.
            out: Folder of all runs.
            launch: Where they are computed.
        """
        join(launch)
        folder = out / (name or config.dataset)
        result = comparison.compare(config, methods, seeds, folder, launch.devices)
        if is_first():
            comparison.show(result, folder)

    return compare


def train(
    config: Options[Config] = PAPER,
    seeds: tuple[int, ...] = (),
    name: str | None = None,
    out: Path = RUNS,
    launch: Options[Launch] = HERE,
) -> None:
    """Train one configuration, with one seed or with several; the defaults are the paper's protocol.

    Args:
        config: The run.
        seeds: Several training seeds, one run each; overrides --seed.
        name: Folder of the run; made from all settings that are not the paper's if not given.
        out: Folder of all runs.
        launch: Where it is computed.
    """
    join(launch)
    from .training import run

    if seeds:
        comparison.check_seeds(seeds)
    for seed in seeds or (config.seed,):
        one = dataclasses.replace(config, seed=seed)
        folder = out / (run_name(one) if name is None else name if not seeds else f"{name}-seed{seed}")
        show_summary(run.train(one, folder, launch.devices), folder)


def resume(folder: tyro.conf.Positional[Path], launch: Options[Launch] = HERE) -> None:
    """Go on with a run that was stopped, from its newest checkpoint.

    Args:
        folder: Folder of the run.
        launch: Where it is computed, which may be elsewhere than it was.
    """
    join(launch)
    from .training import run

    show_summary(run.resume(folder, launch.devices), folder)


def evaluate(folder: tyro.conf.Positional[Path], launch: Options[Launch] = HERE) -> None:
    """Measure a run's newest checkpoint on all its sets.

    Args:
        folder: Folder of the run.
        launch: Where it is computed.
    """
    join(launch)
    from .training import run

    values = run.evaluate(folder, launch.devices)
    for metric, value in values.items() if is_first() else ():
        print(f"{metric:>24}  {value:.4f}" if isinstance(value, float) else f"{metric:>24}  {value}")


def plot(
    folders: tyro.conf.Positional[tuple[Path, ...]],
    output: Path,
    by: str = "method",
    figure: str = "1",
) -> None:
    """Draw the curves of runs, as mean and spread over the runs that share a label.

    Args:
        folders: Folders of runs.
        output: Figure to write, .png or .pdf.
        by: Setting that labels the runs: method, alpha, width, model or any other.
        figure: Panels, named after the paper's figures: 1, 2, 3, 5 (of 5 to 7); and of runs with --analyse-batches
            also alignment, shares (of the gradient's elements), layers (the down-weighted share by parameter).
    """
    comparison.plot(folders, output, by, figure)


def paper(
    preset: tyro.conf.Positional[str],
    selection: Options[Selection] = presets.ALL,
    scale: Options[Scale] = presets.FULL,
    circumstances: Options[Circumstances] = Circumstances(),  # noqa: B008
    out: Path = PAPER_RUNS,
    shard: str = "1/1",
    dry_run: bool = False,
    estimate: bool = True,
) -> None:
    """Run what a table or a figure of the paper is made of; what is complete is left, what was cut off goes on.

    Args:
        preset: table1 to table7, figure1 to figure7, or ablations.
        selection: Part of the preset.
        scale: Changes of the paper's protocol.
        circumstances: Files, and how runs are carried out.
        out: Folder of all runs of all presets.
        shard: Part i/n of the runs, counted from 1: start one of the n parts in each process or on each machine.
        dry_run: Only say which runs there are, how far they are and how long the rest takes.
        estimate: Time a few steps of every kind of run first, to say how long the preset takes.
    """
    from .paper import runs

    runs.carry_out(preset, selection, scale, circumstances, out, shard, dry_run, estimate)


def report(
    preset: tyro.conf.Positional[str],
    selection: Options[Selection] = presets.ALL,
    scale: Options[Scale] = presets.FULL,
    out: Path = PAPER_RUNS,
    output: Path | None = None,
) -> None:
    """Write a table or a figure of the paper from the runs that are there, as Markdown, CSV and a picture.

    Args:
        preset: table1 to table7, figure1 to figure7, or ablations.
        selection: Part of the preset.
        scale: Changes of the paper's protocol that the runs were made with.
        out: Folder of all runs.
        output: Folder of the report; `reports` in the folder of the runs if not given.
    """
    from .paper import report

    report.write(preset, selection, scale, out, output or out / "reports")


def rank(
    folders: tyro.conf.Positional[tuple[Path, ...]],
    output: Path | None = None,
    score: str = "mean_loss",
    top: int = 64,
    cross_validate: int | None = None,
) -> None:
    """Rank a run's training samples by how likely their given label is wrong.

    Args:
        folders: Folder of a run, or of several that differ in --seed alone; they average their ranks.
        output: Where to write; `ranking` in the first run's folder if not given.
        score: mean_loss, last_loss, disagreement, forgetting_events, first_learned or, with --cross-validate,
            out_of_sample_loss.
        top: Number of images on the contact sheet.
        cross_validate: Number of folds to train, for probabilities of samples that the network never saw.
    """
    from .suspects import ranking

    if not folders:
        raise UserError("there is nothing to rank: give the folder of a run, or of several.")
    output = output or folders[0] / "ranking"
    ranking.show(ranking.rank(folders, output, score, top, cross_validate), output)


def sharpness(
    folders: tyro.conf.Positional[tuple[Path, ...]],
    samples: int = 1000,
    seed: int = 0,
    tolerance: float = 1e-3,
    by: str = "method",
    output: Path | None = None,
) -> None:
    """Measure the sharpness of runs: the largest eigenvalue of the Hessian of the training loss.

    At the newest checkpoint, of the mean cross-entropy against the given labels, in evaluation mode and without
    augmentation, by Lanczos. Each run keeps its own as sharpness.json.

    Args:
        folders: Folders of runs.
        samples: Training samples that the loss is the mean over, the same for all runs of one training set.
        seed: Seed of the subset and of the vector that Lanczos starts from.
        tolerance: Relative accuracy of the eigenvalue.
        by: Setting that labels the runs whose mean and spread are taken: method, alpha or any other.
        output: File for the tables as Markdown; nowhere if not given.
    """
    from . import files
    from .paper import sharpness as measuring

    rows, groups = measuring.measure(folders, samples=samples, seed=seed, tolerance=tolerance, by=by)
    tables = measuring.markdown(rows, groups, by)
    print(tables, end="")
    if output is not None:
        files.write_text(output, tables)


def noise(config: Options[Config] = PAPER, folder: Path | None = None) -> None:
    """Inspect the label noise of a configuration without training: rates, transition matrix, figure.

    Args:
        config: The run whose noise is drawn.
        folder: Where to write noise.json and noise.png; nowhere if not given.
    """
    from .training import run

    audit = run.prepare(config).audit
    if audit is None:
        raise UserError(f"the true labels of {config.dataset!r} are unknown, so its noise cannot be inspected.")
    print(audit.table())
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        audit.save(folder)
        print(f"written: {folder / 'noise.json'}, {folder / 'noise.png'}")


def prepare(dataset: str, data_dir: Path | None = None, archive: Path | None = None) -> None:
    """Prepare a data set, so that training can read it.

    Args:
        dataset: cifar10 or cifar100.
        data_dir: Where to put it; ~/tensorflow_datasets if not given.
        archive: The official binary archive as a local file; downloaded if not given.
    """
    from . import data

    print(f"prepared: {data.prepare(dataset, data_dir, archive)}")


def list_names() -> None:
    """List data sets, noises, models, methods and scores of suspicion."""
    from . import data, models
    from .labels.noise import KINDS
    from .suspects import ranking
    from .training import methods

    print("data sets:", ", ".join(data.names()))
    print("noises:   ", ", ".join(KINDS))
    print("models:")
    for name, model in models.MODELS.items():
        print(f"  {name:18} {model.summary}")
    print("methods:")
    for name, summary in methods.SUMMARIES.items():
        print(f"  {name:18} {summary}")
    print("scores:   ", ", ".join((*ranking.SCORES, ranking.OUT_OF_SAMPLE)))


COMMANDS: dict[str, Callable[..., Any]] = {
    "train": train,
    "resume": resume,
    "evaluate": evaluate,
    "plot": plot,
    "paper": paper,
    "report": report,
    "rank": rank,
    "sharpness": sharpness,
    "noise": noise,
    "prepare": prepare,
    "list": list_names,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a sub-command, `compare` if none is named; a user's error is one line and exit status 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, "compare")
    # What the data room found wrong but could leave out is a note to the user, not a line of this program's source.
    warnings.showwarning = lambda message, category, *where: print(f"note: {message}", file=sys.stderr)
    try:
        keep_compiled_programs()
        tyro.extras.subcommand_cli_from_dict(
            {"compare": compare_under(protocol_for(arguments)), **COMMANDS},
            prog="python -m examples.noisy_images",
            description="Train image classifiers on noisily labelled data. Without a sub-command: compare.",
            args=arguments,
        )
    except UserError as error:
        sys.exit(_say(f"error: {error}", 2))
    except KeyboardInterrupt:
        sys.exit(_say("interrupted.", 130))
    except Interrupted as error:
        sys.exit(_say(str(error), 130))


def protocol_for(arguments: Sequence[str]) -> Config:
    """Return the protocol that `compare` starts from: that of the digits unless another data set is asked for."""
    asked = [b for a, b in itertools.pairwise(arguments) if a == "--dataset"]
    asked += [a.split("=", 1)[1] for a in arguments if a.startswith("--dataset=")]
    return comparison.DIGITS if not asked or asked[-1] == comparison.DIGITS.dataset else PAPER


def _say(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status


def keep_compiled_programs() -> None:
    """Keep compiled programs on disk, so that a second start does not compile again."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "saner_jax" / "xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    # The small ones too: half a hundred of them take a second of every start.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def show_summary(summary: dict[str, Any], folder: Path) -> None:
    """Print what is reported of a run, once where several processes computed it."""
    if not is_first():
        return
    for metric, value in summary.items():
        if metric.endswith(("accuracy", "gap")):
            print(f"{metric.replace('_', ' '):>28}  {100 * value:.2f} %")
    print(f"written: {folder}")
