"""What XLA is asked for beyond its defaults: on CPUs, its own convolutions.

Newer versions of XLA hand convolutions on CPUs to YNNPACK, whose gradients of kernels have down to a fifth of the speed
of XLA's own, and whose larger convolutions of few channels take twice as long. Of 32 images, on two cores with AVX-512,
a convolution with a window of 3x3 takes (ms, smallest of seven calls, JAX 0.10.2; forward, gradient of the images,
gradient of the kernel):

========================  ====================  ================
convolution               by YNNPACK            by XLA
========================  ====================  ================
32x32 pixels, 64 to 64    15.5, 16.1, 62.1      8.0, 8.1, 13.9
32x32 pixels, 16 to 16    1.1, 1.2, 2.8         1.2, 1.2, 2.2
16x16 pixels, 128 to 128  8.4, 8.1, 21.8        7.4, 7.3, 9.4
16x16 pixels, 32 to 32    1.0, 1.0, 1.6         0.7, 0.9, 1.5
8x8 pixels, 256 to 256    8.4, 9.0, 9.9         7.5, 7.7, 7.8
8x8 pixels, 64 to 64      1.1, 1.1, 1.3         0.8, 0.8, 1.0
4x4 pixels, 512 to 512    9.4, 11.6, 10.2       8.5, 10.4, 7.6
========================  ====================  ================

Products of matrices and sums stay with YNNPACK, which is the faster there.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

CONVOLUTIONS = ("auto", "xla")
_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


def options(convolution: str = "auto") -> dict[str, str] | None:
    """Return the `compiler_options` of `jax.jit`; ``"xla"`` leaves convolutions to whatever is XLA's default."""
    return dict(_OPTIONS) if improves(convolution) and _are_known() else None


def improves(convolution: str) -> bool:
    """Return whether convolutions are other than the defaults of XLA and JAX: where it is asked for, on CPUs."""
    return convolution == "auto" and jax.default_backend() == "cpu"


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what `jax.jit` was given, to be part of another function; what is not jitted is returned as it is.

    Options of the compiler belong to the outermost `jax.jit` alone: JAX refuses to trace what has its own.
    """
    # Not `inspect.unwrap`, which would go on to what `jax.grad` was given.
    return function.__wrapped__ if isinstance(function, jax.stages.Wrapped) else function


@functools.cache
def _are_known() -> bool:
    """Whether this XLA has the options; one that has not convolves by itself."""
    try:
        jax.jit(lambda x: x, compiler_options=dict(_OPTIONS)).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
