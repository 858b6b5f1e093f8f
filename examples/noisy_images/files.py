"""Files that are whole or not there: written beside their place, then moved into it."""

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Letters of a path that Orbax fails on once the first epoch is over: what is no UTF-8, and what it takes for a slash.
UNFIT_FOR_CHECKPOINTS = r"[\ud800-\udfff]" if os.name == "nt" else r"[\ud800-\udfff\\]"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes of this machine from working in a folder; the lock ends with the process, however it ends.

    Raises:
      UserError: Another process is working in it.
    """
    if fcntl is None:
        yield
        return
    # On the folder itself, so that nothing is left behind.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # A file system that knows no locks is no reason not to train.
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    f"another process is training in {folder}: wait until it ends, or stop it first."
                ) from None
        yield
    finally:
        os.close(descriptor)


def check_folder(folder: Path) -> None:
    """Raise unless files can be written into a folder that is there or can be made; nothing is left behind.

    Raises:
      UserError: Before the work whose results could not be kept.
    """
    try:
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if _is_there(path))
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"cannot write into the folder {folder} ({error.strerror}): choose another.") from error


def _is_there(path: Path) -> bool:
    # Not `exists`, to which a broken link, and a name that is too long, are nothing.
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` that takes its place when the block ends, and goes when it fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8; a file's name in it that is none is written as it is."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_json(path: str | Path, values: Any) -> None:
    """Write ``values`` as indented JSON."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def read_json(path: str | Path) -> Any:
    """Read what `write_json` wrote."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """Read one record a line; a last line that was cut short by a kill is left out.

    Raises:
      UserError: Another line is no record.
    """
    records: list[dict[str, Any]] = []
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines() if Path(path).exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif number < len(lines):
            raise UserError(f"line {number} of {path} is damaged: restore the file, or start the run again.")
    return records


def write_json_lines(path: str | Path, records: list[dict[str, Any]]) -> None:
    """Write one record a line."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def append_json_line(path: str | Path, record: dict[str, Any]) -> None:
    """Append one record, on the disk when this returns."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())
