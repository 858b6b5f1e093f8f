"""Carry out a preset of the paper: what is to be run, how long it will take, and the runs themselves."""

import dataclasses
import math
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path

from .. import config as configuration
from .. import files
from ..config import Circumstances, Config, flat, replace, run_name
from ..errors import Interrupted, UserError
from . import comparison, presets
from .presets import ALL, Scale, Selection

# Billions of multiplications of one image of 32 pixels, counted from the layers; another network counts as one.
_GMAC = {"resnet18": 0.555, "resnet34": 1.159, "densenet121": 0.888, "wrn_40_2": 0.328, "wrn_28_10": 5.243}
_HUMAN_LABELS = {"cifar10": "CIFAR-10_human.pt", "cifar100": "CIFAR-100_human.pt"}


class State(Enum):
    """How far a run is."""

    COMPLETE = "complete"
    CUT_OFF = "cut off"
    MISSING = "missing"


def under(circumstances: Circumstances, config: Config) -> Config:
    """Return the configuration of a run under these circumstances."""
    images = config.data.subset or presets.TRAINING_IMAGES.get(config.data.dataset)
    # A small subset may have fewer batches than that.
    there = circumstances.analyse_batches if images is None else images // config.training.batch_size
    analysed = min(config.circumstances.analyse_batches, circumstances.analyse_batches, there)
    human_labels = _human_labels(circumstances, config) if config.labels.noise == "real" else None
    circumstances = dataclasses.replace(circumstances, analyse_batches=analysed, human_labels=human_labels)
    return dataclasses.replace(config, circumstances=circumstances)


def _human_labels(circumstances: Circumstances, config: Config) -> str:
    # A folder holds both published files under their own names.
    if circumstances.human_labels is None:
        raise UserError(
            "real noise needs --human-labels, the published label files of CIFAR-10N and CIFAR-100N or their folder; "
            "or leave it out with --noises."
        )
    given = Path(circumstances.human_labels)
    inside = given.is_dir() and config.data.dataset in _HUMAN_LABELS
    return str(given / _HUMAN_LABELS[config.data.dataset] if inside else given)


def runs(cells: Iterable[presets.Cell], seeds: Sequence[int]) -> list[Config]:
    """Return every run of the cells; the seeds outside, so that what is stopped holds whole seeds of all cells."""
    comparison.check_seeds(seeds)
    cells = list(cells)
    return [cell.run(seed) for seed in seeds for cell in cells]


def state(config: Config, folder: Path) -> State:
    """Return how far the run in a folder is.

    Raises:
      UserError: The folder holds a run of another configuration.
    """
    configuration.check_same_run(config, folder)
    if (folder / "summary.json").exists():
        return State.COMPLETE
    return State.CUT_OFF if (folder / "config.json").exists() else State.MISSING


def part_of(configs: Sequence[Config], shard: str) -> list[Config]:
    """Return the part ``i/n`` of the runs, counted from 1: disjoint, together complete, and about equally costly.

    Which run belongs to which part depends on the runs alone, not on what has been run.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard must be i/n with i from 1 to n, such as 2/4, got {shard!r}.")
    index, count = int(match[1]) - 1, int(match[2])
    costs, parts = [0.0] * count, {}
    # The costliest first, each to the part that has least to do so far.
    for config in sorted(configs, key=_relative_cost, reverse=True):
        least = min(range(count), key=costs.__getitem__)
        costs[least] += _relative_cost(config)
        parts[config] = least
    return [config for config in configs if parts[config] == index]


def _relative_cost(config: Config) -> float:
    passes = _passes(config) * (2 if config.training.companion == "co-teaching" else 1)
    images = config.data.subset or presets.TRAINING_IMAGES.get(config.data.dataset, 50_000)
    pixels = 4 if config.data.dataset == "tiny_imagenet" else 1
    of_network = _GMAC.get(config.network.model, 1.0) * config.network.width**2
    return passes * config.training.epochs * images * pixels * of_network


def _passes(config: Config) -> float:
    """Return the passes through a network a step."""
    return 1 if config.optimizer.method == "sgd" else 1 + 1 / config.optimizer.every


def by_value(configs: Sequence[Config], scale: Scale) -> list[Config]:
    """Return the runs with those first that tell most: the headline numbers, seed by seed; then the rest as it is."""
    headline = [configuration.without_circumstances(cell.config) for cell in presets.cells("headline", ALL, scale)]

    def value(config: Config) -> tuple[int, int]:
        cell = configuration.without_circumstances(replace(config, seed=0))
        return (config.seed, headline.index(cell)) if cell in headline else (sys.maxsize, 0)

    return sorted(configs, key=value)


def carry_out(
    name: str,
    selection: Selection,
    scale: Scale,
    circumstances: Circumstances,
    out: Path,
    shard: str = "1/1",
    minutes: float | None = None,
    dry_run: bool = False,
    estimate: bool = True,
) -> None:
    """Say what a preset consists of and how long it takes, then run what is missing and go on with what was cut off.

    Raises:
      UserError: The options are wrong, or a run failed; the others are then complete.
      Interrupted: It was asked to stop.
    """
    clock = Clock(minutes, estimate)
    seeds = presets.seeds(name, selection)
    configs = [under(circumstances, one) for one in runs(presets.cells(name, selection, scale), seeds)]
    for one in configs:
        configuration.check(one)
    mine = part_of(configs, shard)
    # Before the first of them trains for hours.
    states = {one: state(one, out / run_name(one)) for one in mine}
    print(presets.described(name, selection, scale))
    counts = ", ".join(f"{sum(s is one for s in states.values())} {one.value}" for one in State)
    print(
        f"{_runs(len(mine))} in {out}"
        + (f" (part {shard} of {len(configs)})" if mine != configs else "")
        + f": {counts}"
    )
    todo = [one for one in mine if states[one] is not State.COMPLETE]
    if minutes is not None:
        todo = by_value(todo, scale)
    try:
        needed = _say_how_long(todo, out) if todo and estimate else {}
        if dry_run:
            for one in mine:
                print(f"  {states[one].value:8}  {run_name(one)}")
            if minutes is not None:
                fit = clock.planned(needed)
                print(f"{len(fit)} of {_runs(len(todo))} fit {minutes:g} minutes: {', '.join(map(run_name, fit))}")
            return
        failures = _run_all(todo, out, needed, clock)
    except (Interrupted, KeyboardInterrupt):
        from ..training import environment

        raise Interrupted(f"stopped; go on with the same command: {environment.command()}") from None
    if failures:
        raise UserError(
            f"{len(failures)} of {_runs(len(todo))} did not end: "
            + "; ".join(f"{folder}: {error}" for folder, error in failures.items())
        )


class Clock:
    """How much time is left, counted from here, and which runs fit it, by estimates that are corrected as runs end."""

    # What an estimate leaves out, such as compilation and checkpoints.
    MARGIN = 1.1

    def __init__(self, minutes: float | None, estimate: bool = True):
        if minutes is not None and not 0 < minutes < math.inf:
            raise UserError(f"--minutes must be a positive number, got {minutes:g}.")
        if minutes is not None and not estimate:
            raise UserError("--minutes needs the estimate of how long runs take: leave out --no-estimate.")
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._corrections: dict[Config, float] = {}

    def left(self) -> float:
        """Return the seconds that are left, infinite without a limit."""
        return self._end - time.monotonic()

    def needs(self, config: Config, estimated: float) -> float:
        """Return the seconds that a run takes, by the last one of its kind where there was one."""
        return estimated * self._corrections.get(_kind(config), self.MARGIN)

    def ended(self, config: Config, estimated: float, took: float) -> None:
        """Learn from a run how good the estimates of its kind are."""
        self._corrections[_kind(config)] = max(took / estimated, 1.0)

    def planned(self, needed: Mapping[Config, float]) -> list[Config]:
        """Return the runs that fit, each in its turn where there is time left for all of it."""
        left, fit = self.left(), []
        for config, estimated in needed.items():
            if (needs := self.needs(config, estimated)) <= left:
                left -= needs
                fit.append(config)
        return fit


def _run_all(todo: Sequence[Config], out: Path, needed: Mapping[Config, float], clock: Clock) -> dict[str, UserError]:
    from ..training import run, timing

    failures, left_out = {}, 0
    for number, config in enumerate(todo, 1):
        folder, estimated = out / run_name(config), needed.get(config, 0.0)
        if (needs := clock.needs(config, estimated)) > (left := clock.left()):
            lacks = f"{timing.duration(needs)} of {timing.duration(max(left, 0))}"
            print(f"[{number}/{len(todo)}] {folder.name} does not fit: {lacks}")
            left_out += 1
            continue
        print(f"[{number}/{len(todo)}] {folder.name}", flush=True)
        started = time.monotonic()
        try:
            run.run_one(config, folder)
        except UserError as error:
            # A run that diverged must not take the others with it.
            print(f"{folder.name} failed: {error}", flush=True)
            failures[folder.name] = error
        else:
            if estimated:
                clock.ended(config, estimated, time.monotonic() - started)
    if left_out:
        print(f"{_runs(left_out)} left for another time: the same command takes them.", flush=True)
    return failures


def _runs(count: int) -> str:
    return f"{count} run{'' if count == 1 else 's'}"


# --- how long it takes --------------------------------------------------------------------------------------------


def _say_how_long(todo: Sequence[Config], out: Path) -> dict[Config, float]:
    """Return the seconds that each run takes from where it is, compilation not counted, and say their sum."""
    from ..training import preparation, timing

    measured: dict[Config, float] = {}
    needed: dict[Config, float] = {}
    for config in todo:
        kind = _kind(config)
        if kind not in measured:
            measured[kind] = timing.seconds_per_epoch(preparation.prepare(config))
            passes = {1: "one pass a step", 2: "two passes a step"}.get(
                count := _passes(config), f"{count:g} passes a step"
            )
            companion = "" if config.training.companion == "none" else f", {config.training.companion}"
            print(
                f"  {config.data.dataset}, {config.network.model}, {passes}{companion}: "
                f"{timing.duration(measured[kind])} an epoch",
                flush=True,
            )
        done = files.read_json_lines(out / run_name(config) / "metrics.jsonl")
        needed[config] = measured[kind] * (config.training.epochs - (done[-1]["epoch"] if done else 0))
    print(timing.estimate(sum(needed.values())), flush=True)
    return needed


def _kind(config: Config) -> Config:
    """Return what runs have in common that take equally long."""
    usual = flat(configuration.PAPER)
    alike = ("rate", "noise", "human_labels", "rho", "alpha", "alpha_ramp", "seed", "epochs", "learning_rate_drops")
    settings = {name: usual[name] for name in alike}
    return replace(config, **settings, method="sgd" if config.optimizer.method == "sgd" else "two passes")
