"""CIFAR-10N and CIFAR-100N: the labels that people gave, from the files that their authors publish.

The files are made by `torch.save`, which is a pickle, and a pickle can run any code. They are read without PyTorch by
an unpickler that knows nothing but NumPy arrays: every global of the pickle is replaced by a stand-in that checks its
arguments, and a global that has none is an error.
"""

import io
import os
import pathlib
import pickle
import re
import zipfile

import numpy as np

from ..data.dataset import Split
from ..errors import UserError, unknown_name

DEFAULT_LABEL_SETS = {"cifar10": "worse_label", "cifar100": "noisy_label"}

# What torch.save writes first in its older format, which is no zip but several pickles one after another.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_SOURCE = "https://github.com/UCSC-REAL/cifar-10-100n"


def human_labels(path: str | os.PathLike, label_set: str, split: Split) -> np.ndarray:
    """Return the human label of every sample of a training split, int32.

    Samples are joined by their index in the official order, so a subset of the training set has the labels of its
    own samples.

    Args:
      path: `CIFAR-10_human.pt` or `CIFAR-100_human.pt` as published, or their arrays by name as an .npz.
      label_set: `worse_label`, `aggre_label` or `random_label1` to `3` (CIFAR-10N); `noisy_label` (CIFAR-100N).
      split: The training split, with clean labels.

    Raises:
      UserError: The label set does not exist, or the file's clean labels are not those of the split.
    """
    sets = read_human_labels(path)
    if "clean_label" not in sets:
        raise UserError(f"{path} has no 'clean_label' to check the data against: download it again from {_SOURCE}.")
    choices = [name for name in sets if "clean" not in name and "coarse" not in name]
    if label_set not in choices:
        raise unknown_name("label set", label_set, choices)
    clean, labels = sets["clean_label"], sets[label_set]
    if clean.ndim != 1 or labels.shape != clean.shape or clean.dtype.kind not in "iu" or labels.dtype.kind not in "iu":
        raise UserError(f"the label sets of {path} are not integers of one length: download it again from {_SOURCE}.")
    if split.clean_labels is None:
        raise UserError(f"human labels of {path} need a data set with known clean labels: use cifar10 or cifar100.")
    if len(split) and split.index.max() >= len(clean):
        raise UserError(
            f"{path} has labels for {len(clean)} images but the data has an image {split.index.max()}: use the file of "
            "this data set."
        )
    if len(split) and np.array_equal(clean[split.index] - 1, split.clean_labels):
        raise UserError(f"the labels of {path} count from 1 and those of the data from 0: subtract 1 from all of them.")
    differing = int((clean[split.index] != split.clean_labels).sum())
    if differing:
        raise UserError(
            f"{differing} of {len(split)} clean labels of {path} differ from those of the data: use the file of this "
            "data set."
        )
    if labels.min() < 0 or labels.max() > clean.max():
        raise UserError(f"{label_set} of {path} has labels outside 0 to {clean.max()}: download it from {_SOURCE}.")
    return labels[split.index].astype(np.int32)


def read_human_labels(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Return name -> array for every label set of a `.pt` or `.npz` file.

    Raises:
      UserError: The file is missing or damaged, or its pickle asks for anything but NumPy arrays and plain values.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"the label file {str(path)!r} does not exist: download it from {_SOURCE}.")
    with open(path, "rb") as file:
        magic = file.read(6)
    if magic == b"\x93NUMPY":
        # The authors' .npy files are pickles too, in the order in which TensorFlow Datasets stores the images.
        raise UserError(
            f"{path} is a .npy file, whose labels are not in the official order: give CIFAR-10_human.pt or "
            f"CIFAR-100_human.pt from {_SOURCE}."
        )
    try:
        content = _unpickle(path)
    except _ForbiddenError as error:
        raise UserError(
            f"{path} asks for {error}, which has no place in a file of labels: do not trust it; download it from "
            f"{_SOURCE}."
        ) from error
    # A damaged pickle raises whatever its next instruction meets.
    except Exception as error:
        raise UserError(
            f"cannot read the label file {path} ({type(error).__name__}: {error}): download it from {_SOURCE}."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold label sets by name: download it from {_SOURCE}.")
    return {str(name): _as_array(path, name, value) for name, value in content.items()}


def _as_array(path: pathlib.Path, name, value) -> np.ndarray:
    if isinstance(value, _Array):
        value = value.array
    try:
        array = np.asarray(value)
    except ValueError:
        array = None
    if array is None or array.dtype.kind not in "biuf":
        raise UserError(f"{name!r} of {path} is no array of numbers: download it from {_SOURCE}.")
    return array


def _unpickle(path: pathlib.Path):
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if all(name.endswith(".npy") for name in archive.namelist()):
                with np.load(path, allow_pickle=False) as arrays:
                    return dict(arrays)
            pickles = [name for name in archive.namelist() if name.split("/")[-1] == "data.pkl"]
            if len(pickles) != 1:
                raise ValueError(f"{len(pickles)} files named data.pkl")
            return _Unpickler(io.BytesIO(archive.read(pickles[0]))).load()
    stream = io.BytesIO(path.read_bytes())
    content = _Unpickler(stream).load()
    if content == _LEGACY_MAGIC:
        for _ in ("protocol version", "system", "content"):
            content = _Unpickler(stream).load()
    return content


class _ForbiddenError(Exception):
    """A global that the file has no need of."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise _ForbiddenError(f"{module}.{name}") from None

    def persistent_load(self, persistent_id):
        raise _ForbiddenError("a torch tensor")


# The stand-ins have no attributes that a pickle could set, and make nothing but the three classes below. In
# particular, no state from the file reaches NumPy's own __setstate__.


class _Dtype:
    """A dtype of plain numbers."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype

    def __setstate__(self, state):
        order = state[1]
        if order not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise ValueError(f"the dtype state {state!r}")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """An array that gets its contents from its state."""

    __slots__ = ("array",)

    def __init__(self, array: np.ndarray | None = None):
        self.array = array

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        self.array = _make_array(data, dtype, shape, "F" if fortran else "C")


def _make_array(data, dtype, shape, order) -> np.ndarray:
    if not isinstance(data, (bytes, bytearray)) or not isinstance(dtype, _Dtype):
        raise ValueError("an array of other things than numbers")
    return np.frombuffer(bytes(data), dtype.dtype).reshape(shape, order=order).astype(dtype.dtype.newbyteorder("="))


class _NdarrayType:
    __slots__ = ()


class _MakeDtype:
    __slots__ = ()

    def __call__(self, name, align=False, copy=False):
        if not isinstance(name, str) or not re.fullmatch(r"[<>|=]?(b1|[iu][1248]|f[248])", name):
            raise ValueError(f"the dtype {name!r}")
        return _Dtype(np.dtype(name))


class _Reconstruct:
    __slots__ = ()

    def __call__(self, subtype, shape, typecode):
        if not isinstance(subtype, _NdarrayType):
            raise ValueError("an array of another class than numpy.ndarray")
        return _Array()


class _FromBuffer:
    __slots__ = ()

    def __call__(self, data, dtype, shape, order):
        return _Array(_make_array(data, dtype, shape, order))


class _Scalar:
    __slots__ = ()

    def __call__(self, dtype, data):
        return _make_array(data, dtype, (), "C").item()


class _Encode:
    __slots__ = ()

    def __call__(self, text, encoding="latin1"):
        # Protocol 2 has no bytes: they come as text in this encoding, and a decompressing codec is not wanted.
        if not isinstance(text, str) or encoding != "latin1":
            raise ValueError(f"the encoding {encoding!r}")
        return text.encode("latin1")


_STAND_INS = {
    ("numpy", "ndarray"): _NdarrayType(),
    ("numpy", "dtype"): _MakeDtype(),
    ("_codecs", "encode"): _Encode(),
    # Their home is numpy.core in NumPy 1 and numpy._core in NumPy 2; a file names the one that wrote it.
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", _Reconstruct()),
            ("multiarray", "scalar", _Scalar()),
            ("numeric", "_frombuffer", _FromBuffer()),
        )
    },
}
