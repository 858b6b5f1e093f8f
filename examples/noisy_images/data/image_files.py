"""Images that are files: read, measured, decoded into memory, and what is said of those that cannot be."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import threading
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..errors import UserError
from . import decoding
from .cache import write_cache
from .file_names import printable, shorten


class UnreadableImage(UserError):
    """An image that cannot be decoded, and why."""

    def __init__(self, path: str, reason: str):
        super().__init__(
            f"cannot read the image {printable(path)!r} ({reason}): replace or remove it, "
            "or start again with --skip-corrupt."
        )
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """Images that stay in their files and are decoded one at a time, for sets too large for memory.

    Attributes:
      paths: Paths of the images, or names of the members of `archive`.
      image_size: Side in pixels of the square that `streaming.batches` crops from every image.
      archive: A zip file that holds the images; None when they are plain files.
      levels: What becomes black and white in images of more than 8 bits.
    """

    paths: tuple[str, ...]
    image_size: int = 224
    archive: str | None = None
    levels: decoding.Levels = decoding.DEFAULT_LEVELS

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
            with open(self.paths[position], "rb", buffering=0) as file:
                return file.readall()
        with _ZIP_LOCK:
            return _open_zip(self.archive).read(self.paths[position])

    def open(self, position: int, at_least: int | None = None):
        """Return one image as an RGB `PIL.Image`; `decoding.decode` says how and what `at_least` does.

        Raises:
          UnreadableImage: The image cannot be decoded.
        """
        try:
            return decoding.decode(self.read(position), self.levels, at_least)
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise UnreadableImage(self.paths[position], _reason(error)) from error

    def headers(self) -> list[decoding.Header | None]:
        """Return what is known of every image before it is decoded; None for one that cannot be read."""

        def header(position: int) -> decoding.Header | None:
            try:
                path = self.paths[position]
                return decoding.read_header(path if self.archive is None else self.read(position))
            except (OSError, KeyError, ValueError, zipfile.BadZipFile):
                return None

        return map_images(self, header, say=False)


def decode_images(
    files: ImageFiles, *, skip_corrupt: bool, side: int | None = None, fit: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Decode every image into one array uint8 (N, H, W, 3); return it and the positions that it holds.

    Args:
      files: The images.
      skip_corrupt: Leave out images that cannot be read instead of raising.
      side: The height and width that the images must have; None is the size of the first that can be read.
      fit: Height and width to which images of another size are scaled, the rest of the longer side cut off evenly.

    Raises:
      UserError: Images that cannot be read (named and counted), or that differ in size with nothing to fit them to.
    """
    if fit is not None:
        shape = (*fit, 3)
    else:
        shape = _first_shape(files) if side is None else (side, side, 3)
    images = np.empty((len(files), *shape), np.uint8)

    def decode(position: int) -> tuple[int, ...]:
        image = files.open(position, at_least=None if fit is None else max(fit))
        if fit is not None:
            image = _fitted(image, *fit)
        pixels = np.asarray(image)
        if pixels.shape == shape:
            images[position] = pixels
        return pixels.shape

    results = map_images(files, decode)
    good = _good_positions(files, results, skip_corrupt)
    for position in good:
        if results[position] != shape:
            height, width = results[position][:2]
            raise UserError(
                f"the image {printable(files.paths[position])!r} has {height}x{width} pixels where "
                f"{shape[0]}x{shape[1]} are expected: resize it."
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
    known = set(checked.read_text("utf-8", "replace").splitlines()) if checked.is_file() else set()
    unknown = np.array([i for i, stamp in enumerate(stamps) if stamp not in known], np.int64)
    # An eighth of the size is enough to meet every fault of a JPEG's data, and several times faster.
    new = files[unknown]
    results: list[Any] = [None] * len(files)
    for position, result in zip(unknown, map_images(new, lambda i: new.open(i, at_least=1).size), strict=True):
        results[position] = result
    good = _good_positions(files, results, skip_corrupt)
    if len(unknown):
        write_cache(checked, lambda file: file.write("\n".join(stamps[i] for i in good).encode()))
    return good


def map_images(files: ImageFiles, function, say: bool = True) -> list:
    """Return `function(i)` for every image, or the UserError that it raised; decoding releases the interpreter lock.

    What Pillow warns of is said once all are done, with the names of the files, unless `say` is False.
    """
    # Registers Pillow's plug-ins once, before threads race to do so.
    from PIL import Image

    Image.init()
    workers = max(1, min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))
    chunk = 64
    with _notes_of_pillow(say) as current, concurrent.futures.ThreadPoolExecutor(workers) as pool:

        def attempt(position):
            current.path = files.paths[position]
            try:
                return function(position)
            except UserError as error:
                return error

        chunks = pool.map(
            lambda start: [attempt(i) for i in range(start, min(start + chunk, len(files)))],
            range(0, len(files), chunk),
        )
        return [result for part in chunks for result in part]


def silence_pillow() -> None:
    """Keep Pillow from repeating, without a file's name, what was said when the images were first read."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


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


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error)


def _fitted(image, height: int, width: int):
    from PIL import Image, ImageOps

    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)


@contextlib.contextmanager
def _notes_of_pillow(say: bool) -> Iterator[threading.local]:
    """Collect the warnings of threads that say in `path` which file they are at; say each kind once at the end."""
    current = threading.local()
    paths_of: dict[str, list[str]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        show = warnings.showwarning

        def collect(message, *where, **more):
            path = getattr(current, "path", None)
            if path is None:
                show(message, *where, **more)
            else:
                paths_of.setdefault(str(message), []).append(path)

        warnings.showwarning = collect
        yield current
    for message, paths in paths_of.items() if say else ():
        names = [printable(path) for path in sorted(set(paths))]
        warnings.warn(f"{len(names)} images ({shorten(names)}): {message}", stacklevel=5)


def _good_positions(files: ImageFiles, results: list, skip_corrupt: bool) -> np.ndarray:
    corrupt = [(path, e) for path, e in zip(files.paths, results, strict=True) if isinstance(e, UnreadableImage)]
    paths = [printable(path) for path, _ in corrupt]
    why = _reasons(corrupt)
    if corrupt and not skip_corrupt:
        raise UserError(
            f"{len(corrupt)} of {len(files)} images cannot be read ({shorten(paths)}; {why}): replace or remove them, "
            "or leave them out with --skip-corrupt."
        )
    if len(corrupt) == len(files):
        raise UserError(f"none of the {len(files)} images can be read ({shorten(paths)}; {why}): check the data.")
    if corrupt:
        warnings.warn(
            f"left out {len(corrupt)} of {len(files)} images that cannot be read: {', '.join(paths)} ({why})",
            stacklevel=4,
        )
    return np.asarray([i for i, result in enumerate(results) if not isinstance(result, UnreadableImage)], np.int64)


def _reasons(corrupt: Sequence[tuple[str, UnreadableImage]]) -> str:
    """Return the most frequent reasons, each with the name of its first file."""
    counts = collections.Counter(error.reason for _, error in corrupt)
    first = {error.reason: os.path.basename(path) for path, error in reversed(corrupt)}
    said = [
        f"{printable(first[reason])}{f' and {count - 1} more' if count > 1 else ''}: {reason}"
        for reason, count in counts.most_common(3)
    ]
    return "; ".join(said)


def _first_shape(files: ImageFiles) -> tuple[int, int, int]:
    for position in range(len(files)):
        try:
            return files[position].shape
        except UnreadableImage:
            continue
    return (1, 1, 3)


def _stamp(path: str) -> str:
    name = printable(path)
    try:
        stat = os.stat(path)
    except OSError:
        return name
    return f"{name}\t{stat.st_size}\t{stat.st_mtime_ns}"
