"""The command line: one function a sub-command, its options generated from its signature."""

import contextlib
import dataclasses
import errno
import functools
import io
import os
import re
import signal
import sys
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from . import files
from .config import (
    AS_STARTED,
    OWN,
    PAPER,
    PROTOCOLS,
    USUAL_PROTOCOLS,
    Circumstances,
    Config,
    Protocol,
    Whereabouts,
    replace,
    run_name,
)
from .errors import Interrupted, UserError, not_installed, unknown_name
from .paper import comparison, presets
from .paper.presets import Scale, Selection
from .training.launch import HERE, PROGRAM, Launch, is_first, join

RUNS = Path("runs")
PAPER_RUNS = RUNS / "paper"
Options = tyro.conf.OmitArgPrefixes


def compare(
    config: Options[Config] = PAPER,
    protocol: Protocol = "auto",
    methods: tuple[str, ...] = ("sgd", "sam", "saner"),
    seeds: tuple[int, ...] = (0, 1, 2),
    name: str | None = None,
    out: Path = RUNS,
    launch: Options[Launch] = HERE,
) -> None:
    """Train several methods under one protocol; print a table and write a figure.

    Without options: SGD, SAM and SANER on handwritten digits, half of whose training labels are wrong. Runs that are
    already complete are read, not run again.

    Args:
        config: Protocol of all runs; its method and seed are replaced.
        protocol: Named protocol that the options change: that of the data set (auto), or one by name.
        methods: Methods to compare.
        seeds: Training seeds, each with a noise draw of its own.
        name: Folder of the comparison; the data set's name if not given.
        out: Folder of all runs.
        launch: Where they are computed.
    """
    join(launch)
    folder = out / (name or config.data.dataset)
    result = comparison.compare(config, methods, seeds, folder, launch.devices)
    if is_first():
        comparison.show(result, folder)


def train(
    config: Options[Config] = PAPER,
    protocol: Protocol = "auto",
    seeds: tuple[int, ...] = (),
    labels: Path | None = None,
    name: str | None = None,
    out: Path = RUNS,
    launch: Options[Launch] = HERE,
) -> None:
    """Train one configuration, with one seed or with several; without options, the paper's protocol.

    Args:
        config: The run.
        protocol: Named protocol that the options change: that of the data set (auto), or one by name.
        labels: decisions.csv that the page of `suspects` saved; they are applied before all else.
        seeds: Several training seeds, one run each; overrides --seed. Complete runs are left, cut-off ones go on.
        name: Folder of the run; made from all settings that are not the paper's if not given.
        out: Folder of all runs.
        launch: Where it is computed.
    """
    join(launch)
    from .training import run

    if seeds:
        comparison.check_seeds(seeds)
    if labels is not None:
        config = replace(config, decisions=str(labels))
    for seed in seeds or (config.seed,):
        one = replace(config, seed=seed)
        named = run_name(one) + ("-decided" if labels is not None else "")
        folder = out / (named if name is None else name if not seeds else f"{name}-seed{seed}")
        # Of several runs the same command goes on with what was cut off; a single one is not taken for another.
        show_summary((run.run_one if seeds else run.train)(one, folder, launch.devices), folder)


def resume(
    folder: tyro.conf.Positional[Path],
    whereabouts: Options[Whereabouts] = AS_STARTED,
    launch: Options[Launch] = HERE,
) -> None:
    """Go on with a run that was stopped, from its newest checkpoint.

    Args:
        folder: Folder of the run.
        whereabouts: Where it finds its files now, if elsewhere than when it was started.
        launch: Where it is computed, which may be elsewhere than it was.
    """
    join(launch)
    from .training import run

    show_summary(run.resume(folder, launch.devices, whereabouts), folder)


def evaluate(
    folder: tyro.conf.Positional[Path],
    whereabouts: Options[Whereabouts] = AS_STARTED,
    launch: Options[Launch] = HERE,
) -> None:
    """Measure a run's newest checkpoint on all its sets.

    Args:
        folder: Folder of the run.
        whereabouts: Where it finds its files now, if elsewhere than when it was started.
        launch: Where it is computed.
    """
    join(launch)
    from .training import run

    values = run.evaluate(folder, launch.devices, whereabouts)
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
    files.check_folder(output.parent)
    comparison.plot(folders, output, by, figure)


def paper(
    preset: tyro.conf.Positional[str],
    selection: Options[Selection] = presets.ALL,
    scale: Options[Scale] = presets.FULL,
    circumstances: Options[Circumstances] = presets.CIRCUMSTANCES,
    out: Path = PAPER_RUNS,
    shard: str = "1/1",
    minutes: float | None = None,
    dry_run: bool = False,
    estimate: bool = True,
) -> None:
    """Run what a table or a figure of the paper is made of; what is complete is left, what was cut off goes on.

    Args:
        preset: table1 to table7, figure1 to figure7, headline, ablations, or the studies elements, radii and every.
        selection: Part of the preset.
        scale: Changes of the paper's protocol.
        circumstances: Files, and how runs are carried out.
        out: Folder of all runs of all presets.
        shard: Part i/n of the runs, counted from 1: start one of the n parts in each process or on each machine.
        minutes: Time to keep to: the runs that fit, whole ones only, those first that tell most; no limit if not given.
        dry_run: Only say which runs there are, how far they are and how long the rest takes.
        estimate: Time a few steps of every kind of run first, to say how long the preset takes.
    """
    from .paper import runs

    runs.carry_out(preset, selection, scale, circumstances, out, shard, minutes, dry_run, estimate)


def report(
    preset: tyro.conf.Positional[str],
    selection: Options[Selection] = presets.ALL,
    scale: Options[Scale] = presets.FULL,
    out: Path = PAPER_RUNS,
    output: Path | None = None,
    record: Path | None = None,
) -> None:
    """Write a table or a figure of the paper from the runs that are there, as Markdown, CSV and a picture.

    Args:
        preset: table1 to table7, figure1 to figure7, headline, ablations, or the studies elements, radii and every.
        selection: Part of the preset.
        scale: Changes of the paper's protocol that the runs were made with.
        out: Folder of all runs, or of a record of them.
        output: Folder of the report; `reports` in the folder of the runs if not given.
        record: Folder to write a small record into: every run's numbers and the mean curves, for which a later report
            with this folder as --out does not need the runs.
    """
    from .paper import report

    for folder in filter(None, (output, record)):
        files.check_folder(folder)
    report.write(preset, selection, scale, out, output or out / "reports", record)


def rank(
    folders: tyro.conf.Positional[tuple[Path, ...]],
    output: Path | None = None,
    score: str | None = None,
    top: int = 64,
    cross_validate: int | None = None,
    whereabouts: Options[Whereabouts] = AS_STARTED,
) -> None:
    """Rank a run's training samples by how likely their given label is wrong.

    Args:
        folders: Folder of a run, or of several that differ in --seed alone; they average their ranks.
        output: Where to write; `ranking` in the first run's folder if not given.
        score: Score to rank by; `list` shows all. Those of probabilities need --cross-validate.
        top: Number of images on the contact sheet.
        cross_validate: Number of folds to train, for probabilities of samples that the network never saw.
        whereabouts: Where the runs find their files now, if elsewhere than when they were started.
    """
    from .suspects import ranking

    if not folders:
        raise UserError("there is nothing to rank: give the folder of a run, or of several.")
    output = output or folders[0] / "ranking"
    files.check_folder(output)
    ranking.show(ranking.rank(folders, output, score or ranking.OF_HISTORIES, top, cross_validate, whereabouts), output)


def suspects(
    source: tyro.conf.Positional[Path],
    config: Options[Config] = OWN,
    score: str | None = None,
    top: int = 64,
    cross_validate: int | None = None,
    pred_probs: Path | None = None,
    name: str | None = None,
    out: Path = RUNS,
    launch: Options[Launch] = HERE,
) -> None:
    """Find the wrong labels in your own data: train on every sample, rank them, and write a page to decide on.

    Takes minutes on two CPU cores, and says first how many. What was cut off goes on with the same command. Open
    suspects/index.html in the run's folder, decide, and save decisions.csv: `train --labels` trains with the decisions,
    `export` writes a copy of the data with them.

    Args:
        source: Folder with one folder of images per class, or an .npz of images or of features with their labels.
        config: How it is trained; the protocol for one's own data decides what is not given.
        score: Score to rank by; the default is that of `rank`.
        top: Number of images on the contact sheet.
        cross_validate: Number of folds to train beside, for probabilities of samples that the network never saw.
        pred_probs: Probabilities (N, K) of another model as .npy, to rank by; nothing is trained then.
        name: Folder of the run; the source's name if not given.
        out: Folder of all runs.
        launch: Where it is computed.
    """
    join(launch)
    from .suspects import ranking, search

    folder = out / (name or f"{re.sub(files.UNFIT_FOR_CHECKPOINTS, '_', source.resolve().stem)}-suspects")
    files.check_folder(folder / "suspects")
    if pred_probs is not None:
        found = search.by_probabilities(
            source, config, pred_probs, folder / "suspects", score or ranking.OF_PROBABILITIES, top
        )
    else:
        found = search.search(
            search.of_source(source, config),
            folder,
            score=score or ranking.OF_HISTORIES,
            top=top,
            folds=cross_validate,
            device_count=launch.devices,
        )
    ranking.show(found, folder / "suspects")
    print(f"look at {folder / 'suspects' / 'index.html'}, decide, and save decisions.csv")


def export(
    source: tyro.conf.Positional[Path],
    decisions: tyro.conf.Positional[Path],
    output: tyro.conf.Positional[Path],
    link: bool = False,
) -> None:
    """Write a copy of your data with the decisions about its labels applied; the original is never touched.

    Args:
        source: Folder or .npz file that was searched.
        decisions: File of decisions, saved from the page.
        output: Folder to write, new or empty.
        link: Make hard links instead of copies of images, where the file system can.
    """
    from .suspects import search

    changes = search.write_decided(source, decisions, output, link)
    print(", ".join(f"{count:,} {what}" for what, count in changes.items() if isinstance(count, int)))
    print(f"written: {output}")


def sharpness(
    folders: tyro.conf.Positional[tuple[Path, ...]],
    samples: int = 1000,
    seed: int = 0,
    tolerance: float = 1e-3,
    by: str = "method",
    output: Path | None = None,
    whereabouts: Options[Whereabouts] = AS_STARTED,
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
        whereabouts: Where the runs find their files now, if elsewhere than when they were started.
    """
    from .paper import sharpness as measuring

    if output is not None:
        files.check_folder(output.parent)
    rows, groups = measuring.measure(
        folders, samples=samples, seed=seed, tolerance=tolerance, by=by, whereabouts=whereabouts
    )
    tables = measuring.markdown(rows, groups, by)
    print(tables, end="")
    if output is not None:
        files.write_text(output, tables)


def noise(config: Options[Config] = PAPER, protocol: Protocol = "auto", folder: Path | None = None) -> None:
    """Inspect the label noise of a configuration without training: rates, transition matrix, figure.

    Args:
        config: The run whose noise is drawn.
        protocol: Named protocol that the options change: that of the data set (auto), or one by name.
        folder: Where to write noise.json and noise.png; nowhere if not given.
    """
    from .training import preparation

    if folder is not None:
        files.check_folder(folder)
    audit = preparation.prepare(config).audit
    if audit is None:
        raise UserError(f"the true labels of {config.data.dataset!r} are unknown, so its noise cannot be inspected.")
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
    print("scores:   ", ", ".join((*ranking.SCORES, *ranking.MARGIN_SCORES, *ranking.PROBABILITY_SCORES)))


COMMANDS: dict[str, Callable[..., Any]] = {
    "compare": compare,
    "train": train,
    "resume": resume,
    "evaluate": evaluate,
    "plot": plot,
    "paper": paper,
    "report": report,
    "suspects": suspects,
    "export": export,
    "rank": rank,
    "sharpness": sharpness,
    "noise": noise,
    "prepare": prepare,
    "list": list_names,
}
# Faults of the machine rather than of the program: a full disk, a quota, a folder that cannot be written.
OUTSIDE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
# Those whose protocol follows from their options; that of `suspects` is always the one for own data.
CONFIGURED = ("compare", "train", "noise")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a sub-command, `compare` if none is named; a user's error is one line and exit status 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, "compare")
    # What the data room found wrong but could leave out is a note to the user, not a line of this program's source.
    warnings.showwarning = lambda message, category, *where: print(f"note: {message}", file=sys.stderr)
    # A name that the terminal cannot show must not end a run.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        keep_compiled_programs()
        config = asked_protocol(arguments)
        with choices_checked_here():
            tyro.extras.subcommand_cli_from_dict(
                COMMANDS | {name: functools.partial(COMMANDS[name], config=config) for name in CONFIGURED},
                prog=PROGRAM,
                description="Train image classifiers on noisily labelled data. Without a sub-command: compare.",
                args=arguments,
            )
    except UserError as error:
        sys.exit(_say(f"error: {error}", 2))
    except ModuleNotFoundError as error:
        sys.exit(_say(f"error: {not_installed(error)}", 2))
    except BrokenPipeError:
        # Whoever read the output has ended. Nothing more can be said, not even by Python as it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in OUTSIDE:
            raise
        where = f" {error.filename}" if error.filename else ""
        verb = "use" if error.errno == errno.ENAMETOOLONG else "write"
        sys.exit(_say(f"error: cannot {verb}{where} ({error.strerror}): what was written before is kept.", 1))
    except KeyboardInterrupt:
        sys.exit(_say("interrupted.", 130))
    except Interrupted as error:
        sys.exit(_say(str(error), 130))


@dataclasses.dataclass(frozen=True)
class Asked:
    """What decides which protocol the other options change."""

    protocol: str = "auto"
    dataset: str | None = None


def asked_protocol(arguments: Sequence[str]) -> Config:
    """Return the protocol that a command's options start from: the one it names, or that of its data set."""
    command, *options = [a for a in arguments if a not in ("-h", "--help")] or ["compare"]
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
            asked, _ = tyro.cli(Asked, args=options, return_unknown_args=True)
    except SystemExit:
        # An option without its value, which the command's own parser says better.
        asked = Asked()
    if asked.protocol not in typing.get_args(Protocol):
        raise unknown_name("value of --protocol", asked.protocol, typing.get_args(Protocol))
    dataset = asked.dataset or ("digits" if command == "compare" else PAPER.data.dataset)
    return PROTOCOLS[USUAL_PROTOCOLS.get(dataset, "paper") if asked.protocol == "auto" else asked.protocol]


@contextlib.contextmanager
def choices_checked_here() -> Iterator[None]:
    """Let a wrong choice through the parser, so that it is answered like every other wrong value: in one line."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def choice(type_info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
        if typing.get_origin(type_info.type) is not Literal:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="{" + ",".join(map(str, typing.get_args(type_info.type))) + "}",
            instance_from_str=lambda given: given[0],
            is_instance=lambda value: isinstance(value, str),
            str_from_instance=lambda value: [str(value)],
        )

    with registry:
        yield


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
