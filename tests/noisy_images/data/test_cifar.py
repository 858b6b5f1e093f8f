"""CIFAR through TensorFlow Datasets, without TensorFlow, on small archives in the official layout."""

import dataclasses
import functools
import http.server
import io
import os
import shutil
import sys
import tarfile
import threading

import numpy as np
import pytest

from examples.noisy_images import data
from examples.noisy_images.data import cifar
from examples.noisy_images.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.* images, the official archive")


@dataclasses.dataclass
class _Original:
    """What goes into an archive: the images and labels in the official order."""

    images: dict[str, np.ndarray]
    labels: dict[str, dict[str, np.ndarray]]
    files: dict[str, bytes]


def _original(name, sizes=None):
    sizes = sizes or {"train": 60, "test": 20}
    release = cifar.RELEASES[name]
    rng = np.random.default_rng(len(name))
    superclass = rng.permutation(np.arange(100) % 20)
    images, labels, files = {}, {}, {}
    for split, size in sizes.items():
        images[split] = rng.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)
        label = rng.permutation(np.arange(size) % release.num_classes["label"])
        labels[split] = {"label": label}
        if "coarse_label" in release.label_files:
            labels[split] = {"coarse_label": superclass[label], "label": label}
        columns = [labels[split][key].astype(np.uint8)[:, None] for key in release.label_files]
        rows = np.concatenate([*columns, images[split].transpose(0, 3, 1, 2).reshape(size, -1)], axis=1)
        for file, part in zip(release.files[split], np.array_split(rows, len(release.files[split])), strict=True):
            files[file] = part.tobytes()
    for key, file in release.label_files.items():
        files[file] = ("\n".join(f"{key} {i}" for i in range(release.num_classes[key])) + "\n").encode()
    return _Original(images, labels, files)


def _write_archive(path, name, files, extra=()):
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for file, contents in files.items():
            info = tarfile.TarInfo(f"{cifar.RELEASES[name].folder}/{file}")
            info.size = len(contents)
            archive.addfile(info, io.BytesIO(contents))
        for info in extra:
            archive.addfile(info)
    return path


@pytest.fixture(scope="module")
def prepare_once(tmp_path_factory):
    """A function from a name to a data folder that is prepared once and must not be changed."""

    @functools.cache
    def prepare(name):
        folder = tmp_path_factory.mktemp("tfds")
        original = _original(name)
        archive = _write_archive(folder / "archive.tar.gz", name, original.files)
        return folder / "data", cifar.prepare(name, folder / "data", archive), original

    return prepare


@pytest.fixture(params=["cifar10", "cifar100"])
def prepared(request, prepare_once):
    return request.param, *prepare_once(request.param)


@pytest.fixture
def copied(prepare_once, tmp_path):
    """A copy of a prepared CIFAR-10 folder to damage."""
    folder, version, original = prepare_once("cifar10")
    shutil.copytree(folder, tmp_path / "data")
    return tmp_path / "data", tmp_path / "data" / version.relative_to(folder), original


def _check(loaded, original):
    for split in ("train", "test"):
        samples = getattr(loaded, split)
        np.testing.assert_array_equal(samples.images, original.images[split])
        np.testing.assert_array_equal(samples.labels, original.labels[split]["label"])
        np.testing.assert_array_equal(samples.clean_labels, samples.labels)
        np.testing.assert_array_equal(samples.index, np.arange(len(samples)))
        assert samples.labels.dtype == np.int32 and samples.images.dtype == np.uint8


def test_the_official_order_comes_back(prepared):
    name, folder, version, original = prepared
    assert version == folder / name / "3.0.2"
    assert os.listdir(folder / name) == ["3.0.2"]
    (version / "decoded.npz").unlink()
    for _ in ("decoded", "cached"):
        loaded = data.load(name, data_dir=folder)
        _check(loaded, original)
    assert (version / "decoded.npz").is_file()
    assert loaded.class_names[3] == "label 3"
    assert loaded.mean == (0.4914, 0.4822, 0.4465) and loaded.std == (0.2023, 0.1994, 0.2010)
    assert (loaded.crop_padding, loaded.flip) == (4, True)
    assert "tensorflow" not in sys.modules


def test_superclasses_are_deduced(prepared):
    name, folder, _, original = prepared
    superclasses = data.load(name, data_dir=folder).superclasses
    if name == "cifar10":
        assert superclasses is None
    else:
        labels = original.labels["train"]
        np.testing.assert_array_equal(superclasses[labels["label"]], labels["coarse_label"])


def test_the_stock_reader_reads_it(prepared):
    import tensorflow_datasets as tfds

    name, folder, _, original = prepared
    assert str(tfds.builder_cls(name).VERSION) == cifar.VERSION
    source = tfds.data_source(name, data_dir=folder, split="train", download=False)
    indices = [int(record["id"].decode().removeprefix("train_")) for record in source]
    assert sorted(indices) == list(range(60)) and indices != sorted(indices)
    for record, index in zip(source, indices, strict=True):
        np.testing.assert_array_equal(record["image"], original.images["train"][index])
        for key, labels in original.labels["train"].items():
            assert record[key] == labels[index]
    assert "tensorflow" not in sys.modules


def test_a_second_start_needs_no_tensorflow_datasets(copied, monkeypatch):
    folder, version, original = copied
    monkeypatch.setattr(cifar, "_import_tfds", lambda: pytest.fail("TensorFlow Datasets was imported"))
    _check(data.load("cifar10", data_dir=folder), original)
    # Not even the prepared files.
    for path in version.iterdir():
        if path.name != "decoded.npz":
            path.unlink()
    _check(data.load("cifar10", data_dir=folder), original)


def test_a_cache_of_other_or_damaged_contents_is_not_used(copied):
    folder, version, original = copied
    cache = version / "decoded.npz"
    with np.load(cache) as archive:
        arrays = dict(archive)
    np.savez(cache, **arrays | {"fingerprint": np.array("other"), "train_image": arrays["train_image"] * 0})
    _check(data.load("cifar10", data_dir=folder), original)
    cache.write_bytes(cache.read_bytes()[:1000])
    _check(data.load("cifar10", data_dir=folder), original)


def test_prepare_again_changes_nothing(copied, monkeypatch):
    folder, version, _ = copied
    before = {path.name: path.stat().st_mtime_ns for path in version.iterdir()}
    monkeypatch.setattr(cifar, "_import_tfds", lambda: pytest.fail("prepared again"))
    assert cifar.prepare("cifar10", folder) == version
    assert before == {path.name: path.stat().st_mtime_ns for path in version.iterdir()}


def test_missing_half_prepared_and_other_versions(copied, tmp_path):
    folder, version, original = copied
    run = r"run `python -m examples\.noisy_images prepare --dataset cifar10 --data-dir .* \[--archive FILE\]`"
    with pytest.raises(UserError, match=f"cifar10 is not in .*empty: {run}"):
        data.load("cifar10", data_dir=tmp_path / "empty")
    (version / "decoded.npz").unlink()

    (version / "dataset_info.json").rename(tmp_path / "kept.json")
    with pytest.raises(UserError, match=f"is only half prepared: {run}"):
        data.load("cifar10", data_dir=folder)
    # Preparing puts it right.
    archive = _write_archive(tmp_path / "a.tar.gz", "cifar10", original.files)
    cifar.prepare("cifar10", folder, archive)
    _check(data.load("cifar10", data_dir=folder), original)
    assert os.listdir(version.parent) == ["3.0.2"]

    (version / "decoded.npz").unlink()
    for path in version.glob("*.array_record*"):
        path.rename(str(path).replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="holds tfrecord files, which need TensorFlow: choose another --data-dir"):
        data.load("cifar10", data_dir=folder)
    with pytest.raises(UserError, match="as tfrecord files"):
        cifar.prepare("cifar10", folder, archive)

    version.rename(version.parent / "3.0.1")
    with pytest.raises(UserError, match=rf"holds version 3\.0\.1 of cifar10, not 3\.0\.2: {run}"):
        data.load("cifar10", data_dir=folder)


def test_damaged_records(copied):
    folder, version, _ = copied
    (version / "decoded.npz").unlink()
    record = next(version.glob("*train.array_record*"))
    whole = record.read_bytes()
    for contents in (whole[: len(whole) // 2], b""):
        record.write_bytes(contents)
        with pytest.raises(UserError, match=r"cannot read .*remove it and run `python -m"):
            data.load("cifar10", data_dir=folder)
    record.unlink()
    with pytest.raises(UserError, match=r"cannot read .*remove it and run `python -m"):
        data.load("cifar10", data_dir=folder)


def _member(name, kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "member",
    [
        _member("../escaped.txt"),
        _member("cifar-10-batches-bin/../../escaped.txt"),
        _member("/tmp/escaped.txt"),
        _member("cifar-10-batches-bin/link", tarfile.SYMTYPE, "/etc/passwd"),
        _member("cifar-10-batches-bin/link", tarfile.LNKTYPE, "../../x"),
        _member("cifar-10-batches-bin/device", tarfile.CHRTYPE),
    ],
    ids=lambda member: f"{member.name}-{member.type}",
)
def test_an_archive_with_members_outside_its_folder(tmp_path, member):
    archive = _write_archive(tmp_path / "a.tar.gz", "cifar10", _original("cifar10").files, [member])
    with pytest.raises(UserError, match="outside its folder or is a link"):
        cifar.prepare("cifar10", tmp_path / "data", archive)
    assert not any(files for _, _, files in os.walk(tmp_path / "data"))
    assert sorted(os.listdir(tmp_path)) == ["a.tar.gz", "data"]


def test_archives_cut_short_or_of_another_kind(tmp_path):
    original = _original("cifar10")
    archive = _write_archive(tmp_path / "a.tar.gz", "cifar10", original.files)
    whole = archive.read_bytes()

    def refuse(contents, message):
        archive.write_bytes(contents)
        with pytest.raises(UserError, match=message):
            cifar.prepare("cifar10", tmp_path / "data", archive)
        assert os.listdir(tmp_path / "data" / "cifar10") == []

    for share in (0.1, 0.5, 0.99):
        refuse(whole[: int(share * len(whole))], "is cut short or damaged")
    refuse(whole[:1000] + bytes(100) + whole[1100:], "is cut short or damaged")
    refuse(b"", "is cut short or damaged")
    refuse(b"not an archive", "is cut short or damaged")

    def refuse_files(files, message):
        _write_archive(archive, "cifar10", original.files | files)
        refuse(archive.read_bytes(), message)

    refuse_files({"data_batch_3.bin": original.files["data_batch_3.bin"][:-1]}, "no multiple of a record's 3073")
    refuse_files({"data_batch_3.bin": b"\x0a" + original.files["data_batch_3.bin"][1:]}, "has the label 10")
    refuse_files({"test_batch.bin": b""}, "test files of .* are empty")
    refuse_files({"batches.meta.txt": b"one\ntwo\n"}, "has 2 names for 10 classes")
    del original.files["data_batch_5.bin"]
    refuse_files({}, "has no cifar-10-batches-bin/data_batch_5.bin")
    with pytest.raises(UserError, match="does not exist"):
        cifar.prepare("cifar10", tmp_path / "data", tmp_path / "none.tar.gz")


def test_contradicting_coarse_labels(tmp_path):
    original = _original("cifar100", {"train": 300, "test": 20})
    rows = np.frombuffer(original.files["train.bin"], np.uint8).reshape(300, -1).copy()
    rows[0, 0] = (rows[0, 0] + 1) % 20
    archive = _write_archive(tmp_path / "a.tar.gz", "cifar100", original.files | {"train.bin": rows.tobytes()})
    with pytest.raises(UserError, match="contradict each other"):
        cifar.prepare("cifar100", tmp_path / "data", archive)


def test_a_smaller_archive_is_mentioned(tmp_path):
    archive = _write_archive(tmp_path / "a.tar.gz", "cifar10", _original("cifar10").files)
    with pytest.warns(UserWarning, match="has 60 train images, the official archive 50000"):
        cifar._records("cifar10", archive, cifar._read_archive("cifar10", archive))


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "served")
    handler.func.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield tmp_path / "served", f"http://127.0.0.1:{running.server_port}/cifar-10-binary.tar.gz"
        running.shutdown()


def test_download(server, tmp_path, monkeypatch):
    folder, url = server
    monkeypatch.setitem(cifar.RELEASES, "cifar10", dataclasses.replace(cifar.RELEASES["cifar10"], url=url))
    with pytest.raises(UserError, match=r"cannot download http://.*404.*--archive"):
        cifar.prepare("cifar10", tmp_path / "data")
    assert os.listdir(tmp_path / "data" / "cifar10") == []

    original = _original("cifar10")
    _write_archive(folder / "cifar-10-binary.tar.gz", "cifar10", original.files)
    cifar.prepare("cifar10", tmp_path / "data")
    _check(data.load("cifar10", data_dir=tmp_path / "data"), original)
    assert os.listdir(tmp_path / "data") == ["cifar10"] and os.listdir(tmp_path / "data" / "cifar10") == ["3.0.2"]
    assert "tensorflow" not in sys.modules
