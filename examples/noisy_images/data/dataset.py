"""The records of a data set, and what every source of data shares: subsets, image files, caches."""

import collections
import concurrent.futures
import dataclasses
import io
import os
import pathlib
import threading
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import UserError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


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
    """

    data_dir: str | os.PathLike | None = None
    skip_corrupt: bool = False
    seed: int = 0
    image_size: int | None = None
    validation_dir: str | os.PathLike | None = None

    def path(self, name: str, what: str) -> pathlib.Path:
        """Return `data_dir` as a path that exists."""
        if self.data_dir is None:
            raise UserError(f"the data set {name!r} needs --data-dir: {what}.")
        path = pathlib.Path(self.data_dir).expanduser()
        if not path.exists():
            raise UserError(f"--data-dir {str(path)!r} does not exist: for {name!r} give {what}.")
        return path


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """Images that stay in their files and are decoded one at a time, for sets too large for memory.

    Attributes:
      paths: Paths of the images, or names of the members of `archive`.
      image_size: Side in pixels of the square that `streaming.batches` crops from every image.
      archive: A zip file that holds the images; None when they are plain files.
    """

    paths: tuple[str, ...]
    image_size: int = 224
    archive: str | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item):
        """Return the decoded image at an integer, or the image files at a slice or an array of integers."""
        if isinstance(item, (int, np.integer)):
            return np.asarray(self.open(int(item)))
        positions = np.arange(len(self))[item]
        return dataclasses.replace(self, paths=tuple(self.paths[i] for i in positions))

    def read(self, position: int) -> bytes:
        """Return the bytes of one file."""
        if self.archive is None:
            return pathlib.Path(self.paths[position]).read_bytes()
        with _ZIP_LOCK:
            return _open_zip(self.archive).read(self.paths[position])

    def open(self, position: int, at_least: int | None = None):
        """Return one image as an RGB `PIL.Image`.

        With `at_least`, a JPEG may come decoded at half, a quarter or an eighth of its size, as long as no side
        falls below `at_least`: that is several times faster for large photographs.

        Raises:
          UserError: The image cannot be decoded.
        """
        try:
            image = _pil_image(self.read(position))
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            return image.convert("RGB")
        # Pillow's plug-ins raise whatever their parsing code meets.
        except Exception as error:
            raise UserError(
                f"cannot read the image {self.paths[position]!r} ({error}): replace or remove it, "
                "or start again with --skip-corrupt."
            ) from error

    def sizes(self) -> np.ndarray:
        """Return (height, width) of every image, an int32 array (N, 2), from the files' headers.

        An image that cannot be read has (0, 0).
        """

        def size(position: int) -> tuple[int, int]:
            try:
                return _pil_image(self.read(position)).size[::-1]
            # Pillow's plug-ins raise whatever their parsing code meets.
            except Exception:
                return (0, 0)

        return np.asarray(_map_images(self, size), np.int32).reshape(-1, 2)


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Images with their labels.

    Attributes:
      images: uint8 (N, H, W, C) in memory, or the files of images that are streamed.
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
      mean: Per channel, of pixels scaled to [0, 1].
      std: Per channel, of pixels scaled to [0, 1].
      crop_padding: Black pixels added on every side before the random crop; 0 is no crop.
      flip: Whether training images are flipped horizontally at random.
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

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images that a model gets."""
        images = self.train.images
        if isinstance(images, ImageFiles):
            return (images.image_size, images.image_size, 3)
        return images.shape[1:]


def make_split(images: np.ndarray | ImageFiles, labels: np.ndarray, *, clean: bool, index=None) -> Split:
    """Return a split of the source's own labels, which are the true labels where `clean` says so."""
    labels = np.asarray(labels, np.int32)
    index = np.arange(len(labels)) if index is None else index
    paths = images.paths if isinstance(images, ImageFiles) else None
    return Split(images, labels, labels.copy() if clean else None, np.asarray(index, np.int64), paths)


def memory_bytes(dataset: Dataset) -> int:
    """Return how many bytes the data set takes on a device: the images and labels of both splits.

    Images that are streamed from files never live on the device as a whole and count nothing.
    """
    total = 0
    for split in (dataset.train, dataset.test):
        arrays = [split.labels, split.clean_labels, None if split.streamed else split.images]
        total += sum(array.nbytes for array in arrays if array is not None)
    return total


def stratified_positions(labels: np.ndarray, size: int, num_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose `size` samples with the class proportions of all; return their positions and those of the rest.

    Each class gives its proportional share rounded down; the samples still missing come from the classes with the
    largest remainders, so the size is exact. Both results are sorted.
    """
    rng = np.random.default_rng(seed)
    counts = np.bincount(labels, minlength=num_classes)
    # Integers: a share such as 0.1 * 30 must not fall below 3 by rounding.
    shares, remainders = np.divmod(counts * size, max(len(labels), 1))
    missing = size - shares.sum()
    shares[np.argsort(-remainders, kind="stable")[:missing]] += 1
    chosen = np.zeros(len(labels), bool)
    for label, share in enumerate(shares):
        members = np.flatnonzero(labels == label)
        chosen[rng.permutation(members)[:share]] = True
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)


def stratified_subset(split: Split, size: int, num_classes: int, seed: int) -> Split:
    """Return exactly `size` samples with the class proportions of the split's given labels, in the split's order."""
    return stratified_split(split, size, num_classes, seed)[0]


def stratified_split(split: Split, size: int, num_classes: int, seed: int) -> tuple[Split, Split]:
    """Divide a split into a class-stratified part of exactly `size` samples and the rest."""
    if not 0 < size <= len(split):
        raise UserError(f"cannot take {size} of {len(split)} samples: choose a size from 1 to {len(split)}.")
    chosen, rest = stratified_positions(split.labels, size, num_classes, seed)
    return split.take(chosen), split.take(rest)


def leave_out_fold(split: Split, folds: int, fold: int, seed: int) -> tuple[Split, Split]:
    """Divide a split into all folds but one and that one, each in the split's order.

    The folds have the class proportions of the given labels, are a function of these labels and the seed alone, and
    together hold every sample once.
    """
    try:
        from sklearn.model_selection import StratifiedKFold
    except ImportError as error:
        raise UserError("folds need scikit-learn: run `pip install scikit-learn`.") from error
    if (largest := np.bincount(split.labels).max()) < folds:
        raise UserError(f"the largest class has {largest} samples, too few for {folds} folds: choose fewer.")
    divisions = StratifiedKFold(folds, shuffle=True, random_state=seed).split(split.labels, split.labels)
    kept, left_out = list(divisions)[fold]
    return split.take(kept), split.take(left_out)


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


def default_augmentation(image_shape: Sequence[int]) -> tuple[int, bool]:
    """Return `(crop_padding, flip)` for images of which nothing but the shape is known.

    The padding is an eighth of the shorter side, which gives the usual 4 of 32 pixels and 8 of 64, and no crop below
    28 pixels. Colour images are taken for photographs and flipped; grey ones are often characters, where a mirror
    image is another class, and are not.
    """
    side = min(image_shape[:2])
    return (side // 8 if side >= 28 else 0), image_shape[-1] == 3


def decode_images(files: ImageFiles, *, skip_corrupt: bool, side: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Decode every image into one array uint8 (N, H, W, 3); return it and the positions that it holds.

    Args:
      files: The images, all of one size.
      skip_corrupt: Leave out images that cannot be read instead of raising.
      side: The height and width that the images must have; None is the size of the first that can be read.

    Raises:
      UserError: Images that cannot be read (named and counted), or that differ in size.
    """
    shape = _first_shape(files) if side is None else (side, side, 3)
    images = np.empty((len(files), *shape), np.uint8)

    def decode(position: int) -> tuple[int, ...]:
        image = np.asarray(files.open(position))
        if image.shape == shape:
            images[position] = image
        return image.shape

    results = _map_images(files, decode)
    good = _good_positions(files, results, skip_corrupt)
    for position in good:
        if results[position] != shape:
            height, width = results[position][:2]
            raise UserError(
                f"the image {files.paths[position]!r} has {height}x{width} pixels where {shape[0]}x{shape[1]} are "
                "expected: resize it."
            )
    return (images if len(good) == len(files) else images[good]), good


def readable_images(files: ImageFiles, *, skip_corrupt: bool, checked: pathlib.Path) -> np.ndarray:
    """Return the positions of the images that can be decoded, after decoding all of them once.

    What could be read is kept in the file `checked`, so that the next start reads only files that are new or have
    changed.

    Raises:
      UserError: Images that cannot be read (named and counted), unless they are to be skipped.
    """
    stamps = [_stamp(path) for path in files.paths]
    known = set(checked.read_text().splitlines()) if checked.is_file() else set()
    unknown = np.array([i for i, stamp in enumerate(stamps) if stamp not in known], np.int64)
    # An eighth of the size is enough to meet every fault of a JPEG's data, and several times faster.
    new = files[unknown]
    results: list[Any] = [None] * len(files)
    for position, result in zip(unknown, _map_images(new, lambda i: new.open(i, at_least=1).size), strict=True):
        results[position] = result
    good = _good_positions(files, results, skip_corrupt)
    if len(unknown):
        write_cache(checked, lambda file: file.write("\n".join(stamps[i] for i in good).encode()))
    return good


def write_cache(path: pathlib.Path, write) -> bool:
    """Let `write(file)` make a file that speeds up the next start; False where the folder cannot be written to.

    The file appears whole or not at all.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:
        warnings.warn(
            f"cannot keep the cache {str(path)!r} ({error}): the next start will be slow again.", stacklevel=2
        )
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def write_cached_arrays(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> bool:
    """Write an uncompressed .npz that speeds up the next start; False where the folder cannot be written to."""
    return write_cache(path, lambda file: np.savez(file, **arrays))


def read_cached_arrays(path: pathlib.Path, fingerprint: str | None) -> dict[str, np.ndarray] | None:
    """Return the arrays of a cache; None when there is none, or one of other data than the fingerprint says."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            if fingerprint is not None and str(archive["fingerprint"]) != fingerprint:
                return None
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def shorten(names: Sequence[str], most: int = 3) -> str:
    """Return the first few names and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(str(name) for name in names[:most]) + more


_ZIP_LOCK = threading.Lock()
_ZIPS: collections.OrderedDict[tuple[str, int], zipfile.ZipFile] = collections.OrderedDict()


def _open_zip(path: str) -> zipfile.ZipFile:
    # One handle per process: a forked or spawned worker must not share a file position with its parent.
    key = (path, os.getpid())
    if key not in _ZIPS:
        _ZIPS[key] = zipfile.ZipFile(path)
        while len(_ZIPS) > 4:
            _ZIPS.popitem(last=False)[1].close()
    return _ZIPS[key]


def _pil_image(data: bytes):
    from PIL import Image

    return Image.open(io.BytesIO(data))


def _map_images(files: ImageFiles, function) -> list:
    """Return `function(i)` for every image, or the UserError that it raised; decoding releases the interpreter lock."""

    def attempt(position):
        try:
            return function(position)
        except UserError as error:
            return error

    # Registers Pillow's plug-ins once, before threads race to do so.
    from PIL import Image

    Image.init()
    workers = max(1, min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        chunk = 64
        chunks = pool.map(
            lambda start: [attempt(i) for i in range(start, min(start + chunk, len(files)))],
            range(0, len(files), chunk),
        )
        return [result for part in chunks for result in part]


def _good_positions(files: ImageFiles, results: list, skip_corrupt: bool) -> np.ndarray:
    corrupt = [path for path, result in zip(files.paths, results, strict=True) if isinstance(result, UserError)]
    if corrupt and not skip_corrupt:
        raise UserError(
            f"{len(corrupt)} of {len(files)} images cannot be read ({shorten(corrupt)}): replace or remove them, "
            "or leave them out with --skip-corrupt."
        )
    if len(corrupt) == len(files):
        raise UserError(f"none of the {len(files)} images can be read ({shorten(corrupt)}): check the data.")
    if corrupt:
        warnings.warn(
            f"left out {len(corrupt)} of {len(files)} images that cannot be read: {', '.join(corrupt)}", stacklevel=4
        )
    return np.asarray([i for i, result in enumerate(results) if not isinstance(result, UserError)], np.int64)


def _first_shape(files: ImageFiles) -> tuple[int, int, int]:
    for position in range(len(files)):
        try:
            return files[position].shape
        except UserError:
            continue
    return (1, 1, 3)


def _stamp(path: str) -> str:
    try:
        stat = os.stat(path)
    except OSError:
        return path
    return f"{path}\t{stat.st_size}\t{stat.st_mtime_ns}"
