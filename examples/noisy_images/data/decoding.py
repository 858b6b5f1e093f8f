"""From the bytes of an image file to the pixels that a viewer shows, for memory, stream and contact sheet alike."""

import functools
import io
import math
import os
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

# What shines through transparent pixels, as in most viewers.
BACKGROUND = (255, 255, 255)

_ORIENTATION = 0x0112
# Formats that Pillow knows and cannot decode by itself, or that are no images for a network.
_NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
# Formats whose further frames are other forms or the layers of the same picture.
_ONE_PICTURE = {"MPO", "PSD"}


class Levels(NamedTuple):
    """The values that become black and white where pixels have more than 8 bits.

    Attributes:
      integer: For pixels of 16 and 32 bits.
      real: For pixels that are floats.
    """

    integer: tuple[float, float] = (0, 65535)
    real: tuple[float, float] = (0, 1)


DEFAULT_LEVELS = Levels()


class Header(NamedTuple):
    """What is known of an image without its pixels, except where these have more than 8 bits.

    Attributes:
      height: As it is shown.
      width: As it is shown.
      extent: For wide pixels the kind, a field of `Levels`, the smallest and the largest value; else None.
      animated: Whether other frames or pages follow the one that is used.
    """

    height: int
    width: int
    extent: tuple[str, float, float] | None
    animated: bool


@functools.cache
def suffixes() -> frozenset[str]:
    """Return the endings of the files that the installed Pillow can decode, in lower case with their dot."""
    from PIL import Image

    known = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in known.items() if kind in Image.OPEN and kind not in _NO_PICTURES)


def decode(data: bytes, levels: Levels = DEFAULT_LEVELS, at_least: int | None = None):
    """Return the first frame of an image as an RGB `PIL.Image`, upright and opaque.

    The orientation that a camera noted is applied, transparent pixels lie on `BACKGROUND`, grey becomes three equal
    channels, and wide pixels are scaled to 8 bits by `levels`.

    Args:
      data: The bytes of the file.
      levels: Of the whole data set, so that images keep their brightness among each other.
      at_least: A JPEG may come decoded at half, a quarter or an eighth of its size, as long as no side falls below
        this: that is several times faster for large photographs.

    Raises:
      ValueError: The data is no image, cut short, or has pixels outside the levels; in one line.
    """
    from PIL import ImageOps

    try:
        image = _open(data)
        if at_least is not None:
            image.draft(None, (at_least, at_least))
        image.load()
        if _orientation(image) > 1:
            image = ImageOps.exif_transpose(image)
        return _to_rgb(image, levels)
    # Pillow's plug-ins raise whatever their parsing code meets.
    except Exception as error:
        raise ValueError(_reason(data, error)) from error


def read_header(source: bytes | str) -> Header:
    """Return what is known of an image, the bytes or the path of its file, before it is decoded.

    Raises:
      ValueError: As `decode`.
    """
    try:
        with _open(source) as image:
            return _header(image)
    except Exception as error:
        raise ValueError(_reason(source, error)) from error


def common_levels(extents: Iterable[tuple[str, float, float]]) -> Levels:
    """Return the levels of a data set from the extents of its images.

    Integers from 0 on reach white at the largest value of 8, 10, 12, 14 or 16 bits that holds all, floats at 1 or 255
    where they come near; any others are spread from the smallest to the largest value.
    """
    of_kind: dict[str, list[float]] = {"integer": [], "real": []}
    for kind, low, high in extents:
        if math.isfinite(low) and math.isfinite(high):
            of_kind[kind] += low, high
    levels = {kind: _levels(kind, min(values), max(values)) for kind, values in of_kind.items() if values}
    return Levels(**levels)


def _levels(kind: str, low: float, high: float) -> tuple[float, float]:
    if kind == "integer":
        white = next((white for white in (2**bits - 1 for bits in (8, 10, 12, 14, 16)) if high <= white), None)
    else:
        white = next((white for white in (1, 255) if white / 4 < high <= white), None)
    if low >= 0 and white is not None:
        return (0, white)
    return (low, high if high > low else low + 1)


def _header(image) -> Header:
    animated = image.format not in _ONE_PICTURE and getattr(image, "is_animated", False)
    turned = _orientation(image) > 4
    if turned and image.format == "TIFF":
        # A TIFF is turned as it is loaded.
        image.load()
        turned = False
    width, height = image.size[::-1] if turned else image.size
    kind = _wide_kind(image.mode)
    if kind is None:
        return Header(height, width, None, animated)
    values = np.asarray(image)
    return Header(height, width, (kind, float(values.min()), float(values.max())), animated)


def _open(source: bytes | str):
    from PIL import Image

    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _orientation(image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    # A damaged note about the picture is no damage to the picture.
    except Exception:
        return 1


def _wide_kind(mode: str) -> str | None:
    return {"I": "integer", "F": "real"}.get(mode.partition(";")[0])


def _to_rgb(image, levels: Levels):
    from PIL import Image, ImageCms

    if kind := _wide_kind(image.mode):
        return Image.fromarray(_to_8_bits(np.asarray(image), getattr(levels, kind))).convert("RGB")
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    if image.has_transparency_data:
        if image.mode in ("La", "LA", "PA"):
            image = image.convert("LA" if image.mode == "La" else "RGBA")
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), image).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(values: np.ndarray, levels: tuple[float, float]) -> np.ndarray:
    black, white = levels
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has pixels that are no numbers")
    if values.min() < black or values.max() > white:
        raise ValueError(
            f"its pixels from {values.min():g} to {values.max():g} lie outside of {black:g}, black, to {white:g}, white"
        )
    return np.rint((values - black) * (255 / (white - black))).astype(np.uint8)


def _reason(source: bytes | str, error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if not (source if isinstance(source, bytes) else os.path.getsize(source)):
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        return "it is of no image format that the installed Pillow knows"
    return str(error).strip().partition("\n")[0] or type(error).__name__
