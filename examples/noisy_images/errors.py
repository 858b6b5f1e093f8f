"""Errors of a user's input: one sentence that says what is wrong and what to do."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error that the command line prints as one line, without a traceback, with exit status 2."""


# What is installed under another name than it is imported by.
_DISTRIBUTIONS = {"PIL": "pillow", "orbax": "orbax-checkpoint", "sklearn": "scikit-learn"}


class Interrupted(Exception):
    """Work was asked to stop and has saved where it stands; the command line prints how to go on, exit status 130."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Return the error for a name that does not exist: the nearest names first, then all of them."""
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(n) for n in nearest)}? " if nearest else ""
    return UserError(f"unknown {kind} {name!r}: {hint}choose one of {', '.join(names)}.")


def missing_package(error: ModuleNotFoundError) -> UserError:
    """Return the error for a package that is not installed; a missing part of this program is raised as it is."""
    package = (error.name or "").partition(".")[0]
    if package in ("", __name__.partition(".")[0]):
        raise error
    install = f"pip install {_DISTRIBUTIONS.get(package, package)}"
    return UserError(f"this needs the package {package}, which cannot be imported: run `{install}`.")
