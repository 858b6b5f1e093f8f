"""Which training samples have a wrong label: a ranking from their history, and the files to act on.

index.html                  a page to look through the samples on and to decide; with its folder `pages`
ranking.csv                 one line a sample, the most suspicious first
estimate.json               how many labels are wrong, and which classes are mistaken for one another
suspects.png                the most suspicious images, each with its given and its suggested label
labels.npy                  given labels (N,)
pred_probs_in_sample.npy    probabilities (N, K) of networks that have trained on these very labels
pred_probs.npy              probabilities (N, K) out of sample, by cross-validation where asked
quality.json                how good the ranking is, where the true labels are known

The arrays are those that cleanlab reads, in the order of the training set.
"""

import math
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .. import data, files
from ..config import AS_STARTED, Whereabouts
from ..data.npz import why_unreadable
from ..errors import UserError, left_out_if_not_installed, unknown_name
from ..measures import sample_history
from ..measures.sample_history import History
from . import cross_validation, estimate, page
from .scores import MARGIN_SCORES, PROBABILITY_SCORES, SCORES
from .scores import OUT_OF_SAMPLE as OUT_OF_SAMPLE
from .suspicion import Ranking, from_histories, from_probabilities, quality, write_csv

SHOWN = 10
# The scores that samples are ranked by where none is asked for.
OF_HISTORIES, OF_PROBABILITIES = "disagreement", "normalized_margin"


def rank(
    folders: Sequence[Path],
    output: Path,
    score: str,
    top: int,
    folds: int | None = None,
    whereabouts: Whereabouts = AS_STARTED,
) -> Ranking:
    """Rank the training samples of runs and write everything that comes out; several runs average their ranks.

    Args:
      folders: Runs on the same samples with the same given labels.
      output: Folder to write.
      score: A name of `SCORES`, of `MARGIN_SCORES` where the histories hold margins, or with `folds` of
        `PROBABILITY_SCORES`.
      top: Images on the contact sheet.
      folds: Number of folds to cross-validate every run by; not at all if None.
      whereabouts: Where the runs find their files now.

    Raises:
      UserError: A run has no history or no checkpoint, or the runs do not belong together.
    """
    # Here and below imported where it is used, so that --help does not wait for JAX.
    from ..training import run

    if score in PROBABILITY_SCORES and folds is None:
        raise UserError(f"--score {score} needs the folds: add --cross-validate 5.")
    _check(score, (*SCORES, *MARGIN_SCORES, *PROBABILITY_SCORES), top)
    histories = [sample_history.read(folder) for folder in folders]
    for folder, history in zip(folders, histories, strict=True):
        if not _same_samples(history, histories[0]):
            raise UserError(
                f"{folder} and {folders[0]} have other samples or other given labels: rank runs together that differ "
                "in --seed alone, trained with one --noise-seed."
            )
    if score in MARGIN_SCORES and any(history.margins is None for history in histories):
        raise UserError(f"--score {score} needs the margins, which these runs did not keep: choose mean_loss.")
    in_sample, out_of_sample = [], []
    for folder, history in zip(folders, histories, strict=True):
        trainer, prepared = run.restored(folder, whereabouts=whereabouts)
        if not _same_samples(history, prepared.dataset.train):
            raise UserError(f"the data has changed since {folder} was trained: restore it, or train again.")
        in_sample.append(trainer.probabilities(prepared.dataset.train))
        if folds is not None:
            out_of_sample.append(cross_validation.out_of_sample(folder, folds, whereabouts))
    dataset = prepared.dataset
    hashes = folders[-1] / run.HASHES
    ranking = from_histories(histories, out_of_sample, score, dataset.train, dataset.class_names, hashes)
    reason = estimate.why_not(dataset.train.labels, dataset.num_classes)
    if out_of_sample and reason is not None:
        _note(f"{reason}: the number of wrong labels is estimated from the histories.")

    arrays = {"labels": dataset.train.labels, "pred_probs_in_sample": np.mean(in_sample, axis=0)}
    if out_of_sample:
        arrays["pred_probs"] = np.mean(out_of_sample, axis=0)
    write(ranking, output, top, arrays, [str(folder) for folder in folders])
    return ranking


def rank_probabilities(
    path: Path,
    train: data.Split,
    class_names: tuple[str, ...],
    output: Path,
    score: str = "normalized_margin",
    top: int = 64,
) -> Ranking:
    """Rank samples by another model's probabilities, and write everything that comes out.

    Args:
      path: A .npy file of probabilities float (N, K), out of sample, in the order of the samples.
      train: The samples with their given labels.
      class_names: One name per class, in the order of the columns.
      output: Folder to write.
      score: A name of `PROBABILITY_SCORES`.
      top: Images on the contact sheet.

    Raises:
      UserError: The file holds no such probabilities, or cleanlab is missing.
    """
    _check(score, tuple(PROBABILITY_SCORES), top)
    try:
        # Without pickles: an array file must not be able to run code.
        probabilities = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path} as .npy ({why_unreadable(error)}): write it with numpy.save.") from error
    if not isinstance(probabilities, np.ndarray):
        raise UserError(f"{path} holds several arrays: give a .npy of probabilities, one row a sample.")
    ranking = from_probabilities(probabilities, score, train, class_names)
    write(ranking, output, top, {"labels": train.labels, "pred_probs": probabilities}, [str(path)])
    return ranking


def write(ranking: Ranking, output: Path, top: int, arrays: dict[str, np.ndarray], sources: Sequence[str]) -> None:
    """Write a ranking as a page, a table, a contact sheet and the arrays that it comes from."""
    output.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        with files.replacing(output / f"{name}.npy") as temporary:
            np.save(temporary, array)
    write_csv(ranking, output / "ranking.csv")
    found = estimate.as_json(ranking.estimate, ranking.confusions, ranking.class_names)
    files.write_json(output / "estimate.json", found)
    measured = quality(ranking)
    if measured is not None:
        files.write_json(output / "quality.json", {"runs": list(sources)} | measured)
    page.write(ranking, output)
    if isinstance(ranking.train.images, np.ndarray) and ranking.train.images.ndim != 4:
        return
    with left_out_if_not_installed("suspects.png"):
        contact_sheet(ranking, top, output / "suspects.png")


def _check(score: str, known: tuple[str, ...], top: int) -> None:
    if score not in known:
        raise unknown_name("score", score, known)
    if top < 1:
        raise UserError(f"--top must be at least 1, got {top}.")


def _note(message: str) -> None:
    print(f"note: {message}", file=sys.stderr)


def _same_samples(one: History | data.Split, other: History | data.Split) -> bool:
    return np.array_equal(one.index, other.index) and np.array_equal(one.labels, other.labels)


def contact_sheet(ranking: Ranking, top: int, path: Path) -> None:
    """Draw the most suspicious images, row by row, each with its rank, its given and its suggested label."""
    from ..measures import plots

    train, names = ranking.train, ranking.class_names
    chosen = ranking.order[:top]
    captions = [
        f"#{place} {plots.shortened(names[train.labels[i]], 16)}\n→ {plots.shortened(names[ranking.suggested[i]], 18)}"
        for place, i in enumerate(chosen, start=1)
    ]
    title = (
        f"most suspicious of {len(train):,} training samples by {ranking.score.replace('_', ' ')}: given → suggested"
    )
    plots.contact_sheets([_image(train, int(i)) for i in chosen], captions, title, path)


def _image(split: data.Split, position: int) -> np.ndarray:
    if isinstance(split.images, data.ImageFiles):
        from ..data import streaming

        return streaming.square(split.images, position, split.images.image_size)
    return split.images[position]


def _say_if_little_was_learned(ranking: Ranking) -> None:
    """Warn where the estimate would count what the network has not learned as wrong."""
    loss, chance = float(ranking.curves.losses[-1].mean()), math.log(len(ranking.class_names))
    if loss > chance / 2:
        _note(
            f"the training loss ended at {loss:.2f}, where guessing has {chance:.2f}: the network has learned little, "
            "or very many labels are wrong. If it is the former, the number is far too large: train longer (--epochs)."
        )


def show(ranking: Ranking, output: Path) -> None:
    """Print the most suspicious samples, the quality where the truth is known, and what was written."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    train, names = ranking.train, ranking.class_names
    console = Console()
    table = Table(title=f"most suspicious of {len(train):,} training samples, by {ranking.score}")
    for column, justify in (("rank", "right"), ("sample", "left"), ("given", "left"), ("suggested", "left")):
        table.add_column(column, justify=justify, overflow="fold")
    table.add_column(ranking.score, justify="right")
    if train.clean_labels is not None:
        table.add_column("true")
    for place, i in enumerate(ranking.order[:SHOWN], start=1):
        row = [str(place), ranking.ids[i], names[train.labels[i]], names[ranking.suggested[i]]]
        row.append(f"{ranking.values[ranking.score][i]:.3g}")
        if train.clean_labels is not None:
            row.append(names[train.clean_labels[i]])
        table.add_row(*map(escape, row))
    console.print(table)
    found = ranking.estimate
    print(f"estimated wrong: {found.wrong:,} of {len(train):,} ({found.low:,} to {found.high:,}), by {found.method}")
    if ranking.curves is not None:
        _say_if_little_was_learned(ranking)
    if (measured := quality(ranking)) is not None:
        share = measured["wrong"] / measured["samples"]
        table = Table(title=f"against the known truth: {measured['wrong']:,} labels wrong, {100 * share:.1f} %")
        table.add_column("score")
        table.add_column("area under ROC", justify="right")
        table.add_column(f"precision of the first {measured['wrong']:,}", justify="right")
        for name, values in measured["scores"].items():
            table.add_row(name, f"{values['auc']:.3f}", f"{100 * values['precision']:.1f} %")
        console.print(table)
    if ranking.curves is not None:
        print("A suggestion is what the networks predict most often over epochs; they may have memorized wrong labels.")
        print("pred_probs_in_sample.npy comes from networks that have trained on these labels (in-sample).")
    print(f"written: {output}")
    print(f"look through them on {output / 'index.html'}")
