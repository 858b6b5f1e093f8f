"""What a precision costs is told from gradients, and end to end on the digits."""

import json

import numpy as np
import pytest

from benchmarks import precision

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_mask_is_the_method_s():
    g = np.array([1.0, 1.0, 1.0, 1.0, -1.0, -1.0, 0.0, 1.0])
    h = np.array([0.5, 1.5, -0.5, 1.0, -0.5, 0.5, 1.0, 0.0])
    np.testing.assert_array_equal(precision.mask(g, h), [1, 0, 0, 0, 1, 0, 0, 0])


def test_costs_of_known_gradients():
    g, h = np.array([2.0, 2.0, 2.0, 2.0]), np.array([1.0, 1.0, 3.0, 3.0])
    exact = precision.against((g, h), (g, h))
    assert exact.pop("agreement") == 1 and set(exact.values()) == {0.0}
    # One element moves from below g to above it: a quarter of the mask, half of that element of the update.
    rounded = h + np.array([1.5, 0, 0, 0])
    costs = precision.against((g, h), (g, rounded))
    update = np.linalg.norm([0.5, 0.5, 3, 3])
    assert costs["agreement"] == 0.75
    assert costs["gradient_error"] == 0
    assert costs["perturbed_gradient_error"] == pytest.approx(1.5 / np.linalg.norm(h))
    assert costs["update_error"] == pytest.approx((2.5 - 0.5) / update)
    assert costs["update_error_of_flips"] == pytest.approx(0.5 / update)


@pytest.mark.slow
def test_command(tmp_path, capsys, toy):
    """In float32 gradients are nearer to float64 than in emulated TF32; both train from the same start."""
    path = tmp_path / "precision.json"
    toy[toy.index("--batch-size") + 1] = "256"
    arguments = ["--epochs", "1", "--points", "2", "--seeds", "0", "--precisions", "float32", "tf32"]
    results = precision.main([*toy, *arguments, "--output", str(path)])
    assert json.loads(path.read_text()) == json.loads(json.dumps(results))
    assert [point["step"] for point in results["masks"]] == [0, 4]
    for point in results["masks"]:
        fine, coarse = (point["precisions"][name] for name in ("float32", "tf32"))
        assert fine["gradient_error"] < 1e-5 < 1e-4 < coarse["gradient_error"] < 1e-2
        assert 0.9 < coarse["agreement"] <= fine["agreement"] <= 1
    accuracies = [one["test_accuracy"] for one in results["runs"][0]["precisions"].values()]
    assert max(accuracies) - min(accuracies) < 0.05
    printed = capsys.readouterr().out
    assert "tf32 (emulated)" in printed and "against float32, by seed" in printed
