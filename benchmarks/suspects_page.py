"""Measure how long the page of suspects takes to write, and its memory.

    python -m benchmarks.suspects_page --samples 50000

The images are noise in blocks, of 32 pixels a side unless asked otherwise; with ``--photographs`` they are JPEG
files of 500 x 375 pixels, decoded one by one. Histories are of 100 epochs. The peak is that of the whole process, its
images and histories included.
"""

import argparse
import pathlib
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.machinery import command, tables
from benchmarks.machinery.timing import Budget
from examples.noisy_images import data
from examples.noisy_images.measures.sample_history import History
from examples.noisy_images.suspects import page, suspicion

CLASSES, EPOCHS = 100, 100
# What the page of 50,000 images has to keep to.
MOST_SECONDS, MOST_GB = 120, 1.0


def measure(args: argparse.Namespace, budget: Budget) -> dict[str, Any]:
    """Write one page."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        rng = np.random.default_rng(0)
        images = _photographs(folder, args.samples, rng) if args.photographs else _images(args.samples, args.side, rng)
        started = time.monotonic()
        ranking = _ranking(images, args.samples, rng)
        ranked = time.monotonic()
        path = page.write(ranking, folder / "page")
        seconds = time.monotonic() - ranked
        scripts = [file.stat().st_size for file in (folder / "page" / "pages").iterdir()]
        index = path.stat().st_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "setting": {"samples": args.samples, "photographs": args.photographs, "side": args.side, "epochs": EPOCHS},
        "rank_s": ranked - started,
        "write_s": seconds,
        "peak_bytes": peak,
        "index_bytes": index,
        "pages_bytes": sum(scripts),
    }


def _images(samples: int, side: int, rng: np.random.Generator) -> np.ndarray:
    few = rng.integers(0, 256, (256, -(-side // 4), -(-side // 4), 3), np.uint8)
    few = few.repeat(4, axis=1).repeat(4, axis=2)[:, :side, :side]
    return few[rng.integers(0, len(few), samples)]


def _photographs(folder: pathlib.Path, samples: int, rng: np.random.Generator) -> data.ImageFiles:
    from PIL import Image

    paths = []
    for number in range(256):
        small = Image.fromarray(rng.integers(0, 256, (8, 10, 3), np.uint8))
        paths.append(str(folder / f"{number}.jpg"))
        small.resize((500, 375), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return data.ImageFiles(tuple(paths[number] for number in rng.integers(0, len(paths), samples)))


def _ranking(images: np.ndarray | data.ImageFiles, samples: int, rng: np.random.Generator) -> suspicion.Ranking:
    labels = rng.integers(0, CLASSES, samples).astype(np.int32)
    index = np.arange(samples)
    losses = rng.random((EPOCHS, samples), np.float32)
    predictions = np.where(rng.random(samples) < 0.1, (labels + 1) % CLASSES, labels).astype(np.int16)
    history = History(index[:EPOCHS] + 1, losses, np.tile(predictions, (EPOCHS, 1)), labels, None, index)
    ids = tuple(f"train/class {label}/image-{number:06d}.jpg" for number, label in enumerate(labels))
    split = data.Split(images, labels, None, index, getattr(images, "paths", None), ids)
    names = tuple(f"class {label}" for label in range(CLASSES))
    return suspicion.from_histories([history], [], "mean_loss", split, names)


def report(results: dict[str, Any]) -> str:
    """Return the measurements as a table."""
    seconds, gb = results["write_s"], results["peak_bytes"] / 1e9
    rows = [
        ["ranking, with fingerprints", f"{results['rank_s']:.1f} s", ""],
        ["writing the page", f"{seconds:.1f} s", _against(seconds, MOST_SECONDS, "s")],
        ["peak memory", f"{gb:.2f} GB", _against(gb, MOST_GB, "GB")],
        ["index.html", f"{results['index_bytes'] / 1e6:.1f} MB", ""],
        ["pages", f"{results['pages_bytes'] / 1e6:.1f} MB", ""],
    ]
    setting = results["setting"]
    kind = "photographs" if setting["photographs"] else f"images of {setting['side']} pixels"
    lines = tables.table(["", "measured", "target"], rows)
    return "\n".join([f"{setting['samples']:,} {kind}", "", *lines])


def _against(value: float, most: float, unit: str) -> str:
    return f"{'within' if value < most else 'MISSED:'} {most:g} {unit}"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = command.parser("suspects_page", "Measure how long the page of suspects takes to write.")
    parser.add_argument("--samples", type=command.at_least_one, default=50_000, help="number of images (50000)")
    parser.add_argument("--side", type=command.at_least_one, default=32, help="pixels a side (32)")
    parser.add_argument("--photographs", action="store_true", help="JPEG files instead of images in memory")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and, if asked, write."""
    return command.run("suspects_page", parse(argv), argv, measure, report, ("numpy", "pillow"))


if __name__ == "__main__":
    main()
