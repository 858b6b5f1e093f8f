"""From a configuration to the samples of a run: the data loaded, subsets cut, labels made noisy, splits held out."""

import dataclasses
from pathlib import Path

import numpy as np

from .. import config as configuration
from .. import data, models
from ..config import Config
from ..errors import UserError, unknown_name
from ..labels import decisions, human_labels, noise
from . import methods, own


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A data set with its noisy labels."""

    config: Config
    """The configuration, with what was left to the data decided."""
    dataset: data.Dataset
    """What is trained and tested on."""
    samples: data.Dataset
    """The same before anything is held out: what a run has to find again."""
    heldout: data.Split | None = None
    audit: noise.Audit | None = None
    left_out: data.Split | None = None
    """Fold that is not trained on, with its noisy labels."""


def prepare(config: Config) -> Prepared:
    """Load the data, cut subsets, draw the noise, hold out a noisy split; clean labels stay beside the noisy ones."""
    configuration.check(config)
    if config.optimizer.method not in methods.METHODS:
        raise unknown_name("method", config.optimizer.method, methods.METHODS)
    if config.network.model not in (*models.MODELS, "auto"):
        raise unknown_name("model", config.network.model, models.MODELS)
    dataset = data.load(
        config.data.dataset,
        data_dir=config.circumstances.data_dir,
        skip_corrupt=config.circumstances.skip_corrupt,
        seed=config.data.data_seed,
        image_size=config.data.image_size,
        largest_side=config.data.largest_side,
        test_share=config.data.test_share,
        validation_dir=config.circumstances.validation_dir,
        crop_padding=config.data.crop_padding,
        flip=config.data.flip,
    )
    if config.circumstances.decisions is not None:
        dataset = decided(dataset, Path(config.circumstances.decisions))
    train, test = dataset.train, dataset.test
    if config.data.test_subset is not None:
        test = data.stratified_subset(test, config.data.test_subset, dataset.num_classes, config.data.data_seed)
    if config.data.subset is not None:
        train = data.stratified_subset(train, config.data.subset, dataset.num_classes, config.data.data_seed)
    train = add_noise(config, dataset, train)
    audit = None
    if train.clean_labels is not None:
        nominal = config.labels.rate if config.labels.noise not in ("none", "real") else None
        audit = noise.audit(train.labels, train.clean_labels, dataset.class_names, nominal, config.labels.noise)

    samples = dataclasses.replace(dataset, train=train, test=test)
    config = own.settled(config, samples)

    heldout = None
    if config.data.holdout:
        size = round(config.data.holdout * len(train))
        order = np.random.default_rng([config.data.data_seed, size]).permutation(len(train))
        if not 0 < size < len(train):
            raise UserError(
                f"--holdout {config.data.holdout} leaves {len(train) - size} images to train on; choose another."
            )
        heldout, train = train.take(np.sort(order[:size])), train.take(np.sort(order[size:]))
    left_out = None
    if config.data.folds is not None:
        train, left_out = data.leave_out_fold(train, config.data.folds, config.data.fold, config.data.data_seed)
    return Prepared(config, dataclasses.replace(dataset, train=train, test=test), samples, heldout, audit, left_out)


def decided(dataset: data.Dataset, path: Path) -> data.Dataset:
    """Return a data set with a person's decisions about its labels applied; a test set of its own stays as it is."""
    ids, _, applied = decisions.apply_file(path, dataset)
    count, test = len(dataset.train), dataset.test
    if len(ids) > count:
        test = decisions.taken(test, decisions.part(applied, count, len(test)))
    return dataclasses.replace(
        dataset, train=decisions.taken(dataset.train, decisions.part(applied, 0, count)), test=test
    )


def add_noise(config: Config, dataset: data.Dataset, train: data.Split) -> data.Split:
    """Return the split with noisy given labels."""
    if config.labels.noise == "none":
        return train
    if train.clean_labels is None:
        raise UserError(
            f"{config.labels.noise} noise needs true labels to change, and those of {config.data.dataset!r} are "
            "unknown: use --noise none to train on the labels as they are."
        )
    given_by_humans = None
    if config.labels.noise == "real":
        if config.circumstances.human_labels is None:
            raise UserError("real noise needs --human-labels, the published file of CIFAR-10N or CIFAR-100N labels.")
        label_set = config.labels.label_set or human_labels.DEFAULT_LABEL_SETS.get(config.data.dataset)
        given_by_humans = human_labels.human_labels(config.circumstances.human_labels, label_set, train)
    labels = noise.corrupt(
        train.clean_labels,
        kind=config.labels.noise,
        rate=config.labels.rate,
        num_classes=dataset.num_classes,
        seed=config.noise_seed_used,
        images=None if train.streamed else train.images,
        mean=dataset.mean,
        std=dataset.std,
        class_names=dataset.class_names,
        superclasses=dataset.superclasses,
        human_labels=given_by_humans,
        options=config.labels.noise_options,
    )
    return dataclasses.replace(train, labels=labels)
