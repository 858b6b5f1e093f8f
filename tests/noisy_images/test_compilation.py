"""What XLA is asked for: on CPUs its own convolutions, and nothing where it has no such choice."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.noisy_images import compilation
from examples.noisy_images.config import DIGITS, replace
from examples.noisy_images.training import preparation
from examples.noisy_images.training.trainer import Trainer, compiled_functions


def loss(kernel, images):
    return jnp.sum(jnp.tanh(jax.lax.conv(images, kernel, (1, 1), "SAME")))


@pytest.fixture
def operands():
    kernel, images = (
        jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((24, 8, 3, 3), (6, 8, 12, 12)))
    )
    return kernel, images


def compiled(operands, convolution):
    gradients = jax.value_and_grad(loss, argnums=(0, 1))
    return jax.jit(gradients, compiler_options=compilation.options(convolution)).lower(*operands).compile()


def test_convolutions_and_their_gradients_are_handed_to_nobody(operands):
    text = compiled(operands, "auto").as_text()
    bodies = {block.split()[0] for block in text.split("\n\n") if " convolution(" in block}
    handed_over = re.findall(r'calls=(%[\w.-]+).*"kind":"__', text)
    assert bodies and not bodies & set(handed_over)


def test_values_and_gradients_are_those_of_the_default(operands):
    for ours, default in zip(
        jax.tree.leaves(compiled(operands, "auto")(*operands)),
        jax.tree.leaves(compiled(operands, "xla")(*operands)),
        strict=True,
    ):
        scale = float(jnp.max(jnp.abs(default)))
        np.testing.assert_allclose(ours, default, rtol=0, atol=1e-5 * scale)


def test_what_has_options_is_part_of_another_function_uncompiled(operands):
    gradient = jax.grad(loss)
    step = jax.jit(gradient, compiler_options={"xla_cpu_no_such_option": "1"})
    with pytest.raises(ValueError, match="compiler_options"):
        jax.jit(lambda *x: step(*x))(*operands)
    assert compilation.uncompiled(step) is gradient
    assert compilation.uncompiled(gradient) is gradient


def test_nothing_is_asked_of_an_accelerator_or_where_it_is_not_wanted(monkeypatch):
    assert compilation.options("xla") is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compilation.options() is None


def test_an_xla_without_the_option_is_left_alone(monkeypatch):
    monkeypatch.setattr(compilation, "_OPTIONS", {"xla_cpu_no_such_option": "1"})
    compilation._are_known.cache_clear()
    try:
        assert compilation.options() is None
    finally:
        compilation._are_known.cache_clear()


def test_a_run_is_compiled_as_its_configuration_says(monkeypatch):
    pytest.importorskip("sklearn")
    asked = []
    monkeypatch.setattr(
        compilation, "options", lambda convolution="auto": asked.append(convolution) or {"no_such": "1"}
    )
    compiled_functions.cache_clear()
    try:
        prepared = preparation.prepare(replace(DIGITS, model="small_cnn", width=0.125, convolution="xla"))
        trainer = Trainer(prepared.config, prepared.dataset)
        for steps in (trainer.train_epoch(), iter(lambda: trainer.evaluate(prepared.dataset.test), None)):
            with pytest.raises(jax.errors.JaxRuntimeError, match="no_such"):
                next(steps)
    finally:
        compiled_functions.cache_clear()
    assert asked == ["xla"]
