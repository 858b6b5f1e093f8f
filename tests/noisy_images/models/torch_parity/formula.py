"""Weights, statistics and images from a formula, the same for PyTorch and JAX. Needs NumPy alone."""

import math
import zlib

import numpy as np

NUM_CLASSES = 10
GRADIENT_SAMPLES = 20


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return float64 values in [-1, 1), a function of the name and of each element's index in C order."""
    x = np.arange(math.prod(shape), dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()) << 32)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)  # the mixing steps of splitmix64
    return ((x >> np.uint64(40)).astype(np.float64) / 2**23 - 1).reshape(shape)


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the float32 tensor of a PyTorch name, in PyTorch's layout (OIHW convolutions, (out, in) linear layers)."""
    values = uniform(name, shape)
    if len(shape) > 1:
        values *= math.sqrt(6 / math.prod(shape[1:]))  # the variance of Kaiming initialisation, 2 / fan-in
    elif name.endswith("running_var"):
        values = 1 + 0.5 * values
    elif "norm" in name and name.endswith("weight"):
        values = 1 + 0.3 * values
    else:
        values *= 0.2
    return values.astype(np.float32)


def images(name: str, batch: int, side: int) -> np.ndarray:
    """Return float32 images (batch, side, side, 3), whose values have mean 0 and variance 1."""
    return (math.sqrt(3) * uniform(name, (batch, side, side, 3))).astype(np.float32)


def labels(batch: int) -> np.ndarray:
    """Return int32 labels (batch,)."""
    return (7 * np.arange(batch) % NUM_CLASSES).astype(np.int32)


def sample_positions(name: str, size: int) -> np.ndarray:
    """Return positions in a flattened tensor of PyTorch's layout, at which its gradient is stored."""
    return ((uniform(f"positions of {name}", (min(size, GRADIENT_SAMPLES),)) + 1) / 2 * size).astype(np.int64)
