"""Records of a data set: subsets, folds, statistics, memory."""

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
