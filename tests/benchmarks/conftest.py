"""The smallest network that has all that the commands measure."""

import jax
import pytest

from benchmarks.machinery import peak


def pytest_itemcollected(item):
    """Leave the benchmarks to --everything."""
    item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def compilation_cache():
    """Switch the cache of compiled programs on again after a command that times compilation."""
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.fixture
def toy():
    """Options of a network that compiles in a second."""
    return ["--model", "mlp", "--width", "0.03", "--batch-size", "4"]


@pytest.fixture
def small_peak(monkeypatch):
    """Measure the device's ceilings on operations of no size."""
    monkeypatch.setitem(peak.SIZES, "cpu", peak.Sizes(64, (2, 8, 8, 16), 2**12))
