"""Where a number was measured: command, date, versions, device, what else the machine did."""

import ctypes
import datetime
import os
import platform
import shlex
import sys
from importlib import metadata
from typing import Any

from examples.noisy_images.training import run


def record(benchmark: str, arguments: list[str] | None = None, packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return what a reader needs to place the numbers.

    Args:
      benchmark: name of the command's module.
      arguments: its arguments; those of this process if not given.
      packages: distributions whose versions matter beside those that a run of the training program records.
    """
    program = run.environment()
    versions = {name: installed(name) for name in packages}
    return {
        "command": shlex.join(["python", "-m", benchmark, *(sys.argv[1:] if arguments is None else arguments)]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": program["versions"] | versions,
        "platform": program["platform"],
        "device": program["device"],
        "devices": program["devices"],
        "commit": program["commit"],
        "host": {"system": platform.platform(), "cores": os.cpu_count(), "load": list(os.getloadavg())},
    }


def installed(package: str) -> str | None:
    """Return the version of a distribution, None if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def keep_freed_memory() -> bool:
    """Have the C library keep memory that a step frees for the next one; return whether it could (Linux with glibc).

    XLA allocates temporary memory on CPUs anew in every call. By default blocks of this size go back to the system each
    time, and fetching them again costs a page fault for every 4 KiB: several times what the step itself costs, and more
    the more temporary memory a method has. Accelerators have pools, and a training process has much larger blocks.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8
        settings = ((m_arena_max, 1), (m_mmap_max, 0), (m_trim_threshold, -1))
        return all(libc.mallopt(parameter, value) for parameter, value in settings)
    except (OSError, AttributeError):
        return False


def share_device() -> None:
    """Leave memory of the device to processes that this one starts; JAX would take three quarters of it at once."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
