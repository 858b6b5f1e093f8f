"""Records of a data set: subsets, folds, statistics, memory."""

import dataclasses
import warnings

import numpy as np
import pytest

from examples.noisy_images.data import dataset as dataset_lib
from examples.noisy_images.data.dataset import Dataset, make_split
from examples.noisy_images.data.image_files import ImageFiles
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


@pytest.mark.parametrize(("colour", "grey"), [(0, True), (6, True), (40, False)])
def test_grey_images_in_three_channels_are_known_by_their_pixels(colour, grey):
    images = np.random.default_rng(0).integers(50, 200, (600, 8, 8, 1), np.uint8).repeat(3, -1)
    # One image of the last has a colour, or what compression leaves of none.
    images[599, 2, 2, 1] += colour
    assert dataset_lib.looks_grey(images) is grey
    assert dataset_lib.default_augmentation((32, 32, 3), grey) == (4, not grey)
    assert dataset_lib.looks_grey(images[..., :1])


def test_statistics_of_features():
    features = np.random.default_rng(0).normal([5, -2, 0], [2, 0.1, 1], (500, 3)).astype(np.float32)
    constant = np.full((500, 2), [0.1, 0], np.float32)
    mean, std = dataset_lib.feature_statistics(np.concatenate([features, constant], axis=1))
    np.testing.assert_allclose(mean[:3], features.mean(0, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(std[:3], features.std(0, dtype=np.float64), rtol=1e-6)
    assert std[3:] == (1, 1)


def test_a_choice_by_names_hardly_changes_with_a_sample_more():
    labels = np.arange(90) % 3
    split = dataclasses.replace(_split(labels), ids=tuple(f"sample {i}" for i in range(90)))
    chosen = set(dataset_lib.stratified_subset(split, 30, 3, 0).ids)
    assert len(chosen) == 30
    without = set(dataset_lib.stratified_subset(split.take(np.delete(np.arange(90), 4)), 30, 3, 0).ids)
    assert len(chosen & without) >= 28
    moved = split.take(np.random.default_rng(0).permutation(90))
    assert set(dataset_lib.stratified_subset(moved, 30, 3, 0).ids) == chosen
    assert set(dataset_lib.stratified_subset(split, 30, 3, 1).ids) != chosen


def test_classes_without_training_samples():
    names = ("a", "b", "c", "d")
    train = _split([0, 1, 0, 1])
    dataset_lib.check_classes(train, _split([0, 1]), names[:2], "the data")
    with pytest.warns(UserWarning, match=r"the data has no training sample of 2 of 4 classes \(c, d\)"):
        dataset_lib.check_classes(train, _split([0]), names, "the data")
    with pytest.raises(UserError, match=r"test samples of 1 classes without a training sample \(d\)"):
        dataset_lib.check_classes(train, _split([0, 3]), names, "the data")
    with pytest.raises(UserError, match=r"one class alone \(b\)"):
        dataset_lib.check_classes(_split([1, 1]), _split([1]), names, "the data")
    # A class that the given labels miss is known by the clean ones.
    hidden = dataclasses.replace(train, clean_labels=np.array([0, 1, 2, 3], np.int32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset_lib.check_classes(hidden, _split([3]), names, "the data")


def test_folds_that_lack_a_class_are_mentioned_once():
    dataset_lib._say_that_folds_lack_classes.cache_clear()
    split = _split([0] * 10 + [1] * 10 + [2] * 2)
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        for fold in (0, 1, 2, 0, 3):
            dataset_lib.leave_out_fold(split, 4, fold, seed=0)
    assert [str(note.message) for note in notes] == [
        "1 classes have fewer samples than there are folds (4): some folds lack them"
    ]


def test_a_data_set_describes_itself_in_one_line():
    split = make_split(np.zeros((1200, 8, 6, 1), np.uint8), np.arange(1200) % 5, clean=False)
    loaded = Dataset("own", split, split.take(np.arange(30)), tuple("abcde"), None, (0.5,), (0.5,), 0, False)
    assert loaded.description == (
        "own: 5 classes (a, b, c and 2 more); 1,230 images, 1,200 to train and 30 to test; 8x6 pixels, grey; "
        "0.1 MiB in memory"
    )
    files = make_split(ImageFiles(("a", "b"), 32), np.arange(2), clean=False)
    streamed = dataclasses.replace(loaded, train=files, test=files, layout="a guess")
    assert "32x32 pixels; streamed from files; a guess" in streamed.description
