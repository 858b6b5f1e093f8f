"""What is to be reached, and what a measurement says about it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.machinery import tables


class Target(NamedTuple):
    """One thing to reach. Measurements are medians with an interval, under the target's name."""

    name: str
    what: str
    benchmark: str
    """The command that measures it."""
    at_most: float | None = None
    at_least: float | None = None
    unit: str = ""
    platform: str | None = None
    """Where it counts: gpu, cpu, or None for both."""

    @property
    def bound(self) -> str:
        """The target in words."""
        if self.at_most is None and self.at_least is None:
            return "report"
        word, value = ("at most", self.at_most) if self.at_least is None else ("at least", self.at_least)
        return f"{word} {value:g}{self.unit}"

    def verdict(self, measured: Mapping[str, float]) -> str:
        """Return met or missed, by the median, and whether its interval leaves that open."""
        if self.at_most is None and self.at_least is None:
            return "reported"
        bound = self.at_most if self.at_least is None else self.at_least
        met = measured["median"] <= bound if self.at_least is None else measured["median"] >= bound
        open_ = measured["low"] <= bound < measured["high"]
        return ("met" if met else "missed") + (", within the noise" if open_ else "")


TARGETS = (
    Target("saner_over_sam", "SANER step / SAM step", "train_step", at_most=1.02),
    Target("sam_over_two_sgd", "SAM step / two SGD steps", "train_step", at_most=1.02),
    Target("sam_over_optax_sam", "SAM step / step with `optax.contrib.sam`", "train_step", at_most=1.01),
    Target(
        "saner_extra_memory",
        "peak memory of SANER over SAM's, in copies of the gradient",
        "memory",
        at_most=1,
    ),
    Target(
        "minutes_200_epochs",
        "200 epochs of SANER, test set every epoch (extrapolated), minutes",
        "epoch",
        at_most=5,
        platform="gpu",
    ),
    Target(
        "minutes_200_epochs_compiled",
        "the same with compilation, minutes",
        "epoch",
        at_most=9,
        platform="gpu",
    ),
    Target("seeds_one_after_another", "three seeds one after another / in one program", "epoch"),
    Target("pytorch_over_ours_gpu", "PyTorch's SANER step / ours", "peers", at_least=1.5, platform="gpu"),
    Target("pytorch_over_ours_cpu", "PyTorch's SANER step / ours", "peers", platform="cpu"),
    Target(
        "first_step_cpu",
        "start to first step, warm cache, seconds",
        "compile_time",
        at_most=15,
        platform="cpu",
    ),
    Target(
        "first_step_gpu",
        "start to first step, warm cache, seconds",
        "compile_time",
        at_most=30,
        platform="gpu",
    ),
)


def report(results: Mapping[str, Mapping[str, Any]], platform: str | None, why_not: Mapping[str, str]) -> list[str]:
    """Return the table of targets; results and reasons for their absence are named by benchmark."""
    rows = []
    for target in TARGETS:
        measured = results.get(target.benchmark, {}).get("targets", {}).get(target.name)
        if measured is not None:
            values = (tables.interval(measured, 2 if measured["median"] >= 2 else 3), target.verdict(measured))
        elif target.platform is not None and target.platform != platform:
            values = ("", f"not measurable here: counts on a {target.platform.upper()}")
        else:
            values = ("", "not measured: " + why_not.get(target.benchmark, "see the section"))
        what = target.what + ("" if target.platform is None else f", on a {target.platform.upper()}")
        rows.append((what, target.bound, *values, f"`{target.benchmark}`"))
    return tables.table(("what", "target", "measured (95 %)", "verdict", "by"), rows)


def printed(names: Sequence[str], measured: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the lines of one benchmark's own targets."""
    chosen = [target for target in TARGETS if target.name in names and target.name in measured]
    rows = [(t.what, t.bound, tables.interval(measured[t.name]), t.verdict(measured[t.name])) for t in chosen]
    return tables.table(("what", "target", "measured (95 %)", "verdict"), rows) if rows else []
