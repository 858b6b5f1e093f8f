"""Records of a data set: subsets, statistics, memory, image files."""

import os
import pickle
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from examples.noisy_images.data import dataset as dataset_lib
from examples.noisy_images.data.dataset import Dataset, ImageFiles, make_split
from examples.noisy_images.errors import UserError


def _split(labels):
    labels = np.asarray(labels)
    images = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1)
    return make_split(images, labels, clean=True, index=1000 + np.arange(len(labels)))


@pytest.mark.parametrize("size", [1, 7, 30, 59, 60])
def test_subset_is_exact_stratified_and_keeps_order(size):
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [30, 20, 10]))
    split = _split(labels)
    subset, rest = dataset_lib.stratified_split(split, size, 3, seed=5)
    assert len(subset) == size and len(rest) == 60 - size
    counts = np.bincount(subset.labels, minlength=3)
    assert np.all(np.abs(counts - size * np.array([30, 20, 10]) / 60) < 1)
    assert np.all(np.diff(subset.index) > 0)
    # Rows stay together: image, labels and index of one sample.
    np.testing.assert_array_equal(subset.images.ravel(), subset.index - 1000)
    np.testing.assert_array_equal(subset.labels, labels[subset.index - 1000])
    np.testing.assert_array_equal(subset.clean_labels, subset.labels)
    np.testing.assert_array_equal(np.sort(np.concatenate([subset.index, rest.index])), split.index)


def test_subset_depends_on_the_seed_alone():
    split = _split(np.arange(200) % 4)
    first, again, other = (dataset_lib.stratified_subset(split, 40, 4, seed).index for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("size", [0, -1, 11])
def test_subset_of_an_impossible_size(size):
    with pytest.raises(UserError, match=f"cannot take {size} of 10"):
        dataset_lib.stratified_subset(_split([0, 1] * 5), size, 2, 0)


def test_pixel_statistics_are_those_of_the_pixels():
    images = np.random.default_rng(0).integers(0, 256, (9, 5, 4, 3), dtype=np.uint8)
    mean, std = dataset_lib.pixel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255).std((0, 1, 2)), rtol=1e-10)
    assert dataset_lib.pixel_statistics(np.full((2, 2, 2, 1), 7, np.uint8))[1][0] > 0


def test_memory_counts_what_lives_on_the_device():
    split = _split([0, 1])
    train = make_split(np.zeros((10, 4, 4, 3), np.uint8), np.zeros(10), clean=False)
    data = Dataset("x", train, split, ("a", "b"), None, (0.5,), (0.5,), 0, False)
    assert dataset_lib.memory_bytes(data) == 10 * 48 + 10 * 4 + 2 + 2 * 4 + 2 * 4
    assert data.image_shape == (4, 4, 3) and data.num_classes == 2
    streamed = make_split(ImageFiles(("a", "b"), 32), np.zeros(2), clean=False)
    data = Dataset("x", streamed, streamed, ("a", "b"), None, (0.5,), (0.5,), 0, False)
    assert dataset_lib.memory_bytes(data) == 2 * 2 * 4
    assert data.image_shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((32, 32, 3), (4, True)), ((64, 64, 3), (8, True)), ((28, 28, 1), (3, False)), ((8, 8, 1), (0, False))],
)
def test_default_augmentation(shape, expected):
    assert dataset_lib.default_augmentation(shape) == expected


@pytest.fixture
def pictures(tmp_path):
    arrays = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    paths = []
    for i, array in enumerate(arrays):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(array).save(paths[-1])
    return arrays, tuple(paths)


def test_image_files_decode_lazily_and_can_be_subset(pictures):
    arrays, paths = pictures
    files = pickle.loads(pickle.dumps(ImageFiles(paths, 4)))
    assert len(files) == 4
    np.testing.assert_array_equal(files[2], arrays[2])
    np.testing.assert_array_equal(files[np.array([3, 1])][0], arrays[3])
    np.testing.assert_array_equal(files[np.array([False, True, False, False])][0], arrays[1])
    np.testing.assert_array_equal(files.sizes(), [[6, 5]] * 4)


def test_image_files_in_a_zip(pictures, tmp_path):
    arrays, paths = pictures
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in paths:
            archive.write(path, f"folder/{os.path.basename(path)}")
    files = ImageFiles(tuple(f"folder/{i}.png" for i in range(4)), 4, str(tmp_path / "all.zip"))
    images, kept = dataset_lib.decode_images(files, skip_corrupt=False)
    np.testing.assert_array_equal(images, arrays)
    np.testing.assert_array_equal(kept, range(4))


def test_grey_images_become_three_channels(tmp_path):
    Image.fromarray(np.full((3, 3), 9, np.uint8)).save(tmp_path / "grey.png")
    assert ImageFiles((str(tmp_path / "grey.png"),))[0].tolist() == [[[9] * 3] * 3] * 3


def test_corrupt_images_are_named_counted_and_skipped_on_request(pictures):
    arrays, paths = pictures
    with open(paths[0], "wb") as file:
        file.write(b"no image")
    with open(paths[2], "r+b") as file:
        file.truncate(60)
    with pytest.raises(UserError, match=r"2 of 4 images cannot be read .*0\.png, .*2\.png.*--skip-corrupt"):
        dataset_lib.decode_images(ImageFiles(paths), skip_corrupt=False)
    with pytest.warns(UserWarning, match=r"left out 2 of 4 .*0\.png"):
        images, kept = dataset_lib.decode_images(ImageFiles(paths), skip_corrupt=True)
    np.testing.assert_array_equal(kept, [1, 3])
    np.testing.assert_array_equal(images, arrays[[1, 3]])
    with pytest.raises(UserError, match=r"cannot read the image .*0\.png"):
        ImageFiles(paths)[0]
    with pytest.raises(UserError, match="none of the 1 images"):
        dataset_lib.decode_images(ImageFiles(paths[:1]), skip_corrupt=True)


def test_an_image_of_another_size_is_named(pictures, tmp_path):
    Image.new("RGB", (7, 7)).save(tmp_path / "odd.png")
    with pytest.raises(UserError, match=r"odd\.png' has 7x7 pixels where 6x5 are expected"):
        dataset_lib.decode_images(ImageFiles((*pictures[1], str(tmp_path / "odd.png"))), skip_corrupt=True)


def test_readable_images_are_remembered_until_they_change(pictures, tmp_path, monkeypatch):
    _, paths = pictures
    checked = tmp_path / ".readable_images.txt"
    files = ImageFiles(paths)
    np.testing.assert_array_equal(dataset_lib.readable_images(files, skip_corrupt=False, checked=checked), range(4))

    opened = []
    original = ImageFiles.open
    monkeypatch.setattr(
        ImageFiles, "open", lambda self, i, **kw: opened.append(self.paths[i]) or original(self, i, **kw)
    )
    dataset_lib.readable_images(files, skip_corrupt=False, checked=checked)
    assert opened == []
    with open(paths[1], "wb") as file:
        file.write(b"broken")
    os.utime(paths[1], (time.time() + 5,) * 2)
    os.remove(paths[3])
    with pytest.raises(UserError, match=r"2 of 4 .*1\.png, .*3\.png"):
        dataset_lib.readable_images(files, skip_corrupt=False, checked=checked)
    assert sorted(opened) == [paths[1], paths[3]]
    with pytest.warns(UserWarning, match="left out 2"):
        np.testing.assert_array_equal(dataset_lib.readable_images(files, skip_corrupt=True, checked=checked), [0, 2])


def test_cache_is_whole_or_absent(tmp_path):
    path = tmp_path / "cache.npz"
    assert dataset_lib.read_cached_arrays(path, "a") is None
    assert dataset_lib.write_cached_arrays(path, {"fingerprint": np.array("a"), "x": np.arange(3)})
    assert dataset_lib.read_cached_arrays(path, "a")["x"].tolist() == [0, 1, 2]
    assert dataset_lib.read_cached_arrays(path, "b") is None
    assert os.listdir(tmp_path) == ["cache.npz"]
    path.write_bytes(path.read_bytes()[:-40])
    assert dataset_lib.read_cached_arrays(path, "a") is None
    with pytest.warns(UserWarning, match="cannot keep the cache"):
        assert not dataset_lib.write_cached_arrays(tmp_path / "no" / "cache.npz", {})
