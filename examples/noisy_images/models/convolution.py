"""Convolutions for CPUs: XLA's own forward, and the gradient of the kernel as products of matrices that fit the cache.

XLA's gradient of a convolution kernel is a convolution whose window is the whole image and whose features are the
batch. Here the patches of a few images at a time are laid out as a matrix, and the products of these matrices with the
gradient of the result are summed in a loop::

    dL/dK[o, (i, j, c)] = sum over chunks of images  dY[(n, y, x), o]  X[n, s y + i, s x + j, c]

All patches at once would leave the cache and gain little; a chunk holds at most `CHUNK` numbers of them on each device.

When it is used: on CPUs, for two-dimensional convolutions of channels-last images with one group and no dilation, whose
images and result together hold `LARGE` numbers or more, 4 MB in float32. Accelerators, and all other convolutions, keep
XLA's own. Of 32 images, on two cores with AVX-512, a gradient of the kernel takes (ms; the last four are not large):

=============================  ===============  =====  ====
convolution                    million numbers  XLA    this
=============================  ===============  =====  ====
3x3, 32x32 pixels, 64 to 64    4.2              74     28
3x3, 64 to 128, stride 2       3.1              15.5   9.6
1x1, 64 to 128, stride 2       3.1              7.4    1.7
3x3, 32x32 pixels, 32 to 32    2.1              17     11
3x3, 16x16 pixels, 128 to 128  2.1              21     20
3x3, 16x16 pixels, 64 to 64    1.0              10.6   7.3
3x3, 8x8 pixels, 256 to 256    1.0              12     14
3x3, 32x32 pixels, 16 to 16    1.0              3.5    3.9
3x3, 4x4 pixels, 512 to 512    0.5              10.3   11.2
3x3, 16x16 pixels, 32 to 32    0.5              1.9    3.7
3x3, 8x8 pixels, 64 to 64      0.3              1.6    2.5
3x3, 4x4 pixels, 128 to 128    0.1              1.4    1.6
=============================  ===============  =====  ====

What XLA takes grows faster than the batch and depends on the processor: on two AMD cores, with 64 images, this took
0.05 to 0.65 of XLA's time at every 3x3 of stride 1 that was measured, all of them large.
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

# Numbers in the images and in the result of a convolution, together, from which its kernel has the faster gradient.
LARGE = 2**20
# Outputs below which the product is taken transposed.
NARROW = 256

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

    What it has no faster gradient for is JAX's own convolution, see above. It has derivatives of any order in reverse
    mode, and forward over reverse; forward mode alone it refuses, as every `jax.custom_vjp` does.

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
    own = further or dilated or feature_group_count != 1 or dimensions != _CHANNELS_LAST
    if not own and isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], window_strides, padding)
    if own or not _is_large(lhs, rhs, window_strides, padding):
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


def _is_large(images: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any) -> bool:
    sides = zip(images.shape[1:3], kernel.shape[:2], strides, padding, strict=True)
    places = math.prod((length + sum(pads) - size) // stride + 1 for length, size, stride, pads in sides)
    return images.size + len(images) * places * kernel.shape[-1] >= LARGE


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
        # Behind the barrier it is padded once: without it, again in each of the slices.
        padded = lax.optimization_barrier(jnp.pad(images, ((0, 0), *self.padding, (0, 0))))
        down, right = (step * (places - 1) + 1 for step, places in zip(self.strides, shape[1:3], strict=True))
        seen = [
            padded[:, i : i + down : self.strides[0], j : j + right : self.strides[1]]
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
    features = images.shape[-1], gradient.shape[-1]
    if shares == 1 or len(images) % shares:
        summed = _summed_products(images, gradient, window)
    else:
        # Devices that share a batch have each a sum of their own, so that nothing is sent between them before the end.
        images, gradient = (x.reshape(shares, -1, *x.shape[1:]) for x in (images, gradient))
        summed = jnp.sum(jax.vmap(functools.partial(_summed_products, window=window))(images, gradient), axis=0)
    # Behind the barrier it is laid out once, and not in everything that reads it.
    return lax.optimization_barrier(summed.reshape(*window.size, *features).astype(gradient.dtype))


def _summed_products(images: jax.Array, gradient: jax.Array, window: _Window) -> jax.Array:
    """Return the sum over chunks of the patches times the gradient of the result, (height width C, K)."""
    places, (inputs, outputs) = math.prod(gradient.shape[1:3]), (images.shape[-1], gradient.shape[-1])
    size = _chunk_size(len(images), places * math.prod(window.size) * inputs)
    # The narrow side first is faster, unless what has to be transposed in the end is large.
    transposed = outputs < NARROW

    def product(start: Any, size: int) -> jax.Array:
        seen, of_result = (lax.dynamic_slice_in_dim(x, start, size) for x in (images, gradient))
        sides = window.patches(seen, gradient.shape), of_result.reshape(-1, outputs)
        return lax.dot_general(
            *(sides[::-1] if transposed else sides),
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
    if rest:
        total = total + product(whole * size, rest)
    return total.T if transposed else total


def _chunk_size(images: int, of_image: int) -> int:
    """Return how many images a chunk has: a divisor of their number where one is near what `CHUNK` allows."""
    most = min(max(CHUNK // of_image, 1), images)
    return next((size for size in range(most, most // 2, -1) if images % size == 0), most)
