"""Warn of every public name of the package that the reference leaves out; under ``sphinx -W`` that fails the build."""

import inspect
from collections.abc import Iterator
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import saner_jax


def public_names() -> Iterator[str]:
    """Yield the full name of each public function, class and module, those of public modules included."""
    for name in saner_jax.__all__:
        value = getattr(saner_jax, name)
        yield f"saner_jax.{name}"
        if inspect.ismodule(value):
            for inner, member in vars(value).items():
                is_own = getattr(member, "__module__", None) == value.__name__
                if is_own and not inner.startswith("_"):
                    yield f"{value.__name__}.{inner}"


def check(app: Sphinx, env: BuildEnvironment) -> None:
    documented = env.domaindata["py"]["objects"]
    missing = sorted(set(public_names()) - set(documented))
    if missing:
        logging.getLogger(__name__).warning(
            "no page of docs/api documents %s: add it to the page of its stage.", ", ".join(missing)
        )


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
