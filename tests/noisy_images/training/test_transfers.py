"""A compiled epoch stays on its device: nothing goes to the host or comes from it between its first and last step."""

import re

import jax
import pytest

from examples.noisy_images.config import configure
from examples.noisy_images.training.step import epoch_order
from examples.noisy_images.training.trainer import Trainer

# What XLA calls the ways to the host: queues, sends and receives, and calls back into Python.
TO_THE_HOST = r"infeed|outfeed|\bsend\b|\brecv\b|host_compute|callback|xla_ffi_python"


@pytest.fixture
def epoch(tiny):
    """The compiled epoch of a method, with augmentation, dropout and what a method draws, and its arguments."""

    def make(method):
        config = configure(model="mlp", width=1 / 64, batch_size=8, method=method, dropout=0.1, scan_epochs=True)
        trainer = Trainer(config, tiny())
        arguments = (
            trainer.functions.start_epoch(trainer.state),
            trainer._seed,
            trainer._place(trainer.dataset.train),
            jax.device_put(epoch_order(0, 0, 24), jax.sharding.NamedSharding(trainer.mesh, jax.P())),
        )
        return trainer.functions.train_steps, jax.block_until_ready(arguments)

    return make


@pytest.mark.parametrize("method", ["sgd", "saner", "saner_random"])
def test_a_compiled_epoch_moves_nothing_to_or_from_the_host(epoch, method):
    train_steps, arguments = epoch(method)
    program = train_steps.lower(*arguments, steps=3).compile()
    assert not re.findall(TO_THE_HOST, program.as_text())
    with jax.transfer_guard("disallow"):
        state = jax.block_until_ready(train_steps(*arguments, steps=3))
    assert int(state.step) == 3


def test_the_pattern_finds_what_it_is_for():
    def with_callback(x):
        jax.debug.print("{}", x)
        return x + 1

    text = jax.jit(with_callback).lower(1.0).compile().as_text()
    assert re.findall(TO_THE_HOST, text)
    with pytest.raises(Exception, match="host-to-device"), jax.transfer_guard("disallow"):
        jax.jit(lambda x: x + 1)(1.0)
