"""Tiny-ImageNet on small trees in its official layout."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from examples.noisy_images import data
from examples.noisy_images.errors import UserError

# Neither alphabetical nor all in use order, as in the official list.
_WNIDS = ("n02124075", "n01443537", "n04067472")


def _jpeg(value, size=(64, 64), mode="RGB"):
    stream = io.BytesIO()
    Image.new(mode, size, value if mode == "L" else (value, 255 - value, 7)).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def _files():
    """Return name -> contents: 12 training images of each class, 3 validation images; colour tells which is which."""
    files = {
        "wnids.txt": "\n".join(_WNIDS).encode(),
        "words.txt": b"n01443537\tgoldfish, Carassius auratus\nn02124075\tEgyptian cat\nn99999999\tother\n",
        "val/val_annotations.txt": b"".join(
            f"val_{i}.JPEG\t{wnid}\t0\t0\t9\t9\n".encode() for i, wnid in enumerate(_WNIDS)
        ),
        "test/images/test_0.JPEG": _jpeg(0),
    }
    for i, wnid in enumerate(_WNIDS):
        for j in range(12):
            files[f"train/{wnid}/images/{wnid}_{j}.JPEG"] = _jpeg(60 * i + 5 * j)
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b"boxes"
        files[f"val/images/val_{i}.JPEG"] = _jpeg(200 + i)
    files["train/n02124075/images/n02124075_3.JPEG"] = _jpeg(99, mode="L")
    return files


def _write_folder(root, files):
    for name, contents in files.items():
        path = root / "tiny-imagenet-200" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)
    return root / "tiny-imagenet-200"


def _write_zip(root, files):
    with zipfile.ZipFile(root / "tiny-imagenet-200.zip", "w") as archive:
        for name, contents in files.items():
            archive.writestr(f"tiny-imagenet-200/{name}", contents)
    return root / "tiny-imagenet-200.zip"


@pytest.mark.parametrize("layout", ["folder", "parent", "zip", "parent of zip"])
def test_load(tmp_path, layout):
    path = (_write_zip if "zip" in layout else _write_folder)(tmp_path, _files())
    loaded = data.load("tiny_imagenet", data_dir=tmp_path if "parent" in layout else path)
    assert loaded.train.images.shape == (36, 64, 64, 3) and loaded.train.images.dtype == np.uint8
    assert loaded.class_names == ("goldfish", "Egyptian cat", "n04067472")
    np.testing.assert_array_equal(loaded.train.labels, np.repeat([0, 1, 2], 12))
    np.testing.assert_array_equal(loaded.test.labels, [1, 0, 2])
    np.testing.assert_array_equal(loaded.train.clean_labels, loaded.train.labels)
    # In the order of their numbers, not n_1, n_10, n_11, n_2.
    reds = loaded.train.images[:, 30, 30, 0].astype(int)
    expected = np.concatenate([60 + 5 * np.arange(12), 5 * np.arange(12), 120 + 5 * np.arange(12)])
    grey = 12 + 3
    np.testing.assert_allclose(np.delete(reds, grey), np.delete(expected, grey), atol=3)
    assert np.ptp(loaded.train.images[grey], axis=-1).max() == 0
    np.testing.assert_allclose(loaded.test.images[:, 30, 30, 0], [200, 201, 202], atol=3)
    assert loaded.mean == (0.4802, 0.4481, 0.3975) and loaded.std == (0.2302, 0.2265, 0.2262)
    assert (loaded.crop_padding, loaded.flip, loaded.superclasses) == (8, True, None)


@pytest.mark.parametrize("write", [_write_folder, _write_zip])
def test_corrupt_images(tmp_path, write):
    files = _files()
    files["train/n01443537/images/n01443537_2.JPEG"] = files["train/n01443537/images/n01443537_2.JPEG"][:300]
    files["val/images/val_1.JPEG"] = b"?"
    path = write(tmp_path, files)
    with pytest.raises(UserError, match=r"2 of 39 images cannot be read .*n01443537_2\.JPEG, .*val_1\.JPEG"):
        data.load("tiny_imagenet", data_dir=path)
    with pytest.warns(UserWarning, match="left out 2 of 39"):
        loaded = data.load("tiny_imagenet", data_dir=path, skip_corrupt=True)
    np.testing.assert_array_equal(loaded.train.index, np.delete(np.arange(36), 2))
    np.testing.assert_array_equal(loaded.test.index, [0, 2])
    np.testing.assert_array_equal(loaded.test.labels, [1, 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("words.txt"), r"has no .*words\.txt"),
        (lambda f: f.pop("val/val_annotations.txt"), r"has no .*val_annotations\.txt"),
        (lambda f: f.pop("val/images/val_2.JPEG"), r"1 of 3 validation images of .* are missing .*val_2\.JPEG"),
        (
            lambda f: [f.pop(n) for n in list(f) if n.startswith("train/n0406")],
            r"no training images for 1 of 3 .*n0406",
        ),
        (lambda f: f.update({"val/val_annotations.txt": b"val_0.JPEG\tn5\n"}), r"has the line 'val_0\.JPEG\\tn5'"),
        (
            lambda f: f.update({"val/images/val_0.JPEG": _jpeg(1, (32, 64))}),
            r"val_0\.JPEG' has 64x32 pixels where 64x64",
        ),
    ],
)
@pytest.mark.parametrize("write", [_write_folder, _write_zip])
def test_incomplete_trees(tmp_path, change, message, write):
    files = _files()
    change(files)
    with pytest.raises(UserError, match=message):
        data.load("tiny_imagenet", data_dir=write(tmp_path, files))


def test_other_folders_and_cut_zips(tmp_path):
    with pytest.raises(UserError, match=r"is not Tiny-ImageNet, it has no wnids\.txt"):
        data.load("tiny_imagenet", data_dir=tmp_path)
    path = _write_zip(tmp_path, _files())
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="is cut short or damaged"):
        data.load("tiny_imagenet", data_dir=path)


def test_an_image_is_the_same_in_the_folder_and_in_the_zip(tmp_path):
    files = _files()
    files["train/n02124075/images/._n02124075_0.JPEG"] = b"\0\5\x16\7 left by a Mac"
    loaded = [data.load("tiny_imagenet", data_dir=write(tmp_path, files)) for write in (_write_folder, _write_zip)]
    for split in ("train", "test"):
        first, second = (getattr(one, split) for one in loaded)
        assert data.identities(first) == data.identities(second)
        assert data.fingerprints(first) == data.fingerprints(second)
    assert data.identities(loaded[0].train)[2] == "train/n01443537/images/n01443537_2.JPEG"
    assert data.identities(loaded[0].test)[0] == "val/images/val_0.JPEG"
    data.check_same_samples(data.fingerprint(loaded[0]), loaded[1])
