"""Several processes on this machine, over its loopback: they train one run, end together, and go on in any number."""

import json
import os
import signal
import socket
import time

import numpy as np
import pytest
from PIL import Image

from examples.noisy_images import cli, files
from examples.noisy_images.errors import UserError
from examples.noisy_images.training import launch

HEARTBEAT = 60
PROTOCOL = [
    *("train", "--noise", "none", "--model", "mlp", "--width", "0.0625", "--method", "sam", "--batch-size", "8"),
    *("--learning-rate", "0.02", "--evaluate-every", "4"),
]


@pytest.fixture
def start_together(start):
    """Start the program as several processes: `start_together(2, "train", ...)`."""

    def start_all(count, *arguments, devices=1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{free.getsockname()[1]}"
        together = ("--coordinator", coordinator, "--num-processes", count, "--heartbeat-seconds", HEARTBEAT)
        return [start(*arguments, *together, "--process-id", i, devices=devices) for i in range(count)]

    return start_all


def assert_the_same(folder, reference):
    records, expected = (files.read_json_lines(f / "metrics.jsonl") for f in (folder, reference))
    assert [r["epoch"] for r in records] == [r["epoch"] for r in expected]
    for record, its in zip(records, expected, strict=True):
        times = ("seconds", "steps_per_second")
        assert {k: v for k, v in record.items() if k not in times} == pytest.approx(
            {k: v for k, v in its.items() if k not in times}, rel=1e-4
        )


@pytest.mark.slow
def test_four_processes_train_the_run_of_one(start, start_together, npz, tmp_path):
    options = [*PROTOCOL, "--dataset", "npz", "--data-dir", npz(train=32, test=10), "--epochs", 2, "--out", tmp_path]
    together = start_together(4, *options, "--name", "together")
    alone = start(*options, "--name", "alone")
    for process in (*together, alone):
        assert process.wait() == 0, process.stderr
    assert_the_same(tmp_path / "together", tmp_path / "alone")
    # The first one speaks and writes for all.
    assert ["written:" in process.stdout for process in together] == [True, False, False, False]
    written = {path.name for path in (tmp_path / "together").iterdir()}
    assert written == {path.name for path in (tmp_path / "alone").iterdir()}


@pytest.fixture
def photographs(tmp_path):
    """A folder of images that are streamed."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 5)):
        for number, label in enumerate(("cat", "dog")):
            folder = tmp_path / "photographs" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                image = rng.integers(100 * number, 100 * number + 120, (14, 14 + i, 3), dtype=np.uint8)
                Image.fromarray(image).save(folder / f"{i}.png")
    return tmp_path / "photographs"


@pytest.mark.slow
def test_processes_stop_together_and_end_when_one_is_lost(start, start_together, photographs, until, tmp_path):
    options = [*PROTOCOL, "--dataset", "folder", "--data-dir", photographs, "--image-size", 12, "--workers", 0]
    options += ["--epochs", 8, "--out", tmp_path]
    alone = start(*options, "--name", "alone")
    assert alone.wait() == 0, alone.stderr
    folder = tmp_path / "together"

    def epochs():
        return len(files.read_json_lines(folder / "metrics.jsonl"))

    # Ctrl-C in the second process.
    processes = start_together(2, *options, "--name", "together", devices=2)
    until(lambda: epochs() >= 1, seconds=600)
    os.kill(processes[1].pid, signal.SIGINT)
    assert [process.wait() for process in processes] == [130, 130], processes[0].stderr
    said = {process.stderr.strip().splitlines()[-1] for process in processes}
    assert len(said) == 1 and said.pop().startswith("stopped after step "), said

    # The second process is killed.
    done = epochs()
    processes = start_together(2, "resume", folder, devices=2)
    until(lambda: epochs() > done, seconds=600)
    os.kill(processes[1].pid, signal.SIGKILL)
    killed = time.monotonic()
    assert processes[0].wait() not in (0, 130), "it was over before it could be killed"
    assert time.monotonic() - killed < HEARTBEAT + 30
    go_on = f"start all processes again with: python -m examples.noisy_images resume {folder}"
    # Said by a shell that outlives the process, where JAX ended it.
    assert until(lambda: go_on in processes[0].stderr)
    assert not (folder / "summary.json").exists()

    # One process goes on, on half as many devices.
    process = start("resume", folder, devices=2)
    assert process.wait() == 0, process.stderr
    assert_the_same(folder, tmp_path / "alone")
    environment = json.loads((folder / "environment.json").read_text())
    used = [(e["processes"], e["devices"]) for e in (environment, *environment["resumed"])]
    assert used == [(2, 4), (2, 4), (1, 2)]


@pytest.mark.parametrize("numbers", [{"num_processes": 2, "process_id": 0}, {"process_id": 1}])
def test_processes_without_a_place_to_meet(numbers):
    with pytest.raises(UserError, match=r"--num-processes and --process-id need --coordinator host:port"):
        launch.join(launch.Launch(**numbers))


def test_processes_that_are_not_found(monkeypatch, capsys):
    with pytest.raises(UserError, match=r"cannot join the other processes .*: give --coordinator host:port"):
        launch.join(launch.Launch(distributed=True))
    with pytest.raises(SystemExit) as exit:
        cli.main(["resume", "run", "--coordinator", "127.0.0.1:1", "--num-processes", "2"])
    assert exit.value.code == 2 and "cannot join the other processes" in capsys.readouterr().err
