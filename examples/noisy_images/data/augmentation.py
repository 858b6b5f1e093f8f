"""Random crop, flip and normalisation, for use inside a jitted training step."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def augment(key: jax.Array, images: jax.Array, *, crop_padding: int, flip: bool) -> jax.Array:
    """Crop and flip every image at random.

    Each image is padded with `crop_padding` black pixels on every side and cut back to its size at a place of its
    own; then, with probability one half, mirrored left to right. Images stay uint8, so black is the pixel value 0
    and comes before normalisation.

    Args:
      key: The key of this step: the same key gives the same batch, in both passes of a two-pass method.
      images: uint8 (B, H, W, C).
      crop_padding: Static; 0 leaves the images where they are.
      flip: Static; whether to mirror.

    Returns:
      uint8 (B, H, W, C).
    """
    if images.ndim == 2:
        # Features have no place to be moved in.
        return images
    count, height, width, channels = images.shape
    crop_key, flip_key = jax.random.split(key)
    if crop_padding:
        padding = ((0, 0), (crop_padding, crop_padding), (crop_padding, crop_padding), (0, 0))
        offsets = jax.random.randint(crop_key, (count, 2), 0, 2 * crop_padding + 1)

        def cut(image, offset):
            return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (height, width, channels))

        images = jax.vmap(cut)(jnp.pad(images, padding), offsets)
    if flip:
        mirrored = jax.random.bernoulli(flip_key, 0.5, (count, 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    return images


def normalise(images: jax.Array, mean: Sequence[float], std: Sequence[float], dtype=jnp.float32) -> jax.Array:
    """Scale uint8 images to [0, 1], subtract `mean` and divide by `std` per channel; `dtype` is the result's.

    Floats (B, D) are features: they are standardised by column and not scaled before.
    """
    scaled = images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images
    return ((scaled - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)).astype(dtype)
