"""Crop, flip and normalisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.noisy_images.data import augmentation

_SIDE, _PADDING = 6, 2
_augment = jax.jit(augmentation.augment, static_argnames=("crop_padding", "flip"))


def _coded_images(count, height=_SIDE, width=_SIDE):
    """Images whose pixels tell where they come from: row + 1, column + 1, image."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    images = [np.stack([rows + 1, columns + 1, np.full_like(rows, i)], -1) for i in range(count)]
    return np.stack(images).astype(np.uint8)


def _windows(image, padding, flips=(False, True)):
    """All results that the augmentation of one image may have: (row, column, flipped) -> pixels."""
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    return {
        (row, column, flip): window[:, ::-1] if flip else window
        for row in range(2 * padding + 1)
        for column in range(2 * padding + 1)
        for flip in flips
        for window in [padded[row : row + height, column : column + width]]
    }


@pytest.mark.parametrize("shape", [(_SIDE, _SIDE), (5, 8)])
def test_every_image_is_a_window_of_its_padded_self_or_its_mirror(shape):
    images = _coded_images(200, *shape)
    augmented = np.asarray(_augment(jax.random.key(0), jnp.asarray(images), crop_padding=_PADDING, flip=True))
    assert augmented.dtype == np.uint8 and augmented.shape == images.shape
    found = []
    for image, result in zip(images, augmented, strict=True):
        matches = [where for where, window in _windows(image, _PADDING).items() if np.array_equal(window, result)]
        assert len(matches) == 1
        found += matches
    # Every offset and both orientations occur, independently for each image.
    rows, columns, flips = (set(values) for values in zip(*found, strict=True))
    assert rows == columns == set(range(2 * _PADDING + 1)) and flips == {False, True}
    assert len(set(found)) > 40
    assert 60 < sum(flip for *_, flip in found) < 140


def test_crop_alone_and_flip_alone():
    images = jnp.asarray(_coded_images(50))
    key = jax.random.key(1)
    cropped = np.asarray(_augment(key, images, crop_padding=_PADDING, flip=False))
    for image, result in zip(np.asarray(images), cropped, strict=True):
        assert any(np.array_equal(window, result) for window in _windows(image, _PADDING, (False,)).values())
    flipped = np.asarray(_augment(key, images, crop_padding=0, flip=True))
    mirrored = np.array([not np.array_equal(a, b) for a, b in zip(images, flipped, strict=True)])
    np.testing.assert_array_equal(flipped[mirrored], np.asarray(images)[mirrored][:, :, ::-1])
    assert 10 < mirrored.sum() < 40
    np.testing.assert_array_equal(_augment(key, images, crop_padding=0, flip=False), images)


def test_the_key_decides_with_and_without_jit():
    images = jnp.asarray(_coded_images(20))
    first = augmentation.augment(jax.random.key(3), images, crop_padding=_PADDING, flip=True)
    np.testing.assert_array_equal(first, _augment(jax.random.key(3), images, crop_padding=_PADDING, flip=True))
    other = _augment(jax.random.key(4), images, crop_padding=_PADDING, flip=True)
    assert not np.array_equal(first, other)


def test_padding_is_black_before_normalising():
    images = jnp.full((64, 4, 4, 3), 255, jnp.uint8)
    augmented = _augment(jax.random.key(0), images, crop_padding=2, flip=False)
    normalised = np.asarray(augmentation.normalise(augmented, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1)))
    black = np.asarray(augmented) == 0
    assert black.any()
    expected = np.broadcast_to([-0.5 / 0.2, -0.4 / 0.2, -0.3 / 0.1], normalised.shape)
    np.testing.assert_allclose(normalised[black], expected[black], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_normalise(dtype):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    result = augmentation.normalise(jnp.asarray(images), mean, std, dtype)
    assert result.dtype == dtype
    expected = (images / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(
        np.asarray(result, np.float64), expected, rtol=1e-2 if dtype == jnp.bfloat16 else 1e-5, atol=1e-5
    )


def test_features_are_standardised_and_never_moved():
    features = np.random.default_rng(0).normal(3, 2, (6, 4)).astype(np.float32)
    mean, std = features.mean(0), features.std(0)
    result = augmentation.normalise(jnp.asarray(features), mean, std)
    np.testing.assert_allclose(result, (features - mean) / std, rtol=1e-5, atol=1e-6)
    moved = augmentation.augment(jax.random.key(0), jnp.asarray(features), crop_padding=0, flip=False)
    np.testing.assert_array_equal(moved, features)
