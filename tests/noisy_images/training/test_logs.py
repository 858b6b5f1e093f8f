"""What a run says while it trains."""

import contextlib
import os
import pty
import re
import sys
import threading

import rich

from examples.noisy_images.training import logs

METRICS = {
    "epoch": 2,
    "step": 6,
    "running_loss": 1.25,
    "test_loss": 0.5,
    "test_accuracy": 0.75,
    "noisy_accuracy": 0.125,
    "clean_accuracy": 1.0,
    "steps_per_second": 12.3456,
}


def test_plain_lines_without_a_terminal(capsys):
    with logs.progress("mine", 4, 3, 0) as progress:
        progress.step(1)
        progress.epoch(METRICS)
        progress.epoch({"epoch": 3, "running_loss": 1.0})
    assert capsys.readouterr().out.splitlines() == [
        "mine: epoch 2/4  loss 1.250  test loss 0.500  test 75.0 %  noisy 12.5 %  clean 100.0 %  12.3 steps/s",
        "mine: epoch 3/4  loss 1.000",
    ]


def test_a_live_display_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")
    # Rich keeps its idea of the terminal.
    monkeypatch.setattr(rich, "_console", None)
    ours, theirs = pty.openpty()
    shown = []

    def read():
        # A terminal that is closed is an error where a file would end.
        with contextlib.suppress(OSError):
            while chunk := os.read(ours, 4096):
                shown.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        # The name of a folder is no markup.
        with logs.progress("a-run-of-forty-characters-and-of-[bold]", 40, 3, 3) as progress:
            for step in (4, 5, 6):
                progress.step(step)
            progress.epoch(METRICS)
            progress.step(7)
    reader.join()
    os.close(ours)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(shown).decode()).replace("\r", "\n")
    last = " ".join(plain[plain.rindex("epoch") :].split())
    for words in ("epoch 3/40", "steps/s", "[bold]:", "loss 1.250", "test loss 0.500", "75.0 %", "12.5 %", "100.0 %"):
        assert words in last
    # Time left.
    assert re.search(r"\d:\d\d:\d\d|-:--:--", last)


def test_step_rates():
    assert [logs.step_rate(rate) for rate in (0.12345, 12.345, 1234.5)] == [
        "0.123 steps/s",
        "12.3 steps/s",
        "1234 steps/s",
    ]


def test_no_display_without_its_package(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setitem(sys.modules, "rich", None)
    with logs.progress("mine", 4, 3, 0) as progress:
        progress.epoch(METRICS)
    assert capsys.readouterr().out.startswith("mine: epoch 2/4")


def test_tensorboard_goes_on_in_a_file_of_its_own(tmp_path):
    for purge_step in (None, 7):
        board = logs.TensorBoard(tmp_path, purge_step)
        board.write(METRICS)
        board.close()
    # Within one second.
    assert len(list(tmp_path.iterdir())) == 2


def test_no_tensorboard_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    board = logs.TensorBoard(tmp_path / "tensorboard", None)
    board.write(METRICS)
    board.close()
    assert not (tmp_path / "tensorboard").exists()
