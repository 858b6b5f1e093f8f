"""Every command runs end to end at toy size, prints tables and writes what it returns."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks import __main__ as everything
from benchmarks import compile_time, epoch, memory, train_step
from benchmarks.machinery import first_step, peak
from examples.noisy_images.errors import UserError
from examples.noisy_images.training import run as run_of_the_program

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile", "small_peak")]


def run(command, arguments, tmp_path, capsys):
    """Return the results, after comparing them with what was written, and the printed report."""
    path = tmp_path / "new" / "results.json"
    results = command.main([*arguments, "--output", str(path)])
    assert json.loads(path.read_text()) == json.loads(json.dumps(results))
    assert {"command", "date", "versions", "platform", "device", "commit", "host"} <= set(results)
    return results, capsys.readouterr().out


def test_train_step(tmp_path, capsys):
    methods = ("sgd", "sam", "saner")
    arguments = ["--models", "mlp", "--width", "0.03", "--batch-size", "4", "--rounds", "3", "--methods", *methods]
    results, printed = run(train_step, arguments, tmp_path, capsys)
    (pair,) = results["pairs"]
    assert set(pair["methods"]) == set(methods)
    assert pair["methods"]["saner"]["flops"] == 2 * pair["methods"]["sgd"]["flops"]
    for measured in pair["methods"].values():
        assert measured["q1_s"] <= measured["median_s"] <= measured["q3_s"]
        assert measured["flops_per_s"] == pytest.approx(measured["flops"] / measured["median_s"])
        assert measured["share_of_peak"] == pytest.approx(measured["flops_per_s"] / peak.flops_per_s(pair["peak"]))
        assert measured["xla_bytes_accessed"] > measured["argument_bytes"]
    assert set(results["targets"]) == {"saner_over_sam", "sam_over_two_sgd"}
    for name in (*methods, "saner / sam", "sam / 2 sgd", "at most 1.02"):
        assert name in printed


def test_train_step_leaves_out_what_does_not_fit(capsys):
    arguments = ["--models", "mlp", "--width", "0.03", "--batch-size", "2", "--rounds", "3", "--seconds", "0.001"]
    results = train_step.main([*arguments, "--methods", "sgd", "saner", "--precisions", "float32", "bfloat16"])
    assert list(results["pairs"][0]["methods"]) == ["sgd"] and results["pairs"][0]["rounds"] == 3
    assert results["left_out"] == ["mlp in bfloat16"]
    assert "Left out for want of time: mlp in bfloat16." in capsys.readouterr().out


def test_memory(tmp_path, capsys, toy):
    methods = ["sam-unmonitored", "sam", "saner"]
    results, printed = run(memory, [*toy, "--methods", *methods], tmp_path, capsys)
    assert list(results["methods"]) == methods
    gradient = results["setting"]["gradient_bytes"]
    assert gradient == 4 * (3072 * 15 + 15 + 15 * 15 + 15 + 15 * 10 + 10)
    # Parameters and momentum, at the least.
    assert all(measured["argument_bytes"] > 2 * gradient for measured in results["methods"].values())
    assert results["targets"]["saner_extra_memory"]["median"] <= 1.05
    assert "over SAM's, copies" in printed


def test_memory_probe_says_what_the_device_counts(capsys, toy):
    memory.main([*toy, "--probe", "sgd"])
    assert "allocated_peak_bytes" in json.loads(capsys.readouterr().out)


def test_epoch(tmp_path, capsys, toy):
    sizes = ["--train", "12", "--test", "6", "--rounds", "3", "--seeds", "2"]
    results, printed = run(epoch, [*toy, *sizes], tmp_path, capsys)
    assert set(results["parts"]) == {"default", "loop", "scan", "test set", "training set"}
    assert results["setting"]["steps"] == 3
    run_, compiled = results["extrapolated"].values()
    slowest = results["parts"]["default"]["median_s"] + results["parts"]["test set"]["median_s"]
    assert run_["median"] == pytest.approx(200 * slowest / 60, rel=0.5)
    assert compiled["median"] > run_["median"]
    # The targets are about another network.
    assert set(results["targets"]) == {"seeds_one_after_another"}
    faster, ratio = results["seeds"]["faster"], results["seeds"]["ratio"]["median"]
    assert (faster == epoch.ONE_PROGRAM) == (ratio > 1)
    assert "Extrapolated to 200 epochs" in printed and "a step of 2 seeds" in printed


IMPORT_REPORT = """import time: self [us] | cumulative | imported package
import time:       100 |        100 |     numpy.core
import time:     50000 |      60000 |   numpy
import time:      2000 |      62000 | jax._src.core
"""


def test_import_times_are_added_up_by_package():
    assert compile_time.import_times(IMPORT_REPORT) == {"numpy": pytest.approx(0.0501), "jax": pytest.approx(0.002)}


def test_program_is_started_up_to_its_first_step(tmp_path):
    """The stages come in their order, and nothing of the run is left but its folder."""
    args = compile_time.parse(["--model", "mlp", "--width", "0.03", "--batch-size", "8", "--images", "64"])
    args.starts = 0
    started = time.monotonic()
    marks = compile_time.first_steps(args, compile_time.timing.Budget())["cold"]
    assert tuple(marks) == compile_time.STAGES
    times = list(marks.values())
    assert 0 < times[0] and times == sorted(times) and times[-1] < time.monotonic() - started


def test_program_is_started_without_a_command_line_where_tyro_is_missing(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run_of_the_program, "train", lambda *args: asked.append(args))
    arguments = "train --dataset npz --width 0.5 --batch-size 8 --noise none --name cold".split()
    first_step._without_command_line([*arguments, "--out", str(tmp_path)])
    ((config, folder),) = asked
    assert (config.data.dataset, config.network.width, config.training.batch_size, config.labels.noise) == (
        "npz",
        0.5,
        8,
        "none",
    )
    assert config.training.epochs == 200 and folder == tmp_path / "cold"


def test_compile_time(tmp_path, capsys, monkeypatch, toy):
    starts = iter(
        [{stage: 2.0 * i for i, stage in enumerate(compile_time.STAGES)}]
        + 3 * [{stage: 1.0 * i for i, stage in enumerate(compile_time.STAGES)}]
    )
    monkeypatch.setattr(compile_time, "_start", lambda *_: next(starts))
    monkeypatch.setattr(compile_time, "imports", lambda: {"jax": 1.5, "flax": 0.5})
    arguments = [*toy, "--methods", "sgd", "--repeats", "1", "--starts", "3", "--images", "64"]
    results, printed = run(compile_time, arguments, tmp_path, capsys)
    assert results["compilation"]["sgd"]["compile_s"] > 0
    assert results["targets"] == {"first_step_cpu": {"median": 7.0, "low": 7.0, "high": 7.0}}
    assert "| first step done | 14.00 | 7.00 | +1.00 |" in printed
    assert "Imports take 2.00 s: jax 1.50, flax 0.50." in printed


def test_a_mistake_of_the_user_is_one_line(capsys, monkeypatch, toy):
    def fail(*_):
        raise UserError("no such data.")

    monkeypatch.setattr(memory, "measure", fail)
    with pytest.raises(SystemExit) as raised:
        memory.main(toy)
    assert raised.value.code == 2
    assert capsys.readouterr().err == "error: no such data.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "must be at least 1"),
        (["--seconds", "-1"], "must be positive"),
        (["--width", "inf"], "positive"),
    ],
)
def test_nonsense_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        train_step.parse(arguments)
    assert message in capsys.readouterr().err


RECORD = {
    "command": "python -m benchmarks.memory",
    "date": "2026-01-01T00:00:00+00:00",
    "versions": {"jax": "0.10", "torch": None},
    "platform": "cpu",
    "device": "a CPU",
    "devices": 1,
    "commit": "abc",
    "host": {"system": "Linux", "cores": 2, "load": [0.5, 0.5, 0.5]},
    "targets": {"saner_extra_memory": {"median": 1.0, "low": 1.0, "high": 1.0}},
}


def test_everything_is_run_within_the_time_and_written_in_one_file(tmp_path, monkeypatch):
    """A benchmark that fails or hangs is named with the reason; the others count."""
    asked = []

    def start(line, environment, limit):
        name = line[2].removeprefix("benchmarks.")
        asked.append((name, float(line[line.index("--seconds") + 1]), line))
        if name == "peers":
            return "", "still compiling", None
        if name == "epoch":
            return "", "error: no epochs today", 3
        everything.files.write_json(line[line.index("--output") + 1], RECORD)
        return f"a table of {name}\n", "", 0

    monkeypatch.setattr(everything, "run", start)
    names = ["memory", "epoch", "peers", "precision"]
    text = everything.measure(names, 10, tmp_path, {"precision": ["--data-dir", "here"]})
    assert [name for name, _, _ in asked] == names
    assert asked[-1][2][-2:] == ["--data-dir", "here"]
    # Shares of what is left; nothing took any time here, so that the last one has all of it.
    weights = np.array([everything.WEIGHTS[name] for name in names])
    assert asked[0][1] == pytest.approx(600 * weights[0] / weights.sum(), abs=2)
    assert asked[-1][1] == pytest.approx(600, abs=2)
    assert (tmp_path / "RESULTS.md").read_text() == text
    assert "a CPU (1), Linux; jax 0.10; 2026" in text
    assert "| met | `memory` |" in text and "a table of precision" in text
    assert "Not measured: ended with status 3 (error: no epochs today)." in text
    assert "Not measured: stopped after " in text
    assert "not measurable here: counts on a GPU" in text


def test_what_is_run_reports_and_is_stopped_with_all_that_it_started(tmp_path, capfd):
    code = "import sys; print('a table'); print('error: what is wrong', file=sys.stderr); sys.exit(2)"
    assert everything.run([sys.executable, "-c", code], dict(os.environ), 60) == (
        "a table\n",
        "error: what is wrong",
        2,
    )
    assert "error: what is wrong" in capfd.readouterr().err

    mark = tmp_path / "mark"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    started = time.monotonic()
    assert everything.run([sys.executable, "-c", code], dict(os.environ), 1) == ("", "", None)
    assert time.monotonic() - started < 3
    time.sleep(3)
    assert not mark.exists()


ALONE = """
import sys
# Flax itself imports Rich.
for package in ("tyro", "matplotlib", "tensorboardX", "sklearn", "tensorflow_datasets", "grain", "PIL", "torch"):
    sys.modules[package] = None
from benchmarks import compile_time, epoch, memory, peers, precision, train_step, update_cost

train_step.main("--models mlp --width 0.03 --batch-size 2 --rounds 3 --methods sgd".split())
"""


def test_benchmarks_need_no_package_that_prepares_or_shows():
    quick = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, env=quick)
    assert done.returncode == 0, done.stderr
    assert "| sgd |" in done.stdout


def test_help_of_everything_needs_no_device():
    result = subprocess.run([sys.executable, "-m", "benchmarks", "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "--minutes" in result.stdout
