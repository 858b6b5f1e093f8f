"""The search for wrong labels in one's own data: from a source to a trained run, a ranking and a page to decide on."""

from pathlib import Path
from typing import Any

from .. import data
from ..config import OWN, Config, Whereabouts, replace
from ..data import npz
from ..errors import UserError
from ..labels import decisions
from . import export, ranking
from .suspicion import Ranking


def of_source(source: Path, config: Config = OWN) -> Config:
    """Return the configuration that trains on every sample of a folder of images or of an .npz file.

    Raises:
      UserError: There is neither at that place.
    """
    if not source.exists():
        raise UserError(f"{source} does not exist: give a folder with one folder of images per class, or an .npz file.")
    if not source.is_dir() and source.suffix != ".npz":
        raise UserError(f"{source} is neither a folder of images nor an .npz file: save the samples as one of them.")
    dataset = "folder" if source.is_dir() else "npz"
    return replace(config, dataset=dataset, data_dir=str(source), test_share=0.0)


def search(
    config: Config,
    folder: Path,
    *,
    score: str,
    top: int,
    folds: int | None = None,
    device_count: int | None = None,
) -> Ranking:
    """Train on the samples of a configuration, or go on with that, then rank them into `suspects` beside the run."""
    from ..training import run

    run.run_one(config, folder, device_count, estimate=True)
    return ranking.rank([folder], folder / "suspects", score, top, folds, Whereabouts.found_in(config))


def by_probabilities(source: Path, config: Config, probabilities: Path, output: Path, score: str, top: int) -> Ranking:
    """Rank the samples of a source by another model's probabilities."""
    samples = load(source, config)
    return ranking.rank_probabilities(probabilities, samples.train, samples.class_names, output, score, top)


def load(source: Path, config: Config = OWN) -> data.Dataset:
    """Load every sample of a source."""
    config = of_source(source, config)
    return data.load(
        config.data.dataset,
        data_dir=source,
        skip_corrupt=config.circumstances.skip_corrupt,
        largest_side=config.data.largest_side,
        test_share=0.0,
    )


def write_decided(source: Path, decided: Path, output: Path, link: bool = False) -> dict[str, Any]:
    """Write a copy of a source with decisions applied; returns what was changed.

    Raises:
      UserError: A decision does not fit the source, or the output cannot be written without touching what is there.
    """
    samples = load(source)
    ids, labels, applied = decisions.apply_file(decided, samples)
    if source.is_dir():
        return export.write_folder(source, ids, labels, applied, samples.class_names, output, link=link)
    arrays = npz.read_arrays(source)
    # What the file holds for testing is copied as it is.
    train = samples.train
    applied, ids = decisions.part(applied, 0, len(train)), ids[: len(train)]
    return export.write_npz(source, arrays, train.index, ids, train.labels, applied, samples.class_names, output)
