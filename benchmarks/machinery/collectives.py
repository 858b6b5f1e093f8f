"""What a compiled program moves between devices, read from its text."""

import collections
import math
import re
from typing import Any

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) [^\n]*?\{$(.*?)^\}", re.M | re.S)
_COLLECTIVE = re.compile(
    r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\((.*?)\)"
)
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}

Moved = collections.Counter[tuple[str, str]]
"""How often an array (such as ``f32[3,4]``) takes part in a kind of collective."""


def moved(compiled: Any) -> Moved:
    """Count the arrays that every device receives from collectives in one call of a compiled program.

    A combined collective counts each of its arrays; one inside a loop counts as often as the loop runs.
    """
    computations, entry = {}, ""
    for match in _COMPUTATION.finditer(compiled.as_text()):
        computations[match[2]] = match[3]
        entry = match[2] if match[1] else entry

    def count(name: str) -> Moved:
        total: Moved = collections.Counter()
        for line in computations.get(name, "").splitlines():
            if collective := _COLLECTIVE.search(line):
                arrays = _ARRAY.findall(collective[1])
                # The start of an asynchronous gather names what it sends as well as what it receives.
                if collective[3] and collective[2] in ("all-gather", "collective-permute"):
                    arrays = arrays[len(arrays) // 2 :]
                total.update((collective[2], f"{dtype}[{shape}]") for dtype, shape in arrays)
                continue
            trips = int(found[1]) if (found := _TRIPS.search(line)) else 1
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += [branch.strip().lstrip("%") for branch in branches.split(",")]
            for inner in called:
                for key, times in count(inner).items():
                    total[key] += trips * times
        return total

    return count(entry)


def size(array: str) -> int:
    """Return the bytes of an array such as ``f32[3,4]``."""
    dtype, shape = _ARRAY.fullmatch(array).groups()  # type: ignore[union-attr]
    return _BYTES.get(dtype, 1) * math.prod(int(n) for n in shape.split(",") if n)


def received(counted: Moved) -> dict[str, int]:
    """Return the bytes of what was counted, by kind of collective."""
    total: collections.Counter[str] = collections.Counter()
    for (kind, array), times in counted.items():
        total[kind] += times * size(array)
    return dict(sorted(total.items()))
