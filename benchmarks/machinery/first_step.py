"""Run the training program's command line as far as the end of its first step, and say when what was reached.

    python -m benchmarks.machinery.first_step STARTED train --dataset digits ...

The program is the real one, from its command line to the end of its first compiled call, which is one step on a CPU and
a whole epoch elsewhere; it ends there, without leaving a checkpoint. `STARTED` is the time at which the process was
asked for (seconds of the epoch), which all times printed count from, as one line of JSON. Where tyro is not installed
there is no command line, and the run is started below it.
"""

import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any


def main() -> None:
    """Mark the stages of a start; does not return."""
    started, arguments = float(sys.argv[1]), sys.argv[2:]
    marks: dict[str, Any] = {}

    def mark(stage: str) -> None:
        marks[stage] = time.time() - started

    mark("python")
    start = _command_line(arguments)
    mark("command line imported")
    import jax

    from examples.noisy_images.training import run
    from examples.noisy_images.training.trainer import Trainer

    mark("program imported")

    def marked(function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            mark(stage)
            return result

        return call

    def first_step(self: Trainer, *args: Any) -> Any:
        mark("run set up")
        next(train_epoch(self, *args))
        mark("first step started")
        jax.block_until_ready(self.state)
        mark("first step done")
        print(json.dumps(marks), flush=True)
        # Nothing of the run is to be kept.
        os._exit(0)

    train_epoch = Trainer.train_epoch
    run.prepare = marked(run.prepare, "data and noise ready")
    Trainer.__init__ = marked(Trainer.__init__, "network ready")
    Trainer.train_epoch = first_step
    start()
    sys.exit("the program ended before its first step")


def _command_line(arguments: list[str]) -> Callable[[], Any]:
    try:
        from examples.noisy_images import cli
    except ModuleNotFoundError as error:
        if error.name != "tyro":
            raise
        return lambda: _without_command_line(arguments)
    # It does so itself, before JAX is imported; the marks need JAX first.
    cli.keep_compiled_programs()
    return lambda: cli.main(arguments)


def _without_command_line(arguments: list[str]) -> None:
    """Start the run that `train` with these options would: each is a setting's name and its value."""
    from examples.noisy_images.config import PAPER, flat, replace
    from examples.noisy_images.training import run

    options = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    folder = pathlib.Path(options.pop("--out")) / options.pop("--name")
    settings = {}
    for option, text in options.items():
        field = option.removeprefix("--").replace("-", "_")
        kind = type(flat(PAPER)[field])
        settings[field] = kind(text) if kind in (int, float) else text
    run.train(replace(PAPER, **settings), folder)


if __name__ == "__main__":
    main()
