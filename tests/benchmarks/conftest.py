"""The smallest network that has all that the commands measure."""

import pytest

from benchmarks.machinery import peak


@pytest.fixture
def toy():
    """Options of a network that compiles in a second."""
    return ["--model", "mlp", "--width", "0.03", "--batch-size", "4"]


@pytest.fixture
def small_peak(monkeypatch):
    """Measure the device's ceilings on operations of no size."""
    monkeypatch.setitem(peak.SIZES, "cpu", peak.Sizes(64, (2, 8, 8, 16), 2**12))
