"""The benchmark runs end to end on a small network, and counts what it says it counts."""

import json

import jax
import numpy as np
import pytest

from benchmarks import update_cost


@pytest.fixture(scope="module")
def params():
    return update_cost.normal_params(update_cost.parameter_shapes("mlp", 0.0625))


def test_tree_is_that_of_resnet18():
    leaves = jax.tree.leaves(update_cost.parameter_shapes("resnet18", 1.0))
    assert sum(np.prod(leaf.shape) for leaf in leaves) == 11_173_962


def test_trivial_gradient_is_the_gradient_of_its_loss(params):
    def loss(params):
        return sum(((w**2 - 1) ** 2).sum() for w in jax.tree.leaves(params)) / 4

    for computed, expected in zip(
        jax.tree.leaves(update_cost.trivial_gradient(params)), jax.tree.leaves(jax.grad(loss)(params)), strict=True
    ):
        np.testing.assert_allclose(computed, expected, rtol=1e-5, atol=1e-6)


def test_every_ratio_compares_methods_that_are_measured():
    assert {name for ratio in update_cost.RATIOS for name in ratio[:2]} <= set(update_cost.METHODS)


@pytest.mark.parametrize("gradient", update_cost.GRADIENTS)
def test_saner_reads_at_most_one_tree_more_than_sam(gradient, params):
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    sam, saner = (update_cost.prepare(name, gradient, params, 1, 1).measured for name in ("SAM", "SANER"))
    # A twentieth of a tree for scalars: steps, norms and the like weigh more in a small network.
    assert saner["bytes_accessed"] - sam["bytes_accessed"] <= 1.05 * size
    assert saner["temporary_bytes"] - sam["temporary_bytes"] <= 1.05 * size


@pytest.mark.slow
def test_command_prints_tables_and_writes_json(tmp_path, capsys):
    chosen = ("SGD", update_cost.OPTAX_SAM, "SAM", "SANER")
    path = tmp_path / "new" / "cost.json"
    arguments = "--model mlp --width 0.0625 --rounds 3 --compiles 1 --gradient fused --batch-size 4 --training-steps 1"
    results = update_cost.main([*arguments.split(), "--methods", *chosen, "--return-memory", "--output", str(path)])
    assert json.loads(path.read_text()) == results
    assert set(results["gradients"]["fused"]["methods"]) == set(chosen)
    printed = capsys.readouterr().out
    for name in (*chosen, "SANER / SAM", "training step"):
        assert name in printed


def test_several_steps_in_one_call_move_the_weights_further(params):
    one, three = (update_cost.prepare("SANER", "fused", params, steps_per_call=n, compiles=1).call for n in (1, 3))
    for call, calls in ((one, 3), (three, 1)):
        for _ in range(calls):
            call()
    for a, b in zip(jax.tree.leaves(one.carry), jax.tree.leaves(three.carry), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
