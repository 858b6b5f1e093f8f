"""Counted operations are the published ones."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.machinery import flops


@pytest.mark.parametrize(
    ("model", "billions"),
    [("resnet18", 0.555), ("resnet34", 1.159), ("wrn_40_2", 0.328), ("wrn_28_10", 5.243)],
)
def test_multiplications_of_the_networks(model, billions):
    # DenseNet-121's are 0.888 as published, too; tracing it takes four seconds.
    counted = flops.network(model, width=1.0, num_classes=10, image_shape=(32, 32, 3))
    assert counted / 1e9 == pytest.approx(billions, abs=5e-4)


def test_layers_are_counted_by_hand():
    image, kernel = jnp.zeros((2, 8, 8, 6)), jnp.zeros((3, 3, 2, 9))

    def strided_and_grouped(image, kernel):
        return jax.lax.conv_general_dilated(
            image,
            kernel,
            (2, 2),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=3,
        )

    # 4x4 places, 9 outputs, each over a 3x3 window of 2 of the 6 channels, for 2 images.
    assert flops.multiplications(strided_and_grouped, image, kernel) == 2 * 4 * 4 * 9 * 3 * 3 * 2
    assert flops.multiplications(jax.jit(jnp.matmul), jnp.zeros((4, 5, 6)), jnp.zeros((4, 6, 7))) == 4 * 5 * 6 * 7


def test_backward_pass_of_a_linear_layer_costs_twice_its_forward_pass():
    def loss(weights, x):
        return jnp.sum((x @ weights) ** 2)

    arguments = jnp.zeros((5, 7)), jnp.zeros((3, 5))
    both = jax.grad(loss, argnums=(0, 1))
    assert 2 * flops.multiplications(both, *arguments) == flops.PER_PASS * flops.multiplications(loss, *arguments)
