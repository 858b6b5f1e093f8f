"""Wide residual networks: Zagoruyko and Komodakis 2016, "Wide Residual Networks" (arXiv 1605.07146)."""

import jax
import jax.numpy as jnp
from flax import nnx

from .layers import Layers, global_average, scale_width


class PreActivationBlock(nnx.Module):
    """Add two 3x3 convolutions, each after BatchNorm and ReLU, to a shortcut.

    Where the number of channels or the size changes, the shortcut is a 1x1 convolution of the activated input;
    elsewhere it is the input as it came. Dropout acts between the convolutions.
    """

    def __init__(self, layers: Layers, inputs: int, outputs: int, stride: int, dropout: float):
        self.norm1 = layers.batch_norm(inputs)
        self.conv1 = layers.convolution(inputs, outputs, 3, stride)
        self.norm2 = layers.batch_norm(outputs)
        self.dropout = nnx.Dropout(dropout)
        self.conv2 = layers.convolution(outputs, outputs, 3)
        self.projects = stride != 1 or inputs != outputs
        if self.projects:
            self.shortcut_conv = layers.convolution(inputs, outputs, 1, stride)

    def __call__(self, x: jax.Array, train: bool, rngs: nnx.Rngs | None) -> jax.Array:
        activated = nnx.relu(self.norm1(x, train))
        y = nnx.relu(self.norm2(self.conv1(activated), train))
        y = self.conv2(self.dropout(y, deterministic=not train, rngs=rngs))
        return y + (self.shortcut_conv(activated) if self.projects else x)


class WideResNet(nnx.Module):
    """Classify images by three groups of pre-activation blocks: (B, H, W, C) to float32 logits (B, num_classes).

    WRN-d-k has (d - 4) / 6 blocks in a group, of 16 k, 32 k and 64 k channels, after a stem of 16.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        depth: int,
        widening: int,
        num_classes: int,
        image_shape: tuple[int, int, int],
        width: float,
        dropout: float,
    ):
        self.remat = layers.remat
        inputs = scale_width(16, width)
        self.conv = layers.convolution(image_shape[-1], inputs, 3)
        self.blocks = nnx.List()
        for features, group_stride in ((16, 1), (32, 2), (64, 2)):
            outputs = scale_width(features * widening, width)
            for block in range((depth - 4) // 6):
                stride = group_stride if block == 0 else 1
                self.blocks.append(PreActivationBlock(layers, inputs, outputs, stride, dropout))
                inputs = outputs
        self.norm = layers.batch_norm(inputs)
        self.classifier = layers.linear(inputs, num_classes)

    def __call__(self, x: jax.Array, train: bool, rngs: nnx.Rngs | None = None) -> jax.Array:
        x = self.conv(x)
        for block in self.blocks:
            x = self.remat(lambda block, x, rngs: block(x, train, rngs))(block, x, rngs)
        x = global_average(nnx.relu(self.norm(x, train)))
        return self.classifier(x).astype(jnp.float32)
