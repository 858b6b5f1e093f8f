"""Which sample is which, and whether it is the same."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from examples.noisy_images import data
from examples.noisy_images.data import dataset, file_names
from examples.noisy_images.data.dataset import make_split
from examples.noisy_images.data.image_files import ImageFiles
from examples.noisy_images.errors import UserError


def _npz(tmp_path, **change):
    images = np.random.default_rng(0).integers(0, 256, (30, 5, 4), np.uint8)
    arrays = {"images": images, "labels": np.arange(30) % 3, "test_images": images[:6], "test_labels": np.arange(6) % 3}
    np.savez(tmp_path / "own.npz", **arrays | change)
    return data.load("npz", data_dir=tmp_path / "own.npz")


def _tree(root):
    rng = np.random.default_rng(3)
    for split, count in (("train", 8), ("test", 3)):
        for name in ("moth", "wasp"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (6, 6, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def test_identities_are_paths_ids_or_indices(tmp_path):
    loaded = data.load("folder", data_dir=_tree(tmp_path / "tree"))
    assert data.identities(loaded.train)[:2] == ["train/moth/0.png", "train/moth/1.png"]
    assert data.identities(loaded.test)[-1] == "test/wasp/2.png"
    assert data.identities(loaded.train.take(np.array([3, 0]))) == ["train/moth/3.png", "train/moth/0.png"]
    split = make_split(np.zeros((3, 2, 2, 1), np.uint8), [0, 1, 0], clean=False, index=[7, 1, 12])
    assert data.identities(split) == ["7", "1", "12"]
    assert data.identities(dataclasses.replace(split, ids=("a", "b", "c"))) == ["a", "b", "c"]


def test_fingerprints_are_of_the_content_alone():
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), np.uint8)
    split = make_split(images, np.arange(9) % 3, clean=False)
    values = data.fingerprints(split)
    assert len(set(values)) == 9 and all(len(value) == 16 and int(value, 16) >= 0 for value in values)
    order = np.random.default_rng(1).permutation(9)
    moved = make_split(images[order], np.zeros(9), clean=True, index=order)
    assert data.fingerprints(moved) == [values[i] for i in order]
    assert data.fingerprints(split.take(np.array([5, 2]))) == [values[5], values[2]]
    other = images.copy()
    other[4, 0, 0, 0] ^= 1
    changed = data.fingerprints(make_split(other, np.arange(9) % 3, clean=False))
    assert [a != b for a, b in zip(values, changed, strict=True)] == [i == 4 for i in range(9)]
    # The same numbers in another shape or type are another sample.
    assert data.fingerprints(make_split(images.reshape(9, 2, 8, 3), np.zeros(9), clean=False))[0] != values[0]


def test_the_content_of_a_file_is_its_bytes_in_memory_streamed_and_zipped(tmp_path):
    root = _tree(tmp_path / "tree")
    in_memory, streamed = (data.load("folder", data_dir=root, image_size=size) for size in (None, 4))
    assert streamed.train.streamed and not in_memory.train.streamed
    assert data.fingerprints(in_memory.train) == data.fingerprints(streamed.train)
    shutil.make_archive(str(tmp_path / "tree"), "zip", root)
    names = tuple(data.identities(in_memory.train))
    zipped = make_split(ImageFiles(names, 4, str(tmp_path / "tree.zip")), in_memory.train.labels, clean=False)
    assert data.fingerprints(zipped) == data.fingerprints(in_memory.train)


def test_the_cache_is_believed_for_no_file_that_was_written_to(tmp_path):
    root = _tree(tmp_path / "tree")
    split, cache = data.load("folder", data_dir=root).train, tmp_path / "contents.npz"
    first = data.fingerprints(split, cache)
    assert data.fingerprints(split, cache) == first == data.fingerprints(split)
    # As large as before and, to look at, as old.
    path = root / "train" / "moth" / "3.png"
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[-20] ^= 255
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert [a != b for a, b in zip(first, data.fingerprints(split, cache), strict=True)] == [i == 3 for i in range(16)]
    cache.write_bytes(b"damaged")
    assert data.fingerprints(split, cache) == data.fingerprints(split)


def test_the_cache_spares_the_reading(tmp_path, monkeypatch):
    split, cache = data.load("folder", data_dir=_tree(tmp_path / "tree")).train, tmp_path / "contents.npz"
    first = data.fingerprints(split, cache)
    monkeypatch.setattr(ImageFiles, "read", lambda *_: pytest.fail("a file was read again"))
    assert data.fingerprints(split, cache) == first


def test_the_same_samples_pass_in_any_order_from_any_place(tmp_path):
    loaded = data.load("folder", data_dir=_tree(tmp_path / "tree"))
    stored = json.loads(json.dumps(data.fingerprint(loaded)))
    assert stored["splits"]["train"]["samples"] == 16
    data.check_same_samples(stored, loaded)
    order = np.random.default_rng(0).permutation(16)
    data.check_same_samples(stored, dataclasses.replace(loaded, train=loaded.train.take(order)))
    os.rename(tmp_path / "tree", tmp_path / "elsewhere")
    data.check_same_samples(stored, data.load("folder", data_dir=tmp_path / "elsewhere"))


def test_what_has_changed_in_a_folder_is_named(tmp_path):
    root = _tree(tmp_path / "tree")
    stored = data.fingerprint(data.load("folder", data_dir=root))
    (root / "train" / "moth" / "0.png").unlink()
    shutil.copy(root / "train" / "wasp" / "1.png", root / "train" / "wasp" / "new.png")
    for i in range(4, 8):
        shutil.copy(root / "train" / "wasp" / "0.png", root / "train" / "wasp" / f"{i}.png")
    (root / "test" / "moth" / "1.png").unlink()
    with pytest.raises(UserError) as raised:
        data.check_same_samples(stored, data.load("folder", data_dir=root))
    said = str(raised.value)
    assert "1 sample is new (train/wasp/new.png) in the train set" in said
    assert "1 sample is gone (train/moth/0.png) in the train set" in said
    assert "4 samples are changed (train/wasp/4.png, train/wasp/5.png, train/wasp/6.png and 1 more)" in said
    assert "1 sample is gone (test/moth/1.png) in the test set" in said and "\n" not in said
    shutil.rmtree(root)
    data.check_same_samples(stored, data.load("folder", data_dir=_tree(root)))


def test_what_has_changed_in_arrays_is_named(tmp_path):
    loaded = _npz(tmp_path)
    stored = data.fingerprint(loaded)
    labels = loaded.train.labels.copy()
    labels[[4, 9]] = (labels[[4, 9]] + 1) % 3
    with pytest.raises(UserError, match=r"2 samples are labelled otherwise \(4, 9\) in the train set"):
        data.check_same_samples(stored, _npz(tmp_path, labels=labels))
    images = loaded.train.images[..., 0].copy()
    images[11] = 0
    with pytest.raises(UserError, match=r"1 sample is changed \(11\) in the train set"):
        data.check_same_samples(stored, _npz(tmp_path, images=images))
    with pytest.raises(UserError, match=r"1 sample is gone \(29\)"):
        data.check_same_samples(stored, _npz(tmp_path, images=images[:29], labels=loaded.train.labels[:29]))
    tested = _npz(tmp_path, test_labels=np.zeros(6, int))
    with pytest.raises(UserError, match="in the test set"):
        data.check_same_samples(stored, tested)
    data.check_same_samples(stored, tested, splits=("train",))
    with pytest.raises(UserError, match="the classes are a, b, c and were 0, 1, 2"):
        data.check_same_samples(stored, _npz(tmp_path, class_names=np.array(list("abc"))))


def test_an_added_sample_moves_no_other(tmp_path):
    names = [f"{i}.png" for i in range(40)]
    split = make_split(np.zeros((40, 1, 1, 1), np.uint8), np.zeros(40), clean=False)
    split = dataclasses.replace(split, ids=tuple(names))
    order = [names[i] for i in dataset.order_of_ids(data.identities(split), 5)]
    assert order != sorted(names) and sorted(order) == sorted(names)
    fewer = split.take(np.delete(np.arange(40), 17))
    kept = data.identities(fewer)
    assert [kept[i] for i in dataset.order_of_ids(data.identities(fewer), 5)] == [
        name for name in order if name != "17.png"
    ]
    assert [names[i] for i in dataset.order_of_ids(data.identities(split), 6)] != order


@pytest.mark.parametrize(
    "name", ["plain.png", "b\\x41.png", "\udcff\udc80.png", "a\nb\tc", "\u2028", "\\\udce9\\u000a", "\ud800", "猫.png"]
)
def test_names_are_printable_and_come_back(name):
    printed = file_names.printable(name)
    assert printed.encode() and "\n" not in printed
    assert file_names.original(printed) == name


def test_names_that_are_not_utf_8_survive(tmp_path):
    root = _tree(tmp_path / "tree")
    folder = os.fsencode(root / "train" / "moth")
    os.rename(folder + b"/0.png", folder + b"/M\xfccke.png")
    loaded = data.load("folder", data_dir=root)
    names = data.identities(loaded.train)
    assert "train/moth/M\\xfccke.png" in names
    data.check_same_samples(json.loads(json.dumps(data.fingerprint(loaded))), loaded)
    assert os.path.isfile(root / file_names.original("train/moth/M\\xfccke.png"))
