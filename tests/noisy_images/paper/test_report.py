"""Reports of presets: from synthetic run folders to the paper's tables and figures."""

import csv
import re

import numpy as np
import pytest

from examples.noisy_images import config as configuration
from examples.noisy_images import files
from examples.noisy_images.config import flat, replace, run_name
from examples.noisy_images.measures import plots, tables
from examples.noisy_images.paper import presets, report
from examples.noisy_images.paper.presets import ALL, FULL, Scale, Selection

PART = Selection(dataset=("cifar10",), noises=("symmetric",))


def write_run(out, config, accuracies, noisy=0.5, complete=True):
    """Write the folder of a run with these test accuracies."""
    folder = out / run_name(config)
    files.write_json(folder / "config.json", configuration.to_json(config))
    files.write_json(folder / "environment.json", {"device": "a device", "commit": "0123456789"})
    history = [
        {"epoch": epoch, "test_accuracy": accuracy, "noisy_accuracy": noisy, "gap": 0.9 - noisy, "cosine": 0.25}
        for epoch, accuracy in enumerate(accuracies, 1)
    ]
    files.write_json_lines(folder / "metrics.jsonl", history)
    if complete:
        summary = {"best_test_accuracy": max(accuracies), "last_test_accuracy": accuracies[-1], "seconds": 30.0}
        files.write_json(folder / "summary.json", summary)
    return folder


@pytest.fixture
def dots(monkeypatch):
    """What is drawn of a table; the picture itself is drawn in one test only."""
    drawn = []
    monkeypatch.setattr(plots, "dots_figure", lambda panels, title: drawn.append((panels, title)))
    monkeypatch.setattr(plots, "save", lambda figure, path: None)
    return drawn


@pytest.fixture
def curves(monkeypatch):
    """What is drawn of a figure."""
    drawn = {}

    def draw(runs, path, panels, title):
        drawn[path.name] = (runs, panels, title)

    monkeypatch.setattr(plots, "curves", draw)
    return drawn


def read_csv(path):
    with path.open(newline="") as file:
        return {
            (r["dataset"], r["noise"], r["rate_percent"], r["method"], r["setting"]): r for r in csv.DictReader(file)
        }


def cell_of(name, method, **settings):
    (cell,) = (
        cell
        for cell in presets.cells(name, PART if name == "table1" else ALL)
        if cell.config.optimizer.method == method and all(flat(cell.config)[k] == v for k, v in settings.items())
    )
    return cell


def test_a_table_with_a_complete_an_incomplete_and_a_missing_cell(dots, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    sam, saner = cell_of("table1", "sam", rate=0.5), cell_of("table1", "saner", rate=0.5)
    best, last = np.array([88.5, 89.1, 88.3]), np.array([80.0, 82.0, 81.0])
    for seed in range(3):
        write_run(tmp_path, sam.run(seed), [0.5, best[seed] / 100, last[seed] / 100])
    write_run(tmp_path, saner.run(0), [0.91, 0.905])
    write_run(tmp_path, saner.run(1), [0.2], complete=False)
    markdown, table, picture = report.write("table1", PART, FULL, tmp_path, tmp_path / "reports")
    assert {path.name for path in (tmp_path / "reports").iterdir()} == {markdown.name, table.name}
    assert picture.name == "table1-cifar10-symmetric.png"

    values = read_csv(table)
    assert len(values) == 4
    # The mean, the deviation, the difference and its standard error, computed here anew.
    row = values["cifar10", "symmetric", "50.0", "sam", ""]
    expected = {
        "published_best_percent": 88.82,
        "published_best_percent_std": 0.08,
        "best_percent": np.mean(best),
        "best_percent_std": np.std(best, ddof=1),
        "seeds": 3,
        "difference": np.mean(best) - 88.82,
        "standard_error": np.sqrt(0.08**2 / 3 + np.var(best, ddof=1) / 3),
        "last_percent": 81.0,
        "last_percent_std": 1.0,
    }
    assert {key: float(row[key]) for key in expected} == pytest.approx(expected, abs=2e-6)
    # One seed has no deviation: the paper's stands for it. The run that was cut off does not count.
    row = values["cifar10", "symmetric", "50.0", "saner", ""]
    assert (row["seeds"], row["best_percent_std"], row["last_percent_std"]) == ("1", "", "")
    assert float(row["difference"]) == pytest.approx(91.0 - 90.6)
    assert float(row["standard_error"]) == pytest.approx(0.36 * np.sqrt(1 / 3 + 1), abs=2e-6)
    row = values["cifar10", "symmetric", "25.0", "saner", ""]
    assert (row["seeds"], row["published_best_percent"]) == ("0", "94.08")
    assert {
        row[key] for key in ("best_percent", "best_percent_std", "difference", "standard_error", "last_percent")
    } == {""}

    text = markdown.read_text()
    assert text.startswith("# Table 1: four kinds of label noise\n\nAll rows: data set: cifar10; network: resnet18.\n")
    assert "| noise | method | paper | best | n | difference | s.e. | last |\n|---" in text
    assert "| symmetric 50 % | SAM | 88.82 ± 0.08 | 88.63 ± 0.42 | 3 | -0.19 | 0.24 | 81.00 ± 1.00 |" in text
    assert "| symmetric 50 % | SANER | 90.60 ± 0.36 | 91.00 | 1 | +0.40 | 0.42 † | 90.50 |" in text
    assert "| symmetric 25 % | SAM | 93.05 ± 0.17 |  |  |  |  |  |" in text
    assert "sqrt(s_paper² / 3 + s² / n)" in text and "4 runs, 2 min in all, on a device; commit 0123456." in text
    assert f"* `{run_name(saner.run(1))}`: cut off" in text and f"]({picture.name})" in text
    shown = capsys.readouterr().out
    assert "Table 1: four kinds of label noise" in shown and "88.82±0.08" in shown and markdown.name in shown

    ((panels, title),) = dots
    assert title == "Table 1: four kinds of label noise" and list(panels) == ["cifar10"]
    assert [dot.label for dot in panels["cifar10"]] == [
        f"symmetric {rate} %, {method}" for rate in (25, 50) for method in ("SAM", "SANER")
    ]
    assert [dot.published for dot in panels["cifar10"]] == [(93.05, 0.17), (94.08, 0.11), (88.82, 0.08), (90.6, 0.36)]
    measured = [dot.measured for dot in panels["cifar10"]]
    assert measured[:2] == [None, None] and measured[3] == (pytest.approx(91.0), None)
    assert measured[2] == pytest.approx((np.mean(best), np.std(best, ddof=1)))


@pytest.mark.parametrize(
    ("published", "measured", "seeds", "expected"),
    [
        (0.3, 0.4, 4, np.sqrt(0.03 + 0.04)),
        (0.3, None, 1, np.sqrt(0.03 + 0.09)),
        (None, 0.3, 3, np.sqrt(0.06)),
        (None, None, 1, None),
    ],
)
def test_standard_errors(published, measured, seeds, expected):
    assert report.standard_error(published, measured, seeds) == (expected and pytest.approx(expected))


def test_scales_are_never_mixed(dots, tmp_path):
    shrunken = Scale(epochs=2, subset=1000)
    (cell, *_), (small, *_) = presets.cells("table1", PART), presets.cells("table1", PART, shrunken)
    write_run(tmp_path, cell.run(0), [0.93])
    write_run(tmp_path, small.run(0), [0.4])
    write_run(tmp_path, small.run(1), [0.2])
    # Another configuration in a folder with the right name, such as one that was moved, does not count either.
    moved = write_run(tmp_path, cell.run(1), [0.1])
    files.write_json(moved / "config.json", configuration.to_json(replace(cell.run(1), learning_rate=1.0)))
    means = {}
    for scale in (FULL, shrunken):
        markdown, table, _ = report.write("table1", PART, scale, tmp_path, tmp_path / "reports")
        means[markdown.name] = read_csv(table)["cifar10", "symmetric", "25.0", "sam", ""]
        head = markdown.read_text().splitlines()[0]
        assert head.endswith("(shrunken: 2 epochs, 1,000 training images)") == (scale is shrunken)
    assert {name: (row["seeds"], row["best_percent"]) for name, row in means.items()} == {
        "table1-cifar10-symmetric.md": ("1", "93.0"),
        "table1-cifar10-symmetric-2_epochs-1000_training_images.md": ("2", "30.0"),
    }
    text = (tmp_path / "reports" / "table1-cifar10-symmetric.md").read_text()
    assert f"* `{moved.name}`: " in text and "learning_rate: 0.1 here, 1.0 there" in text


def test_where_files_lie_does_not_matter(dots, tmp_path):
    cell = presets.cells("table1", PART)[0]
    write_run(tmp_path, replace(cell.run(2), data_dir="/data", evaluate_every=10), [0.93])
    _, table, _ = report.write("table1", PART, FULL, tmp_path, tmp_path)
    assert read_csv(table)["cifar10", "symmetric", "25.0", "sam", ""]["seeds"] == "1"


def test_a_report_of_nothing_has_the_papers_numbers(tmp_path, capsys):
    written = report.write("table2", ALL, FULL, tmp_path, tmp_path / "reports")
    assert [path.name for path in written] == ["table2.md", "table2.csv", "table2.png"]
    assert written[2].read_bytes().startswith(b"\x89PNG")
    assert "| tiny_imagenet | symmetric 25 % | wrn_28_10 | SANER | 64.08 |  |  |  |  |  |" in written[0].read_text()
    assert "| mini_webvision | of the web | resnet18_imagenet | SGD | 64.96 |" in written[0].read_text()
    assert "none of its runs is complete yet" in capsys.readouterr().out
    # A figure has nothing to draw.
    assert [path.name for path in report.write("figure1", ALL, FULL, tmp_path, tmp_path)] == [
        "figure1.md",
        "figure1.csv",
    ]


def test_a_figure_has_its_curves_and_the_last_epoch(curves, tmp_path):
    for cell in presets.cells("figure3"):
        for seed in (0, 1):
            write_run(tmp_path, cell.run(seed), [0.7, 0.8 + seed / 10], noisy=0.4 + cell.config.optimizer.alpha / 10)
    markdown, table, picture = report.write("figure3", ALL, FULL, tmp_path, tmp_path / "reports")
    ((name, (runs, panels, title)),) = curves.items()
    assert name == picture.name == "figure3.png" and panels == plots.FIGURE_3
    assert list(runs) == [
        *("SANER, alpha=-0.5", "SANER, alpha=-0.25", "SAM, alpha=0", "SANER, alpha=0.25", "SANER, alpha=0.5")
    ]
    assert all(len(histories) == 2 for histories in runs.values())
    assert title.splitlines() == [presets.title("figure3"), "cifar10, symmetric 25 %"]
    text = markdown.read_text()
    spread = f"{100 * np.std([0.8, 0.9], ddof=1):.2f}"
    assert f"| alpha=-0.5 | SANER | 2 | 35.00 ± 0.00 | 85.00 ± {spread} | 55.00 ± 0.00 |" in text
    assert "| setting | method | n | noisy accuracy | test accuracy | gap |" in text
    # SAM and SANER stand in a table too, the others do not.
    assert re.search(r"\| alpha=0 \| SAM \| 93.05 ± 0.17 \| 85.00", text) and "| alpha=-0.5 | SANER |  | 85.00" in text
    row = read_csv(table)["cifar10", "symmetric", "25.0", "saner", "alpha=0.25"]
    assert float(row["last_noisy_accuracy_percent"]) == pytest.approx(42.5)
    assert row["last_true_accuracy_on_noisy_percent"] == ""


def test_a_figure_is_drawn_apart_by_rate_and_by_setting(curves, tmp_path):
    for name, methods in (("figure2", ("sam",)), ("figure4", ("sgd", "saner")), ("figure7", ("sam",))):
        for cell in presets.cells(name, Selection(methods=methods)):
            write_run(tmp_path, cell.run(0), [0.7])
        report.write(name, Selection(seeds=(0,)), FULL, tmp_path, tmp_path)
    assert {name: list(runs) for name, (runs, _, _) in curves.items()} == {
        **{f"figure2-cifar10_symmetric_{rate}.png": ["SAM"] for rate in (25, 50)},
        # The SAM run of Figure 2 is that of Figure 4 at width 1.
        "figure4-cifar10_symmetric_50_width_1.png": ["SGD", "SAM", "SANER"],
        **{
            f"figure4-cifar10_symmetric_50_{setting}.png": ["SGD", "SANER"]
            for setting in ("width_1.5", "width_2", *(f"{share}_of_images" for share in (10, 25, 50)))
        },
        **{
            f"figure7-cifar100_symmetric_25_{model}.png": ["SAM"]
            for model in ("resnet34", "densenet121", "wrn_40_2", "wrn_28_10")
        },
    }


def test_means_of_what_only_some_runs_have():
    runs = [{"a": 0.1, "b": 0.5}, {"a": 0.3}]
    assert tables.spreads(runs, ("a", "b", "c")) == {
        "a": {"mean": pytest.approx(0.2), "std": pytest.approx(np.std([0.1, 0.3], ddof=1))},
        "b": {"mean": 0.5},
    }
