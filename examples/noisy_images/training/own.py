"""The settings of the protocol for one's own data that follow from the data."""

import math

from .. import data
from ..config import Config, replace

# Samples that go through the network in training, whatever their number: a few minutes on two CPU cores.
SAMPLES = {"linear": 1_000_000, "mlp": 1_000_000, "small_cnn": 40_000}
EPOCHS = (10, 60)
# Smaller images have nothing that a convolution could find and a perceptron could not.
LEAST_SIDE = 16
# An epoch has this many steps or more where there are as many samples.
LEAST_STEPS = 8


def settled(config: Config, dataset: data.Dataset) -> Config:
    """Return the configuration with what was left to the data decided: network, epochs, and batches that it fills."""
    model, epochs, samples = config.network.model, config.training.epochs, len(dataset.train)
    if model != "auto" and epochs is not None:
        return config
    if model == "auto":
        of_images = len(dataset.image_shape) == 3 and min(dataset.image_shape[:2]) >= LEAST_SIDE
        model = "small_cnn" if of_images else "mlp"
    if epochs is None:
        fewest, most = EPOCHS
        epochs = min(max(round(SAMPLES.get(model, SAMPLES["small_cnn"]) / samples), fewest), most)
    # A power of two, so that accumulation and devices can divide it.
    fitting = 2 ** int(math.log2(max(samples // LEAST_STEPS, 1)))
    batch_size = min(config.training.batch_size, max(fitting, 1))
    return replace(config, model=model, epochs=epochs, batch_size=batch_size)
