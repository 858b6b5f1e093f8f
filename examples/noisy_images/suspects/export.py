"""A copy of a data set with decisions applied; the original is never touched.

CLASS/...        of a folder of images: the files that are kept, each in the folder of its class
NAME.npz         of an .npz file: its arrays, without the dropped rows and with the new labels
changes.csv      what was relabelled or dropped, one line a sample
changes.json     how many samples there were and are, and what became of them

The copy appears whole or not at all.
"""

import collections
import contextlib
import csv
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from .. import files
from ..data.file_names import original, printable
from ..errors import UserError
from ..labels.decisions import Applied

COLUMNS = ("id", "fingerprint", "decision", "given_label", "new_label", "target")


def write_folder(
    source: Path,
    ids: Sequence[str],
    labels: np.ndarray,
    applied: Applied,
    class_names: Sequence[str],
    output: Path,
    *,
    link: bool = False,
) -> dict[str, Any]:
    """Write the images that are kept, each into the folder of its class; return the summary.

    A relabelled file whose name is taken in its new folder gets a number.

    Args:
      source: Root of the original tree.
      ids: Identity of each image: its path below `source`, CLASS/... or, where the tree has splits, SPLIT/CLASS/...
      labels: int (N,), given labels.
      applied: The decisions, of the same samples.
      class_names: One name per class, those of the folders.
      output: Folder to write: new or empty, outside `source`.
      link: Make hard links where the file system can, which take no space; who then writes into a file of the copy
        writes into the original.

    Raises:
      UserError: The output cannot be written without touching what is there, or an image is no file of `source`.
    """
    places = [original(identity) for identity in ids]
    targets = _targets(places, labels, applied, class_names)
    with _new_folder(output, source) as temporary:
        for place, target in zip(places, targets, strict=True):
            if target is not None:
                _copy(source / place, temporary / target, link)
        return _write_changes(temporary, source, applied, ids, labels, class_names, targets)


def write_npz(
    source: Path,
    arrays: Mapping[str, np.ndarray],
    index: np.ndarray,
    ids: Sequence[str],
    labels: np.ndarray,
    applied: Applied,
    class_names: Sequence[str],
    output: Path,
) -> dict[str, Any]:
    """Write the arrays of an .npz without the dropped rows and with the new labels; return the summary.

    Rows that are no sample here, such as those of a held-out part, stay as they are. The result names its samples by
    `ids`, so that a sample keeps its identity when others are dropped.

    Args:
      source: The original file.
      arrays: All its arrays. Those with as many rows as `labels` belong to the samples, except `test_*` and
        `class_names`.
      index: int (N,), the row of each sample.
      ids: Identity of each sample.
      labels: int (N,), given labels.
      applied: The decisions, of the same samples.
      class_names: One name per class, written where the file's labels are strings.
      output: Folder to write: new or empty.

    Raises:
      UserError: The output cannot be written without touching what is there.
    """
    rows = len(arrays["labels"])
    of_samples = [
        name
        for name, array in arrays.items()
        if not name.startswith("test_") and name != "class_names" and array.shape[:1] == (rows,)
    ]
    kept = np.ones(rows, bool)
    kept[index] = applied.kept
    changed = np.flatnonzero(applied.labels != labels)
    new_labels = np.array(arrays["labels"])
    if new_labels.dtype.kind in "US":
        # As wide as the longest name: a longer one than any label of before must not be cut.
        names = np.array(class_names)[applied.labels[changed]].astype(new_labels.dtype.kind)
        new_labels = new_labels.astype(np.promote_types(new_labels.dtype, names.dtype))
        new_labels[index[changed]] = names
    else:
        new_labels[index[changed]] = applied.labels[changed]
    all_ids = arrays["ids"] if "ids" in arrays else np.array([str(row) for row in range(rows)])
    if "ids" not in arrays:
        all_ids = all_ids.astype(object)
        all_ids[index] = ids
        all_ids = all_ids.astype(str)
    result = {**arrays, "labels": new_labels, "ids": all_ids}
    result |= {name: result[name][kept] for name in (*of_samples, "ids")}
    with _new_folder(output, source) as temporary:
        np.savez(temporary / source.name, **result)
        targets = [str(row) if keep else None for row, keep in zip(np.cumsum(kept) - 1, kept, strict=True)]
        return _write_changes(temporary, source, applied, ids, labels, class_names, [targets[row] for row in index])


def _targets(
    places: Sequence[str], labels: np.ndarray, applied: Applied, class_names: Sequence[str]
) -> list[str | None]:
    """Return the path of each image in the copy; None where it is dropped."""
    class_folders = [original(class_names[label]) for label in labels]
    # A tree of splits has its classes one folder deeper, whatever it calls them.
    depth = int(any(PurePosixPath(p).parts[:1] != (folder,) for p, folder in zip(places, class_folders, strict=True)))
    # What stays where it is has its place first.
    moved = applied.kept & (applied.labels != labels)
    taken = {place for place, keep, move in zip(places, applied.kept, moved, strict=True) if keep and not move}
    targets: list[str | None] = []
    for position, place in enumerate(places):
        parts = PurePosixPath(place).parts
        if ".." in parts or PurePosixPath(place).is_absolute():
            raise UserError(f"the image {place!r} is no file below the data's folder: it cannot be copied.")
        if not moved[position]:
            targets.append(place if applied.kept[position] else None)
            continue
        if len(parts) < depth + 2 or parts[depth] != class_folders[position]:
            given = class_names[labels[position]]
            raise UserError(f"the image {place!r} is not in a folder of its class {given!r}: it cannot be moved.")
        new = PurePosixPath(*parts[:depth], original(class_names[applied.labels[position]]), *parts[depth + 1 :])
        target, number = str(new), 1
        while target in taken:
            number += 1
            target = str(new.with_name(f"{new.stem}-{number}{new.suffix}"))
        taken.add(target)
        targets.append(target)
    return targets


@contextlib.contextmanager
def _new_folder(output: Path, source: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `output` when the block ends, and goes when it fails."""
    inside, outside = output.resolve(), source.resolve()
    if inside == outside or outside in inside.parents or inside in outside.parents:
        raise UserError(f"{output} and the data in {source} lie in one another: give a folder apart from the original.")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file: give a new folder.")
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"{output} is not empty: give a new folder, nothing is written over.")
    temporary = inside.with_name(f".{inside.name}-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if output.is_dir():
            inside.rmdir()
        os.replace(temporary, inside)
    except OSError as error:
        raise UserError(f"cannot write {output} ({error}): nothing was exported.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy(source: Path, target: Path, link: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        # Of the file, where the original tree has a symbolic link to it.
        with contextlib.suppress(OSError):
            os.link(source.resolve(), target)
            return
    shutil.copy2(source, target)


def _write_changes(
    folder: Path,
    source: Path,
    applied: Applied,
    ids: Sequence[str],
    labels: np.ndarray,
    class_names: Sequence[str],
    targets: Sequence[str | None],
) -> dict[str, Any]:
    """Write what became of the samples, and return its summary."""
    dropped = ~applied.kept
    relabelled = applied.kept & (applied.labels != labels)
    with open(folder / "changes.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for position in np.flatnonzero(dropped | relabelled):
            decision = applied.decisions[int(position)]
            named = (decision.decision, decision.given_label, decision.new_label)
            writer.writerow([ids[position], decision.fingerprint, *named, printable(targets[position] or "")])
    pairs = collections.Counter(zip(labels[relabelled].tolist(), applied.labels[relabelled].tolist(), strict=True))
    lost = collections.Counter(labels[dropped].tolist())
    summary = {
        "source": str(source),
        "samples_before": len(labels),
        "samples_after": int(applied.kept.sum()),
        "decided": len(applied.decisions),
        "kept": sum(decision.decision == "keep" for decision in applied.decisions.values()),
        "relabelled": int(relabelled.sum()),
        "dropped": int(dropped.sum()),
        "relabelled_by_classes": [
            {"given": class_names[given], "new": class_names[new], "samples": count}
            for (given, new), count in pairs.most_common()
        ],
        "dropped_by_class": [{"given": class_names[given], "samples": count} for given, count in lost.most_common()],
    }
    files.write_json(folder / "changes.json", summary)
    return summary
