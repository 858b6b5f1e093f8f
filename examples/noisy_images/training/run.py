"""One run: data and noise, training, evaluation, checkpoints and logs, in one folder.

config.json       the resolved configuration
environment.json  command, versions, devices, commit, and those of every start from a checkpoint
noise.json, .png  the audit of the label noise
metrics.jsonl     one line an epoch
analysis.jsonl    with --analyse-batches, one line an epoch: the gradient's shares and alignment by parameter
curves.png        the same as a figure
tensorboard/      the same as scalars
checkpoints/      the newest two
samples/          loss and predicted label of every training sample over the epochs
summary.json      the numbers that are reported
sharpness.json    written by the command `sharpness`
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import config as configuration
from .. import data, errors, files, models
from ..config import Config
from ..errors import UserError, unknown_name
from ..labels import human_labels, noise
from ..measures import metrics, sample_history
from . import devices, launch, logs, methods
from .checkpoints import Checkpoints
from .trainer import Trainer, running_metrics

VERSIONED = ("saner_jax", "jax", "jaxlib", "optax", "flax", "orbax-checkpoint", "numpy")


class Interrupted(errors.Interrupted):
    """Training was asked to stop and has saved where it stands."""

    def __init__(self, folder: Path, step: int):
        super().__init__(f"stopped after step {step}; go on with: {launch.resume_command(folder)}")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A data set with its noisy labels."""

    dataset: data.Dataset
    heldout: data.Split | None
    audit: noise.Audit | None
    left_out: data.Split | None = None
    """Fold that is not trained on, with its noisy labels."""


def prepare(config: Config) -> Prepared:
    """Load the data, cut subsets, draw the noise, hold out a noisy split; clean labels stay beside the noisy ones."""
    configuration.check(config)
    if config.method not in methods.METHODS:
        raise unknown_name("method", config.method, methods.METHODS)
    if config.model not in models.MODELS:
        raise unknown_name("model", config.model, models.MODELS)
    dataset = data.load(
        config.dataset,
        data_dir=config.data_dir,
        skip_corrupt=config.skip_corrupt,
        seed=config.data_seed,
        image_size=config.image_size,
        validation_dir=config.validation_dir,
        crop_padding=config.crop_padding,
        flip=config.flip,
    )
    train, test = dataset.train, dataset.test
    if config.test_subset is not None:
        test = data.stratified_subset(test, config.test_subset, dataset.num_classes, config.data_seed)
    if config.subset is not None:
        train = data.stratified_subset(train, config.subset, dataset.num_classes, config.data_seed)
    train = add_noise(config, dataset, train)
    audit = None
    if train.clean_labels is not None:
        nominal = config.rate if config.noise not in ("none", "real") else None
        audit = noise.audit(train.labels, train.clean_labels, dataset.class_names, nominal, config.noise)

    heldout = None
    if config.holdout:
        size = round(config.holdout * len(train))
        order = np.random.default_rng([config.data_seed, size]).permutation(len(train))
        if not 0 < size < len(train):
            raise UserError(
                f"--holdout {config.holdout} leaves {len(train) - size} images to train on; choose another."
            )
        heldout, train = train.take(np.sort(order[:size])), train.take(np.sort(order[size:]))
    left_out = None
    if config.folds is not None:
        train, left_out = data.leave_out_fold(train, config.folds, config.fold, config.data_seed)
    return Prepared(dataclasses.replace(dataset, train=train, test=test), heldout, audit, left_out)


def add_noise(config: Config, dataset: data.Dataset, train: data.Split) -> data.Split:
    """Return the split with noisy given labels."""
    if config.noise == "none":
        return train
    if train.clean_labels is None:
        raise UserError(
            f"{config.noise} noise needs true labels to change, and those of {config.dataset!r} are unknown: use "
            "--noise none to train on the labels as they are."
        )
    given_by_humans = None
    if config.noise == "real":
        if config.human_labels is None:
            raise UserError("real noise needs --human-labels, the published file of CIFAR-10N or CIFAR-100N labels.")
        label_set = config.label_set or human_labels.DEFAULT_LABEL_SETS.get(config.dataset)
        given_by_humans = human_labels.human_labels(config.human_labels, label_set, train)
    labels = noise.corrupt(
        train.clean_labels,
        kind=config.noise,
        rate=config.rate,
        num_classes=dataset.num_classes,
        seed=config.noise_seed_used,
        images=None if train.streamed else train.images,
        mean=dataset.mean,
        std=dataset.std,
        class_names=dataset.class_names,
        superclasses=dataset.superclasses,
        human_labels=given_by_humans,
        options=config.noise_options,
    )
    return dataclasses.replace(train, labels=labels)


def train(config: Config, folder: Path, device_count: int | None = None) -> dict[str, Any]:
    """Train one run from its start to its end, on all devices or on some; returns the summary.

    Raises:
      UserError: The configuration or the data is wrong, or the folder already holds a run.
      Interrupted: The run was asked to stop.
    """
    configuration.check_same_run(config, folder)
    if (folder / "config.json").exists():
        raise UserError(f"{folder} already holds a run: go on with `resume {folder}`, or choose another --name.")
    if (folder / "checkpoints").exists():
        raise UserError(f"{folder} holds checkpoints but no config.json: restore it, or choose another --name.")
    # Everything that can be wrong is found before the folder is made.
    prepared = prepare(config)
    trainer = Trainer(config, prepared.dataset, devices.mesh(device_count))
    # No process makes what another one has not looked for yet.
    launch.wait_for_others("checked")
    if launch.is_first():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {folder} ({error.strerror}): choose another --out.") from error
        files.write_json(folder / "environment.json", environment(trainer.mesh))
        if prepared.audit is not None:
            print(f"{folder.name}: {prepared.audit.summary()}", flush=True)
            _optional(lambda: prepared.audit.save(folder))
        files.write_json(folder / "config.json", configuration.to_json(config))
    return _fit(trainer, prepared, folder, resume=False)


def resume(folder: Path, device_count: int | None = None) -> dict[str, Any]:
    """Go on with a run from its newest checkpoint, on as many devices as there are now; returns the summary."""
    config = configuration.read(folder / "config.json")
    prepared = prepare(config)
    trainer = Trainer(config, prepared.dataset, devices.mesh(device_count))
    if launch.is_first():
        path = folder / "environment.json"
        of_start = json.loads(path.read_text()) if path.exists() else {}
        resumed = [*of_start.get("resumed", []), environment(trainer.mesh)]
        files.write_json(path, of_start | {"resumed": resumed})
    return _fit(trainer, prepared, folder, resume=True)


def run_one(config: Config, folder: Path, device_count: int | None = None) -> None:
    """Bring one run to its end: start it, go on with it, or leave it as it is when it is complete."""
    if not (folder / "config.json").exists():
        train(config, folder, device_count)
    elif not (folder / "summary.json").exists():
        resume(folder, device_count)


def evaluate(folder: Path, device_count: int | None = None) -> dict[str, float]:
    """Return the metrics of a run's newest checkpoint on all its sets."""
    trainer, prepared = restored(folder, device_count)
    return {"epoch": trainer.epoch} | measure(trainer, prepared, on_training_set=True)


def restored(folder: Path, device_count: int | None = None) -> tuple[Trainer, Prepared]:
    """Return a run's trainer as it stands in the newest checkpoint, and its data."""
    config = configuration.read(folder / "config.json")
    prepared = prepare(config)
    trainer = Trainer(config, prepared.dataset, devices.mesh(device_count))
    checkpoints = Checkpoints(folder / "checkpoints", config)
    newest = checkpoints.restore(trainer.state)
    if newest is None:
        raise UserError(f"{folder} has no checkpoint yet; train it first.")
    trainer.state = newest[0]
    checkpoints.close()
    return trainer, prepared


def measure(
    trainer: Trainer,
    prepared: Prepared,
    on_training_set: bool,
    recorder: sample_history.Recorder | None = None,
) -> dict[str, float]:
    """Evaluate on the test set, on the held-out split where there is one, and on the training set if asked.

    What the training set's metrics are computed from is kept by the recorder, sample by sample.
    """
    dataset = prepared.dataset
    losses, predictions = trainer.evaluate(dataset.test)
    values = {
        "test_accuracy": float((predictions == dataset.test.labels).mean()),
        "test_loss": float(losses.mean()),
    }
    if prepared.heldout is not None:
        _, predictions = trainer.evaluate(prepared.heldout)
        values["heldout_accuracy"] = float((predictions == prepared.heldout.labels).mean())
    if on_training_set:
        losses, predictions = trainer.evaluate(dataset.train)
        if recorder is not None:
            recorder.add(trainer.epoch, losses, predictions)
        values |= metrics.on_training_set(predictions, losses, dataset.train.labels, dataset.train.clean_labels)
        values["generalization_gap"] = values["train_accuracy"] - values["test_accuracy"]
    return values


def _fit(trainer: Trainer, prepared: Prepared, folder: Path, resume: bool) -> dict[str, Any]:
    with launch.last_words(folder), launch.ending_at_once():
        return _epochs(trainer, prepared, folder, resume)


def _epochs(trainer: Trainer, prepared: Prepared, folder: Path, resume: bool) -> dict[str, Any]:
    first = launch.is_first()
    config, steps = trainer.config, trainer.steps_per_epoch
    checkpoints = Checkpoints(folder / "checkpoints", config)
    if resume and (newest := checkpoints.restore(trainer.state)):
        trainer.state = newest[0]
    # Epochs that were measured after the checkpoint was written are measured again.
    history = [m for m in files.read_json_lines(folder / "metrics.jsonl") if resume and m["epoch"] <= trainer.epoch]
    recorder = None
    if config.sample_history and first:
        dataset = prepared.dataset
        recorder = sample_history.Recorder(folder, dataset.train, dataset.num_classes, last_epoch=trainer.epoch)
    board = progress = logs.Silent()
    if first:
        files.write_json_lines(folder / "metrics.jsonl", history)
        if config.analyse_batches:
            analysed = files.read_json_lines(folder / "analysis.jsonl")
            kept = [a for a in analysed if resume and a["epoch"] <= trainer.epoch]
            files.write_json_lines(folder / "analysis.jsonl", kept)
        board = logs.TensorBoard(folder / "tensorboard", purge_step=trainer.step + 1 if resume else None)
        progress = logs.progress(folder.name, config.epochs, steps, trainer.step)
    schedules = methods.hyperparameters(config, steps, prepared.dataset.num_classes)
    rate = methods.learning_rate(config, steps)

    try:
        with progress, _stop_requests() as stop_requested, launch.ending_at_once():
            while trainer.epoch < config.epochs:
                started, first_step = time.monotonic(), trainer.step
                for calls, step in enumerate(trainer.train_epoch(stop_requested)):
                    # Now and then wait for the device, so that the display, and a request to stop, keep up with it;
                    # one step behind, so that it has something to do meanwhile.
                    if calls % 8 == 6:
                        reached = jnp.copy(trainer.state.step)  # the state itself is handed on to the next step
                    if calls % 8 == 7:
                        jax.block_until_ready(reached)
                    progress.step(step)
                _check_finite(trainer, checkpoints)
                if trainer.step % steps:
                    break
                trained = time.monotonic() - started
                epoch = trainer.epoch
                analysed = {}
                if config.analyse_batches:
                    analysed, leaves = trainer.analyse_gradients()
                    if first:
                        files.append_json_line(folder / "analysis.jsonl", {"epoch": epoch, "leaves": leaves})
                due = epoch % config.evaluate_every == 0 or epoch == config.epochs
                record = {
                    "epoch": epoch,
                    "step": trainer.step,
                    "learning_rate": _value(rate, trainer.step - 1),
                    "rho": _value(schedules.rho, trainer.step - 1),
                    "alpha": _value(schedules.alpha, trainer.step - 1),
                    **running_metrics(trainer.state),
                    **analysed,
                    **measure(trainer, prepared, on_training_set=due, recorder=recorder),
                    "steps_per_second": (trainer.step - first_step) / trained,
                    "seconds": time.monotonic() - started,
                }
                if not np.isfinite(record["test_loss"]):
                    raise _non_finite("test loss", trainer, checkpoints, trainer.step - 1, record["running_loss"])
                history.append(record)
                if first:
                    files.append_json_line(folder / "metrics.jsonl", record)
                board.write(record)
                progress.epoch(record)
                if epoch % config.checkpoint_every == 0 or epoch == config.epochs or stop_requested():
                    _save(trainer, checkpoints, recorder, history)
                if stop_requested():
                    break
            if trainer.epoch < config.epochs:
                _save(trainer, checkpoints, recorder, history)
                raise Interrupted(folder, trainer.step)
    finally:
        checkpoints.close()
        board.close()
    summary = metrics.summary(history) | {
        "method": config.method,
        "seed": config.seed,
        "seconds": sum(m["seconds"] for m in history),
        "actual_rate": None if prepared.audit is None else prepared.audit.actual_rate,
    }
    if first:
        files.write_json(folder / "summary.json", summary)
        _optional(lambda: _plot(history, folder))
    launch.wait_for_others("written")
    return summary


def _save(
    trainer: Trainer,
    checkpoints: Checkpoints,
    recorder: sample_history.Recorder | None,
    history: list[dict[str, Any]],
) -> None:
    # The samples first: a kill in between leaves epochs that are measured again, and never a checkpoint that lacks any.
    if recorder is not None:
        recorder.write()
    checkpoints.save(trainer.state, _progress_so_far(history))


def _progress_so_far(history: list[dict[str, Any]]) -> dict[str, Any]:
    if not history:
        return {"epoch": 0}
    return {"epoch": history[-1]["epoch"], "best_epoch": metrics.summary(history)["best_epoch"]}


def _check_finite(trainer: Trainer, checkpoints: Checkpoints) -> None:
    first = int(trainer.state.first_non_finite)
    if first >= 0:
        raise _non_finite("loss", trainer, checkpoints, first, float(trainer.state.last_finite_loss))


def _non_finite(what: str, trainer: Trainer, checkpoints: Checkpoints, step: int, last_finite: float) -> UserError:
    kept = checkpoints.latest_step
    return UserError(
        f"the {what} became non-finite at step {step} (epoch {step // trainer.steps_per_epoch + 1}; last finite loss "
        f"{last_finite:.4g}): try a smaller --learning-rate or --rho, or --precision float32; "
        + ("there is no checkpoint yet." if kept is None else f"the checkpoint of step {kept} is kept.")
    )


def _value(schedule: Any, step: int) -> float:
    return float(schedule(step) if callable(schedule) else schedule)


@contextmanager
def _stop_requests() -> Iterator[Any]:
    """Turn the first Ctrl-C (or SIGTERM) into a request that is met between two steps; the second one interrupts.

    Of several processes any can be asked, and all stop after the same step.
    """
    alone = jax.process_count() == 1
    requested = []

    def request(signum: int, frame: Any) -> None:
        if requested:
            raise KeyboardInterrupt
        requested.append(signum)
        if not alone:
            # JAX's own handler of this signal passes it on.
            os.kill(os.getpid(), signal.SIGTERM)

    previous = {}
    try:
        for signum in (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,):
            previous[signum] = signal.signal(signum, request)
    except ValueError:
        # Not in the main thread: signals are the caller's business.
        pass
    try:
        yield (lambda: bool(requested)) if alone else launch.agreed_stop()
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def command() -> str:
    """Return the command line that this process was started with."""
    return shlex.join(["python", "-m", "examples.noisy_images", *sys.argv[1:]])


def environment(mesh: jax.sharding.Mesh | None = None) -> dict[str, Any]:
    """Return what a result has to be read beside: command, versions, devices and processes that it used, commit."""
    versions = {"python": platform.python_version()}
    for package in VERSIONED:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    device = jax.devices()[0]
    count = jax.device_count() if mesh is None else mesh.size
    return {
        "command": command(),
        "versions": versions,
        "platform": device.platform,
        "device": device.device_kind if device.platform != "cpu" else _processor(),
        "devices": count,
        "processes": jax.process_count(),
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = names[0].split(":", 1)[1].strip()
    except (OSError, IndexError):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _commit() -> str | None:
    """Return the commit of this checkout, marked where files differ from it; None outside of one."""
    here = Path(__file__).parent
    try:
        git = ["git", "-C", str(here)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + (" with local changes" if changed.stdout.strip() else "")


def _plot(history: list[dict[str, Any]], folder: Path) -> None:
    from ..measures import plots

    panels = plots.FIGURES_5_TO_7 if "noisy_accuracy" in history[-1] else ("train_accuracy", "test_accuracy")
    plots.curves({folder.name: [history]}, folder / "curves.png", panels)


def _optional(write: Any) -> None:
    """Write a figure where matplotlib is installed: training does without it."""
    try:
        write()
    except ModuleNotFoundError as error:
        package = (error.name or "a package").partition(".")[0]
        print(f"note: {package} is not installed, so a figure was left out.", file=sys.stderr)
