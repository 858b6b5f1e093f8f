"""Data sets by name: each is one entry of `LOADERS`, a function from a `Source` to a `Dataset`."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Sequence

from ..errors import UserError, unknown_name
from . import cifar, digits, folder, npz, tiny_imagenet, webvision
from .dataset import (
    TEST_SHARE,
    Dataset,
    Source,
    Split,
    leave_out_fold,
    memory_bytes,
    order_of_ids,
    stratified_split,
    stratified_subset,
)
from .file_names import original, printable
from .identity import check_same_samples, fingerprint, fingerprints, identities
from .image_files import ImageFiles

__all__ = [
    "LOADERS",
    "Dataset",
    "ImageFiles",
    "Source",
    "Split",
    "check_same_samples",
    "fingerprint",
    "fingerprints",
    "identities",
    "leave_out_fold",
    "load",
    "memory_bytes",
    "names",
    "order_of_ids",
    "original",
    "prepare",
    "printable",
    "stratified_split",
    "stratified_subset",
]

LOADERS: dict[str, Callable[[Source], Dataset]] = {
    "digits": digits.load,
    "cifar10": functools.partial(cifar.load, "cifar10"),
    "cifar100": functools.partial(cifar.load, "cifar100"),
    "tiny_imagenet": tiny_imagenet.load,
    "mini_webvision": webvision.load,
    "folder": folder.load,
    "npz": npz.load,
}


def names() -> tuple[str, ...]:
    """Return the names of all data sets."""
    return tuple(LOADERS)


def load(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    skip_corrupt: bool = False,
    seed: int = 0,
    image_size: int | None = None,
    validation_dir: str | os.PathLike | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_padding: int | None = None,
    flip: bool | None = None,
    largest_side: int | None = None,
    test_share: float = TEST_SHARE,
) -> Dataset:
    """Load a data set with the labels that its source ships; its `description` says in one line what it is.

    Args:
      name: A name of `LOADERS`.
      data_dir: The folder (or file) that holds the data; None is the data set's own default.
      skip_corrupt: Leave out images that cannot be decoded, with a warning that names them, instead of stopping.
      seed: Seed of the split into training and test images where the source has no test images; not the training
        seed, so that runs of several training seeds share one test set.
      image_size: Side in pixels of the images of a set that is streamed from files; None is 224.
      validation_dir: Mini-WebVision only: the ImageNet validation folder to test on instead of WebVision's own.
      mean: Per channel, of pixels scaled to [0, 1], instead of the data set's own.
      std: Per channel, of pixels scaled to [0, 1], instead of the data set's own.
      crop_padding: Padding of the random crop instead of the data set's own; 0 is no crop.
      flip: Whether to flip training images at random, instead of the data set's own habit.
      largest_side: A folder only: side in pixels to which images in memory are scaled down where they are larger; None
        is 224.
      test_share: Share of one's own samples that become the test set where they have none; 0 leaves it empty, so that
        every sample is trained on.

    Raises:
      UserError: The name is unknown, or the data is missing, incomplete or wrong; the sentence says what to do.
    """
    if name not in LOADERS:
        raise unknown_name("data set", name, LOADERS)
    dataset = LOADERS[name](Source(data_dir, skip_corrupt, seed, image_size, validation_dir, largest_side, test_share))
    if len(dataset.image_shape) == 1 and (crop_padding or flip):
        raise UserError(f"{data_dir} holds features, which cannot be cropped or flipped: leave these options out.")
    channels = dataset.image_shape[-1]
    for option, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != channels:
            raise UserError(f"{option} has {len(values)} values but the images have {channels} channels.")
    if std is not None and min(std) <= 0:
        raise UserError(f"std must be positive, got {tuple(std)}.")
    if crop_padding is not None and crop_padding < 0:
        raise UserError(f"crop_padding must not be negative, got {crop_padding}.")
    given = {
        "mean": None if mean is None else tuple(float(value) for value in mean),
        "std": None if std is None else tuple(float(value) for value in std),
        "crop_padding": crop_padding,
        "flip": flip,
    }
    return dataclasses.replace(dataset, **{key: value for key, value in given.items() if value is not None})


def prepare(
    name: str, data_dir: str | os.PathLike | None = None, archive: str | os.PathLike | None = None
) -> pathlib.Path:
    """Prepare a data set that has to be prepared before it can be loaded, and return its folder.

    Args:
      name: `cifar10` or `cifar100`; every other set is read as it is.
      data_dir: Where to put it; None is `~/tensorflow_datasets`.
      archive: The official binary archive as a local file; None downloads it.
    """
    if name not in LOADERS:
        raise unknown_name("data set", name, LOADERS)
    if name not in cifar.RELEASES:
        raise UserError(f"the data set {name!r} needs no preparation: it is read as it is.")
    return cifar.prepare(name, data_dir, archive)
