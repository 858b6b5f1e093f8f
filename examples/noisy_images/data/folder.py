"""The user's own images: a tree with one folder per class."""

import collections
import math
import os
import pathlib
import statistics
import warnings

import numpy as np

from ..errors import UserError
from . import decoding, image_tree, streaming
from .dataset import (
    Dataset,
    Source,
    Split,
    check_classes,
    default_augmentation,
    looks_grey,
    make_split,
    pixel_statistics,
    split_off_test,
)
from .file_names import printable, shorten
from .image_files import ImageFiles, decode_images, readable_images

# Images that take fewer bytes than this at the size that the network sees are kept in memory.
MAX_BYTES_IN_MEMORY = 4 * 1024**3
# The side at which photographs are usually classified: larger ones are scaled to it.
SIDE = 224
# Images of one size are kept at it up to this side.
_LARGEST_SIDE = 256
# Streamed sets take their pixel statistics from this many images spread over the training set.
_STATISTICS_IMAGES = 1000


def load(source: Source) -> Dataset:
    """Load a tree of images with one folder per class.

    Layout: `ROOT/train/CLASS/*` and `ROOT/test/CLASS/*` (or `val` for `test`). Without a test folder, or with the
    class folders in ROOT itself, a stratified fifth of the images is the test set, the same one for every training
    seed. Classes are numbered in the alphabetical order of their folders; grey images become three equal channels.

    Images that fit are decoded into memory: at their size where most have one that is no larger than 256 pixels, the
    others fitted to it; else as squares of their median shorter side, 224 pixels at most. Images that do not fit, and
    all where an image size is given, stay in their files and are streamed as squares of that size; a largest side
    scales down those in memory.
    """
    root = source.path("folder", "a folder with one folder of images per class")
    if not root.is_dir():
        raise UserError(f"--data-dir {str(root)!r} is a file: give a folder with one folder of images per class.")
    tree = image_tree.read(root)
    # Training and test images together, so that an error counts the corrupt ones of both.
    listed = tree.train + (tree.test or [])
    files = ImageFiles(tuple(path for path, _ in listed), source.image_size or source.largest_side or SIDE)
    files, size, sizes = _measured(files, source)
    fits = len(files) * 3 * math.prod(size) <= MAX_BYTES_IN_MEMORY
    in_memory = fits and source.image_size is None
    if in_memory:
        images, kept = decode_images(files, skip_corrupt=source.skip_corrupt, fit=size)
    else:
        kept = readable_images(files, skip_corrupt=source.skip_corrupt, checked=root / ".readable_images.txt")
        images = files[kept]
    train, test = _divided(tree, listed, images, kept)
    _check_all_left(tree, train)
    layout = [tree.layout] if tree.layout else []
    if test is None:
        train, test = split_off_test(train, len(tree.class_names), source)
        layout.append("a part split off for testing" if len(test) else "none split off for testing")
    elif not len(test):
        raise UserError(f"{root} has no test images that can be read: add some, or remove the test folder.")
    if sizes > 1:
        layout.append(f"images of {sizes:,} sizes" + (", scaled and cropped" if in_memory else ""))
    check_classes(train, test, tree.class_names, str(root))
    mean, std, crop_padding, flip = _statistics(train, files.image_size)
    return Dataset(
        "folder", train, test, tree.class_names, None, mean, std, crop_padding, flip, layout=", ".join(layout)
    )


def _measured(files: ImageFiles, source: Source) -> tuple[ImageFiles, tuple[int, int], int]:
    """Return the files with their levels and side, height and width in memory, and how many sizes there are."""
    headers = [header for header in files.headers() if header is not None]
    levels = files.levels
    if extents := [header.extent for header in headers if header.extent is not None]:
        levels = decoding.common_levels(extents)
        used = " and ".join(
            f"{low:g} to {high:g} of {what}"
            for kind, (low, high), what in zip(levels._fields, levels, ("integers", "floats"), strict=True)
            if kind in {extent[0] for extent in extents}
        )
        warnings.warn(f"{len(extents):,} images have more than 8 bits: {used} become black to white", stacklevel=4)
    if animated := sum(header.animated for header in headers):
        warnings.warn(f"{animated:,} images have several frames or pages, of which the first is used", stacklevel=4)
    sizes = collections.Counter((header.height, header.width) for header in headers)
    size, count = sizes.most_common(1)[0] if sizes else ((SIDE, SIDE), 0)
    if source.image_size is not None:
        size = (source.image_size, source.image_size)
    elif sizes and (2 * count < len(headers) or min(size) > (source.largest_side or _LARGEST_SIDE)):
        side = min(
            source.largest_side or SIDE, int(statistics.median(min(header.height, header.width) for header in headers))
        )
        size = (side, side)
    side = source.image_size or min(source.largest_side or SIDE, *size)
    return ImageFiles(files.paths, side, levels=levels), size, len(sizes)


def _divided(
    tree: image_tree.ImageTree, listed: list[tuple[str, int]], images: np.ndarray | ImageFiles, kept: np.ndarray
) -> tuple[Split, Split | None]:
    """Return the training images that could be read, and the test images where the tree has a folder of them."""
    count = len(tree.train)
    labels = np.asarray([label for _, label in listed], np.int32)[kept]
    paths = tuple(listed[i][0] for i in kept)
    ids = tuple(printable(pathlib.PurePath(os.path.relpath(path, tree.root)).as_posix()) for path in paths)
    index = np.where(kept < count, kept, kept - count)
    whole = make_split(images, labels, clean=False, index=index, paths=paths, ids=ids)
    if tree.test is None:
        return whole, None
    return whole.take(np.flatnonzero(kept < count)), whole.take(np.flatnonzero(kept >= count))


def _check_all_left(tree: image_tree.ImageTree, train: Split) -> None:
    counts = np.bincount(train.labels, minlength=len(tree.class_names))
    if emptied := [name for name, count in zip(tree.class_names, counts, strict=True) if not count]:
        raise UserError(
            f"no training image of {len(emptied)} classes can be read ({shorten(emptied)}): replace the images, or "
            "remove the class folders."
        )


def _statistics(train: Split, side: int) -> tuple[tuple[float, ...], tuple[float, ...], int, bool]:
    """Return mean, standard deviation, crop padding and whether to flip."""
    if not isinstance(train.images, ImageFiles):
        grey = looks_grey(train.images)
        return *pixel_statistics(train.images), *default_augmentation(train.images.shape[1:], grey)
    step = -(-len(train) // _STATISTICS_IMAGES)
    squares = np.stack([streaming.square(train.images, i, side) for i in range(0, len(train), step)])
    # The crop is the streaming workers' part.
    return *pixel_statistics(squares), 0, not looks_grey(squares)
