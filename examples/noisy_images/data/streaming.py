"""Batches of images that stay in their files, decoded by Grain's workers."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from ..errors import UserError
from .dataset import Split
from .image_files import ImageFiles, silence_pillow

# An image is scaled until its shorter side is this much longer than the square cut out of it: 256 for 224.
_RESIZE_RATIO = 256 / 224


def num_batches(size: int, batch_size: int, *, train: bool) -> int:
    """Return the number of batches of a pass: training drops the last short one, evaluation fills it up."""
    return size // batch_size if train else -(-size // batch_size)


def batches(
    split: Split,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    start_step: int = 0,
    workers: int,
    train: bool,
    augment: bool = True,
    image_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Return an iterator over one pass of a split, or over the share that one of several processes has in it.

    A batch is a function of `(seed, epoch)` and its own number alone: neither the number of workers nor the step at
    which the pass starts changes it. Training shuffles the split and crops each image at random, the crop half-way
    along for evaluation; flips and normalisation are left to the device.

    Args:
      split: Images in files, or in memory.
      batch_size: Images per batch.
      seed: Seed of order and crops.
      epoch: The pass; each has an order and crops of its own.
      start_step: The first batch, counted from 0, of what an uninterrupted pass would give.
      workers: Processes that decode; 0 decodes in threads of this process. A script that uses workers must guard its
        entry with `if __name__ == "__main__":`, because each worker imports it.
      train: Shuffle, crop at random and drop the last short batch; otherwise keep the order, crop the centre and fill
        the last batch up with repeats.
      augment: Whether training crops at random; otherwise it too crops the centre.
      image_size: Side in pixels of the squares.
      process_index: The share: each process decodes its part of every batch, the first the first, and all together
        the batches of one.
      process_count: Number of processes, a divisor of the batch size.

    Yields:
      Images uint8 (batch_size / process_count, image_size, image_size, 3) and their positions in the split, int32; the
      position of a repeat is -1.

    Raises:
      UserError: The batch is larger than the training data, or an image cannot be read.
    """
    if train and batch_size > len(split):
        raise UserError(
            f"a batch of {batch_size} is larger than the {len(split)} training images: choose a smaller one."
        )
    if not isinstance(split.images, ImageFiles):
        raise TypeError("only splits whose images stay in files are streamed")
    steps = num_batches(len(split), batch_size, train=train)
    if not 0 <= start_step <= steps:
        raise ValueError(f"start_step must lie in 0 to {steps}, got {start_step}")
    if start_step == steps:
        return iter(())
    try:
        import grain
        from absl import flags
    except ImportError as error:
        raise UserError("images that are streamed from files need Grain: run `pip install grain`.") from error

    # Grain's workers read absl flags, which only a program started by absl.app has parsed.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    share = batch_size // process_count
    rows = range(process_index * share, (process_index + 1) * share)
    source = _Batches(split.images, batch_size, rows, seed, epoch, start_step, steps, train, augment, image_size)
    # One element is one whole batch, so a few of them in advance are plenty.
    threads = 1 if workers else 2
    loader = grain.MapDataset.source(source).to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    )
    if workers:
        loader = loader.mp_prefetch(
            grain.multiprocessing.MultiprocessingOptions(
                num_workers=min(workers, len(source)), per_worker_buffer_size=2
            )
        )
    return _iterate(loader)


def _iterate(loader) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    iterator = iter(loader)
    try:
        for images, positions in iterator:
            # Workers hand over shared memory that lives no longer than this array: JAX must not keep a view of it.
            yield np.array(images), np.array(positions)
    finally:
        # A pass that is given up half-way must not leave its workers behind until the program ends.
        if hasattr(iterator, "close"):
            iterator.close()


def square(files: ImageFiles, position: int, side: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Return one image scaled and cropped to uint8 (side, side, 3): at random with `rng`, at the centre without."""
    from PIL import Image

    shorter = round(side * _RESIZE_RATIO)
    image = files.open(position, at_least=shorter)
    width, height = image.size
    scale = shorter / min(width, height)
    width, height = max(round(width * scale), shorter), max(round(height * scale), shorter)
    spare = (width - side, height - side)
    left, top = (n // 2 for n in spare) if rng is None else (int(rng.integers(n + 1)) for n in spare)
    # Only the pixels that the square needs are computed.
    box = tuple(
        edge / size for edge, size in zip((left, top, left + side, top + side), (width, height) * 2, strict=True)
    )
    box = tuple(share * size for share, size in zip(box, image.size * 2, strict=True))
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box=box))


@dataclasses.dataclass(frozen=True)
class _Batches:
    """The batches of one pass from `start_step` on, as a source that Grain reads by number.

    The whole batch is the unit: were it one image, Grain would deal images out to its workers before batching them,
    and the batches would depend on the number of workers.
    """

    files: ImageFiles
    batch_size: int
    rows: range
    seed: int
    epoch: int
    start_step: int
    steps: int
    train: bool
    augment: bool
    image_size: int

    def __len__(self) -> int:
        return self.steps - self.start_step

    def __getitem__(self, number) -> tuple[np.ndarray, np.ndarray]:
        silence_pillow()
        step = self.start_step + int(number)
        order = np.arange(len(self.files))
        if self.train:
            order = np.random.default_rng((self.seed, self.epoch, 0)).permutation(len(self.files))
        chosen = order[step * self.batch_size : (step + 1) * self.batch_size][self.rows.start : self.rows.stop]
        images = np.empty((len(self.rows), self.image_size, self.image_size, 3), np.uint8)
        positions = np.full(len(self.rows), -1, np.int32)
        positions[: len(chosen)] = chosen
        for number, (row, position) in enumerate(zip(self.rows, chosen, strict=False)):
            # A crop depends on its image's place in the batch, and not on who cuts it.
            rng = np.random.default_rng((self.seed, self.epoch, 1 + step, row)) if self.train and self.augment else None
            images[number] = square(self.files, position, self.image_size, rng)
        images[len(chosen) :] = images[0] if len(chosen) else 0
        return images, positions

    def __repr__(self) -> str:
        # Grain writes it into its logs and state, where a list of all paths has no place.
        return f"_Batches(seed={self.seed}, epoch={self.epoch}, steps={self.steps})"
