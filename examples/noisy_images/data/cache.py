"""Files that speed up the next start: whole or absent, and never needed."""

import pathlib
import warnings
import zipfile
from collections.abc import Mapping

import numpy as np

from .. import files


def write_cache(path: pathlib.Path, write) -> bool:
    """Let `write(file)` make a file that speeds up the next start; False where the folder cannot be written to.

    The file appears whole or not at all.
    """
    try:
        with files.replacing(path) as temporary, open(temporary, "wb") as file:
            write(file)
    except OSError as error:
        warnings.warn(
            f"cannot keep the cache {str(path)!r} ({error}): the next start will be slow again.", stacklevel=2
        )
        return False
    return True


def write_cached_arrays(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> bool:
    """Write an uncompressed .npz that speeds up the next start; False where the folder cannot be written to."""
    return write_cache(path, lambda file: np.savez(file, **arrays))


def read_cached_arrays(path: pathlib.Path, fingerprint: str | None) -> dict[str, np.ndarray] | None:
    """Return the arrays of a cache; None when there is none, or one of other data than the fingerprint says."""
    try:
        # Opened here: NumPy leaves a file open that it cannot read.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            if fingerprint is not None and str(archive["fingerprint"]) != fingerprint:
                return None
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
