"""Eight virtual CPU devices, before JAX is imported, for ``pmap`` and ``shard_map``; a quick compiler on request."""

import os

import pytest

FLAG = "--xla_force_host_platform_device_count"
if FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}=8".strip()


@pytest.fixture(scope="module")
def quick_compile():
    """Compile without LLVM's optimizations: for modules that compile many small programs and run each a few times."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
