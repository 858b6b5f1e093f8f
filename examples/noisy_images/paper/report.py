"""Turn the runs of a preset that are there into the paper's table or figure: measured beside published.

For every cell the complete runs whose configuration is exactly the cell's count, and no others. Best test accuracy over
the epochs is what the paper reports; the last epoch's stands beside it. The standard error of a difference is

    sqrt(s_paper**2 / 3 + s**2 / n)

with the paper's standard deviation over its three seeds and the measured one over n; where one of the two is unknown,
the other stands for it, and the number is marked. What a study reports beside that is in `study`.
"""

import csv
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import files
from ..config import run_name
from ..errors import UserError
from ..measures import plots, tables
from ..training import timing
from . import comparison, equal_loss, presets, records, runs, study
from .presets import PUBLISHED_SEEDS, Cell, Published, Scale, Selection
from .records import Record, Run
from .study import Sample

BEST, LAST = "best_test_accuracy", "last_test_accuracy"
# What the last epoch of a figure's runs is told by, beside the figure's panels.
_LAST_EPOCH = (
    *("test_accuracy", "noisy_accuracy", "true_accuracy_on_noisy", "clean_accuracy", "gap", "generalization_gap"),
    *("downweighted_share", "alignment_noisy", "alignment_random", "alignment_clean", "alignment_random_clean"),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A cell with what its complete runs measured."""

    cell: Cell
    runs: Sequence[Run]
    """The complete ones."""
    values: Mapping[str, Mapping[str, float]]
    """Mean, and standard deviation over the runs, of their numbers; accuracies are fractions."""
    curves: plots.Runs
    """Metrics over the epochs."""
    others: Mapping[str, str]
    """Folders that do not count, with the reason."""

    @property
    def seeds(self) -> int:
        """Number of complete runs."""
        return len(self.runs)

    @property
    def sample(self) -> Sample:
        """What of it a study compares."""
        return Sample(self.cell, self.runs)

    @property
    def difference(self) -> float | None:
        """Measured minus published, best epoch, in points."""
        if self.cell.published is None or BEST not in self.values:
            return None
        return 100 * self.values[BEST]["mean"] - self.cell.published.mean

    @property
    def measured_std(self) -> float | None:
        """Standard deviation over the measured seeds, best epoch, in points; None for fewer than two."""
        std = self.values.get(BEST, {}).get("std")
        return None if std is None else 100 * std

    @property
    def standard_error(self) -> float | None:
        """Standard error of the difference, in points."""
        if self.difference is None:
            return None
        return standard_error(self.cell.published.std, self.measured_std, self.seeds)


def standard_error(published: float | None, measured: float | None, seeds: int) -> float | None:
    """Return the standard error of a difference from two standard deviations; None where both are unknown."""
    if published is None and measured is None:
        return None
    theirs = measured if published is None else published
    ours = published if measured is None else measured
    return math.sqrt(theirs**2 / PUBLISHED_SEEDS + ours**2 / seeds)


def write(
    name: str, selection: Selection, scale: Scale, out: Path, output: Path, record: Path | None = None
) -> list[Path]:
    """Write the report of a preset as Markdown, CSV and pictures, print its table, and return the files.

    Args:
        name: The preset.
        selection: Part of it.
        scale: What its runs change of the protocol.
        out: Folder of the runs, or of a record of them.
        output: Folder of the report.
        record: Folder to write a record of the runs into.
    """
    seeds = presets.seeds(name, selection)
    comparison.check_seeds(seeds)
    figure = presets.FIGURES.get(name)
    kept = records.read(out)
    rows = [read(cell, seeds, out, kept) for cell in presets.cells(name, selection, scale)]
    title = presets.described(name, selection, scale)
    stem = output / _stem(name, selection, scale)
    last_epoch = tuple(dict.fromkeys((*figure.panels, *_LAST_EPOCH))) if figure else ()

    pictures = _draw_curves(figure, rows, title, stem) if figure else _draw_dots(rows, title, stem)
    if figure and figure.is_study:
        header, body, *text = _study(name, rows, seeds, scale, out, stem)
        pictures += [path for path in (_with_ending(stem, "-differences.png"),) if path.exists()]
    else:
        header, body, *text = _beside_the_paper(rows, seeds, last_epoch)
    parts = [f"# {title}", *text, *(f"![{title}]({picture.name})" for picture in pictures), *_left_out(rows)]
    files.write_text(_with_ending(stem, ".md"), "\n\n".join(part.rstrip() for part in parts if part) + "\n")
    with files.replacing(_with_ending(stem, ".csv")) as temporary:
        _write_csv(temporary, name, rows, last_epoch)
    if record is not None:
        # What a setting was chosen among belongs to it, on the seeds of both.
        among = presets.choices(name, scale)
        both = dict.fromkeys((*presets.seeds(figure.choice), *seeds)) if among else ()
        _write_record(record, rows, [read(cell, both, out, kept) for cell in among], last_epoch)
    written = [_with_ending(stem, ".md"), _with_ending(stem, ".csv"), *pictures]
    _show(title, header, body, rows)
    print(f"written in {output}: {', '.join(path.name for path in written)}")
    return written


def read(cell: Cell, seeds: Iterable[int], out: Path, kept: Record = records.NOTHING) -> Row:
    """Read the runs of a cell, from their folders or else from a record of them."""
    complete, others = [], {}
    for seed in seeds:
        folder = out / run_name(cell.run(seed))
        try:
            state = runs.state(cell.run(seed), folder)
        except UserError as error:
            others[folder.name] = str(error)
            continue
        if state is runs.State.COMPLETE:
            complete.append(records.of_folder(folder, seed))
        elif folder.name in kept.runs:
            complete.append(kept.runs[folder.name])
        elif state is runs.State.CUT_OFF:
            others[folder.name] = "cut off"
    names = dict.fromkeys(number for run in complete for number in run.numbers)
    values = tables.spreads([run.numbers for run in complete], names)
    histories = [run.history for run in complete if run.history]
    curves = histories or kept.curves.get(records.cell_name(cell.config), {})
    return Row(cell, complete, values, curves, others)


def _write_record(folder: Path, rows: Sequence[Row], among: Sequence[Row], panels: Iterable[str]) -> None:
    panels = list(panels) or [LAST.removeprefix("last_")]
    curves = {records.cell_name(row.cell.config): records.lines(row.curves, panels) for row in rows}
    records.write(folder, {run.name: run for row in (*rows, *among) for run in row.runs}.values(), curves)


def _beside_the_paper(rows: Sequence[Row], seeds: Sequence[int], last_epoch: Sequence[str]) -> tuple[Any, ...]:
    """Return header and body of the table, and the parts of the text that it stands in."""
    header, body, common = _table(rows)
    text = [common, _explained(seeds, rows), tables.markdown(header, body)]
    columns = [metric for metric in last_epoch if any(f"last_{metric}" in row.values for row in rows)]
    if columns:
        text += [
            "Last epoch (shares and accuracies in percent):",
            tables.markdown(*_last_epoch_table(rows, columns)),
        ]
    return header, body, *text


def _study(
    name: str, rows: Sequence[Row], seeds: Sequence[int], scale: Scale, out: Path, stem: Path
) -> tuple[Any, ...]:
    """Return header and body of a study's table, and the parts of the text; draw and write its differences."""
    figure = presets.FIGURES[name]
    samples = [row.sample for row in rows]
    header, body = study.table(samples)
    text = [_explained_study(seeds, rows), tables.markdown(header, body)]
    shown = study.columns(samples)
    pairs = study.compared(study.pairs_of(figure, samples), shown)
    if pairs:
        text += ["Differences in points, paired by seed, with 95 % intervals:", study.table_of_pairs(pairs)]
    if figure.at_equal_loss:
        text += equal_loss.report(samples, study.pairs_of(figure, samples), figure.at_equal_loss)
    if figure.choice:
        # The same cells twice: on the seeds that are chosen on, and on those that are reported.
        kept = records.read(out)
        there = presets.choices(name, scale)
        choosing = [read(cell, presets.seeds(figure.choice), out, kept).sample for cell in there]
        reported = [read(cell, seeds, out, kept).sample for cell in there]
        if study.can_be_chosen_among(choosing):
            beside = [sample for sample in samples if sample.key in figure.beside]
            table, best = study.at_its_best(choosing, reported, shown, beside)
            text += [_explained_choice(figure.choice), study.table_of_choice(choosing), table]
            text += [study.table_of_pairs(best)] if best else []
            pairs += best
        elif any(sample.runs for sample in choosing):
            text.append(f"Nothing is chosen on the runs of {figure.choice} before they are complete.")
    elif not figure.pairs and study.can_be_chosen_among(samples):
        text += ["Chosen among them:", study.table_of_choice(samples)]
    if pairs:
        study.draw(pairs, f"{figure.title}\npaired by seed, 95 % intervals", _with_ending(stem, "-differences.png"))
        study.write_csv(_with_ending(stem, "-differences.csv"), pairs)
    return header, body, *text


# --- tables -------------------------------------------------------------------------------------------------------

_COLUMNS: dict[str, Callable[[Cell], str]] = {
    "data set": lambda cell: cell.config.data.dataset,
    "noise": lambda cell: _noise(cell),
    "network": lambda cell: cell.config.network.model,
    "setting": lambda cell: cell.setting,
    "method": lambda cell: _method(cell.config.optimizer.method),
}


def _noise(cell: Cell) -> str:
    if cell.config.data.dataset == "mini_webvision":
        return "of the web"
    if cell.config.labels.noise in ("none", "real"):
        return cell.config.labels.noise
    return f"{cell.config.labels.noise} {100 * cell.config.labels.rate:g} %"


def _method(name: str) -> str:
    return name.upper().replace("_", "-")


def _varying(rows: Sequence[Row]) -> list[str]:
    """Return the columns that tell the rows apart, at least the method."""
    return [c for c, of in _COLUMNS.items() if c == "method" or len({of(row.cell) for row in rows}) > 1]


def _table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]], str]:
    """Return header, body and a sentence on what all rows have in common."""
    columns = _varying(rows)
    body = [
        [
            *(_COLUMNS[column](row.cell) for column in columns),
            _published(row.cell.published),
            tables.percent(row.values.get(BEST), digits=2),
            str(row.seeds) if row.seeds else "",
            "" if row.difference is None else f"{row.difference:+.2f}",
            _marked(row),
            tables.percent(row.values.get(LAST), digits=2),
        ]
        for row in rows
    ]
    header = [*columns, "paper", "best", "n", "difference", "s.e.", "last"]
    common = [f"{c}: {of(rows[0].cell)}" for c, of in _COLUMNS.items() if c not in columns and of(rows[0].cell)]
    return header, body, f"All rows: {'; '.join(common)}." if common else ""


def _published(number: Published | None) -> str:
    if number is None:
        return ""
    return f"{number.mean:.2f}" + ("" if number.std is None else f" ± {number.std:.2f}")


def _marked(row: Row) -> str:
    if row.standard_error is None:
        return ""
    one_unknown = row.cell.published.std is None or row.measured_std is None
    return f"{row.standard_error:.2f}" + (" †" if one_unknown else "")


def _last_epoch_table(rows: Sequence[Row], metrics: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    columns = _varying(rows)
    header = [*columns, "n", *(plots.axis_of(metric).title.lower() for metric in metrics)]
    body = [
        [
            *(_COLUMNS[column](row.cell) for column in columns),
            str(row.seeds) if row.seeds else "",
            *(_in_its_unit(metric, row.values.get(f"last_{metric}")) for metric in metrics),
        ]
        for row in rows
    ]
    return header, body


def _in_its_unit(metric: str, value: Mapping[str, float] | None) -> str:
    if value is None or plots.axis_of(metric).percent:
        return tables.percent(value, digits=2)
    return tables.number(value, ".3f")


def _explained(seeds: Sequence[int], rows: Sequence[Row]) -> str:
    text = (
        "Test accuracy in percent, mean ± standard deviation (n - 1) over the n complete runs of seeds "
        f"{', '.join(map(str, seeds))}. "
        "*Paper* and *best* are the best epoch on the test set, as the paper reports it, which flatters every method; "
        "*last* is the last epoch. *Difference* is best minus paper, in points; its standard error (*s.e.*) is "
        "sqrt(s_paper² / 3 + s² / n), and † marks where one of the two deviations is unknown and the other stands for "
        "it."
    )
    if any(row.cell.config.data.dataset == "mini_webvision" for row in rows):
        text += " Mini-WebVision: the paper tests on ImageNet's validation images (--validation-dir)."
    return text + _where(rows)


def _explained_study(seeds: Sequence[int], rows: Sequence[Row]) -> str:
    return (
        f"Percent, mean ± standard deviation (n - 1) over the n complete runs of seeds {_ranged(seeds)}. *Last* is the "
        "last epoch, *chosen* the epoch chosen on held-out noisy labels, *best* the best epoch on the test set, which "
        "flatters every method; *noisy* is the accuracy on the wrong training labels, against these."
    ) + _where(rows)


def _explained_choice(name: str) -> str:
    return (
        f"Each method at the setting that is best for it, chosen on seeds {_ranged(presets.seeds(name))} and reported "
        "on those above:"
    )


def _ranged(seeds: Sequence[int]) -> str:
    ordered = list(seeds)
    if len(ordered) > 3 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]} to {ordered[-1]}"
    return ", ".join(map(str, ordered))


def _where(rows: Sequence[Row]) -> str:
    complete = [run for row in rows for run in row.runs]
    if not complete:
        return ""
    devices = ", ".join(dict.fromkeys(run.device for run in complete))
    commits = ", ".join(dict.fromkeys(run.commit for run in complete))
    took = timing.duration(sum(run.seconds for run in complete))
    return f"\n\n{len(complete)} runs, {took} in all, on {devices}; commit {commits}."


def _left_out(rows: Sequence[Row]) -> list[str]:
    others = {name: reason for row in rows for name, reason in row.others.items()}
    return (
        ["Not counted:\n\n" + "\n".join(f"* `{name}`: {reason}" for name, reason in others.items())] if others else []
    )


def _write_csv(path: Path, name: str, rows: Sequence[Row], last_epoch: Iterable[str]) -> None:
    def numbers(label: str, value: Mapping[str, float] | None, scale: float = 100) -> dict[str, Any]:
        mean, std = (None if value is None else value.get(key) for key in ("mean", "std"))
        return {label: _rounded(mean, scale), f"{label}_std": _rounded(std, scale)}

    records = []
    for row in rows:
        config, number = row.cell.config, row.cell.published
        record = {
            "preset": name,
            "dataset": config.data.dataset,
            "noise": config.labels.noise,
            "rate_percent": None if config.labels.noise in ("none", "real") else 100 * config.labels.rate,
            "model": config.network.model,
            "method": config.optimizer.method,
            "setting": row.cell.setting,
            "published_best_percent": None if number is None else number.mean,
            "published_best_percent_std": None if number is None else number.std,
            **numbers("best_percent", row.values.get(BEST)),
            "seeds": row.seeds,
            "difference": _rounded(row.difference),
            "standard_error": _rounded(row.standard_error),
            **numbers("last_percent", row.values.get(LAST)),
        }
        for metric in last_epoch:
            percent = plots.axis_of(metric).percent
            label = f"last_{metric}_percent" if percent else f"last_{metric}"
            record |= numbers(label, row.values.get(f"last_{metric}"), 100 if percent else 1)
        records.append(record)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, records[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def _rounded(value: float | None, scale: float = 1) -> float | None:
    return None if value is None else round(scale * value, 6)


def _show(title: str, header: Sequence[str], body: Sequence[Sequence[str]], rows: Sequence[Row]) -> None:
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title, tables.markdown(header, body), sep="\n\n")
    else:
        out = Table(title=title, box=box.SIMPLE_HEAD)
        for column in header:
            out.add_column(column, justify="left" if column in _COLUMNS else "right", overflow="fold")
        for line in body:
            # Narrow enough for most terminals.
            out.add_row(*(value.replace(" ± ", "±") for value in line))
        Console().print(out)
    if not any(row.seeds for row in rows):
        print("none of its runs is complete yet: make them with `paper`, or give the options that they were made with.")


# --- pictures -----------------------------------------------------------------------------------------------------


def _draw_dots(rows: Sequence[Row], title: str, stem: Path) -> list[Path]:
    """Draw the test accuracies of a table, measured beside published, one panel a data set."""
    columns = [column for column in _varying(rows) if column != "data set"]
    panels: dict[str, list[plots.Dot]] = {}
    for row in rows:
        label = ", ".join(filter(None, (_COLUMNS[column](row.cell) for column in columns)))
        measured = row.values.get(BEST)
        panels.setdefault(row.cell.config.data.dataset, []).append(
            plots.Dot(
                label,
                row.cell.published and tuple(row.cell.published),
                measured and (100 * measured["mean"], row.measured_std),
            )
        )
    path = _with_ending(stem, ".png")
    plots.save(plots.dots_figure(panels, title), path)
    return [path]


def _draw_curves(figure: presets.Figure, rows: Sequence[Row], title: str, stem: Path) -> list[Path]:
    """Draw the curves of a figure, apart for every data set, noise rate and value of what the figure is drawn by."""
    drawings: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if figure.drawn and row.sample.key not in figure.drawn:
            continue
        apart = [_COLUMNS["data set"](row.cell), _COLUMNS["noise"](row.cell)]
        if figure.by:
            apart.append(_COLUMNS[figure.by](row.cell))
        drawings.setdefault(tuple(apart), []).append(row)
    written = []
    for apart, group in drawings.items():
        columns = [column for column in _varying(group) if column in ("method", "setting")]
        curves = {
            ", ".join(filter(None, (_COLUMNS[column](row.cell) for column in reversed(columns)))): row.curves
            for row in group
            if row.curves
        }
        if not curves:
            continue
        path = _with_ending(stem, ".png" if len(drawings) == 1 else f"-{_slug(' '.join(apart))}.png")
        plots.curves(curves, path, figure.panels, f"{title}\n{', '.join(apart)}")
        written.append(path)
    return written


def _with_ending(stem: Path, ending: str) -> Path:
    # Not Path.with_suffix: a stem may hold a point.
    return stem.with_name(stem.name + ending)


def _stem(name: str, selection: Selection, scale: Scale) -> str:
    """Return a file name that tells apart the reports of parts and scales of one preset."""
    parts = [*selection.dataset, *selection.noises, *selection.rates, *selection.models, *selection.methods]
    words = [*parts, *selection.settings, *presets.changes(name, selection, scale)]
    return "-".join([name, *(_slug(str(word)) for word in words)])


def _slug(text: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", text.replace(" %", "").replace(",", ""))
