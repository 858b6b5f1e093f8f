"""What is measured is the program's own step, whichever method is injected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.machinery import flops, workload
from examples.noisy_images.config import PAPER, replace
from examples.noisy_images.training import methods

pytestmark = pytest.mark.usefixtures("quick_compile")
TINY = replace(PAPER, model="mlp", width=0.03, batch_size=4)


def after_two_steps(method, **settings):
    call = (work := workload.Workload(replace(TINY, method=method, **settings))).repeated(work.compile())
    for _ in range(2):
        call()
    return call.carry


def test_optax_sam_takes_the_step_of_our_own():
    ours, theirs = (after_two_steps(name) for name in ("sam-unmonitored", "optax.contrib.sam"))
    assert int(ours.step) == int(theirs.step) == 2
    for a, b in zip(*(jax.tree.leaves(s.networks[0].params) for s in (ours, theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_methods_of_the_program_are_left_as_they_were():
    before = dict(methods.METHODS)
    workload.Workload(replace(TINY, method="optax.contrib.sam"))
    assert before == methods.METHODS
    assert set(workload.METHODS) == {*before, *workload.FURTHER}


def test_operations_of_a_call_are_counted_by_images_passes_and_steps():
    network = flops.network("mlp", width=0.03, num_classes=10, image_shape=(32, 32, 3))
    assert network == 32 * 32 * 3 * 15 + 15 * 15 + 15 * 10
    sgd = workload.Workload(replace(TINY, method="sgd"))
    saner = workload.Workload(TINY, steps_per_call=3)
    assert sgd.flops == 6 * 4 * network
    assert saner.flops == 2 * 3 * sgd.flops


def test_memory_of_a_known_function():
    x, y = jnp.ones(1000), jnp.ones(500)
    # x is given up and overwritten; y comes and goes; one float leaves.
    executable = jax.jit(lambda x, y: (x + 1, y.sum()), donate_argnums=0).lower(x, y).compile()
    memory = workload.Compiled(executable, 0.0, 0.0).memory()
    assert memory["argument_bytes"] == 6000
    assert memory["aliased_bytes"] == 4000
    assert 4004 <= memory["output_bytes"] <= 4004 + 64
    assert memory["peak_bytes"] == 6000 + memory["output_bytes"] - 4000 + memory["temporary_bytes"]


def test_several_steps_in_one_call_are_the_same_steps():
    steps = 2
    work = workload.Workload(replace(TINY, method="sgd"), steps_per_call=steps)
    scanned = work.repeated(work.compile())
    scanned()
    assert int(scanned.carry.step) == steps
