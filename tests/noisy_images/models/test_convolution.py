"""Convolutions for CPUs compute what JAX's own do, under every transformation that the program puts around them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.noisy_images import models
from examples.noisy_images.errors import UserError
from examples.noisy_images.models import convolution

pytestmark = pytest.mark.usefixtures("quick_compile")

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
# Batch, height, width, inputs, outputs, height and width of the kernel, stride, padding.
SHAPES = {
    "3x3": (6, 8, 8, 4, 5, (3, 3), 1, ((1, 1), (1, 1))),
    "stride": (6, 8, 8, 4, 5, (3, 3), 2, ((1, 1), (1, 1))),
    "1x1": (6, 8, 8, 4, 5, (1, 1), 1, ((0, 0), (0, 0))),
    "projection": (6, 8, 8, 4, 5, (1, 1), 2, "SAME"),
    "odd": (7, 9, 11, 3, 5, (3, 3), 2, "SAME"),
    "oblong": (5, 7, 6, 3, 2, (2, 3), 1, ((0, 2), (1, 0))),
    "stem": (3, 20, 21, 3, 4, (7, 7), 2, ((3, 3), (3, 3))),
    "valid": (4, 6, 5, 2, 3, (3, 3), 1, "VALID"),
    "more padding than window": (4, 6, 5, 2, 3, (2, 2), 3, ((3, 2), (0, 4))),
    "pixels that no window sees": (2, 7, 8, 2, 3, (2, 2), 3, "VALID"),
    "cut": (4, 9, 9, 2, 3, (3, 3), 1, ((-1, 0), (0, -2))),
    "one image": (1, 5, 5, 2, 3, (3, 3), 1, "SAME"),
}
EXACT = {"float32": 2e-6, "float64": 1e-14, "bfloat16": 3e-2}


def operands(shape, dtype=np.float32):
    batch, height, width, inputs, outputs, size, stride, padding = SHAPES[shape]
    rng = np.random.default_rng(len(shape))
    images, kernel = rng.normal(size=(batch, height, width, inputs)), rng.normal(size=(*size, inputs, outputs))
    return jnp.asarray(images, dtype), jnp.asarray(kernel, dtype), (stride, stride), padding


def loss_of(convolve, strides, padding, **options):
    def loss(images, kernel):
        y = convolve(images, kernel, strides, padding, dimension_numbers=DIMENSIONS, **options)
        return jnp.sum(jnp.sin(y.astype(jnp.promote_types(y.dtype, jnp.float32))))

    return loss


def both(strides, padding, **options):
    """Return the loss through the convolution that is tested, and through JAX's own."""
    return [
        loss_of(f, strides, padding, **options) for f in (convolution.conv_general_dilated, lax.conv_general_dilated)
    ]


def assert_close(actual, expected, rtol=2e-6):
    """Compare with the largest entry: a sum's rounding is relative to its largest terms."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        a, b = np.asarray(a, float), np.asarray(b, float)
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_jax(shape, dtype):
    with jax.enable_x64(dtype == "float64"):
        images, kernel, strides, padding = operands(shape, jnp.dtype(dtype))
        ours, jaxs = (jax.jit(jax.value_and_grad(f, (0, 1)))(images, kernel) for f in both(strides, padding))
        assert_close(ours[0], jaxs[0], rtol=0)
        assert_close(ours[1], jaxs[1], rtol=EXACT[dtype])


@pytest.mark.parametrize("shape", SHAPES)
def test_every_convolution_is_in_the_order_that_xla_computes_fast(shape):
    images, kernel, strides, padding = operands(shape)
    orders = [
        re.findall(
            r"lhs_spec=\(([\d, ]+)\).*?rhs_spec=\(([\d, ]+)\)",
            str(jax.make_jaxpr(jax.grad(f, (0, 1)))(images, kernel)),
            re.S,
        )
        for f in both(strides, padding)
    ]
    assert orders[0] == 3 * [("0, 3, 1, 2", "3, 2, 0, 1")]
    assert orders[1] != orders[0]


def test_what_is_convolved_is_computed_once():
    """A loop stands between what makes the images and what reads them, in the compiled program too."""
    images, kernel, strides, padding = operands("3x3")
    loops = []
    for f in both(strides, padding):
        gradient = jax.jit(jax.grad(lambda images, kernel, f=f: f(jnp.tanh(images), kernel), 1))
        text = gradient.lower(images, kernel).compile().as_text()
        loops.append(len(re.findall(r" while\(", text)))
    assert loops == [1, 0]


@pytest.mark.parametrize(
    "options",
    [
        {"feature_group_count": 2},
        {"rhs_dilation": (2, 2)},
        {"lhs_dilation": (2, 2)},
        {"preferred_element_type": "float64"},
    ],
)
def test_whatever_else_is_asked_for_is_jaxs(options):
    with jax.enable_x64(True):
        images, kernel, strides, padding = operands("3x3")
        kernel = kernel[:, :, : 4 // options.get("feature_group_count", 1), :4]
        ours, jaxs = (jax.make_jaxpr(jax.grad(f, (0, 1)))(images, kernel) for f in both(strides, padding, **options))
        assert str(ours) == str(jaxs)


def test_other_layouts_are_jaxs():
    images, kernel, strides, padding = operands("3x3")

    def loss(convolve):
        return lambda x, k: jnp.sum(convolve(x.transpose(0, 3, 1, 2), k.transpose(3, 2, 0, 1), strides, padding) ** 2)

    ours, jaxs = (loss(f) for f in (convolution.conv_general_dilated, lax.conv_general_dilated))
    assert str(jax.make_jaxpr(jax.grad(ours))(images, kernel)) == str(jax.make_jaxpr(jax.grad(jaxs))(images, kernel))


def stacked(f):
    """Two batches, each with a kernel of its own."""
    return lambda images, kernel: jax.vmap(f)(jnp.stack([images, 2 * images]), jnp.stack([kernel, kernel + 1])).sum()


def each_sample(f):
    """Every image by itself."""
    return lambda images, kernel: jax.vmap(f, (0, None))(images[:, None], kernel).sum()


def scanned(f):
    """Two kernels in turn, on one batch."""
    return lambda images, kernel: lax.scan(
        lambda total, factor: (total + f(images, factor * kernel), None), 0.0, jnp.asarray([1.0, 0.5])
    )[0]


@pytest.mark.parametrize("around", [jax.checkpoint, stacked, each_sample, scanned])
@pytest.mark.parametrize("shape", ["stride", "odd"])
def test_gradients_under_transformations(around, shape):
    images, kernel, strides, padding = operands(shape)
    ours, jaxs = (jax.jit(jax.grad(around(f), (0, 1)))(images, kernel) for f in both(strides, padding))
    assert_close(ours, jaxs, rtol=1e-5)


@pytest.mark.parametrize("order", ["forward over reverse", "reverse over reverse"])
@pytest.mark.parametrize("jitted", [False, True])
def test_products_with_the_hessian(order, jitted):
    """In float64: the second derivatives of a sine have summands that cancel."""
    with jax.enable_x64(True):
        images, kernel, strides, padding = operands("odd", np.float64)
        vector = jax.tree.map(jnp.cos, (images, kernel))

        def product(f):
            gradient = jax.grad(f, (0, 1))
            gradient = jax.jit(gradient) if jitted else gradient
            if order == "forward over reverse":
                return jax.jvp(gradient, (images, kernel), vector)[1]

            def along(*point):
                return sum(jnp.sum(a * b) for a, b in zip(gradient(*point), vector, strict=True))

            return jax.grad(along, (0, 1))(images, kernel)

        assert_close(*map(product, both(strides, padding)), rtol=1e-12)


@pytest.mark.parametrize("shape", ["3x3", "odd"])
def test_devices_that_share_a_batch_send_no_images(shape):
    images, kernel, strides, padding = operands(shape)
    images = jnp.concatenate([images, images + 1, images - 1, images / 2])  # 24 and 28: shares of 6 and 7
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    ours, jaxs = (jax.jit(jax.grad(f, (0, 1))) for f in both(strides, padding))
    shared = jax.device_put(images, NamedSharding(mesh, P("data"))), jax.device_put(kernel, NamedSharding(mesh, P()))
    compiled = ours.lower(*shared).compile()
    assert_close(compiled(*shared), jaxs(images, kernel), rtol=1e-5)
    program = compiled.as_text()
    assert not re.search("all-gather|all-to-all|collective-permute", program)
    assert len(re.findall(r"= .* all-reduce(-start)?\(", program)) == 1


@pytest.mark.parametrize("check_vma", [False, True])
def test_gradients_inside_shard_map(check_vma):
    images, kernel, strides, padding = operands("3x3")
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))

    def gradient(f):
        def of_share(images, kernel):
            kernel = lax.pcast(kernel, "data", to="varying") if check_vma else kernel
            return lax.psum(jax.grad(f, 1)(images, kernel), "data")

        return jax.jit(
            jax.shard_map(of_share, mesh=mesh, in_specs=(P("data"), P()), out_specs=P(), check_vma=check_vma)
        )(images, kernel)

    assert_close(*map(gradient, both(strides, padding)), rtol=1e-5)


def test_a_network_takes_these_convolutions_on_cpus_alone(monkeypatch):
    def convolutions(**options):
        model = models.create("small_cnn", image_shape=(8, 8, 1), num_classes=10, width=0.25, seed=0, **options)
        return {layer.conv_general_dilated for layer in model.convs}

    assert convolutions() == convolutions(convolution="auto") == {convolution.conv_general_dilated}
    assert convolutions(convolution="xla") == {lax.conv_general_dilated}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert convolutions() == {lax.conv_general_dilated}
    with pytest.raises(UserError, match="convolution"):
        convolutions(convolution="winograd")


def test_a_network_has_the_gradients_of_jax():
    images = np.random.default_rng(0).normal(size=(8, 12, 12, 3)).astype(np.float32)

    def gradient(name):
        model = models.create(
            "small_cnn", image_shape=(12, 12, 3), num_classes=10, width=0.25, seed=0, convolution=name
        )
        graph, params, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)

        def loss(params):
            return jnp.sum(jnp.sin(nnx.merge(graph, params, statistics, copy=True)(images, train=True)))

        return jax.jit(jax.grad(loss))(params)

    assert_close(gradient("auto"), gradient("xla"), rtol=2e-5)
