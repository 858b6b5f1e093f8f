"""A decoder-only transformer whose parameters are cut over the devices along their embedding dimension.

Every parameter names its cut where it is made (``nnx.with_partitioning``), so that Flax can derive the placement of
parameters, gradients and optimizer state from the model alone. The batch is cut over the same axis of the mesh. A block
gathers its weights when it computes. Blocks are one scanned, rematerialized computation, so that a device need not hold
more than one block's whole weights at a time, and compile time does not grow with their number.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

DEVICES = "devices"
"""The one axis of the mesh: the batch and the parameters are both cut over it."""


def cut_batch(x: jax.Array) -> jax.Array:
    """Keep the leading dimension of an activation on the devices of its samples, or XLA may gather it, not weights."""
    return jax.lax.with_sharding_constraint(x, P(DEVICES))


def causal_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attend to the past; all of shape (batch, length, heads, size).

    Written out because ``jax.nn.dot_product_attention`` takes its softmax in float32, also of float64.
    """
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / jnp.sqrt(query.shape[-1]).astype(query.dtype)
    past = jnp.tri(query.shape[1], dtype=bool)
    weights = jax.nn.softmax(jnp.where(past, scores, -jnp.inf))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


class Block(nnx.Module):
    """Causal self-attention and a feed-forward layer, each behind a norm and added to its input."""

    def __init__(self, embedding: int, heads: int, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, param_dtype=dtype, rngs=rngs)
        self.heads = heads
        self.attention_norm = _norm(embedding, dtype, rngs)
        self.qkv = linear(embedding, 3 * embedding, kernel_init=_normal(DEVICES, None))
        self.attention_out = linear(embedding, embedding, kernel_init=_normal(None, DEVICES))
        self.feed_forward_norm = _norm(embedding, dtype, rngs)
        self.up = linear(embedding, 4 * embedding, kernel_init=_normal(DEVICES, None))
        self.down = linear(4 * embedding, embedding, kernel_init=_normal(None, DEVICES))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map activations (batch, length, embedding) to the same shape."""
        heads = self.qkv(self.attention_norm(x)).reshape(*x.shape[:2], self.heads, -1)
        attended = causal_attention(*jnp.split(heads, 3, axis=-1))
        x = cut_batch(x + self.attention_out(attended.reshape(x.shape)))
        return cut_batch(x + self.down(nnx.gelu(self.up(self.feed_forward_norm(x)))))


class Transformer(nnx.Module):
    """Predict every next token of a sequence."""

    def __init__(
        self,
        vocabulary: int,
        length: int,
        embedding: int,
        heads: int,
        layers: int,
        dtype: jax.typing.DTypeLike = jnp.float32,
        *,
        rngs: nnx.Rngs,
    ):
        embed = functools.partial(
            nnx.Embed, features=embedding, param_dtype=dtype, embedding_init=_normal(None, DEVICES), rngs=rngs
        )

        # The parameters of all blocks are stacked along a first dimension, which is not cut.
        @nnx.split_rngs(splits=layers)
        @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
        def blocks(rngs: nnx.Rngs) -> Block:
            return Block(embedding, heads, dtype, rngs)

        self.tokens = embed(vocabulary)
        self.positions = embed(length)
        self.blocks = blocks(rngs)
        self.norm = _norm(embedding, dtype, rngs)
        self.out = nnx.Linear(
            embedding, vocabulary, use_bias=False, param_dtype=dtype, kernel_init=_normal(DEVICES, None), rngs=rngs
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map tokens, int (batch, length), to logits (batch, length, vocabulary)."""

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, transform_metadata={nnx.PARTITION_NAME: None})
        @nnx.remat
        def through(x: jax.Array, block: Block) -> jax.Array:
            return block(x)

        x = cut_batch(self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1])))
        return self.out(self.norm(through(x, self.blocks)))


def _normal(*cut: str | None) -> nnx.Initializer:
    return nnx.with_partitioning(nnx.initializers.normal(0.02), cut)


def _norm(embedding: int, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> nnx.RMSNorm:
    ones = nnx.with_partitioning(nnx.initializers.ones_init(), (DEVICES,))
    return nnx.RMSNorm(embedding, param_dtype=dtype, scale_init=ones, rngs=rngs)
