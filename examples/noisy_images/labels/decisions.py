"""What a person has decided about labels: a file of decisions, and their way back into the data.

decisions.csv    id, fingerprint, given_label, decision, new_label: one line a sample, classes by their names

A decision is about a sample, not about a place: it applies to the sample that has its identity, as long as the content
and the given label are those that were looked at.
"""

import csv
import dataclasses
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from .. import data, files
from ..errors import UserError

COLUMNS = ("id", "fingerprint", "given_label", "decision", "new_label")
KINDS = ("keep", "relabel", "drop")
_NAMED = 3


@dataclasses.dataclass(frozen=True)
class Decision:
    """What is to be done with one sample.

    Attributes:
      id: The sample's identity.
      fingerprint: Of the content that was looked at.
      given_label: Name of the class that the sample had.
      decision: `keep`, `relabel` or `drop`.
      new_label: Name of the class that a sample is relabelled to; empty otherwise.
    """

    id: str
    fingerprint: str
    given_label: str
    decision: str
    new_label: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Applied:
    """A data set's labels with decisions applied, in the order of the data set.

    Attributes:
      labels: int32 (N,), the new labels; those of dropped samples are as they were.
      kept: bool (N,), False where a sample is dropped.
      decisions: The decision about each sample that there is one about, by position.
    """

    labels: np.ndarray
    kept: np.ndarray
    decisions: dict[int, Decision]


def write(decisions: Iterable[Decision], path: Path) -> None:
    """Write decisions; the file is whole or as it was."""
    # File names that are no UTF-8 come back as they were.
    with (
        files.replacing(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(dataclasses.astuple(decision) for decision in decisions)


def read(path: Path) -> list[Decision]:
    """Read decisions, each sample once.

    Raises:
      UserError: The file is missing, cut short or no file of decisions, or it decides twice about one sample.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the decisions in {path} ({error.strerror}): give a decisions.csv.") from error
    text = content.decode("utf-8-sig", errors="surrogateescape")
    if text and not text.endswith(("\n", "\r")):
        raise UserError(f"{path} ends in the middle of a line: it was cut short, so save the decisions again.")
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(rows, [])
        if missing := [column for column in COLUMNS if column not in header]:
            raise UserError(f"{path} has no column {missing[0]!r}: a file of decisions has {', '.join(COLUMNS)}.")
        places = [header.index(column) for column in COLUMNS]
        decisions: dict[str, Decision] = {}
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if row and len(row) != len(header):
                raise UserError(f"{where}: {len(row)} fields where {len(header)} are expected: save it again.")
            if row:
                one = _checked(Decision(*(row[place] for place in places)), where)
                if decisions.setdefault(one.id, one) != one:
                    raise UserError(f"{where}: {one.id!r} is decided about twice, differently: remove one of the two.")
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: {error}: save the decisions again.") from error
    return list(decisions.values())


def _checked(decision: Decision, where: str) -> Decision:
    if decision.decision not in KINDS:
        raise UserError(f"{where}: unknown decision {decision.decision!r}: choose one of {', '.join(KINDS)}.")
    if (decision.decision == "relabel") != (decision.new_label != ""):
        lacks = "needs a new_label" if decision.decision == "relabel" else "has no new_label"
        raise UserError(f"{where}: the decision {decision.decision!r} {lacks}, got {decision.new_label!r}.")
    return decision


def apply(
    decisions: Sequence[Decision],
    ids: Sequence[str],
    fingerprints: Sequence[str],
    labels: np.ndarray,
    class_names: Sequence[str],
) -> Applied:
    """Apply decisions to the samples that they are about; all of them or none.

    Args:
      decisions: In any order.
      ids: Identity of each sample, all different.
      fingerprints: Of each sample's content.
      labels: int (N,), given labels.
      class_names: One name per class, all different.

    Raises:
      UserError: A sample is gone, or its content or its given label is another, or a class is unknown; it is named.
    """
    position_of = {identity: position for position, identity in enumerate(ids)}
    label_of = {name: label for label, name in enumerate(class_names)}
    if repeated := first_repeated(ids):
        raise UserError(f"the data has the id {repeated!r} twice: give each sample an id of its own.")
    if repeated := first_repeated(class_names):
        raise UserError(f"two classes have the name {repeated!r}: give each class a name of its own.")

    def refuse(wrong: Callable[[Decision], bool], what: str) -> None:
        if found := [decision for decision in decisions if wrong(decision)]:
            named = data.dataset.shorten([repr(decision.id) for decision in found], _NAMED)
            raise UserError(f"{len(found)} of {len(decisions)} decisions are about samples {what}: {named}.")

    if decisions and not any(decision.id in position_of for decision in decisions):
        raise UserError(
            f"none of the {len(decisions)} decisions is about a sample of this data (the first is about "
            f"{decisions[0].id!r}): give the file that was saved for it."
        )
    refuse(lambda one: one.id not in position_of, "that are gone from the data")
    refuse(lambda one: fingerprints[position_of[one.id]] != one.fingerprint, "whose content has changed since")
    for decision in decisions:
        for name in filter(None, (decision.given_label, decision.new_label)):
            if name not in label_of:
                known = data.dataset.shorten([repr(known) for known in class_names], _NAMED)
                raise UserError(f"unknown class {name!r} in the decision about {decision.id!r}: the data has {known}.")
    refuse(
        lambda one: labels[position_of[one.id]] != label_of.get(one.given_label), "whose given label has changed since"
    )
    applied = Applied(np.array(labels, np.int32), np.ones(len(labels), bool), {})
    for decision in decisions:
        position = position_of[decision.id]
        applied.decisions[position] = decision
        if decision.decision == "relabel":
            applied.labels[position] = label_of[decision.new_label]
        applied.kept[position] = decision.decision != "drop"
    return applied


def apply_file(path: Path, dataset: data.Dataset) -> tuple[list[str], np.ndarray, Applied]:
    """Apply a file of decisions to the samples of a data set, those of training first, then those of testing.

    Test samples whose names are also those of training samples come from a test set of its own, which nothing is
    decided about; they are left out.

    Returns:
      Identities and given labels of the samples, and what is applied to them.

    Raises:
      UserError: The file cannot be read, or a decision does not fit the data.
    """
    ids, test_ids = data.identities(dataset.train), data.identities(dataset.test)
    splits = [dataset.train]
    if set(ids).isdisjoint(test_ids):
        ids, splits = ids + test_ids, [dataset.train, dataset.test]
    fingerprints = [one for split in splits for one in data.fingerprints(split)]
    labels = np.concatenate([split.labels for split in splits])
    return ids, labels, apply(read(path), ids, fingerprints, labels, dataset.class_names)


def part(applied: Applied, start: int, count: int) -> Applied:
    """Return what is applied to `count` samples from `start` on."""
    rows = slice(start, start + count)
    return Applied(
        applied.labels[rows],
        applied.kept[rows],
        {place - start: one for place, one in applied.decisions.items() if start <= place < start + count},
    )


def taken(split: data.Split, applied: Applied) -> data.Split:
    """Return the samples that are kept, with their new labels."""
    return dataclasses.replace(split, labels=applied.labels).take(np.flatnonzero(applied.kept))


def first_repeated(names: Iterable[str]) -> str | None:
    """Return the first name that was there before; None where all are different."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
