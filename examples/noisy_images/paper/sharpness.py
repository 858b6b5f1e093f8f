"""The sharpness of runs, each at its newest checkpoint, and compared."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import config as configuration
from .. import files
from ..config import AS_STARTED, Whereabouts, replace
from ..errors import UserError, unknown_name
from ..measures import sharpness, tables
from ..training import run
from ..training.trainer import Trainer


def of_run(folder: Path, *, whereabouts: Whereabouts = AS_STARTED, **options: Any) -> dict[str, Any]:
    """Measure the newest checkpoint of a run, in float32; the options are those of `measures.sharpness.of_trainer`.

    Raises:
      UserError: The folder holds no run or no checkpoint, or Lanczos did not converge.
    """
    trainer, prepared = run.restored(folder, whereabouts=whereabouts)
    exact = replace(trainer.config, precision="float32")
    if exact != trainer.config:
        state = trainer.state
        trainer = Trainer(exact, prepared.dataset)
        trainer.state = state
    return sharpness.of_trainer(trainer, **options)


def measure(
    folders: Sequence[Path],
    *,
    samples: int,
    seed: int,
    tolerance: float,
    by: str,
    whereabouts: Whereabouts = AS_STARTED,
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """Measure runs, write `sharpness.json` into the folder of each, and compare them.

    Returns:
      One record a run, and for every value of the setting `by` number, mean and standard deviation (n - 1; absent for
      one run) of the eigenvalue.
    """
    settings = {folder: configuration.flat(configuration.read(folder / "config.json")) for folder in folders}
    for values in settings.values():
        if by not in values:
            raise unknown_name("setting", by, values)
    if not folders:
        raise UserError("sharpness needs folders of runs.")
    if samples < 1:
        raise UserError(f"--samples must be at least 1, got {samples}.")
    if not 0 < tolerance < 1:
        raise UserError(f"--tolerance must be in (0, 1), got {tolerance:g}.")
    rows, groups = [], {}
    for folder, values in settings.items():
        measured = of_run(folder, samples=samples, seed=seed, tolerance=tolerance, whereabouts=whereabouts)
        files.write_json(folder / "sharpness.json", measured)
        rows.append({"run": str(folder), by: values[by], "training seed": values["seed"], **measured})
        groups.setdefault(str(values[by]), []).append(measured["eigenvalue"])
        print(f"{folder}: {measured['eigenvalue']:.5g}, {measured['products']} products", flush=True)
    return rows, {label: {"runs": len(values)} | tables.spread(values) for label, values in groups.items()}


def markdown(rows: Sequence[Mapping[str, Any]], groups: Mapping[str, Mapping[str, float]], by: str) -> str:
    """Return the table of the runs and that of their means as Markdown."""
    first = rows[0]
    of_runs = tables.markdown(
        ["run", by, "seed", "epoch", "eigenvalue", "residual", "products", "seconds"],
        [
            [
                *map(str, (row["run"], row[by], row["training seed"], row["epoch"])),
                *(f"{row['eigenvalue']:.5g}", f"{row['residual']:.1e}", str(row["products"]), f"{row['seconds']:.1f}"),
            ]
            for row in rows
        ],
    )
    of_groups = tables.markdown(
        [by, "runs", "eigenvalue"],
        [[label, str(group["runs"]), tables.number(group, ".4g", ".2g")] for label, group in groups.items()],
    )
    return (
        f"Largest eigenvalue of the Hessian at the newest checkpoint: {first['of']}; {first['samples']} samples of "
        f"seed {first['seed']}; Lanczos to a relative {first['tolerance']:g}.\n\n{of_runs}\n{of_groups}"
    )
