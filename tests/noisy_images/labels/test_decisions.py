"""Decisions come back from their file as they were, and apply to the samples that they are about or not at all."""

import dataclasses

import numpy as np
import pytest

from examples.noisy_images import data
from examples.noisy_images.errors import UserError
from examples.noisy_images.labels import decisions
from examples.noisy_images.labels.decisions import Decision

HOSTILE = [
    "</script><script>alert(1)</script>",
    'a "quoted", name',
    "two\nlines\r\nand\ra third",
    "\u202eright to left",
    "line\u2028separator\x0b\x1c",
    "not UTF-8: \udcff\udc80",
    "=1+1",
    " spaces ",
    "\x00",
]
IDS, PRINTS, NAMES = ("a", "b", "c", "d"), ("f0", "f1", "f2", "f3"), ("cat", "dog", "fish")
LABELS = np.array([0, 1, 2, 0])


def apply(given, **changes):
    arguments = {"ids": IDS, "fingerprints": PRINTS, "labels": LABELS, "class_names": NAMES} | changes
    return decisions.apply(given, **arguments)


def written(tmp_path, content):
    path = tmp_path / "decisions.csv"
    path.write_bytes(content)
    return path


def test_what_is_written_comes_back(tmp_path):
    given = [Decision(name, "0123456789abcdef", name, "relabel", HOSTILE[-1 - i]) for i, name in enumerate(HOSTILE)]
    given += [Decision("k", "f", "x", "keep"), Decision("d", "f", "x", "drop")]
    decisions.write(given, tmp_path / "decisions.csv")
    assert decisions.read(tmp_path / "decisions.csv") == given


def test_files_of_other_programs_come_in(tmp_path):
    # Carriage returns, a byte order mark, columns in another order and one more of them, an empty line, a repetition.
    path = written(
        tmp_path,
        b"\xef\xbb\xbfnote,decision,new_label,given_label,fingerprint,id\r\n"
        b"why,relabel,dog,cat,f0,a\r\n\r\n,keep,,dog,f1,b\r\nagain,relabel,dog,cat,f0,a\r\n",
    )
    assert decisions.read(path) == [Decision("a", "f0", "cat", "relabel", "dog"), Decision("b", "f1", "dog", "keep")]


HEADER = b"id,fingerprint,given_label,decision,new_label\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no column 'id'"),
        (b"rank,index\n1,2\n", "has no column 'id': a file of decisions has id, fingerprint"),
        (HEADER.replace(b",", b";"), "has no column 'id'"),
        (HEADER + b"a,f0,cat,relabel,do", "ends in the middle of a line: it was cut short"),
        (HEADER + b'a,f0,cat,relabel,"dog\n', "line 2: unexpected end of data"),
        (HEADER + b"a,f0,cat\n", "line 2: 3 fields where 5 are expected"),
        (HEADER + b"a,f0,cat,keep,,\n", "line 2: 6 fields where 5"),
        (HEADER + b"a,f0,cat,delete,\n", "line 2: unknown decision 'delete': choose one of keep, relabel, drop"),
        (HEADER + b"a,f0,cat,relabel,\n", "line 2: the decision 'relabel' needs a new_label"),
        (HEADER + b"a,f0,cat,keep,dog\n", "line 2: the decision 'keep' has no new_label, got 'dog'"),
        (HEADER + b"a,f0,cat,keep,\na,f0,cat,drop,\n", "line 3: 'a' is decided about twice, differently"),
        (HEADER + b"\xff,f0,cat,keep,\n\xff,f1,cat,keep,\n", r"line 3: '\\udcff' is decided about twice"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as error:
        decisions.read(written(tmp_path, content))
    assert "\n" not in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        decisions.read(tmp_path / "none.csv")


def test_decisions_apply_by_identity_in_any_order():
    given = [Decision("d", "f3", "cat", "drop"), Decision("b", "f1", "dog", "relabel", "fish")]
    given += [Decision("a", "f0", "cat", "keep")]
    applied = apply(given)
    assert applied.labels.tolist() == [0, 2, 2, 0] and applied.kept.tolist() == [True, True, True, False]
    assert applied.decisions == {3: given[0], 1: given[1], 0: given[2]}
    # The data in another order, with samples and classes that were not there.
    moved = apply(
        given,
        ids=("d", "x", "b", "a"),
        fingerprints=("f3", "f9", "f1", "f0"),
        labels=np.array([3, 0, 1, 3]),
        class_names=("bird", "dog", "fish", "cat"),
    )
    assert moved.labels.tolist() == [3, 0, 2, 3] and moved.kept.tolist() == [False, True, True, True]
    assert LABELS.tolist() == [0, 1, 2, 0]


def test_no_decisions_change_nothing():
    applied = apply([])
    assert applied.labels.tolist() == LABELS.tolist() and applied.kept.all() and applied.decisions == {}


KEEP = Decision("a", "f0", "cat", "keep")


@pytest.mark.parametrize(
    ("given", "changes", "message"),
    [
        ([KEEP, Decision("z\n", "f0", "cat", "keep")], {}, r"1 of 2 decisions are about samples that are gone.*'z\\n'"),
        ([Decision("y", "f0", "cat", "keep"), Decision("z", "", "cat", "keep")], {}, "none of the 2 .* about 'y'"),
        ([KEEP, Decision("b", "f0", "dog", "keep")], {}, "whose content has changed since: 'b'"),
        ([KEEP, Decision("b", "f1", "cat", "keep")], {}, "whose given label has changed since: 'b'"),
        ([Decision("a", "f0", "cat", "relabel", "cow")], {}, "unknown class 'cow' in the decision about 'a'"),
        ([Decision("a", "f0", "cow", "keep")], {}, "unknown class 'cow'"),
        ([KEEP], {"ids": ("a", "a", "c", "d")}, "the data has the id 'a' twice"),
        ([KEEP], {"class_names": ("cat", "cat", "fish")}, "two classes have the name 'cat'"),
    ],
)
def test_what_does_not_fit_the_data_is_refused_in_one_line(given, changes, message):
    with pytest.raises(UserError, match=message) as error:
        apply(given, **changes)
    assert "\n" not in str(error.value)


def test_a_decision_about_what_was_exported_before_is_refused():
    given = [Decision("b", "f1", "dog", "relabel", "fish")]
    with pytest.raises(UserError, match="given label has changed since: 'b'"):
        apply(given, labels=apply(given).labels)


def test_ten_thousand_classes():
    names = [f"class {label}" for label in range(10_000)]
    given = [Decision(str(i), "f", names[i], "relabel", names[-1 - i]) for i in range(10_000)]
    applied = apply(given, ids=[str(i) for i in range(10_000)], fingerprints=["f"] * 10_000, labels=np.arange(10_000),
                    class_names=names)  # fmt: skip
    np.testing.assert_array_equal(applied.labels, np.arange(10_000)[::-1])


def test_a_split_with_decisions_applied():
    images = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    split = data.Split(images, LABELS.astype(np.int32), LABELS.astype(np.int32), np.arange(4), ("w", "x", "y", "z"))
    given = [Decision("b", "f1", "dog", "drop"), Decision("c", "f2", "fish", "relabel", "cat")]
    result = decisions.taken(split, apply(given))
    assert result.labels.tolist() == [0, 0, 0] and result.clean_labels.tolist() == [0, 2, 0]
    assert result.paths == ("w", "y", "z") and result.index.tolist() == [0, 2, 3]
    assert dataclasses.replace(split).labels.tolist() == LABELS.tolist()
