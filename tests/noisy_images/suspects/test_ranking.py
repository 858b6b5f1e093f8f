"""The ranking of samples by suspicion: by hand, against scikit-learn, and on data whose truth is known."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import precision_score, roc_auc_score

from examples.noisy_images import cli, data
from examples.noisy_images.config import configure, replace
from examples.noisy_images.errors import UserError
from examples.noisy_images.measures import plots, sample_history
from examples.noisy_images.suspects import estimate, ranking, scores, suspicion
from examples.noisy_images.training import run

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(autouse=True)
def _no_figures_of_runs(monkeypatch):
    monkeypatch.setattr(run, "_optional", lambda write: None)


def history(losses, predictions, labels, clean=None):
    losses = np.asarray(losses, np.float32)
    return sample_history.History(
        np.arange(1, len(losses) + 1),
        losses,
        np.asarray(predictions, np.int16),
        np.asarray(labels, np.int32),
        None if clean is None else np.asarray(clean, np.int32),
        np.arange(len(labels)),
    )


def split(labels, clean=None, paths=None):
    count = len(labels)
    images = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 1), np.uint8)
    clean = None if clean is None else np.asarray(clean, np.int32)
    return data.Split(images, np.asarray(labels, np.int32), clean, 10 * np.arange(count), paths)


@pytest.fixture
def example():
    """Five samples of classes a, b, c; the last two have a wrong label."""
    labels, clean = [0, 1, 2, 0, 1], [0, 1, 2, 1, 2]
    one = history(
        [[1, 1, 2, 3, 4], [0, 1, 0, 2, 1]],
        [[0, 1, 1, 1, 2], [0, 1, 2, 1, 1]],
        labels,
        clean,
    )
    return one, split(labels, clean)


def rank(histories, train, score="mean_loss", out_of_sample=()):
    return suspicion.from_histories(histories, out_of_sample, score, train, ("a", "b", "c"))


# --- order --------------------------------------------------------------------------------------------------------


def test_order_and_ties_by_hand(example):
    one, train = example
    result = rank([one], train)
    assert result.values["mean_loss"].tolist() == [0.5, 1.0, 1.0, 2.5, 2.5]
    # Ties share the middle of their ranks, and keep their order.
    assert (5 * result.suspicion["mean_loss"]).tolist() == [1.0, 2.5, 2.5, 4.5, 4.5]
    assert result.order.tolist() == [3, 4, 1, 2, 0]
    assert result.suggested.tolist() == [0, 1, 1, 1, 1]
    # Those that are alike in the last epoch are told apart by the mean over all.
    assert rank([one], train, "last_loss").order.tolist() == [3, 4, 1, 2, 0]
    assert all(np.isfinite(v).all() for part in (result.suspicion, result.values) for v in part.values())


def test_several_runs_average_their_ranks_not_their_losses(example):
    one, train = example
    # A run whose losses are a thousand times larger weighs no more.
    other = dataclasses.replace(one, losses=1000 * one.losses[:, ::-1])
    result = rank([one, other], train)
    first, second = np.array([1, 2.5, 2.5, 4.5, 4.5]), np.array([4.5, 4.5, 2.5, 2.5, 1])
    np.testing.assert_allclose(5 * result.suspicion["mean_loss"], (first + second) / 2)
    assert result.order.tolist() == [1, 3, 0, 4, 2]


def test_out_of_sample_loss_is_that_of_the_given_label_and_finite(example):
    one, train = example
    probabilities = np.full((5, 3), 1 / 3, np.float32)
    probabilities[3] = [0.0, 1.0, 0.0]
    probabilities[0] = [0.5, 0.25, 0.25]
    result = rank([one], train, ranking.OUT_OF_SAMPLE, [probabilities])
    values = result.values[ranking.OUT_OF_SAMPLE]
    np.testing.assert_allclose(values[[0, 1, 2, 4]], np.log([2, 3, 3, 3]), rtol=1e-6)
    assert np.isfinite(values[3]) and values[3] > 80
    # Three are alike, of which the last has the highest mean loss.
    assert result.order.tolist() == [3, 4, 1, 2, 0]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [([0, 0], 1), ([0, 1], 2), ([0] * 6, 3), ([0, 1, 1, 2], 3), (range(40), 10_000)],
    ids=["one class", "two samples", "one label", "classes with one sample", "many classes"],
)
def test_small_and_large_data(labels, classes, tmp_path):
    labels = np.array(labels)
    names = tuple(f"class {label}" for label in range(classes))
    one = history(np.ones((3, len(labels))), np.broadcast_to(labels, (3, len(labels))), labels)
    result = suspicion.from_histories([one], [], "mean_loss", split(labels), names)
    assert result.order.tolist() == list(range(len(labels))) and result.estimate.wrong == 0
    assert not result.is_suspect.any() and result.confusions == []
    ranking.write(result, tmp_path, 4, {}, [])
    assert len(read_csv(tmp_path / "ranking.csv")) == len(labels) and (tmp_path / "index.html").is_file()


def test_the_histories_estimate_where_confident_learning_cannot(example, monkeypatch):
    one, train = example
    probabilities = [np.full((5, 3), 1 / 3, np.float32)]
    if estimate.why_not(train.labels, 3) is None:
        assert rank([one], train, out_of_sample=probabilities).estimate.method == "confident_learning"
    monkeypatch.setattr(estimate, "MAX_CLASSES", 2)
    assert rank([one], train, out_of_sample=probabilities).estimate.method == "histories"


def test_margins_rank_where_the_histories_hold_them(example):
    one, train = example
    margins = np.array([[3, 1, 2, -4, -1], [1, 1, -2, -2, 1]], np.float16)
    result = rank([dataclasses.replace(one, margins=margins)], train, "area_under_margin")
    assert result.values["area_under_margin"].tolist() == [2, 1, 0, -3, 0]
    # The lowest first, of two that are alike the one of the higher loss; the others have an order of their own.
    assert result.order.tolist() == [3, 4, 2, 1, 0]
    assert result.suspicion["area_under_margin"].argmax() == 3
    without = rank([dataclasses.replace(one, margins=margins), one], train)
    assert "area_under_margin" not in without.values


# --- probabilities of another model -------------------------------------------------------------------------------


def others(tmp_path, samples=200, classes=3):
    """Samples of which a fifth has a wrong label, and a file of what another model thinks of them."""
    rng = np.random.default_rng(0)
    clean = rng.integers(0, classes, samples)
    labels = np.where(np.arange(samples) % 5 == 0, (clean + 1) % classes, clean)
    probabilities = 0.05 + 0.85 * np.eye(classes)[clean] + 0.03 * rng.random((samples, classes))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    np.save(tmp_path / "pred_probs.npy", probabilities.astype(np.float32))
    images = rng.integers(0, 256, (samples, 6, 6, 3)).astype(np.uint8)
    train = data.Split(images, labels.astype(np.int32), clean.astype(np.int32), np.arange(samples))
    return train, tuple(f"class {label}" for label in range(classes)), tmp_path / "pred_probs.npy"


@pytest.mark.parametrize("score", ["normalized_margin", "self_confidence", "out_of_sample_loss"])
def test_probabilities_of_another_model(tmp_path, score):
    pytest.importorskip("cleanlab")
    train, names, path = others(tmp_path)
    result = ranking.rank_probabilities(path, train, names, tmp_path / "out", score, top=4)
    wrong = train.labels != train.clean_labels
    assert result.estimate.wrong == wrong.sum() == 40 and result.estimate.method == "confident_learning"
    np.testing.assert_array_equal(result.is_suspect, wrong)
    np.testing.assert_array_equal(result.suggested, train.clean_labels)
    lines = read_csv(tmp_path / "out" / "ranking.csv")
    assert [int(line["is_suspect"]) for line in lines] == [1] * 40 + [0] * 160
    assert [line["id"] for line in lines] == [str(i) for i in result.order]
    assert [line["fingerprint"] for line in lines] == [data.fingerprints(train)[i] for i in result.order]
    # The columns hold the scores as they are, also those that fall with the suspicion.
    first, last = lines[0], lines[-1]
    assert float(first["self_confidence"]) < float(last["self_confidence"])
    assert float(first["out_of_sample_loss"]) > float(last["out_of_sample_loss"])
    quality = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert quality["suspects_are_wrong"] == 1 and quality["estimated_wrong"] == 40
    assert quality["scores"][score]["auc"] == 1
    estimated = json.loads((tmp_path / "out" / "estimate.json").read_text())
    assert estimated["wrong"] == 40 and estimated["confused_classes"][0]["given"].startswith("class")
    assert not (tmp_path / "out" / "pred_probs_in_sample.npy").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p[:-1], r"the shape \(199, 3\) where \(200, 3\) is expected, samples by classes"),
        (lambda p: p[:, :2], r"the shape \(200, 2\)"),
        (lambda p: np.log(p), "take the softmax of logits"),
        (lambda p: p * 2, "sums to 2 where 1 is expected"),
        (lambda p: np.where(p > 0.9, np.nan, p), "must be finite floats"),
        (lambda p: (p * 100).astype(int), r"\(int64\) must be finite floats"),
        (lambda p: p.astype(object), "cannot read"),
        (lambda p: p[0], r"the shape \(3,\)"),
    ],
)
def test_what_is_no_probabilities_of_these_samples(tmp_path, change, message):
    train, names, path = others(tmp_path)
    np.save(path, change(np.load(path)))
    with pytest.raises(UserError, match=message) as error:
        ranking.rank_probabilities(path, train, names, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_files_that_are_no_probabilities(tmp_path):
    train, names, path = others(tmp_path)
    np.savez(tmp_path / "several.npz", a=np.zeros(2))
    (tmp_path / "cut.npy").write_bytes(path.read_bytes()[:100])
    for name, message in (("none.npy", "cannot read"), ("cut.npy", "cannot read"), ("several.npz", "several arrays")):
        with pytest.raises(UserError, match=message):
            ranking.rank_probabilities(tmp_path / name, train, names, tmp_path / "out")
    with pytest.raises(UserError, match="unknown score 'mean_loss'"):
        ranking.rank_probabilities(path, train, names, tmp_path / "out", "mean_loss")


# --- quality ------------------------------------------------------------------------------------------------------


def test_quality_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    clean = rng.integers(0, 3, 200)
    wrong = rng.random(200) < 0.3
    labels = np.where(wrong, (clean + 1) % 3, clean)
    losses = rng.random((4, 200)) + 0.5 * wrong
    one = history(losses, rng.integers(0, 3, (4, 200)), labels, clean)
    result = rank([one], split(labels, clean))
    measured = suspicion.quality(result)
    assert measured["wrong"] == wrong.sum() and measured["samples"] == 200
    for name, measure in scores.SCORES.items():
        assert measured["scores"][name]["auc"] == pytest.approx(roc_auc_score(wrong, measure(one)))
    first = np.zeros(200, bool)
    first[result.order[: wrong.sum()]] = True
    assert measured["scores"]["mean_loss"]["precision"] == pytest.approx(precision_score(wrong, first))
    assert 0.7 < measured["scores"]["mean_loss"]["auc"] < 1
    suggestion = sample_history.most_predicted([one], 3)
    assert measured["suggestion_is_true"] == pytest.approx((suggestion == clean)[wrong].mean())


def test_precision_with_ties_is_the_mean_over_random_orders():
    wrong = np.array([True, False, True, False, False, True])
    assert suspicion.precision(wrong, np.ones(6)) == 0.5
    # Two above the border, one of them wrong; then one of three, one of which is wrong.
    assert suspicion.precision(wrong, np.array([3, 3, 2, 2, 2, 1])) == pytest.approx((1 + 1 / 3) / 3)
    rng = np.random.default_rng(0)
    wrong, values = rng.random(40) < 0.4, rng.integers(0, 4, 40)
    count = wrong.sum()
    orders = [wrong[np.lexsort((rng.random(40), -values))[:count]].mean() for _ in range(4000)]
    assert suspicion.precision(wrong, values) == pytest.approx(np.mean(orders), abs=0.01)


@pytest.mark.parametrize("clean", [None, [0, 1, 2, 0, 1], [1, 2, 0, 1, 2]], ids=["unknown", "none", "all"])
def test_no_quality_without_right_and_wrong_labels(example, clean):
    one, train = example
    clean = None if clean is None else np.asarray(clean, np.int32)
    assert suspicion.quality(rank([one], dataclasses.replace(train, clean_labels=clean))) is None


# --- files --------------------------------------------------------------------------------------------------------


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_csv_comes_back(example, tmp_path):
    one, train = example
    names = ('a, "quoted"', "b\nb", "ç")
    paths = tuple(str(tmp_path / f"{name}, 1.png") for name in "vwxyz")
    for path in paths:
        Path(path).write_text(path)
    result = suspicion.from_histories([one], [], "mean_loss", dataclasses.replace(train, paths=paths), names)
    suspicion.write_csv(result, tmp_path / "ranking.csv")
    lines = read_csv(tmp_path / "ranking.csv")
    assert [int(line["rank"]) for line in lines] == [1, 2, 3, 4, 5]
    assert [int(line["index"]) for line in lines] == [30, 40, 10, 20, 0]
    assert [line["file"] for line in lines] == [paths[i] for i in result.order]
    for line, i in zip(lines, result.order, strict=True):
        for column, labels in (("given", train.labels), ("suggested", result.suggested), ("true", train.clean_labels)):
            assert int(line[f"{column}_label"]) == labels[i] and line[f"{column}_name"] == names[labels[i]]
        assert bool(int(line["is_wrong"])) == (i >= 3)
        assert bool(int(line["is_suspect"])) == result.is_suspect[i]
        assert (line["id"], line["fingerprint"]) == (result.ids[i], result.fingerprints[i])
        for name, values in result.values.items():
            assert float(line[name]) == pytest.approx(values[i], rel=1e-5)
        assert float(line["suspicion"]) == pytest.approx(result.suspicion["mean_loss"][i], rel=1e-5)


def test_the_csv_without_truth_and_files(example, tmp_path):
    one, train = example
    suspicion.write_csv(rank([one], dataclasses.replace(train, clean_labels=None)), tmp_path / "ranking.csv")
    columns = read_csv(tmp_path / "ranking.csv")[0].keys()
    assert not {"file", "true_label", "true_name", "is_wrong"} & columns
    assert {"given_label", "suggested_name", *ranking.SCORES} <= columns


def test_the_contact_sheet_has_the_images_in_order(example, tmp_path, monkeypatch):
    one, train = example
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    ranking.contact_sheet(rank([one], train), 3, tmp_path / "suspects.png")
    shown = [axes for axes in figures[0].axes if axes.get_images()]
    for axes, i in zip(shown, [3, 4, 1], strict=True):
        np.testing.assert_array_equal(axes.get_images()[0].get_array(), train.images[i, ..., 0])
    assert [axes.texts[0].get_text() for axes in shown] == ["#1 a\n→ b", "#2 b\n→ b", "#3 b\n→ b"]


@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 32, 3), (224, 224, 3)])
def test_a_sheet_shows_the_pixels_of_every_kind_of_image(shape):
    images = list(np.random.default_rng(0).integers(0, 256, (11, *shape), np.uint8))
    names = [f"costs $1$ {number}" for number in range(11)]
    figure = plots.contact_sheet_figure(images, names, "title")
    shown = [axes for axes in figure.axes if axes.get_images()]
    assert len(shown) == 11 and len(figure.axes) == 16
    for axes, image, name in zip(shown, images, names, strict=True):
        (drawn,) = axes.get_images()
        np.testing.assert_array_equal(drawn.get_array(), image[..., 0] if shape[-1] == 1 else image)
        assert drawn.get_clim() == (0, 255) and axes.texts[0].get_text() == name
        assert not axes.texts[0].get_parse_math()
    figure.canvas.draw()


# --- whole runs ---------------------------------------------------------------------------------------------------

DIGITS = configure(
    dataset="digits",
    subset=600,
    test_subset=60,
    noise="symmetric",
    rate=0.3,
    noise_seed=0,
    model="mlp",
    width=1 / 16,
    method="sgd",
    batch_size=50,
    epochs=12,
    learning_rate=0.05,
    weight_decay=0.0,
    checkpoint_every=1000,
)


@pytest.fixture(scope="module")
def two_seeds(tmp_path_factory):
    folders = [tmp_path_factory.mktemp("runs") / f"seed{seed}" for seed in (0, 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_optional", lambda write: None)
        for seed, folder in enumerate(folders):
            run.train(replace(DIGITS, seed=seed), folder)
    return folders


def test_wrong_digits_are_found(two_seeds, capsys):
    cli.main(["rank", str(two_seeds[0]), "--top", "5"])
    output = two_seeds[0] / "ranking"
    assert {path.name for path in output.iterdir()} == {
        *("ranking.csv", "suspects.png", "labels.npy", "pred_probs_in_sample.npy", "quality.json"),
        *("estimate.json", "index.html", "pages"),
    }
    measured = json.loads((output / "quality.json").read_text())
    assert measured["wrong"] == 180 and measured["runs"] == [str(two_seeds[0])]
    # Chance is an area of 0.5 and a precision of 0.3.
    assert measured["scores"]["mean_loss"]["auc"] > 0.9
    assert measured["scores"]["mean_loss"]["precision"] > 0.75
    assert all(values["auc"] > 0.75 for values in measured["scores"].values())
    lines = read_csv(output / "ranking.csv")
    wrong = np.array([int(line["is_wrong"]) for line in lines])
    # In the order of the default score, and of the mean loss among those that it cannot tell apart.
    assert len(lines) == 600 and measured["score"] == "disagreement"
    keys = [(float(line["disagreement"]), float(line["mean_loss"])) for line in lines]
    assert keys == sorted(keys, reverse=True) and len({key[0] for key in keys}) < 40
    assert abs(wrong[:180].mean() - measured["scores"]["disagreement"]["precision"]) < 0.05
    # Against the data itself.
    train = run.prepare(DIGITS).dataset.train
    by_index = {
        int(i): (int(given), int(true))
        for i, given, true in zip(train.index, train.labels, train.clean_labels, strict=True)
    }
    assert {int(x["index"]): (int(x["given_label"]), int(x["true_label"])) for x in lines} == by_index
    suspects = np.array([int(line["is_suspect"]) for line in lines])
    estimated = json.loads((output / "estimate.json").read_text())
    assert suspects[: suspects.sum()].all() and suspects.sum() == estimated["wrong"] == measured["estimated_wrong"]
    text = capsys.readouterr().out
    assert f"estimated wrong: {estimated['wrong']} of 600" in text
    assert "in-sample" in text and "area under ROC" in text and f"written: {output}" in text
    for line in lines[:3]:
        assert f" {line['index']} " in text


def test_several_seeds_rank_together(two_seeds, tmp_path):
    result = ranking.rank(two_seeds, tmp_path / "both", "mean_loss", top=3)
    ranks = [ranking.rank([folder], tmp_path / folder.name, "mean_loss", top=3).suspicion for folder in two_seeds]
    np.testing.assert_allclose(
        result.suspicion["mean_loss"], (ranks[0]["mean_loss"] + ranks[1]["mean_loss"]) / 2, rtol=1e-12
    )
    assert (ranks[0]["mean_loss"] != ranks[1]["mean_loss"]).any()


def test_runs_rank_by_their_margins_where_all_have_kept_them(two_seeds, tmp_path):
    result = ranking.rank(two_seeds, tmp_path / "both", "area_under_margin", top=1)
    means = [sample_history.read(folder).margins.mean(axis=0, dtype=np.float64) for folder in two_seeds]
    np.testing.assert_allclose(result.values["area_under_margin"], np.mean(means, axis=0), rtol=1e-9)
    assert suspicion.quality(result)["scores"]["area_under_margin"]["auc"] > 0.6
    # A run of an earlier version.
    earlier = tmp_path / "earlier"
    shutil.copytree(two_seeds[1], earlier)
    for path in (earlier / "samples").glob("epochs-*.npz"):
        with np.load(path) as archive:
            arrays = {name: archive[name] for name in archive.files if name != "margins"}
        np.savez(path, **arrays)
    runs = [two_seeds[0], earlier]
    with pytest.raises(UserError, match="--score area_under_margin needs the margins, which these runs did not keep"):
        ranking.rank(runs, tmp_path / "out", "area_under_margin", top=1)
    assert not (tmp_path / "out").exists()
    assert "area_under_margin" not in ranking.rank(runs, tmp_path / "out", "mean_loss", top=1).values


def test_arrays_are_as_cleanlab_reads_them(two_seeds, tmp_path):
    ranking.rank(two_seeds[:1], tmp_path, "last_loss", top=1)
    labels = np.load(tmp_path / "labels.npy")
    probabilities = np.load(tmp_path / "pred_probs_in_sample.npy")
    assert labels.shape == (600,) and np.issubdtype(labels.dtype, np.integer) and set(labels) == set(range(10))
    assert probabilities.shape == (600, 10) and probabilities.dtype == np.float32
    assert np.isfinite(probabilities).all() and (probabilities >= 0).all() and (probabilities <= 1).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    # In the order of the labels: of the same network as the history's last epoch.
    history = sample_history.read(two_seeds[0])
    np.testing.assert_allclose(-np.log(probabilities[np.arange(600), labels]), history.losses[-1], atol=1e-4)
    np.testing.assert_array_equal(labels, history.labels)


def test_what_does_not_belong_together(two_seeds, tmp_path):
    other = tmp_path / "other"
    run.train(replace(DIGITS, noise_seed=1, epochs=1), other)
    with pytest.raises(UserError, match="other given labels: rank runs together that differ in --seed alone"):
        ranking.rank([two_seeds[0], other], tmp_path / "out", "mean_loss", top=1)
    with pytest.raises(UserError, match="unknown score 'mean': did you mean 'mean_loss'"):
        ranking.rank(two_seeds, tmp_path / "out", "mean", top=1)
    with pytest.raises(UserError, match="needs the folds: add --cross-validate 5"):
        ranking.rank(two_seeds, tmp_path / "out", ranking.OUT_OF_SAMPLE, top=1)
    with pytest.raises(UserError, match="--top must be at least 1, got 0"):
        ranking.rank(two_seeds, tmp_path / "out", "mean_loss", top=0)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        cli.main(["rank"])


def write_photographs(root, streamed):
    """Fourteen dark and fourteen light images, one of each in the other's folder."""
    rng = np.random.default_rng(0)
    for name, level in (("dark", 20), ("light", 200)):
        for number in range(14):
            shown = 220 - level if number == 0 else level
            size = (20 + number * streamed, 30, 3)
            path = root / name / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((shown + rng.integers(0, 30, size)).astype(np.uint8)).save(path)


@pytest.mark.parametrize("streamed", [False, True])
def test_own_folder_of_images(tmp_path, streamed, capsys):
    write_photographs(tmp_path / "images" / "train", streamed)
    write_photographs(tmp_path / "images" / "test", streamed)
    own = configure(
        dataset="folder",
        data_dir=str(tmp_path / "images"),
        image_size=16 if streamed else None,
        workers=0,
        noise="none",
        model="mlp",
        width=1 / 32,
        method="sgd",
        batch_size=14,
        epochs=6,
        learning_rate=0.05,
        flip=False,
        crop_padding=0,
    )
    run.train(own, tmp_path / "run")
    cli.main(["rank", str(tmp_path / "run"), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "quality.json").exists()
    lines = read_csv(tmp_path / "out" / "ranking.csv")
    # The two in the wrong folder, with the right suggestion and a file that is theirs.
    found = {(line["file"], line["given_name"], line["suggested_name"]) for line in lines[:2]}
    root = tmp_path / "images" / "train"
    assert found == {
        (str(root / "dark" / "00.png"), "dark", "light"),
        (str(root / "light" / "00.png"), "light", "dark"),
    }
    for line in lines:
        brightness = np.asarray(Image.open(line["file"])).mean()
        assert (brightness > 128) == (line["suggested_name"] == "light")
    text = capsys.readouterr().out
    assert "dark/00.png" in text and "area under ROC" not in text
    with Image.open(tmp_path / "out" / "suspects.png") as sheet:
        assert sheet.width > 500


def test_an_estimate_of_a_network_that_has_learned_little_is_doubted(example, tmp_path, capsys):
    """Guessing three classes has a loss of 1.1."""
    one, train = example
    ranking.show(rank([one], train), tmp_path)
    assert "ended at 0.80, where guessing has 1.10: the network has learned little" in capsys.readouterr().err
    learned = dataclasses.replace(one, losses=one.losses / 2)
    ranking.show(rank([learned], train), tmp_path)
    assert "learned little" not in capsys.readouterr().err
