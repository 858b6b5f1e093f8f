"""The user's own arrays."""

import numpy as np
import pytest

from examples.noisy_images import data
from examples.noisy_images.errors import UserError


def _arrays(count=50, shape=(32, 32, 3), **more):
    images = np.random.default_rng(1).integers(0, 256, (count, *shape), dtype=np.uint8)
    return {"images": images, "labels": np.arange(count) % 5, **more}


def _write(tmp_path, **arrays):
    np.savez(tmp_path / "own.npz", **arrays)
    return tmp_path / "own.npz"


def test_npz_splits_off_a_stratified_fifth(tmp_path):
    arrays = _arrays()
    path = _write(tmp_path, **arrays)
    loaded = data.load("npz", data_dir=path)
    assert len(loaded.train) == 40 and len(loaded.test) == 10
    assert np.bincount(loaded.test.labels).tolist() == [2] * 5
    for split in (loaded.train, loaded.test):
        np.testing.assert_array_equal(split.images, arrays["images"][split.index])
        np.testing.assert_array_equal(split.labels, arrays["labels"][split.index])
        assert split.clean_labels is None and split.labels.dtype == np.int32
    assert sorted([*loaded.train.index, *loaded.test.index]) == list(range(50))
    assert loaded.class_names == ("0", "1", "2", "3", "4")
    np.testing.assert_allclose(loaded.mean, (loaded.train.images / 255).mean((0, 1, 2)), rtol=1e-9)
    assert (loaded.crop_padding, loaded.flip) == (4, True)
    np.testing.assert_array_equal(data.load("npz", data_dir=path).test.index, loaded.test.index)
    assert not np.array_equal(data.load("npz", data_dir=path, seed=1).test.index, loaded.test.index)


def test_npz_with_clean_labels_is_tested_against_them(tmp_path):
    clean = (np.arange(50) + 1) % 5
    loaded = data.load("npz", data_dir=_write(tmp_path, **_arrays(clean_labels=clean)))
    np.testing.assert_array_equal(loaded.train.labels, loaded.train.index % 5)
    np.testing.assert_array_equal(loaded.train.clean_labels, clean[loaded.train.index])
    np.testing.assert_array_equal(loaded.test.labels, clean[loaded.test.index])
    np.testing.assert_array_equal(loaded.test.clean_labels, loaded.test.labels)


def test_npz_with_its_own_test_set_and_names(tmp_path):
    test = _arrays(6, (8, 8))
    path = _write(
        tmp_path,
        **_arrays(20, (8, 8)),
        test_images=test["images"],
        test_labels=test["labels"],
        class_names=np.array(list("abcdefg")),
    )
    with pytest.warns(UserWarning, match=r"no training sample of 2 of 7 classes \(f, g\)"):
        loaded = data.load("npz", data_dir=path)
    assert loaded.image_shape == (8, 8, 1) and len(loaded.train) == 20 and len(loaded.test) == 6
    assert loaded.class_names == tuple("abcdefg")
    assert (loaded.crop_padding, loaded.flip) == (0, False)
    np.testing.assert_array_equal(loaded.test.images[..., 0], test["images"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.full((50, 4, 4, 3), 7, np.float32)}, "floats from 0 to 1, got float32 from 7 to 7: scale"),
        ({"images": np.full((50, 4, 4), np.nan)}, "floats from 0 to 1, got float64 from nan to nan"),
        ({"images": np.zeros((50, 4, 4), np.int64)}, "images must be uint8 from 0 to 255, .*, got int64"),
        ({"images": np.zeros((50, 4, 4, 2), np.uint8)}, r"images must have the shape .*, got \(50, 4, 4, 2\)"),
        ({"images": np.zeros((50, 4), np.uint8)}, r"images must have the shape .*, got \(50, 4\)"),
        ({"images": np.zeros((0, 4, 4), np.uint8), "labels": np.zeros(0, int)}, "images is empty"),
        ({"labels": np.arange(49)}, r"labels must have the shape \(50,\), one per image, got \(49,\)"),
        ({"labels": np.zeros(50)}, "labels must be integers, got float64"),
        ({"labels": np.arange(50) - 1}, "labels must not be negative, got -1"),
        ({"labels": np.arange(50) + 1000}, "the label 1049 is out of range for 50 images"),
        ({"labels": np.arange(50) + 2**40}, "labels has the value"),
        ({"clean_labels": np.full(50, 99)}, "the label 99 is out of range"),
        ({"class_names": np.array(["a", "b"])}, "the label 4 is out of range for 2 class_names"),
        ({"test_images": np.zeros((5, 32, 32, 3), np.uint8)}, "only one of test_images and test_labels"),
        ({"test_images": np.zeros((5, 8, 8, 3), np.uint8), "test_labels": np.zeros(5, int)}, "make them alike"),
        ({"labels": np.array([None] * 50)}, "labels is an array of Python objects"),
        ({"class_names": np.array(list("abcde"), object)}, r"class_names is an array of Python objects.*dtype=str"),
        ({"class_names": np.array(list("abcda"))}, r"class_names has names twice \(a\)"),
        ({"ids": np.array(["a", "b"] * 25)}, r"ids has 2 names twice \(a, b\)"),
        ({"ids": np.arange(49)}, r"ids must have the shape \(50,\)"),
        ({"texts": np.array(["a"])}, r"texts must have the shape \(50,\)"),
        ({"labels": np.arange(50) % 5 + 1}, r"the labels count from 1 to 5, so that no sample is of class 0"),
        (
            {"labels": np.arange(50) % 5 + 1, "class_names": np.array(list("abcde"))},
            "the label 5 is out of range for 5 class_names and they count from 1",
        ),
        ({"labels": np.zeros(50, int)}, r"training samples of one class alone \(0\)"),
        ({"labels": np.full(50, "same")}, r"training samples of one class alone \(same\)"),
        ({"features": np.zeros((50, 3))}, "has both images and features"),
        ({"clean_labels": np.full(50, "cat")}, "some of labels, clean_labels are strings and some integers"),
        (
            {"test_images": np.zeros((5, 32, 32, 3), np.uint8), "test_labels": np.arange(5) + 3},
            r"test samples of 3 classes without a training sample \(5, 6, 7\)",
        ),
    ],
)
def test_npz_of_wrong_contents(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        data.load("npz", data_dir=_write(tmp_path, **_arrays() | change))


def test_npz_that_is_none(tmp_path):
    path = _write(tmp_path, images=np.zeros((3, 4, 4), np.uint8))
    with pytest.raises(UserError, match="has no array 'labels': it holds images"):
        data.load("npz", data_dir=path)
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot read"):
        data.load("npz", data_dir=path)
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(UserError, match="holds a single array"):
        data.load("npz", data_dir=tmp_path / "single.npy")
    with pytest.raises(UserError, match="cannot read"):
        data.load("npz", data_dir=tmp_path)
    whole = _write(tmp_path, **_arrays()).read_bytes()
    for contents in (whole[: len(whole) // 2], whole[:5000] + bytes(99) + whole[5099:]):
        path.write_bytes(contents)
        with pytest.raises(UserError, match=r"cannot read|is damaged"):
            data.load("npz", data_dir=path)
    with pytest.raises(UserError, match="too few"):
        data.load("npz", data_dir=_write(tmp_path, **_arrays(2)))


def _features(count=40, columns=5, **more):
    values = np.random.default_rng(2).normal(3, 2, (count, columns))
    return {"features": values, "labels": np.arange(count) % 4, **more}


def test_features_are_kept_as_floats_and_standardised_from_training_data(tmp_path):
    arrays = _features(test_features=np.full((8, 5), 100), test_labels=np.arange(8) % 4)
    arrays["features"][:, 2] = 0.1
    loaded = data.load("npz", data_dir=_write(tmp_path, **arrays))
    assert loaded.train.images.dtype == np.float32 and loaded.image_shape == (5,)
    np.testing.assert_array_equal(loaded.train.images, arrays["features"].astype(np.float32))
    np.testing.assert_allclose(loaded.mean, arrays["features"].mean(0), rtol=1e-6)
    expected = arrays["features"].std(0)
    np.testing.assert_allclose(loaded.std, [*expected[:2], 1, *expected[3:]], rtol=1e-6)
    assert (loaded.crop_padding, loaded.flip) == (0, False)
    assert "5 features" in loaded.description and "40 to train and 8 to test" in loaded.description


@pytest.mark.parametrize("dtype", [np.float16, np.int32, np.uint8, bool])
def test_features_of_any_numbers(tmp_path, dtype):
    values = (np.arange(80).reshape(40, 2) % 7).astype(dtype)
    loaded = data.load("npz", data_dir=_write(tmp_path, **_features() | {"features": values}))
    assert len(loaded.train) == 32 and loaded.train.images.dtype == np.float32
    np.testing.assert_array_equal(loaded.train.images, values[loaded.train.index])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.where(np.arange(200).reshape(40, 5) == 38, np.nan, 1.0)}, "1 values .* row 7, column 3"),
        ({"features": np.full((40, 5), 1e300)}, "features has 200 values that are no finite numbers"),
        ({"features": np.zeros((40, 5, 1))}, r"features must be numbers of the shape \(N, D\), got float64 of shape"),
        ({"features": np.zeros((40, 0))}, r"of shape \(40, 0\)"),
        ({"features": np.full((40, 5), "1")}, "features must be numbers"),
        ({"labels": np.arange(39)}, r"labels must have the shape \(40,\), one per sample"),
        ({"test_features": np.zeros((4, 6)), "test_labels": np.arange(4)}, "test_features have 6 columns but features"),
        ({"test_features": np.zeros((4, 5))}, "only one of test_features and test_labels"),
    ],
)
def test_features_of_wrong_contents(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        data.load("npz", data_dir=_write(tmp_path, **_features() | change))


def test_features_are_neither_cropped_nor_flipped(tmp_path):
    path = _write(tmp_path, **_features())
    for option in ({"crop_padding": 2}, {"flip": True}):
        with pytest.raises(UserError, match="holds features, which cannot be cropped or flipped"):
            data.load("npz", data_dir=path, **option)
    assert not data.load("npz", data_dir=path, crop_padding=0, flip=False).flip


def test_every_sample_can_be_trained_on(tmp_path):
    path = _write(tmp_path, **_features(clean_labels=np.arange(40) % 4))
    loaded = data.load("npz", data_dir=path, test_share=0)
    assert len(loaded.train) == 40 and len(loaded.test) == 0 and loaded.test.images.shape == (0, 5)
    assert "40 to train and 0 to test" in loaded.description and "none split off" in loaded.description
    assert len(data.load("npz", data_dir=path, test_share=0.5).test) == 20
    with pytest.raises(UserError, match="share of the test set must lie from 0 to below 1, got 1"):
        data.load("npz", data_dir=path, test_share=1)
    # A test set of one's own stays.
    path = _write(tmp_path, **_features(test_features=np.zeros((4, 5)), test_labels=np.arange(4)))
    assert len(data.load("npz", data_dir=path, test_share=0).test) == 4


def test_labels_can_be_strings(tmp_path):
    names = np.array(["wasp", "bee", "fly", "ant"])
    arrays = _features(test_features=np.zeros((2, 5)), test_labels=np.array(["fly", "bee"]))
    arrays["labels"] = names[arrays["labels"]]
    loaded = data.load("npz", data_dir=_write(tmp_path, **arrays))
    assert loaded.class_names == ("ant", "bee", "fly", "wasp")
    assert [loaded.class_names[label] for label in loaded.train.labels] == list(arrays["labels"])
    assert [loaded.class_names[label] for label in loaded.test.labels] == ["fly", "bee"]
    arrays["class_names"] = names
    assert data.load("npz", data_dir=_write(tmp_path, **arrays)).train.labels.tolist() == [0, 1, 2, 3] * 10
    as_bytes = arrays | {"labels": arrays["labels"].astype("S")}
    assert data.load("npz", data_dir=_write(tmp_path, **as_bytes)).train.labels.tolist() == [0, 1, 2, 3] * 10
    with pytest.raises(UserError, match=r"labels has labels that class_names lacks \(wasp\)"):
        data.load("npz", data_dir=_write(tmp_path, **arrays | {"class_names": names[1:]}))


def test_a_column_of_labels_is_taken_for_labels(tmp_path):
    loaded = data.load("npz", data_dir=_write(tmp_path, **_arrays(labels=(np.arange(50) % 5)[:, None])))
    np.testing.assert_array_equal(loaded.train.labels, loaded.train.index % 5)


def test_ids_and_texts_go_with_their_samples(tmp_path):
    ids = np.array([f"row-{7 * i % 40}" for i in range(40)])
    arrays = _features(ids=ids, texts=np.array([f"text of {name}" for name in ids]))
    loaded = data.load("npz", data_dir=_write(tmp_path, **arrays))
    for split in (loaded.train, loaded.test):
        assert data.identities(split) == ids[split.index].tolist()
        assert split.texts == tuple(f"text of {name}" for name in ids[split.index])
    # Who is tested on depends on the name and not on the place, so that another order changes nothing.
    order = np.random.default_rng(0).permutation(40)
    moved = data.load("npz", data_dir=_write(tmp_path, **{name: values[order] for name, values in arrays.items()}))
    assert set(data.identities(moved.test)) == set(data.identities(loaded.test))
    stored = data.fingerprint(loaded)
    data.check_same_samples(stored, moved)
    numbered = data.load("npz", data_dir=_write(tmp_path, **_features(ids=np.arange(40) + 500)))
    assert data.identities(numbered.train)[0].startswith("5")


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_floats_and_16_bits_have_the_pixels_of_uint8(tmp_path, channels):
    images = np.random.default_rng(5).integers(0, 256, (20, 6, 6, channels), np.uint8)
    images[0, 0, 0] = 255
    labels = np.arange(20) % 2
    for values in (images / 255, (images / 255).astype(np.float32), images.astype(np.uint16) * 257):
        loaded = data.load("npz", data_dir=_write(tmp_path, images=values, labels=labels))
        np.testing.assert_array_equal(loaded.train.images, images[loaded.train.index])
    # 12 bits in 16 keep their contrast.
    loaded = data.load("npz", data_dir=_write(tmp_path, images=images.astype(np.uint16) * 16, labels=labels))
    assert loaded.train.images.max() >= 254
    assert np.abs(loaded.train.images.astype(int) - images[loaded.train.index]).max() <= 1


def test_transparent_pixels_are_white(tmp_path):
    images = np.zeros((10, 4, 4, 4), np.uint8)
    images[..., 0] = 200
    images[:, :2, :, 3], images[:, 2:, :, 3] = 255, 51
    loaded = data.load("npz", data_dir=_write(tmp_path, images=images, labels=np.arange(10) % 2))
    assert loaded.image_shape == (4, 4, 3)
    assert loaded.train.images[0, 0, 0].tolist() == [200, 0, 0]
    assert loaded.train.images[0, 3, 0].tolist() == [244, 204, 204]


def test_grey_images_in_three_channels_are_not_mirrored(tmp_path):
    arrays = _arrays(shape=(32, 32, 3))
    assert data.load("npz", data_dir=_write(tmp_path, **arrays)).flip
    arrays["images"][...] = arrays["images"][..., :1]
    assert not data.load("npz", data_dir=_write(tmp_path, **arrays)).flip


def test_arrays_of_unknown_names_are_mentioned(tmp_path):
    with pytest.warns(UserWarning, match="has arrays that are not used: label_names"):
        data.load("npz", data_dir=_write(tmp_path, **_arrays(label_names=np.array(["a"]))))
