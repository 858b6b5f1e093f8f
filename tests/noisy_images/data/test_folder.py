"""The user's own images: a folder per class."""

import numpy as np
import pytest
from PIL import Image

from examples.noisy_images import data
from examples.noisy_images.data import folder
from examples.noisy_images.errors import UserError


def _write_tree(root, counts, size=(10, 8)):
    """Write `counts` images into each class folder; the pixels tell class and number."""
    for label, (name, count) in enumerate(counts.items()):
        (root / name / "deeper").mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", size, (label, i, 50)).save(root / name / ("deeper" if i % 2 else ".") / f"{i}.png")
    return root


def test_folder_with_train_and_test(tmp_path):
    _write_tree(tmp_path / "train", {"cat": 6, "bird": 4, "dog": 5})
    _write_tree(tmp_path / "test", {"cat": 2, "dog": 3})
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".cache").mkdir()
    with pytest.warns(UserWarning, match="left out of .*: 1 ending in .txt, 1 hidden"):
        loaded = data.load("folder", data_dir=tmp_path)
    assert loaded.class_names == ("bird", "cat", "dog")
    assert loaded.image_shape == (8, 10, 3) and loaded.train.images.dtype == np.uint8
    assert np.bincount(loaded.train.labels).tolist() == [4, 6, 5]
    assert np.bincount(loaded.test.labels).tolist() == [0, 2, 3]
    written = np.array([1, 0, 2])
    np.testing.assert_array_equal(loaded.train.images[:, 0, 0, 0], written[loaded.train.labels])
    assert loaded.train.clean_labels is None
    np.testing.assert_array_equal(loaded.test.index, np.arange(5))
    np.testing.assert_allclose(loaded.mean[2], 50 / 255, rtol=1e-9)


@pytest.mark.parametrize("where", [".", "train"])
def test_folder_without_a_test_set(tmp_path, where):
    _write_tree(tmp_path / where, {"cat": 10, "dog": 20})
    loaded = data.load("folder", data_dir=tmp_path)
    assert np.bincount(loaded.test.labels).tolist() == [2, 4] and len(loaded.train) == 24
    assert sorted([*loaded.train.index, *loaded.test.index]) == list(range(30))
    np.testing.assert_array_equal(data.load("folder", data_dir=tmp_path).test.index, loaded.test.index)


def test_folder_of_a_given_size_or_too_large_for_memory_is_streamed(tmp_path, monkeypatch):
    _write_tree(tmp_path, {"cat": 10, "dog": 10})
    assert not data.load("folder", data_dir=tmp_path).train.streamed
    given = data.load("folder", data_dir=tmp_path, image_size=16)
    assert given.train.streamed and given.image_shape == (16, 16, 3) and (given.crop_padding, given.flip) == (0, True)
    np.testing.assert_allclose(given.mean[2], 50 / 255, rtol=1e-9)
    monkeypatch.setattr(folder, "MAX_BYTES_IN_MEMORY", 1000)
    assert data.load("folder", data_dir=tmp_path).train.streamed
    monkeypatch.undo()
    for largest, shape in ((None, (8, 10, 3)), (16, (8, 10, 3)), (6, (6, 6, 3))):
        loaded = data.load("folder", data_dir=tmp_path, largest_side=largest)
        assert not loaded.train.streamed and loaded.image_shape == shape


def test_one_odd_size_among_many_is_fitted_to_the_others(tmp_path):
    _write_tree(tmp_path, {"cat": 10, "dog": 10})
    Image.new("RGB", (20, 30), (9, 9, 9)).save(tmp_path / "cat" / "large.png")
    loaded = data.load("folder", data_dir=tmp_path, test_share=0)
    assert not loaded.train.streamed and loaded.image_shape == (8, 10, 3) and len(loaded.train) == 21
    assert "images of 2 sizes, scaled and cropped" in loaded.description
    np.testing.assert_array_equal(loaded.train.images[data.identities(loaded.train).index("cat/large.png")], 9)


def test_images_of_many_sizes_are_decoded_once_at_the_side_that_the_network_sees(tmp_path, monkeypatch):
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for i in range(9):
            # A frame of white that the centre of a landscape or portrait image does not reach.
            image = Image.new("RGB", (60 + 10 * i, 40), (255, 255, 255))
            image.paste((10 * i, 50, label), (9, 0, 51 + 10 * i, 40))
            (image if i % 2 else image.rotate(90, expand=True)).save(tmp_path / name / f"{i}.png")
    loaded = data.load("folder", data_dir=tmp_path, test_share=0)
    assert not loaded.train.streamed and loaded.image_shape == (40, 40, 3)
    assert loaded.train.images[..., 0].max() <= 80
    given = data.load("folder", data_dir=tmp_path, largest_side=24)
    assert not given.train.streamed and given.image_shape == (24, 24, 3)
    monkeypatch.setattr(folder, "MAX_BYTES_IN_MEMORY", 1000)
    streamed = data.load("folder", data_dir=tmp_path)
    assert streamed.train.streamed and streamed.image_shape == (40, 40, 3)


@pytest.mark.parametrize("suffix", [".gif", ".tiff", ".webp", ".png"])
def test_of_several_frames_the_first_is_used_and_it_is_said(tmp_path, suffix):
    _write_tree(tmp_path, {"cat": 5, "dog": 5})
    frames = [Image.new("RGB", (10, 8), (level, 0, 0)) for level in (240, 20, 90)]
    for name in ("cat", "dog"):
        frames[0].save(tmp_path / name / f"moving{suffix}", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match="2 images have several frames or pages, of which the first is used"):
        loaded = data.load("folder", data_dir=tmp_path, test_share=0)
    shown = loaded.train.images[data.identities(loaded.train).index(f"cat/moving{suffix}")]
    assert shown.shape == (8, 10, 3) and shown[..., 0].min() > 230


def test_photographs_are_kept_at_224_pixels(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (640, 480), (9, i, 8)).save(tmp_path / name / f"{i}.jpg")
    loaded = data.load("folder", data_dir=tmp_path, test_share=0)
    assert not loaded.train.streamed and loaded.image_shape == (224, 224, 3)


@pytest.mark.parametrize("image_size", [None, 8])
def test_corrupt_images_of_a_folder(tmp_path, image_size):
    _write_tree(tmp_path / "train", {"cat": 6, "dog": 6})
    _write_tree(tmp_path / "test", {"cat": 2, "dog": 2})
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"?")
    (tmp_path / "test" / "dog" / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"2 of 16 images cannot be read .*cat/0\.png, .*dog/0\.png"):
        data.load("folder", data_dir=tmp_path, image_size=image_size)
    with pytest.warns(UserWarning, match="left out 2 of 16"):
        loaded = data.load("folder", data_dir=tmp_path, image_size=image_size, skip_corrupt=True)
    assert np.bincount(loaded.train.labels).tolist() == [5, 6] and np.bincount(loaded.test.labels).tolist() == [2, 1]
    np.testing.assert_array_equal(loaded.train.index, np.delete(np.arange(12), 0))
    np.testing.assert_array_equal(loaded.test.index, [0, 1, 3])


def test_folders_that_are_no_image_tree(tmp_path):
    with pytest.raises(UserError, match="has 0 class folders"):
        data.load("folder", data_dir=tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(UserError, match="has 1 class folders"):
        data.load("folder", data_dir=tmp_path)
    (tmp_path / "dog").mkdir()
    with pytest.raises(UserError, match="hold no images"):
        data.load("folder", data_dir=tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "cat" / "a.png")
    with pytest.raises(UserError, match=r"1 class folders without images \(dog\)"):
        data.load("folder", data_dir=tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        data.load("folder", data_dir=tmp_path / "file")
    root = tmp_path / "other"
    _write_tree(root / "train", {"cat": 2, "dog": 2})
    _write_tree(root / "test", {"cat": 2, "fish": 2})
    with pytest.raises(UserError, match=r"has classes that .* lacks \(fish\)"):
        data.load("folder", data_dir=root)
    (root / "test" / "fish" / "0.png").unlink()
