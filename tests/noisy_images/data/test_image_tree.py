"""Which folders are splits and classes, which files are images, and what is said of the rest."""

import os
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image

from examples.noisy_images import data
from examples.noisy_images.data import image_tree
from examples.noisy_images.errors import UserError


def _class_folders(root, classes=("elm", "oak"), count=5, suffix=".png"):
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            seed = [count, i, *name.encode()]
            pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}{suffix}")
    return root


def _read(root):
    """Return the tree and what was said of files that were left out."""
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        tree = image_tree.read(root)
    assert len(notes) <= 1
    return tree, " ".join(str(note.message) for note in notes)


@pytest.mark.parametrize(
    ("training", "other"),
    [
        ("train", "VALIDATION"),
        ("training_set", "test_set"),
        ("Train", "Holdout"),
        ("TRAINING", "Testing"),
        ("train2017", "val2017"),
        ("images_train", "images_eval"),
        ("trn", "tst"),
        ("train-data", "dev"),
    ],
)
def test_splits_in_their_usual_spellings(tmp_path, training, other):
    _class_folders(tmp_path / training)
    _class_folders(tmp_path / other, count=2)
    tree, said = _read(tmp_path)
    assert (len(tree.train), len(tree.test), tree.class_names, said) == (10, 4, ("elm", "oak"), "")
    assert f"trained on '{training}', tested on '{other}'" in data.load("folder", data_dir=tmp_path).description


def test_of_a_test_and_a_validation_folder_the_test_folder_counts(tmp_path):
    for name, count in (("train", 5), ("valid", 3), ("test", 2)):
        _class_folders(tmp_path / name, count=count)
    tree, said = _read(tmp_path)
    assert len(tree.test) == 4 and "6 in 'valid', neither training nor test set" in said


def test_a_test_folder_without_classes_has_no_labels(tmp_path):
    _class_folders(tmp_path / "train")
    _class_folders(tmp_path, ["test"], count=7)
    tree, said = _read(tmp_path)
    assert tree.test is None and "7 in 'test', without class folders" in said
    _class_folders(tmp_path / "val", count=2)
    tree, said = _read(tmp_path)
    assert len(tree.test) == 4 and "7 in 'test', without class folders" in said


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("train", "Training", "test"), "several folders of training images .*keep one"),
        (("train", "val", "Valid"), "several folders of validation images .*keep one"),
        (("valid", "dev"), "no folder of training images: name it train"),
        (("test",), "no folder of training images"),
    ],
)
def test_splits_that_are_not_clear_are_refused(tmp_path, folders, message):
    for name in folders:
        _class_folders(tmp_path / name)
    with pytest.raises(UserError, match=message) as raised:
        image_tree.read(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["train", "Test", "dev"])
def test_a_class_may_have_the_name_of_a_split(tmp_path, name):
    _class_folders(tmp_path, ["bus", "car", name])
    tree, _ = _read(tmp_path)
    assert set(tree.class_names) == {"bus", "car", name} and len(tree.train) == 15 and tree.test is None
    assert f"'{name}' taken for a class" in tree.layout


def test_a_folder_that_may_be_a_split_or_a_class_is_refused(tmp_path):
    _class_folders(tmp_path, ["bus", "car"])
    _class_folders(tmp_path / "train", ["steam", "electric"])
    with pytest.raises(UserError, match=r"two ways: is 'train' a split .* or a class like 'bus', 'car'\?"):
        image_tree.read(tmp_path)


def test_folders_beside_the_splits_are_counted(tmp_path):
    _class_folders(tmp_path / "train")
    _class_folders(tmp_path / "test")
    _class_folders(tmp_path, ["unlabelled"], count=9)
    (tmp_path / "annotations").mkdir()
    tree, said = _read(tmp_path)
    assert (len(tree.train), len(tree.test)) == (10, 10)
    assert "9 in 'unlabelled', neither training nor test set" in said and "annotations" not in said


def test_hidden_files_are_no_images_and_all_that_is_left_out_is_counted_by_reason(tmp_path):
    _class_folders(tmp_path)
    shutil.copytree(tmp_path / "elm", tmp_path / "oak" / ".thumbnails")
    shutil.copy(tmp_path / "elm" / "0.png", tmp_path / "oak" / "._1.png")
    shutil.copytree(tmp_path / "elm", tmp_path / "__MACOSX" / "elm")
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store"):
        (tmp_path / "elm" / name).write_bytes(b"?")
    for name in ("elm/a.txt", "elm/b.TXT", "oak/c.mp4", "oak/README", "labels.csv"):
        (tmp_path / name).write_text("?")
    os.symlink(tmp_path / "nowhere.png", tmp_path / "oak" / "link.png")
    tree, said = _read(tmp_path)
    assert tree.class_names == ("elm", "oak") and len(tree.train) == 10
    for part in ("6 hidden", "2 ending in .txt", "1 ending in .mp4", "1 without an ending", "1 a broken link"):
        assert part in said
    assert "1 outside the class folders" in said


@pytest.mark.parametrize("suffix", [".JPG", ".jfif", ".jpe", ".avif", ".pgm", ".tga", ".jp2", ".dib", ".webp"])
def test_every_ending_that_pillow_reads_counts(tmp_path, suffix):
    _class_folders(tmp_path, suffix=".png")
    for path in tmp_path.rglob("*.png"):
        with Image.open(path) as image:
            image = image.convert("L") if suffix == ".pgm" else image
            image.save(path.with_suffix(suffix))
        path.unlink()
    loaded = data.load("folder", data_dir=tmp_path, test_share=0)
    assert len(loaded.train) == 10 and loaded.image_shape == (8, 8, 3)


def test_linked_folders_are_followed_but_not_in_circles(tmp_path):
    root = _class_folders(tmp_path / "root")
    _class_folders(tmp_path / "elsewhere", ["more"], count=3)
    os.symlink(tmp_path / "elsewhere" / "more", root / "elm" / "linked")
    os.symlink(tmp_path / "elsewhere" / "more", root / "fir")
    os.symlink(root, root / "oak" / "loop")
    tree, said = _read(root)
    assert tree.class_names == ("elm", "fir", "oak")
    assert np.bincount([label for _, label in tree.train])[:2].tolist() == [8, 3]
    assert "a link to a folder that it lies in" in said


def test_a_folder_around_the_data_is_pointed_out(tmp_path):
    _class_folders(tmp_path / "unpacked")
    with pytest.raises(UserError, match=r"has 1 class folders .* Is it .*unpacked that you mean\?"):
        image_tree.read(tmp_path)


def test_a_class_that_cannot_be_read_is_refused(tmp_path):
    _class_folders(tmp_path)
    for path in (tmp_path / "oak").iterdir():
        path.write_bytes(b"?")
    with pytest.warns(UserWarning, match="left out 5 of 10"), pytest.raises(UserError, match=r"1 classes .* \(oak\)"):
        data.load("folder", data_dir=tmp_path, skip_corrupt=True)


def test_an_added_image_moves_no_other_into_the_test_set(tmp_path):
    _class_folders(tmp_path, count=40)
    before = set(data.identities(data.load("folder", data_dir=tmp_path).test))
    Image.new("RGB", (8, 8)).save(tmp_path / "elm" / "00.png")
    after = set(data.identities(data.load("folder", data_dir=tmp_path).test))
    assert len(before) == 16 and len(before & after) >= 15


def test_class_names_that_are_not_utf_8_are_printable(tmp_path):
    _class_folders(tmp_path)
    os.rename(os.fsencode(tmp_path / "oak"), os.fsencode(tmp_path) + b"/ch\xeane")
    loaded = data.load("folder", data_dir=tmp_path)
    assert loaded.class_names == ("ch\\xeane", "elm") and loaded.description.encode()


@pytest.mark.parametrize(
    "names", [("Elm", "elm"), ("caf\u00e9", "cafe\u0301"), ("red oak", "red oak "), ("a b", "a  b")]
)
def test_classes_that_look_alike_are_said(tmp_path, names):
    tree, said = _read(_class_folders(tmp_path, (*names, "oak")))
    assert sorted(tree.class_names) == sorted((*names, "oak"))
    assert "has classes whose names look alike" in said and all(repr(name) in said for name in names)
    assert "'oak'" not in said


@pytest.mark.parametrize("target", ["..", "../..", "../elm", "deep/.."])
def test_a_link_to_where_a_class_lies_makes_no_other_class_part_of_it(tmp_path, target):
    """However far up it leads; one to another folder is followed."""
    root = _class_folders(tmp_path / "set" / "train")
    (root / "oak" / "deep").mkdir()
    (root / "oak" / "more").symlink_to(target)
    tree, said = _read(tmp_path / "set" / "train")
    linked = target == "../elm"
    assert [label for _, label in tree.train].count(1) == (10 if linked else 5)
    assert ("1 a link to a folder that it lies in" in said) != linked


@pytest.mark.parametrize(("train", "empty"), [("train", "test"), ("TRAINING", "Validation")])
def test_a_test_folder_without_images_is_refused(tmp_path, train, empty):
    _class_folders(tmp_path / train)
    (tmp_path / empty / "elm").mkdir(parents=True)
    with pytest.raises(UserError, match=f"has '{empty}' without images to test on: fill or remove it"):
        image_tree.read(tmp_path)
