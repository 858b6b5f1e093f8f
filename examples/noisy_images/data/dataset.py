"""The records of a data set, and what every source of data shares: subsets, folds, statistics, augmentation."""

import dataclasses
import functools
import hashlib
import os
import pathlib
import warnings
from collections.abc import Sequence

import numpy as np

from ..errors import UserError
from .file_names import shorten
from .image_files import ImageFiles

TEST_SHARE = 0.2
# What lossy compression does to grey pixels.
_GREY_TOLERANCE = 8


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a data set is and how to read it; the same options for every data set.

    Attributes:
      data_dir: The folder (or file) that holds the data; None is the data set's own default.
      skip_corrupt: Leave out images that cannot be decoded instead of stopping.
      seed: Seed of the split into training and test images where the source has no test images. It is not the
        training seed: runs of several training seeds have to share one test set.
      image_size: Side in pixels of the images of a set that is streamed from files; None is 224.
      validation_dir: Mini-WebVision only: the ImageNet validation folder to test on instead of WebVision's own.
      largest_side: A folder only: side in pixels to which images in memory are scaled down where they are larger; None
        is 224, and images of one size are kept up to 256.
      test_share: Share of the samples that become the test set where one's own data has none; 0 leaves it empty.
    """

    data_dir: str | os.PathLike | None = None
    skip_corrupt: bool = False
    seed: int = 0
    image_size: int | None = None
    validation_dir: str | os.PathLike | None = None
    largest_side: int | None = None
    test_share: float = TEST_SHARE

    def path(self, name: str, what: str) -> pathlib.Path:
        """Return `data_dir` as a path that exists."""
        if self.data_dir is None:
            raise UserError(f"the data set {name!r} needs --data-dir: {what}.")
        path = pathlib.Path(self.data_dir).expanduser()
        if not path.exists():
            raise UserError(f"--data-dir {str(path)!r} does not exist: for {name!r} give {what}.")
        return path


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Samples with their labels.

    Attributes:
      images: uint8 (N, H, W, C) in memory, or the files of images that are streamed; float32 (N, D) for features.
      labels: int32 (N,), the given labels: what the source ships, until label noise replaces them.
      clean_labels: int32 (N,), the true labels; None when they are unknown.
      index: int64 (N,), each image's place in the source's own order.
      paths: The file of each image; None where images are not files of their own.
      ids: The name of each sample that outlives its position, printable and unique; None where it is the index.
      texts: What a page shows beside each sample; None where there is nothing.
    """

    images: np.ndarray | ImageFiles
    labels: np.ndarray
    clean_labels: np.ndarray | None
    index: np.ndarray
    paths: tuple[str, ...] | None = None
    ids: tuple[str, ...] | None = None
    texts: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def streamed(self) -> bool:
        """Whether the images stay in their files."""
        return isinstance(self.images, ImageFiles)

    @property
    def identities(self) -> list[str]:
        """The name of every sample that outlives its position: its id, or its index as text."""
        return [str(index) for index in self.index] if self.ids is None else list(self.ids)

    def take(self, positions: np.ndarray) -> "Split":
        """Return the samples at these positions, in this order."""

        def at(values):
            if values is None or isinstance(values, np.ndarray):
                return values if values is None else values[positions]
            return tuple(values[i] for i in positions)

        return Split(
            self.images[positions],
            self.labels[positions],
            at(self.clean_labels),
            self.index[positions],
            at(self.paths),
            at(self.ids),
            at(self.texts),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test split, and what the pipeline has to know of their images.

    Attributes:
      name: The name under which the data set was loaded.
      train: The training split.
      test: The test split.
      class_names: One name per class, in the order of the labels.
      superclasses: int32 (num_classes,), the superclass of each class; None where there are none.
      mean: Per channel, of pixels scaled to [0, 1]; per column of features.
      std: Per channel, of pixels scaled to [0, 1]; per column of features.
      crop_padding: Black pixels added on every side before the random crop; 0 is no crop.
      flip: Whether training images are flipped horizontally at random.
      layout: What the source was taken for where that had to be guessed, as a phrase.
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    superclasses: np.ndarray | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int
    flip: bool
    layout: str = ""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Height, width and channels of the images that a model gets, or the number of features alone."""
        images = self.train.images
        if isinstance(images, ImageFiles):
            return (images.image_size, images.image_size, 3)
        return images.shape[1:]

    @property
    def description(self) -> str:
        """What the data set was taken for, in one line."""
        shape, count = self.image_shape, len(self.train) + len(self.test)
        if len(shape) == 1:
            kind, size = "samples", f"{shape[0]:,} features"
        else:
            kind, size = "images", f"{shape[0]}x{shape[1]} pixels" + (", grey" if shape[2] == 1 else "")
        stored = sum(split.images.nbytes for split in (self.train, self.test) if not split.streamed)
        where = "streamed from files" if self.train.streamed else f"{stored / 2**20:,.1f} MiB in memory"
        parts = [
            f"{self.num_classes:,} classes ({shorten(self.class_names)})",
            f"{count:,} {kind}, {len(self.train):,} to train and {len(self.test):,} to test",
            size,
            where,
        ]
        return f"{self.name}: {'; '.join([*parts, self.layout] if self.layout else parts)}"


def make_split(
    images: np.ndarray | ImageFiles, labels: np.ndarray, *, clean: bool, index=None, paths=None, ids=None
) -> Split:
    """Return a split of the source's own labels, which are the true labels where `clean` says so."""
    labels = np.asarray(labels, np.int32)
    index = np.arange(len(labels)) if index is None else index
    if paths is None and isinstance(images, ImageFiles):
        paths = images.paths
    return Split(images, labels, labels.copy() if clean else None, np.asarray(index, np.int64), paths, ids)


def memory_bytes(dataset: Dataset) -> int:
    """Return how many bytes the data set takes on a device: the images and labels of both splits.

    Images that are streamed from files never live on the device as a whole and count nothing.
    """
    total = 0
    for split in (dataset.train, dataset.test):
        arrays = [split.labels, split.clean_labels, None if split.streamed else split.images]
        total += sum(array.nbytes for array in arrays if array is not None)
    return total


def stratified_positions(
    labels: np.ndarray, size: int, num_classes: int, seed: int, ids: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Choose `size` samples with the class proportions of all; return their positions and those of the rest.

    Each class gives its proportional share rounded down; the samples still missing come from the classes with the
    largest remainders, so the size is exact. Both results are sorted. With `ids` it depends on a sample's id and not
    on its position who is chosen, so that a sample that is added or taken away hardly changes the choice.
    """
    rng = np.random.default_rng(seed)
    counts = np.bincount(labels, minlength=num_classes)
    # Integers: a share such as 0.1 * 30 must not fall below 3 by rounding.
    shares, remainders = np.divmod(counts * size, max(len(labels), 1))
    missing = size - shares.sum()
    shares[np.argsort(-remainders, kind="stable")[:missing]] += 1
    chosen = np.zeros(len(labels), bool)
    order = None if ids is None else order_of_ids(ids, seed)
    for label, share in enumerate(shares):
        if order is None:
            members = rng.permutation(np.flatnonzero(labels == label))
        else:
            members = order[labels[order] == label]
        chosen[members[:share]] = True
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)


def order_of_ids(ids: Sequence[str], seed: int) -> np.ndarray:
    """Return the positions of samples in a random order that a sample added or taken away leaves as it was."""
    key = str(seed).encode()
    keys = [hashlib.blake2b(name.encode(), digest_size=8, key=key).digest() for name in ids]
    return np.asarray(sorted(range(len(keys)), key=keys.__getitem__), np.int64)


def stratified_subset(split: Split, size: int, num_classes: int, seed: int) -> Split:
    """Return exactly `size` samples with the class proportions of the split's given labels, in the split's order."""
    return stratified_split(split, size, num_classes, seed)[0]


def stratified_split(split: Split, size: int, num_classes: int, seed: int) -> tuple[Split, Split]:
    """Divide a split into a class-stratified part of exactly `size` samples and the rest."""
    if not 0 < size <= len(split):
        raise UserError(f"cannot take {size} of {len(split)} samples: choose a size from 1 to {len(split)}.")
    chosen, rest = stratified_positions(split.labels, size, num_classes, seed, split.ids)
    return split.take(chosen), split.take(rest)


def split_off_test(split: Split, num_classes: int, source: Source) -> tuple[Split, Split]:
    """Divide samples into training and test samples, these with the true labels where they are known."""
    if not 0 <= source.test_share < 1:
        raise UserError(f"the share of the test set must lie from 0 to below 1, got {source.test_share}.")
    size = round(source.test_share * len(split))
    if source.test_share == 0:
        return split, split.take(np.arange(0))
    if not 0 < size < len(split):
        raise UserError(f"{len(split)} samples are too few to split off a test set: give test samples of your own.")
    test, train = stratified_split(split, size, num_classes, source.seed)
    if test.clean_labels is not None:
        test = dataclasses.replace(test, labels=test.clean_labels.copy())
    return train, test


def check_classes(train: Split, test: Split, class_names: Sequence[str], where: str) -> None:
    """Refuse test samples of classes that training never sees; say which other classes have no training sample."""
    seen = np.zeros(len(class_names), bool)
    for labels in (train.labels, train.clean_labels):
        if labels is not None:
            seen[labels] = True
    if seen.sum() < 2:
        raise UserError(f"{where} has training samples of one class alone ({class_names[seen.argmax()]}): add others.")
    tested = np.bincount(test.labels, minlength=len(class_names))
    if unseen := [name for name, count, known in zip(class_names, tested, seen, strict=True) if count and not known]:
        raise UserError(
            f"{where} has test samples of {len(unseen)} classes without a training sample ({shorten(unseen)}): add "
            "training samples, or take the test samples away."
        )
    if empty := [name for name, known in zip(class_names, seen, strict=True) if not known]:
        warnings.warn(
            f"{where} has no training sample of {len(empty)} of {len(class_names)} classes ({shorten(empty)})",
            stacklevel=4,
        )


def leave_out_fold(split: Split, folds: int, fold: int, seed: int) -> tuple[Split, Split]:
    """Divide a split into all folds but one and that one, each in the split's order.

    The folds have the class proportions of the given labels, are a function of these labels and the seed alone, and
    together hold every sample once.
    """
    try:
        from sklearn.model_selection import StratifiedKFold
    except ImportError as error:
        raise UserError("folds need scikit-learn: run `pip install scikit-learn`.") from error
    counts = np.bincount(split.labels)
    if (largest := counts.max()) < folds:
        raise UserError(f"the largest class has {largest} samples, too few for {folds} folds: choose fewer.")
    few = int(((counts > 0) & (counts < folds)).sum())
    if few:
        _say_that_folds_lack_classes(few, folds)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        divisions = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(split.labels, split.labels))
    kept, left_out = divisions[fold]
    return split.take(kept), split.take(left_out)


@functools.cache
def _say_that_folds_lack_classes(few: int, folds: int) -> None:
    # Cached, so that it is said once and not for every fold.
    warnings.warn(
        f"{few} classes have fewer samples than there are folds ({folds}): some folds lack them", stacklevel=3
    )


def pixel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel of uint8 images, for pixels scaled to [0, 1]."""
    channels = images.shape[-1]
    # From the 256 counts of each channel: exact, and without a float copy of all images.
    counts = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(channels)])
    levels = np.arange(256) / 255
    mean = counts @ levels / counts.sum(axis=1)
    variance = counts @ levels**2 / counts.sum(axis=1) - mean**2
    # A channel that never varies would be divided by zero.
    std = np.sqrt(np.maximum(variance, 1e-6))
    return tuple(float(value) for value in mean), tuple(float(value) for value in std)


def feature_statistics(features: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of every column of float32 (N, D)."""
    mean, std = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    # A column that never varies would be divided by zero, or by the rounding of its mean.
    std = np.where(std > 1e-6 * np.maximum(np.abs(mean), 1e-30), std, 1)
    return tuple(mean.tolist()), tuple(std.tolist())


def looks_grey(images: np.ndarray) -> bool:
    """Return whether no pixel of uint8 images (N, H, W, C) has a colour that an eye would see."""
    if images.shape[-1] == 1:
        return True
    # By blocks, so that one colour photograph ends the search.
    for block in np.array_split(images, max(1, len(images) // 256)):
        if len(block) and int(np.max(block.max(-1) - block.min(-1))) > _GREY_TOLERANCE:
            return False
    return True


def default_augmentation(image_shape: Sequence[int], grey: bool = False) -> tuple[int, bool]:
    """Return `(crop_padding, flip)` for images of which nothing but the shape is known, and whether they look grey.

    The padding is an eighth of the shorter side, which gives the usual 4 of 32 pixels and 8 of 64, and no crop below
    28 pixels. Colour images are taken for photographs and flipped; grey ones, in however many channels, are often
    characters, where a mirror image is another class, and are not.
    """
    side = min(image_shape[:2])
    return (side // 8 if side >= 28 else 0), image_shape[-1] == 3 and not grey
