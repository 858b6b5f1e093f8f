"""A tree of images: which folders are splits, which are classes, which files are images, and what was left out."""

import collections
import dataclasses
import os
import pathlib
import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence

from ..errors import UserError
from . import decoding
from .file_names import printable, shorten

# Hidden by their system, or left by one in folders that were copied from it.
_JUNK = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "@eadir"}
_OWN_CACHE = ".readable_images.txt"

# With or without a word for what the folder holds: training, Train, test_set, images_val, train2017.
_WORD = r"^(?:images?|imgs?|data)?(?:{})(?:images?|imgs?|data|datasets?|sets?|splits?)?$"
_ROLES = {
    "train": re.compile(_WORD.format("train|training|trn")),
    "test": re.compile(_WORD.format("test|testing|tst")),
    "validation": re.compile(_WORD.format("val|valid|validation|dev|development|eval|evaluation|holdout|heldout")),
}


@dataclasses.dataclass(frozen=True)
class ImageTree:
    """The images of a tree and their classes.

    Attributes:
      root: The folder that was given.
      class_names: The names of the class folders in alphabetical order, printable.
      train: Path and label of every training image, by class and name.
      test: Path and label of every test image; None where the tree has no test folder.
      layout: What the folders were taken for.
    """

    root: pathlib.Path
    class_names: tuple[str, ...]
    train: list[tuple[str, int]]
    test: list[tuple[str, int]] | None
    layout: str


def read(root: pathlib.Path) -> ImageTree:
    """Return the images of `ROOT/CLASS/*`, or of `ROOT/train/CLASS/*` and a test folder beside it.

    The names of the splits count in all usual spellings. Hidden files and folders are no images; sub-folders of a class
    belong to it, linked ones as well. How many files were left out is said, by reason.

    Raises:
      UserError: The folders can be read in more than one way, or are no classes of images.
    """
    left_out: collections.Counter[str] = collections.Counter()
    splits = _splits(root, left_out)
    train_root = root if splits is None else splits.train
    folders = _folders(train_root)
    if len(folders) < 2:
        raise UserError(
            f"{train_root} has {len(folders)} class folders where two or more are expected: make one per class."
            + _hint(folders)
        )
    train = _labelled(folders, [folder.name for folder in folders], left_out)
    if not train:
        raise UserError(
            f"the class folders of {train_root} hold no images (.jpg, .png and what else Pillow reads): add some."
            + (f" Left out: {_summary(left_out)}." if left_out else "")
        )
    used = {label for _, label in train}
    if empty := [printable(folder.name) for label, folder in enumerate(folders) if label not in used]:
        raise UserError(
            f"{train_root} has {len(empty)} class folders without images ({shorten(empty)}): fill or remove them."
        )
    test = None
    if splits is not None and splits.test is not None:
        names, test_folders = {folder.name for folder in folders}, _folders(splits.test)
        if unknown := [printable(folder.name) for folder in test_folders if folder.name not in names]:
            raise UserError(f"{splits.test} has classes that {train_root} lacks ({shorten(unknown)}): make them alike.")
        test = _labelled(test_folders, [folder.name for folder in folders], left_out)
    for folder in {root, train_root}:
        left_out["hidden"] += sum(hidden(path.name) and path.name != _OWN_CACHE for path in folder.iterdir())
        left_out["outside the class folders"] += sum(
            path.is_file() and not hidden(path.name) for path in folder.iterdir()
        )
    if left_out := +left_out:
        warnings.warn(f"left out of {printable(str(root))}: {_summary(left_out)}", stacklevel=4)
    class_names = tuple(printable(folder.name) for folder in folders)
    if alike := _look_alike(class_names):
        warnings.warn(
            f"{printable(str(train_root))} has classes whose names look alike ({shorten(alike)}): merge the folders "
            "of those that are one class",
            stacklevel=4,
        )
    return ImageTree(root, class_names, train, test, _layout(folders, splits))


def image_files(folder: pathlib.Path, left_out: collections.Counter[str] | None = None) -> list[str]:
    """Return the paths of all images in a folder and its sub-folders, sorted; count the other files by reason."""
    counter: collections.Counter[str] = collections.Counter() if left_out is None else left_out
    return list(_images_below(folder, counter))


def hidden(name: str) -> bool:
    """Return whether a name is hidden by custom, or one that systems leave behind in folders."""
    return name.startswith(".") or name.lower() in _JUNK


@dataclasses.dataclass(frozen=True)
class _Splits:
    train: pathlib.Path
    test: pathlib.Path | None


def _splits(root: pathlib.Path, left_out: collections.Counter[str]) -> _Splits | None:
    """Return which folders of the root are splits; None where they are classes."""
    folders = _folders(root)
    by_role: dict[str | None, list[pathlib.Path]] = collections.defaultdict(list)
    for folder in folders:
        by_role[_role(folder.name)].append(folder)
    train, others = by_role["train"], [folder for folder in by_role[None] if _has_images(folder)]
    named = [folder for role, of_role in by_role.items() if role is not None for folder in of_role]
    nested = [folder for folder in named if _is_nested(folder)]
    if not named or (others and not nested):
        # Beside other classes a folder of images called train is a class.
        return None
    tests = [folder for folder in by_role["test"] + by_role["validation"] if folder in nested]
    if others and (not train or not (tests or all(map(_is_nested, others)))):
        raise UserError(
            f"{root} can be read in two ways: is {_quoted(nested)} a split that holds classes, or a class like "
            f"{_quoted(others)}? Move one of them elsewhere."
        )
    if not train:
        raise UserError(
            f"{root} has {_quoted(named)} but no folder of training images: name it train, or give another folder."
        )
    if len(train) > 1:
        raise UserError(f"{root} has several folders of training images ({_quoted(train)}): keep one.")
    for role in ("test", "validation"):
        of_role = [folder for folder in by_role[role] if folder in tests]
        if len(of_role) > 1:
            raise UserError(f"{root} has several folders of {role} images ({_quoted(of_role)}): keep one.")
    if not tests and (empty := [folder for folder in named if folder not in train and not _has_images(folder)]):
        raise UserError(f"{root} has {_quoted(empty)} without images to test on: fill or remove it.")
    test = tests[0] if tests else None
    for folder in sorted({*folders} - {train[0], test}):
        why = "without class folders" if folder in named and folder not in nested else "neither training nor test set"
        left_out[f"in {printable(folder.name)!r}, {why}"] += len(image_files(folder))
    return _Splits(train[0], test)


def _role(name: str) -> str | None:
    word = re.sub(r"[\W\d_]", "", name.casefold())
    return next((role for role, pattern in _ROLES.items() if pattern.match(word)), None)


def _folders(root: pathlib.Path) -> list[pathlib.Path]:
    try:
        return sorted(path for path in root.iterdir() if path.is_dir() and not hidden(path.name))
    except OSError as error:
        raise UserError(f"cannot list {printable(str(root))} ({error.strerror}): check its permissions.") from error


def _has_images(folder: pathlib.Path) -> bool:
    return next(_images_below(folder, collections.Counter()), None) is not None


def _is_nested(folder: pathlib.Path) -> bool:
    """Return whether a folder holds its images in sub-folders alone, as a split does."""
    direct = (path for path in folder.iterdir() if path.is_file() and not hidden(path.name))
    if any(path.suffix.lower() in decoding.suffixes() for path in direct):
        return False
    return any(map(_has_images, _folders(folder)))


def _images_below(folder: pathlib.Path, left_out: collections.Counter[str]) -> Iterator[str]:
    # Those that the folder lies in as well: through a link to one of them other classes would become part of this one.
    above = {parent for path in (folder.absolute(), folder.resolve()) for parent in path.parents}
    return _walk(str(folder), decoding.suffixes(), left_out, tuple(map(_inode, above)))


def _inode(folder: str | pathlib.Path) -> tuple[int, int]:
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino


def _walk(
    folder: str, suffixes: frozenset[str], left_out: collections.Counter[str], above: tuple[tuple[int, int], ...]
) -> Iterator[str]:
    """Yield the images of a folder and, through links as well, of its sub-folders; `above` are those it lies in."""
    above = (*above, _inode(folder))
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot list {printable(folder)} ({error.strerror}): check its permissions.") from error
    for entry in entries:
        suffix = os.path.splitext(entry.name)[1].lower()
        if hidden(entry.name):
            left_out["hidden"] += entry.name != _OWN_CACHE
        elif entry.is_dir():
            if _inode(entry.path) in above:
                left_out["a link to a folder that it lies in"] += 1
            else:
                yield from _walk(entry.path, suffixes, left_out, above)
        elif not entry.is_file():
            left_out["a broken link" if entry.is_symlink() else "no file"] += 1
        elif suffix in suffixes:
            yield entry.path
        else:
            left_out[f"ending in {printable(suffix)}" if suffix else "without an ending"] += 1


def _labelled(
    folders: Sequence[pathlib.Path], names: Sequence[str], left_out: collections.Counter[str]
) -> list[tuple[str, int]]:
    label_of = {name: label for label, name in enumerate(names)}
    return [(path, label_of[folder.name]) for folder in folders for path in image_files(folder, left_out)]


def _summary(left_out: collections.Counter[str]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in left_out.most_common())


def _look_alike(names: Sequence[str]) -> list[str]:
    """Return the names that differ from another one in case, in spaces or in how their letters are composed alone."""
    by_look: dict[str, list[str]] = collections.defaultdict(list)
    for name in names:
        by_look["".join(unicodedata.normalize("NFKC", name).casefold().split())].append(name)
    return [repr(name) for alike in by_look.values() if len(alike) > 1 for name in alike]


def _hint(folders: Sequence[pathlib.Path]) -> str:
    if len(folders) == 1 and len(_folders(folders[0])) > 1:
        return f" Is it {printable(str(folders[0]))} that you mean?"
    return ""


def _layout(folders: Sequence[pathlib.Path], splits: _Splits | None) -> str:
    if splits is not None:
        test = "no test folder" if splits.test is None else f"tested on {printable(splits.test.name)!r}"
        return f"trained on {printable(splits.train.name)!r}, {test}"
    named = [printable(folder.name) for folder in folders if _role(folder.name)]
    return f"{_quoted_names(named)} taken for a class" if named else ""


def _quoted(folders: Sequence[pathlib.Path]) -> str:
    return _quoted_names([printable(folder.name) for folder in folders])


def _quoted_names(names: Sequence[str]) -> str:
    return shorten([repr(name) for name in names])
