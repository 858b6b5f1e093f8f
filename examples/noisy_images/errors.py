"""Errors of a user's input: one sentence that says what is wrong and what to do."""

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator


class UserError(Exception):
    """An error that the command line prints as one line, without a traceback, with exit status 2."""


class Interrupted(Exception):
    """Work was asked to stop and has saved where it stands; the command line prints how to go on, exit status 130."""


def not_installed(error: ModuleNotFoundError) -> UserError:
    """Return the error for a missing package; a missing module of our own is a fault, and raised."""
    return UserError(f'{_package(error)} is not installed, which this needs: run `pip install -e ".[examples]"`.')


@contextlib.contextmanager
def left_out_if_not_installed(what: str) -> Iterator[None]:
    """Go on with a note where the block lacks a package; a missing module of our own is raised."""
    try:
        yield
    except ModuleNotFoundError as error:
        print(f"note: {_package(error)} is not installed, so {what} was left out.", file=sys.stderr)


def _package(error: ModuleNotFoundError) -> str:
    package = (error.name or "").partition(".")[0]
    if package in ("", __package__.partition(".")[0]):
        raise error
    return package


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Return the error for a name that does not exist: the nearest names first, then all of them."""
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(n) for n in nearest)}? " if nearest else ""
    return UserError(f"unknown {kind} {name!r}: {hint}choose one of {', '.join(names)}.")
