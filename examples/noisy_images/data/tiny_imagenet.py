"""Tiny-ImageNet: 200 classes of 64x64 images, from the official folder or zip, decoded into memory."""

import collections
import os
import pathlib
import re
import zipfile

import numpy as np

from ..errors import UserError
from .dataset import Dataset, Source, make_split
from .file_names import shorten
from .image_files import ImageFiles, decode_images
from .image_tree import hidden

MEAN = (0.4802, 0.4481, 0.3975)
STD = (0.2302, 0.2265, 0.2262)
CROP_PADDING = 8
SIDE = 64
_FOLDER = "tiny-imagenet-200"
_WHAT = f"the folder {_FOLDER}, the folder that holds it, or {_FOLDER}.zip"


def load(source: Source) -> Dataset:
    """Load Tiny-ImageNet; the official validation images are the test split, for the test images have no labels.

    Classes are numbered in the alphabetical order of their WordNet ids, which is what an image-folder reader does.
    Grey images become three equal channels.
    """
    tree = _open_tree(source.path("tiny_imagenet", _WHAT))
    wnids = sorted(tree.read_text("wnids.txt").split())
    number = {wnid: label for label, wnid in enumerate(wnids)}
    words = dict(line.split("\t", 1) for line in tree.read_text("words.txt").splitlines() if "\t" in line)

    train_files, train_labels = [], []
    by_class = tree.train_images()
    if missing := [wnid for wnid in wnids if not by_class.get(wnid)]:
        raise UserError(
            f"{tree.path} has no training images for {len(missing)} of {len(wnids)} classes ({shorten(missing)}): "
            "unpack the archive again."
        )
    for wnid in wnids:
        # n01443537_2 before n01443537_10.
        files = sorted(by_class[wnid], key=lambda name: [int(n) for n in re.findall(r"\d+", os.path.basename(name))])
        train_files += files
        train_labels += [number[wnid]] * len(files)

    test_files, test_labels = [], []
    for line in tree.read_text("val/val_annotations.txt").splitlines():
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in number:
            raise UserError(f"{tree.path} has the line {line!r} in val_annotations.txt: unpack the archive again.")
        test_files.append(tree.name(f"val/images/{fields[0]}"))
        test_labels.append(number[fields[1]])
    if absent := [name for name in test_files if not tree.exists(name)]:
        raise UserError(
            f"{len(absent)} of {len(test_files)} validation images of {tree.path} are missing ({shorten(absent)}): "
            "unpack the archive again."
        )

    # Together, so that an error counts the corrupt images of both.
    files = ImageFiles(tuple(train_files + test_files), SIDE, tree.archive)
    images, kept = decode_images(files, skip_corrupt=source.skip_corrupt, side=SIDE)
    labels = np.asarray(train_labels + test_labels, np.int32)[kept]
    count = int(np.searchsorted(kept, len(train_files)))
    ids = tuple(tree.identity(files.paths[i]) for i in kept)
    return Dataset(
        name="tiny_imagenet",
        train=make_split(images[:count], labels[:count], clean=True, index=kept[:count], ids=ids[:count]),
        test=make_split(
            images[count:], labels[count:], clean=True, index=kept[count:] - len(train_files), ids=ids[count:]
        ),
        class_names=tuple(words.get(wnid, wnid).split(",")[0] for wnid in wnids),
        superclasses=None,
        mean=MEAN,
        std=STD,
        crop_padding=CROP_PADDING,
        flip=True,
    )


class _FolderTree:
    """The official layout as a folder."""

    archive = None

    def __init__(self, path: pathlib.Path):
        self.path = path

    def name(self, relative: str) -> str:
        return str(self.path / relative)

    def identity(self, name: str) -> str:
        return pathlib.PurePath(name).relative_to(self.path).as_posix()

    def exists(self, name: str) -> bool:
        return os.path.isfile(name)

    def read_text(self, relative: str) -> str:
        try:
            return (self.path / relative).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self.path} has no {relative}: unpack the archive again.") from error

    def train_images(self) -> dict[str, list[str]]:
        """Return WordNet id -> the paths of its training images."""
        found = {}
        train = self.path / "train"
        for wnid in os.listdir(train) if train.is_dir() else []:
            folder = train / wnid / "images"
            if folder.is_dir():
                names = (name for name in os.listdir(folder) if name.endswith(".JPEG") and not hidden(name))
                found[wnid] = [str(folder / name) for name in names]
        return found


class _ZipTree:
    """The official layout inside its zip."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.archive = str(path)
        try:
            with zipfile.ZipFile(path) as archive:
                self.names = archive.namelist()
                self.texts = {
                    name: archive.read(name).decode()
                    for name in self.names
                    if name.endswith(".txt") and "box" not in name
                }
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is cut short or damaged ({error}): download it again.") from error
        self.members = set(self.names)

    def name(self, relative: str) -> str:
        return f"{_FOLDER}/{relative}"

    def identity(self, name: str) -> str:
        return name.removeprefix(f"{_FOLDER}/")

    def exists(self, name: str) -> bool:
        return name in self.members

    def read_text(self, relative: str) -> str:
        try:
            return self.texts[self.name(relative)]
        except KeyError:
            raise UserError(f"{self.path} has no {self.name(relative)}: download it again.") from None

    def train_images(self) -> dict[str, list[str]]:
        """Return WordNet id -> the member names of its training images."""
        found = collections.defaultdict(list)
        for name in self.names:
            parts = name.split("/")
            if (
                len(parts) == 5
                and parts[:2] == [_FOLDER, "train"]
                and parts[3] == "images"
                and parts[4]
                and not hidden(parts[4])
            ):
                found[parts[2]].append(name)
        return found


def _open_tree(path: pathlib.Path) -> _FolderTree | _ZipTree:
    if path.is_file():
        return _ZipTree(path)
    for folder in (path, path / _FOLDER):
        if (folder / "wnids.txt").is_file():
            return _FolderTree(folder)
    if (path / f"{_FOLDER}.zip").is_file():
        return _ZipTree(path / f"{_FOLDER}.zip")
    raise UserError(f"{path} is not Tiny-ImageNet, it has no wnids.txt: give {_WHAT}.")
