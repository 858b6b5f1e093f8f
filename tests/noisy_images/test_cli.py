"""The command line: sub-commands, their help, and errors of one line."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from examples.noisy_images import cli, config, data, models
from examples.noisy_images.config import PAPER, replace
from examples.noisy_images.errors import not_installed
from examples.noisy_images.paper import comparison
from examples.noisy_images.suspects import ranking
from examples.noisy_images.training import epochs, methods, run

ROOT = Path(__file__).parents[2]
COMMANDS = tuple(cli.COMMANDS)


@pytest.fixture(autouse=True)
def own_settings(monkeypatch, tmp_path):
    """The command line sets variables of the process and the way that warnings are shown."""
    for variable in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.setenv(variable, os.environ.get(variable, ""))
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fails(capsys):
    """The one line that a command line fails with."""

    def run(*arguments, status=2):
        with pytest.raises(SystemExit) as exit:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert exit.value.code == status, captured.err
        assert captured.err.count("\n") == 1 and captured.err.endswith("\n") and captured.out == ""
        return captured.err

    return run


SMALL = ("--dataset", "digits", "--model", "mlp", "--width", "0.02", "--epochs", "1", "--method", "sgd")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--dataset", "digit"),
            r"error: unknown data set 'digit': did you mean 'digits'\? choose one of cifar10, cif",
        ),
        ((*SMALL, "--model", "mpl"), r"error: unknown model 'mpl': did you mean 'mlp'.*wrn_40_2"),
        ((*SMALL, "--method", "saners"), r"error: unknown method 'saners': did you mean 'saner'.*vasso\+saner"),
        ((*SMALL, "--noise", "symetric"), r"error: unknown value of --noise 'symetric': did you mean 'symmetric'"),
        ((*SMALL, "--rate", "1.2"), r"error: --rate must be in \[0, 1\], got 1.2\."),
        ((*SMALL, "--batch-size", "5000"), r"error: --batch-size 5000 is larger than the training set of 1348"),
        (("--dataset", "npz"), r"error: the data set 'npz' needs --data-dir"),
        (("--dataset", "npz", "--data-dir", "nowhere.npz"), r"error: --data-dir 'nowhere.npz' does not exist"),
        (("--dataset", "folder", "--data-dir", "nowhere"), r"error: --data-dir 'nowhere' does not exist"),
        (("--dataset", "cifar10", "--data-dir", "nowhere"), r"error: .*nowhere"),
        (("--seeds", "1", "2", "1", *SMALL), r"error: --seeds must be different numbers, got 1 2 1"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, message, fails, tmp_path):
    assert re.match(message, fails("train", *arguments))
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_not_what_is_needed(fails, tmp_path):
    for command in ("resume", "evaluate"):
        assert re.match(r"error: .*empty/config.json does not exist: empty is not the folder", fails(command, "empty"))
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    written = config.to_json(replace(config.DIGITS, rate=0.2))
    (folder / "config.json").write_text(json.dumps(written))
    message = fails("train", "--dataset", "digits", "--alpha", "0.3", "--name", "mine")
    assert "already holds a run of another configuration (rate: 0.5 here, 0.2 there; alpha: 0.3 here, 0.5" in message
    (folder / "config.json").write_text("{")
    assert "is not valid JSON" in fails("resume", folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_interruptions_exit_with_130(fails, monkeypatch):
    def interrupted(config, folder, devices):
        raise epochs.Interrupted(folder / "with blank", 7)

    monkeypatch.setattr(run, "train", interrupted)
    line = fails("train", *SMALL, "--name", "x", status=130)
    assert line == "stopped after step 7; go on with: python -m examples.noisy_images resume 'runs/x/with blank'\n"

    def killed(config, folder, devices):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train", killed)
    assert fails("train", *SMALL, status=130) == "interrupted.\n"


def test_a_mistake_of_the_program_keeps_its_traceback(monkeypatch):
    def wrong(config, folder, devices):
        raise ZeroDivisionError

    monkeypatch.setattr(run, "train", wrong)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", *SMALL])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_documents_every_option(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as exit:
        cli.main([command, "--help"])
    assert exit.value.code == 0
    text = re.sub(r"[│╭╮╰╯─]|\x1b\[[0-9;]*m", " ", capsys.readouterr().out)
    # An option stands at the start of its line, what it is for beside it or below.
    options = dict(re.findall(r"^ {2}(--[a-z][a-z-]+|[A-Z]{2,}) ?(.*?)(?=^ {2}\S|\Z)", text, re.MULTILINE | re.DOTALL))
    for option, about in options.items():
        words = re.sub(r"\(default: .*?\)|\(required\)|--no-[a-z-]+|\{.*?\}|\b[A-Z]+\b", " ", about.replace("\n", " "))
        assert len(re.findall(r"[a-z]+", words)) >= 2, (option, about)
    if command in ("compare", "train", "noise"):
        fields = {f"--{name.replace('_', '-')}" for name in config.flat(PAPER)}
        assert fields | {"--symmetric-count", "--instance-count"} <= options.keys()
    else:
        given = {
            "resume": "PATH",
            "evaluate": "PATH",
            "prepare": "--archive",
            "plot": "--figure",
            "rank": "--score",
            "suspects": "--cross-validate",
            "export": "--link",
            "list": "-h,",
            "sharpness": "--samples",
            "paper": "--shard",
            "report": "--output",
        }[command]
        assert given in options or given in text


def test_help_names_the_sub_commands_and_does_not_wait_for_jax(program_environment):
    code = "import atexit, sys; atexit.register(lambda: print('jax' in sys.modules)); "
    code += "from examples.noisy_images import cli; cli.main(['--help'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=program_environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
    assert all(command in done.stdout for command in COMMANDS)


def test_without_a_sub_command_it_compares(monkeypatch, tmp_path):
    compared = []
    monkeypatch.setattr(comparison, "compare", lambda *arguments: compared.append(arguments) or {})
    monkeypatch.setattr(comparison, "show", lambda *arguments: None)
    cli.main([])
    cli.main(["--seeds", "4", "--methods", "sam", "--epochs", "3", "--name", "x"])
    cli.main(["compare", "--dataset", "cifar100", "--out", "elsewhere"])
    default = (config.DIGITS, ("sgd", "sam", "saner"), (0, 1, 2), Path("runs/digits"), None)
    short = (replace(config.DIGITS, epochs=3), ("sam",), (4,), Path("runs/x"), None)
    paper = (replace(PAPER, dataset="cifar100"), ("sgd", "sam", "saner"), (0, 1, 2))
    assert compared == [default, short, (*paper, Path("elsewhere/cifar100"), None)]


def test_train_starts_from_the_papers_protocol(monkeypatch):
    trained = []
    monkeypatch.setattr(run, "train", lambda config, folder, *options: trained.append((config, folder)) or {})
    cli.main("train --dataset cifar10 --noise symmetric --rate 0.5 --method saner --model resnet18".split())
    cli.main("train --noise none --seeds 3 4 --asymmetric-picks affected --no-augment".split())
    cli.main("train --seeds 3 4 --name x --out y --learning-rate-drops 0.3 --scan-epochs True".split())
    names = [str(folder) for _, folder in trained]
    assert trained[0][0] == PAPER
    assert names == [
        "runs/cifar10-symmetric0.5-saner-resnet18-seed0",
        "runs/cifar10-none-saner-resnet18-no_augment-asymmetric_picks=affected-seed3",
        "runs/cifar10-none-saner-resnet18-no_augment-asymmetric_picks=affected-seed4",
        "y/x-seed3",
        "y/x-seed4",
    ]
    assert [c.seed for c, _ in trained] == [0, 3, 4, 3, 4]
    second, last = trained[1][0], trained[-1][0]
    assert second.labels.noise_options.asymmetric_picks == "affected" and not second.data.augment
    assert last.optimizer.learning_rate_drops == (0.3,) and last.circumstances.scan_epochs is True


def test_list_names_all_that_exists(capsys):
    cli.main(["list"])
    text = capsys.readouterr().out
    assert all(
        f" {name}" in text for name in (*models.MODELS, *methods.METHODS, *data.names(), *ranking.SCORES, "instance")
    )


def test_noise_is_inspected_without_training(capsys, tmp_path):
    cli.main("noise --dataset digits --noise asymmetric --rate 0.4".split())
    assert list(tmp_path.iterdir()) == []
    cli.main("noise --dataset digits --noise symmetric --rate 0.4 --folder audit".split())
    assert "0.4" in (text := capsys.readouterr().out) or "40" in text
    assert {path.name for path in (tmp_path / "audit").iterdir()} == {"noise.json", "noise.png"}


def test_noise_that_cannot_be_inspected(npz, fails):
    message = fails("noise", "--dataset", "npz", "--data-dir", npz(clean_labels=False), "--noise", "none")
    assert re.match("error: the true labels of 'npz' are unknown", message)


def test_prepare_hands_on_what_it_was_given(monkeypatch, capsys, fails):
    given = []
    monkeypatch.setattr(data, "prepare", lambda *arguments: given.append(arguments) or "there")
    cli.main("prepare --dataset cifar10 --archive a.tar.gz".split())
    assert given == [("cifar10", None, Path("a.tar.gz"))] and capsys.readouterr().out == "prepared: there\n"
    monkeypatch.undo()
    assert re.match("error: the data set 'digits' needs no preparation", fails("prepare", "--dataset", "digits"))


TRAINING_ALONE = """
import sys
# Flax itself imports Rich.
for package in ("tyro", "matplotlib", "tensorboardX", "sklearn", "tensorflow_datasets", "grain", "PIL", "torch"):
    sys.modules[package] = None
from pathlib import Path
from examples.noisy_images.training import run
from examples.noisy_images.config import configure

config = configure(
    dataset="npz", data_dir=sys.argv[1], noise="none", model="mlp", width=1 / 64, method="sgd", batch_size=8, epochs=1
)
run.train(config, Path(sys.argv[2]))
print(sorted(run.evaluate(Path(sys.argv[2]))))
"""


@pytest.mark.slow
def test_training_needs_no_package_that_prepares_or_shows(npz, tmp_path, program_environment):
    command = [sys.executable, "-c", TRAINING_ALONE, str(npz()), str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=program_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "noisy_accuracy" in done.stdout.splitlines()[-1]
    assert "note: matplotlib is not installed" in done.stderr
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert written == {
        *("config.json", "data.json", "environment.json", "noise.json", "metrics.jsonl"),
        *("checkpoints", "samples", "summary.json"),
    }


@pytest.mark.slow
def test_a_whole_session(start, npz, tmp_path, until):
    """Train two seeds, on a terminal; evaluate; the compiled programs are kept."""
    path = npz()
    arguments = ["--protocol", "paper", "--dataset", "npz", "--data-dir", path, "--noise", "none"]
    arguments += ["--model", "mlp", "--width", "0.015625"]
    arguments += ["--method", "sgd", "--batch-size", "8", "--epochs", "2", "--seeds", "0", "1", "--out", tmp_path]
    process = start("train", *arguments)
    assert process.wait() == 0, process.stderr
    lines = process.stdout.splitlines()
    stem = "npz-none-sgd-mlp-width=0.015625-epochs=2-batch_size=8"
    assert [line[: line.index("  ")] for line in lines if "epoch" in line and "steps/s" in line] == [
        f"{stem}-seed{seed}: epoch {epoch}/2" for seed in (0, 1) for epoch in (1, 2)
    ]
    folder = tmp_path / f"{stem}-seed1"
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["command"] == f"python -m examples.noisy_images train {' '.join(map(str, arguments))}"
    assert environment["devices"] == 1
    process = start("evaluate", folder)
    assert process.wait() == 0, process.stderr
    shown = dict(line.split() for line in process.stdout.splitlines())
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert float(shown["test_accuracy"]) == np.round(last["test_accuracy"], 4) and shown["epoch"] == "2"


def test_a_copy_under_another_name_trains(tmp_path, npz, program_environment):
    """The folder is a program of its own: nothing inside names the place that it lies at."""
    shutil.copytree(ROOT / "examples" / "noisy_images", tmp_path / "forked", ignore=shutil.ignore_patterns("results"))
    options = f"train --protocol paper --dataset npz --data-dir {npz()} --noise none --model mlp --width 0.02"
    command = [sys.executable, "-m", "forked", *options.split(), "--batch-size", "8", "--epochs", "1", "--name", "mine"]
    done = subprocess.run(command, cwd=tmp_path, env=program_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    environment = json.loads((tmp_path / "runs" / "mine" / "environment.json").read_text())
    assert environment["command"].startswith("python -m forked train ")
    sources = [path.read_text() for path in (tmp_path / "forked").rglob("*.py")]
    assert not any("from examples" in text or "import examples" in text for text in sources)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EFBIG])
def test_a_disk_that_takes_no_more_is_one_line(number, fails, monkeypatch):
    def full(config, folder, devices):
        raise OSError(number, os.strerror(number), "runs/x/metrics.jsonl")

    monkeypatch.setattr(run, "train", full)
    line = fails("train", *SMALL, status=1)
    assert line.startswith(f"error: cannot write runs/x/metrics.jsonl ({os.strerror(number)})")


@pytest.mark.parametrize(
    "command",
    [
        *("plot x --output {}/a.png", "rank x --output {}", "noise --folder {}/deep", "sharpness x --output {}/a.md"),
        *("report table1 --output {}", "report table1 --record {}", "suspects x --out {}", "rank {}"),
    ],
)
def test_what_cannot_be_written_to_is_found_before_the_work(command, fails, tmp_path):
    (tmp_path / "taken").write_text("mine")
    line = fails(*command.format(tmp_path / "taken").split())
    assert re.match(r"error: cannot write into the folder .*taken.* \(Not a directory\): choose another", line)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize(
    ("command", "status"),
    [
        *((f"train {' '.join(SMALL)} --name {{}}", 2), ("noise --folder {}", 2), ("rank x --output {}/x", 2)),
        *(("resume {}", 1), ("evaluate {}", 1), ("suspects {}", 1)),
    ],
)
def test_a_name_that_is_too_long_is_one_line(command, status, fails):
    assert "(File name too long)" in fails(*command.format("a" * 300).split(), status=status)


def test_a_reader_that_has_ended_is_no_traceback(program_environment):
    command = f"{sys.executable} -m examples.noisy_images list | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=program_environment | {"PYTHONUNBUFFERED": "1"}, capture_output=True
    )
    assert done.returncode in (0, 128 + signal.SIGPIPE) and done.stderr == b""


def test_a_terminal_that_cannot_show_a_name(program_environment, tmp_path):
    labels = np.arange(8) % 2
    np.savez(tmp_path / "d.npz", images=np.zeros((8, 4, 4), np.uint8), labels=labels, class_names=["猫", "犬"])
    options = f"train --protocol paper --dataset npz --data-dir {tmp_path / 'd.npz'} --noise none --model mlp"
    command = [sys.executable, "-m", "examples.noisy_images", *options.split(), "--width", "0.02", "--batch-size", "4"]
    done = subprocess.run(
        [*command, "--epochs", "1", "--out", str(tmp_path)],
        cwd=ROOT,
        env=program_environment | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_module_of_our_own_that_is_missing_is_a_fault():
    ours = ModuleNotFoundError("No module named 'examples.noisy_images.nothing'", name="examples.noisy_images.nothing")
    with pytest.raises(ModuleNotFoundError):
        not_installed(ours)


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("tyro", "list"),
        ("matplotlib", "noise --dataset digits --folder audit"),
        ("PIL", "train --dataset folder --data-dir photos"),
    ],
)
def test_a_package_that_is_missing_is_one_line(package, command, tmp_path, program_environment):
    """In a process that has not imported it already."""
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
    start = (
        f"import sys, runpy; sys.modules[{package!r}] = None; sys.argv[1:] = {command.split()}; "
        "runpy.run_module('examples.noisy_images', None, '__main__')"
    )
    environment = program_environment | {"PYTHONPATH": str(ROOT)}
    command_line = [sys.executable, "-c", start]
    done = subprocess.run(command_line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode in (1, 2)
    assert done.stderr == f'error: {package} is not installed, which this needs: run `pip install -e ".[examples]"`.\n'
