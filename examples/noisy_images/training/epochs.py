"""The epochs of a run: train, measure, write down, checkpoint, until the last one or until it is asked to stop."""

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from .. import errors, files
from ..errors import UserError
from ..measures import metrics, sample_history, sharpness
from . import launch, logs, methods
from .checkpoints import Checkpoints
from .preparation import Prepared
from .step import running_metrics
from .trainer import Trainer


class Interrupted(errors.Interrupted):
    """Training was asked to stop and has saved where it stands."""

    def __init__(self, folder: Path, step: int):
        super().__init__(f"stopped after step {step}; go on with: {launch.resume_command(folder)}")


class Journal:
    """What a run writes and shows as it goes; of several processes the first one speaks and writes for all."""

    def __init__(self, folder: Path, trainer: Trainer, prepared: Prepared, resume: bool):
        config, self._folder = trainer.config, folder
        # Epochs that were measured after the checkpoint was written are measured again.
        self.history = _until(folder / "metrics.jsonl", trainer.epoch) if resume else []
        if [record["epoch"] for record in self.history] != list(range(1, trainer.epoch + 1)):
            raise UserError(
                f"{folder / 'metrics.jsonl'} holds {len(self.history)} of the {trainer.epoch} epochs that the "
                "checkpoint has seen: restore it, or start the run again."
            )
        self.samples: sample_history.Recorder | None = None
        self._writes = launch.is_first()
        self._board = self._progress = logs.Silent()
        if not self._writes:
            return
        files.write_json_lines(folder / "metrics.jsonl", self.history)
        if config.circumstances.analyse_batches:
            analysed = _until(folder / "analysis.jsonl", trainer.epoch) if resume else []
            files.write_json_lines(folder / "analysis.jsonl", analysed)
        if config.circumstances.sample_history:
            dataset = prepared.dataset
            self.samples = sample_history.Recorder(folder, dataset.train, dataset.num_classes, last_epoch=trainer.epoch)
        self._board = logs.TensorBoard(folder / "tensorboard", purge_step=trainer.step + 1 if resume else None)
        self._progress = logs.progress(folder.name, config.training.epochs, trainer.steps_per_epoch, trainer.step)

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)
        self._board.close()

    def step(self, step: int) -> None:
        """Show that the run stands after this step."""
        self._progress.step(step)

    def leaves(self, epoch: int, leaves: Mapping[str, Any]) -> None:
        """Write what the analysis of the gradients found parameter by parameter."""
        if self._writes:
            files.append_json_line(self._folder / "analysis.jsonl", {"epoch": epoch, "leaves": leaves})

    def epoch(self, record: dict[str, Any]) -> None:
        """Keep, write and show the metrics of an epoch."""
        self.history.append(record)
        if self._writes:
            files.append_json_line(self._folder / "metrics.jsonl", record)
        self._board.write(record)
        self._progress.epoch(record)


def _until(path: Path, epoch: int) -> list[dict[str, Any]]:
    return [record for record in files.read_json_lines(path) if record["epoch"] <= epoch]


def train_to_the_end(trainer: Trainer, prepared: Prepared, folder: Path, resume: bool) -> list[dict[str, Any]]:
    """Train what is left of a run, and return the metrics of all its epochs.

    Raises:
      Interrupted: It was asked to stop, and has saved where it stands.
      UserError: A loss is not finite.
    """
    config = trainer.config
    # An error of one of several processes ends it before the checkpoints are closed, which waits for the others.
    with Checkpoints(folder / "checkpoints", config) as checkpoints, launch.ending_at_once():
        if resume and (newest := checkpoints.restore(trainer.state)):
            trainer.state = newest[0]
        with Journal(folder, trainer, prepared, resume) as journal, stop_requests() as stop_requested:
            while trainer.epoch < config.training.epochs:
                started, first_step = time.monotonic(), trainer.step
                _train_epoch(trainer, journal, stop_requested)
                _check_finite(trainer, checkpoints)
                if trainer.step % trainer.steps_per_epoch:
                    break
                trained = time.monotonic() - started
                record = _measured(trainer, prepared, journal) | {
                    "steps_per_second": (trainer.step - first_step) / trained,
                    "seconds": time.monotonic() - started,
                }
                if not np.isfinite(record.get("test_loss", 0.0)):
                    raise _non_finite("test loss", trainer, checkpoints, trainer.step - 1, record["running_loss"])
                journal.epoch(record)
                stop = stop_requested()
                if stop or _is_due(trainer, config.circumstances.checkpoint_every):
                    _save(trainer, checkpoints, journal)
                if stop:
                    break
            if trainer.epoch < config.training.epochs:
                _save(trainer, checkpoints, journal)
                raise Interrupted(folder, trainer.step)
        return journal.history


def _train_epoch(trainer: Trainer, journal: Journal, stop_requested: Any) -> None:
    waits = max(8 // trainer.steps_per_call, 2)
    for calls, step in enumerate(trainer.train_epoch(stop_requested)):
        # Now and then wait for the device, so that the display, and a request to stop, keep up with it; one call
        # behind, so that it has something to do meanwhile.
        if calls % waits == waits - 2:
            reached = jnp.copy(trainer.state.step)  # the state itself is handed on to the next call
        if calls % waits == waits - 1:
            jax.block_until_ready(reached)
        journal.step(step)


def _measured(trainer: Trainer, prepared: Prepared, journal: Journal) -> dict[str, Any]:
    """Measure a completed epoch."""
    config, epoch, last_step = trainer.config, trainer.epoch, trainer.step - 1
    schedules = methods.hyperparameters(config, trainer.steps_per_epoch, prepared.dataset.num_classes)
    analysed: dict[str, Any] = {}
    if config.circumstances.analyse_batches:
        analysed, leaves = trainer.analyse_gradients()
        journal.leaves(epoch, leaves)
    due = _is_due(trainer, config.circumstances.evaluate_every)
    curvature: dict[str, float] = {}
    if due and (samples := config.circumstances.sharpness_samples):
        curvature["sharpness"] = sharpness.of_trainer(trainer, samples=samples)["eigenvalue"]
    return {
        "epoch": epoch,
        "step": trainer.step,
        "learning_rate": _value(methods.learning_rate(config, trainer.steps_per_epoch), last_step),
        "rho": _value(schedules.rho, last_step),
        "alpha": _value(schedules.alpha, last_step),
        **running_metrics(trainer.state),
        **analysed,
        **curvature,
        **measure(trainer, prepared, on_training_set=due, recorder=journal.samples),
    }


def _is_due(trainer: Trainer, every: int) -> bool:
    return trainer.epoch % every == 0 or trainer.epoch == trainer.config.training.epochs


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
    values = {}
    # One's own data may be trained on whole.
    if len(dataset.test):
        measured = trainer.evaluate(dataset.test)
        values["test_accuracy"] = float((measured.predictions == dataset.test.labels).mean())
        values["test_loss"] = float(measured.losses.mean())
    if prepared.heldout is not None:
        predictions = trainer.evaluate(prepared.heldout).predictions
        values["heldout_accuracy"] = float((predictions == prepared.heldout.labels).mean())
    if on_training_set:
        losses, predictions, margins = trainer.evaluate(dataset.train)
        if recorder is not None:
            recorder.add(trainer.epoch, losses, predictions, margins)
        values |= metrics.on_training_set(predictions, losses, dataset.train.labels, dataset.train.clean_labels)
        if len(dataset.test):
            values["generalization_gap"] = values["train_accuracy"] - values["test_accuracy"]
    return values


def _save(trainer: Trainer, checkpoints: Checkpoints, journal: Journal) -> None:
    # The samples first: a kill in between leaves epochs that are measured again, and never a checkpoint that lacks any.
    if journal.samples is not None:
        journal.samples.write()
    summary = metrics.summary(journal.history) if journal.history else {"epochs": 0}
    progress = {"epoch": summary["epochs"]}
    if "best_epoch" in summary:
        progress["best_epoch"] = summary["best_epoch"]
    checkpoints.save(trainer.state, progress)


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
def stop_requests() -> Iterator[Any]:
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
