"""Every method in float64 NumPy on flat vectors, as readable as the papers.

Written from the papers' formulas alone: no code is shared with the package, nor with JAX. One step of the family, over
groups k of the batch (one group: the ordinary method; several: m-SAM; one sample each: 1-SAM):

    g_k   = grad_k(w)
    eps_k = ascent(g_k)                  the group's own gradient, the old moving average
    g     = mean of g_k                  the moving average takes this one in
    h     = mean of grad_k(w + eps_k)
    u     = reweighted(decomposed(h, g), g)         on a step without a second gradient, h as ``across`` estimates it
    v     = momentum v + u + weight_decay w
    w     = w - learning_rate v

Every hyperparameter is a number or a function of the step, counted from 0.
"""

import numpy as np


def at(value, step):
    """A hyperparameter's value at a step."""
    return value(step) if callable(value) else value


def to_norm(direction, rho):
    """``rho d / ||d||``, and 0 for a zero direction."""
    norm = np.sqrt(np.sum(direction**2))
    return rho * direction / norm if norm > 0 else np.zeros_like(direction)


class SGD:
    """No perturbation: ``h = g``."""

    def eps(self, g, w, step):
        return np.zeros_like(w)

    def observe(self, g, step):
        pass


class SAM(SGD):
    """``eps = rho g / ||g||``."""

    def __init__(self, rho):
        self.rho = rho

    def eps(self, g, w, step):
        return to_norm(g, at(self.rho, step))


class ASAM(SAM):
    """``eps = rho T^2 g / ||T g||``, ``T = |w| + eta`` on the adaptive elements and 1 on the others."""

    def __init__(self, rho, eta, adaptive=True):
        self.rho, self.eta, self.adaptive = rho, eta, adaptive

    def eps(self, g, w, step):
        scale = np.where(self.adaptive, np.abs(w) + at(self.eta, step), 1.0)
        return scale * to_norm(scale * g, at(self.rho, step))


class FSAM(SAM):
    """``eps = rho d / ||d||``, ``d = g - sigma m``; then ``m = decay m + (1 - decay) g``. Step 0: ``d = m = g``."""

    def __init__(self, rho, sigma, decay):
        self.rho, self.sigma, self.decay = rho, sigma, decay
        self.m = None

    def eps(self, g, w, step):
        d = g if self.m is None else g - at(self.sigma, step) * self.m
        return to_norm(d, at(self.rho, step))

    def observe(self, g, step):
        decay = at(self.decay, step)
        self.m = g if self.m is None else decay * self.m + (1 - decay) * g


class VaSSO(SAM):
    """``d = (1 - theta) d + theta g``, then ``eps = rho d / ||d||``. Step 0: ``d = g``."""

    def __init__(self, rho, theta):
        self.rho, self.theta = rho, theta
        self.d = None

    def direction(self, g, step):
        theta = at(self.theta, step)
        return g if self.d is None else (1 - theta) * self.d + theta * g

    def eps(self, g, w, step):
        return to_norm(self.direction(g, step), at(self.rho, step))

    def observe(self, g, step):
        self.d = self.direction(g, step)


def decomposed(h, g, alpha):
    """GSAM: ``h - alpha g_perp``, ``g_perp`` the part of ``g`` orthogonal to ``h``."""
    along = np.dot(g, h) / np.dot(h, h) * h
    return h - alpha * (g - along)


def across(h, g):
    """What is kept of a pair of gradients: the direction of the part of ``h`` orthogonal to ``g``, and its size."""
    part = h - np.dot(g, h) / np.dot(g, g) * g
    return part / np.linalg.norm(part), np.linalg.norm(part) / np.linalg.norm(g)


def ratio(h, g):
    with np.errstate(divide="ignore", invalid="ignore"):
        return h / g


def turned(h, g):
    """``h / g < 0``."""
    return ratio(h, g) < 0


def down_weighted(h, g):
    """The mask of SANER: ``0 < h / g < 1``."""
    return (0 < ratio(h, g)) & (ratio(h, g) < 1)


def grown(h, g):
    """``h / g > 1``, of elements that were not zero."""
    return (ratio(h, g) > 1) & (g != 0)


def cosine(a, b):
    """The cosine of two vectors, 0 where either is zero."""
    norms = np.sqrt(np.sum(a**2) * np.sum(b**2))
    return np.sum(a * b) / norms if norms > 0 else 0.0


class Downweight:
    """SANER: ``(1 - alpha) h`` where masked; or on another group of elements."""

    def __init__(self, alpha, where=True, group=down_weighted):
        self.alpha, self.where, self.group = alpha, where, group

    def replacement(self, h, g, step):
        return (1 - at(self.alpha, step)) * h


class Restore:
    """SGD-D: ``g`` where masked."""

    group = staticmethod(down_weighted)

    def __init__(self, where=True):
        self.where = where

    def replacement(self, h, g, step):
        return g


class Optimizer:
    """A method of the family, then coupled weight decay, heavy-ball momentum and the learning rate.

    ``perturb`` is a bool vector: only these elements are perturbed, and the norm is taken over them.

    A float32 run cannot decide every mask bit as float64 does: where ``h`` is within rounding of 0 or of ``g``, either
    is right. Given what such a run emitted, ``step(..., emitted, rounding)`` takes over its decision on those elements,
    and on no others; ``undecided`` counts them. ``share`` is that of the masked among the elements to be reweighted.
    """

    def __init__(
        self, ascent, gsam=None, reweight=None, perturb=True, learning_rate=0.1, momentum=0.0, weight_decay=0.0
    ):
        self.ascent, self.gsam, self.reweight, self.perturb = ascent, gsam, reweight, perturb
        self.learning_rate, self.momentum, self.weight_decay = learning_rate, momentum, weight_decay
        self.t, self.v = 0, 0.0
        self.kept = 0.0, 0.0
        self.undecided, self.share = 0, 0.0

    def step(self, w, gradients, emitted=None, rounding=0.0, second=True):
        """``w`` after one step; ``gradients`` holds one function ``w -> gradient`` per group.

        Without ``second`` the second gradient is estimated from the last one: ``h = g + q ||g|| v``.
        """
        t = self.t
        per_group = [gradient(w) for gradient in gradients]
        self.eps = [self.ascent.eps(np.where(self.perturb, g, 0.0), w, t) for g in per_group]
        self.g = np.mean(per_group, axis=0)
        self.ascent.observe(np.where(self.perturb, self.g, 0.0), t)
        if second:
            self.h = np.mean([gradient(w + eps) for gradient, eps in zip(gradients, self.eps, strict=True)], axis=0)
            self.kept = across(self.h, self.g)
        else:
            direction, size = self.kept
            self.h = self.g + size * np.linalg.norm(self.g) * direction

        self.u = self.descend(self.h, self.g, emitted, rounding)
        self.v = at(self.momentum, t) * self.v + self.u + self.weight_decay * w
        self.t += 1
        return w - at(self.learning_rate, t) * self.v

    def descend(self, h, g, emitted, rounding):
        if self.gsam is not None:
            h = decomposed(h, g, at(self.gsam, self.t))
        if self.reweight is None:
            return h
        replacement = self.reweight.replacement(h, g, self.t)
        self.mask = self.reweight.group(h, g) & self.reweight.where
        if emitted is not None:
            near_a_bound = np.minimum(np.abs(h), np.abs(h - g)) <= rounding * np.max(np.abs(g))
            undecided = near_a_bound & self.reweight.where
            chosen = np.abs(emitted - replacement) < np.abs(emitted - h)
            self.mask = np.where(undecided, chosen, self.mask)
            self.undecided += np.sum(undecided)
        self.share = np.sum(self.mask) / np.sum(np.broadcast_to(self.reweight.where, h.shape))
        return np.where(self.mask, replacement, h)


def linear_ramp(alpha, steps):
    """``alpha min(step / steps, 1)``."""
    return lambda step: alpha * min(step / steps, 1.0)


def staircase_ramp(alpha, steps, steps_per_epoch):
    """The released code's ramp: one value an epoch, counted from 1."""
    return lambda step: alpha * min((step // steps_per_epoch + 1) * steps_per_epoch / steps, 1.0)


def rho_from_learning_rate(learning_rate, lr_min, lr_max, rho_min, rho_max):
    """GSAM: rho moves linearly with the learning rate between its two values."""

    def rho(step):
        share = (at(learning_rate, step) - lr_min) / (lr_max - lr_min)
        return rho_min + (rho_max - rho_min) * min(max(share, 0.0), 1.0)

    return rho


class Batch:
    """``L(w) = mean (tanh(a w) - b)^2 + mean cos(3 w)``: smooth, non-convex, every weight coupled to every other."""

    def __init__(self, a, b):
        self.a, self.b = a, b

    def gradient(self, w):
        p = np.tanh(self.a @ w)
        data = 2 * self.a.T @ ((p - self.b) * (1 - p**2)) / len(self.b)
        return data - 3 * np.sin(3 * w) / len(w)


def batches(seed, steps, size, dimension):
    """One batch a step."""
    rng = np.random.default_rng(seed)
    draws = [(rng.normal(size=(size, dimension)), rng.uniform(-1, 1, size)) for _ in range(steps)]
    return [Batch(2 * a / np.sqrt(dimension), b) for a, b in draws]
