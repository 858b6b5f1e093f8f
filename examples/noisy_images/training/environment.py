"""What a result has to be read beside: command, versions, devices, commit."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from . import launch

VERSIONED = ("saner_jax", "jax", "jaxlib", "optax", "flax", "orbax-checkpoint", "numpy")


def command() -> str:
    """Return the command line that this process was started with."""
    return f"{launch.PROGRAM} {shlex.join(sys.argv[1:])}"


def environment(mesh: jax.sharding.Mesh | None = None) -> dict[str, Any]:
    """Return what a result has to be read beside: command, versions, devices and processes that it used, commit."""
    versions = {"python": platform.python_version()}
    for package in VERSIONED:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    device = jax.devices()[0]
    count = jax.device_count() if mesh is None else mesh.size
    return {
        "command": command(),
        "versions": versions,
        "platform": device.platform,
        "device": device.device_kind if device.platform != "cpu" else _processor(),
        "devices": count,
        "processes": jax.process_count(),
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line for line in lines if line.startswith("model name")]
        name = names[0].split(":", 1)[1].strip()
    except (OSError, IndexError):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _commit() -> str | None:
    """Return the commit of this checkout, marked where files differ from it; None outside of one."""
    here = Path(__file__).parent
    try:
        # Without locks: a run that is killed here must leave none in the user's repository.
        git = ["git", "--no-optional-locks", "-C", str(here)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + (" with local changes" if changed.stdout.strip() else "")
