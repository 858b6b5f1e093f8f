"""Tiny data, and processes that start without importing everything again."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from examples.noisy_images import data
from examples.noisy_images.training import devices

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="session")
def one_device():
    """Run on one device, as on most machines, where a test does not ask for more of the eight."""
    with pytest.MonkeyPatch.context() as patch:
        mesh = devices.mesh
        patch.setattr(devices, "mesh", lambda count=None: mesh(1 if count is None else count))
        yield


def tiny_split(count, classes=3, shape=(6, 6, 1), wrong=0, seed=0, offset=0):
    """Images whose brightness tells their class, the first `wrong` of them with a wrong given label."""
    rng = np.random.default_rng(seed)
    clean = (np.arange(offset, offset + count) % classes).astype(np.int32)
    images = rng.integers(0, 80, (count, *shape)) + (clean * 170 // classes)[:, None, None, None]
    given = np.where(np.arange(count) < wrong, (clean + 1) % classes, clean).astype(np.int32)
    return data.Split(images.astype(np.uint8), given, clean, np.arange(count, dtype=np.int64))


@pytest.fixture
def tiny():
    """Make a data set in memory: `tiny(train=24, test=10, wrong=8, ...)`."""

    def make(train=24, test=10, wrong=8, classes=3, shape=(6, 6, 1), crop_padding=1, flip=True, seed=0):
        channels = shape[-1]
        return data.Dataset(
            "tiny",
            tiny_split(train, classes, shape, wrong, seed),
            tiny_split(test, classes, shape, 0, seed + 1, offset=1),
            tuple("abcdefgh"[:classes]),
            None,
            (0.4,) * channels,
            (0.25,) * channels,
            crop_padding,
            flip,
        )

    return make


@pytest.fixture(scope="session")
def npz(tmp_path_factory):
    """Write a data set of one's own: `npz(clean_labels=False, ...)` returns its path."""

    def write(train=24, test=10, wrong=8, clean_labels=True):
        own, held = tiny_split(train, wrong=wrong), tiny_split(test, seed=1)
        arrays = {"images": own.images, "labels": own.labels, "test_images": held.images, "test_labels": held.labels}
        if clean_labels:
            arrays["clean_labels"] = own.clean_labels
        path = tmp_path_factory.mktemp("data") / "own.npz"
        np.savez(path, **arrays)
        return path

    return write


@pytest.fixture
def eager():
    """Make a trainer take its steps operation by operation.

    The compiler then has nothing to reorder, and many methods on one small network are several times faster tested.
    """

    def make(trainer):
        functions = trainer._functions
        names = ("train_step", "train_steps", "train_batch", "evaluate")
        trainer._functions = functions._replace(**{name: getattr(functions, name).__wrapped__ for name in names})
        return trainer

    return make


# Every line is a request: start a command line in a process of its own, or wait for one to end.
_SERVER = """
import json, os, sys
import sklearn.datasets, matplotlib.figure, tensorboardX
from examples.noisy_images import cli
from examples.noisy_images.training import run

for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if child:
        print(child, flush=True)
        continue
    for stream, path in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOCTTY, 0o600), stream)
    os.environ.update(request["environment"])
    sys.argv[1:] = request["arguments"]
    sys.exit(cli.main())
"""


class Process:
    """One start of the program."""

    def __init__(self, server, folder, arguments, stdout=None, devices=1):
        self._server, self.folder, self._status = server, folder, None
        self._stdout, self._stderr = stdout or folder / "stdout", folder / "stderr"
        self.pid = self._ask(
            {
                "arguments": [*map(str, arguments)],
                "environment": {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
                "stdout": str(self._stdout),
                "stderr": str(self._stderr),
            }
        )

    def _ask(self, request):
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def wait(self):
        """Return its exit status, negative for a signal."""
        if self._status is None:
            self._status = self._ask({"wait": self.pid})
        return self._status

    @property
    def stdout(self):
        return self._stdout.read_text()

    @property
    def stderr(self):
        return self._stderr.read_text()


@pytest.fixture(scope="session")
def program_environment():
    """The environment of a program under test: one device."""
    return os.environ | {
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "COLUMNS": "160",
        # Of two processes that compile one program, one may read what the other has not finished writing.
        "PYTHONWARNINGS": "ignore:Error reading persistent compilation cache entry:UserWarning",
    }


@pytest.fixture(scope="session")
def _server(program_environment):
    command = [sys.executable, "-c", _SERVER]
    with subprocess.Popen(
        command, cwd=ROOT, env=program_environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        yield server
        server.stdin.close()


@pytest.fixture
def start(_server, tmp_path):
    """Start the program in a process of its own, forked from one that has imported all: `start("train", ...)`."""
    started = []

    def start(*arguments, stdout=None, devices=1):
        folder = tmp_path / f"process{len(started)}"
        folder.mkdir()
        started.append(Process(_server, folder, arguments, stdout, devices))
        return started[-1]

    yield start
    for process in started:
        if process._status is None:
            os.kill(process.pid, 9)
            process.wait()


@pytest.fixture
def until():
    """Wait for something to become true, half a minute at most."""

    def wait(condition, seconds=60):
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.002)
        return value

    return wait
