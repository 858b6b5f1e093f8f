"""Checkpoints with Orbax: the whole training state, written beside the training, complete or not there."""

from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from ..config import Config, differences, from_json, to_json
from ..errors import UserError
from .step import State

KEPT = 2


class Checkpoints:
    """The checkpoints of one run, by the number of steps taken; the newest two are kept."""

    def __init__(self, folder: Path, config: Config):
        # Orbax takes seconds to import, and reading a configuration needs none of it.
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._config = config
        self._folder = folder.resolve()
        # Orbax writes to a temporary folder and renames it: a kill leaves a whole checkpoint or none.
        self._manager = ocp.CheckpointManager(
            self._folder, options=ocp.CheckpointManagerOptions(max_to_keep=KEPT, create=True)
        )
        # JAX's preemption service counts the questions put to it, and the training loop alone puts them.
        self._manager.reached_preemption = lambda step: False

    def save(self, state: State, extra: dict[str, Any]) -> None:
        """Write ``state`` in the background; ``extra`` (JSON values: epoch, best epoch) travels with it."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=self._ocp.args.Composite(
                # A copy, since the next step overwrites the donated buffers while the background thread writes.
                state=self._ocp.args.StandardSave({k: np.array(v) for k, v in _by_name(state).items()}),
                run=self._ocp.args.JsonSave({"config": to_json(self._config)} | extra),
            ),
        )

    def restore(self, like: State) -> tuple[State, dict[str, Any]] | None:
        """Return the newest state, in the structure and the types of ``like``, and its extra; None without one."""
        step = self.latest_step
        if step is None:
            return None
        try:
            run = self._manager.restore(step, args=self._ocp.args.Composite(run=self._ocp.args.JsonRestore())).run
            self._check(run)
            template = {name: np.empty(np.shape(leaf), leaf.dtype) for name, leaf in _by_name(like).items()}
            restored = self._manager.restore(
                step, args=self._ocp.args.Composite(state=self._ocp.args.StandardRestore(template))
            ).state
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"the checkpoint {self._folder / str(step)} cannot be read ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else 'no message'}); remove it to go on from an older one."
            ) from error
        leaves = [
            jax.make_array_from_process_local_data(leaf.sharding, restored[name])
            for name, leaf in _by_name(like).items()
        ]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), run

    @property
    def latest_step(self) -> int | None:
        """Steps taken at the newest checkpoint, once it is on the disk; None without one."""
        self._manager.wait_until_finished()
        return self._manager.latest_step()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Wait until everything is on the disk."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _check(self, run: dict[str, Any]) -> None:
        theirs = from_json(run["config"], f"the checkpoint in {self._folder}")
        if different := differences(self._config, theirs):
            raise UserError(
                f"the checkpoint in {self._folder} belongs to another configuration ({'; '.join(different)}): restore "
                "config.json, or train under another --name."
            )


def _by_name(state: State) -> dict[str, Any]:
    paths = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
