"""The user's own arrays: an `.npz` of images or of features with their labels."""

import collections
import contextlib
import pathlib
import warnings
import zipfile
from collections.abc import Iterator, Mapping

import numpy as np

from ..errors import UserError
from . import decoding
from .dataset import (
    Dataset,
    Source,
    Split,
    check_classes,
    default_augmentation,
    feature_statistics,
    looks_grey,
    pixel_statistics,
    split_off_test,
)
from .file_names import printable, shorten

_SAMPLES = ("images", "features")
_PER_SAMPLE = ("labels", "clean_labels", "ids", "texts")
_KNOWN = (*_SAMPLES, *_PER_SAMPLE, *(f"test_{name}" for name in (*_SAMPLES, "labels", "ids", "texts")), "class_names")


def load(source: Source) -> Dataset:
    """Load `images` or `features` with `labels`, and what else is there, from an .npz file.

    Arrays of the file:
      images: (N, H, W), (N, H, W, 1), (N, H, W, 3) or, with transparency, (N, H, W, 4): uint8, uint16 or floats from 0
        to 1, kept as uint8.
      features: Numbers (N, D) in place of images, kept as float32: embeddings, measurements, rows of a table.
      labels: Integers (N,) from 0, or strings.
      clean_labels: Optional: the true labels (N,), where `labels` has mistakes.
      ids: Optional names of the samples (N,), each another; without them a sample's name is its position.
      texts: Optional strings (N,) to show beside the samples.
      test_images or test_features, test_labels, test_ids, test_texts: Optional; without them a stratified fifth of the
        samples is the test set, the same one for every training seed, and it is tested against the clean labels where
        there are any.
      class_names: Optional strings; without them the classes are named by their numbers, or by string labels in
        alphabetical order.
    """
    path = source.path("npz", "the path of an .npz file with the arrays labels and images or features")
    arrays = _read(path)
    given = [name for name in _SAMPLES if name in arrays]
    if len(given) != 1 or "labels" not in arrays:
        missing = "labels" if given else "images"
        raise UserError(
            f"{path} has both images and features: give one of them."
            if len(given) > 1
            else f"{path} has no array {missing!r}: it holds {', '.join(arrays) or 'nothing'}."
        )
    kind = given[0]
    if (f"test_{kind}" in arrays) != ("test_labels" in arrays):
        raise UserError(f"{path} has only one of test_{kind} and test_labels: give both or none.")
    samples = _images(path, arrays) if kind == "images" else _features(path, arrays)
    class_names = _number_labels(path, arrays, len(samples[kind]))
    train = _split(path, arrays, samples[kind], "")
    if f"test_{kind}" in arrays:
        test, layout = _split(path, arrays, samples[f"test_{kind}"], "test_"), ""
    else:
        train, test = split_off_test(train, len(class_names), source)
        layout = "a part split off for testing" if len(test) else "none split off for testing"
    check_classes(train, test, class_names, str(path))
    if kind == "features":
        mean, std = feature_statistics(train.images)
        return Dataset("npz", train, test, class_names, None, mean, std, 0, False, layout)
    mean, std = pixel_statistics(train.images)
    crop_padding, flip = default_augmentation(train.images.shape[1:], looks_grey(train.images))
    return Dataset("npz", train, test, class_names, None, mean, std, crop_padding, flip, layout)


def read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Return all arrays of an .npz file, those that are not used as well.

    Raises:
      UserError: The file is none, is damaged, or holds an array of Python objects.
    """
    with _opened(path) as archive:
        return {name: _array(path, archive, name) for name in archive.files}


def why_unreadable(error: Exception) -> str:
    """Return why NumPy cannot read a file; it takes whatever it does not know for a pickle."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return "it is neither .npy nor .npz" if "pickle" in str(error) else str(error)


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    with _opened(path) as archive:
        if unknown := [name for name in archive.files if name not in _KNOWN]:
            warnings.warn(f"{path} has arrays that are not used: {shorten(unknown)}", stacklevel=4)
        return {name: _array(path, archive, name) for name in archive.files if name in _KNOWN}


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[np.lib.npyio.NpzFile]:
    with contextlib.ExitStack() as stack:
        try:
            # Opened here: NumPy leaves a file open that it cannot read.
            file = stack.enter_context(open(path, "rb"))
            # Without pickles: an array file must not be able to run code.
            archive = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(
                f"cannot read {path} as .npz ({why_unreadable(error)}): write it with numpy.savez."
            ) from error
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise UserError(f"{path} holds a single array: write an .npz with the arrays images and labels.")
        yield archive


def _array(path: pathlib.Path, archive: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    try:
        return archive[name]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if "allow_pickle" in str(error):
            raise UserError(
                f"{path}: {name} is an array of Python objects, which only running code could read: write it "
                "as numbers, or as strings with numpy.array(values, dtype=str)."
            ) from error
        raise UserError(f"{path} is damaged ({error}): write it again.") from error


# --- images and features ------------------------------------------------------------------------------------------


def _images(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the images of both splits, uint8 (N, H, W, C)."""
    images = {name: _shaped(path, name, arrays[name]) for name in ("images", "test_images") if name in arrays}
    if len({values.shape[1:] for values in images.values()}) > 1:
        first, second = (values.shape[1:] for values in images.values())
        raise UserError(f"{path}: test_images have the shape {second} but images have {first}: make them alike.")
    wide = [values for values in images.values() if values.dtype == np.uint16]
    levels = decoding.common_levels(("integer", int(values.min()), int(values.max())) for values in wide).integer
    return {name: _opaque(_to_uint8(path, name, values, levels[1])) for name, values in images.items()}


def _shaped(path: pathlib.Path, name: str, images: np.ndarray) -> np.ndarray:
    shape = images.shape
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        raise UserError(
            f"{path}: {name} must have the shape (N, H, W), (N, H, W, 1) or (N, H, W, 3), got {shape}"
            + (": give vectors as features." if len(shape) == 2 else ".")
        )
    if 0 in shape:
        raise UserError(f"{path}: {name} is empty, of shape {shape}: give at least one image.")
    return images


def _to_uint8(path: pathlib.Path, name: str, images: np.ndarray, white: float) -> np.ndarray:
    if images.dtype == np.uint8:
        return np.ascontiguousarray(images)
    if images.dtype == np.uint16:
        scale = 255 / white
    elif images.dtype.kind == "f":
        # A value that is no number fails this comparison.
        if not (images.min() >= 0 and images.max() <= 1):
            raise UserError(
                f"{path}: {name} must be uint8 from 0 to 255 or floats from 0 to 1, got {images.dtype} from "
                f"{images.min():g} to {images.max():g}: scale the pixels."
            )
        scale = 255
    else:
        raise UserError(
            f"{path}: {name} must be uint8 from 0 to 255, uint16 or floats from 0 to 1, got {images.dtype}: "
            "convert the pixels."
        )
    # Image by image, without a float copy of all.
    scaled = np.empty(images.shape, np.uint8)
    for source, target in zip(images, scaled, strict=True):
        target[...] = np.rint(source.astype(np.float32) * scale)
    return scaled


def _opaque(images: np.ndarray) -> np.ndarray:
    if images.shape[-1] != 4:
        return images
    opaque = np.empty((*images.shape[:3], 3), np.uint8)
    for source, target in zip(images, opaque, strict=True):
        share = source[..., 3:] / 255
        target[...] = np.rint(source[..., :3] * share + np.asarray(decoding.BACKGROUND) * (1 - share))
    return opaque


def _features(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the features of both splits, float32 (N, D)."""
    features = {}
    for name in ("features", "test_features"):
        if name not in arrays:
            continue
        values = arrays[name]
        if values.dtype.kind not in "fiub" or values.ndim != 2 or 0 in values.shape:
            raise UserError(
                f"{path}: {name} must be numbers of the shape (N, D), got {values.dtype} of shape {values.shape}."
            )
        with np.errstate(over="ignore"):
            features[name] = np.ascontiguousarray(values, np.float32)
        if (bad := np.argwhere(~np.isfinite(features[name]))).size:
            row, column = bad[0]
            raise UserError(
                f"{path}: {name} has {len(bad):,} values that are no finite numbers, the first in row {row}, column "
                f"{column}: fill them in, or leave out these rows."
            )
    if len({values.shape[1] for values in features.values()}) > 1:
        first, second = (values.shape[1] for values in features.values())
        raise UserError(f"{path}: test_features have {second} columns but features have {first}: make them alike.")
    return features


# --- labels and names ---------------------------------------------------------------------------------------------


def _split(path: pathlib.Path, arrays: Mapping[str, np.ndarray], samples: np.ndarray, prefix: str) -> Split:
    clean = f"{prefix}clean_labels"
    return Split(
        samples,
        _of_length(path, f"{prefix}labels", arrays, len(samples)),
        _of_length(path, clean, arrays, len(samples)) if clean in arrays else None,
        np.arange(len(samples), dtype=np.int64),
        ids=_ids(path, f"{prefix}ids", arrays, len(samples)),
        texts=_strings(path, f"{prefix}texts", arrays, len(samples)),
    )


def _number_labels(path: pathlib.Path, arrays: dict[str, np.ndarray], count: int) -> tuple[str, ...]:
    """Put int32 labels in place of those that were given, strings or integers; return the names of the classes."""
    given = [name for name in ("labels", "clean_labels", "test_labels") if name in arrays]
    for name in given:
        if arrays[name].ndim == 2 and arrays[name].shape[1] == 1:
            arrays[name] = arrays[name][:, 0]
        if arrays[name].dtype.kind not in "iuUS":
            raise UserError(
                f"{path}: {name} must be integers, got {arrays[name].dtype}: number the classes from 0, or name them."
            )
    class_names = _class_names(path, arrays)
    texts = [name for name in given if arrays[name].dtype.kind in "US"]
    if texts:
        if texts != given:
            raise UserError(f"{path}: some of {', '.join(given)} are strings and some integers: make them alike.")
        values = {name: _decoded(path, name, arrays[name]) for name in given}
        if class_names is None:
            class_names = tuple(sorted({label for of_name in values.values() for label in of_name}))
        number = {name: label for label, name in enumerate(class_names)}
        for name, of_name in values.items():
            if unknown := sorted({label for label in of_name if label not in number}):
                raise UserError(f"{path}: {name} has labels that class_names lacks ({shorten(unknown)}): add them.")
            arrays[name] = np.asarray([number[label] for label in of_name], np.int32)
    else:
        class_names = _check_integers(path, {name: arrays[name] for name in given}, class_names, count, _noun(arrays))
        arrays |= {name: arrays[name].astype(np.int32) for name in given}
    return class_names


def _check_integers(
    path: pathlib.Path, labels: Mapping[str, np.ndarray], class_names: tuple[str, ...] | None, count: int, noun: str
) -> tuple[str, ...]:
    for name, values in labels.items():
        if values.size and values.min() < 0:
            raise UserError(f"{path}: {name} must not be negative, got {values.min()}: number the classes from 0.")
        if values.size and values.max() >= 2**31:
            raise UserError(f"{path}: {name} has the value {values.max()}: number the classes from 0.")
    smallest = min(int(values.min()) for values in labels.values() if values.size)
    largest = max(int(values.max()) for values in labels.values() if values.size)
    from_one = " and they count from 1: number the classes from 0" if smallest == 1 else ""
    if class_names is not None:
        if largest >= len(class_names):
            raise UserError(
                f"{path}: the label {largest} is out of range for {len(class_names)} class_names{from_one}."
            )
        return class_names
    # A label far above the rest is a mistake that would make a classifier of that many outputs.
    if largest >= max(count, 2):
        raise UserError(
            f"{path}: the label {largest} is out of range for {count} {noun}s: number the classes from 0, "
            "or give class_names."
        )
    if smallest == 1:
        raise UserError(
            f"{path}: the labels count from 1 to {largest}, so that no sample is of class 0: number the classes from "
            "0, or give class_names with a name for class 0."
        )
    return tuple(str(label) for label in range(max(largest + 1, 2)))


def _class_names(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> tuple[str, ...] | None:
    if "class_names" not in arrays:
        return None
    values = arrays["class_names"].ravel()
    names = tuple(_decoded(path, "class_names", values) if values.dtype.kind == "S" else map(str, values))
    names = tuple(map(printable, names))
    if repeated := [name for name, count in collections.Counter(names).items() if count > 1]:
        raise UserError(f"{path}: class_names has names twice ({shorten(repeated)}): give each class its own.")
    return names


def _of_length(path: pathlib.Path, name: str, arrays: Mapping[str, np.ndarray], count: int) -> np.ndarray:
    shape = arrays[name].shape
    if shape != (count,):
        raise UserError(f"{path}: {name} must have the shape ({count},), one per {_noun(arrays)}, got {shape}.")
    return arrays[name]


def _noun(arrays: Mapping[str, np.ndarray]) -> str:
    return "image" if "images" in arrays else "sample"


def _strings(path: pathlib.Path, name: str, arrays: Mapping[str, np.ndarray], count: int) -> tuple[str, ...] | None:
    if name not in arrays:
        return None
    values = _of_length(path, name, arrays, count)
    return tuple(_decoded(path, name, values) if values.dtype.kind == "S" else map(str, values.tolist()))


def _ids(path: pathlib.Path, name: str, arrays: Mapping[str, np.ndarray], count: int) -> tuple[str, ...] | None:
    ids = _strings(path, name, arrays, count)
    if ids is None:
        return None
    if repeated := [value for value, times in collections.Counter(ids).items() if times > 1]:
        raise UserError(
            f"{path}: {name} has {len(repeated):,} names twice ({shorten(repeated)}): give each sample its own."
        )
    return tuple(map(printable, ids))


def _decoded(path: pathlib.Path, name: str, values: np.ndarray) -> list[str]:
    try:
        return [value.decode() if isinstance(value, bytes) else value for value in values.tolist()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {name} has bytes that are not UTF-8: write it as strings.") from error
