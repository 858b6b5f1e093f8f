"""What the scripts' command lines have in common."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro

from examples.noisy_images.errors import UserError

RESULTS = Path("examples/theory/results")


def run(script: str, main: Callable[..., None], arguments: Sequence[str] | None = None) -> None:
    """Run a script with options generated from its signature; a user's error is one line and exit status 2."""
    try:
        tyro.cli(main, prog=f"python -m examples.theory.{script}", args=arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
