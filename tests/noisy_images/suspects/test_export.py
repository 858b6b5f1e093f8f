"""A copy with decisions applied, and an original that stays as it was."""

import csv
import json
import os

import numpy as np
import pytest

from examples.noisy_images.data.identity import printable
from examples.noisy_images.errors import UserError
from examples.noisy_images.labels import decisions
from examples.noisy_images.labels.decisions import Decision
from examples.noisy_images.suspects import export

NAMES = ("cat", "dog", "<b>fish")
FILES = ("cat/1.png", "cat/2.png", "cat/deep/3.png", "dog/1.png", "dog/2.png", "<b>fish/caf\udce9 \u202e.png")
LABELS = np.array([0, 0, 0, 1, 1, 2])


def tree(root, part=""):
    for number, name in enumerate(FILES):
        path = root / part / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]))
    return [printable(part + name) for name in FILES]


def content(root):
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.name.startswith("changes")
    }


def decide(ids, changes):
    """Decisions by position: a new label, None for drop, the given label for keep."""
    given = [
        Decision(ids[i], f"f{i}", NAMES[LABELS[i]], *(("drop", "") if new is None else ("relabel", NAMES[new])))
        if new != LABELS[i]
        else Decision(ids[i], f"f{i}", NAMES[LABELS[i]], "keep")
        for i, new in changes.items()
    ]
    return decisions.apply(given, ids, [f"f{i}" for i in range(len(ids))], LABELS, NAMES)


@pytest.mark.parametrize("part", ["", "train/", "TRAIN/", "training set/"])
@pytest.mark.parametrize("link", [False, True])
def test_images_move_into_the_folder_of_their_class(tmp_path, part, link):
    ids = tree(tmp_path / "images", part)
    before = content(tmp_path / "images")
    applied = decide(ids, {0: 1, 1: None, 2: 2, 3: 1, 5: 0})
    output = tmp_path / "cleaned"
    summary = export.write_folder(tmp_path / "images", ids, LABELS, applied, NAMES, output, link=link)
    assert content(output) == {
        part + "dog/1-2.png": b"\0",
        part + "<b>fish/deep/3.png": b"\2",
        part + "dog/1.png": b"\3",
        part + "dog/2.png": b"\4",
        part + "cat/caf\udce9 \u202e.png": b"\5",
    }
    assert content(tmp_path / "images") == before
    assert os.path.samefile(output / part / "dog/2.png", tmp_path / "images" / part / "dog/2.png") == link
    with open(output / "changes.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [
        (line["id"], line["decision"], line["given_label"], line["new_label"], line["target"]) for line in lines
    ] == [
        (ids[0], "relabel", "cat", "dog", part + "dog/1-2.png"),
        (ids[1], "drop", "cat", "", ""),
        (ids[2], "relabel", "cat", "<b>fish", part + "<b>fish/deep/3.png"),
        (ids[5], "relabel", "<b>fish", "cat", part + printable("cat/caf\udce9 \u202e.png")),
    ]
    assert lines[0]["fingerprint"] == "f0"
    assert summary == json.loads((output / "changes.json").read_text())
    counts = ("samples_before", "samples_after", "decided", "kept", "relabelled", "dropped")
    assert [summary[name] for name in counts] == [6, 5, 5, 1, 3, 1]
    assert {"given": "cat", "new": "dog", "samples": 1} in summary["relabelled_by_classes"]
    assert summary["dropped_by_class"] == [{"given": "cat", "samples": 1}]


def test_a_class_may_have_the_name_of_a_part(tmp_path):
    root = tmp_path / "images"
    ids = ["train/train/1.png", "train/dog/2.png"]
    for name in ids:
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text(name)
    applied = decisions.apply(
        [Decision(ids[0], "f", "train", "relabel", "dog")], ids, ["f"] * 2, np.arange(2), ("train", "dog")
    )
    export.write_folder(root, ids, np.arange(2), applied, ("train", "dog"), tmp_path / "out")
    assert set(content(tmp_path / "out")) == {"train/dog/1.png", "train/dog/2.png"}


def test_two_that_move_to_one_place_are_both_there(tmp_path):
    root = tmp_path / "images"
    ids = ["cat/1.png", "dog/1.png", "<b>fish/1.png"]
    for number, name in enumerate(ids):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_bytes(bytes([number]))
    given = [Decision(ids[0], "f", "cat", "relabel", "dog"), Decision(ids[2], "f", "<b>fish", "relabel", "dog")]
    applied = decisions.apply(given, ids, ["f"] * 3, np.arange(3), NAMES)
    export.write_folder(root, ids, np.arange(3), applied, NAMES, tmp_path / "out")
    assert content(tmp_path / "out") == {"dog/1.png": b"\1", "dog/1-2.png": b"\0", "dog/1-3.png": b"\2"}


@pytest.mark.parametrize("output", ["images", "images/cleaned", ".", "images/../images", "full", "file", "link"])
def test_nothing_is_written_into_or_over_what_is_there(tmp_path, output):
    ids = tree(tmp_path / "images")
    (tmp_path / "full" / "mine").mkdir(parents=True)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "images")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"is not empty|lie in one another|is a file") as error:
        export.write_folder(tmp_path / "images", ids, LABELS, decide(ids, {}), NAMES, tmp_path / output)
    assert "\n" not in str(error.value) and sorted(tmp_path.rglob("*")) == before


def test_a_failure_leaves_nothing_behind(tmp_path):
    ids = tree(tmp_path / "images")
    (tmp_path / "images" / "dog" / "2.png").unlink()
    with pytest.raises(UserError, match="nothing was exported"):
        export.write_folder(tmp_path / "images", ids, LABELS, decide(ids, {}), NAMES, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "cat/../../x.png"])
def test_no_file_outside_the_data_is_copied(tmp_path, name):
    ids = [*tree(tmp_path / "images")[:5], name]
    with pytest.raises(UserError, match="no file below the data's folder"):
        export.write_folder(tmp_path / "images", ids, LABELS, decide(ids, {}), NAMES, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_image_that_is_not_in_the_folder_of_its_class(tmp_path):
    ids = ["dog/0.png", *tree(tmp_path / "images")[1:]]
    with pytest.raises(UserError, match="not in a folder of its class 'cat'"):
        export.write_folder(tmp_path / "images", ids, LABELS, decide(ids, {0: 1}), NAMES, tmp_path / "out")


@pytest.mark.parametrize("strings", [False, True])
def test_an_npz_keeps_its_other_arrays(tmp_path, strings):
    names = ("a", "dog", "a much longer name")
    # Six samples; the second and the fifth row are held out, and the last has no decision.
    rows = np.array([0, 9, 0, 0, 9, 1, 1, 2])
    rows[[1, 4]] = 1
    index = np.array([0, 2, 3, 5, 6, 7])
    arrays = {
        "features": np.arange(16, dtype=np.float32).reshape(8, 2),
        "labels": np.array(["a", "dog"])[np.minimum(rows, 1)] if strings else rows,
        "test_features": np.zeros((8, 2), np.float32),
        "class_names": np.array(names),
        "note": np.array("kept"),
    }
    labels = np.minimum(rows, 1)[index] if strings else rows[index]
    source = tmp_path / "own.npz"
    np.savez(source, **arrays)
    before = source.read_bytes()
    ids = [str(row) for row in index]
    given = [
        Decision("0", "f", "a", "relabel", "a much longer name"),
        Decision("3", "f", "a", "drop"),
        Decision("5", "f", "dog", "keep"),
    ]
    applied = decisions.apply(given, ids, ["f"] * 6, labels, names)
    summary = export.write_npz(source, arrays, index, ids, labels, applied, names, tmp_path / "out")
    assert source.read_bytes() == before
    with np.load(tmp_path / "out" / "own.npz", allow_pickle=False) as result:
        assert set(result.files) == {*arrays, "ids"}
        kept = [0, 1, 2, 4, 5, 6, 7]
        np.testing.assert_array_equal(result["features"], arrays["features"][kept])
        np.testing.assert_array_equal(result["test_features"], arrays["test_features"])
        expected = [2, *rows[kept[1:]].tolist()]
        if strings:
            expected = ["a much longer name", *arrays["labels"][kept[1:]].tolist()]
        assert result["labels"].tolist() == expected
        assert result["ids"].tolist() == [str(row) for row in kept] and str(result["note"]) == "kept"
    assert summary["relabelled"] == 1 and summary["dropped"] == 1 and summary["samples_after"] == 5
    with open(tmp_path / "out" / "changes.csv", newline="") as file:
        assert [(line["id"], line["target"]) for line in csv.DictReader(file)] == [("0", "0"), ("3", "")]


def test_an_npz_keeps_its_ids(tmp_path):
    arrays = {"labels": np.array([0, 1]), "images": np.zeros((2, 1, 1), np.uint8), "ids": np.array(["x", "y"])}
    applied = decisions.apply([Decision("x", "f", "cat", "drop")], ["x", "y"], ["f"] * 2, arrays["labels"], NAMES)
    export.write_npz(tmp_path / "own.npz", arrays, np.arange(2), ["x", "y"], arrays["labels"], applied, NAMES,
                     tmp_path / "out")  # fmt: skip
    with np.load(tmp_path / "out" / "own.npz") as result:
        assert result["ids"].tolist() == ["y"] and result["labels"].tolist() == [1]
