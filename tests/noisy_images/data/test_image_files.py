"""Images that are files."""

import os
import pickle
import time
import warnings
import zipfile

import numpy as np
import pytest
from PIL import Image

from examples.noisy_images.data import image_files
from examples.noisy_images.data.image_files import ImageFiles
from examples.noisy_images.errors import UserError


@pytest.fixture
def pictures(tmp_path):
    arrays = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    paths = []
    for i, array in enumerate(arrays):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(array).save(paths[-1])
    return arrays, tuple(paths)


def test_image_files_decode_lazily_and_can_be_subset(pictures):
    arrays, paths = pictures
    files = pickle.loads(pickle.dumps(ImageFiles(paths, 4)))
    assert len(files) == 4
    np.testing.assert_array_equal(files[2], arrays[2])
    np.testing.assert_array_equal(files[np.array([3, 1])][0], arrays[3])
    np.testing.assert_array_equal(files[np.array([False, True, False, False])][0], arrays[1])
    assert [(header.height, header.width) for header in files.headers()] == [(6, 5)] * 4


def test_image_files_in_a_zip(pictures, tmp_path):
    arrays, paths = pictures
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in paths:
            archive.write(path, f"folder/{os.path.basename(path)}")
    files = ImageFiles(tuple(f"folder/{i}.png" for i in range(4)), 4, str(tmp_path / "all.zip"))
    images, kept = image_files.decode_images(files, skip_corrupt=False)
    np.testing.assert_array_equal(images, arrays)
    np.testing.assert_array_equal(kept, range(4))


def test_grey_images_become_three_channels(tmp_path):
    Image.fromarray(np.full((3, 3), 9, np.uint8)).save(tmp_path / "grey.png")
    assert ImageFiles((str(tmp_path / "grey.png"),))[0].tolist() == [[[9] * 3] * 3] * 3


def test_corrupt_images_are_named_counted_and_skipped_on_request(pictures):
    arrays, paths = pictures
    with open(paths[0], "wb") as file:
        file.write(b"no image")
    with open(paths[2], "r+b") as file:
        file.truncate(60)
    with pytest.raises(UserError, match=r"2 of 4 images cannot be read .*0\.png, .*2\.png.*--skip-corrupt"):
        image_files.decode_images(ImageFiles(paths), skip_corrupt=False)
    with pytest.warns(UserWarning, match=r"left out 2 of 4 .*0\.png"):
        images, kept = image_files.decode_images(ImageFiles(paths), skip_corrupt=True)
    np.testing.assert_array_equal(kept, [1, 3])
    np.testing.assert_array_equal(images, arrays[[1, 3]])
    with pytest.raises(UserError, match=r"cannot read the image .*0\.png"):
        ImageFiles(paths)[0]
    with pytest.raises(UserError, match="none of the 1 images"):
        image_files.decode_images(ImageFiles(paths[:1]), skip_corrupt=True)


def test_an_image_of_another_size_is_named(pictures, tmp_path):
    Image.new("RGB", (7, 7)).save(tmp_path / "odd.png")
    with pytest.raises(UserError, match=r"odd\.png' has 7x7 pixels where 6x5 are expected"):
        image_files.decode_images(ImageFiles((*pictures[1], str(tmp_path / "odd.png"))), skip_corrupt=True)


def test_readable_images_are_remembered_until_they_change(pictures, tmp_path, monkeypatch):
    _, paths = pictures
    checked = tmp_path / ".readable_images.txt"
    files = ImageFiles(paths)
    np.testing.assert_array_equal(image_files.readable_images(files, skip_corrupt=False, checked=checked), range(4))

    opened = []
    original = ImageFiles.open
    monkeypatch.setattr(
        ImageFiles, "open", lambda self, i, **kw: opened.append(self.paths[i]) or original(self, i, **kw)
    )
    image_files.readable_images(files, skip_corrupt=False, checked=checked)
    assert opened == []
    with open(paths[1], "wb") as file:
        file.write(b"broken")
    os.utime(paths[1], (time.time() + 5,) * 2)
    os.remove(paths[3])
    with pytest.raises(UserError, match=r"2 of 4 .*1\.png, .*3\.png"):
        image_files.readable_images(files, skip_corrupt=False, checked=checked)
    assert sorted(opened) == [paths[1], paths[3]]
    with pytest.warns(UserWarning, match="left out 2"):
        np.testing.assert_array_equal(image_files.readable_images(files, skip_corrupt=True, checked=checked), [0, 2])


def test_why_images_cannot_be_read_is_said_with_their_names(tmp_path):
    contents = {"empty.png": b"", "page.jpg": b"<html>", "other.jpg": b"<html>", "fine.png": None}
    for name, content in contents.items():
        if content is None:
            Image.new("RGB", (4, 4)).save(tmp_path / name)
        else:
            (tmp_path / name).write_bytes(content)
    files = ImageFiles((*(str(tmp_path / name) for name in contents), str(tmp_path / "gone.png")))
    with pytest.raises(UserError) as raised:
        image_files.decode_images(files, skip_corrupt=False)
    said = str(raised.value)
    assert "4 of 5 images cannot be read" in said and "\n" not in said
    assert "page.jpg and 1 more: it is of no image format" in said
    assert "empty.png: the file is empty" in said and "gone.png: no such file" in said
    with pytest.warns(UserWarning, match=r"left out 4 of 5 .*empty\.png: the file is empty"):
        image_files.decode_images(files, skip_corrupt=True)


def test_what_pillow_warns_of_names_the_files(tmp_path):
    paths = []
    for i in range(5):
        paths.append(str(tmp_path / f"{i}.jpg"))
        exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01" if i % 2 else b""
        Image.new("RGB", (4, 4)).save(paths[-1], exif=exif)
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        image_files.decode_images(ImageFiles(tuple(paths)), skip_corrupt=False)
    said = [str(note.message) for note in notes]
    assert len(said) == 1 and "2 images" in said[0] and "1.jpg" in said[0] and "3.jpg" in said[0]
    assert "EXIF" in said[0]
