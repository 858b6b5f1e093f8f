"""What a run says while it trains: a live line on a terminal, plain lines elsewhere, TensorBoard scalars."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

COLUMNS = {
    "running_loss": "loss",
    "test_loss": "test loss",
    "test_accuracy": "test",
    "noisy_accuracy": "noisy",
    "clean_accuracy": "clean",
}


class Progress(Protocol):
    """A display of one run's progress, used as a context manager."""

    def step(self, step: int) -> None:
        """Show that the run stands after this step."""

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of a completed epoch."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


def progress(label: str, epochs: int, steps_per_epoch: int, start_step: int) -> Progress:
    """Return a live display on a terminal, and plain lines where there is none."""
    if sys.stdout.isatty():
        try:
            return _Live(label, epochs, steps_per_epoch, start_step)
        except ImportError:
            pass
    return _Lines(label, epochs)


class Silent:
    """What shows and writes nothing, for processes that others speak for."""

    def step(self, step: int) -> None:
        pass

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        pass

    def write(self, metrics: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass


class _Lines:
    """One line an epoch."""

    def __init__(self, label: str, epochs: int):
        self._label, self._epochs = label, epochs

    def step(self, step: int) -> None:
        pass

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        line = f"{self._label}: epoch {metrics['epoch']}/{self._epochs}  {describe(metrics)}"
        if "steps_per_second" in metrics:
            line += f"  {step_rate(metrics['steps_per_second'])}"
        print(line, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass


class _Live:
    """A progress bar with epoch, step rate and time left; below it losses and accuracies."""

    def __init__(self, label: str, epochs: int, steps_per_epoch: int, start_step: int):
        from rich import console, live, text
        from rich import progress as bars

        self._label, self._steps_per_epoch, self._epochs = label, steps_per_epoch, epochs
        self._start_step, self._started = start_step, time.monotonic()
        self._bars = bars.Progress(
            bars.TextColumn("epoch {task.fields[epoch]}"),
            bars.BarColumn(bar_width=24),
            bars.TextColumn("{task.fields[rate]}"),
            bars.TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._task = self._bars.add_task(
            label, total=epochs * steps_per_epoch, completed=start_step, epoch=self._epoch(start_step), rate=""
        )
        # A line of its own, which a narrow terminal wraps where it would cut off columns.
        self._metrics = text.Text(label)
        self._live = live.Live(console.Group(self._bars, self._metrics))

    def step(self, step: int) -> None:
        rate = (step - self._start_step) / max(time.monotonic() - self._started, 1e-9)
        self._bars.update(self._task, completed=step, epoch=self._epoch(step), rate=step_rate(rate))

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        self._metrics.plain = f"{self._label}: {describe(metrics)}"

    def _epoch(self, step: int) -> str:
        return f"{min(step // self._steps_per_epoch + 1, self._epochs)}/{self._epochs}"

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()


def step_rate(rate: float) -> str:
    """Return a number of steps a second with three digits or all before the point."""
    return f"{rate:.0f} steps/s" if rate >= 100 else f"{rate:.3g} steps/s"


def describe(metrics: Mapping[str, Any]) -> str:
    """Return the loss and the accuracies of an epoch in a few words."""
    parts = []
    for name, word in COLUMNS.items():
        if name in metrics:
            value = metrics[name]
            parts.append(f"{word} {value:.3f}" if name.endswith("loss") else f"{word} {100 * value:.1f} %")
    return "  ".join(parts)


class TensorBoard:
    """TensorBoard scalars of one run; does nothing where tensorboardX is not installed.

    The event file is made by the first epoch written: tensorboardX imports PyTorch where that is installed, seconds for
    which the first step should not wait.
    """

    def __init__(self, folder: Path, purge_step: int | None):
        self._folder, self._purge_step = folder, purge_step
        self._writer: Any = None

    def _create(self) -> Any:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            return None
        # The writer names its file by the second: a run that goes on at once must not write over its own start.
        suffix = f".{self._purge_step or 0}"
        return SummaryWriter(str(self._folder), purge_step=self._purge_step, filename_suffix=suffix)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Write the scalars of an epoch at its step."""
        if self._writer is None:
            self._writer = self._create()
        if self._writer is not None:
            for name, value in metrics.items():
                if isinstance(value, float):
                    self._writer.add_scalar(name, value, metrics["step"])
            self._writer.flush()

    def close(self) -> None:
        """Close the event file, if there is one."""
        if self._writer is not None:
            self._writer.close()
