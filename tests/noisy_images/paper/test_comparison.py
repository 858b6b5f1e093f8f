"""Several methods and seeds under one protocol: what is run, what is read, the table."""

import dataclasses
import json
from pathlib import Path

import pytest

from examples.noisy_images import config as configuration
from examples.noisy_images import files
from examples.noisy_images.config import DIGITS, configure, replace
from examples.noisy_images.errors import UserError
from examples.noisy_images.measures import plots, tables
from examples.noisy_images.paper import comparison
from examples.noisy_images.training import run


@pytest.fixture
def config(npz):
    return configure(
        dataset="npz",
        data_dir=str(npz()),
        noise="none",
        model="mlp",
        width=1 / 64,
        batch_size=8,
        epochs=2,
        rho=0.2,
    )


@pytest.fixture
def calls(monkeypatch):
    """What is trained and what is gone on with; no figures of single runs."""
    monkeypatch.setattr(run, "_optional", lambda write: None)
    made = []
    for name in ("train", "resume"):
        original = getattr(run, name)

        def spy(*arguments, name=name, original=original, **options):
            made.append((name, next(one for one in arguments if isinstance(one, Path)).name))
            return original(*arguments, **options)

        monkeypatch.setattr(run, name, spy)
    return made


@pytest.mark.slow
def test_a_comparison_runs_reads_and_goes_on(config, calls, tmp_path):
    folder = tmp_path / "comparison"
    result = comparison.compare(config, ("sgd", "sam"), (0, 3), folder)
    assert calls == [("train", f"{method}-seed{seed}") for seed in (0, 3) for method in ("sgd", "sam")]
    for method in ("sgd", "sam"):
        for seed in (0, 3):
            written = configuration.flat(configuration.read(folder / f"{method}-seed{seed}" / "config.json"))
            assert (written["method"], written["seed"], written["rho"]) == (method, seed, 0.2)
    assert result["seeds"] == [0, 3] and set(result["table"]) == {"sgd", "sam"}
    assert json.loads((folder / "comparison.json").read_text()) == result
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    table = (folder / "table.md").read_text()
    assert table.startswith(
        "| method | test, best | test, last | noisy | clean | gap |\n|---|---|---|---|---|---|\n| sgd |"
    )
    accuracies = [files.read_json(folder / f"sam-seed{s}" / "summary.json")["last_test_accuracy"] for s in (0, 3)]
    assert result["table"]["sam"]["last_test_accuracy"]["mean"] == pytest.approx(sum(accuracies) / 2)

    # Complete runs are read; one that was cut off goes on; one that is new is trained.
    calls.clear()
    (folder / "sam-seed3" / "summary.json").unlink()
    again = comparison.compare(config, ("sgd", "sam"), (0, 3), folder)
    assert calls == [("resume", "sam-seed3")]
    assert again["table"] == result["table"]
    calls.clear()
    one = comparison.compare(config, ("sgd",), (0,), folder)
    assert calls == [] and "std" not in one["table"]["sgd"]["best_test_accuracy"]


def write_run(folder, config, accuracies):
    files.write_json(folder / "config.json", configuration.to_json(config))
    records = [{"epoch": e, "test_accuracy": a, "noisy_accuracy": a, "gap": 0.1} for e, a in enumerate(accuracies, 1)]
    files.write_json_lines(folder / "metrics.jsonl", records)
    return folder


def test_curves_of_any_runs(config, tmp_path, monkeypatch):
    drawn = []
    curves = plots.curves
    monkeypatch.setattr(plots, "curves", lambda runs, *rest: drawn.append(runs) or curves(runs, *rest))
    folders = [
        write_run(tmp_path / f"{alpha}-{seed}", replace(config, alpha=alpha, seed=seed), (0.1, 0.2 + seed / 10))
        for alpha in (0.25, 0.5)
        for seed in (0, 1)
    ]
    comparison.plot(folders, tmp_path / "alpha.pdf", "alpha", "1")
    assert (tmp_path / "alpha.pdf").read_bytes().startswith(b"%PDF")
    assert {label: [run[-1]["test_accuracy"] for run in runs] for label, runs in drawn[0].items()} == {
        "0.25": [0.2, pytest.approx(0.3)],
        "0.5": [0.2, pytest.approx(0.3)],
    }
    empty = write_run(tmp_path / "empty", config, ())
    for arguments, message in (
        ((folders, tmp_path / "a.svg", "alpha", "1"), r"a\.svg ends neither in \.png nor in \.pdf"),
        ((folders, tmp_path / "a.png", "alfa", "1"), "unknown setting 'alfa': did you mean 'alpha'"),
        ((folders, tmp_path / "a.png", "alpha", "4"), "unknown figure '4'"),
        ((folders, tmp_path / "a.png", "alpha", "shares"), "none of the runs has any of the metrics"),
        (([], tmp_path / "a.png", "alpha", "1"), "none of the runs"),
        (([empty], tmp_path / "a.png", "alpha", "1"), "empty has no metrics yet"),
        (([tmp_path / "nowhere"], tmp_path / "a.png", "alpha", "1"), "nowhere is not the folder of a run"),
    ):
        with pytest.raises(UserError, match=message):
            comparison.plot(*arguments)
    assert not (tmp_path / "a.png").exists()


def test_another_protocol_is_found_before_anything_is_trained(config, calls, tmp_path):
    folder = tmp_path / "sam-seed1"
    files.write_json(folder / "config.json", dataclasses.asdict(config) | {"method": "sam", "seed": 1, "rate": 0.2})
    with pytest.raises(
        UserError, match=r"sam-seed1 already holds a run of another configuration \(rate: 0.5 here, 0.2"
    ):
        comparison.compare(config, ("sgd", "sam"), (0, 1), tmp_path)
    assert calls == [] and [path.name for path in tmp_path.iterdir()] == ["sam-seed1"]


@pytest.mark.parametrize(
    ("methods", "seeds", "message"),
    [
        (("sgd", "sma"), (0,), "unknown method 'sma': did you mean 'sam'"),
        (("sgd", "sam", "sgd"), (0,), "--methods must be different names, got sgd sam sgd"),
        ((), (0,), "--methods must be different names, got none"),
        (("sgd",), (1, 2, 1), "--seeds must be different numbers, got 1 2 1"),
        (("sgd",), (), "--seeds must be different numbers, got none"),
    ],
)
def test_impossible_comparisons(config, calls, tmp_path, methods, seeds, message):
    with pytest.raises(UserError, match=message):
        comparison.compare(config, methods, seeds, tmp_path / "comparison")
    assert calls == [] and not (tmp_path / "comparison").exists()


SUMMARIES = [
    {"best_test_accuracy": 0.5, "last_gap": 0.2, "seconds": 3},
    {"best_test_accuracy": 0.7, "last_gap": 0.2, "seconds": 4},
    {"best_test_accuracy": 0.9, "seconds": 5},
]


def test_mean_and_standard_deviation_over_seeds():
    row = tables.spreads(SUMMARIES, comparison.COLUMNS)
    assert row == {
        "best_test_accuracy": {"mean": pytest.approx(0.7), "std": pytest.approx(0.2)},
        "last_gap": {"mean": 0.2, "std": 0.0},
    }
    assert tables.spreads(SUMMARIES[:1], comparison.COLUMNS) == {
        "best_test_accuracy": {"mean": 0.5},
        "last_gap": {"mean": 0.2},
    }


def test_the_table_leaves_out_what_no_method_has(capsys, tmp_path):
    table = {
        "sgd": tables.spreads(SUMMARIES, comparison.COLUMNS),
        "sam": tables.spreads(SUMMARIES[2:], comparison.COLUMNS),
    }
    assert comparison.markdown(table) == (
        "| method | test, best | gap |\n|---|---|---|\n| sgd | 70.0 ± 20.0 | 20.0 ± 0.0 |\n| sam | 90.0 |  |\n"
    )
    comparison.show({"table": table, "seeds": [0, 1, 2]}, tmp_path)
    shown = capsys.readouterr().out
    assert "70.0 ± 20.0" in shown and "test, best" in shown and "noisy" not in shown and str(tmp_path) in shown


@pytest.mark.slow
def test_methods_memorize_and_generalize_in_the_expected_order(tmp_path):
    protocol = replace(DIGITS, epochs=60, evaluate_every=60)
    summaries = comparison.compare(protocol, ("sgd", "sam", "saner"), (0,), tmp_path)["summaries"]
    (sgd,), (sam,), (saner,) = (summaries[name] for name in ("sgd", "sam", "saner"))
    assert sgd["last_noisy_accuracy"] > sam["last_noisy_accuracy"] > saner["last_noisy_accuracy"]
    assert sgd["last_test_accuracy"] < min(sam["last_test_accuracy"], saner["last_test_accuracy"])
