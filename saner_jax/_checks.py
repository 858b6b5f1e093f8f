"""What is refused, and how it is said: one sentence that names the argument and the first leaf where it is wrong."""

import reprlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

PyTree = Any
Dtypes = Literal["same", "floating", "bool"]

_REPR = reprlib.Repr()
_REPR.maxother, _REPR.maxstring = 90, 60


def brief(value: Any) -> str:
    """Return the representation of ``value`` on one line of at most 100 characters."""
    text = " ".join(_REPR.repr(value).split())
    return text if len(text) <= 100 else text[:97] + "..."


def name_of(path: tuple[Any, ...]) -> str:
    """Return the name of a leaf for a sentence."""
    return jax.tree_util.keystr(path) or "(the tree itself)"


def check_floating(what: str, tree: PyTree) -> None:
    """Raise unless every leaf is a real floating-point array and none was masked out."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode)):
        if isinstance(leaf, optax.MaskedNode):
            raise ValueError(
                f"{what} holds a MaskedNode at {name_of(path)}: optax.masked and optax.partition hand grad_fn another "
                "tree than your params; use perturb_mask, or the mask of a stage, to choose leaves."
            )
        if not _is_floating(leaf):
            raise TypeError(
                f"{what} must be floating-point, but the leaf {name_of(path)} is {_kind(leaf)}; "
                "keep such leaves out of params."
            )


def check_tree(what: str, tree: PyTree, other: str, reference: PyTree, dtypes: Dtypes) -> None:
    """Raise unless ``tree`` has the structure and shapes of ``reference``, and its dtypes, or floats, or bools.

    The one check of all that is given beside another tree, and of all that a function or a stage returns.
    """
    if not same_structure(tree, reference):
        raise ValueError(f"{what} must have the structure of {other}, but {_first_difference(tree, reference)}.")
    for index, (leaf, expected) in enumerate(zip(jax.tree.leaves(tree), jax.tree.leaves(reference), strict=True)):
        fault = _fault(leaf, expected, other, dtypes)
        if fault is not None:
            kind, requirement, found = fault
            name = name_of(jax.tree_util.tree_leaves_with_path(tree)[index][0])
            raise kind(f"{what} must {requirement}, but the leaf {name} {found}.")


def check_state(stage: str, state: Any, kind: type) -> None:
    """Raise unless ``state`` is what the ``init`` of this stage makes."""
    if not isinstance(state, kind):
        raise TypeError(
            f"the state given to {stage} is a {type(state).__name__} where a {kind.__name__} was expected: it is of "
            "another method or place in a chain; call init of this optimizer, and keep what its update returns."
        )


def same_structure(tree: PyTree, other: PyTree) -> bool:
    """Tell whether two trees have the same nodes."""
    structure: Any = jax.tree.structure(tree)
    return bool(structure == jax.tree.structure(other))


def dtype_of(leaf: Any) -> Any:
    """Return the dtype of an array or number."""
    return leaf.dtype if isinstance(leaf, jax.Array) else jnp.result_type(leaf)


def is_array(leaf: Any) -> bool:
    """Tell numbers and arrays, also traced ones, from all else that a tree may hold."""
    return isinstance(leaf, (bool, int, float, complex, np.generic, np.ndarray, jax.Array)) or (
        hasattr(leaf, "dtype") and hasattr(leaf, "shape")
    )


def _is_floating(leaf: Any) -> bool:
    return is_array(leaf) and jnp.issubdtype(dtype_of(leaf), jnp.floating)


def _kind(leaf: Any) -> str:
    return str(dtype_of(leaf)) if is_array(leaf) else f"a {type(leaf).__name__}"


def _fault(leaf: Any, expected: Any, other: str, dtypes: Dtypes) -> tuple[type[Exception], str, str] | None:
    """Return what is wrong with a leaf: the error, what the tree must be, what the leaf is."""
    if dtypes == "bool":
        if not is_array(leaf) or dtype_of(leaf) != jnp.bool_:
            return TypeError, "hold arrays of bools", f"is {_kind(leaf)}"
    elif not _is_floating(leaf):
        return TypeError, "be floating-point", f"is {_kind(leaf)}"
    elif dtypes == "same" and dtype_of(leaf) != dtype_of(expected):
        return TypeError, f"have the dtypes of {other}", f"is {_kind(leaf)} where {_kind(expected)} was expected"
    if np.shape(leaf) != np.shape(expected):
        return (
            ValueError,
            f"have the shapes of {other}",
            f"has shape {np.shape(leaf)} where {np.shape(expected)} was expected",
        )
    return None


def _first_difference(tree: PyTree, reference: PyTree, path: tuple[Any, ...] = ()) -> str:
    """Say where two trees of different structure differ first."""
    if type(tree) is not type(reference):
        return f"{name_of(path)} is {_node(tree)} where {_node(reference)} was expected"
    children, expected = _children(tree), _children(reference)
    for key in expected:
        if key not in children:
            return f"{name_of((*path, key))} is missing"
    for key in children:
        if key not in expected:
            return f"{name_of((*path, key))} is not in it"
    for key, child in children.items():
        if not same_structure(child, expected[key]):
            return _first_difference(child, expected[key], (*path, key))
    return f"{name_of(path)} differs in what it holds beside leaves"


def _node(node: PyTree) -> str:
    return "an array" if is_array(node) else f"a {type(node).__name__}"


def _children(node: PyTree) -> dict[Any, Any]:
    """Return the children of a node of a tree by their keys; a leaf has none."""
    items = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda x: x is not node)
    return {path[0]: child for path, child in items if path}
