"""Entry point of `python -m examples.sharded_transformer`."""

import sys
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from examples.sharded_transformer import checkpoints, training
from examples.sharded_transformer.data import Source, with_noise

HELD_OUT = 256


def run(
    config: Annotated[training.Config, tyro.conf.arg(name="")],
    virtual_devices: int | None = None,
    checkpoint: Path | None = None,
    every: int = 100,
) -> float:
    """Train a transformer over all devices, and return its loss on text that it has not seen.

    Args:
        config: What is trained.
        virtual_devices: Devices that the CPU is to be divided into, to try sharding without an accelerator.
        checkpoint: Folder to save to when training ends or is interrupted, and to go on from.
        every: Steps between two lines of output.
    """
    if virtual_devices is not None:
        jax.config.update("jax_num_cpu_devices", virtual_devices)
    mesh = training.device_mesh()
    if config.batch > config.sequences:
        sys.exit(
            f"error: a batch of {config.batch} is larger than the {config.sequences} sequences; choose a smaller one."
        )
    for name, value in (("embedding", config.embedding), ("batch", config.batch), ("held-out text", HELD_OUT)):
        if value % mesh.size:
            sys.exit(f"error: {mesh.size} devices do not divide the {name} of {value}; choose a multiple.")
    source = Source.random(config.vocabulary, config.seed)
    text = source.sample(config.sequences, config.length + 1, seed=config.seed + 1)
    tokens, targets = text[:, :-1], with_noise(text[:, 1:], config.noise, config.vocabulary, seed=config.seed + 2)
    held_out = source.sample(HELD_OUT, config.length + 1, seed=config.seed + 3)

    with jax.set_mesh(mesh):
        program = training.program(config, mesh)
        state = (checkpoints.restore(checkpoint, program.abstract) if checkpoint else None) or program.init()
        print(placement(state, mesh.size))
        print(f"the source's own loss, below which no model comes: {source.loss(held_out):.3f} nats a symbol")
        losses = []
        try:
            for step in range(int(state.step), config.steps):
                indices = training.batch_indices(config, step)
                state, loss = program.step(state, tokens[indices], targets[indices])
                if mesh.devices.flat[0].platform == "cpu":
                    # Virtual devices share the cores: with several steps under way, their threads can wait for each
                    # other's collectives without end, which XLA ends by aborting.
                    loss.block_until_ready()
                losses.append(loss)
                if (step + 1) % every == 0 or step + 1 == config.steps:
                    test = float(program.loss(state.params, held_out[:, :-1], held_out[:, 1:]))
                    print(f"step {step + 1:5d}  training {np.mean(losses):.3f}  unseen text {test:.3f}", flush=True)
                    losses = []
        except KeyboardInterrupt:
            print(f"interrupted after step {int(state.step)}")
        if checkpoint:
            checkpoints.save(checkpoint, state)
            print(f"saved to {checkpoint}; the same command goes on from there, on any number of devices")
        return float(program.loss(state.params, held_out[:, :-1], held_out[:, 1:]))


def placement(state: training.State, devices: int) -> str:
    """Say how much of the state lies on one device."""
    leaves = jax.tree.leaves(state)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    whole = sum(leaf.nbytes for leaf in leaves)
    here = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    return (
        f"{count:,} parameters on {devices} device{'s' if devices > 1 else ''}: {here / 1e6:.2f} MB of "
        f"{whole / 1e6:.2f} MB of parameters and optimizer state on each"
    )


if __name__ == "__main__":
    tyro.cli(run, prog="python -m examples.sharded_transformer", description=__doc__)
