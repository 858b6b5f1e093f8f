"""The tour runs as it is shown, and shows what its page says."""

import ast
import pathlib

import numpy as np

from examples import tour

ROOT = pathlib.Path(__file__).parents[2]


def test_it_writes_its_figure(tmp_path, capsys):
    output = tmp_path / "tour.png"
    tour.main(["--epochs", "2", "--output", str(output)])
    assert output.read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["SGD", "SAM", "SANER", "written:"]


def test_half_of_the_given_labels_are_wrong():
    data, other = tour.load(seed=0), tour.load(seed=1)
    assert data["wrong"].sum() == len(data["wrong"]) // 2
    # The true labels are no part of the data: two draws agree wherever both are right.
    both_right = ~(data["wrong"] | other["wrong"])
    assert (data["given"] == other["given"])[both_right].all()
    assert set(np.unique(data["given"])) == set(range(10))


def test_methods_part_once_wrong_labels_are_learnt():
    """SGD memorizes first: the direction that the page shows, in the epochs before the others begin."""
    curves = {method: tour.train(method, epochs=24, seed=100) for method in ("SGD", "SAM", "SANER")}
    wrong = {method: accuracies[-1, 1] for method, accuracies in curves.items()}
    assert wrong["SGD"] > max(wrong["SAM"], wrong["SANER"]) + 20
    assert all(accuracies[-1, 2] > 90 for accuracies in curves.values())


def test_it_can_be_copied_out():
    """It imports nothing of this repository but the library."""
    tree = ast.parse((ROOT / "examples" / "tour.py").read_text())
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert not imported & {"examples", "benchmarks", "tests", "flax"}
