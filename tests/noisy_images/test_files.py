"""Files are whole or not there."""

import os
import pathlib
import subprocess
import sys

import pytest

from examples.noisy_images import files
from examples.noisy_images.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_a_file_takes_its_place_when_the_block_ends(tmp_path):
    path = tmp_path / "folder" / "a.txt"
    with files.replacing(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == path.parent and temporary.suffix == ".txt" and not path.exists()
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_looking_whether_a_folder_can_be_written_into_leaves_nothing(tmp_path):
    files.check_folder(tmp_path)
    files.check_folder(tmp_path / "new" / "deep")
    assert not list(tmp_path.iterdir())
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for folder in (tmp_path / "nowhere", tmp_path / "nowhere" / "deep"):
        with pytest.raises(UserError, match="cannot write into the folder"):
            files.check_folder(folder)


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_lines_survive_a_line_that_was_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert files.read_json_lines(path) == []
    for epoch in (1, 2, 3):
        files.append_json_line(path, {"epoch": epoch, "loss": 0.1})
    whole = path.read_text()
    assert whole.count("\n") == 3
    for cut in range(1, len(whole) // 3):
        path.write_text(whole[:-cut])
        records = files.read_json_lines(path)
        # Only the line's end is missing when one character is.
        assert [r["epoch"] for r in records] == ([1, 2, 3] if cut == 1 else [1, 2])
    files.write_json_lines(path, records)
    assert path.read_text() == "".join(whole.splitlines(keepends=True)[:2])


@pytest.mark.parametrize("line", ["x", '{"epoch": 1', "5", ""])
def test_a_line_that_is_damaged_before_the_last_is_no_end(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"epoch": 1}}\n{line}\n{{"epoch": 3}}\n')
    with pytest.raises(UserError, match=r"line 2 of .*metrics\.jsonl is damaged: restore the file"):
        files.read_json_lines(path)


def test_json_keeps_floats_exactly(tmp_path):
    record = {"x": 0.1 + 0.2, "y": 1e-30, "z": float("nan")}
    files.append_json_line(tmp_path / "a.jsonl", record)
    (back,) = files.read_json_lines(tmp_path / "a.jsonl")
    assert back["x"] == record["x"] and back["y"] == record["y"] and back["z"] != back["z"]


def test_text_is_utf_8_whatever_the_locale(tmp_path):
    """Also of a name that is no UTF-8 itself."""
    script = (
        "import sys; from examples.noisy_images import files; folder = sys.argv[1]\n"
        r"files.write_text(folder + '/a.md', '\u732b \xb1 caf\udce9')"
        "\nprint(ascii(files.read_json_lines(folder + '/b.jsonl')))"
    )
    (tmp_path / "b.jsonl").write_bytes('{"name": "犬"}\n'.encode())
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], cwd=ROOT, env=os.environ | locale, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.md").read_bytes() == "猫 ± caf".encode() + b"\xe9"
    assert done.stdout == ascii([{"name": "犬"}]) + "\n"
