"""The embedded digits."""

import numpy as np
import pytest

from examples.noisy_images import data
from examples.noisy_images.errors import UserError


def test_digits():
    digits = data.load("digits")
    assert digits.train.images.dtype == np.uint8 and digits.train.images.shape == (1348, 8, 8, 1)
    assert digits.test.images.shape == (449, 8, 8, 1)
    assert digits.num_classes == 10 and digits.image_shape == (8, 8, 1)
    assert (digits.crop_padding, digits.flip) == (0, False)
    assert int(digits.train.images.max()) == 255
    # Every original image once.
    everything = np.concatenate([digits.train.index, digits.test.index])
    np.testing.assert_array_equal(np.sort(everything), np.arange(1797))
    for split in (digits.train, digits.test):
        assert split.labels.dtype == np.int32 and split.index.dtype == np.int64
        np.testing.assert_array_equal(split.labels, split.clean_labels)
        assert not np.shares_memory(split.labels, split.clean_labels)
    counts = np.bincount(digits.test.labels) / np.bincount(
        everything * 0 + np.concatenate([digits.train.labels, digits.test.labels])
    )
    np.testing.assert_allclose(counts, 0.25, atol=0.01)
    scaled = digits.train.images / 255
    np.testing.assert_allclose(digits.mean, [scaled.mean()], rtol=1e-9)
    np.testing.assert_allclose(digits.std, [scaled.std()], rtol=1e-9)


def test_the_split_is_the_same_for_every_seed():
    np.testing.assert_array_equal(data.load("digits").test.index, data.load("digits", seed=7).test.index)


def test_digits_have_no_folder(tmp_path):
    with pytest.raises(UserError, match="is built in"):
        data.load("digits", data_dir=tmp_path)
