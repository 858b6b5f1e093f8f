"""What the quick run leaves out: further entries of lists of methods, where each compiles programs of its own."""

import pytest

# Test -> what its parameters are called that the quick run has. Every method is among those of some of the tests, and
# every test is run.
QUICK = {
    "test_params_and_state_can_be_donated": ("saner", "fsam+saner, every keyword", "plain stages"),
    "test_vmap_over_an_ensemble": ("saner", "sam+saner, random", "composition"),
    "test_sharded_arrays_under_jit": ("gsam", "vasso+sgd_d", "asam, masked", "saner, scheduled and monitored"),
    "test_only_scalars_move": ("sam-", "asam+saner-monitored", "gsam+saner-", "fsam+saner-monitored", "vasso+saner-"),
    "test_saner_on_every_method_equals_its_reference": ("0-float32", "0.5-float64", "1-float64"),
    "test_groups_with_sharded_parameters_equal_the_loop_over_groups": ("saner-2x4", "fsam+saner-4x2", "gsam+saner-2x2"),
}


def pytest_itemcollected(item):
    quick = QUICK.get(getattr(item, "originalname", None))
    if quick and not any(item.callspec.id == name or item.callspec.id.endswith(f"-{name}") for name in quick):
        item.add_marker(pytest.mark.slow)
