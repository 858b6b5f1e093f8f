"""Mini-WebVision on small trees in its official layout."""

import numpy as np
import pytest
from PIL import Image

from examples.noisy_images import data
from examples.noisy_images.data.image_files import ImageFiles
from examples.noisy_images.errors import UserError

_SYNSETS = [f"n{1440764 + i:08d} name {i}, also {i}" for i in range(60)]


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "webvision"
    (root / "info").mkdir(parents=True)
    (root / "info" / "synsets.txt").write_text("\n".join(_SYNSETS) + "\n")
    train = [(f"google/q{label:04d}/a b{label}.jpg", label) for label in (0, 55, 3, 49, 50, 3)]
    train[-1] = ("google/q0003/other.jpg", 3)
    test = [(f"val{i:06d}.jpg", label) for i, label in enumerate((49, 999, 0))]
    (root / "info" / "train_filelist_google.txt").write_text("".join(f"{name} {label}\n" for name, label in train))
    (root / "info" / "val_filelist.txt").write_text("".join(f"{name} {label}\n" for name, label in test))
    for name, label in [*train, *((f"val_images_256/{name}", label) for name, label in test)]:
        # Images of the classes that are left out are not looked at.
        if label < 50:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (30 + label, 40), (label, 0, 0)).save(root / name)
    return root


def test_load(tree):
    loaded = data.load("mini_webvision", data_dir=tree)
    assert isinstance(loaded.train.images, ImageFiles) and loaded.train.streamed
    assert loaded.num_classes == 50 and loaded.class_names[49] == "name 49"
    assert loaded.image_shape == (224, 224, 3)
    np.testing.assert_array_equal(loaded.train.labels, [0, 3, 49, 3])
    np.testing.assert_array_equal(loaded.train.index, [0, 2, 3, 5])
    np.testing.assert_array_equal(loaded.test.labels, [49, 0])
    assert loaded.train.clean_labels is None and loaded.test.clean_labels is None
    assert loaded.train.images[2].shape == (40, 79, 3)
    assert loaded.train.images.paths[3].endswith("google/q0003/other.jpg")
    assert (loaded.crop_padding, loaded.flip) == (0, True)
    assert data.load("mini_webvision", data_dir=tree, image_size=64).image_shape == (64, 64, 3)


def test_the_resized_release(tree):
    (tree / "google").rename(tree / "google_resized_256")
    loaded = data.load("mini_webvision", data_dir=tree)
    assert loaded.train.images.paths[0].endswith("google_resized_256/q0000/a b0.jpg")


def test_imagenet_validation(tree, tmp_path):
    folder = tmp_path / "imagenet"
    for line in reversed(_SYNSETS):
        (folder / line.split()[0]).mkdir(parents=True)
    for label in (7, 2):
        for name in ("b.JPEG", "a.JPEG"):
            Image.new("RGB", (8, 8)).save(folder / _SYNSETS[label].split()[0] / name)
    loaded = data.load("mini_webvision", data_dir=tree, validation_dir=folder)
    np.testing.assert_array_equal(loaded.test.labels, [2, 2, 7, 7])
    np.testing.assert_array_equal(loaded.test.clean_labels, loaded.test.labels)
    assert loaded.test.images.paths[0].endswith("a.JPEG")

    (folder / _SYNSETS[4].split()[0]).rmdir()
    with pytest.raises(UserError, match=r"no folder for 1 of 50 classes \(n01440768\)"):
        data.load("mini_webvision", data_dir=tree, validation_dir=folder)
    with pytest.raises(UserError, match="none' does not exist"):
        data.load("mini_webvision", data_dir=tree, validation_dir=tmp_path / "none")
    (tree / "info" / "synsets.txt").unlink()
    with pytest.raises(UserError, match=r"has no info/synsets\.txt"):
        data.load("mini_webvision", data_dir=tree, validation_dir=folder)


def test_missing_and_corrupt_images(tree):
    (tree / "google" / "q0000" / "a b0.jpg").unlink()
    (tree / "val_images_256" / "val000002.jpg").write_bytes(b"?")
    with pytest.raises(UserError, match=r"2 of 6 images cannot be read .*a b0\.jpg, .*val000002\.jpg"):
        data.load("mini_webvision", data_dir=tree)
    for _ in range(2):
        with pytest.warns(UserWarning, match="left out 2 of 6"):
            loaded = data.load("mini_webvision", data_dir=tree, skip_corrupt=True)
        np.testing.assert_array_equal(loaded.train.index, [2, 3, 5])
        np.testing.assert_array_equal(loaded.test.labels, [49])


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("info/train_filelist_google.txt", None, r"has no info/train_filelist_google\.txt"),
        ("info/train_filelist_google.txt", "google/a.jpg\n", r"line 1 of .* is 'google/a\.jpg', not `path label`"),
        ("info/train_filelist_google.txt", "google/a.jpg 3\n../../x.jpg 3\n", "line 2 of"),
        ("info/train_filelist_google.txt", "/etc/x.jpg 3\n", "line 1 of"),
        ("info/train_filelist_google.txt", "google/a.jpg 50\n", "names no image of the first 50 classes"),
        ("info/synsets.txt", "n1 a\n", "has 1 classes where at least 50"),
    ],
)
def test_bad_lists(tree, name, contents, message):
    (tree / name).unlink()
    if contents is not None:
        (tree / name).write_text(contents)
    with pytest.raises(UserError, match=message):
        data.load("mini_webvision", data_dir=tree)


def test_without_validation_images(tree):
    (tree / "val_images_256").rename(tree / "elsewhere")
    with pytest.raises(UserError, match="has no folder val_images_256"):
        data.load("mini_webvision", data_dir=tree)


def test_an_image_is_known_by_its_place_in_the_release(tree):
    loaded = data.load("mini_webvision", data_dir=tree)
    assert data.identities(loaded.train)[3] == "google/q0003/other.jpg"
    assert data.identities(loaded.test) == ["val_images_256/val000000.jpg", "val_images_256/val000002.jpg"]
