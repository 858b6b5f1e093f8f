"""Subjects take turns within a budget."""

import jax.numpy as jnp
import pytest

from benchmarks.machinery import timing


def test_every_round_calls_every_subject_once_in_changing_order():
    calls = []
    subjects = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = timing.interleaved(subjects, rounds=20, warm_up=2)
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abc", 20)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 22 and all(set(one) == set("abc") for one in rounds)
    assert len(set(rounds)) > 1


def test_timing_ends_with_the_budget_but_not_before_spread_can_be_seen():
    seconds = timing.interleaved({"a": lambda: None}, rounds=50, warm_up=0, budget=timing.Budget(1e-9))
    assert len(seconds["a"]) == timing.MINIMUM_ROUNDS


def test_budget_is_shared_out():
    assert timing.Budget().share(0.5).remaining() == float("inf")
    budget = timing.Budget(100)
    assert 49 < budget.share(0.5).remaining() <= 50
    assert timing.Budget(1e-9).remaining() == 0


def test_repeated_hands_on_its_result_and_notices_what_is_not_finite():
    double = timing.Repeated(lambda x: 2 * x, jnp.float32(1))
    for _ in range(3):
        double()
    assert double.carry == 8
    double.check_finite("double")
    with pytest.raises(FloatingPointError, match="overflow left non-finite"):
        timing.Repeated(lambda x: x, jnp.float32(jnp.inf)).check_finite("overflow")


def test_trace_is_written(tmp_path):
    with timing.trace(tmp_path):
        jnp.ones(3).block_until_ready()
    assert list(tmp_path.rglob("*.xplane.pb"))
