"""Small networks that train in seconds to minutes on a CPU."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from .layers import BatchNorm, Layers, global_average, scale_width


class Linear(nnx.Module):
    """Classify features, or flattened images, by one linear layer: (B, ...) to float32 logits (B, num_classes).

    Multinomial logistic regression: neither a width nor dropout changes it.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        num_classes: int,
        image_shape: tuple[int, ...],
        width: float,
        dropout: float,
    ):
        self.classifier = layers.linear(math.prod(image_shape), num_classes)

    def __call__(self, x: jax.Array, train: bool, rngs: nnx.Rngs | None = None) -> jax.Array:
        return self.classifier(x.reshape(x.shape[0], -1)).astype(jnp.float32)


class MLP(nnx.Module):
    """Classify flattened images by two hidden layers of 512: (B, H, W, C) to float32 logits (B, num_classes).

    Without BatchNorm, so that a sample's logits do not depend on its batch. Dropout follows each hidden layer.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        num_classes: int,
        image_shape: tuple[int, int, int],
        width: float,
        dropout: float,
    ):
        self.remat = layers.remat
        hidden = scale_width(512, width)
        self.hidden1 = layers.linear(math.prod(image_shape), hidden)
        self.hidden2 = layers.linear(hidden, hidden)
        self.dropout = nnx.Dropout(dropout)
        self.classifier = layers.linear(hidden, num_classes)

    def __call__(self, x: jax.Array, train: bool, rngs: nnx.Rngs | None = None) -> jax.Array:
        def layer(hidden: nnx.Linear, x: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
            return self.dropout(nnx.relu(hidden(x)), deterministic=not train, rngs=rngs)

        x = x.reshape(x.shape[0], -1)
        for hidden in (self.hidden1, self.hidden2):
            x = self.remat(layer)(hidden, x, rngs)
        return self.classifier(x).astype(jnp.float32)


class SmallCNN(nnx.Module):
    """Classify images by four 3x3 convolutions with BatchNorm: (B, H, W, C) to float32 logits (B, num_classes).

    Channels double where the sides halve, so each convolution after the first costs the same: 15 million
    multiplications for a 32x32 image in all, 37 times fewer than ResNet-18. Dropout acts on the classifier's features.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        num_classes: int,
        image_shape: tuple[int, int, int],
        width: float,
        dropout: float,
    ):
        self.remat = layers.remat
        self.convs, self.norms = nnx.List(), nnx.List()
        inputs = image_shape[-1]
        for features, stride in ((32, 1), (64, 2), (128, 2), (256, 2)):
            outputs = scale_width(features, width)
            self.convs.append(layers.convolution(inputs, outputs, 3, stride))
            self.norms.append(layers.batch_norm(outputs))
            inputs = outputs
        self.dropout = nnx.Dropout(dropout)
        self.classifier = layers.linear(inputs, num_classes)

    def __call__(self, x: jax.Array, train: bool, rngs: nnx.Rngs | None = None) -> jax.Array:
        def layer(conv: nnx.Conv, norm: BatchNorm, x: jax.Array) -> jax.Array:
            return nnx.relu(norm(conv(x), train))

        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = self.remat(layer)(conv, norm, x)
        x = self.dropout(global_average(x), deterministic=not train, rngs=rngs)
        return self.classifier(x).astype(jnp.float32)
