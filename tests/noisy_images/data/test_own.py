"""The user's own images."""

import numpy as np
import pytest
from PIL import Image

from examples.noisy_images import data
from examples.noisy_images.data import own
from examples.noisy_images.errors import UserError

_RNG = np.random.default_rng(0)


def _arrays(count=50, shape=(32, 32, 3), **more):
    images = np.random.default_rng(1).integers(0, 256, (count, *shape), dtype=np.uint8)
    return {"images": images, "labels": np.arange(count) % 5, **more}


def _write(tmp_path, **arrays):
    np.savez(tmp_path / "own.npz", **arrays)
    return tmp_path / "own.npz"


def test_npz_splits_off_a_stratified_fifth(tmp_path):
    arrays = _arrays()
    path = _write(tmp_path, **arrays)
    loaded = data.load("npz", data_dir=path)
    assert len(loaded.train) == 40 and len(loaded.test) == 10
    assert np.bincount(loaded.test.labels).tolist() == [2] * 5
    for split in (loaded.train, loaded.test):
        np.testing.assert_array_equal(split.images, arrays["images"][split.index])
        np.testing.assert_array_equal(split.labels, arrays["labels"][split.index])
        assert split.clean_labels is None and split.labels.dtype == np.int32
    assert sorted([*loaded.train.index, *loaded.test.index]) == list(range(50))
    assert loaded.class_names == ("0", "1", "2", "3", "4")
    np.testing.assert_allclose(loaded.mean, (loaded.train.images / 255).mean((0, 1, 2)), rtol=1e-9)
    assert (loaded.crop_padding, loaded.flip) == (4, True)
    np.testing.assert_array_equal(data.load("npz", data_dir=path).test.index, loaded.test.index)
    assert not np.array_equal(data.load("npz", data_dir=path, seed=1).test.index, loaded.test.index)


def test_npz_with_clean_labels_is_tested_against_them(tmp_path):
    clean = (np.arange(50) + 1) % 5
    loaded = data.load("npz", data_dir=_write(tmp_path, **_arrays(clean_labels=clean)))
    np.testing.assert_array_equal(loaded.train.labels, loaded.train.index % 5)
    np.testing.assert_array_equal(loaded.train.clean_labels, clean[loaded.train.index])
    np.testing.assert_array_equal(loaded.test.labels, clean[loaded.test.index])
    np.testing.assert_array_equal(loaded.test.clean_labels, loaded.test.labels)


def test_npz_with_its_own_test_set_and_names(tmp_path):
    test = _arrays(6, (8, 8))
    path = _write(
        tmp_path,
        **_arrays(20, (8, 8)),
        test_images=test["images"],
        test_labels=test["labels"],
        class_names=np.array(list("abcdefg")),
    )
    loaded = data.load("npz", data_dir=path)
    assert loaded.image_shape == (8, 8, 1) and len(loaded.train) == 20 and len(loaded.test) == 6
    assert loaded.class_names == tuple("abcdefg")
    assert (loaded.crop_padding, loaded.flip) == (0, False)
    np.testing.assert_array_equal(loaded.test.images[..., 0], test["images"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((50, 4, 4, 3), np.float32)}, "images must be uint8 from 0 to 255, got float32"),
        ({"images": np.zeros((50, 4, 4, 2), np.uint8)}, r"images must have the shape .*, got \(50, 4, 4, 2\)"),
        ({"images": np.zeros((50, 4), np.uint8)}, r"images must have the shape .*, got \(50, 4\)"),
        ({"images": np.zeros((0, 4, 4), np.uint8), "labels": np.zeros(0, int)}, "images is empty"),
        ({"labels": np.arange(49)}, r"labels must have the shape \(50,\), one per image, got \(49,\)"),
        ({"labels": np.zeros(50)}, "labels must be integers, got float64"),
        ({"labels": np.arange(50) - 1}, "labels must not be negative, got -1"),
        ({"labels": np.arange(50) + 1000}, "the label 1049 is out of range for 50 images"),
        ({"labels": np.arange(50) + 2**40}, "labels has the value"),
        ({"clean_labels": np.full(50, 99)}, "the label 99 is out of range"),
        ({"class_names": np.array(["a", "b"])}, "the label 4 is out of range for 2 class_names"),
        ({"test_images": np.zeros((5, 32, 32, 3), np.uint8)}, "only one of test_images and test_labels"),
        ({"test_images": np.zeros((5, 8, 8, 3), np.uint8), "test_labels": np.zeros(5, int)}, "make them alike"),
        ({"labels": np.array([None] * 50)}, "is damaged"),
    ],
)
def test_npz_of_wrong_contents(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        data.load("npz", data_dir=_write(tmp_path, **_arrays() | change))


def test_npz_that_is_none(tmp_path):
    path = _write(tmp_path, images=np.zeros((3, 4, 4), np.uint8))
    with pytest.raises(UserError, match="has no array 'labels': it holds images"):
        data.load("npz", data_dir=path)
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot read"):
        data.load("npz", data_dir=path)
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(UserError, match="holds a single array"):
        data.load("npz", data_dir=tmp_path / "single.npy")
    with pytest.raises(UserError, match="cannot read"):
        data.load("npz", data_dir=tmp_path)
    whole = _write(tmp_path, **_arrays()).read_bytes()
    for contents in (whole[: len(whole) // 2], whole[:5000] + bytes(99) + whole[5099:]):
        path.write_bytes(contents)
        with pytest.raises(UserError, match=r"cannot read|is damaged"):
            data.load("npz", data_dir=path)
    with pytest.raises(UserError, match="too few"):
        data.load("npz", data_dir=_write(tmp_path, **_arrays(2)))


def _write_tree(root, counts, size=(10, 8)):
    """Write `counts` images into each class folder; the pixels tell class and number."""
    for label, (name, count) in enumerate(counts.items()):
        (root / name / "deeper").mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", size, (label, i, 50)).save(root / name / ("deeper" if i % 2 else ".") / f"{i}.png")
    return root


def test_folder_with_train_and_test(tmp_path):
    _write_tree(tmp_path / "train", {"cat": 6, "bird": 4, "dog": 5})
    _write_tree(tmp_path / "test", {"cat": 2, "dog": 3})
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".cache").mkdir()
    loaded = data.load("folder", data_dir=tmp_path)
    assert loaded.class_names == ("bird", "cat", "dog")
    assert loaded.image_shape == (8, 10, 3) and loaded.train.images.dtype == np.uint8
    assert np.bincount(loaded.train.labels).tolist() == [4, 6, 5]
    assert np.bincount(loaded.test.labels).tolist() == [0, 2, 3]
    written = np.array([1, 0, 2])
    np.testing.assert_array_equal(loaded.train.images[:, 0, 0, 0], written[loaded.train.labels])
    assert loaded.train.clean_labels is None
    np.testing.assert_array_equal(loaded.test.index, np.arange(5))
    np.testing.assert_allclose(loaded.mean[2], 50 / 255, rtol=1e-9)


@pytest.mark.parametrize("where", [".", "train"])
def test_folder_without_a_test_set(tmp_path, where):
    _write_tree(tmp_path / where, {"cat": 10, "dog": 20})
    loaded = data.load("folder", data_dir=tmp_path)
    assert np.bincount(loaded.test.labels).tolist() == [2, 4] and len(loaded.train) == 24
    assert sorted([*loaded.train.index, *loaded.test.index]) == list(range(30))
    np.testing.assert_array_equal(data.load("folder", data_dir=tmp_path).test.index, loaded.test.index)


def test_folder_of_several_sizes_or_a_given_size_is_streamed(tmp_path, monkeypatch):
    _write_tree(tmp_path, {"cat": 10, "dog": 10})
    assert not data.load("folder", data_dir=tmp_path).train.streamed
    given = data.load("folder", data_dir=tmp_path, image_size=16)
    assert given.train.streamed and given.image_shape == (16, 16, 3) and (given.crop_padding, given.flip) == (0, True)
    np.testing.assert_allclose(given.mean[2], 50 / 255, rtol=1e-9)
    monkeypatch.setattr(own, "MAX_BYTES_IN_MEMORY", 1000)
    assert data.load("folder", data_dir=tmp_path).train.streamed
    monkeypatch.undo()
    Image.new("RGB", (20, 30)).save(tmp_path / "cat" / "large.png")
    loaded = data.load("folder", data_dir=tmp_path)
    assert loaded.train.streamed and loaded.test.streamed and loaded.image_shape == (224, 224, 3)
    assert len(loaded.train) + len(loaded.test) == 21


@pytest.mark.parametrize("image_size", [None, 8])
def test_corrupt_images_of_a_folder(tmp_path, image_size):
    _write_tree(tmp_path / "train", {"cat": 6, "dog": 6})
    _write_tree(tmp_path / "test", {"cat": 2, "dog": 2})
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"?")
    (tmp_path / "test" / "dog" / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"2 of 16 images cannot be read .*cat/0\.png, .*dog/0\.png"):
        data.load("folder", data_dir=tmp_path, image_size=image_size)
    with pytest.warns(UserWarning, match="left out 2 of 16"):
        loaded = data.load("folder", data_dir=tmp_path, image_size=image_size, skip_corrupt=True)
    assert np.bincount(loaded.train.labels).tolist() == [5, 6] and np.bincount(loaded.test.labels).tolist() == [2, 1]
    np.testing.assert_array_equal(loaded.train.index, np.delete(np.arange(12), 0))
    np.testing.assert_array_equal(loaded.test.index, [0, 1, 3])


def test_folders_that_are_no_image_tree(tmp_path):
    with pytest.raises(UserError, match="has 0 class folders"):
        data.load("folder", data_dir=tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(UserError, match="has 1 class folders"):
        data.load("folder", data_dir=tmp_path)
    (tmp_path / "dog").mkdir()
    with pytest.raises(UserError, match="hold no images"):
        data.load("folder", data_dir=tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "cat" / "a.png")
    with pytest.raises(UserError, match=r"1 class folders without images \(dog\)"):
        data.load("folder", data_dir=tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        data.load("folder", data_dir=tmp_path / "file")
    root = tmp_path / "other"
    _write_tree(root / "train", {"cat": 2, "dog": 2})
    _write_tree(root / "test", {"cat": 2, "fish": 2})
    with pytest.raises(UserError, match=r"has classes that .* lacks \(fish\)"):
        data.load("folder", data_dir=root)
    (root / "test" / "fish" / "0.png").unlink()
