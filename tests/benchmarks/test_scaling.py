"""What is counted in compiled programs, and that the benchmark of growth runs end to end."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import scaling
from benchmarks.machinery import collectives
from examples.sharded_transformer import training

pytestmark = pytest.mark.usefixtures("quick_compile")

SMALL = training.Config(vocabulary=8, length=4, embedding=16, heads=2, layers=1, batch=8)


def test_collectives_in_loops_count_as_often_as_they_run():
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    x = jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=NamedSharding(mesh, P("x")))

    def summed(x):
        return jax.lax.psum(x, "x")

    inside = jax.shard_map(summed, mesh=mesh, in_specs=P("x"), out_specs=P())

    def loop(x):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tile(inside(x), (4, 1)), x)

    assert collectives.moved(jax.jit(inside).lower(x).compile()) == {("all-reduce", "f32[2,3]"): 1}
    counted = collectives.moved(jax.jit(loop, out_shardings=NamedSharding(mesh, P("x"))).lower(x).compile())
    assert counted["all-reduce", "f32[2,3]"] == 5


def test_arrays_of_combined_and_asynchronous_collectives():
    text = """
ENTRY %main.1 (p: f32[2]) -> f32[2] {
  %a = (f32[], /*index=1*/bf16[4,8]{1,0}) all-reduce(%x, %y), channel_id=1
  %b = (f32[2]{0}, f32[8]{0}) all-gather-start(%p), dimensions={0}
  %c = f32[8]{0} all-gather-done(%b)
}
"""
    counted = collectives.moved(types.SimpleNamespace(as_text=lambda: text))
    assert counted == {("all-reduce", "f32[]"): 1, ("all-reduce", "bf16[4,8]"): 1, ("all-gather", "f32[8]"): 1}
    assert collectives.received(counted) == {"all-gather": 32, "all-reduce": 68}


def test_exponent_is_that_of_a_power():
    sizes = [1, 10, 100, 1000]
    assert scaling.exponent(sizes, [5, 1, 0.5 * 100**1.5, 0.5 * 1000**1.5]) == pytest.approx(1.5)
    assert scaling.exponent(sizes, [1, 2, 3, -1]) is None


@pytest.mark.slow
def test_command_writes_draws_and_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "TRANSFORMER", SMALL)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # eight devices are there already
    figure = tmp_path / "figure.png"
    arguments = f"--leaves 2 4 --parameters 100 1000 --devices 2 --repeats 1 --rounds 3 --figure {figure}"
    results = scaling.main([*arguments.split(), "--output", str(tmp_path / "scaling.json")])
    assert figure.stat().st_size > 10_000
    assert (tmp_path / "scaling.json").exists()
    assert [row["leaves"] for row in results["leaves"]] == [2, 4]
    (two,) = results["devices"]
    gathered = two["SANER"]["received_bytes"]["all-gather"]
    assert gathered == two["two passes"]["received_bytes"]["all-gather"] > 0
    printed = capsys.readouterr().out
    for text in ("| leaves |", "| parameters |", "| devices |", "what SANER adds"):
        assert text in printed
