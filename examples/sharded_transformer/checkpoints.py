"""Checkpoints of sharded state with Orbax: every device writes and reads its own shards.

A checkpoint does not depend on the number of devices: what is restored takes the placement that it is asked for.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from examples.sharded_transformer.training import State


def save(folder: Path, state: State) -> None:
    """Write ``state`` under its step: whole, or not there."""
    with ocp.CheckpointManager(folder.resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
        manager.save(int(state.step), args=ocp.args.StandardSave(_by_name(state)))


def restore(folder: Path, abstract: State) -> State | None:
    """Return the newest state with the shapes, dtypes and placement of ``abstract``; None without a checkpoint."""
    with ocp.CheckpointManager(folder.resolve()) as manager:
        if manager.latest_step() is None:
            return None
        names = _by_name(abstract)
        restored = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(names))
    return jax.tree.unflatten(jax.tree.structure(abstract), [restored[name] for name in names])


def _by_name(state: State) -> dict[str, Any]:
    paths = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
