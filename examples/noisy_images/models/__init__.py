"""The networks by name. A new one is one entry in `MODELS`."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from .. import compilation
from ..errors import UserError, unknown_name
from . import convolution as _convolution
from . import layers as _layers
from .densenet import DenseNet
from .resnet import ResNet
from .small import MLP, Linear, SmallCNN
from .wide_resnet import WideResNet


class Model(NamedTuple):
    """An entry: what it is, how to build it, and how its released PyTorch form is initialised.

    `build(layers, *, num_classes, image_shape, width, dropout)` returns a module that is called as
    ``model(x, train, rngs=None)``, holds no variables but `nnx.Param` and `nnx.BatchStat`, and names the layer that
    makes the logits ``classifier``.
    """

    summary: str
    build: Callable[..., nnx.Module]
    torch_initialisation: _layers.Initialisation


MODELS: dict[str, Model] = {
    "linear": Model("one linear layer, for features", Linear, _layers.TORCH_DEFAULT),
    "mlp": Model("two hidden layers of 512, no BatchNorm", MLP, _layers.TORCH_DEFAULT),
    "small_cnn": Model("four convolutions with BatchNorm, for CPUs", SmallCNN, _layers.TORCH_RESNET),
    "resnet18": Model("ResNet-18, CIFAR form", functools.partial(ResNet, blocks=(2, 2, 2, 2)), _layers.TORCH_RESNET),
    "resnet34": Model("ResNet-34, CIFAR form", functools.partial(ResNet, blocks=(3, 4, 6, 3)), _layers.TORCH_RESNET),
    "resnet18_imagenet": Model(
        "ResNet-18, ImageNet form (7x7 stem, max-pool)",
        functools.partial(ResNet, blocks=(2, 2, 2, 2), imagenet_stem=True),
        _layers.TORCH_RESNET,
    ),
    "wrn_40_2": Model(
        "wide ResNet, depth 40, widening 2",
        functools.partial(WideResNet, depth=40, widening=2),
        _layers.TORCH_WIDE_RESNET,
    ),
    "wrn_28_10": Model(
        "wide ResNet, depth 28, widening 10",
        functools.partial(WideResNet, depth=28, widening=10),
        _layers.TORCH_WIDE_RESNET,
    ),
    "densenet121": Model(
        "DenseNet-121, growth 32, CIFAR form",
        functools.partial(DenseNet, blocks=(6, 12, 24, 16), growth=32),
        _layers.TORCH_DEFAULT,
    ),
}
PADDINGS = ("torch", "same")
INITIALISATIONS = ("torch", "flax")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def create(
    name: str,
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    seed: int,
    width: float = 1.0,
    padding: str = "torch",
    initialisation: str = "torch",
    batch_norm_momentum: float = 0.9,
    batch_norm_epsilon: float = 1e-5,
    batch_norm_groups: int = 1,
    dropout: float = 0.0,
    rematerialise: bool = False,
    dtype: str = "float32",
    convolution: str = "auto",
) -> nnx.Module:
    """Build the network of a name, initialised from a seed.

    Args:
      name: a key of `MODELS`.
      num_classes: number of logits.
      image_shape: (height, width, channels) of the images it will see.
      seed: seed of the initialisation; the same seed gives the same parameters.
      width: factor on the number of channels of every hidden layer.
      padding: ``"torch"`` or ``"same"``, see `layers`.
      initialisation: ``"torch"`` (that of the released code) or ``"flax"`` (Flax's defaults).
      batch_norm_momentum: what the running statistics keep in a step; PyTorch's default 0.1 is 0.9 here.
      batch_norm_epsilon: what BatchNorm adds to the variance.
      batch_norm_groups: equal parts of a batch, in its order, that are normalised each by itself; a divisor of the
        batch size.
      dropout: probability of dropping a unit in training; the paper has none.
      rematerialise: compute what stands inside a block again in the backward pass, and keep the blocks' inputs alone.
      dtype: compute dtype of convolutions and linear layers; parameters, BatchNorm and logits are float32.
      convolution: ``"auto"``, on CPUs that of `convolution`, or ``"xla"``, JAX's own everywhere.

    Returns:
      A module, called as ``model(x, train, rngs=None)`` with x (B, H, W, C) normalised, and rngs an `nnx.Rngs` with a
      ``dropout`` or a default stream when there is dropout in training. Returns float32 logits (B, num_classes), and
      with ``train=True`` moves its `nnx.BatchStat` variables.

    Raises:
      UserError: a name or a value that does not exist or cannot be.
    """
    for kind, value, known in (
        ("model", name, MODELS),
        ("padding", padding, PADDINGS),
        ("initialisation", initialisation, INITIALISATIONS),
        ("compute dtype", dtype, DTYPES),
        ("convolution", convolution, compilation.CONVOLUTIONS),
    ):
        if value not in known:
            raise unknown_name(kind, value, known)
    if not 0 < width < float("inf"):
        raise UserError(f"width is {width}: use a positive number.")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout is {dropout}: use a probability in [0, 1).")
    if not 0 <= batch_norm_momentum <= 1:
        raise UserError(f"the BatchNorm momentum is {batch_norm_momentum}: use a number in [0, 1].")
    if not batch_norm_epsilon > 0:
        raise UserError(f"the BatchNorm epsilon is {batch_norm_epsilon}: use a positive number.")

    model = MODELS[name]
    layers = _layers.Layers(
        rngs=nnx.Rngs(params=seed),
        initialisation=model.torch_initialisation if initialisation == "torch" else _layers.FLAX_DEFAULT,
        padding=padding,
        batch_norm_momentum=batch_norm_momentum,
        batch_norm_epsilon=batch_norm_epsilon,
        batch_norm_groups=batch_norm_groups,
        rematerialise=rematerialise,
        dtype=DTYPES[dtype],
        convolve=_convolution.choose(convolution),
    )
    return model.build(layers, num_classes=num_classes, image_shape=image_shape, width=width, dropout=dropout)
