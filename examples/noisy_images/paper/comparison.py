"""Several methods and seeds under one protocol: runs, then a table and a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import config as configuration
from .. import files
from ..config import Config, replace
from ..errors import UserError, left_out_if_not_installed, unknown_name
from ..measures import tables
from ..training import launch

COLUMNS = {
    "best_test_accuracy": "test, best",
    "chosen_test_accuracy": "test, chosen",
    "last_test_accuracy": "test, last",
    "last_noisy_accuracy": "noisy",
    "last_clean_accuracy": "clean",
    "last_gap": "gap",
}


def compare(
    config: Config,
    method_names: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    device_count: int | None = None,
) -> dict[str, Any]:
    """Train every method with every seed and write the table and the figure; complete runs are not run again.

    Of several processes the first one writes.
    """
    # Here and below imported where it is used, so that --help does not wait for JAX.
    from ..training import methods, run

    for name in method_names:
        if name not in methods.METHODS:
            raise unknown_name("method", name, methods.METHODS)
    if len(set(method_names)) != len(method_names) or not method_names:
        raise UserError(f"--methods must be different names, got {' '.join(method_names) or 'none'}.")
    check_seeds(seeds)
    # The seeds outside: an interrupted comparison holds whole seeds of all methods.
    runs = {
        folder / f"{name}-seed{seed}": replace(config, method=name, seed=seed)
        for seed in seeds
        for name in method_names
    }
    # Before the first of them trains for hours.
    for one, its_config in runs.items():
        configuration.check_same_run(its_config, one)
    for one, its_config in runs.items():
        run.run_one(its_config, one, device_count)
    result = report(folder, method_names, seeds) if launch.is_first() else {}
    launch.wait_for_others("reported")
    return result


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise unless there are seeds and no two are the same."""
    if len(set(seeds)) != len(seeds) or not seeds:
        raise UserError(f"--seeds must be different numbers, got {' '.join(map(str, seeds)) or 'none'}.")


def report(folder: Path, method_names: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Write `comparison.json`, `table.md` and `figure.png` from the runs in a folder."""
    from ..training import environment

    histories = {
        name: [files.read_json_lines(folder / f"{name}-seed{seed}" / "metrics.jsonl") for seed in seeds]
        for name in method_names
    }
    summaries = {
        name: [files.read_json(folder / f"{name}-seed{seed}" / "summary.json") for seed in seeds]
        for name in method_names
    }
    table = {name: tables.spreads(values, COLUMNS) for name, values in summaries.items()}
    result = {"environment": environment.environment(), "seeds": list(seeds), "table": table, "summaries": summaries}
    files.write_json(folder / "comparison.json", result)
    files.write_text(folder / "table.md", markdown(table))
    with left_out_if_not_installed("figure.png"):
        from ..measures import plots

        plots.curves({name.upper(): runs for name, runs in histories.items()}, folder / "figure.png")
    return result


def plot(folders: Sequence[Path], output: Path, by: str, figure: str) -> None:
    """Draw the curves of runs, labelled by one of their settings; runs with the same label are seeds of one curve."""
    from ..measures import plots

    panels = {
        "1": plots.FIGURE_1,
        "2": plots.FIGURE_2,
        "3": plots.FIGURE_3,
        "5": plots.FIGURES_5_TO_7,
        "alignment": plots.ALIGNMENT,
        "shares": plots.SHARES,
    }
    if figure not in (figures := [*panels, "layers"]):
        raise unknown_name("figure", figure, figures)
    if output.suffix not in (".png", ".pdf"):
        raise UserError(f"--output {output} ends neither in .png nor in .pdf.")
    records = "analysis.jsonl" if figure == "layers" else "metrics.jsonl"
    runs: dict[str, list[list[dict[str, Any]]]] = {}
    for folder in folders:
        settings = configuration.flat(configuration.read(folder / "config.json"))
        if by not in settings:
            raise unknown_name("setting", by, settings)
        history = files.read_json_lines(folder / records)
        if not history and figure == "layers":
            raise UserError(f"{folder} has no analysis of its gradients: train with --analyse-batches.")
        if not history:
            raise UserError(f"{folder} has no metrics yet: its first epoch is not over.")
        runs.setdefault(str(settings[by]), []).append(history)
    try:
        if figure == "layers":
            plots.layers(runs, output)
        else:
            plots.curves(runs, output, panels[figure])
    except ValueError as error:
        raise UserError(str(error)) from error


def markdown(table: Mapping[str, Mapping[str, tables.Spread]]) -> str:
    """Return the table as Markdown, in percent; columns that no method has are left out."""
    columns = _columns(table)
    body = [[name, *(tables.percent(row.get(c)) for c in columns)] for name, row in table.items()]
    return tables.markdown(["method", *(COLUMNS[c] for c in columns)], body)


def _columns(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [c for c in COLUMNS if any(c in row for row in table.values())]


def show(result: Mapping[str, Any], folder: Path) -> None:
    """Print the table to the terminal."""
    table = result["table"]
    columns = _columns(table)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(markdown(table))
    else:
        out = Table(title=f"accuracy in %, mean ± standard deviation over {len(result['seeds'])} seeds")
        out.add_column("method")
        for column in columns:
            out.add_column(COLUMNS[column], justify="right")
        for name, row in table.items():
            out.add_row(name, *(tables.percent(row.get(c)) for c in columns))
        Console().print(out)
    print(f"table, figure and runs: {folder}")
