"""Layers under stated conventions: padding, initialisation, BatchNorm, compute dtype.

Images are channels-last, (B, H, W, C). Parameters and BatchNorm statistics are float32 whatever the compute dtype.
Convolutions and linear layers compute in the compute dtype; BatchNorm computes its statistics and its normalisation in
float32 and hands on the dtype it was given.

Three conventions differ between PyTorch and Flax and are options:

* padding: ``"torch"`` pads (k - 1) / 2 on every side, ``"same"`` is Flax's SAME, which pads a stride-2 window on even
  sizes less, and unevenly: a 3x3 one only on the bottom and the right.
* initialisation: ``"torch"`` is what the released PyTorch networks do, stated per family by an `Initialisation`;
  ``"flax"`` is Flax's LeCun-normal kernels and zero biases.
* BatchNorm: running = momentum * running + (1 - momentum) * batch, so PyTorch's ``momentum=0.1`` is 0.9 here.

One stays different: PyTorch keeps the unbiased batch variance (n - 1 in the denominator) in its running statistics,
Flax the biased one. Both normalise by the biased variance in training, so only evaluation mode sees it, by a factor of
n / (n - 1) on the variance, n = batch * height * width: at most 1.0005 for CIFAR images in batches of 128.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from ..errors import UserError

Initializer = jax.nn.initializers.Initializer
Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def _on_host(draw: Draw) -> Initializer:
    """Return the initialiser that lets NumPy draw, seeded by the parameter's key.

    JAX's own would compile once for every shape, on a CPU 5 seconds for a ResNet-18 and 17 for a DenseNet-121, and
    differ in the last bits between devices.
    """

    def initialise(key, shape, dtype=jnp.float32, **_):
        def host(seed):
            return draw(np.random.default_rng(np.asarray(seed)), shape).astype(dtype)

        seed = jax.random.key_data(key)
        if isinstance(seed, jax.core.Tracer):  # inside `jax.jit` or `jax.eval_shape`
            return jax.pure_callback(host, jax.ShapeDtypeStruct(shape, dtype), seed)
        return jnp.asarray(host(seed))

    return initialise


def _fan_in(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1])


def _fan_out(shape: tuple[int, ...]) -> int:
    return math.prod(shape) // shape[-2]


@functools.cache  # Flax 0.12.0 keeps initialisers in its layers: equal networks must hold the same to compare equal.
def _uniform(low: float, high: float) -> Initializer:
    """Return the initialiser uniform on [low, high)."""
    return _on_host(lambda generator, shape: generator.uniform(low, high, shape))


@dataclasses.dataclass(frozen=True)
class Initialisation:
    """State how one family of networks is initialised.

    Linear layers with `uniform_linear` draw weights and biases uniform on +-1/sqrt(fan-in), otherwise weights like the
    convolutions and zero biases. BatchNorm biases are always zero.
    """

    convolution: Initializer
    batch_norm_scale: Initializer
    uniform_linear: bool


# Those of the released networks: Kaiming-normal is He et al. 2015 (arXiv 1502.01852).
TORCH_RESNET = Initialisation(
    convolution=_on_host(lambda generator, shape: generator.normal(0, math.sqrt(2 / _fan_out(shape)), shape)),
    batch_norm_scale=nnx.initializers.ones_init(),
    uniform_linear=True,
)
TORCH_WIDE_RESNET = Initialisation(
    convolution=_on_host(lambda generator, shape: generator.normal(0, math.sqrt(2 / _fan_in(shape)), shape)),
    batch_norm_scale=_uniform(0.0, 1.0),
    uniform_linear=True,
)
# PyTorch's default, kaiming_uniform(a=sqrt(5)), is uniform on +-1/sqrt(fan-in).
TORCH_DEFAULT = Initialisation(
    convolution=_on_host(lambda generator, shape: generator.uniform(-1, 1, shape) / math.sqrt(_fan_in(shape))),
    batch_norm_scale=nnx.initializers.ones_init(),
    uniform_linear=True,
)
FLAX_DEFAULT = Initialisation(
    convolution=nnx.initializers.lecun_normal(),
    batch_norm_scale=nnx.initializers.ones_init(),
    uniform_linear=False,
)


class _RunningStatistic(nnx.BatchStat):
    """A running statistic, which is replaced whole.

    Flax asks the new and the old value for their sharding first. Traced ones have none, and JAX says so in a message
    that searches all that was traced before: time that grows with the square of the number of layers.
    """

    def __setitem__(self, index, value) -> None:
        if index is ... and hasattr(self, "set_value"):  # Flax 0.12.0 has no such method, and asks nothing.
            self.set_value(value)
        else:
            super().__setitem__(index, value)


class BatchNorm(nnx.BatchNorm):
    """Normalise by the batch in float32, or by the running statistics, and keep the input's dtype.

    Ioffe and Szegedy 2015 (arXiv 1502.03167). With ``train=True`` the running statistics, `nnx.BatchStat` variables of
    shape (features,), move towards those of the batch. With several groups, each is normalised by itself, and the
    running statistics move towards the mean of the groups' own.
    """

    def __init__(self, features: int, *, groups: int = 1, **options):
        super().__init__(features, **options)
        self.mean, self.var = _RunningStatistic(self.mean[...]), _RunningStatistic(self.var[...])
        self.groups = groups

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if not train or self.groups == 1:
            return super().__call__(x, use_running_average=not train).astype(x.dtype)

        def of_group(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            norm = nnx.clone(self)
            y = nnx.BatchNorm.__call__(norm, x, use_running_average=False)
            return y, (norm.mean[...], norm.var[...])

        y, (mean, var) = jax.vmap(of_group)(x.reshape(self.groups, -1, *x.shape[1:]))
        self.mean[...], self.var[...] = mean.mean(axis=0), var.mean(axis=0)
        return y.reshape(x.shape).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Layers:
    """Build layers that share one set of conventions and one stream of initialisation keys."""

    rngs: nnx.Rngs
    initialisation: Initialisation
    padding: str
    batch_norm_momentum: float
    batch_norm_epsilon: float
    batch_norm_groups: int
    rematerialise: bool
    dtype: DTypeLike
    convolve: Callable[..., jax.Array]

    @property
    def remat(self) -> Callable[[Callable], Callable]:
        """The transformation of a network's segments: their intermediate results are computed again, or kept."""
        return nnx.remat if self.rematerialise else _keep

    def window_padding(self, size: int) -> str | tuple[tuple[int, int], ...]:
        """Return the padding of a square window (convolution or pooling) of odd size."""
        return "SAME" if self.padding == "same" else (((size - 1) // 2,) * 2,) * 2

    def convolution(self, inputs: int, outputs: int, size: int, stride: int = 1) -> nnx.Conv:
        """Build a square convolution without bias: (B, H, W, inputs) to (B, H/stride, W/stride, outputs)."""
        return nnx.Conv(
            inputs,
            outputs,
            (size, size),
            strides=(stride, stride),
            padding=self.window_padding(size),
            use_bias=False,
            dtype=self.dtype,
            kernel_init=self.initialisation.convolution,
            conv_general_dilated=self.convolve,
            rngs=self.rngs,
        )

    def batch_norm(self, features: int) -> BatchNorm:
        """Build a BatchNorm over all axes but the last."""
        return BatchNorm(
            features,
            momentum=self.batch_norm_momentum,
            epsilon=self.batch_norm_epsilon,
            groups=self.batch_norm_groups,
            dtype=jnp.float32,
            scale_init=self.initialisation.batch_norm_scale,
            rngs=self.rngs,
        )

    def linear(self, inputs: int, outputs: int) -> nnx.Linear:
        """Build a linear layer with bias: (B, inputs) to (B, outputs)."""
        if self.initialisation.uniform_linear:
            kernel_init = bias_init = _uniform(-1 / math.sqrt(inputs), 1 / math.sqrt(inputs))
        else:
            kernel_init, bias_init = self.initialisation.convolution, nnx.initializers.zeros_init()
        return nnx.Linear(
            inputs, outputs, dtype=self.dtype, kernel_init=kernel_init, bias_init=bias_init, rngs=self.rngs
        )


def _keep(segment: Callable) -> Callable:
    return segment


def scale_width(features: int, width: float) -> int:
    """Return the rounded number of features at a width factor."""
    scaled = round(features * width)
    if scaled < 1:
        raise UserError(f"width {width} leaves a layer of {features} features with none: use a larger width.")
    return scaled


def global_average(x: jax.Array) -> jax.Array:
    """Average over the image, accumulating in float32: (B, H, W, C) to (B, C), the input's dtype."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.float32).astype(x.dtype)
