"""The smallest network that has all that the commands measure."""

import pytest


@pytest.fixture
def toy():
    """Options of a network that compiles in a second."""
    return ["--model", "mlp", "--width", "0.03", "--batch-size", "4"]
