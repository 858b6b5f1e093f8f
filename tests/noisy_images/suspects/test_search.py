"""From a source to a copy of it with decisions applied, and training with them."""

import numpy as np
import pytest
from PIL import Image

from examples.noisy_images import data
from examples.noisy_images.config import OWN, Whereabouts, replace
from examples.noisy_images.data import identity
from examples.noisy_images.errors import Interrupted, UserError
from examples.noisy_images.labels import decisions
from examples.noisy_images.labels.decisions import Decision
from examples.noisy_images.suspects import cross_validation, ranking, search
from examples.noisy_images.training import preparation, run


def decide(source, path, position=0, new=1):
    """Relabel one training sample."""
    samples = search.load(source)
    train, names = samples.train, samples.class_names
    ids, fingerprints = data.identities(train), data.fingerprints(train)
    given = names[train.labels[position]]
    decisions.write([Decision(ids[position], fingerprints[position], given, "relabel", names[new])], path)
    return ids[position]


@pytest.fixture
def tree(tmp_path):
    for split, count in (("train", 6), ("test", 3)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                image = np.full((8, 8, 3), (100 * label, 20 * i, len(split)), np.uint8)
                Image.fromarray(image).save(tmp_path / "photos" / split / name / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def arrays(tmp_path):
    rng = np.random.default_rng(0)
    values = {"features": rng.normal(size=(12, 3)), "labels": np.arange(12) % 2}
    values |= {"test_features": rng.normal(size=(4, 3)), "test_labels": np.arange(4) % 2}
    np.savez(tmp_path / "samples.npz", **values)
    return tmp_path / "samples.npz"


def test_a_copy_keeps_the_test_images(tree, tmp_path):
    decided = decide(tree, tmp_path / "decisions.csv")
    search.write_decided(tree, tmp_path / "decisions.csv", tmp_path / "cleaned")

    def files(root):
        return {str(path.relative_to(root)) for path in root.rglob("*.png")}

    moved = files(tmp_path / "cleaned") - files(tree)
    assert files(tree) - files(tmp_path / "cleaned") == {decided} and len(moved) == 1
    assert moved.pop().startswith("train/dog/")


@pytest.mark.parametrize(("train", "test"), [("TRAIN", "Val"), ("training", "testing"), ("train_images", None)])
def test_a_copy_keeps_splits_in_every_spelling(tree, tmp_path, train, test):
    (tree / "train").rename(tree / train)
    (tree / "test").rename(tree / test if test else tmp_path / "elsewhere")
    decided = decide(tree, tmp_path / "decisions.csv", position=2)
    search.write_decided(tree, tmp_path / "decisions.csv", tmp_path / "cleaned")
    assert decided == f"{train}/cat/2.png"
    there = {str(path.relative_to(tmp_path / "cleaned")) for path in (tmp_path / "cleaned").rglob("*.png")}
    here = {str(path.relative_to(tree)) for path in tree.rglob("*.png")}
    assert here - there == {decided} and there - here == {f"{train}/dog/2-2.png"}
    # What was exported is read as what it was.
    with pytest.warns(UserWarning, match="2 outside the class folders"):
        copy = search.load(tmp_path / "cleaned")
    assert np.bincount(copy.train.labels).tolist() == [5, 7] and len(copy.test) == (6 if test else 0)


def test_a_copy_of_arrays_keeps_the_test_set(arrays, tmp_path):
    decide(arrays, tmp_path / "decisions.csv")
    search.write_decided(arrays, tmp_path / "decisions.csv", tmp_path / "cleaned")
    with np.load(tmp_path / "cleaned" / "samples.npz") as copy, np.load(arrays) as original:
        assert np.flatnonzero(copy["labels"] != original["labels"]).tolist() == [0]
        np.testing.assert_array_equal(copy["test_labels"], original["test_labels"])


@pytest.mark.parametrize("kind", ["tree", "arrays"])
def test_training_sees_the_decisions(kind, request, tmp_path):
    """Also where the names of a test set of its own are those of training samples."""
    source = request.getfixturevalue(kind)
    decide(source, tmp_path / "decisions.csv")
    config = search.of_source(source, OWN)
    before = preparation.prepare(config).dataset
    after = preparation.prepare(replace(config, decisions=str(tmp_path / "decisions.csv"))).dataset
    assert np.flatnonzero(after.train.labels != before.train.labels).tolist() == [0]
    np.testing.assert_array_equal(after.test.labels, before.test.labels)


@pytest.fixture
def trained(tree, tmp_path, monkeypatch):
    """A run on a tree of images, begun there."""
    monkeypatch.setattr(run, "_optional", lambda write: None)
    config = replace(search.of_source(tree, OWN), model="mlp", width=1 / 64, epochs=1, batch_size=4, method="sgd")
    run.train(config, tmp_path / "run")
    return tmp_path / "run"


def test_files_that_did_not_change_are_hashed_once(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "_hash_files", lambda files: pytest.fail(f"{len(files)} files are read again"))
    ranking.rank([trained], tmp_path / "ranking", "mean_loss", top=2)


def test_folds_go_on_where_the_images_are_now(trained, tree, tmp_path, monkeypatch):
    """Cut off after the first of them, and the images moved since."""
    with monkeypatch.context() as patch:
        patch.setattr(run, "restored", lambda *_, **__: (_ for _ in ()).throw(Interrupted(trained, 0)))
        with pytest.raises(Interrupted):
            cross_validation.out_of_sample(trained, 2)
    first = trained / "cross-validation-2" / "fold-0"
    (first / "summary.json").unlink()
    moved = tree.rename(tmp_path / "elsewhere")
    probabilities = cross_validation.out_of_sample(trained, 2, Whereabouts(data_dir=str(moved)))
    assert probabilities.shape == (12, 2) and (first / "summary.json").exists()


def test_sources_that_are_none(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        search.of_source(tmp_path / "nothing")
    (tmp_path / "list.txt").touch()
    with pytest.raises(UserError, match=r"neither a folder of images nor an \.npz"):
        search.of_source(tmp_path / "list.txt")


def test_a_copy_of_arrays_of_objects_is_refused_in_one_line(tmp_path):
    """Loading leaves out what it does not use; a copy would have to hold it."""
    values = {"features": np.random.default_rng(0).normal(size=(12, 3)), "labels": np.arange(12) % 2}
    np.savez(tmp_path / "samples.npz", **values, notes=np.array(["a", None] * 6, dtype=object))
    with pytest.warns(UserWarning, match="arrays that are not used: notes"):
        decide(tmp_path / "samples.npz", tmp_path / "decisions.csv")
    with (
        pytest.warns(UserWarning, match="arrays that are not used"),
        pytest.raises(UserError, match="notes is an array of Python objects"),
    ):
        search.write_decided(tmp_path / "samples.npz", tmp_path / "decisions.csv", tmp_path / "cleaned")
    assert not (tmp_path / "cleaned").exists()
