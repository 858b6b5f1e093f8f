"""SGD, SAM and SANER on handwritten digits, half of whose training labels are wrong: to read and to copy.

    pip install -e ".[examples]"
    python -m examples.tour --output tour.png

It needs JAX, Optax, scikit-learn (the digits) and matplotlib (the figure), and nothing else of this folder.
"""

import argparse
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import saner_jax

CLASSES, BATCH = 10, 64


def load(seed):
    """Return the digits, standardized; half of the given training labels are wrong."""
    x, y = load_digits(return_X_y=True)
    x = (x - x.mean()) / x.std()
    x, x_test, true, y_test = train_test_split(x, y, test_size=0.25, stratify=y, random_state=0)

    rng = np.random.default_rng(seed)
    wrong = rng.permutation(len(true)) < len(true) // 2
    other = (true + rng.integers(1, CLASSES, len(true))) % CLASSES  # any class but the true one
    given = np.where(wrong, other, true)
    data = {"x": x, "given": given, "wrong": wrong, "x_test": x_test, "y_test": y_test}
    return {name: jnp.asarray(array) for name, array in data.items()}


def init(key, sizes=(64, 512, 512, CLASSES)):
    """Return the parameters of a network with two hidden layers."""
    initial = jax.nn.initializers.lecun_normal()
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = itertools.pairwise(sizes)
    return [{"w": initial(k, s), "b": jnp.zeros(s[-1])} for k, s in zip(keys, shapes, strict=True)]


def logits(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def loss_fn(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


def make_optimizer(method, steps):
    """Put the method in front of SGD: all that sets the three apart."""
    first = {
        "SGD": optax.identity(),
        "SAM": saner_jax.sam(rho=0.4),
        "SANER": saner_jax.saner(rho=0.4, alpha=saner_jax.alpha_ramp(0.5, steps=steps // 4)),
    }[method]
    learning_rate = optax.piecewise_constant_schedule(0.02, {steps // 2: 0.1, steps * 3 // 4: 0.1})
    return optax.with_extra_args_support(optax.chain(first, optax.sgd(learning_rate, momentum=0.9)))


@functools.partial(jax.jit, static_argnames="tx")
def train_epoch(tx, params, state, data, key):
    """Take a step on every batch of the training set, in random order."""

    def step(carry, batch):
        params, state = carry
        x, y = data["x"][batch], data["given"][batch]
        _, grads, grad_fn = saner_jax.value_and_grads(loss_fn)(params, x, y)  # grad_fn: of this batch, at any params
        updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
        return (optax.apply_updates(params, updates), state), None

    count = len(data["x"]) // BATCH
    batches = jax.random.permutation(key, len(data["x"]))[: count * BATCH].reshape(count, BATCH)
    return jax.lax.scan(step, (params, state), batches)[0]


@jax.jit
def measure(params, data):
    """Return the accuracies on the test set and on the wrong and the right training labels."""
    right = logits(params, data["x"]).argmax(-1) == data["given"]
    test = logits(params, data["x_test"]).argmax(-1) == data["y_test"]
    return test.mean(), right.mean(where=data["wrong"]), right.mean(where=~data["wrong"])


def train(method, epochs, seed):
    """Train one method and return the accuracies after every epoch, of shape (epochs, 3)."""
    data = load(seed)
    first, *keys = jax.random.split(jax.random.key(seed), epochs + 1)
    params = init(first)
    tx = make_optimizer(method, epochs * (len(data["x"]) // BATCH))
    state, accuracies = tx.init(params), []
    for key in keys:
        params, state = train_epoch(tx, params, state, data, key)
        accuracies.append(measure(params, data))
    return 100 * np.array(jax.device_get(accuracies))


def plot(curves, output):
    """Draw the accuracies of all methods over the epochs."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = figure.subplots(1, 3)
    titles = ("Test accuracy", "Wrong labels memorized", "Right labels learnt")
    for column, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        for (method, accuracies), style in zip(curves.items(), ("-", "--", "-."), strict=True):
            axes.plot(np.arange(1, len(accuracies) + 1), accuracies[:, column], style, label=method)
        axes.set(title=f"{title} (%)", xlabel="epoch", ylim=(0, 102))
        axes.grid(alpha=0.3)
    panels[0].legend(loc="lower right")
    figure.savefig(output, dpi=160)


def main(arguments=None):
    parser = argparse.ArgumentParser(description="SGD, SAM and SANER on digits with wrong labels.")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of noise, weights and order")
    parser.add_argument("--output", default="tour.png", help="the figure")
    options = parser.parse_args(arguments)
    curves = {}
    for method in ("SGD", "SAM", "SANER"):
        curves[method] = train(method, options.epochs, options.seed)
        test, wrong, right = curves[method][-1]
        print(f"{method:6} test {test:5.1f} %  wrong labels memorized {wrong:5.1f} %  right learnt {right:5.1f} %")
    plot(curves, options.output)
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
