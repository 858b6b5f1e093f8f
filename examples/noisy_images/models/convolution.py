"""Convolutions for CPUs: XLA's own forward, and the gradient of the kernel as products of matrices that fit the cache.

XLA's gradient of a convolution kernel is a convolution whose window is the whole image and whose features are the
batch. Here the patches of a few images at a time are laid out as a matrix, and the products of these matrices with the
gradient of the result are summed in a loop::

    dL/dK[o, (i, j, c)] = sum over chunks of images  dY[(n, y, x), o]  X[n, s y + i, s x + j, c]

All patches at once would leave the cache and gain little; a chunk holds at most `CHUNK` numbers of them on each device.
Accelerators keep XLA's own convolutions.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

# Numbers in the patches of a chunk, on each device: 6 MB in float32.
CHUNK = 1_500_000

_CHANNELS_LAST = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def choose(name: str) -> Callable[..., jax.Array]:
    """Return the convolution of a name: ``"xla"``, or ``"auto"``, which is another one on CPUs."""
    faster = name == "auto" and jax.default_backend() == "cpu"
    return conv_general_dilated if faster else lax.conv_general_dilated


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: Any = None,
) -> jax.Array:
    """Convolve like `jax.lax.conv_general_dilated`, with a gradient of the kernel that is faster on CPUs.

    What it has no faster gradient for is JAX's own convolution: all but two-dimensional channels-last images with one
    group and no dilation. It has derivatives of any order in reverse mode, and forward over reverse; forward mode alone
    it refuses, as every `jax.custom_vjp` does.

    Args:
      lhs: images, (B, H, W, C).
      rhs: kernel, (height, width, C, K), of the same dtype.
      window_strides: of the window, (vertical, horizontal).
      padding: rows and columns of zeros before and after, or ``"SAME"``, ``"VALID"`` or ``"SAME_LOWER"``.
      lhs_dilation: as in JAX.
      rhs_dilation: as in JAX.
      dimension_numbers: as in JAX.
      feature_group_count: as in JAX.
      precision: as in JAX, of the forward pass and of both gradients.
      preferred_element_type: as in JAX.
      out_sharding: as in JAX.

    Returns:
      The images convolved, (B, H', W', K).
    """
    dimensions = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    dilated = any(step != 1 for step in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    further = {"preferred_element_type": preferred_element_type, "out_sharding": out_sharding}
    further = {name: value for name, value in further.items() if value is not None}
    if further or dilated or feature_group_count != 1 or dimensions != _CHANNELS_LAST:
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            dimension_numbers,
            feature_group_count,
            precision=precision,
            **further,
        )
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], window_strides, padding)
    window = _Window(
        tuple(rhs.shape[:2]), tuple(window_strides), tuple((int(a), int(b)) for a, b in padding), precision
    )
    return _convolve(lhs, rhs, window)


class _Window(NamedTuple):
    """What a convolution does besides its operands."""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    precision: Any

    def convolve(self, images: jax.Array, kernel: jax.Array) -> jax.Array:
        """Convolve, by XLA's own."""
        return lax.conv_general_dilated(
            images, kernel, self.strides, self.padding, dimension_numbers=_CHANNELS_LAST, precision=self.precision
        )

    def patches(self, images: jax.Array, shape: Sequence[int]) -> jax.Array:
        """Return what the window sees at each place of a result: (B, H, W, C) to (B H' W', height width C)."""
        padded = jnp.pad(images, ((0, 0), *self.padding, (0, 0)))
        steps, places = self.strides, shape[1:3]
        seen = [
            padded[
                :, i : i + (places[0] - 1) * steps[0] + 1 : steps[0], j : j + (places[1] - 1) * steps[1] + 1 : steps[1]
            ]
            for i in range(self.size[0])
            for j in range(self.size[1])
        ]
        return jnp.concatenate(seen, axis=-1).reshape(-1, len(seen) * images.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(images: jax.Array, kernel: jax.Array, window: _Window) -> jax.Array:
    return window.convolve(images, kernel)


def _forward(images: jax.Array, kernel: jax.Array, window: _Window) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return window.convolve(images, kernel), (images, kernel)


def _backward(window: _Window, kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    images, kernel = kept
    (of_images,) = jax.vjp(lambda images: window.convolve(images, kernel), images)[1](gradient)
    return of_images, _kernel_gradient(images, gradient, window)


_convolve.defvjp(_forward, _backward)


def _kernel_gradient(images: jax.Array, gradient: jax.Array, window: _Window) -> jax.Array:
    """Return the gradient of the kernel, (height, width, C, K), from the images and the gradient of the result."""
    shares = jax.device_count()
    if len(images) % shares:
        shares = 1
    # Devices that share a batch have each a sum of their own, so that nothing is sent between them before the end.
    images, gradient = (x.reshape(shares, -1, *x.shape[1:]) for x in (images, gradient))
    summed = jnp.sum(jax.vmap(functools.partial(_summed_products, window=window))(images, gradient), axis=0)
    features = images.shape[-1], gradient.shape[-1]
    return jnp.moveaxis(summed, 0, -1).reshape(*window.size, *features).astype(gradient.dtype)


def _summed_products(images: jax.Array, gradient: jax.Array, window: _Window) -> jax.Array:
    """Return the sum over chunks of the gradient of the result times the patches, (K, height width C)."""
    of_image = math.prod(gradient.shape[1:3]) * math.prod(window.size) * images.shape[-1]
    size = min(max(CHUNK // of_image, 1), len(images))

    def product(start: Any, size: int) -> jax.Array:
        seen, of_result = (lax.dynamic_slice_in_dim(x, start, size) for x in (images, gradient))
        return lax.dot_general(
            of_result.reshape(-1, gradient.shape[-1]),
            window.patches(seen, gradient.shape),
            (((0,), (0,)), ((), ())),
            precision=window.precision,
            preferred_element_type=jnp.promote_types(gradient.dtype, jnp.float32),
        )

    whole, rest = divmod(len(images), size)
    if whole == 1:
        total = product(0, size)
    else:
        shape = jax.eval_shape(lambda: product(0, size))
        total, _ = lax.scan(
            lambda total, chunk: (total + product(chunk * size, size), None),
            jnp.zeros(shape.shape, shape.dtype),
            jnp.arange(whole),
        )
    return total + product(whole * size, rest) if rest else total
