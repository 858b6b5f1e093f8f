"""Which sample is which, and whether it is still the same: names and contents of samples, whatever their order.

A sample's identity is a name that outlives the order in which a folder is listed; its fingerprint is a hash of its
content. A run keeps both for all its samples, so that it can say later what has changed.
"""

import base64
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Sequence

import numpy as np

from ..errors import UserError
from .cache import read_cached_arrays, write_cached_arrays
from .dataset import Dataset, Split
from .file_names import printable, shorten
from .image_files import ImageFiles, map_images

VERSION = 1
_HASH_BYTES = 8
# Of each sample a run keeps this much of its hash, enough to name it; the digest of all is of whole hashes.
_KEPT_BYTES = 4


def identities(split: Split) -> list[str]:
    """Return a stable name of every sample, unique in its data set's split and printable.

    It is the path relative to the data's root in POSIX form, an `.npz` file's own id, or the index in the source's
    order as text.
    """
    return split.identities


def fingerprints(split: Split, cache: str | os.PathLike | None = None) -> list[str]:
    """Return 16 hexadecimal digits of every sample's content, which depend on neither its order nor its label.

    The content is that of the file where a sample is a file, else its pixels or features with their shape and type.

    Args:
      split: The samples.
      cache: A file that keeps what has been hashed: a file whose size, times and inode are those of the last time is
        not read again. It is written as well; None reads every file.

    Raises:
      UserError: A file cannot be read.
    """
    return [f"{value:016x}" for value in _contents(split, cache)]


def fingerprint(dataset: Dataset, cache: str | os.PathLike | None = None) -> dict:
    """Return what identifies the samples of both splits, in values that JSON can hold.

    Per split `samples`, their number; `digest`, a hash of all identities, contents and source labels that does not
    depend on their order; and `identities`, `contents` and `labels`, compressed, so that `check_same_samples` can name
    what has changed.
    """
    return {
        "version": VERSION,
        "class_names": list(dataset.class_names),
        "splits": {
            "train": _split_fingerprint(dataset.train, cache),
            "test": _split_fingerprint(dataset.test, cache),
        },
    }


def check_same_samples(
    stored: dict,
    dataset: Dataset,
    *,
    splits: Sequence[str] = ("train", "test"),
    cache: str | os.PathLike | None = None,
) -> None:
    """Raise an error that names what has changed unless a data set has the samples that `fingerprint` saw.

    Args:
      stored: What `fingerprint` returned when the run began.
      dataset: The data set as it is now.
      splits: The splits that have to be the same.
      cache: As for `fingerprints`.

    Raises:
      UserError: Samples are new, gone, or have another content or label, or the classes are others.
    """
    if stored.get("version") != VERSION:
        raise UserError(
            f"the run's fingerprint of its samples has version {stored.get('version')!r}, not {VERSION}: go on with "
            "the version of the program that wrote it."
        )
    changes = []
    for split in splits:
        now = _split_fingerprint(getattr(dataset, split), cache)
        was = stored["splits"][split]
        if now["digest"] != was["digest"]:
            changes += [f"{change} in the {split} set" for change in _differences(was, now)]
    if not changes and list(dataset.class_names) != list(stored["class_names"]):
        changes = [f"the classes are {shorten(dataset.class_names)} and were {shorten(stored['class_names'])}"]
    if changes:
        raise UserError(f"the data is not that of the run: {'; '.join(changes)}. Restore it, or start a new run.")


# --- contents -----------------------------------------------------------------------------------------------------


def _contents(split: Split, cache: str | os.PathLike | None) -> np.ndarray:
    """Return the hash of every sample's content, uint64 (N,)."""
    if split.paths is None and not isinstance(split.images, ImageFiles):
        return np.fromiter(map(_hash_array, split.images), np.uint64, len(split))
    files = split.images if isinstance(split.images, ImageFiles) else ImageFiles(split.paths)
    if cache is None or files.archive is not None:
        return _hash_files(files)
    stamps = np.fromiter(map(_stamp, files.paths), np.uint64, len(files))
    known = _read_cache(cache)
    values = np.fromiter((known.get(int(stamp), 0) for stamp in stamps), np.uint64, len(files))
    unknown = np.flatnonzero([int(stamp) not in known for stamp in stamps])
    if len(unknown):
        values[unknown] = _hash_files(files[unknown])
        known |= zip(map(int, stamps), map(int, values), strict=True)
        table = np.array(list(known.items()), np.uint64).reshape(-1, 2)
        write_cached_arrays(pathlib.Path(cache), {"stamps_and_contents": table})
    return values


def _hash(*parts: bytes) -> int:
    digest = hashlib.blake2b(digest_size=_HASH_BYTES)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "big")


def _hash_array(values: np.ndarray) -> int:
    return _hash(f"{values.dtype.str}{values.shape}".encode(), np.ascontiguousarray(values).data)


def _hash_files(files: ImageFiles) -> np.ndarray:
    def content(position: int) -> int:
        try:
            return _hash(files.read(position))
        except OSError as error:
            name = printable(files.paths[position])
            raise UserError(f"cannot read {name!r} ({error.strerror}): restore it, or start a new run.") from error

    values = map_images(files, content, say=False)
    for value in values:
        if isinstance(value, UserError):
            raise value
    return np.fromiter(values, np.uint64, len(files))


def _stamp(path: str) -> int:
    # The time of the last change of the inode cannot be set back, so no file takes another's place unseen.
    try:
        stat = os.stat(path)
    except OSError:
        return 0
    values = (path, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return _hash(repr(values).encode())


def _read_cache(path: str | os.PathLike) -> dict[int, int]:
    table = (read_cached_arrays(pathlib.Path(path), None) or {}).get("stamps_and_contents", np.empty((0, 2), np.uint64))
    return dict(table.tolist())


# --- what a run keeps ---------------------------------------------------------------------------------------------


def _split_fingerprint(split: Split, cache: str | os.PathLike | None) -> dict:
    names = identities(split)
    order = sorted(range(len(names)), key=names.__getitem__)
    names = [names[i] for i in order]
    contents = _contents(split, cache)[order]
    labels = np.stack([split.labels, split.labels if split.clean_labels is None else split.clean_labels])[:, order]
    digest = hashlib.blake2b(digest_size=16)
    for part in (json.dumps(names).encode(), contents.astype(">u8").tobytes(), labels.astype(">i4").tobytes()):
        digest.update(part)
    kept = (contents >> np.uint64(8 * (_HASH_BYTES - _KEPT_BYTES))).astype(">u4")
    return {
        "samples": len(split),
        "digest": digest.hexdigest(),
        "identities": _pack(json.dumps(names).encode()),
        "contents": _pack(kept.tobytes()),
        "labels": _pack(labels.astype(">i4").tobytes()),
    }


def _differences(was: dict, now: dict) -> list[str]:
    """Return in words what is new, gone and changed, each with the first names."""
    before, after = _samples(was), _samples(now)
    changes = {
        "new": [name for name in after if name not in before],
        "gone": [name for name in before if name not in after],
    }
    both = [name for name in before if name in after]
    changes["changed"] = [name for name in both if before[name][0] != after[name][0]]
    changes["labelled otherwise"] = [name for name in both if before[name][1] != after[name][1]]
    return [
        f"{len(names):,} {'sample is' if len(names) == 1 else 'samples are'} {how} ({shorten(names)})"
        for how, names in changes.items()
        if names
    ] or ["some sample is changed"]


def _samples(kept: dict) -> dict[str, tuple[int, tuple[int, int]]]:
    """Return identity -> content and labels."""
    names = json.loads(_unpack(kept["identities"]))
    contents = np.frombuffer(_unpack(kept["contents"]), ">u4").tolist()
    labels = np.frombuffer(_unpack(kept["labels"]), ">i4").reshape(2, -1).T.tolist()
    return {name: (content, tuple(pair)) for name, content, pair in zip(names, contents, labels, strict=True)}


def _pack(values: bytes) -> str:
    return base64.b85encode(zlib.compress(values)).decode()


def _unpack(text: str) -> bytes:
    return zlib.decompress(base64.b85decode(text))
