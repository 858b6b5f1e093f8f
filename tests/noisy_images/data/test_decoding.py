"""From the bytes of a file to the pixels that a viewer shows."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from examples.noisy_images import data
from examples.noisy_images.data import decoding, streaming
from examples.noisy_images.data.decoding import Levels

_RNG = np.random.default_rng(0)


def _bytes(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _decoded(image, kind="PNG", levels=decoding.DEFAULT_LEVELS, **options):
    return np.asarray(decoding.decode(_bytes(image, kind, **options), levels))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 5, 8])
def test_the_orientation_of_a_camera_is_applied(kind, orientation):
    stored = np.zeros((24, 40, 3), np.uint8)
    stored[:8, :16], stored[16:, 24:] = (250, 0, 0), (0, 0, 250)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    content = _bytes(Image.fromarray(stored), kind, exif=exif, **options)
    transposed = Image.fromarray(stored)
    transposed.getexif()[0x0112] = orientation
    shown = np.asarray(ImageOps.exif_transpose(transposed))
    pixels = np.asarray(decoding.decode(content))
    assert pixels.shape == shown.shape and np.abs(pixels.astype(int) - shown).mean() < 3
    header = decoding.read_header(content)
    assert (header.height, header.width, header.extent) == (*shown.shape[:2], None)
    # Decoded at a fraction of its size as well.
    smaller = decoding.decode(content, at_least=12)
    assert (smaller.width < smaller.height) == (shown.shape[1] < shown.shape[0])


def test_a_damaged_note_of_the_orientation_leaves_the_picture():
    content = _bytes(Image.new("RGB", (8, 4), (1, 2, 3)), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert decoding.decode(content).size == (8, 4)


def _transparent(mode):
    """An image that is black, transparent on its right half."""
    if mode == "P":
        image = Image.new("P", (4, 2), 0)
        image.putpalette([0, 0, 0, 255, 0, 0])
        image.paste(1, (2, 0, 4, 2))
        return image, {"transparency": 1}
    if mode in ("RGB", "L"):
        image = Image.new(mode, (4, 2), 0)
        colour = (9, 8, 7) if mode == "RGB" else 9
        image.paste(colour, (2, 0, 4, 2))
        return image, {"transparency": colour}
    image = Image.new(mode, (4, 2), 0)
    image.putalpha(Image.fromarray(np.array([[255, 255, 0, 0]] * 2, np.uint8)))
    return image, {}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_what_is_transparent_shows_the_background(mode):
    image, options = _transparent(mode)
    expected = [[[0, 0, 0]] * 2 + [[255, 255, 255]] * 2] * 2
    assert _decoded(image, "PNG", **options).tolist() == expected


def test_what_is_half_transparent_is_mixed_with_white():
    image = Image.new("RGBA", (2, 2), (100, 0, 0, 51))
    np.testing.assert_allclose(_decoded(image)[0, 0], [0.2 * 100 + 204, 204, 204], atol=1)
    assert _decoded(image, "WEBP", lossless=True).tolist() == _decoded(image).tolist()


@pytest.mark.parametrize(
    ("kind", "dtype", "white"),
    [("PNG", np.uint16, 65535), ("TIFF", np.uint16, 65535), ("PPM", np.uint16, 65535), ("TIFF", np.int32, 65535)],
)
def test_wide_integers_are_scaled_by_their_range(kind, dtype, white):
    ramp = np.linspace(0, white, 300).reshape(15, 20).astype(dtype)
    pixels = _decoded(Image.fromarray(ramp), kind)
    np.testing.assert_array_equal(pixels, np.rint(ramp / 257.0)[..., None].repeat(3, -1))


@pytest.mark.parametrize(
    ("low", "high", "dtype", "levels"),
    [
        (0, 4000, np.uint16, (0, 4095)),
        (3, 900, np.uint16, (0, 1023)),
        (0, 60_000, np.int32, (0, 65535)),
        (-1024, 3071, np.int32, (-1024, 3071)),
        (5, 2**20, np.int32, (5, 2**20)),
        (0, 200, np.uint16, (0, 255)),
        (0.1, 0.9, np.float32, (0, 1)),
        (0, 240, np.float32, (0, 255)),
        (0, 0.01, np.float32, (0, 0.01)),
        (-3, 12.5, np.float32, (-3, 12.5)),
        (7, 7, np.float32, (7, 8)),
    ],
)
def test_a_folder_of_wide_images_keeps_its_contrast_and_brightness(tmp_path, low, high, dtype, levels):
    ramp = np.linspace(low, high, 32 * 32).reshape(32, 32).astype(dtype)
    darker = (low + (ramp - low) * 0.5).astype(dtype)
    for name, values in (("bright", ramp), ("dark", darker)):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.fromarray(values).save(tmp_path / name / f"{i}.tif")
    (tmp_path / "dark" / "8bit.png").write_bytes(_bytes(Image.new("L", (32, 32), 77)))
    with pytest.warns(UserWarning, match="6 images have more than 8 bits: .* become black to white"):
        loaded = data.load("folder", data_dir=tmp_path, test_share=0)
    black, white = np.float64(np.float32(levels))
    for split_id, values in (("bright/0.tif", ramp), ("dark/1.tif", darker)):
        pixels = loaded.train.images[data.identities(loaded.train).index(split_id)]
        expected = 255 * (values.astype(np.float64) - black) / (white - black)
        np.testing.assert_allclose(pixels[..., 1], expected, atol=0.51)
    assert np.all(loaded.train.images[data.identities(loaded.train).index("dark/8bit.png")] == 77)
    assert not loaded.flip
    # The stream sees what memory holds.
    with pytest.warns(UserWarning, match="more than 8 bits"):
        streamed = data.load("folder", data_dir=tmp_path, image_size=28, test_share=0)
    np.testing.assert_array_equal(streamed.train.images[0], loaded.train.images[0])
    assert not streamed.flip and streaming.square(streamed.train.images, 0, 28).max() <= 255


def test_pixels_that_are_no_numbers_or_outside_of_the_levels_are_refused():
    with pytest.raises(ValueError, match="pixels that are no numbers"):
        _decoded(Image.fromarray(np.array([[0, np.nan]], np.float32)), "TIFF")
    with pytest.raises(ValueError, match="its pixels from 0 to 300 lie outside of 0, black, to 255, white"):
        _decoded(Image.fromarray(np.array([[0, 300]], np.int32)), "TIFF", Levels((0, 255)))


def test_other_modes_become_rgb():
    colour = np.full((4, 4, 3), (200, 60, 20), np.uint8)
    rgb = Image.fromarray(colour)
    assert np.abs(_decoded(rgb.convert("CMYK"), "TIFF").astype(int) - colour).max() <= 2
    assert np.abs(_decoded(rgb.convert("YCbCr"), "TIFF").astype(int) - colour).max() <= 3
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(rgb, *profiles, outputMode="LAB")
    assert np.abs(_decoded(lab, "TIFF").astype(int) - colour).max() <= 6
    assert _decoded(Image.new("1", (3, 3), 1)).tolist() == [[[255] * 3] * 3] * 3
    assert _decoded(Image.new("L", (3, 3), 9)).tolist() == [[[9] * 3] * 3] * 3


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = _decoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert pixels[3, 3].tolist() == [200, 0, 0]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "the file is empty"),
        (b"<html>not found</html>", "no image format that the installed Pillow knows"),
        (_bytes(Image.fromarray(_RNG.integers(0, 256, (40, 40, 3), np.uint8)))[:900], "truncated"),
    ],
)
def test_why_a_file_cannot_be_read(content, why, tmp_path):
    with pytest.raises(ValueError, match=why) as raised:
        decoding.decode(content)
    assert "\n" not in str(raised.value) and "BytesIO" not in str(raised.value)


def test_all_that_the_installed_pillow_decodes_is_an_image():
    assert {".jpg", ".jfif", ".jpe", ".pgm", ".tga", ".avif", ".webp", ".jp2", ".ppm", ".tiff"} <= decoding.suffixes()
    assert not {".pdf", ".txt", ".mpg", ".h5", ".eps", ".db", ".npz", ""} & decoding.suffixes()
