"""A page to look through suspicious samples on and to decide: `index.html` and the folder `pages` beside it.

The page needs nothing else: no network and no server. What filters and decisions need of all samples stands in
`index.html`; thumbnails, loss curves and texts stand in the order of suspicion in `pages`, a few hundred samples a
script, which is loaded when it comes into sight. Decisions are kept by the browser under the data's own key until they
are saved as `decisions.csv`.

No name, id or text is ever part of the markup: all are data, shown as text.
"""

import base64
import concurrent.futures
import hashlib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import data, files
from ..errors import UserError
from ..labels.decisions import first_repeated
from . import estimate
from .suspicion import Ranking

if TYPE_CHECKING:
    from PIL.Image import Image

TEMPLATE = Path(__file__).with_name("page_template")
# Samples a script of `pages`, and a row of its sheet of thumbnails.
PAGE = 256
COLUMNS = 16
# Sides of the thumbnails of photographs: larger for those that are looked at first.
LARGE, SMALL, LARGE_PAGES = 160, 64, 8
# Below this side the blocks of a JPEG would blur what is to be judged.
LOSSLESS_SIDE = 16
JPEG_BLOCK = 8
CURVE_POINTS = 48
TEXT_LENGTH = 4000


def write(ranking: Ranking, output: Path) -> Path:
    """Write the page of a ranking into a folder, and return its path; an older one stays whole until it is replaced.

    Raises:
      UserError: Two classes have one name, or a name cannot be written.
    """
    _check_names(ranking)
    key = _key(ranking)
    content = _index(ranking, key)
    # A page that is written again, and interrupted, must not show the samples of the other.
    token = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
    content["pages"] = f"pages/{token}-"
    folder = output / "pages"
    numbers = range(-(-len(ranking.train) // PAGE))
    for number in numbers:
        script = f"suspectsPage({number}, {_literal(_page(ranking, number))});\n"
        files.write_text(folder / f"{token}-{number:04d}.js", script)
    path = output / "index.html"
    files.write_text(path, _html(content))
    current = {f"{token}-{number:04d}.js" for number in numbers}
    for old in folder.glob("*-*.js"):
        if old.name not in current:
            old.unlink()
    return path


def _check_names(ranking: Ranking) -> None:
    if repeated := first_repeated(ranking.class_names):
        raise UserError(f"two classes have the name {repeated!r}: give each class a name of its own.")
    for name in (*ranking.class_names, *ranking.ids):
        if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
            raise UserError(f"the name {name!r} is no text that can be written: rename it.")


def _key(ranking: Ranking) -> str:
    """Return what identifies the samples, their contents and their given labels, in whatever order."""
    names = [ranking.class_names[label] for label in ranking.train.labels]
    samples = sorted(zip(ranking.ids, ranking.fingerprints, names, strict=True))
    return hashlib.sha256(json.dumps([samples, ranking.class_names]).encode()).hexdigest()[:24]


def _index(ranking: Ranking, key: str) -> dict[str, Any]:
    """Return what the page knows of all samples, the most suspicious first."""
    order, curves = ranking.order, ranking.curves
    values = ranking.values[ranking.score][order]
    return {
        "key": key,
        "score": ranking.score.replace("_", " "),
        "classes": ranking.class_names,
        "ids": [ranking.ids[i] for i in order],
        "fingerprints": [ranking.fingerprints[i] for i in order],
        "given": _base64(ranking.train.labels[order].astype("<i4")),
        "suggested": _base64(ranking.suggested[order].astype("<i4")),
        "suspicion": _base64(ranking.suspicion[ranking.score][order].astype("<f4")),
        "values": _base64(values.astype("<f4")),
        "suspects": int(ranking.is_suspect.sum()),
        "estimate": estimate.as_json(ranking.estimate, ranking.confusions, ranking.class_names),
        "page": PAGE,
        "columns": COLUMNS,
        "curves": None if curves is None else {
            "epochs": [int(epochs[-1]) for epochs in _parts(curves.epochs)],
            "top": _top(curves.losses),
        },
        "kind": "images" if _has_images(ranking.train) else "texts" if ranking.train.texts is not None else "none",
    }  # fmt: skip


def _page(ranking: Ranking, number: int) -> dict[str, Any]:
    """Return what the page shows of `PAGE` samples."""
    chosen = ranking.order[number * PAGE : (number + 1) * PAGE]
    content: dict[str, Any] = {}
    if _has_images(ranking.train):
        content |= _sheet(ranking.train, chosen, LARGE if number < LARGE_PAGES else SMALL)
    if ranking.train.texts is not None:
        content["texts"] = [_shortened(ranking.train.texts[i]) for i in chosen]
    if ranking.curves is not None:
        content["curves"] = _base64(_levels(ranking.curves.losses, chosen))
    return content


def _has_images(split: data.Split) -> bool:
    return isinstance(split.images, data.ImageFiles) or split.images.ndim == 4


def _shortened(text: str) -> str:
    # A lone surrogate is no character, and could not be written.
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= TEXT_LENGTH else text[:TEXT_LENGTH] + " …"


# --- loss curves --------------------------------------------------------------------------------------------------


def _parts(epochs: np.ndarray) -> list[np.ndarray]:
    """Divide the epochs into as many parts as a curve has points."""
    return np.array_split(epochs, min(CURVE_POINTS, len(epochs)))


def _top(losses: np.ndarray) -> float:
    """Return the loss at the upper edge of the curves: a few outliers must not press all others to the ground."""
    return max(float(np.percentile(losses, 99.5)), 1e-6)


def _levels(losses: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return the curves of some samples in 255 steps, uint8 (n, E): each point the mean of its part."""
    points = [part.mean(axis=0) for part in _parts(losses[:, chosen])]
    return np.round(255 * np.clip(np.stack(points, axis=1) / _top(losses), 0, 1)).astype(np.uint8)


# --- thumbnails ---------------------------------------------------------------------------------------------------


def _sheet(split: data.Split, chosen: np.ndarray, side: int) -> dict[str, Any]:
    """Return the thumbnails of some samples as one picture of tiles, with the size of each."""
    from PIL import Image

    with concurrent.futures.ThreadPoolExecutor() as pool:
        tiles = list(pool.map(lambda position: _thumbnail(split, int(position), side), chosen))
    # Tiles that end where the blocks of a JPEG end do not bleed into one another.
    tile = -(-max(max(image.size) for image in tiles) // JPEG_BLOCK) * JPEG_BLOCK
    grey = all(image.mode == "L" for image in tiles)
    columns = min(COLUMNS, len(tiles))
    sheet = Image.new("L" if grey else "RGB", (columns * tile, -(-len(tiles) // columns) * tile))
    for place, image in enumerate(tiles):
        sheet.paste(image, (place % columns * tile, place // columns * tile))
    buffer = io.BytesIO()
    if tile <= LOSSLESS_SIDE:
        kind = "png"
        sheet.save(buffer, "PNG")
    else:
        kind = "jpeg"
        sheet.save(buffer, "JPEG", quality=85, subsampling=0)
    return {
        "sheet": f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}",
        "tile": tile,
        "sizes": _base64(np.array([image.size for image in tiles], np.uint8)),
    }


def _thumbnail(split: data.Split, position: int, side: int) -> "Image":
    """Return an image as a whole, no larger than a square of the side."""
    from PIL import Image

    if isinstance(split.images, data.ImageFiles):
        image = split.images.open(position, at_least=side)
    else:
        pixels = split.images[position]
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    if max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.BICUBIC)
    return image


# --- the document -------------------------------------------------------------------------------------------------


def _html(content: dict[str, Any]) -> str:
    """Return the document; its policy lets it load its own scripts and pictures and nothing else."""
    style, script, document = (
        (TEMPLATE / name).read_text(encoding="utf-8") for name in ("style.css", "script.js", "index.html")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # In this order: what comes last is data, and is not looked through again.
    for place, text in (("STYLE", style), ("DIGEST", digest), ("SCRIPT", script), ("DATA", _literal(content))):
        before, after = document.split(f"%{place}%")
        document = before + text + after
    return document


def _literal(value: Any) -> str:
    """Return JSON in ASCII that ends no script element and opens no comment in it."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()
