"""The package: what it imports, what it declares, and that all of its surface is documented."""

import ast
import importlib.metadata
import inspect
import pathlib
import pydoc
import subprocess
import sys
import tomllib

import pytest

import saner_jax

PACKAGE = pathlib.Path(saner_jax.__file__).parent
SOURCES = sorted(PACKAGE.glob("*.py"))
PUBLIC = {
    name: thing for name, thing in vars(saner_jax).items() if not name.startswith("_") and not inspect.ismodule(thing)
} | {
    f"analysis.{name}": thing
    for name, thing in vars(saner_jax.analysis).items()
    if getattr(thing, "__module__", None) == "saner_jax.analysis" and not name.startswith("_")
}
STATES = {name: thing for name, thing in PUBLIC.items() if inspect.isclass(thing)}
FUNCTIONS = {name: thing for name, thing in PUBLIC.items() if name not in STATES}
SURFACE = {
    "sharpness_aware", "scale_to_norm", "scale_to_adaptive_norm", "subtract_ema", "follow_ema", "subtract_orthogonal",
    "downweight", "downweight_random", "observe_gradients", "restore_downweighted",
    "value_and_grads", "sam", "asam", "gsam", "fsam", "vasso", "saner",
    "sgd_d", "alpha_ramp",
    "rho_from_learning_rate", "is_turned", "is_downweighted", "is_grown", "analysis.ratio_shares",
    "analysis.downweighted", "analysis.random_like", "analysis.alignment",
}  # fmt: skip


def imports(path):
    """The top-level packages that a module imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield node.module.split(".")[0]


def test_public_surface():
    assert set(FUNCTIONS) == SURFACE


def test_help_lists_every_public_name():
    assert set(saner_jax.__all__) == {name for name in PUBLIC if "." not in name} | {"analysis"}
    text = pydoc.plain(pydoc.render_doc(saner_jax))
    functions = text[text.index("\nFUNCTIONS\n") :]
    for name in saner_jax.__all__:
        if name in FUNCTIONS:
            assert f"\n    {name}(" in functions


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_follows_the_hyperparameters_is_keyword_only(name):
    positional = {
        parameter.name
        for parameter in inspect.signature(FUNCTIONS[name]).parameters.values()
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
    }
    assert not positional & {
        "reweight", "axis_name", "perturb_mask", "adaptive_mask", "monitor", "perturbed_dtype", "reuse", "where",
        "seed", "has_aux", "steps_per_epoch",
    }  # fmt: skip
    if not name.startswith("analysis."):
        assert "mask" not in positional


def test_hyperparameters_come_in_one_order():
    order = ["rho", "eta", "alpha", "sigma", "decay", "theta"]
    for function in FUNCTIONS.values():
        named = [name for name in inspect.signature(function).parameters if name in order]
        assert named == sorted(named, key=order.index)


def test_import_brings_no_framework():
    code = "import sys, saner_jax; print(' '.join({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert not {"flax", "tensorflow", "sklearn", "matplotlib", "torch", "examples"} & set(loaded.stdout.split())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_source_imports_jax_and_optax_alone(path):
    third_party = set(imports(path)) - set(sys.stdlib_module_names) - {"saner_jax"}
    # NumPy is JAX's own dependency.
    assert third_party <= {"jax", "numpy", "optax"}


def test_declared_dependencies():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert sorted(requirement.split(">=")[0] for requirement in project["dependencies"]) == ["jax", "optax"]


def test_imports_point_one_way():
    """Wrapper and stages know nothing of the aliases; stages nothing of the wrapper."""
    allowed = {
        "__init__": {
            "", "_alias", "_ascent", "_descent", "_gradients", "_masks", "_monitor", "_reuse", "_schedules",
            "_sharpness_aware",
        },
        "_alias": {"_ascent", "_checks", "_descent", "_hyperparameters", "_leaves", "_monitor", "_sharpness_aware"},
        "_sharpness_aware": {"_checks", "_leaves", "_monitor", "_reuse"},
        "_reuse": {"_leaves"},
        "_monitor": {"_checks", "_descent", "_leaves", "_masks"},
        "_ascent": {"_checks", "_hyperparameters", "_leaves"},
        "_descent": {"_checks", "_hyperparameters", "_leaves", "_masks"},
        "analysis": {"_checks", "_leaves", "_masks"},
        "_gradients": {"_checks"},
        "_masks": {"_leaves"},
        "_schedules": {"_checks", "_hyperparameters"},
        "_hyperparameters": {"_checks"},
        "_leaves": {"_checks"},
        "_checks": set(),
    }  # fmt: skip
    for path in SOURCES:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        own = {
            module.removeprefix("saner_jax").removeprefix(".") for module in modules if module.startswith("saner_jax")
        }
        assert own <= allowed[path.stem]


def test_types_are_shipped():
    assert (PACKAGE / "py.typed").exists()


def test_version():
    assert saner_jax.__version__ == importlib.metadata.version("saner_jax")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_documented(name):
    docstring = inspect.getdoc(FUNCTIONS[name])
    assert docstring.splitlines()[0].endswith(".")
    assert "\n::\n" in docstring or "::\n" in docstring
    sections = ["\nArgs:\n", "\nReturns:\n", "\nExample:\n", "\nReferences:\n"]
    if not inspect.signature(FUNCTIONS[name]).parameters:
        sections = sections[1:]
    positions = [docstring.find(section) for section in sections]
    assert positions == sorted(positions)
    assert -1 not in positions
    assert ">>> " in docstring
    for parameter in inspect.signature(FUNCTIONS[name]).parameters:
        assert f"  {parameter}: " in docstring or f"  *{parameter}: " in docstring


@pytest.mark.parametrize("name", STATES)
def test_states_document_each_field(name):
    state = STATES[name]
    assert issubclass(state, tuple)
    assert inspect.getdoc(state).splitlines()[0].endswith(".")
    (definition,) = ast.parse(inspect.getsource(state)).body
    methods = [node for node in definition.body if isinstance(node, ast.FunctionDef)]
    assert all(ast.get_docstring(method) for method in methods)
    body = [node for node in definition.body[1:] if node not in methods]
    for field, text in zip(body[::2], body[1::2], strict=True):
        assert isinstance(field, ast.AnnAssign)
        assert isinstance(text, ast.Expr)
        assert isinstance(text.value.value, str)
    assert len(body) == 2 * len(state._fields)
