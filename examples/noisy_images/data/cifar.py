"""CIFAR-10 and CIFAR-100 through TensorFlow Datasets, without TensorFlow.

`prepare` writes the official archive as array_record files that the stock `tfds.data_source` reads; `load` reads them,
puts the images back into the official order and keeps the decoded arrays beside them, so that a second start needs
neither TensorFlow Datasets nor array_record.
"""

import concurrent.futures
import contextlib
import dataclasses
import gzip
import hashlib
import io
import os
import pathlib
import shutil
import tarfile
import tempfile
import warnings
import zlib
from collections.abc import Iterator

import numpy as np

from ..errors import UserError
from .cache import read_cached_arrays, write_cached_arrays
from .dataset import Dataset, Source, make_split

VERSION = "3.0.2"
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)
CROP_PADDING = 4
_DEFAULT_DATA_DIR = "~/tensorflow_datasets"
_CACHE = "decoded.npz"
_PIXELS = 32 * 32 * 3


@dataclasses.dataclass(frozen=True)
class Release:
    """The official binary archive of one data set.

    Attributes:
      url: Where it is published.
      folder: The folder inside it.
      files: Split -> the files of its records, in the official order.
      label_files: Label -> the file of its class names, in the order of a record's label bytes.
      sizes: Split -> number of images.
    """

    url: str
    folder: str
    files: dict[str, tuple[str, ...]]
    label_files: dict[str, str]
    num_classes: dict[str, int]
    sizes: dict[str, int]


RELEASES = {
    "cifar10": Release(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        folder="cifar-10-batches-bin",
        files={"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
        label_files={"label": "batches.meta.txt"},
        num_classes={"label": 10},
        sizes={"train": 50_000, "test": 10_000},
    ),
    "cifar100": Release(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        folder="cifar-100-binary",
        files={"train": ("train.bin",), "test": ("test.bin",)},
        label_files={"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"},
        num_classes={"coarse_label": 20, "label": 100},
        sizes={"train": 50_000, "test": 10_000},
    ),
}


def load(name: str, source: Source) -> Dataset:
    """Load CIFAR-10 or CIFAR-100 in the official order, from the folder that TensorFlow Datasets uses.

    Raises:
      UserError: The data is missing, half prepared, of another version or unreadable; the sentence says what to run.
    """
    folder = _version_folder(name, source.data_dir)
    info = folder / "dataset_info.json"
    # Without the description the cache is all there is: somebody copied it alone.
    fingerprint = hashlib.sha256(info.read_bytes()).hexdigest() if info.is_file() else None
    arrays = read_cached_arrays(folder / _CACHE, fingerprint)
    if arrays is None:
        _check_prepared(name, folder)
        arrays = _decode(name, folder)
        write_cached_arrays(folder / _CACHE, {"fingerprint": np.array(fingerprint), **arrays})
    superclasses = None
    if "train_coarse_label" in arrays:
        superclasses = _superclasses(name, arrays)
    splits = {
        split: make_split(arrays[f"{split}_image"], arrays[f"{split}_label"], clean=True) for split in ("train", "test")
    }
    class_names = tuple(str(class_name) for class_name in arrays["class_names"])
    return Dataset(name, splits["train"], splits["test"], class_names, superclasses, MEAN, STD, CROP_PADDING, True)


def prepare(
    name: str, data_dir: str | os.PathLike | None = None, archive: str | os.PathLike | None = None
) -> pathlib.Path:
    """Prepare the official binary archive for `tfds.data_source`; return the folder of the version.

    The folder appears whole or not at all. One that is already prepared is left as it is.

    Args:
      name: `cifar10` or `cifar100`.
      data_dir: Where TensorFlow Datasets keeps its data; None is `~/tensorflow_datasets`.
      archive: The archive as a local file; None downloads it.

    Raises:
      UserError: The archive is missing, cut short, of another layout, or has members outside its folder.
    """
    folder = _version_folder(name, data_dir)
    if folder.is_dir() and not _fault(folder):
        return folder
    if folder.is_dir() and list(folder.glob("*.tfrecord*")) and (folder / "dataset_info.json").is_file():
        raise UserError(f"{folder} holds {name} as tfrecord files: prepare array_record files with another --data-dir.")
    if archive is not None and not pathlib.Path(archive).expanduser().is_file():
        raise UserError(f"the archive {str(archive)!r} does not exist: give the official {_archive_name(name)}.")
    tfds = _import_tfds()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{VERSION}.incomplete.", dir=folder.parent))
    except OSError as error:
        raise UserError(f"cannot write to {folder.parent} ({error}): choose another --data-dir.") from error
    try:
        if archive is None:
            path = _download(tfds, name, temporary)
        else:
            path = pathlib.Path(archive).expanduser()
        members = _read_archive(name, path)
        builder = _builder_class(tfds, name, path, members)(data_dir=temporary / "data")
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        with _quiet(tfds):
            builder.download_and_prepare(
                file_format="array_record", download_config=config, download_dir=temporary / "downloads"
            )
        if folder.is_dir():
            # Half prepared: set aside first, so that the new folder takes its place in one step.
            os.rename(folder, temporary / "replaced")
        os.rename(temporary / "data" / name / VERSION, folder)
    except OSError as error:
        raise UserError(f"cannot prepare {name} in {folder.parent} ({error}).") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    # Reads everything back and leaves the decoded arrays for machines without TensorFlow Datasets.
    load(name, Source(data_dir))
    return folder


def _version_folder(name: str, data_dir: str | os.PathLike | None) -> pathlib.Path:
    return pathlib.Path(data_dir or _DEFAULT_DATA_DIR).expanduser() / name / VERSION


def _archive_name(name: str) -> str:
    return RELEASES[name].url.rsplit("/", 1)[1]


def _advice(name: str, folder: pathlib.Path) -> str:
    return (
        f"run `python -m examples.noisy_images prepare --dataset {name} --data-dir {folder.parent.parent} "
        "[--archive FILE]`."
    )


def _fault(folder: pathlib.Path) -> str | None:
    """Return why the folder is not a prepared array_record version, None where it is one."""
    if not (folder / "dataset_info.json").is_file() or not (folder / "features.json").is_file():
        return "is only half prepared"
    if not list(folder.glob("*.array_record*")):
        return "holds no array_record files"
    return None


def _check_prepared(name: str, folder: pathlib.Path) -> None:
    if not folder.is_dir():
        parent = folder.parent
        others = (
            sorted(p.name for p in parent.iterdir() if p.is_dir() and p.name[:1].isdigit()) if parent.is_dir() else []
        )
        if others:
            raise UserError(
                f"{parent} holds version {', '.join(others)} of {name}, not {VERSION}: {_advice(name, folder)}"
            )
        raise UserError(f"{name} is not in {parent.parent}: {_advice(name, folder)}")
    if fault := _fault(folder):
        if list(folder.glob("*.tfrecord*")):
            raise UserError(
                f"{folder} holds tfrecord files, which need TensorFlow: choose another --data-dir and "
                f"{_advice(name, pathlib.Path('DIR') / name / VERSION)}"
            )
        raise UserError(f"{folder} {fault}: {_advice(name, folder)}")


def _import_tfds():
    try:
        # TensorFlow Datasets needs it and does not say so.
        import importlib_resources  # noqa: F401
        import tensorflow_datasets as tfds
        from array_record.python import array_record_module  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"CIFAR needs the package {error.name!r}: run `pip install tensorflow-datasets importlib_resources "
            "array_record`."
        ) from error
    return tfds


def _decode(name: str, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Read both splits through `tfds.data_source` and return their arrays in the official order."""
    tfds = _import_tfds()
    from PIL import Image

    release = RELEASES[name]
    arrays = {}
    try:
        # The stock decoder is slower, and takes no part in threads.
        decoders = {"image": tfds.decode.SkipDecoding()}
        sources = tfds.data_source(
            f"{name}:{VERSION}", data_dir=folder.parent.parent, download=False, decoders=decoders
        )
        sources = {split: sources[split] for split in release.files}
    # TensorFlow Datasets and array_record raise what they meet, down to C++ errors, on damaged files.
    except Exception as error:
        raise UserError(
            f"cannot read {folder} ({_first_line(error)}): remove it and {_advice(name, folder)}"
        ) from error

    def decode(records: list[dict]) -> np.ndarray:
        return np.stack([np.asarray(Image.open(io.BytesIO(record["image"])).convert("RGB")) for record in records])

    for split, data_source in sources.items():
        try:
            with concurrent.futures.ThreadPoolExecutor() as pool:
                chunks = [range(i, min(i + 500, len(data_source))) for i in range(0, len(data_source), 500)]
                images, labels, ids = [], [], []
                pending = []
                for chunk in chunks:
                    records = data_source.__getitems__(list(chunk))
                    pending.append(pool.submit(decode, records))
                    labels.extend({key: int(record[key]) for key in release.label_files} for record in records)
                    ids.extend(record["id"] for record in records)
                images = np.concatenate([future.result() for future in pending])
        except Exception as error:
            raise UserError(
                f"cannot read the {split} split of {folder} ({_first_line(error)}): remove it and "
                f"{_advice(name, folder)}"
            ) from error
        index = np.array([_original_index(record_id) for record_id in ids])
        order = np.argsort(index)
        if len(index) == 0 or not np.array_equal(index[order], np.arange(len(index))):
            raise UserError(
                f"the {split} split of {folder} does not hold every image once: remove it and {_advice(name, folder)}"
            )
        arrays[f"{split}_image"] = images[order]
        for key in release.label_files:
            arrays[f"{split}_{key}"] = np.array([label[key] for label in labels], np.int32)[order]
    arrays["class_names"] = np.array(sources["train"].dataset_info.features["label"].names)
    return arrays


def _original_index(record_id: bytes | str) -> int:
    text = record_id.decode() if isinstance(record_id, bytes) else str(record_id)
    return int(text.rsplit("_", 1)[1])


def _superclasses(name: str, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Deduce the superclass of every class from the pairs of labels."""
    fine, coarse = arrays["train_label"], arrays["train_coarse_label"]
    superclasses = np.zeros(RELEASES[name].num_classes["label"], np.int32)
    superclasses[fine] = coarse
    if not np.array_equal(superclasses[fine], coarse):
        raise UserError(f"the coarse labels of {name} contradict each other: prepare the data again.")
    return superclasses


def _download(tfds, name: str, temporary: pathlib.Path) -> pathlib.Path:
    """Download the official archive through TensorFlow Datasets, which knows its checksum."""
    url = RELEASES[name].url
    try:
        manager = tfds.download.DownloadManager(download_dir=temporary / "downloads", dataset_name=name)
        return pathlib.Path(manager.download(url))
    # requests, urllib3 and TensorFlow Datasets each have errors of their own for a failed download.
    except Exception as error:
        raise UserError(
            f"cannot download {url} ({_first_line(error)}): download it by other means and give it with --archive."
        ) from error


def _read_archive(name: str, path: pathlib.Path) -> dict[str, bytes]:
    """Return file name -> contents for the files of the archive that are needed; nothing is written to disk."""
    release = RELEASES[name]
    needed = {file for files in release.files.values() for file in files} | set(release.label_files.values())
    members = {}
    try:
        with gzip.open(path) as stream, tarfile.open(fileobj=stream) as archive:
            for member in archive:
                parts = pathlib.PurePosixPath(member.name).parts
                if member.name.startswith("/") or ".." in parts or not (member.isfile() or member.isdir()):
                    raise UserError(
                        f"the archive {path} has the member {member.name!r}, which lies outside its folder or is a "
                        f"link: do not trust it; give the official {_archive_name(name)}."
                    )
                file = parts[-1] if parts else ""
                if parts[:-1] == (release.folder,) and file in needed and member.isfile():
                    contents = archive.extractfile(member).read()
                    if len(contents) != member.size:
                        raise EOFError(f"{member.name} ends early")
                    members[file] = contents
            # The checksum stands behind the last byte, which tarfile has no need to read.
            while stream.read(1 << 20):
                pass
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise UserError(
            f"the archive {path} is cut short or damaged ({_first_line(error)}): get {_archive_name(name)} again."
        ) from error
    if missing := sorted(needed - set(members)):
        raise UserError(
            f"the archive {path} has no {release.folder}/{missing[0]}: give the official {_archive_name(name)}, the "
            "binary version."
        )
    return members


def _records(name: str, path: pathlib.Path, members: dict[str, bytes]) -> dict[str, dict[str, np.ndarray]]:
    """Return split -> arrays of the official records: one byte a label, then the pixels channel by channel."""
    release = RELEASES[name]
    splits = {}
    for split, files in release.files.items():
        width = len(release.label_files) + _PIXELS
        for file in files:
            if len(members[file]) % width:
                raise UserError(
                    f"{file} in {path} has {len(members[file])} bytes, which is no multiple of a record's {width}: get "
                    f"{_archive_name(name)} again."
                )
        rows = np.frombuffer(b"".join(members[file] for file in files), np.uint8).reshape(-1, width)
        if len(rows) == 0:
            raise UserError(f"the {split} files of {path} are empty: get {_archive_name(name)} again.")
        if len(rows) != release.sizes[split]:
            warnings.warn(
                f"{path} has {len(rows)} {split} images, the official archive {release.sizes[split]}", stacklevel=3
            )
        arrays = {key: rows[:, i] for i, key in enumerate(release.label_files)}
        for key, labels in arrays.items():
            if labels.max() >= release.num_classes[key]:
                raise UserError(f"{path} has the {key} {labels.max()}: get {_archive_name(name)} again.")
        arrays["image"] = rows[:, len(release.label_files) :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        splits[split] = arrays
    return splits


def _builder_class(tfds, name: str, path: pathlib.Path, members: dict[str, bytes]):
    """Return a builder that writes what the stock builder would write, but needs no TensorFlow to do so."""
    from PIL import Image

    release = RELEASES[name]
    splits = _records(name, path, members)
    names = {}
    for key, file in release.label_files.items():
        names[key] = [line for line in members[file].decode("utf-8", "replace").split("\n") if line]
        if len(names[key]) != release.num_classes[key]:
            raise UserError(
                f"{file} in {path} has {len(names[key])} names for {release.num_classes[key]} classes: get "
                f"{_archive_name(name)} again."
            )

    # Unregistered, because the stock builder has the same name.
    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(VERSION)

        def _info(self):
            features = {"id": tfds.features.Text(), "image": tfds.features.Image(shape=(32, 32, 3))}
            features |= {key: tfds.features.ClassLabel(names=names[key]) for key in release.label_files}
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"The official {_archive_name(name)}.",
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
                homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
            arrays = splits[split]
            for index in range(len(arrays["image"])):
                record = {key: int(arrays[key][index]) for key in release.label_files}
                # The integer key decides the order in which the images are stored.
                yield (
                    index,
                    record
                    | {
                        "id": f"{split}_{index:05d}",
                        "image": Image.fromarray(np.ascontiguousarray(arrays["image"][index])),
                    },
                )

    Builder.name = name
    return Builder


@contextlib.contextmanager
def _quiet(tfds) -> Iterator[None]:
    # The records are written in seconds; a bar per split and the names of temporary folders are noise in a log.
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
