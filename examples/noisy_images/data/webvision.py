"""Mini-WebVision: the first 50 classes of WebVision's Google subset, streamed from files.

Its labels come from web searches and are wrong for about a fifth of the images; which ones is not known.
"""

import pathlib

import numpy as np

from ..errors import UserError
from .dataset import Dataset, Source, Split, make_split
from .file_names import printable, shorten
from .image_files import ImageFiles, readable_images
from .image_tree import image_files

NUM_CLASSES = 50
IMAGE_SIZE = 224
# ImageNet's, as usual for images of this kind.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
_WHAT = "the WebVision folder, which holds info/, google/ and val_images_256/"


def load(source: Source) -> Dataset:
    """Load Mini-WebVision; it is tested on WebVision's validation images, or on ImageNet's with `validation_dir`.

    `validation_dir` has one folder per WordNet id; the position of an id in `info/synsets.txt` is its class.
    """
    root = source.path("mini_webvision", _WHAT)
    side = source.image_size or IMAGE_SIZE
    synsets = _synsets(root)
    train = _read_list(root, "info/train_filelist_google.txt", _train_folder(root), side)
    if source.validation_dir is None:
        folder = next((root / name for name in ("val_images_256", "val_images") if (root / name).is_dir()), None)
        if folder is None:
            raise UserError(
                f"{root} has no folder val_images_256: give {_WHAT}, or --validation-dir with ImageNet's folders."
            )
        test = _read_list(root, "info/val_filelist.txt", folder, side)
    else:
        test = _read_imagenet(pathlib.Path(source.validation_dir).expanduser(), root, synsets, side)

    count = len(train)
    files = ImageFiles(train.images.paths + test.images.paths, side)
    kept = readable_images(files, skip_corrupt=source.skip_corrupt, checked=root / ".readable_images.txt")
    train, test = train.take(kept[kept < count]), test.take(kept[kept >= count] - count)
    names = tuple(name for _, name in synsets) or tuple(str(label) for label in range(NUM_CLASSES))
    return Dataset("mini_webvision", train, test, names, None, MEAN, STD, crop_padding=0, flip=True)


def _synsets(root: pathlib.Path) -> list[tuple[str, str]]:
    """Return (WordNet id, name) of the classes, or nothing where the list is missing."""
    path = root / "info" / "synsets.txt"
    if not path.is_file():
        return []
    lines = [line.split(maxsplit=1) for line in _lines(path) if line.strip()]
    if len(lines) < NUM_CLASSES:
        raise UserError(
            f"{path} has {len(lines)} classes where at least {NUM_CLASSES} are expected: download it again."
        )
    return [(line[0], line[-1].split(",")[0].strip()) for line in lines[:NUM_CLASSES]]


def _lines(path: pathlib.Path) -> list[str]:
    # A file's name that is no UTF-8 is taken as it is.
    return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()


def _train_folder(root: pathlib.Path) -> pathlib.Path:
    # The list names google/q0001/x.jpg; the smaller release of the same images has its folder named otherwise.
    return root / "google_resized_256" if not (root / "google").is_dir() else root / "google"


def _read_list(root: pathlib.Path, name: str, folder: pathlib.Path, side: int) -> Split:
    """Return the images of the first 50 classes of one list, lines of `path label`."""
    path = root / name
    if not path.is_file():
        raise UserError(f"{root} has no {name}: give {_WHAT}.")
    files, labels, index = [], [], []
    for position, line in enumerate(_lines(path)):
        if not line.strip():
            continue
        file, _, label = line.strip().rpartition(" ")
        if not file or not label.isdecimal() or file.startswith("/") or ".." in pathlib.PurePosixPath(file).parts:
            raise UserError(f"line {position + 1} of {path} is {line!r}, not `path label`: download it again.")
        if int(label) < NUM_CLASSES:
            files.append(str(folder / file.removeprefix("google/")))
            labels.append(int(label))
            index.append(position)
    if not files:
        raise UserError(f"{path} names no image of the first {NUM_CLASSES} classes: download it again.")
    ids = tuple(printable(pathlib.PurePath(file).relative_to(root).as_posix()) for file in files)
    return make_split(ImageFiles(tuple(files), side), np.asarray(labels), clean=False, index=index, ids=ids)


def _read_imagenet(folder: pathlib.Path, root: pathlib.Path, synsets: list[tuple[str, str]], side: int) -> Split:
    """Return the images of the same 50 classes from folders named by WordNet id."""
    if not synsets:
        raise UserError(f"{root} has no info/synsets.txt, which says which ImageNet class is which: give {_WHAT}.")
    if not folder.is_dir():
        raise UserError(f"--validation-dir {str(folder)!r} does not exist: give ImageNet's validation folders.")
    if missing := [wnid for wnid, _ in synsets if not (folder / wnid).is_dir()]:
        raise UserError(
            f"{folder} has no folder for {len(missing)} of {NUM_CLASSES} classes ({shorten(missing)}): give ImageNet's "
            "validation images in one folder per WordNet id."
        )
    files, labels = [], []
    for label, (wnid, _) in enumerate(synsets):
        found = image_files(folder / wnid)
        files += found
        labels += [label] * len(found)
    if not files:
        raise UserError(f"{folder} has no images: give ImageNet's validation folders.")
    ids = tuple(printable(pathlib.PurePath(file).relative_to(folder).as_posix()) for file in files)
    return make_split(ImageFiles(tuple(files), side), np.asarray(labels), clean=True, ids=ids)
