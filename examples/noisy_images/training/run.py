"""One run: data and noise, training, evaluation, checkpoints and logs, in one folder.

config.json       the resolved configuration
data.json         which samples it is trained and tested on, by identity and content
hashes.npz        of samples that are files, the contents that were hashed, so that unchanged files are not read again
environment.json  command, versions, devices, commit, and those of every start from a checkpoint
noise.json, .png  the audit of the label noise
metrics.jsonl     one line an epoch
analysis.jsonl    with --analyse-batches, one line an epoch: the gradient's shares and alignment by parameter
curves.png        the same as a figure
tensorboard/      the same as scalars
checkpoints/      the newest two
samples/          loss, predicted label and margin of every training sample over the epochs
summary.json      the numbers that are reported
sharpness.json    written by the command `sharpness`
"""

import contextlib
import re
from pathlib import Path
from typing import Any

from .. import config as configuration
from .. import files
from ..config import AS_STARTED, Config, Whereabouts
from ..data import identity, printable
from ..errors import UserError, left_out_if_not_installed
from ..measures import metrics
from . import devices, launch, timing
from .checkpoints import Checkpoints
from .environment import environment
from .epochs import measure, train_to_the_end
from .preparation import Prepared, prepare
from .trainer import Trainer

HASHES = "hashes.npz"


def train(config: Config, folder: Path, device_count: int | None = None, estimate: bool = False) -> dict[str, Any]:
    """Train one run from its start to its end, on all devices or on some; returns the summary.

    Args:
      config: The run.
      folder: Its folder, which holds no run yet.
      device_count: Number of devices; all if None.
      estimate: Say first how long it takes.

    Raises:
      UserError: The configuration or the data is wrong, or the folder already holds a run.
      Interrupted: The run was asked to stop.
    """
    _check_name(folder)
    configuration.check_same_run(config, folder)
    if (folder / "config.json").exists():
        raise UserError(f"{folder} already holds a run: go on with `resume {folder}`, or choose another --name.")
    if (folder / "checkpoints").exists():
        raise UserError(f"{folder} holds checkpoints but no config.json: restore it, or choose another --name.")
    # Everything that can be wrong is found before the folder is made.
    prepared = prepare(config)
    # The data is found again from wherever the run is gone on with.
    config = AS_STARTED.of(prepared.config)
    trainer = Trainer(config, prepared.dataset, devices.mesh(device_count))
    # No process makes what another one has not looked for yet.
    launch.wait_for_others("checked")
    if launch.is_first():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {folder} ({error.strerror}): choose another --out.") from error
    with _kept_from_others(folder):
        if launch.is_first():
            files.write_json(folder / "environment.json", environment(trainer.mesh))
            files.write_json(folder / "data.json", identity.fingerprint(prepared.samples, cache=folder / HASHES))
            print(prepared.samples.description, flush=True)
            if prepared.audit is not None:
                print(f"{folder.name}: {prepared.audit.summary()}", flush=True)
                _optional(lambda: prepared.audit.save(folder))
            files.write_json(folder / "config.json", configuration.to_json(config))
        if estimate:
            seconds = timing.seconds_per_epoch(prepared) * config.training.epochs
            print(f"{config.network.model}, {config.training.epochs} epochs: {timing.estimate(seconds)}", flush=True)
        return _complete(trainer, prepared, folder, resume=False)


def resume(folder: Path, device_count: int | None = None, whereabouts: Whereabouts = AS_STARTED) -> dict[str, Any]:
    """Go on with a run from its newest checkpoint, on as many devices as there are now; returns the summary."""
    with _kept_from_others(folder):
        config, prepared = prepared_again(folder, whereabouts)
        trainer = Trainer(config, prepared.dataset, devices.mesh(device_count))
        if launch.is_first():
            path = folder / "environment.json"
            of_start = files.read_json(path) if path.exists() else {}
            resumed = [*of_start.get("resumed", []), environment(trainer.mesh)]
            files.write_json(path, of_start | {"resumed": resumed})
            files.write_json(folder / "config.json", configuration.to_json(config))
        return _complete(trainer, prepared, folder, resume=True)


def run_one(config: Config, folder: Path, device_count: int | None = None, estimate: bool = False) -> dict[str, Any]:
    """Bring one run to its end: start it, go on with it where its files are now, or leave it when it is complete."""
    configuration.check_same_run(config, folder)
    if not (folder / "config.json").exists():
        return train(config, folder, device_count, estimate)
    if not (folder / "summary.json").exists():
        return resume(folder, device_count, Whereabouts.found_in(config))
    return files.read_json(folder / "summary.json")


def evaluate(folder: Path, device_count: int | None = None, whereabouts: Whereabouts = AS_STARTED) -> dict[str, float]:
    """Return the metrics of a run's newest checkpoint on all its sets."""
    trainer, prepared = restored(folder, device_count, whereabouts)
    return {"epoch": trainer.epoch} | measure(trainer, prepared, on_training_set=True)


def restored(
    folder: Path, device_count: int | None = None, whereabouts: Whereabouts = AS_STARTED
) -> tuple[Trainer, Prepared]:
    """Return a run's trainer as it stands in the newest checkpoint, and its data."""
    config, prepared = prepared_again(folder, whereabouts)
    trainer = Trainer(config, prepared.dataset, devices.mesh(device_count))
    with Checkpoints(folder / "checkpoints", config) as checkpoints:
        newest = checkpoints.restore(trainer.state)
    if newest is None:
        raise UserError(f"{folder} has no checkpoint yet; train it first.")
    trainer.state = newest[0]
    return trainer, prepared


def prepared_again(folder: Path, whereabouts: Whereabouts = AS_STARTED) -> tuple[Config, Prepared]:
    """Return a run's configuration, and its data as it is now.

    Raises:
      UserError: The folder holds no run, or the data is no longer the samples that it was trained on.
    """
    _check_name(folder)
    config = whereabouts.of(configuration.read(folder / "config.json"))
    prepared = prepare(config)
    kept = folder / "data.json"
    # Runs of earlier versions kept no record of their samples.
    if kept.exists():
        try:
            stored = files.read_json(kept)
        except ValueError as error:
            raise UserError(f"{kept} is not valid JSON ({error}): restore it.") from error
        identity.check_same_samples(stored, prepared.samples, cache=folder / HASHES)
    return prepared.config, prepared


def _check_name(folder: Path) -> None:
    path = str(folder.resolve())
    if re.search(files.UNFIT_FOR_CHECKPOINTS, path):
        raise UserError(
            f"checkpoints cannot be kept in the folder {printable(path)}, whose name is not UTF-8 or has a backslash: "
            "choose another, or rename it."
        )


def _kept_from_others(folder: Path) -> Any:
    # Of several processes of one run the first one speaks for all.
    if launch.is_first() and folder.is_dir():
        return files.locked(folder)
    return contextlib.nullcontext()


def _complete(trainer: Trainer, prepared: Prepared, folder: Path, resume: bool) -> dict[str, Any]:
    launch.say_what_to_do_if_one_is_lost(folder)
    history = train_to_the_end(trainer, prepared, folder, resume)
    summary = metrics.summary(history) | {
        "method": trainer.config.optimizer.method,
        "seed": trainer.config.seed,
        "seconds": sum(m["seconds"] for m in history),
        "actual_rate": None if prepared.audit is None else prepared.audit.actual_rate,
    }
    if launch.is_first():
        files.write_json(folder / "summary.json", summary)
        _optional(lambda: _plot(history, folder))
    launch.wait_for_others("written")
    return summary


def _plot(history: list[dict[str, Any]], folder: Path) -> None:
    from ..measures import plots

    panels = plots.FIGURES_5_TO_7 if "noisy_accuracy" in history[-1] else ("train_accuracy", "test_accuracy")
    known = tuple(panel for panel in panels if panel in history[-1])
    plots.curves({folder.name: [history]}, folder / "curves.png", known)


def _optional(write: Any) -> None:
    """Write a figure where matplotlib is installed: training does without it."""
    with left_out_if_not_installed("a figure"):
        write()
