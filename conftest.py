"""Names that the docstring examples use."""

import pytest


@pytest.fixture(autouse=True)
def _names_of_examples(doctest_namespace):
    import jax
    import jax.numpy as jnp
    import optax

    import saner_jax

    doctest_namespace.update(jax=jax, jnp=jnp, optax=optax, saner_jax=saner_jax)
