"""Which training samples have a wrong label: a ranking from their history, and the files to act on.

ranking.csv                 one line a sample, the most suspicious first
suspects.png                the most suspicious images, each with its given and its suggested label
labels.npy                  given labels (N,)
pred_probs_in_sample.npy    probabilities (N, K) of networks that have trained on these very labels
pred_probs.npy              probabilities (N, K) out of sample, by cross-validation where asked
quality.json                how good the ranking is, where the true labels are known

The arrays are those that cleanlab reads, in the order of the training set.
"""

import csv
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import data, files
from ..errors import UserError, unknown_name
from ..measures import sample_history
from ..measures.sample_history import History
from . import cross_validation

# Each grows with the suspicion. The default is chosen by an argument, not by results: networks learn what most labels
# agree on before they memorize the rest, so a wrong label has a high loss for longer. The mean over all epochs is the
# area under that curve: it needs no epoch to be chosen, still tells samples apart after the last of them is memorized,
# and has hardly any ties. No score picks an epoch by the test set.
SCORES: dict[str, Callable[[History], np.ndarray]] = {
    "mean_loss": sample_history.mean_loss,
    "last_loss": sample_history.last_loss,
    "disagreement": sample_history.disagreement,
    "forgetting_events": sample_history.forgetting_events,
    "first_learned": sample_history.first_learned,
}
OUT_OF_SAMPLE = "out_of_sample_loss"
SHOWN = 10


@dataclasses.dataclass(frozen=True, eq=False)
class Ranking:
    """The training samples of one or several runs, in the order of the training set unless said otherwise.

    Attributes:
      order: int (N,), positions of the samples, the most suspicious first; samples that are alike keep their order.
      score: The name of the score that the order is by.
      suspicion: By score, float64 (N,) in (0, 1]: the share of the samples that are at most as suspicious, a tie
        counting half, averaged over the runs.
      values: By score, float64 (N,): the score itself, averaged over the runs.
      suggested: int (N,), the label predicted most often over epochs and runs.
      train: The training split.
      class_names: One name per class.
    """

    order: np.ndarray
    score: str
    suspicion: dict[str, np.ndarray]
    values: dict[str, np.ndarray]
    suggested: np.ndarray
    train: data.Split
    class_names: tuple[str, ...]


def rank(folders: Sequence[Path], output: Path, score: str, top: int, folds: int | None = None) -> Ranking:
    """Rank the training samples of runs and write everything that comes out; several runs average their ranks.

    Args:
      folders: Runs on the same samples with the same given labels.
      output: Folder to write.
      score: A name of `SCORES`, or `OUT_OF_SAMPLE` with `folds`.
      top: Images on the contact sheet.
      folds: Number of folds to cross-validate every run by; not at all if None.

    Raises:
      UserError: A run has no history or no checkpoint, or the runs do not belong together.
    """
    # Here and below imported where it is used, so that --help does not wait for JAX.
    from ..training import run

    if score == OUT_OF_SAMPLE and folds is None:
        raise UserError(f"--score {OUT_OF_SAMPLE} needs the folds: add --cross-validate 5.")
    if score not in (*SCORES, OUT_OF_SAMPLE):
        raise unknown_name("score", score, (*SCORES, OUT_OF_SAMPLE))
    if top < 1:
        raise UserError(f"--top must be at least 1, got {top}.")
    histories = [sample_history.read(folder) for folder in folders]
    for folder, history in zip(folders, histories, strict=True):
        if not _same_samples(history, histories[0]):
            raise UserError(
                f"{folder} and {folders[0]} have other samples or other given labels: rank runs together that differ "
                "in --seed alone, trained with one --noise-seed."
            )
    in_sample, out_of_sample = [], []
    for folder, history in zip(folders, histories, strict=True):
        trainer, prepared = run.restored(folder)
        if not _same_samples(history, prepared.dataset.train):
            raise UserError(f"the data has changed since {folder} was trained: restore it, or train again.")
        in_sample.append(trainer.probabilities(prepared.dataset.train))
        if folds is not None:
            out_of_sample.append(cross_validation.out_of_sample(folder, folds))
    dataset = prepared.dataset
    ranking = make_ranking(histories, out_of_sample, score, dataset.train, dataset.class_names)

    output.mkdir(parents=True, exist_ok=True)
    arrays = {"labels": dataset.train.labels, "pred_probs_in_sample": np.mean(in_sample, axis=0)}
    if out_of_sample:
        arrays["pred_probs"] = np.mean(out_of_sample, axis=0)
    for name, array in arrays.items():
        with files.replacing(output / f"{name}.npy") as temporary:
            np.save(temporary, array)
    write_csv(ranking, output / "ranking.csv")
    measured = quality(ranking)
    if measured is not None:
        files.write_json(output / "quality.json", {"runs": [str(folder) for folder in folders]} | measured)
    try:
        contact_sheet(ranking, top, output / "suspects.png")
    except ModuleNotFoundError as error:
        print(f"note: {error.name} is not installed, so suspects.png was left out.", file=sys.stderr)
    return ranking


def _same_samples(one: History | data.Split, other: History | data.Split) -> bool:
    return np.array_equal(one.index, other.index) and np.array_equal(one.labels, other.labels)


def make_ranking(
    histories: Sequence[History],
    out_of_sample: Sequence[np.ndarray],
    score: str,
    train: data.Split,
    class_names: tuple[str, ...],
) -> Ranking:
    """Rank samples by their histories in several runs, and by their probabilities out of sample where there are any."""
    from scipy.stats import rankdata

    by_run = {name: np.stack([measure(history) for history in histories]) for name, measure in SCORES.items()}
    if out_of_sample:
        given = np.stack([p[np.arange(len(train)), train.labels] for p in out_of_sample])
        # A probability that float32 has rounded to zero has a finite loss all the same.
        by_run[OUT_OF_SAMPLE] = -np.log(np.maximum(given, np.finfo(np.float32).tiny).astype(np.float64))
    suspicion = {name: (rankdata(values, axis=1) / len(train)).mean(axis=0) for name, values in by_run.items()}
    return Ranking(
        order=np.argsort(-suspicion[score], kind="stable"),
        score=score,
        suspicion=suspicion,
        values={name: values.mean(axis=0) for name, values in by_run.items()},
        suggested=sample_history.most_predicted(histories, len(class_names)),
        train=train,
        class_names=class_names,
    )


def quality(ranking: Ranking) -> dict[str, Any] | None:
    """Return how well every score finds the wrong labels; None where no truth is known, or none or all are wrong.

    `auc` is the area under the ROC curve: the probability that a wrong label is more suspicious than a right one, a tie
    counting half. `precision` is the share of wrong labels among the n most suspicious samples, where n is the true
    number of wrong labels; ties at the border count by their own share. `suggestion_is_true` is the share of the wrong
    labels for which the suggested label is the true one.
    """
    train = ranking.train
    if train.clean_labels is None:
        return None
    wrong = train.labels != train.clean_labels
    if wrong.all() or not wrong.any():
        return None
    from sklearn.metrics import roc_auc_score

    return {
        "samples": len(train),
        "wrong": int(wrong.sum()),
        "suggestion_is_true": float((ranking.suggested == train.clean_labels)[wrong].mean()),
        "score": ranking.score,
        "scores": {
            name: {"auc": float(roc_auc_score(wrong, values)), "precision": precision(wrong, values)}
            for name, values in ranking.suspicion.items()
        },
    }


def precision(wrong: np.ndarray, suspicion: np.ndarray) -> float:
    """Return the precision at the true number of wrong labels, samples of equal suspicion taken in random order."""
    count = int(wrong.sum())
    border = np.sort(suspicion)[-count]
    above, at = suspicion > border, suspicion == border
    return float((wrong[above].sum() + (count - above.sum()) * wrong[at].mean()) / count)


def write_csv(ranking: Ranking, path: Path) -> None:
    """Write one line a sample, the most suspicious first."""
    train, names = ranking.train, ranking.class_names
    header = ["rank", "index", *(["file"] if train.paths is not None else [])]
    header += ["given_label", "given_name", "suggested_label", "suggested_name", "suspicion", *ranking.values]
    if train.clean_labels is not None:
        header += ["true_label", "true_name", "is_wrong"]
    with files.replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for place, i in enumerate(ranking.order, start=1):
            given, suggested = int(train.labels[i]), int(ranking.suggested[i])
            line = [place, int(train.index[i]), *([train.paths[i]] if train.paths is not None else [])]
            line += [given, names[given], suggested, names[suggested]]
            line += [f"{values[i]:.6g}" for values in (ranking.suspicion[ranking.score], *ranking.values.values())]
            if train.clean_labels is not None:
                true = int(train.clean_labels[i])
                line += [true, names[true], int(given != true)]
            writer.writerow(line)


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
    plots.save(plots.contact_sheet_figure([_image(train, int(i)) for i in chosen], captions, title), path)


def _image(split: data.Split, position: int) -> np.ndarray:
    if isinstance(split.images, data.ImageFiles):
        from ..data import streaming

        return streaming.square(split.images, position, split.images.image_size)
    return split.images[position]


def show(ranking: Ranking, output: Path) -> None:
    """Print the most suspicious samples, the quality where the truth is known, and what was written."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    train, names = ranking.train, ranking.class_names
    console = Console()
    table = Table(title=f"most suspicious of {len(train):,} training samples, by {ranking.score}")
    for column, justify in (("rank", "right"), ("image", "left"), ("given", "left"), ("suggested", "left")):
        table.add_column(column, justify=justify, overflow="fold")
    table.add_column(ranking.score, justify="right")
    if train.clean_labels is not None:
        table.add_column("true")
    for place, i in enumerate(ranking.order[:SHOWN], start=1):
        image = str(train.index[i]) if train.paths is None else "/".join(Path(train.paths[i]).parts[-2:])
        row = [str(place), image, names[train.labels[i]], names[ranking.suggested[i]]]
        row.append(f"{ranking.values[ranking.score][i]:.3g}")
        if train.clean_labels is not None:
            row.append(names[train.clean_labels[i]])
        table.add_row(*map(escape, row))
    console.print(table)
    if (measured := quality(ranking)) is not None:
        share = measured["wrong"] / measured["samples"]
        table = Table(title=f"against the known truth: {measured['wrong']:,} labels wrong, {100 * share:.1f} %")
        table.add_column("score")
        table.add_column("area under ROC", justify="right")
        table.add_column(f"precision of the first {measured['wrong']:,}", justify="right")
        for name, values in measured["scores"].items():
            table.add_row(name, f"{values['auc']:.3f}", f"{100 * values['precision']:.1f} %")
        console.print(table)
    print("A suggestion is what the networks predict most often over the epochs; they may have memorized wrong labels.")
    print("pred_probs_in_sample.npy comes from networks that have trained on these labels (in-sample).")
    print(f"written: {output}")
