"""A run that is killed or interrupted, in processes of its own, ends as one that was never stopped, bit for bit."""

import contextlib
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from examples.noisy_images import config as configuration
from examples.noisy_images import files
from examples.noisy_images.measures import sample_history
from examples.noisy_images.training import run
from examples.noisy_images.training.checkpoints import Checkpoints
from examples.noisy_images.training.trainer import Trainer

ROOT = Path(__file__).parents[3]
# Averages of the method, momentum, dropout, a held-out split; some 300 steps an epoch, so that a kill falls into the
# middle of one.
OPTIONS = [
    *("train", "--dataset", "digits", "--model", "mlp", "--width", "0.03125", "--dropout", "0.2", "--batch-size", "4"),
    *(
        "--method",
        "vasso+saner",
        "--holdout",
        "0.1",
        "--learning-rate",
        "0.02",
        "--epochs",
        "6",
        "--name",
        "run",
        "--out",
    ),
]


def end_of(folder):
    config = configuration.read(folder / "config.json")
    trainer = Trainer(config, run.prepare(config).dataset)
    checkpoints = Checkpoints(folder / "checkpoints", config)
    state, extra = checkpoints.restore(trainer.state)
    checkpoints.close()
    times = ("seconds", "steps_per_second")
    metrics = files.read_json_lines(folder / "metrics.jsonl")
    return state, extra, [{k: v for k, v in record.items() if k not in times} for record in metrics]


def assert_the_same_end(folder, reference):
    state, extra, metrics = end_of(folder)
    expected_state, expected_extra, expected_metrics = end_of(reference)
    jax.tree.map(np.testing.assert_array_equal, state, expected_state)
    assert metrics == expected_metrics and [m["epoch"] for m in metrics] == [1, 2, 3, 4, 5, 6]
    assert extra == expected_extra
    assert (folder / "summary.json").exists()
    samples, expected_samples = sample_history.read(folder), sample_history.read(reference)
    for name in ("epochs", "losses", "predictions", "labels", "index"):
        np.testing.assert_array_equal(getattr(samples, name), getattr(expected_samples, name))


@pytest.fixture
def reference(start, tmp_path_factory):
    """A run that nothing stopped."""
    out = tmp_path_factory.mktemp("reference")
    process = start(*OPTIONS, out)
    assert process.wait() == 0, process.stderr
    return out / "run"


def epochs_measured(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def unfinished(folder):
    """Checkpoints whose writing has begun and not ended."""
    with contextlib.suppress(FileNotFoundError):
        return [path for path in (folder / "checkpoints").iterdir() if not path.name.isdigit()]
    return []


@pytest.mark.slow
def test_killed_at_any_moment_and_interrupted(start, reference, tmp_path, until, program_environment):
    folder = tmp_path / "killed" / "run"
    chance = random.Random(0)
    kills = []
    # In the middle of the first epoch, of later ones, and of the writing of a checkpoint.
    for moment in ("epoch", "epoch", "write"):
        process = start("resume", folder) if kills else start(*OPTIONS, folder.parent)
        if moment == "write":
            until(lambda: unfinished(folder))
        else:
            # The first time before there is any checkpoint.
            more = epochs_measured(folder) + 1 if kills else 0
            until(lambda more=more: (folder / "config.json").exists() and epochs_measured(folder) >= more)
            time.sleep(0.1 * chance.random())
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was over before it could be killed"
        kills.append((moment, epochs_measured(folder), len(unfinished(folder))))
    assert not (folder / "summary.json").exists(), kills
    # At least once the writing really was cut off.
    assert any(left for moment, _, left in kills if moment == "write"), kills
    process = start("resume", folder)
    assert process.wait() == 0, process.stderr
    assert not unfinished(folder)
    assert_the_same_end(folder, reference)

    # Ctrl-C, in a process of `python -m`, in the middle of an epoch.
    folder = tmp_path / "interrupted" / "run"
    command = [sys.executable, "-m", "examples.noisy_images", *OPTIONS, str(folder.parent)]
    with subprocess.Popen(command, cwd=ROOT, env=program_environment, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: epochs_measured(folder) == 2)
        time.sleep(0.08)
        process.send_signal(signal.SIGINT)
        message = process.stderr.read()
    assert process.returncode == 130, message
    assert "Traceback" not in message and not (folder / "summary.json").exists()
    stopped, _, go_on = message.strip().splitlines()[-1].partition("; go on with: ")
    step = int(stopped.removeprefix("stopped after step "))
    assert 2 * 303 <= step < 6 * 303
    assert str(step) in {path.name for path in (folder / "checkpoints").iterdir()}
    # As it says itself.
    words = shlex.split(go_on)
    assert words[:3] == ["python", "-m", "examples.noisy_images"]
    process = start(*words[3:])
    assert process.wait() == 0, process.stderr
    assert_the_same_end(folder, reference)
