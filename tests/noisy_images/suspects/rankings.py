"""Rankings to look at: samples with wrong labels and histories that give them away."""

import numpy as np

from examples.noisy_images import data
from examples.noisy_images.measures.sample_history import History
from examples.noisy_images.suspects import suspicion

HOSTILE = (
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    'a "quoted", name\nin two lines',
    "\u202eright to left \u2028\u2029 <!-- <script>",
    "%DATA% %SCRIPT% $& ${1} \\ \x00 \x1b",
    "=1+1",
)


def ranking(samples=300, class_names=HOSTILE, images=None, texts=None, ids=None, epochs=12, seed=0, rate=0.2):
    """Every fifth label or so is wrong, has a high loss and a prediction of the true class."""
    rng = np.random.default_rng(seed)
    classes = len(class_names)
    clean = rng.integers(0, classes, samples)
    wrong = rng.random(samples) < rate
    labels = np.where(wrong, (clean + 1) % classes, clean).astype(np.int32)
    losses = (rng.random((epochs, samples)) + 4 * wrong).astype(np.float32)
    predictions = np.broadcast_to(clean, (epochs, samples)).astype(np.int16)
    index = np.arange(samples)
    history = History(np.arange(1, epochs + 1), losses, predictions, labels, None, index)
    if images is None:
        images = rng.integers(0, 256, (samples, 8, 8, 1)).astype(np.uint8)
    paths = images.paths if isinstance(images, data.ImageFiles) else None
    split = data.Split(images, labels, None, index, paths, ids, texts)
    return suspicion.from_histories([history], [], "mean_loss", split, tuple(class_names))
