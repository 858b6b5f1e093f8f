"""Batches streamed from files."""

import numpy as np
import pytest
from PIL import Image

from examples.noisy_images.data import streaming
from examples.noisy_images.data.dataset import make_split
from examples.noisy_images.data.image_files import ImageFiles
from examples.noisy_images.errors import UserError

_COUNT = 22


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Images of different shapes; blue tells which image, red and green grow with column and row."""
    folder = tmp_path_factory.mktemp("images")
    paths = []
    for i in range(_COUNT):
        height, width = 40 + i, 70 - i
        rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
        image = np.stack([255 * columns / width, 255 * rows / height, np.full_like(rows, 10 * i)], -1)
        paths.append(str(folder / f"{i}.png"))
        Image.fromarray(image.astype(np.uint8)).save(paths[-1])
    return make_split(ImageFiles(tuple(paths), 16), np.arange(_COUNT) % 2, clean=False)


def _pass(split, **options):
    defaults = dict(batch_size=4, seed=1, epoch=0, workers=0, train=True, image_size=16)
    return list(streaming.batches(split, **defaults | options))


def _assert_same(first, second):
    for (images, positions), (other_images, other_positions) in zip(first, second, strict=True):
        np.testing.assert_array_equal(images, other_images)
        np.testing.assert_array_equal(positions, other_positions)


def test_a_training_pass_has_each_image_at_most_once_and_its_own_pixels(split):
    batches = _pass(split)
    assert len(batches) == _COUNT // 4 == streaming.num_batches(_COUNT, 4, train=True)
    positions = np.concatenate([positions for _, positions in batches])
    assert len(set(positions)) == len(positions) == 20 and positions.dtype == np.int32
    for images, chosen in batches:
        assert type(images) is np.ndarray and images.shape == (4, 16, 16, 3) and images.dtype == np.uint8
        np.testing.assert_array_equal(images[..., 2], np.broadcast_to(10 * chosen[:, None, None], (4, 16, 16)))


def test_an_evaluation_pass_has_every_image_once_in_order(split):
    batches = _pass(split, train=False, batch_size=5)
    assert len(batches) == 5 == streaming.num_batches(_COUNT, 5, train=False)
    positions = np.concatenate([positions for _, positions in batches])
    np.testing.assert_array_equal(positions, [*range(_COUNT), -1, -1, -1])
    images = np.concatenate([images for images, _ in batches])
    np.testing.assert_array_equal(images[:_COUNT, 0, 0, 2], 10 * np.arange(_COUNT))
    _assert_same(batches, _pass(split, train=False, batch_size=5, seed=9, epoch=3))


def test_seed_and_epoch_decide_order_and_crops(split):
    first = _pass(split)
    _assert_same(first, _pass(split))
    for other in (_pass(split, seed=2), _pass(split, epoch=1)):
        assert [p.tolist() for _, p in first] != [p.tolist() for _, p in other]
    # The same image is cropped elsewhere in the next epoch.
    crops = [
        {
            int(p): image[0, 0].tolist()
            for images, positions in passed
            for p, image in zip(positions, images, strict=True)
        }
        for passed in (first, _pass(split, epoch=1))
    ]
    shared = set(crops[0]) & set(crops[1])
    assert sum(crops[0][p] != crops[1][p] for p in shared) > len(shared) / 2


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("start_step", [1, 3, 5])
def test_a_pass_that_starts_late_is_the_rest_of_a_whole_one(split, train, start_step):
    _assert_same(_pass(split, train=train)[start_step:], _pass(split, train=train, start_step=start_step))


@pytest.mark.parametrize("train", [True, False])
def test_processes_have_shares_of_one_pass(split, train):
    # The last batch of an evaluation holds two images, so that the second process has nothing but repeats.
    shares = [_pass(split, train=train, process_index=index, process_count=2) for index in range(2)]
    whole = _pass(split, train=train)
    for first, second, (images, positions) in zip(*shares, whole, strict=True):
        np.testing.assert_array_equal(np.concatenate([first[1], second[1]]), positions)
        known = positions >= 0
        np.testing.assert_array_equal(np.concatenate([first[0], second[0]])[known], images[known])


def test_training_without_augmentation_crops_the_centre(split):
    """The pixels are those of evaluation, in the order of training."""
    centred = np.concatenate([images for images, _ in _pass(split, train=False)])
    for images, positions in _pass(split, augment=False):
        np.testing.assert_array_equal(images, centred[positions])
    assert [p.tolist() for _, p in _pass(split, augment=False)] == [p.tolist() for _, p in _pass(split)]


def test_worker_processes_change_nothing(split):
    _assert_same(_pass(split)[1:], _pass(split, workers=2, start_step=1))


def test_a_pass_can_be_given_up(split):
    batches = streaming.batches(split, batch_size=4, seed=0, epoch=0, workers=0, train=True, image_size=16)
    next(batches)
    batches.close()


def test_square_scales_the_shorter_side_and_crops_the_centre(split):
    # 56 pixels of 64 are left, so an eighth of the shorter side is cut off, half of it on either side.
    image = streaming.square(split.images, 0, 56)
    height, width = 40, 70
    scaled = 64 / height
    for axis, size, channel in ((1, width, 0), (0, height, 1)):
        first = np.take(image[..., channel], 0, axis).mean() / 255 * size
        last = np.take(image[..., channel], -1, axis).mean() / 255 * size
        margin = (size - 56 / scaled) / 2
        np.testing.assert_allclose([first, last], [margin, size - margin], atol=1)


def test_square_equals_resize_then_crop(split):
    with Image.open(split.images.paths[3]) as image:
        width, height = image.size
        scale = 32 / min(width, height)
        resized = np.asarray(image.resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR))
    rng = np.random.default_rng(0)
    left, top = (int(rng.integers(n - 28 + 1)) for n in resized.shape[1::-1])
    square = streaming.square(split.images, 3, 28, np.random.default_rng(0))
    np.testing.assert_allclose(square.astype(int), resized[top : top + 28, left : left + 28].astype(int), atol=2)


def test_a_small_image_is_enlarged(tmp_path):
    Image.new("RGB", (3, 1), (9, 8, 7)).save(tmp_path / "small.png")
    square = streaming.square(ImageFiles((str(tmp_path / "small.png"),)), 0, 8, np.random.default_rng(0))
    assert square.shape == (8, 8, 3) and np.all(square == [9, 8, 7])


def test_bad_input(split, tmp_path):
    with pytest.raises(UserError, match="a batch of 23 is larger than the 22 training images"):
        _pass(split, batch_size=23)
    assert len(_pass(split, batch_size=23, train=False)) == 1
    with pytest.raises(ValueError, match="start_step"):
        _pass(split, start_step=6)
    (tmp_path / "broken.png").write_bytes(b"?")
    broken = make_split(ImageFiles((*split.images.paths[:3], str(tmp_path / "broken.png"))), [0] * 4, clean=False)
    with pytest.raises(UserError, match=r"cannot read the image .*broken\.png"):
        _pass(broken, train=False)
