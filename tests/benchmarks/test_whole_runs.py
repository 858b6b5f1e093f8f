"""Whole runs beside PyTorch's: what is compared, what is left out; and, where PyTorch is installed, its loop."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import saner_jax
from benchmarks import whole_runs
from examples.noisy_images import data
from examples.noisy_images.config import configure, replace

SMALL = ["--dataset", "npz", "--width", "0.0625", "--subset", "32", "--test-subset", "8", "--epochs", "2"]


@pytest.fixture
def sides(monkeypatch):
    """Runs that are made up: PyTorch's noisy accuracies lie two points above, whatever the seed."""
    asked = []

    def side(name, shift):
        def train(config, folder):
            asked.append((name, config.optimizer.method, config.seed))
            noisy = {"sgd": 0.9, "sam": 0.6, "saner": 0.4}[config.optimizer.method] + config.seed / 100 + shift
            return {"last_noisy_accuracy": noisy, "best_test_accuracy": 0.3, "last_test_accuracy": 0.25}

        return train

    monkeypatch.setattr(whole_runs, "ours", side("ours", 0.0))
    monkeypatch.setattr(whole_runs, "theirs", side("PyTorch", 0.02))
    return asked


def test_both_sides_of_every_seed_and_their_differences(sides, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    results = whole_runs.main([*SMALL, "--seeds", "0", "2", "4", "--output", str(tmp_path / "results.json")])
    assert sides == [
        (side, method, seed)
        for seed in (0, 2, 4)
        for method in whole_runs.METHODS
        for side in (whole_runs.OURS, whole_runs.PYTORCH)
    ]
    assert json.loads((tmp_path / "results.json").read_text())["runs"] == results["runs"]
    printed = capsys.readouterr().out
    assert "| saner, ours | 3 | 42.0 ± 2.0 | 30.0 ± 0.0 |" in printed
    assert "| saner, PyTorch | 3 | 44.0 ± 2.0 |" in printed
    assert "| saner, ours minus PyTorch | 3 | -2.0 (" in printed


def test_without_pytorch_there_is_one_side(sides, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    results = whole_runs.main([*SMALL, "--seeds", "1", "--methods", "sam"])
    assert sides == [("ours", "sam", 1)] and results["skipped"] == {"torch": 'pip install -e ".[bench]"'}
    assert "PyTorch's side was left out: torch is not installed" in capsys.readouterr().out


def test_what_does_not_fit_the_time_is_left_out(sides, monkeypatch):
    results = whole_runs.main([*SMALL, "--seeds", "0", "--seconds", "1e-9"])
    assert results["runs"] == [] and sides == []


# --- the loop -----------------------------------------------------------------------------------------------------

needs_pytorch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
CONFIG = configure(
    model="resnet18", width=1 / 16, epochs=2, batch_size=8, rho=0.2, alpha=0.5, alpha_ramp=0.5, learning_rate=0.05
)


@pytest.fixture
def colours():
    """Thirty images of three classes that their colour tells, a few with wrong labels."""
    rng = np.random.default_rng(0)
    clean = np.arange(30, dtype=np.int32) % 3
    images = rng.integers(0, 60, (30, 8, 8, 3)) + 180 * np.eye(3, dtype=int)[clean][:, None, None]
    given = np.where(np.arange(30) < 6, (clean + 1) % 3, clean).astype(np.int32)
    split = data.Split(images.astype(np.uint8), given, clean, np.arange(30))
    test = dataclasses.replace(split.take(np.arange(20)), labels=clean[:20])
    return data.Dataset("colours", split, test, ("a", "b", "c"), None, (0.5,) * 3, (0.25,) * 3, 0, False)


@needs_pytorch
def test_the_loop_records_what_the_program_does(colours):
    from benchmarks import pytorch_loop

    history = pytorch_loop.train(replace(CONFIG, method="saner"), colours)
    assert [record["epoch"] for record in history] == [1, 2]
    assert {"noisy_accuracy", "clean_accuracy", "gap"} <= set(history[-1]) and set(history[0]) == {
        "epoch",
        "test_accuracy",
    }
    # A pure function of its configuration.
    assert pytorch_loop.train(replace(CONFIG, method="saner"), colours) == history
    assert pytorch_loop.train(replace(CONFIG, method="saner", seed=1), colours) != history


@needs_pytorch
def test_reductions_of_the_loop(colours):
    from benchmarks import pytorch_loop

    last = {
        name: pytorch_loop.train(replace(CONFIG, **settings), colours)[-1]["train_loss"]
        for name, settings in {
            "sgd": {"method": "sgd"},
            "sam": {"method": "sam"},
            "saner": {"method": "saner"},
            "no radius": {"method": "sam", "rho": 0.0},
            "no alpha": {"method": "saner", "alpha": 0.0},
        }.items()
    }
    assert last["no radius"] == pytest.approx(last["sgd"], rel=1e-4) and last["no alpha"] == last["sam"]
    assert len({last["sgd"], last["sam"], last["saner"]}) == 3


@needs_pytorch
@pytest.mark.parametrize("method", ["sgd", "sam", "saner"])
def test_the_loops_steps_are_the_librarys(method):
    """On a linear model: the same parameters after a few steps, with momentum and weight decay."""
    import torch

    from benchmarks import pytorch_loop

    rng = np.random.default_rng(0)
    start, inputs, targets = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 3), (8, 3), (8, 4)))
    network = torch.nn.Linear(3, 4, bias=False)
    with torch.no_grad():
        network.weight.copy_(torch.from_numpy(start))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.05)

    def backward():
        ((network(torch.from_numpy(inputs)) - torch.from_numpy(targets)) ** 4).mean().backward()

    stage = {"sgd": optax.identity(), "sam": saner_jax.sam(0.3), "saner": saner_jax.saner(0.3, 0.7)}[method]
    tx = optax.chain(
        optax.with_extra_args_support(stage), optax.add_decayed_weights(0.05), optax.sgd(0.1, momentum=0.9)
    )
    grad_fn = jax.grad(lambda w: jnp.mean((inputs @ w.T - targets) ** 4))
    params, state = jnp.asarray(start), tx.init(jnp.asarray(start))
    for _ in range(4):
        pytorch_loop.take_step(method, network, optimizer, backward, 0.3, 0.7)
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(network.weight.detach().numpy(), params, rtol=1e-4)


@needs_pytorch
def test_running_statistics_are_those_of_the_perturbed_pass():
    import torch

    from benchmarks import pytorch_loop

    network = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    images, seen = torch.randn(4, 3, 5, 5), []

    def backward():
        seen.append(network[0](images).mean((0, 2, 3)).detach())
        (network(images) ** 3).mean().backward()

    pytorch_loop.take_step("sam", network, optimizer, backward, 0.5, 0.0)
    assert not torch.allclose(seen[0], seen[1])
    torch.testing.assert_close(network[1].running_mean, 0.1 * seen[1])
    assert network[1].momentum == 0.1
