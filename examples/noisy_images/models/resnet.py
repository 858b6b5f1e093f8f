"""Residual networks: He et al. 2016, "Deep Residual Learning for Image Recognition" (arXiv 1512.03385)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from .layers import Layers, global_average, scale_width


class BasicBlock(nnx.Module):
    """Add two 3x3 convolutions to a shortcut, projected by a 1x1 convolution where the shape changes."""

    def __init__(self, layers: Layers, inputs: int, outputs: int, stride: int):
        self.conv1 = layers.convolution(inputs, outputs, 3, stride)
        self.norm1 = layers.batch_norm(outputs)
        self.conv2 = layers.convolution(outputs, outputs, 3)
        self.norm2 = layers.batch_norm(outputs)
        self.projects = stride != 1 or inputs != outputs
        if self.projects:
            self.shortcut_conv = layers.convolution(inputs, outputs, 1, stride)
            self.shortcut_norm = layers.batch_norm(outputs)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x), train))
        y = self.norm2(self.conv2(y), train)
        if self.projects:
            x = self.shortcut_norm(self.shortcut_conv(x), train)
        return nnx.relu(x + y)


class ResNet(nnx.Module):
    """Classify images by four stages of basic blocks: (B, H, W, C) to float32 logits (B, num_classes).

    The CIFAR form has a 3x3 stem and no pooling before the last; the ImageNet form a 7x7 stem of stride 2 and a 3x3
    max-pool of stride 2. Dropout, where asked for, acts on the features of the classifier.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        blocks: Sequence[int],
        imagenet_stem: bool = False,
        num_classes: int,
        image_shape: tuple[int, int, int],
        width: float,
        dropout: float,
    ):
        channels = [scale_width(features, width) for features in (64, 128, 256, 512)]
        self.remat = layers.remat
        self.imagenet_stem = imagenet_stem
        self.pool_padding = layers.window_padding(3)
        self.conv = layers.convolution(image_shape[-1], channels[0], *((7, 2) if imagenet_stem else (3, 1)))
        self.norm = layers.batch_norm(channels[0])
        self.blocks = nnx.List()
        inputs = channels[0]
        for stage, (outputs, depth) in enumerate(zip(channels, blocks, strict=True)):
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                self.blocks.append(BasicBlock(layers, inputs, outputs, stride))
                inputs = outputs
        self.dropout = nnx.Dropout(dropout)
        self.classifier = layers.linear(inputs, num_classes)

    def __call__(self, x: jax.Array, train: bool, rngs: nnx.Rngs | None = None) -> jax.Array:
        x = nnx.relu(self.norm(self.conv(x), train))
        if self.imagenet_stem:
            x = nnx.max_pool(x, (3, 3), (2, 2), self.pool_padding)
        for block in self.blocks:
            x = self.remat(lambda block, x: block(x, train))(block, x)
        x = self.dropout(global_average(x), deterministic=not train, rngs=rngs)
        return self.classifier(x).astype(jnp.float32)
