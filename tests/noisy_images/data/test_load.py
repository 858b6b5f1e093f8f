"""The registry of data sets."""

import subprocess
import sys

import pytest

from examples.noisy_images import data
from examples.noisy_images.errors import UserError


def test_an_unknown_name_lists_the_nearest_and_all():
    with pytest.raises(
        UserError, match=r"unknown data set 'cifar11': did you mean 'cifar1.*choose one of .*digits.*npz"
    ):
        data.load("cifar11")
    with pytest.raises(UserError, match="unknown data set"):
        data.prepare("cifr10")


def test_what_needs_no_preparation_says_so():
    with pytest.raises(UserError, match="'digits' needs no preparation"):
        data.prepare("digits")


@pytest.mark.parametrize("name", ["tiny_imagenet", "mini_webvision", "folder", "npz"])
def test_a_data_set_without_its_folder(name, tmp_path):
    with pytest.raises(UserError, match=f"'{name}' needs --data-dir"):
        data.load(name)
    with pytest.raises(UserError, match=r"nowhere' does not exist"):
        data.load(name, data_dir=tmp_path / "nowhere")


def test_overrides():
    loaded = data.load("digits", mean=[0.5], std=[0.25], crop_padding=1, flip=True)
    assert (loaded.mean, loaded.std, loaded.crop_padding, loaded.flip) == ((0.5,), (0.25,), 1, True)
    with pytest.raises(UserError, match="mean has 3 values but the images have 1 channels"):
        data.load("digits", mean=[0.5] * 3)
    with pytest.raises(UserError, match="std must be positive"):
        data.load("digits", std=[0.0])
    with pytest.raises(UserError, match="crop_padding must not be negative"):
        data.load("digits", crop_padding=-1)


def test_import_needs_nothing_but_numpy():
    program = (
        "import sys; from examples.noisy_images import data; "
        "print([m for m in ('tensorflow', 'tensorflow_datasets', 'grain', 'sklearn', 'PIL', 'scipy', 'flax') "
        "if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"
