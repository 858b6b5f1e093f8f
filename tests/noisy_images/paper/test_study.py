"""Studies: paired differences, choosing on other seeds, and reports from folders and from a small record alike."""

import csv
import json

import numpy as np
import pytest
from scipy import stats

from examples.noisy_images import config as configuration
from examples.noisy_images import files
from examples.noisy_images.config import replace, run_name
from examples.noisy_images.errors import UserError
from examples.noisy_images.measures import metrics, plots, tables
from examples.noisy_images.paper import equal_loss, presets, records, report, study
from examples.noisy_images.paper.presets import ALL, FULL, Selection

SEEDS = (200, 201, 202, 203)
NOISY = {"sgd": 1.0, "sam": 0.6, "saner": 0.2}


def history(noisy, seed, epochs=6):
    """A run that tests best in its second epoch, and is evaluated on the training set in every second one."""
    records = []
    for epoch in range(1, epochs + 1):
        record = {"epoch": epoch, "test_accuracy": 0.9 - 0.05 * abs(epoch - 2) - seed % 7 / 100}
        record |= {"heldout_accuracy": 0.4 - 0.05 * abs(epoch - 4), "running_loss": 1.0}
        if epoch % 2 == 0:
            record |= {"noisy_accuracy": noisy * epoch / epochs + seed % 5 / 100, "clean_accuracy": 0.95}
        records.append(record)
    return records


def write_run(out, config, noisy):
    folder = out / run_name(config)
    files.write_json(folder / "config.json", configuration.to_json(config))
    files.write_json(folder / "environment.json", {"device": "a device", "commit": "0123456789"})
    files.write_json_lines(folder / "metrics.jsonl", records_of_run := history(noisy, config.seed))
    files.write_json(folder / "summary.json", metrics.summary(records_of_run) | {"seconds": 30.0})


@pytest.fixture
def no_pictures(monkeypatch):
    """What is drawn, by the name of its file."""
    drawn = {}
    monkeypatch.setattr(plots, "curves", lambda runs, path, *rest: drawn.update({path.name: runs}))
    monkeypatch.setattr(plots, "intervals_figure", lambda *arguments: arguments)
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.update({path.name: figure}))
    return drawn


@pytest.fixture
def study_runs(tmp_path):
    """SGD, SAM and SANER on four seeds, and SAM at a radius that was the best on the seeds to choose on."""
    out = tmp_path / "runs"
    for cell in presets.cells("elements", Selection(methods=("sgd", "sam", "saner"))):
        if cell.setting == "":
            for seed in SEEDS:
                write_run(out, cell.run(seed), NOISY[cell.config.optimizer.method])
    return out


# --- presets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, figure in presets.FIGURES.items() if figure.is_study])
def test_what_a_study_compares_is_among_its_curves(name):
    figure = presets.FIGURES[name]
    keys = [f"{curve.method} {curve.setting}".strip() for curve in figure.curves]
    assert len(set(keys)) == len(keys)
    assert {*figure.drawn, *figure.beside, *(key for pair in figure.pairs for key in pair)} <= set(keys)
    assert all(one != other for one, other in figure.pairs)


def test_seeds_to_choose_on_are_none_that_are_reported():
    figure = presets.FIGURES["elements"]
    assert len(figure.seeds) == 20
    assert not {*figure.seeds} & {*presets.seeds(figure.choice)}
    # The runs that are chosen among differ from those that are reported in their seed alone.
    reported = {cell.config for cell in presets.cells("elements")}
    radii = {(c.config.optimizer.method, c.config.optimizer.rho): c.config for c in presets.cells("radii")}
    assert {radii[method, rho] for method in ("sam", "saner", "saner_random") for rho in (0.2, 0.4, 0.8)} <= reported


def test_a_second_gradient_in_every_step_is_the_run_that_other_studies_have():
    """Under the name by which it is already known, and so that its file may lack the setting."""
    own = {(c.config.optimizer.method, c.config.optimizer.every): c.config for c in presets.cells("every")}
    assert sorted(own) == [*(("sam", k) for k in (1, 2, 5, 10)), *(("saner", k) for k in (1, 2, 5, 10)), ("sgd", 1)]
    elements = {c.config: run_name(c.run(200)) for c in presets.cells("elements")}
    recorded = records.read(presets.PUBLISHED.parent / "results" / "elements").runs
    for method in ("sgd", "sam", "saner"):
        name = run_name(replace(own[method, 1], seed=200))
        assert elements[own[method, 1]] == name and name in recorded and "every" not in name
        assert "-every=5-" in run_name(own[method, 5]) if method != "sgd" else True
        written = configuration.to_json(own[method, 1])
        del written["optimizer"]["every"]
        assert configuration.from_json(written, "config.json") == own[method, 1]


def test_seeds_of_a_preset_unless_others_are_asked_for():
    assert presets.seeds("table1") == presets.seeds("figure2") == (0, 1, 2)
    assert presets.seeds("elements") == tuple(range(200, 220))
    assert presets.seeds("elements", Selection(seeds=(3,))) == (3,)


def test_the_headline_numbers_are_those_of_the_table():
    cells = presets.cells("headline")
    assert [(c.config.labels.noise, c.config.optimizer.method) for c in cells] == [
        (noise, method) for noise in ("symmetric", "real") for method in ("saner", "sam", "sgd")
    ]
    known = {c.config: c.published for c in presets.cells("table1")}
    assert [c.published for c in cells] == [known.get(c.config) for c in cells]
    assert [c.published is None for c in cells] == [False, False, True] * 2
    # Human labels have no rate, so that at two of them they are still one run.
    assert len(presets.cells("headline", Selection(rates=(0.25, 0.5)))) == 9


# --- numbers ------------------------------------------------------------------------------------------------------


def test_numbers_of_the_best_the_chosen_and_the_last_epoch():
    kept = records.numbers(history(0.6, seed=0))
    assert (kept["best_epoch"], kept["chosen_epoch"]) == (2, 4)
    assert kept["best_test_accuracy"] == pytest.approx(0.9) and kept["best_noisy_accuracy"] == pytest.approx(0.2)
    assert kept["chosen_test_accuracy"] == pytest.approx(0.8) and kept["chosen_noisy_accuracy"] == pytest.approx(0.4)
    assert kept["last_test_accuracy"] == pytest.approx(0.7) and kept["last_noisy_accuracy"] == pytest.approx(0.6)
    assert kept["last_running_loss"] == 1.0 and "best_running_loss" not in kept
    # What was not measured then is not there.
    uneven = [record | {"heldout_accuracy": record["epoch"] == 3} for record in history(0.6, seed=0)]
    assert "chosen_noisy_accuracy" not in (kept := records.numbers(uneven)) and kept["chosen_epoch"] == 3


def test_paired_differences():
    rng = np.random.default_rng(0)
    ours, theirs = ({seed: value for seed, value in enumerate(rng.random(9))} for _ in range(2))
    difference = tables.paired(ours, theirs | {20: 0.5})
    between = np.array([ours[seed] - theirs[seed] for seed in ours])
    ends = stats.ttest_rel([*ours.values()], [*theirs.values()]).confidence_interval(0.95)
    assert difference == pytest.approx((between.mean(), ends.low, ends.high, 9))
    assert tables.paired({0: 0.5}, {1: 0.5}) is None
    assert tables.paired({0: 0.5}, {0: 0.25}) == (0.25, None, None, 1)
    assert tables.paired({0: 0.5, 1: 0.75}, {0: 0.25, 1: 0.5}) == (0.25, 0.25, 0.25, 2)
    assert tables.points(difference).startswith(f"{100 * between.mean():+.1f} ({100 * ends.low:+.1f} to ")
    assert (tables.points(None), tables.points(tables.Difference(0.25, None, None, 1))) == ("", "+25.0")


# --- reports ------------------------------------------------------------------------------------------------------


def test_a_study_says_means_differences_and_how_many_seeds(study_runs, no_pictures, tmp_path):
    markdown, _, *pictures = report.write("elements", ALL, FULL, study_runs, tmp_path / "reports")
    text = markdown.read_text()
    assert text.startswith("# Elements: is it the choice of what is down-weighted?\n\nPercent, mean ±")
    assert "runs of seeds 200 to 219." in text and "12 runs, 6 min in all, on a device; commit 0123456." in text
    assert "| method | n | noisy, last | test, last | test, chosen | test, best | noisy, chosen | noisy, best |" in text
    noisy = [100 * (0.2 + seed % 5 / 100) for seed in SEEDS]
    tests = [100 * (0.7 - seed % 7 / 100) for seed in SEEDS]
    assert f"| SANER | 4 | {np.mean(noisy):.1f} ± {np.std(noisy, ddof=1):.1f} | {np.mean(tests):.1f} ± " in text
    assert "| SANER-RANDOM |  |  |" in text
    # The seeds shift both alike, so that their difference has no spread.
    assert "| SANER minus SAM | 4 | -40.0 (-40.0 to -40.0) | +0.0 (" in text
    assert "SANER minus SANER-RANDOM" not in text
    assert "chosen by" not in text
    assert list(no_pictures) == ["elements.png", "elements-differences.png"]
    assert [picture.name for picture in pictures] == ["elements.png"]
    assert list(no_pictures["elements.png"]) == ["SGD", "SAM", "SANER"]
    with (tmp_path / "reports" / "elements-differences.csv").open(newline="") as file:
        rows = {(row["difference"], row["of"]): row for row in csv.DictReader(file)}
    row = rows["SANER minus SGD", "last_noisy_accuracy"]
    assert (float(row["points"]), row["pairs"]) == (pytest.approx(-80), "4")


def test_what_only_some_runs_have_measured_has_no_column(study_runs, no_pictures, tmp_path):
    cell = presets.cells("elements")[0]
    path = study_runs / run_name(cell.run(SEEDS[0])) / "metrics.jsonl"
    lines = files.read_json_lines(path)
    files.write_json_lines(
        path, [{k: v for k, v in r.items() if r["epoch"] == 6 or k != "noisy_accuracy"} for r in lines]
    )
    text = report.write("elements", ALL, FULL, study_runs, tmp_path / "reports")[0].read_text()
    assert "| method | n | noisy, last | test, last | test, chosen | test, best |\n" in text


def test_each_method_at_its_best_radius(study_runs, no_pictures, tmp_path):
    # SAM is better at 0.6 on the seeds to choose on, SANER at 0.4; on the reported seeds they are what they are.
    for cell in presets.cells("radii"):
        method, rho = cell.config.optimizer.method, cell.config.optimizer.rho
        for seed in (100, 101):
            write_run(study_runs, cell.run(seed), 0.5)
            path = study_runs / run_name(cell.run(seed)) / "metrics.jsonl"
            better = rho == {"sam": 0.6, "saner": 0.4, "saner_random": 0.1}[method]
            shifted = [r | {"test_accuracy": r["test_accuracy"] + 0.05 * better} for r in files.read_json_lines(path)]
            files.write_json_lines(path, shifted)
        if (method, rho) == ("sam", 0.6):
            for seed in SEEDS[:3]:
                write_run(study_runs, cell.run(seed), 0.3)
    text = report.write("elements", ALL, FULL, study_runs, tmp_path / "reports")[0].read_text()
    assert "chosen on seeds 100 to 104 and reported on those above" in text
    for words in study.CRITERIA.values():
        assert f"| {words} | SAM | rho=0.6 |" in text and f"| {words} | SANER | rho=0.4 |" in text
        assert f"| {words} | SAM, rho=0.6 | 3 |" in text and f"| {words} | SANER, rho=0.4 | 4 |" in text
    assert "| SANER, rho=0.4 minus SAM, rho=0.6 | 3 | -10.0 (" in text
    # The record of the study holds what was chosen among.
    report.write("elements", ALL, FULL, study_runs, tmp_path / "reports", tmp_path / "record")
    again = report.write("elements", ALL, FULL, tmp_path / "record", tmp_path / "again")[0]
    assert again.read_text() == text
    chosen = report.write("radii", ALL, FULL, study_runs, tmp_path / "reports")[0].read_text()
    assert "runs of seeds 100 to 104" in chosen and "Chosen among them:" in chosen and "| rho=0.6 |" in chosen


def test_a_curve_beside_each_method_at_its_best(study_runs, no_pictures, tmp_path):
    """Of the methods among the curves alone: the others' runs need not be there."""
    for cell in presets.choices("every"):
        method, rho = cell.config.optimizer.method, cell.config.optimizer.rho
        for seed in (100, 101):
            write_run(study_runs, cell.run(seed), 0.5)
            path = study_runs / run_name(cell.run(seed)) / "metrics.jsonl"
            better = rho == {"sam": 0.8, "saner": 0.6}[method]
            shifted = [r | {"test_accuracy": r["test_accuracy"] + 0.05 * better} for r in files.read_json_lines(path)]
            files.write_json_lines(path, shifted)
        if (method, rho) in (("sam", 0.8), ("saner", 0.6)):
            for seed in SEEDS:
                write_run(study_runs, cell.run(seed), 0.3)
    for cell in presets.cells("every", Selection(methods=("saner",), settings=("every=5",))):
        for seed in SEEDS[:3]:
            write_run(study_runs, cell.run(seed), 0.1)
    text = report.write("every", ALL, FULL, study_runs, tmp_path / "reports", tmp_path / "record")[0].read_text()
    assert "| SANER, every=5 minus SANER | 3 | -10.0 (" in text
    assert "| SANER, every=5 minus SAM, rho=0.8 | 3 | -20.0 (" in text
    assert "| SANER, every=5 minus SANER, rho=0.6 | 3 | -20.0 (" in text
    assert "SANER-RANDOM" not in text
    assert report.write("every", ALL, FULL, tmp_path / "record", tmp_path / "again")[0].read_text() == text


def test_nothing_is_chosen_before_every_setting_has_the_same_seeds(study_runs, no_pictures, tmp_path):
    cells = presets.cells("radii")
    for cell in cells[:-1]:
        write_run(study_runs, cell.run(100), 0.5)
    for name in ("elements", "radii"):
        text = report.write(name, ALL, FULL, study_runs, tmp_path / "reports")[0].read_text()
        assert "chosen by" not in text and ("Nothing is chosen on the runs of radii" in text) == (name == "elements")
    # As many of each, but not the same.
    write_run(study_runs, cells[-1].run(101), 0.5)
    assert "chosen by" not in report.write("radii", ALL, FULL, study_runs, tmp_path / "reports")[0].read_text()
    write_run(study_runs, cells[-1].run(100), 0.5)
    (study_runs / run_name(cells[-1].run(101)) / "summary.json").unlink()
    assert "chosen by" in report.write("radii", ALL, FULL, study_runs, tmp_path / "reports")[0].read_text()


def test_a_report_from_a_small_record_is_that_from_the_folders(study_runs, no_pictures, tmp_path):
    record = tmp_path / "record"
    first = report.write("elements", ALL, FULL, study_runs, tmp_path / "one", record)
    assert sorted(path.name for path in record.iterdir()) == ["curves.json", "runs.csv"]
    drawn = dict(no_pictures)
    second = report.write("elements", ALL, FULL, record, tmp_path / "two")
    assert first[0].read_text() == second[0].read_text()
    differences = [(tmp_path / f / "elements-differences.csv").read_text() for f in ("one", "two")]
    assert differences[0] == differences[1]
    for label, runs in drawn["elements.png"].items():
        for metric in ("noisy_accuracy", "test_accuracy"):
            np.testing.assert_allclose(
                np.array(plots.line(no_pictures["elements.png"][label], metric)),
                np.array(plots.line(runs, metric)),
                1e-5,
            )
    # A folder that is there comes before what is kept of it.
    cell = presets.cells("elements", Selection(methods=("saner",)))[0]
    write_run(record, cell.run(SEEDS[0]), 0.9)
    row = report.read(cell, SEEDS, record, records.read(record))
    assert row.sample.by_seed("last_noisy_accuracy")[SEEDS[0]] == pytest.approx(0.9 + SEEDS[0] % 5 / 100)
    assert row.seeds == 4


def test_a_record_is_read_for_every_preset(no_pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "dots_figure", lambda panels, title: None)
    selection = Selection(dataset=("cifar10",), noises=("symmetric",))
    cell = presets.cells("table1", selection)[0]
    write_run(tmp_path / "runs", cell.run(0), 0.5)
    one = report.write("table1", selection, FULL, tmp_path / "runs", tmp_path / "one", tmp_path / "record")
    two = report.write("table1", selection, FULL, tmp_path / "record", tmp_path / "two")
    assert one[0].read_text() == two[0].read_text() and "| 90.00 | 1 |" in one[0].read_text()
    # Another configuration has another name, and is not mistaken for it.
    assert (
        report.read(replace_cell(cell, rho=0.3), (0,), tmp_path / "record", records.read(tmp_path / "record")).seeds
        == 0
    )


def replace_cell(cell, **settings):
    return presets.Cell(replace(cell.config, **settings), cell.setting, cell.published)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("runs.csv", "run,seed\na,b\n"),
        ("runs.csv", "a table\n1\n"),
        ("curves.json", "{"),
        ("curves.json", '{"a": [1]}'),
    ],
)
def test_what_is_no_record_is_said(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name} is not a record of runs .*: restore it, or remove it"):
        records.read(tmp_path)


def test_a_folder_without_a_record_has_none(tmp_path):
    assert records.read(tmp_path / "nowhere") == ({}, {})


def test_the_picture_of_differences():
    rows = [plots.Interval("a", -3.0, -5.0, -1.0), None, plots.Interval("b", 0.5, None, None)]
    figure = plots.intervals_figure({"Noisy": rows, "Test": rows}, ["a", "none", "b"], "differences")
    first = figure.axes[0]
    assert [label.get_text() for label in first.get_yticklabels()] == ["a", "none", "b"]
    points = [container.lines[0] for container in first.containers]
    assert [(float(p.get_xdata()[0]), float(p.get_ydata()[0])) for p in points] == [(-3, 0), (0.5, 2)]
    # Filled where the interval leaves 0 out.
    assert points[0].get_markerfacecolor() != "white" == points[1].get_markerfacecolor()
    assert first.containers[0].has_xerr and not first.containers[1].has_xerr
    ends = first.containers[0].lines[2][0].get_segments()[0][:, 0]
    np.testing.assert_allclose(ends, [-5, -1])


def test_rows_of_a_record_are_numbers(study_runs, no_pictures, tmp_path):
    report.write("elements", ALL, FULL, study_runs, tmp_path / "one", tmp_path / "record")
    with (tmp_path / "record" / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and {row["seed"] for row in rows} == set(map(str, SEEDS))
    row = next(row for row in rows if row["run"].startswith("digits-symmetric0.5-saner-mlp") and row["seed"] == "203")
    assert float(row["last_noisy_accuracy"]) == pytest.approx(0.2 + 203 % 5 / 100)
    assert (row["chosen_epoch"], row["device"], row["commit"]) == ("4", "a device", "0123456")
    curves = json.loads((tmp_path / "record" / "curves.json").read_text())
    assert len(curves) == 27 and not any("seed" in name for name in curves)


def loss_history(scale):
    """A run whose loss falls linearly from 2 to 0 and whose sharpness is `scale` times the square of the loss."""
    losses = [2.0, 1.5, 1.0, 0.5, 0.0]
    return [
        {"epoch": 5 * i, "train_loss": loss, "sharpness": scale * loss**2, "test_accuracy": 0.5}
        for i, loss in enumerate(losses, start=1)
    ]


def test_levels_are_losses_that_all_runs_pass():
    long, short = [(2.0, 0.0), (0.2, 0.0)], [(1.7, 0.0), (1.1, 0.0)]
    found = equal_loss.levels([long, short])
    assert len(found) == equal_loss.LEVELS and found == sorted(found, reverse=True)
    assert 1.7 > found[0] and found[-1] > 1.1
    assert equal_loss.levels([long, [(0.1, 0.0), (0.05, 0.0)]]) == []


def test_a_metric_where_the_loss_first_falls_to_a_level():
    curve = [(2.0, 10.0), (1.0, 20.0), (1.4, 30.0), (0.5, 40.0)]
    assert equal_loss.at_loss(curve, 1.5) == pytest.approx(15)
    assert equal_loss.at_loss(curve, 1.2) == pytest.approx(18)
    # On the way down again: 1.4 to 0.5.
    assert equal_loss.at_loss(curve, 0.95) == pytest.approx(35)


def test_what_is_sharper_at_equal_loss_is_said(no_pictures, tmp_path):
    """SAM twice as sharp as SGD at every loss, whatever the loss they end at."""
    out = tmp_path / "runs"
    for cell in presets.cells("sharpness", Selection(methods=("sgd", "sam"))):
        for seed in (200, 201, 202):
            method = cell.config.optimizer.method
            records = loss_history({"sgd": 1.0, "sam": 2.0}[method] * (1 + 0.1 * (seed - 200)))
            write_run(out, cell.run(seed), 0.5)
            folder = out / run_name(cell.run(seed))
            files.write_json_lines(folder / "metrics.jsonl", records[: 4 if method == "sam" else 5])
    selection = Selection(methods=("sgd", "sam"), seeds=(200, 201, 202))
    report.write("sharpness", selection, FULL, out, tmp_path / "reports")
    text = next((tmp_path / "reports").glob("*.md")).read_text()
    # The lowest loss of all runs is 0.5, the highest that all begin at 2: levels 1.75 to 0.75.
    header = next(line for line in text.splitlines() if "loss 1.75" in line)
    assert header.split(" | ")[2:] == ["loss 1.75", "loss 1.5", "loss 1.25", "loss 1", "loss 0.75 |"]
    at = next(line for line in text.splitlines() if line.startswith("| SAM minus SGD | +"))
    # At 1.5 sharpness is 2.25 times 1, 1.1 and 1.2 of SGD, and twice that of SAM.
    assert at.split(" | ")[2].startswith("+2.48 (")


def test_sharpness_that_was_not_measured_is_said(study_runs, no_pictures, tmp_path):
    for cell in presets.cells("sharpness", Selection(methods=("sgd",))):
        write_run(study_runs, cell.run(200), 0.5)
    report.write("sharpness", Selection(methods=("sgd",), seeds=(200,)), FULL, study_runs, tmp_path / "reports")
    assert "not every run has measured sharpness" in next((tmp_path / "reports").glob("*.md")).read_text()
