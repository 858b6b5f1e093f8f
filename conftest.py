"""The quick run and the whole one, compiled programs kept between processes, and names that docstring examples use."""

import os
import sys
import tempfile

import pytest

LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser):
    parser.addoption("--everything", action="store_true", help="run the tests marked slow as well")


def pytest_configure(config):
    config.stash[LEFT_OUT] = 0
    # One folder for this process, those of xdist and all that tests start, which inherit the environment. It ends with
    # the run: a process that a test kills may leave a truncated program behind.
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = tempfile.TemporaryDirectory(prefix="saner_jax_tests_")
        config.add_cleanup(folder.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
    if jax := sys.modules.get("jax"):  # a conftest named on the command line has imported it
        jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
        seconds = float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def _whole(config):
    """Whether nothing is left out: on request, or where a marker expression chooses."""
    return config.option.everything or bool(config.option.markexpr)


def pytest_collection_modifyitems(config, items):
    if _whole(config):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    items[:] = [item for item in items if not item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    config.stash[LEFT_OUT] = len(slow)


def pytest_report_header(config):
    return None if _whole(config) else "the quick run: tests marked slow are left out, --everything runs them too"


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter, config):
    if count := config.stash[LEFT_OUT]:
        terminalreporter.write_line(f"{count} slow tests were left out; `python -m pytest --everything` runs them too")


@pytest.fixture(autouse=True)
def _names_of_examples(doctest_namespace):
    import jax
    import jax.numpy as jnp
    import optax

    import saner_jax

    doctest_namespace.update(jax=jax, jnp=jnp, optax=optax, saner_jax=saner_jax)
