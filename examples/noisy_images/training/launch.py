"""Where a run is computed: its devices, and the processes that compute it together by JAX's own distributed engine.

Every process runs the same program on its own devices. The first one writes the run's files.
"""

import contextlib
import dataclasses
import inspect
import itertools
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import Interrupted, UserError


@dataclasses.dataclass(frozen=True)
class Launch:
    """Where a run is computed, which is no part of what it is."""

    devices: int | None = None
    """Devices to use, of all processes together; all that are visible if not given."""
    distributed: bool = False
    """Join the other processes of this job, where JAX finds them: Slurm, Open MPI, Kubernetes, Cloud TPU."""
    coordinator: str | None = None
    """Join the other processes at this host:port of process 0; with --num-processes and --process-id."""
    num_processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Number of this process, from 0."""
    heartbeat_seconds: int = 100
    """Seconds without a sign of life after which a process counts as lost, and the others end."""


HERE = Launch()
# How this program is started, wherever its folder lies.
PROGRAM = f"python -m {__package__.rpartition('.')[0]}"
# JAX finds the call at which all stop by its number: it grows by one, also from run to run.
_QUESTIONS = itertools.count(1)


def join(launch: Launch) -> None:
    """Join the other processes, if there are any; comes before anything that JAX computes.

    Raises:
      UserError: JAX does not find them, or it is not said where they are.
    """
    if not launch.distributed and launch.coordinator is None:
        if launch.num_processes is not None or launch.process_id is not None:
            raise UserError(
                "--num-processes and --process-id need --coordinator host:port, where process 0 listens; or give "
                "--distributed where JAX finds the processes by itself."
            )
        return
    import jax

    patience = {"heartbeat_timeout_seconds": launch.heartbeat_seconds}
    # How long a process that ends by an error of its own waits for the others; the oldest JAX waits five minutes.
    if "shutdown_timeout_seconds" in inspect.signature(jax.distributed.initialize).parameters:
        patience["shutdown_timeout_seconds"] = launch.heartbeat_seconds
    try:
        jax.distributed.initialize(launch.coordinator, launch.num_processes, launch.process_id, **patience)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot join the other processes ({str(error).splitlines()[0].rstrip('.')}): give --coordinator "
            "host:port, --num-processes and --process-id."
        ) from error


def is_first() -> bool:
    """Whether this process writes the run's files."""
    import jax

    return jax.process_index() == 0


def wait_for_others(where: str) -> None:
    """Return once every process has come here."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def agreed_stop() -> Callable[[], bool]:
    """Return the question whether to stop, which all processes ask equally often and get the same answer to.

    It is JAX's preemption service: SIGTERM in any process is passed on, and all are told at the same later call.
    """
    from jax.experimental import multihost_utils

    agreed = False

    def stop() -> bool:
        nonlocal agreed
        agreed = agreed or multihost_utils.reached_preemption_sync_point(next(_QUESTIONS))
        return agreed

    return stop


def resume_command(folder: Path) -> str:
    """Return the command that goes on with a run."""
    return f"{PROGRAM} {shlex.join(['resume', str(folder)])}"


def say_what_to_do_if_one_is_lost(folder: Path) -> None:
    """Say at the start how to go on if one of several processes is lost: JAX then ends the others without a word."""
    import jax

    if jax.process_count() > 1 and is_first():
        print(
            f"note: {jax.process_count()} processes compute this run; if one of them is lost, all end: start all "
            f"processes again with: {resume_command(folder)}",
            file=sys.stderr,
            flush=True,
        )


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """End one of several processes by an error that is its own: to unwind would be to wait for one that may be gone."""
    import jax

    try:
        yield
    except (UserError, Interrupted):
        raise
    except Exception as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):
            print(f"error: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
        os._exit(1)
