"""Text from a random source whose entropy is known, so that a loss can be told from the best one possible."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Source:
    """A Markov chain of second order: each symbol depends on the two before it."""

    probabilities: np.ndarray
    """Of the next symbol, float (vocabulary, vocabulary, vocabulary): the one before last, the last, the next."""

    @classmethod
    def random(cls, vocabulary: int, seed: int) -> "Source":
        """Draw a source in which a few symbols are likely after any pair."""
        rng = np.random.default_rng(seed)
        return cls(rng.dirichlet(np.full(vocabulary, 0.1), (vocabulary, vocabulary)))

    def sample(self, count: int, length: int, seed: int) -> np.ndarray:
        """Return sequences, int32 (count, length)."""
        rng = np.random.default_rng(seed)
        vocabulary = len(self.probabilities)
        cumulative = np.cumsum(self.probabilities, axis=-1)
        text = rng.integers(0, vocabulary, (count, length))
        for i in range(2, length):
            below = cumulative[text[:, i - 2], text[:, i - 1]] < rng.random((count, 1))
            text[:, i] = np.minimum(below.sum(axis=-1), vocabulary - 1)
        return text.astype(np.int32)

    def loss(self, text: np.ndarray) -> float:
        """Return the cross-entropy of the true probabilities, in nats a symbol, from the third symbol on."""
        return float(-np.mean(np.log(self.probabilities[text[:, :-2], text[:, 1:-1], text[:, 2:]])))


def with_noise(targets: np.ndarray, rate: float, vocabulary: int, seed: int) -> np.ndarray:
    """Replace exactly ``int(rate * size)`` targets by another symbol each, drawn uniformly."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(targets.size, int(rate * targets.size), replace=False)
    noisy = targets.flatten()
    noisy[chosen] = (noisy[chosen] + rng.integers(1, vocabulary, len(chosen))) % vocabulary
    return noisy.reshape(targets.shape)
