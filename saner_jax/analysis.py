"""What SANER's mask is made of: functions of a pair of gradients, for analysis beside training.

``g`` is the gradient at the weights ``w``, ``h`` that at ``w + eps``, both trees of one structure, and ``r = h / g``
their ratio, element by element. All can be jitted and mapped. Arithmetic is in float32, or in float64 where the
gradients are; results are in JAX's default float.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from saner_jax._checks import check_floating, check_tree
from saner_jax._leaves import PyTree, cosine_and_norms, widen
from saner_jax._masks import is_downweighted, is_grown, is_turned, leaf_keys, shares, shuffle


class RatioShares(NamedTuple):
    """Shares of the elements by their ratio, float arrays; the rest has ``r = 0``, ``r = 1`` or none at all."""

    turned: jax.Array
    """Share of all elements with ``r < 0``, of shape ()."""
    downweighted: jax.Array
    """Share of all elements with ``0 < r < 1``, of shape ()."""
    grown: jax.Array
    """Share of all elements with ``r > 1``, of shape ()."""
    turned_per_leaf: jax.Array
    """``turned`` of each leaf, in the order of ``jax.tree.leaves``, of shape (number of leaves,)."""
    downweighted_per_leaf: jax.Array
    """``downweighted`` of each leaf."""
    grown_per_leaf: jax.Array
    """``grown`` of each leaf."""


class Alignment(NamedTuple):
    """Cosine of two gradients, float arrays of shape ()."""

    cosine: jax.Array
    """Over all leaves at once; 0 where either gradient is zero."""
    mean_leaf_cosine: jax.Array
    """Mean over the leaves of each leaf's own cosine, where a leaf with a zero on either side counts as 0."""


def ratio_shares(g: PyTree, h: PyTree) -> RatioShares:
    """Count the elements that the perturbation turned, shrank and made grow.

    ::

        turned: r < 0,    downweighted: 0 < r < 1,    grown: r > 1,    r = h / g

    By the tests of :func:`is_turned`, :func:`is_downweighted` and :func:`is_grown`. A zero on either side, a subnormal
    number and a NaN are in no group, nor is ``r = 1``.

    Args:
      g: gradient at the weights, a tree of floating-point arrays.
      h: gradient at the perturbed weights, of the same structure and shapes.

    Returns:
      :class:`RatioShares`, of the whole tree and leaf by leaf. An empty leaf has shares of 0.

    Raises:
      ValueError: h has another structure or other shapes than g.
      TypeError: a leaf is not floating-point.

    Example:
      >>> g, h = {"w": jnp.array([2.0, 2.0, 2.0, 0.0])}, {"w": jnp.array([-1.0, 1.0, 3.0, 1.0])}
      >>> shares = saner_jax.analysis.ratio_shares(g, h)
      >>> shares.turned.item(), shares.downweighted.item(), shares.grown.item()
      (0.25, 0.25, 0.25)

    References:
      Luong et al., `Understanding SAM's Robustness to Noisy Labels through Gradient Down-weighting
      <https://arxiv.org/abs/2411.17132>`_, 2026, figure 2a (``downweighted``).
    """
    g, h = _widened_pair(g, h)
    turned, downweighted, grown = (shares(is_in_group, h, g) for is_in_group in (is_turned, is_downweighted, is_grown))
    return RatioShares(turned[0], downweighted[0], grown[0], turned[1], downweighted[1], grown[1])


def downweighted(g: PyTree, h: PyTree) -> PyTree:
    """Find the elements that SANER acts on: the down-weighted set ``S_dw``.

    ::

        0 < h / g < 1

    Args:
      g: gradient at the weights, a tree of floating-point arrays.
      h: gradient at the perturbed weights, of the same structure and shapes; of GSAM, after its decomposition.

    Returns:
      A tree of bools.

    Raises:
      ValueError: h has another structure or other shapes than g.
      TypeError: a leaf is not floating-point.

    Example:
      >>> g, h = {"w": jnp.array([2.0, 2.0, 2.0])}, {"w": jnp.array([-1.0, 1.0, 3.0])}
      >>> saner_jax.analysis.downweighted(g, h)["w"].tolist()
      [False, True, False]

    References:
      Luong et al., `Understanding SAM's Robustness to Noisy Labels through Gradient Down-weighting
      <https://arxiv.org/abs/2411.17132>`_, 2026, figure 2.
    """
    g, h = _widened_pair(g, h)
    return jax.tree.map(is_downweighted, h, g)


def random_like(key: jax.Array, mask: PyTree) -> PyTree:
    """Draw a random mask that has, in every leaf, as many True as ``mask``: a control for what a mask selects.

    ::

        every leaf: the elements of mask, shuffled

    What :func:`downweight_random` draws at a step is ``random_like(fold_in(key(seed), step), mask)``. It draws a random
    number for every element, and takes the smallest.

    Args:
      key: key of :mod:`jax.random`.
      mask: tree of arrays of bools.

    Returns:
      A tree of bools of the same structure and shapes.

    Raises:
      TypeError: a leaf of the mask does not hold bools.

    Example:
      >>> mask = {"w": jnp.array([True, True, False, False, False])}
      >>> jnp.sum(saner_jax.analysis.random_like(jax.random.key(0), mask)["w"]).item()
      2

    References:
      The control is not in SANER's paper, `Understanding SAM's Robustness to Noisy Labels through Gradient
      Down-weighting <https://arxiv.org/abs/2411.17132>`_, 2026.
    """
    check_tree("mask", mask, "itself", mask, "bool")
    return jax.tree.map(lambda key, leaf: shuffle(key, jnp.asarray(leaf)), leaf_keys(key, mask), mask)


def alignment(grads: PyTree, mask: PyTree, reference: PyTree) -> Alignment:
    """Measure how a gradient, restricted to the elements of a mask, aligns with another gradient.

    ::

        x = mask * grads
        cosine = <x, reference> / (||x|| ||reference||)

    With ``grads`` the gradient ``g`` of a batch, ``mask = downweighted(g, h)`` and ``reference`` the gradient of the
    batch's noisy samples it tells how much the down-weighted elements serve the noise; a mask of True throughout
    compares the whole gradient. ``reference`` is not restricted, so at equal agreement a smaller mask has a smaller
    cosine: compare with ``random_like(key, mask)``.

    Args:
      grads: gradient, a tree of floating-point arrays.
      mask: elements of grads that count, a tree of arrays of bools of the same structure and shapes.
      reference: gradient to compare with, of the same structure and shapes as grads.

    Returns:
      :class:`Alignment`: the cosine over all leaves at once, and the mean of the leaves' own (0 where there are none).

    Raises:
      ValueError: mask or reference has another structure or other shapes than grads.
      TypeError: a leaf is not floating-point, or one of the mask does not hold bools.

    Example:
      >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([1.0])}
      >>> reference = {"w": jnp.array([1.0, 0.0]), "b": jnp.array([1.0])}
      >>> mask = {"w": jnp.array([True, False]), "b": jnp.array([False])}
      >>> print(*(x.item() for x in saner_jax.analysis.alignment(grads, mask, reference)))
      0.707 0.5

    References:
      Luong et al., `Understanding SAM's Robustness to Noisy Labels through Gradient Down-weighting
      <https://arxiv.org/abs/2411.17132>`_, 2026, figure 2b.

    .. note::
      The released code averages the cosines of the leaves, with 1e-18 added to their denominators, so that a zero on
      either side counts as 0 there too: ``mean_leaf_cosine``.
    """
    check_floating("grads", grads)
    check_tree("reference", reference, "grads", grads, "floating")
    check_tree("mask", mask, "grads", grads, "bool")
    x = jax.tree.map(lambda m, g: jnp.where(m, g, 0), mask, widen(grads))
    reference = widen(reference)
    pairs = list(zip(jax.tree.leaves(x), jax.tree.leaves(reference), strict=True))
    dtype = jnp.result_type(float)
    per_leaf = [cosine_and_norms(*pair)[0].astype(dtype) for pair in pairs]
    return Alignment(
        cosine=cosine_and_norms(x, reference)[0].astype(dtype),
        mean_leaf_cosine=sum(per_leaf, jnp.zeros([], dtype)) / max(len(pairs), 1),
    )


def _widened_pair(g: PyTree, h: PyTree) -> tuple[PyTree, PyTree]:
    check_floating("g", g)
    check_tree("h", h, "g", g, "floating")
    return widen(g), widen(h)
