"""What the device reaches in practice: matrix products, a convolution, copies; the ceilings that shares refer to."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machinery import timing
from examples.noisy_images.training.trainer import MATMUL_PRECISION


class Sizes(NamedTuple):
    """How large the measured operations are."""

    matrix: int
    """Side of the square matrices."""
    images: tuple[int, int, int, int]
    """(B, H, W, C) of the 3x3 convolution, to as many channels."""
    copied: int
    """Bytes of the copied array."""


# Large enough to fill the device, small enough to take a second or two.
SIZES = {
    "cpu": Sizes(1024, (16, 16, 16, 128), 2**27),
    "gpu": Sizes(8192, (256, 16, 16, 256), 2**30),
}


def measure(precision: str, repeats: int = 7) -> dict[str, float]:
    """Return operations per second of a matrix product and a convolution, and bytes copied per second.

    The operands are random: hardware multiplies zeros faster.

    Args:
      precision: a compute precision of the training program: float32, tf32 or bfloat16.
      repeats: timed calls; their median counts.
    """
    sizes = SIZES.get(jax.default_backend(), SIZES["gpu"])
    dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    rng = np.random.default_rng(0)

    def random(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    side, channels = sizes.matrix, sizes.images[-1]
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    with jax.default_matmul_precision(MATMUL_PRECISION[precision]):
        product = _seconds(jnp.matmul, (random(side, side), random(side, side)), repeats)
        convolution = _seconds(convolve, (random(*sizes.images), random(3, 3, channels, channels)), repeats)
    copied = jnp.asarray(rng.integers(0, 256, sizes.copied, np.uint8))
    copy = _seconds(jnp.invert, (copied,), repeats)
    return {
        "product_flops_per_s": 2 * side**3 / product,
        "convolution_flops_per_s": 2 * 9 * np.prod(sizes.images, dtype=float) * channels / convolution,
        # Read once and written once.
        "copied_bytes_per_s": 2 * sizes.copied / copy,
    }


def flops_per_s(measured: dict[str, float]) -> float:
    """Return the higher of the two measured rates."""
    return max(measured["product_flops_per_s"], measured["convolution_flops_per_s"])


def _seconds(function: Callable[..., Any], arguments: tuple[jax.Array, ...], repeats: int) -> float:
    compiled = jax.jit(function)
    call = functools.partial(_wait_for, compiled, arguments)
    return float(np.median(timing.interleaved({"call": call}, rounds=repeats, warm_up=2)["call"]))


def _wait_for(function: Callable[..., Any], arguments: tuple[jax.Array, ...]) -> None:
    jax.block_until_ready(function(*arguments))
