"""What both sides of a comparison train, and what can be asked of a side."""

import dataclasses
from typing import Any, Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Problem:
    """What both sides train: the same network, optimizer, batch and augmentation, on the same random images."""

    width: float
    batch_size: int
    steps: int
    """Steps that one call takes, and batches of images on the device."""
    precision: str
    """float32, tf32, bfloat16; for one step that is compared, float64."""
    compile: bool
    """Whether PyTorch compiles its network; JAX always does."""
    convolution: str = "auto"
    """The program's setting, which PyTorch's side does not see."""
    crop_padding: int = 4
    flip: bool = True
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    rho: float = 0.1
    alpha: float = 0.5
    num_classes: int = 10
    side: int = 32
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.25, 0.25, 0.25)

    def data(self) -> tuple[np.ndarray, np.ndarray]:
        """Return uint8 images (N, H, W, 3) and int32 labels (N,)."""
        rng = np.random.default_rng(0)
        count = self.steps * self.batch_size
        images = rng.integers(0, 256, (count, self.side, self.side, 3), np.uint8)
        return images, rng.integers(0, self.num_classes, count, np.int32)


class Side(Protocol):
    """What a worker drives. `before` and what `one_step` returns are tensors by PyTorch's names and layout."""

    packages: tuple[str, ...]

    def describe(self) -> dict[str, Any]: ...

    def prepare(self, method: str) -> None: ...

    def run(self, method: str, steps: int) -> None: ...

    def one_step(self, method: str, before: dict[str, np.ndarray]) -> dict[str, np.ndarray]: ...
