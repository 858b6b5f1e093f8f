"""Human labels from pickles, without PyTorch and without trust."""

import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

from examples.noisy_images.data.dataset import make_split
from examples.noisy_images.errors import UserError
from examples.noisy_images.labels import human_labels

_CLEAN = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9] * 3)
_WORSE = (_CLEAN + np.arange(30) % 3) % 10


def _content():
    return {"clean_label": _CLEAN, "worse_label": _WORSE, "noisy_coarse_label": [1, 2, 3]}


def _write_zip(path, content, protocol=2, data=None):
    """As torch.save writes: a zip with the pickle, its members stored."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("CIFAR-10_human/data.pkl", pickle.dumps(content, protocol) if data is None else data)
        archive.writestr("CIFAR-10_human/version", "3\n")
    return path


def _write_legacy(path, content):
    """As torch.save wrote before it wrote zips: pickles one after another, then the (here absent) storages."""
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "type_sizes": {"short": 2}}, content, []]
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in parts))
    return path


def _split():
    return make_split(np.zeros((30, 1, 1, 1), np.uint8), _CLEAN, clean=True)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_zip_of_every_protocol(tmp_path, protocol):
    sets = human_labels.read_human_labels(_write_zip(tmp_path / "a.pt", _content(), protocol))
    assert set(sets) == set(_content())
    for name, expected in _content().items():
        np.testing.assert_array_equal(sets[name], expected)
    assert sets["worse_label"].dtype == np.int64


@pytest.mark.parametrize("core", ["core", "_core"])
def test_names_of_numpy_1_and_2(tmp_path, core):
    data = pickle.dumps(_content(), 2)
    data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    data = data.replace(b"numpy.core.multiarray", f"numpy.{core}.multiarray".encode())
    sets = human_labels.read_human_labels(_write_zip(tmp_path / "a.pt", None, data=data))
    np.testing.assert_array_equal(sets["worse_label"], _WORSE)


def test_legacy_format_and_plain_pickle(tmp_path):
    for path in (_write_legacy(tmp_path / "legacy.pt", _content()), tmp_path / "plain.pt"):
        if path.name == "plain.pt":
            path.write_bytes(pickle.dumps(_content(), 2))
        np.testing.assert_array_equal(human_labels.read_human_labels(path)["worse_label"], _WORSE)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(2, 3)),
        np.array([True, False]),
        np.array([0.5, 1.5], np.float32),
        np.int64(5),
    ],
    ids=str,
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_arrays_of_all_plain_kinds(tmp_path, array, protocol):
    read = human_labels.read_human_labels(_write_zip(tmp_path / "a.pt", {"x": array}, protocol))["x"]
    np.testing.assert_array_equal(read, array)
    assert read.dtype.kind == array.dtype.kind and read.dtype.isnative


class _Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch {marker}",), "system"),
        (eval, ("1",), "eval"),
        (getattr, ("", "join"), "getattr"),
        (np.load, ("x",), "load"),
    ],
)
def test_a_global_other_than_numpy_arrays_is_refused(tmp_path, function, arguments, name):
    marker = tmp_path / "marker"
    evil = _Evil(function, *(a.format(marker=marker) for a in arguments))
    for write in (_write_zip, _write_legacy):
        with pytest.raises(UserError, match=rf"asks for .*{name}.*do not trust it"):
            human_labels.read_human_labels(write(tmp_path / "a.pt", {**_content(), "x": evil}))
    assert not marker.exists()


def test_object_arrays_tensors_and_odd_codecs_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read the label file"):
        human_labels.read_human_labels(_write_zip(tmp_path / "a.pt", {"x": np.array([None, 1])}))

    class TensorPickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage",) if isinstance(value, set) else None

    stream = io.BytesIO()
    TensorPickler(stream, 2).dump({"x": {1}})
    with pytest.raises(UserError, match="asks for a torch tensor"):
        human_labels.read_human_labels(_write_zip(tmp_path / "b.pt", None, data=stream.getvalue()))
    data = b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R."
    with pytest.raises(UserError, match="encoding 'hex'"):
        human_labels.read_human_labels(_write_zip(tmp_path / "c.pt", None, data=data))
    # The state of an admitted global cannot be replaced from inside a pickle: BUILD on numpy.dtype itself.
    data = b"\x80\x02cnumpy\ndtype\n}X\x08\x00\x00\x00__call__K\x01sb."
    with pytest.raises(UserError, match="cannot read the label file"):
        human_labels.read_human_labels(_write_zip(tmp_path / "d.pt", None, data=data))


def test_damaged_files(tmp_path):
    path = _write_zip(tmp_path / "a.pt", _content())
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="cannot read the label file"):
            human_labels.read_human_labels(path)
    with pytest.raises(UserError, match="does not exist"):
        human_labels.read_human_labels(tmp_path / "none.pt")
    with pytest.raises(UserError, match="does not hold label sets"):
        human_labels.read_human_labels(_write_zip(tmp_path / "b.pt", [1, 2]))
    with pytest.raises(UserError, match=r"'x' of .* is no array of numbers"):
        human_labels.read_human_labels(_write_zip(tmp_path / "c.pt", {"x": [[1], [2, 3]]}))
    # A shape that does not fit the bytes.
    data = pickle.dumps({"x": np.arange(3)}, 2).replace(struct.pack("<BB", 0x4B, 3) + b"\x85", b"K\x07\x85")
    with pytest.raises(UserError, match="cannot read the label file"):
        human_labels.read_human_labels(_write_zip(tmp_path / "d.pt", None, data=data))


def test_labels_join_by_index(tmp_path):
    path = _write_zip(tmp_path / "a.pt", _content())
    labels = human_labels.human_labels(path, "worse_label", _split())
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, _WORSE)
    positions = np.array([4, 29, 11])
    np.testing.assert_array_equal(
        human_labels.human_labels(path, "worse_label", _split().take(positions)), _WORSE[positions]
    )


def test_labels_of_another_data_set_are_refused(tmp_path):
    path = _write_zip(tmp_path / "a.pt", _content())
    with pytest.raises(
        UserError, match=r"unknown label set 'worse': did you mean 'worse_label'\? choose one of worse_label\."
    ):
        human_labels.human_labels(path, "worse", _split())
    other = make_split(np.zeros((30, 1, 1, 1), np.uint8), np.where(np.arange(30) < 4, 9 - _CLEAN, _CLEAN), clean=True)
    with pytest.raises(UserError, match="4 of 30 clean labels"):
        human_labels.human_labels(path, "worse_label", other)
    more = make_split(np.zeros((1, 1, 1, 1), np.uint8), [0], clean=True, index=[30])
    with pytest.raises(UserError, match="labels for 30 images but the data has an image 30"):
        human_labels.human_labels(path, "worse_label", more)
    unknown = make_split(np.zeros((30, 1, 1, 1), np.uint8), _CLEAN, clean=False)
    with pytest.raises(UserError, match="known clean labels"):
        human_labels.human_labels(path, "worse_label", unknown)
    path = _write_zip(tmp_path / "b.pt", {"worse_label": _WORSE})
    with pytest.raises(UserError, match="no 'clean_label'"):
        human_labels.human_labels(path, "worse_label", _split())
    path = _write_zip(tmp_path / "c.pt", {**_content(), "worse_label": _WORSE + 1})
    with pytest.raises(UserError, match="outside 0 to 9"):
        human_labels.human_labels(path, "worse_label", _split())


def test_default_label_sets_are_the_papers():
    assert human_labels.DEFAULT_LABEL_SETS == {"cifar10": "worse_label", "cifar100": "noisy_label"}


@pytest.mark.parametrize("content", [np.array(_content(), object), _WORSE])
def test_an_array_in_another_order_is_answered_by_what_to_give(tmp_path, content):
    # The authors' CIFAR-10_human_ordered.npy is such a pickle.
    np.save(tmp_path / "ordered.npy", content)
    with pytest.raises(UserError, match=r"is a .npy file, .* not in the official order: give CIFAR-10_human\.pt"):
        human_labels.read_human_labels(tmp_path / "ordered.npy")


def test_arrays_by_name(tmp_path):
    np.savez(tmp_path / "labels.npz", **_content())
    np.testing.assert_array_equal(human_labels.human_labels(tmp_path / "labels.npz", "worse_label", _split()), _WORSE)
    np.savez(tmp_path / "labels.npz", clean_label=np.array([None, 1]))
    with pytest.raises(UserError, match="cannot read the label file"):
        human_labels.read_human_labels(tmp_path / "labels.npz")


def test_labels_that_count_from_one_are_refused(tmp_path):
    path = _write_zip(tmp_path / "a.pt", {"clean_label": _CLEAN + 1, "worse_label": _WORSE + 1})
    with pytest.raises(UserError, match="count from 1 and those of the data from 0"):
        human_labels.human_labels(path, "worse_label", _split())
