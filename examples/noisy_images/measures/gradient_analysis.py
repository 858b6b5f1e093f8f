"""Which elements of the gradient SAM's perturbation shrinks, and whose they are: the mechanism that SANER builds on.

For one batch, with `g` the gradient of its mean loss at the weights `w` and `h` that at `w + eps`, `eps = rho g/||g||`
(SAM's, whatever the method that trains), in training mode and with one dropout key:

*turned*, *downweighted*, *grown* share: elements with `h/g < 0`, `0 < h/g < 1`, `h/g > 1`. *alignment_noisy*: cosine of
`g` restricted to the down-weighted elements with the gradient of the batch's noisy samples. *alignment_clean*: the same
with that of its clean samples. *alignment_random*, *alignment_random_clean*: `g` restricted to as many random elements
of every leaf, with the gradient of the noisy and of the clean samples; the controls. Each as one cosine of the whole
trees, and `..._per_tensor` as the mean of the leaves' cosines (the released code's way). What needs noisy samples, or
clean ones, is absent where there are none.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import saner_jax
from saner_jax import analysis

GROUPS = ("turned", "downweighted", "grown")
# Norm of eps where the run does not give one.
RHO = 0.1


class Gradients(NamedTuple):
    """Gradients of one batch, in the structure of the parameters."""

    unperturbed: Any
    """g, of the mean loss at w."""
    perturbed: Any
    """h, of the mean loss at w + eps."""
    of_noisy: Any | None
    """What the noisy samples contribute to g; None where true labels are unknown."""
    of_clean: Any | None
    """What the clean samples contribute to g; with that of the noisy ones it sums up to g."""


class Analysis(NamedTuple):
    """Means over batches."""

    metrics: dict[str, float]
    """Quantities of the whole gradient, by the names of the metrics."""
    leaves: dict[str, dict[str, float]]
    """For every parameter: turned, downweighted, grown and, where known, alignment_noisy."""


def gradients(
    linearise: Callable[[Any], tuple[jax.Array, Callable[[jax.Array], Any]]],
    params: Any,
    is_noisy: jax.Array | None,
    rho: float,
) -> Gradients:
    """Take the gradients of a batch at two points.

    The noisy samples' gradient is that of their share of the mean loss, `sum of their losses / B`. All samples pass
    through the network as in training, in the same micro-batches, so that BatchNorm normalises them alike.

    Args:
      linearise: params -> losses (B,), and a function of weights (B,) that returns the gradient of the weighted sum of
        the losses; with one dropout key.
      is_noisy: bool (B,); None where true labels are unknown.
      rho: norm of eps.
    """
    losses, gradient_of = linearise(params)
    everyone = jnp.full_like(losses, 1 / losses.size)
    g = gradient_of(everyone)
    of_noisy = of_clean = None
    if is_noisy is not None:
        of_noisy, of_clean = gradient_of(everyone * is_noisy), gradient_of(everyone * ~is_noisy)

    ascent = saner_jax.scale_to_norm(rho)
    eps, _ = ascent.update(g, ascent.init(params), params)
    _, gradient_of = linearise(jax.tree.map(jnp.add, params, eps))
    return Gradients(g, gradient_of(everyone), of_noisy, of_clean)


def measure(batch: Gradients, key: jax.Array) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Return the quantities of a batch: of the whole gradient, (), and of its leaves, (leaves,); by name.

    Args:
      key: draws the random elements of the control.
    """
    g, h, noisy = batch.unperturbed, batch.perturbed, batch.of_noisy
    shares = analysis.ratio_shares(g, h)
    values = {f"{group}_share": getattr(shares, group) for group in GROUPS}
    leaves = {group: getattr(shares, f"{group}_per_leaf") for group in GROUPS}
    if noisy is not None:
        mask = analysis.downweighted(g, h)
        at_random = analysis.random_like(key, mask)
        for name, chosen, reference in (
            ("noisy", mask, noisy),
            ("clean", mask, batch.of_clean),
            ("random", at_random, noisy),
            ("random_clean", at_random, batch.of_clean),
        ):
            aligned = analysis.alignment(g, chosen, reference)
            values |= {
                f"alignment_{name}": aligned.cosine,
                f"alignment_{name}_per_tensor": aligned.mean_leaf_cosine,
            }
        trees = (jax.tree.leaves(tree) for tree in (g, mask, noisy))
        leaves["alignment_noisy"] = jnp.stack([analysis.alignment(*leaf).cosine for leaf in zip(*trees, strict=True)])
    return values, leaves


Measured = tuple[dict[str, Any], dict[str, Any]]


def only_known(batch: Measured, is_noisy: np.ndarray | None) -> Measured:
    """Leave out of a batch's quantities those of noisy samples if it has none, and those of clean ones likewise."""
    absent = set()
    if is_noisy is not None and not is_noisy.any():
        absent |= {"noisy", "clean", "random", "random_clean"}
    if is_noisy is not None and is_noisy.all():
        absent |= {"clean", "random_clean"}
    unknown = {f"alignment_{name}{suffix}" for name in absent for suffix in ("", "_per_tensor")}
    return tuple({name: value for name, value in part.items() if name not in unknown} for part in batch)


def average(batches: Sequence[Measured], names: Sequence[str]) -> Analysis:
    """Average the quantities of several batches, each over the batches that have it; `names` are the parameters'."""
    whole, leaves = (_means([batch[part] for batch in batches]) for part in (0, 1))
    return Analysis(
        {name: float(value) for name, value in whole.items()},
        {leaf: {name: float(values[index]) for name, values in leaves.items()} for index, leaf in enumerate(names)},
    )


def _means(batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    # In the order of their first appearance.
    names = dict.fromkeys(name for batch in batches for name in batch)
    return {name: np.mean([batch[name] for batch in batches if name in batch], axis=0) for name in names}


def leaf_names(params: Any) -> list[str]:
    """Return the readable names of the parameters, such as `blocks.0.conv1.kernel`, in the order of the leaves."""
    paths = (path for path, _ in jax.tree_util.tree_leaves_with_path(params))
    return [jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path in paths]
