"""Peers: skipped by name where they are missing, compared before they are timed, timed in turns."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest

from benchmarks import peers
from benchmarks.machinery.sides import worker
from benchmarks.machinery.sides.problem import Problem

PROBLEM = Problem(width=0.125, batch_size=4, steps=1, precision="float32", compile=False)


def test_missing_peer_is_skipped_by_name(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in peers.PEERS else found(name))
    results = peers.main([])
    assert results["skipped"] == dict.fromkeys(("torch", "pytorch-optimizer"), 'pip install -e ".[bench]"')
    assert results["targets"] == {}
    printed = capsys.readouterr()
    assert 'torch is not installed (`pip install -e ".[bench]"`)' in printed.out
    assert "skipping PyTorch: pytorch-optimizer" in printed.err


def tensors(change=0.0, loss=2.0):
    before = {"conv.weight": np.ones((2, 3)), "norm.running_mean": np.zeros(2), "norm.running_var": np.ones(2)}
    after = {name: array + 0.1 for name, array in before.items()}
    after["conv.weight"] = after["conv.weight"] + change
    return before, after | {"loss": np.float64(loss)}


def test_agreement_is_relative_to_the_update():
    before, ours = tensors()
    assert peers.agreement(before, ours, tensors()[1])["agrees"]
    apart = peers.agreement(before, ours, tensors(change=0.001)[1])
    assert apart["update"] == pytest.approx(0.01) and not apart["agrees"]
    assert not peers.agreement(before, ours, tensors(loss=2.001)[1])["agrees"]


def test_known_difference_of_running_variances_does_not_count():
    before, ours = tensors()
    theirs = tensors()[1]
    theirs["norm.running_var"] = theirs["norm.running_var"] * 1.01
    assert peers.agreement(before, ours, theirs)["agrees"]


class Silent:
    """A worker that only counts what it is asked, and cannot do one method."""

    asked: list

    def __init__(self, side, problem):
        self.side = side

    def ask(self, do, **parts):
        Silent.asked.append((self.side, do, parts.get("method")))
        if (self.side, do, parts.get("method")) == ("pytorch", "run", "sgd"):
            raise peers.WorkerError("pytorch, asked to run: no")
        return {"device": self.side}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_sides_take_turns_and_one_that_fails_is_noted(monkeypatch):
    Silent.asked = []
    monkeypatch.setattr(peers, "Worker", Silent)
    args = peers.parse(["--methods", "saner", "sgd", "--rounds", "5", "--warm-up", "1"])
    results = peers.compare(PROBLEM, args, peers.timing.Budget())
    assert set(results["methods"]) == {"ours, saner", "PyTorch, saner", "ours, sgd"}
    assert list(results["ratios"]) == ["PyTorch, saner / ours, saner"]
    assert set(results["targets"]) == {"pytorch_over_ours_cpu"}
    assert results["notes"] == ["pytorch, asked to run: no"]
    assert Silent.asked.count(("pytorch", "run", "saner")) == Silent.asked.count(("ours", "run", "saner")) == 7


def test_difference_stops_the_comparison(monkeypatch, capsys):
    before, ours = tensors()
    differing = {"saner": peers.agreement(before, ours, tensors(change=1.0)[1])}
    monkeypatch.setattr(peers, "missing", dict)
    monkeypatch.setattr(peers, "check", lambda *_: differing)
    results = peers.main([])
    assert results["methods"] == {} and "**no: not timed**" in capsys.readouterr().out


def test_worker_answers_line_by_line_and_says_what_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    problem = dataclasses.replace(PROBLEM, side=8, crop_padding=0, flip=False)
    with peers.Worker("ours", problem) as started:
        assert started.ask("describe")["device"] == "cpu"
        started.ask("first", to=str(tmp_path / "first.npz"))
        with pytest.raises(peers.WorkerError, match="ours, asked to dance: ValueError: no such request"):
            started.ask("dance")
        # It goes on.
        assert started.ask("describe")["device"] == "cpu"
    with np.load(tmp_path / "first.npz") as first:
        assert first["conv.weight"].shape == (8, 3, 3, 3)
        assert first["classifier.weight"].shape == (10, 64)
        assert {"norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"} <= set(first)


def test_worker_that_dies_is_an_error_not_a_hang():
    with pytest.raises(peers.WorkerError, match="its process ended"), peers.Worker("nobody", PROBLEM) as worker:
        worker.ask("describe")


def test_problem_survives_its_journey_as_json():
    sent = Problem(**json.loads(json.dumps(dataclasses.asdict(PROBLEM))))
    for a, b in zip(sent.data(), PROBLEM.data(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_pytorch_computes_the_same_step():
    """Where the peers are installed: in float64 the two sides' steps are one."""
    for module in peers.PEERS:
        pytest.importorskip(module)
    checks = peers.check(["sgd", "sam", "saner"])
    assert all(checked["agrees"] for checked in checks.values()), checks


def test_answer_passes_requests_on():
    class Side:
        def prepare(self, method):
            self.prepared = method

    side = Side()
    assert worker.answer(side, {"do": "prepare", "method": "saner"}) == {}
    assert side.prepared == "saner"
