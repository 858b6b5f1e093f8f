"""One side of a comparison between frameworks, in a process of its own: it does what it is asked, line by line.

Both sides stay alive and take turns, so that they are measured in the same minutes on the same device, and neither's
libraries, threads or memory pool are in the other's way. Requests and answers are lines of JSON.
"""

import argparse
import json
import sys
from typing import Any

import numpy as np

from benchmarks.machinery.sides.problem import Problem, Side


def answer(side: Side, request: dict[str, Any]) -> Any:
    """Do what a request asks; returns JSON values."""
    match request:
        case {"do": "describe"}:
            return side.describe()
        case {"do": "prepare", "method": method}:
            side.prepare(method)
        case {"do": "run", "method": method, "steps": steps}:
            side.run(method, steps)
        case {"do": "first", "to": path}:
            np.savez(path, **side.first())
        case {"do": "one step", "method": method, "from": source, "to": path}:
            with np.load(source) as archive:
                before = dict(archive)
            np.savez(path, **side.one_step(method, before))
        case _:
            raise ValueError(f"no such request: {request}")
    return {}


def main() -> None:
    """Serve one side until the requests end."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.machinery.sides.worker")
    parser.add_argument("side", choices=("ours", "pytorch"))
    parser.add_argument("problem", help="JSON")
    args = parser.parse_args()
    problem = Problem(**json.loads(args.problem))
    # What libraries print goes elsewhere.
    answers, sys.stdout = sys.stdout, sys.stderr
    # Imported here: neither framework is to be in the other's process.
    if args.side == "ours":
        from benchmarks.machinery.sides.ours import Ours

        side: Side = Ours(problem)
    else:
        from benchmarks.machinery.sides.pytorch import Peer

        side = Peer(problem)
    for line in sys.stdin:
        try:
            reply = {"answer": answer(side, json.loads(line))}
        # Whatever a framework raises is for the parent to say.
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
