"""Measure the loader of streamed images: images a second over worker processes, and what a device would need.

    python -m benchmarks.loader --workers 0 1 2 4

Photographs of ImageNet's size are generated, written as JPEG files and read as the training program reads them:
shuffled, decoded, scaled, cropped at random and batched by Grain. A pass starts its worker processes anew, as an epoch
does, and ends them: the rate is that from the first batch to the last, and what the first one waits for and the end
takes stand beside it. Numbers of workers take turns, in a new random order every round.

The loader keeps a device busy if it delivers images as fast as the device takes them. A two-pass method takes three
forward passes' FLOPs a pass, two passes an image; `--device-tflops` is the rate at which the device computes them.
"""

import argparse
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.machinery import command, statistics, tables, timing
from examples.noisy_images import data
from examples.noisy_images.data import streaming

# The median size of ImageNet's photographs. Files take some 75 kB, ImageNet's 110.
HEIGHT, WIDTH, QUALITY = 375, 500, 92
# Multiplications of ResNet-18 in its ImageNet form on 224 by 224 pixels (He et al. 2016, table 1: 1.8e9).
MULTIPLICATIONS = 1.8e9


def photographs(folder: pathlib.Path, count: int, seed: int = 0) -> data.Split:
    """Write JPEGs that are smooth on large scales and noisy on small ones, as photographs are."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    paths = []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((WIDTH, HEIGHT), Image.BICUBIC)
        grain = rng.normal(0, 9, (HEIGHT, WIDTH, 3))
        pixels = np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)
        path = folder / f"{number:05d}.jpg"
        Image.fromarray(pixels).save(path, quality=QUALITY)
        paths.append(str(path))
    labels = np.zeros(count, np.int32)
    return data.Split(data.ImageFiles(tuple(paths)), labels, None, np.arange(count))


class Pass(NamedTuple):
    """What one pass over the images took."""

    first_batch_s: float
    """Seconds from the start to the first batch."""
    images_per_s: float
    """Rate of the batches after the first."""
    end_s: float
    """Seconds from the last batch to the end of the worker processes."""


def pass_over(split: data.Split, workers: int, batch_size: int, image_size: int, epoch: int) -> Pass:
    """Time one pass with this number of worker processes."""
    started = time.perf_counter()
    batches = streaming.batches(
        split, batch_size=batch_size, seed=0, epoch=epoch, workers=workers, train=True, image_size=image_size
    )
    next(batches)
    first = last = time.perf_counter()
    images = 0
    for batch, _ in batches:
        images += len(batch)
        last = time.perf_counter()
    return Pass(first - started, images / (last - first), time.perf_counter() - last)


def measure(args: argparse.Namespace, budget: timing.Budget) -> dict[str, Any]:
    """Time passes with every number of workers in turns."""
    rng = np.random.default_rng(0)
    passes: dict[int, list[Pass]] = {workers: [] for workers in args.workers}
    with tempfile.TemporaryDirectory() as folder:
        command.progress(f"writing {args.images} photographs")
        split = photographs(pathlib.Path(folder), args.images)
        file_bytes = float(np.mean([pathlib.Path(path).stat().st_size for path in split.images.paths]))
        slowest = 0.0
        for round_ in range(args.rounds):
            if round_ >= timing.MINIMUM_ROUNDS and budget.remaining() < slowest:
                break
            started = time.monotonic()
            for workers in rng.permutation(args.workers):
                one = pass_over(split, int(workers), args.batch_size, args.image_size, round_)
                passes[int(workers)].append(one)
            slowest = max(slowest, time.monotonic() - started)
    needed = args.device_tflops * 1e12 / (2 * 3 * 2 * MULTIPLICATIONS * (args.image_size / 224) ** 2)
    return {
        "setting": {
            "images": args.images,
            "file_bytes": file_bytes,
            "batch_size": args.batch_size,
            "image_size": args.image_size,
            "rounds": len(passes[args.workers[0]]),
        },
        "device": {"tflops": args.device_tflops, "images_per_s": needed},
        "workers": {
            str(workers): {
                name: statistics.median_with_interval(np.array([getattr(one, name) for one in passes[workers]]))
                for name in Pass._fields
            }
            for workers in args.workers
        },
    }


def report(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    setting, device = results["setting"], results["device"]
    rows = [
        (
            workers if workers != "0" else "0 (threads of the training process)",
            tables.interval(measured["images_per_s"], 0),
            tables.interval(measured["first_batch_s"], 2),
            tables.interval(measured["end_s"], 2),
            f"{100 * measured['images_per_s']['median'] / device['images_per_s']:.1f} %",
        )
        for workers, measured in results["workers"].items()
    ]
    header = (
        "workers",
        "images a second (95 %)",
        "first batch after, s (95 %)",
        "end, s (95 %)",
        "of what the device takes",
    )
    return "\n".join(
        [
            f"{setting['images']} JPEGs of {WIDTH}x{HEIGHT} pixels and {setting['file_bytes'] / 1e3:.0f} kB, batches "
            f"of {setting['batch_size']} at {setting['image_size']} pixels, {setting['rounds']} rounds. A device that "
            f"computes {device['tflops']:g} TFLOP/s takes {device['images_per_s']:,.0f} images a second of ResNet-18 "
            "with two passes.",
            "",
            *tables.table(header, rows),
        ]
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = command.parser("loader", "Measure images a second of the loader of streamed images over its workers.")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2, 4], help="processes (0 1 2 4)")
    parser.add_argument("--images", type=command.at_least_one, default=512, help="photographs to generate (512)")
    parser.add_argument("--batch-size", type=command.at_least_one, default=64, help="images a batch (64)")
    parser.add_argument("--image-size", type=command.at_least_one, default=224, help="side of the squares (224)")
    parser.add_argument("--rounds", type=command.at_least_one, default=5, help="passes with each number (5)")
    parser.add_argument(
        "--device-tflops",
        type=command.positive,
        default=220.0,
        help="rate of the device that is to be kept busy (220: 28 %% of an H200's 790 in bfloat16)",
    )
    args = parser.parse_args(argv)
    if min(args.workers) < 0:
        parser.error(f"--workers must be at least 0, got {min(args.workers)}")
    if args.images < 2 * args.batch_size:
        parser.error(f"--images {args.images} is less than two batches of {args.batch_size}: give more")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and, if asked, write."""
    return command.run("loader", parse(argv), argv, measure, report, ("grain", "pillow"))


if __name__ == "__main__":
    main()
