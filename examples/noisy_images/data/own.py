"""The user's own images: a tree with one folder per class, or an .npz of arrays."""

import dataclasses
import math
import os
import pathlib
import zipfile

import numpy as np

from ..errors import UserError
from . import streaming
from .dataset import (
    IMAGE_SUFFIXES,
    Dataset,
    ImageFiles,
    Source,
    Split,
    decode_images,
    default_augmentation,
    make_split,
    pixel_statistics,
    readable_images,
    shorten,
    stratified_positions,
)
from .identity import printable

TEST_SHARE = 0.2
# Images that all have one size, and fewer bytes than this when decoded, are kept in memory.
MAX_BYTES_IN_MEMORY = 4 * 1024**3
# Streamed sets take their pixel statistics from this many images spread over the training set.
_STATISTICS_IMAGES = 1000


def load_npz(source: Source) -> Dataset:
    """Load `images` and `labels`, and what else is there, from an .npz file.

    Arrays of the file:
      images: uint8 (N, H, W), (N, H, W, 1) or (N, H, W, 3).
      labels: Integers (N,) from 0.
      clean_labels: Optional: the true labels (N,), where `labels` has mistakes.
      test_images, test_labels: Optional; without them a stratified fifth of the images is the test set, the same one
        for every training seed, and it is tested against the clean labels where there are any.
      class_names: Optional strings; without them the classes are named by their numbers.
    """
    path = source.path("npz", "the path of an .npz file with the arrays images and labels")
    arrays = _read_npz(path)
    images = _checked_images(path, "images", arrays)
    labels = _checked_labels(path, "labels", arrays, len(images))
    clean = _checked_labels(path, "clean_labels", arrays, len(images)) if "clean_labels" in arrays else None
    if ("test_images" in arrays) != ("test_labels" in arrays):
        raise UserError(f"{path} has only one of test_images and test_labels: give both or none.")

    train = Split(images, labels, clean, np.arange(len(labels), dtype=np.int64))
    if "test_images" in arrays:
        test_images = _checked_images(path, "test_images", arrays)
        if test_images.shape[1:] != images.shape[1:]:
            raise UserError(
                f"{path}: test_images have the shape {test_images.shape[1:]} but images have {images.shape[1:]}: "
                "make them alike."
            )
        test_labels = _checked_labels(path, "test_labels", arrays, len(test_images))
        test = make_split(test_images, test_labels, clean=False)
    else:
        test = None
    class_names = _class_names(path, arrays, [train, test])
    if test is None:
        train, test = _split_off_test(train, len(class_names), source.seed)
    mean, std = pixel_statistics(train.images)
    crop_padding, flip = default_augmentation(images.shape[1:])
    return Dataset("npz", train, test, class_names, None, mean, std, crop_padding, flip)


def load_folder(source: Source) -> Dataset:
    """Load a tree of images with one folder per class.

    Layout: `ROOT/train/CLASS/*` and `ROOT/test/CLASS/*` (or `val` for `test`). Without a test folder, or with the
    class folders in ROOT itself, a stratified fifth of the images is the test set, the same one for every training
    seed. Classes are numbered in the alphabetical order of their folders; grey images become three equal channels.

    Images of one size that fit into memory are decoded into it; others, and all where an image size is given, stay in
    their files and are streamed as squares of that size, 224 pixels by default.
    """
    root = source.path("folder", "a folder with one folder of images per class")
    if not root.is_dir():
        raise UserError(f"--data-dir {str(root)!r} is a file: give a folder with one folder of images per class.")
    train_root = root / "train" if (root / "train").is_dir() else root
    test_root = next((root / name for name in ("test", "val") if train_root != root and (root / name).is_dir()), None)
    class_names = _class_folders(train_root)
    files, labels = _list_images(train_root, class_names)
    count = len(files)
    if test_root is not None:
        if unknown := sorted(set(_class_folders(test_root)) - set(class_names)):
            raise UserError(f"{test_root} has classes that {train_root} lacks ({shorten(unknown)}): make them alike.")
        test_files, test_labels = _list_images(test_root, class_names)
        files, labels = files + test_files, labels + test_labels

    # Training and test images together, so that an error counts the corrupt ones of both.
    every = ImageFiles(tuple(files), source.image_size or 224)
    sizes = {(int(height), int(width)) for height, width in every.sizes() if height}
    in_memory = source.image_size is None and (
        not sizes or (len(sizes) == 1 and len(every) * 3 * math.prod(*sizes) <= MAX_BYTES_IN_MEMORY)
    )
    if in_memory:
        images, kept = decode_images(every, skip_corrupt=source.skip_corrupt)
    else:
        kept = readable_images(every, skip_corrupt=source.skip_corrupt, checked=root / ".readable_images.txt")
        images = every[kept]
    index = np.where(kept < count, kept, kept - count)
    whole = make_split(images, np.asarray(labels, np.int32)[kept], clean=False, index=index)
    names = tuple(printable(pathlib.Path(os.path.relpath(files[i], root)).as_posix()) for i in kept)
    whole = dataclasses.replace(whole, paths=tuple(files[i] for i in kept), ids=names)
    train = whole.take(np.flatnonzero(kept < count))
    if test_root is not None:
        test = whole.take(np.flatnonzero(kept >= count))
    else:
        train, test = _split_off_test(train, len(class_names), source.seed)
    for name, split in (("training", train), ("test", test)):
        if len(split) == 0:
            raise UserError(f"{root} has no {name} images that can be read: add some.")

    if in_memory:
        mean, std = pixel_statistics(train.images)
        crop_padding, flip = default_augmentation(train.images.shape[1:])
    else:
        step = -(-len(train) // _STATISTICS_IMAGES)
        positions = np.arange(0, len(train), step)
        mean, std = pixel_statistics(np.stack([streaming.square(train.images, i, every.image_size) for i in positions]))
        # The crop is the streaming workers' part.
        crop_padding, flip = 0, True
    return Dataset("folder", train, test, class_names, None, mean, std, crop_padding, flip)


def _class_folders(root: pathlib.Path) -> tuple[str, ...]:
    names = tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if len(names) < 2:
        raise UserError(f"{root} has {len(names)} class folders where two or more are expected: make one per class.")
    return names


def _list_images(root: pathlib.Path, class_names: tuple[str, ...]) -> tuple[list[str], list[int]]:
    files, labels = [], []
    for label, name in enumerate(class_names):
        found = sorted(str(p) for p in (root / name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        files += found
        labels += [label] * len(found)
    if not files:
        raise UserError(f"the class folders of {root} hold no images ({', '.join(IMAGE_SUFFIXES)}): add some.")
    empty = [name for label, name in enumerate(class_names) if label not in set(labels)]
    if empty and root.name not in ("test", "val"):
        raise UserError(
            f"{root} has {len(empty)} class folders without images ({shorten(empty)}): fill or remove them."
        )
    return files, labels


def _split_off_test(split: Split, num_classes: int, seed: int) -> tuple[Split, Split]:
    size = round(TEST_SHARE * len(split))
    if not 0 < size < len(split):
        raise UserError(f"{len(split)} images are too few to split off a test set: give test images of your own.")
    chosen, rest = stratified_positions(split.labels, size, num_classes, seed)
    test = split.take(chosen)
    if test.clean_labels is not None:
        test = dataclasses.replace(test, labels=test.clean_labels.copy())
    return split.take(rest), test


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        # Without pickles: an array file must not be able to run code.
        archive = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path} as .npz ({error}): write it with numpy.savez.") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise UserError(f"{path} holds a single array: write an .npz with the arrays images and labels.")
    known = ("images", "labels", "clean_labels", "test_images", "test_labels", "class_names")
    with archive:
        for name in ("images", "labels"):
            if name not in archive.files:
                raise UserError(f"{path} has no array {name!r}: it holds {', '.join(archive.files) or 'nothing'}.")
        try:
            return {name: archive[name] for name in known if name in archive.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged ({error}): write it again.") from error


def _checked_images(path: pathlib.Path, name: str, arrays: dict[str, np.ndarray]) -> np.ndarray:
    images = arrays[name]
    if images.dtype != np.uint8:
        raise UserError(f"{path}: {name} must be uint8 from 0 to 255, got {images.dtype}: convert the pixels.")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise UserError(
            f"{path}: {name} must have the shape (N, H, W), (N, H, W, 1) or (N, H, W, 3), got {arrays[name].shape}."
        )
    if 0 in images.shape:
        raise UserError(f"{path}: {name} is empty, of shape {arrays[name].shape}: give at least one image.")
    return np.ascontiguousarray(images)


def _checked_labels(path: pathlib.Path, name: str, arrays: dict[str, np.ndarray], count: int) -> np.ndarray:
    labels = arrays[name]
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{path}: {name} must be integers, got {labels.dtype}: number the classes from 0.")
    if labels.shape != (count,):
        raise UserError(f"{path}: {name} must have the shape ({count},), one per image, got {labels.shape}.")
    if labels.min() < 0:
        raise UserError(f"{path}: {name} must not be negative, got {labels.min()}: number the classes from 0.")
    if labels.max() >= 2**31:
        raise UserError(f"{path}: {name} has the value {labels.max()}: number the classes from 0.")
    return labels.astype(np.int32)


def _class_names(path: pathlib.Path, arrays: dict[str, np.ndarray], splits: list[Split | None]) -> tuple[str, ...]:
    labels = [array for split in splits if split is not None for array in (split.labels, split.clean_labels)]
    largest = max(int(array.max()) for array in labels if array is not None)
    if "class_names" in arrays:
        names = tuple(str(name) for name in arrays["class_names"].ravel())
        if largest >= len(names):
            raise UserError(f"{path}: the label {largest} is out of range for {len(names)} class_names.")
        return names
    # A label far above the rest is a mistake that would make a classifier of that many outputs.
    if largest >= max(len(splits[0]), 2):
        raise UserError(
            f"{path}: the label {largest} is out of range for {len(splits[0])} images: number the classes from 0, "
            "or give class_names."
        )
    return tuple(str(label) for label in range(max(largest + 1, 2)))
