"""Densely connected networks: Huang et al. 2017, "Densely Connected Convolutional Networks" (arXiv 1608.06993)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from ..errors import UserError
from .layers import Layers, global_average, scale_width


class DenseLayer(nnx.Module):
    """Append `growth` channels, computed through a bottleneck of 4 `growth` channels, to the input's.

    Each convolution follows BatchNorm and ReLU. Dropout acts on the new channels.
    """

    def __init__(self, layers: Layers, inputs: int, growth: int, dropout: float):
        self.norm1 = layers.batch_norm(inputs)
        self.conv1 = layers.convolution(inputs, 4 * growth, 1)
        self.norm2 = layers.batch_norm(4 * growth)
        self.conv2 = layers.convolution(4 * growth, growth, 3)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x: jax.Array, train: bool, rngs: nnx.Rngs | None) -> jax.Array:
        y = self.conv1(nnx.relu(self.norm1(x, train)))
        y = self.conv2(nnx.relu(self.norm2(y, train)))
        return jnp.concatenate([self.dropout(y, deterministic=not train, rngs=rngs), x], axis=-1)


class Transition(nnx.Module):
    """Reduce channels by a 1x1 convolution after BatchNorm, without ReLU, and halve the sides by averaging."""

    def __init__(self, layers: Layers, inputs: int, outputs: int):
        self.norm = layers.batch_norm(inputs)
        self.conv = layers.convolution(inputs, outputs, 1)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return nnx.avg_pool(self.conv(self.norm(x, train)), (2, 2), (2, 2))


class DenseNet(nnx.Module):
    """Classify images by dense blocks in CIFAR form: (B, H, W, C) to float32 logits (B, num_classes).

    A 3x3 stem of 2 `growth` channels, no pooling before the first transition, compression 0.5. The width factor scales
    `growth`.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        blocks: Sequence[int],
        growth: int,
        num_classes: int,
        image_shape: tuple[int, int, int],
        width: float,
        dropout: float,
    ):
        smallest = 2 ** (len(blocks) - 1)
        if min(image_shape[:2]) < smallest:
            raise UserError(
                f"images of {image_shape[0]}x{image_shape[1]} are too small for a DenseNet of {len(blocks)} blocks: "
                f"use sides of at least {smallest}."
            )
        self.remat = layers.remat
        growth = scale_width(growth, width)
        features = 2 * growth
        self.conv = layers.convolution(image_shape[-1], features, 3)
        self.blocks = nnx.List()
        self.transitions = nnx.List()
        for stage, depth in enumerate(blocks):
            if stage > 0:
                self.transitions.append(Transition(layers, features, features // 2))
                features //= 2
            self.blocks.append(
                nnx.List(DenseLayer(layers, features + index * growth, growth, dropout) for index in range(depth))
            )
            features += depth * growth
        self.norm = layers.batch_norm(features)
        self.classifier = layers.linear(features, num_classes)

    def __call__(self, x: jax.Array, train: bool, rngs: nnx.Rngs | None = None) -> jax.Array:
        x = self.conv(x)
        for stage, block in enumerate(self.blocks):
            if stage > 0:
                x = self.transitions[stage - 1](x, train)
            for layer in block:
                x = self.remat(lambda layer, x, rngs: layer(x, train, rngs))(layer, x, rngs)
        x = global_average(nnx.relu(self.norm(x, train)))
        return self.classifier(x).astype(jnp.float32)
