"""Where a run's arrays live: on one row of devices, with the state replicated and every batch sharded among them.

The compiled functions are written as if for one device; JAX divides their work by the shardings that arrays carry, and
a row of one device leaves it nothing to do.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ..errors import UserError

AXIS = "data"


def mesh(count: int | None = None) -> Mesh:
    """Return one row of all visible devices, or of ``count`` of them, as many of every process.

    Raises:
      UserError: There are not so many devices, or they cannot be shared out evenly among the processes.
    """
    processes = jax.process_count()
    of_process = [jax.local_devices(process_index=process) for process in range(processes)]
    fewest = min(map(len, of_process))
    each, rest = divmod(jax.device_count() if count is None else count, processes)
    if rest or not 1 <= each <= fewest:
        asked = "the devices" if count is None else f"--devices {count}"
        raise UserError(
            f"{asked} cannot be shared out: {processes} process{'es' * (processes > 1)} with "
            f"{', '.join(str(len(devices)) for devices in of_process)} devices; choose a multiple of {processes} up "
            f"to {processes * fewest}."
        )
    return Mesh(np.array([device for devices in of_process for device in devices[:each]]), (AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what every device holds."""
    return NamedSharding(mesh, P())


def sharded(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what is divided along its first axis."""
    return NamedSharding(mesh, P(AXIS))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Put arrays, the same in every process, on every device."""
    return _put(replicated(mesh), tree)


def shard(mesh: Mesh, tree: Any) -> Any:
    """Divide arrays, of which each process has the rows of its own devices, among all devices."""
    return _put(sharded(mesh), tree)


def _put(sharding: NamedSharding, tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)
