"""Floating-point operations of a network, counted from its convolutions and linear layers.

XLA's cost analysis misses library calls on GPUs and counts a loop's body once, so the count is taken from the forward
pass as JAX traces it, before any compiler sees it. One multiplication with its addition is two operations. A backward
pass costs twice its forward pass, one product for the gradient of the inputs and one for that of the weights, so a pass
costs three forward passes; that the first layer needs no gradient of its inputs is left out of account, as is all
element-wise work.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from examples.noisy_images import models

PER_PASS = 6
"""Operations of a forward and a backward pass, per multiplication of the forward pass."""


def network(model: str, *, width: float, num_classes: int, image_shape: tuple[int, int, int]) -> int:
    """Return the multiplications of a model's forward pass for one image."""
    build = functools.partial(
        models.create, model, num_classes=num_classes, image_shape=image_shape, seed=0, width=width
    )
    graph, variables = nnx.split(nnx.eval_shape(build))

    def forward(variables: Any, images: jax.Array) -> jax.Array:
        return nnx.merge(graph, variables)(images, train=False)

    return multiplications(forward, variables, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))


def multiplications(function: Callable[..., Any], *arguments: Any) -> int:
    """Return the multiplications in all convolutions and matrix products of a function; loops count once."""
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        shapes = [variable.aval.shape for variable in equation.invars]
        if equation.primitive is core.primitives.conv_general_dilated_p:
            # The kernel's output features are also an axis of the result; what is left of it is one output's window.
            features = equation.params["dimension_numbers"].rhs_spec[0]
            total += math.prod(equation.outvars[0].aval.shape) * math.prod(shapes[1]) // shapes[1][features]
        elif equation.primitive is core.primitives.dot_general_p:
            contracted = equation.params["dimension_numbers"][0][0]
            total += math.prod(equation.outvars[0].aval.shape) * math.prod(shapes[0][axis] for axis in contracted)
        total += sum(_count(inner) for inner in core.jaxprs_in_params(equation.params))
    return total
