"""What finds wrong labels: what is trained is what `suspects` trains; the choice and the tables by hand."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks import wrong_labels
from benchmarks.wrong_labels import IN, OUT, Cell, Combination, Material, Training
from examples.noisy_images import data
from examples.noisy_images.config import OWN, replace
from examples.noisy_images.measures import sample_history
from examples.noisy_images.suspects import cross_validation, search
from examples.noisy_images.training import run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]

# Batches that eight devices can share.
MATERIAL = Material(digits=136, cifar=40, epochs=2)
ENVIRONMENT = {"command": "python -m benchmarks.wrong_labels", "date": "2026-11-27T00:00:00+00:00", "device": "a CPU"}
ENVIRONMENT |= {"versions": {"jax": "0.0", "torch": None}}


# --- what is trained ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "cell.npz"
    wrong_labels.write_cell(Cell("other digits", "symmetric", 0.2, 7), MATERIAL, path)
    return search.of_source(path, replace(OWN, method="saner", seed=7, epochs=2))


def test_it_is_what_a_run_of_the_program_trains(config, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_optional", lambda write: None)
    run.run_one(config, tmp_path / "run")
    expected, history = sample_history.read(tmp_path / "run"), wrong_labels.in_sample(config)
    for field in dataclasses.fields(sample_history.History):
        ours, theirs = getattr(history, field.name), getattr(expected, field.name)
        np.testing.assert_array_equal(np.asarray(ours, theirs.dtype), theirs)
    probabilities, labels = wrong_labels.out_of_sample(config)
    np.testing.assert_array_equal(labels, expected.labels)
    np.testing.assert_array_equal(probabilities, cross_validation.out_of_sample(tmp_path / "run", wrong_labels.FOLDS))


def test_the_two_parts_of_the_digits_share_no_image():
    ours, others = (
        wrong_labels.samples(name, 0, dataclasses.replace(MATERIAL, digits=800))[2]
        for name in ("digits", "other digits")
    )
    assert len(ours) == len(others) == 800
    # A few of all 1,797 images look alike.
    from sklearn.datasets import load_digits

    images = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)[..., None]
    alike = len(images) - len({image.tobytes() for image in images})
    assert len({image.tobytes() for image in ours} & {image.tobytes() for image in others}) <= alike


def test_the_two_sets_of_cells_share_no_seed_and_no_setting():
    chosen = wrong_labels.choosing_cells(range(300, 305))
    reported = wrong_labels.reported_cells(range(5), wrong_labels.CIFAR)
    assert len(chosen) == 25 and len(reported) == 5 * (24 + 3)
    assert not {cell.setting for cell in chosen} & {cell.setting for cell in reported}
    assert len({cell.file_name for cell in (*chosen, *reported)}) == len(chosen) + len(reported)
    folds_of_saner = [cell for cell in reported if Training("saner", OUT) in wrong_labels.trainings(cell, False)]
    assert {cell.dataset for cell in folds_of_saner} == {"digits", "cifar10"} and len(folds_of_saner) == 3 * (6 + 2)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "instance"])
def test_as_many_labels_are_wrong_as_the_rate_says(kind, tmp_path):
    material = dataclasses.replace(MATERIAL, digits=200)
    for name, of in (("digits", "images"), ("digits as features", "features")):
        wrong_labels.write_cell(Cell(name, kind, 0.2, 3), material, tmp_path / "cell.npz")
        with np.load(tmp_path / "cell.npz") as archive:
            assert (archive["labels"] != archive["clean_labels"]).sum() == 40 and len(archive[of]) == 200


def test_human_labels_are_those_of_the_images_of_the_subset(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    clean = rng.permutation(np.arange(200) % 10).astype(np.int32)
    given = np.where(rng.random(200) < 0.3, (clean + 1) % 10, clean)
    images = np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None, None, None], (200, 32, 32, 3))
    images = images + rng.integers(0, 50, images.shape, dtype=np.uint8)
    split = data.Split(images, clean, clean, np.arange(200))
    whole = data.Dataset("cifar10", split, split, tuple("abcdefghij"), None, (0.5,) * 3, (0.2,) * 3, 4, True)
    monkeypatch.setattr(wrong_labels, "_cifar", lambda name, data_dir: whole)
    path = tmp_path / "human.npz"
    np.savez(path, clean_label=clean, worse_label=given, aggre_label=clean)
    assert wrong_labels._files_of([str(path)]) == {"cifar10": str(path)}
    material = dataclasses.replace(MATERIAL, data_dir=str(tmp_path), human_labels=(("cifar10", str(path)),))
    places = []
    for seed in (0, 1):
        wrong_labels.write_cell(Cell("cifar10", "worse_label", None, seed), material, tmp_path / "cell.npz")
        chosen = wrong_labels.samples("cifar10", seed, material)[0]
        with np.load(tmp_path / "cell.npz") as archive:
            np.testing.assert_array_equal(archive["labels"], given[chosen.index])
            np.testing.assert_array_equal(archive["clean_labels"], clean[chosen.index])
            assert archive["features"].shape == (40, 40)
        places.append(chosen.index.tolist())
    assert places[0] != places[1]


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    """Two cells of wine, SGD alone."""
    cells = [Cell("wine", "symmetric", rate, 300) for rate in (0.1, 0.2)]
    monkeypatch.setattr(wrong_labels, "choosing_cells", lambda seeds: cells)
    monkeypatch.setattr(wrong_labels, "trainings", lambda cell, choosing: [Training("sgd", IN), Training("sgd", OUT)])
    return cells


def test_a_choice_that_goes_on(few, tmp_path, capsys, monkeypatch):
    arguments = [
        "--choose",
        "--epochs",
        "3",
        "--folder",
        str(tmp_path / "kept"),
        "--output",
        str(tmp_path / "out.json"),
    ]
    partly = wrong_labels.main([*arguments, "--seconds", "1e-9"])
    assert partly["left_out"] == 4 and partly["measured"] == []
    assert "Left out for want of time: 4 trainings" in capsys.readouterr().out
    results = wrong_labels.main(arguments)
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(json.dumps(results))
    assert [record["wrong"] for record in results["measured"]] == [17, 17, 35, 35]
    for record in results["measured"]:
        expected = {"area_under_margin", "mean_loss"} if record["where"] == IN else {"normalized_margin"}
        assert expected < record["scores"].keys()
        assert all(0 <= value <= 1 for of in record["scores"].values() for value in of.values())
    assert "Chosen on 2 cells: **sgd, " in printed and "scikit-learn" in printed
    # All of it is read, and only from measurements of this setting.
    monkeypatch.setattr(wrong_labels, "train", lambda *arguments: pytest.fail("it was measured before"))
    assert wrong_labels.main(arguments)["measured"] == results["measured"]
    capsys.readouterr()
    wrong_labels.main(["--read", str(tmp_path / "out.json")])
    assert capsys.readouterr().out.splitlines()[4:] == printed.splitlines()[4:]
    with pytest.raises(SystemExit, match="2"):
        wrong_labels.main([*arguments, "--epochs", "4"])
    assert "was measured in another setting: give another --folder" in capsys.readouterr().err


# --- the choice and the tables ------------------------------------------------------------------------------------


def record(cell, training, precisions, estimates=None, seconds=1.0):
    of_scores = {name: {"auc": value, "precision": value} for name, value in precisions.items()}
    measured = {"samples": 100, "wrong": 20, "seconds": seconds, "scores": of_scores, "estimates": estimates or {}}
    return {**cell._asdict(), **training._asdict(), **measured}


CELLS = [Cell("wine", "symmetric", 0.2, seed) for seed in range(4)]


def made_up(of_training):
    """Records of combinations by training: what each reaches on the four cells."""
    return [
        record(cell, training, {name: values[place] for name, values in of_scores.items()})
        for training, of_scores in of_training.items()
        for place, cell in enumerate(CELLS)
    ]


BEST = [0.90, 0.80, 0.90, 0.80]
NEAR = [0.88, 0.81, 0.88, 0.80]
NEARER = [0.89, 0.81, 0.89, 0.80]
WORSE = [0.80, 0.71, 0.80, 0.70]


@pytest.mark.parametrize(
    ("of_training", "chosen"),
    [
        # The best, where cheaper ones are worse.
        ({Training("saner", OUT): {"a": BEST}, Training("sgd", IN): {"a": WORSE}}, (Training("saner", OUT), "a")),
        # A cheaper one that is not.
        ({Training("saner", OUT): {"a": BEST}, Training("sgd", OUT): {"a": NEAR}}, (Training("sgd", OUT), "a")),
        # Of several that cost the same the best.
        (
            {Training("saner", IN): {"a": BEST}, Training("sgd", IN): {"a": NEAR, "b": NEARER}},
            (Training("sgd", IN), "b"),
        ),
        # The folds come on top of a run.
        ({Training("saner", IN): {"a": NEAR}, Training("sgd", OUT): {"a": BEST}}, (Training("saner", IN), "a")),
    ],
)
def test_the_criterion(of_training, chosen):
    values = wrong_labels.Values(made_up(of_training), wrong_labels.precisions)
    assert wrong_labels.choose(values)[0] == Combination(*chosen)


def test_what_was_not_measured_everywhere_is_not_chosen():
    measured = made_up({Training("saner", OUT): {"a": BEST}, Training("saner", IN): {"a": WORSE}})
    chosen, behind = wrong_labels.choose(wrong_labels.Values(measured[1:], wrong_labels.precisions))
    assert chosen.training == Training("saner", IN) and len(behind) == 1


def test_an_estimate_of_none_counts_as_half_a_sample():
    one = record(CELLS[0], Training("sgd", IN), {}, {"a": 0, "b": 40, "c": 10})
    assert wrong_labels.log_ratios(one) == pytest.approx({"a": np.log(1 / 40), "b": np.log(2), "c": -np.log(2)})
    assert wrong_labels.errors(one)["b"] == wrong_labels.errors(one)["c"] == pytest.approx(-np.log(2))


def test_the_tables():
    default, folds = wrong_labels.DEFAULT.training, Training("sgd", OUT)
    score = wrong_labels.DEFAULT.name
    of_people = [Cell("cifar10", "worse_label", None, seed) for seed in range(2)]
    digits = [Cell("digits", "symmetric", rate, seed) for seed in range(2) for rate in (0.1, 0.2)]
    measured = [record(cell, default, {score: 0.8}, {"histories": 10}, 3) for cell in (*digits, *of_people)]
    measured += [
        record(cell, folds, {"normalized_margin": 0.7 + 0.1 * cell.seed}, {"off_diagonal": 40}, 9)
        for cell in digits[1:]
    ]
    # Stopped before the folds of the last setting.
    stopped = Cell("digits", "instance", 0.2, 0)
    setting = {"choose": False, "seeds": [0, 1], "digits": 60, "cifar": 40, "epochs": None}
    measured += [record(stopped, Training("sgd", IN), {"mean_loss": 0.5}, {"histories": 10})]
    results = {**ENVIRONMENT, "setting": setting, "measured": measured, "skipped": {"this": "that"}, "left_out": 3}
    lines = wrong_labels.report(results).splitlines()
    assert f"| **saner, in-sample, {score}** | 80.0 * | 80.0 |  |" in lines
    # Three of four cells: seed 0 is ten points behind, seed 1 none; the interval is that of two pairs.
    assert any(
        line.startswith("| sgd, out-of-sample, normalized_margin | 76.7 * |  | -5.0 (-68.5 to +58.5)") for line in lines
    )
    assert "| combination | symmetric 10 % | symmetric 20 % | instance 20 % |" in lines
    assert "| sgd, out-of-sample, normalized_margin | 80.0 | 75.0 |  |" in lines
    assert "| sgd, in-sample, mean_loss |  |  | 50.0 |" in lines
    assert "| **saner, in-sample, histories** | 0.50 * | 0.50 |  |" in lines
    # As far off as the default, in the other direction.
    assert any(line.startswith("| sgd, out-of-sample, off_diagonal | 2.00 * |  | +0.0") for line in lines)
    assert "| sgd, out-of-sample, seconds | 9.0 * |  |" in lines
    assert "Left out, this: that." in lines and any("3 trainings" in line for line in lines)
    assert "jax 0.0." in lines[0] and "torch" not in lines[0]
