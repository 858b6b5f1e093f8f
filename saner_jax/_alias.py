"""Aliases: each method of the literature as one visible composition of stages, without arithmetic of its own."""

import functools
from collections.abc import Callable
from typing import ParamSpec

import jax
import optax

from saner_jax._ascent import follow_ema, scale_to_adaptive_norm, scale_to_norm, subtract_ema
from saner_jax._checks import brief
from saner_jax._descent import downweight, restore_downweighted, subtract_orthogonal
from saner_jax._hyperparameters import Hyperparameter
from saner_jax._leaves import PyTree
from saner_jax._monitor import observe_gradients
from saner_jax._sharpness_aware import AxisName, sharpness_aware

_Parameters = ParamSpec("_Parameters")
_Method = Callable[_Parameters, optax.GradientTransformationExtraArgs]


def _alias(method: _Method[_Parameters]) -> _Method[_Parameters]:
    """Answer ``sam(optimizer, ...)``, the call of other libraries, by what to write here."""

    @functools.wraps(method)
    def checked(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> optax.GradientTransformationExtraArgs:
        if args and isinstance(args[0], optax.GradientTransformation):
            name = method.__name__
            raise TypeError(
                f"{name} takes hyperparameters, not an optimizer: put the optimizer after it, "
                f"optax.chain(saner_jax.{name}(rho=0.1), optimizer)."
            )
        return method(*args, **kwargs)

    return checked


@_alias
def sam(
    rho: Hyperparameter = 0.1,
    *,
    reweight: optax.GradientTransformation | None = None,
    axis_name: AxisName | None = None,
    perturb_mask: PyTree | None = None,
    monitor: bool = False,
    perturbed_dtype: jax.typing.DTypeLike | None = None,
    reuse: bool | jax.typing.DTypeLike = False,
) -> optax.GradientTransformationExtraArgs:
    """Minimize the loss in a neighbourhood of the weights: SAM.

    ::

        eps = rho * g / ||g||,    h = grad L(w + eps),    update = h

    ``rho = 0`` is the optimizer that follows.

    Args:
      rho: radius of the perturbation in the unit of the weights (SANER's paper: 0.1); a number, a schedule or a traced
        value.
      reweight: descent stage put last; ``downweight(0.5)`` is SANER on this method, ``restore_downweighted()`` SGD-D.
      axis_name: mapped axis whose members perturb separately (m-SAM); None for one perturbation of the batch.
      perturb_mask: leaves that are perturbed; None for all.
      monitor: whether :func:`observe_gradients` stands before the reweighting; see ``state.monitored``.
      perturbed_dtype: dtype of the params that ``grad_fn`` receives; None for their own.
      reuse: whether updates may leave ``grad_fn`` out, at the cost of one gradient; see :func:`sharpness_aware`.

    Returns:
      An Optax transformation from the gradient at the weights to the gradient to descend, to stand first in a chain.

    Raises:
      ValueError: rho is a negative Python number.
      TypeError, ValueError: a mistake in the call of ``update``, as in :func:`sharpness_aware`.

    Example:
      >>> tx = saner_jax.sam(rho=0.1)
      >>> w = jnp.array([1.0, -1.0])
      >>> grad_fn = jax.grad(lambda w: jnp.sum(jnp.sin(w)))
      >>> updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      >>> print(updates.tolist())
      [0.480, 0.598]

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving Generalization
      <https://arxiv.org/abs/2010.01412>`_, 2021, algorithm 1.

    .. note::
      The paper's default rho is 0.05; 0.1 is that of SANER's paper, and one default is shared by all methods that use
      this norm, so that defaults compare.
    """
    return sharpness_aware(
        scale_to_norm(rho),
        *_last(reweight, monitor),
        axis_name=axis_name,
        perturb_mask=perturb_mask,
        perturbed_dtype=perturbed_dtype,
        reuse=reuse,
    )


@_alias
def asam(
    rho: Hyperparameter = 0.5,
    eta: Hyperparameter = 0.01,
    *,
    adaptive_mask: PyTree | None = None,
    reweight: optax.GradientTransformation | None = None,
    axis_name: AxisName | None = None,
    perturb_mask: PyTree | None = None,
    monitor: bool = False,
    perturbed_dtype: jax.typing.DTypeLike | None = None,
    reuse: bool | jax.typing.DTypeLike = False,
) -> optax.GradientTransformationExtraArgs:
    """Minimize the loss in a neighbourhood measured relative to the weights: ASAM.

    ::

        eps = rho * T^2 g / ||T g||,    T = |w| + eta,    h = grad L(w + eps),    update = h

    With an ``adaptive_mask`` that is False everywhere it is :func:`sam`.

    Args:
      rho: radius, dimensionless (ASAM's paper: 0.5 for CIFAR-10, 1.0 for CIFAR-100); a number, a schedule or a traced
        value.
      eta: offset of ``|w|``, in the unit of the weights (ASAM's paper: 0.01); likewise.
      adaptive_mask: leaves with ``T = |w| + eta``, the others have ``T = 1``; see :func:`scale_to_adaptive_norm`.
      reweight: descent stage put last; ``downweight(0.5)`` is SANER on this method, ``restore_downweighted()`` SGD-D.
      axis_name: mapped axis whose members perturb separately (m-SAM); None for one perturbation of the batch.
      perturb_mask: leaves that are perturbed; None for all.
      monitor: whether :func:`observe_gradients` stands before the reweighting; see ``state.monitored``.
      perturbed_dtype: dtype of the params that ``grad_fn`` receives; None for their own.
      reuse: whether updates may leave ``grad_fn`` out, at the cost of one gradient; see :func:`sharpness_aware`.

    Returns:
      An Optax transformation from the gradient at the weights to the gradient to descend, to stand first in a chain.

    Raises:
      ValueError: rho or eta is a negative Python number.
      TypeError, ValueError: a mistake in the call of ``update``, as in :func:`sharpness_aware`.

    Example:
      >>> tx = saner_jax.asam(rho=0.5)
      >>> w = jnp.array([1.0, -1.0])
      >>> grad_fn = jax.grad(lambda w: jnp.sum(jnp.sin(w)))
      >>> updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      >>> print(updates.tolist())
      [0.212, 0.800]

    References:
      Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks
      <https://arxiv.org/abs/2102.11600>`_, 2021, algorithm 1.

    .. note::
      ASAM's official code has ``T = 1`` on biases; SANER's code has ``T = |w|`` on every parameter, which is ``eta=0``.
    """
    return sharpness_aware(
        scale_to_adaptive_norm(rho, eta, adaptive_mask=adaptive_mask),
        *_last(reweight, monitor),
        axis_name=axis_name,
        perturb_mask=perturb_mask,
        perturbed_dtype=perturbed_dtype,
        reuse=reuse,
    )


@_alias
def gsam(
    rho: Hyperparameter = 0.1,
    alpha: Hyperparameter = 0.4,
    *,
    reweight: optax.GradientTransformation | None = None,
    axis_name: AxisName | None = None,
    perturb_mask: PyTree | None = None,
    monitor: bool = False,
    perturbed_dtype: jax.typing.DTypeLike | None = None,
    reuse: bool | jax.typing.DTypeLike = False,
) -> optax.GradientTransformationExtraArgs:
    """Minimize the loss in a neighbourhood and its surrogate gap: GSAM.

    ::

        eps = rho * g / ||g||,    h = grad L(w + eps),    update = h - alpha * (g - (<g, h> / ||h||^2) h)

    ``alpha = 0`` is :func:`sam`.

    Args:
      rho: radius of the perturbation in the unit of the weights (SANER's paper: 0.1); a number, a schedule or a traced
        value.
      alpha: share of the orthogonal part of ``g`` that is subtracted, dimensionless (GSAM's code: 0.4 for CIFAR);
        likewise.
      reweight: descent stage put last; ``downweight(0.5)`` is SANER on this method, ``restore_downweighted()`` SGD-D.
      axis_name: mapped axis whose members perturb separately (m-SAM); None for one perturbation of the batch.
      perturb_mask: leaves that are perturbed; None for all.
      monitor: whether :func:`observe_gradients` stands before the reweighting; see ``state.monitored``.
      perturbed_dtype: dtype of the params that ``grad_fn`` receives; None for their own.
      reuse: whether updates may leave ``grad_fn`` out, at the cost of one gradient; see :func:`sharpness_aware`.

    Returns:
      An Optax transformation from the gradient at the weights to the gradient to descend, to stand first in a chain.

    Raises:
      ValueError: rho is a negative Python number.
      TypeError, ValueError: a mistake in the call of ``update``, as in :func:`sharpness_aware`.

    Example:
      >>> tx = saner_jax.gsam(rho=0.1, alpha=0.4)
      >>> w = jnp.array([1.0, -1.0])
      >>> grad_fn = jax.grad(lambda w: jnp.sum(jnp.sin(w)))
      >>> updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      >>> print(updates.tolist())
      [0.453, 0.619]

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, 2022, algorithm 1.

    .. note::
      GSAM's paper lets rho follow the learning rate: ``rho=rho_from_learning_rate(...)``.
    """
    return sharpness_aware(
        scale_to_norm(rho),
        subtract_orthogonal(alpha),
        *_last(reweight, monitor),
        axis_name=axis_name,
        perturb_mask=perturb_mask,
        perturbed_dtype=perturbed_dtype,
        reuse=reuse,
    )


@_alias
def fsam(
    rho: Hyperparameter = 0.1,
    sigma: Hyperparameter = 1.0,
    decay: Hyperparameter = 0.9,
    *,
    reweight: optax.GradientTransformation | None = None,
    axis_name: AxisName | None = None,
    perturb_mask: PyTree | None = None,
    monitor: bool = False,
    perturbed_dtype: jax.typing.DTypeLike | None = None,
    reuse: bool | jax.typing.DTypeLike = False,
) -> optax.GradientTransformationExtraArgs:
    """Perturb along what is particular to the mini-batch: Friendly SAM.

    ::

        d_t = g_t - sigma * m_{t-1},    eps = rho * d_t / ||d_t||,    m_t = decay * m_{t-1} + (1 - decay) * g_t
        h = grad L(w + eps),    update = h

    The first step is that of :func:`sam`, and ``sigma = 0`` is :func:`sam`.

    Args:
      rho: radius of the perturbation in the unit of the weights (SANER's paper: 0.1); a number, a schedule or a traced
        value.
      sigma: share of the average that is subtracted, dimensionless (FSAM's paper: 1); likewise.
      decay: weight of the past in the average, in [0, 1) (FSAM's code: 0.9); likewise.
      reweight: descent stage put last; ``downweight(0.5)`` is SANER on this method, ``restore_downweighted()`` SGD-D.
      axis_name: mapped axis whose members perturb separately (m-SAM); None for one perturbation of the batch.
      perturb_mask: leaves that are perturbed; None for all.
      monitor: whether :func:`observe_gradients` stands before the reweighting; see ``state.monitored``.
      perturbed_dtype: dtype of the params that ``grad_fn`` receives; None for their own.
      reuse: whether updates may leave ``grad_fn`` out, at the cost of one gradient; see :func:`sharpness_aware`.

    Returns:
      An Optax transformation from the gradient at the weights to the gradient to descend, to stand first in a chain.

    Raises:
      ValueError: rho is a negative Python number, or decay one outside [0, 1).
      TypeError, ValueError: a mistake in the call of ``update``, as in :func:`sharpness_aware`.

    Example:
      >>> tx = saner_jax.fsam(rho=0.1)
      >>> w = jnp.array([1.0, -1.0])
      >>> grad_fn = jax.grad(lambda w: jnp.sum(jnp.sin(w)))
      >>> updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      >>> print(updates.tolist())
      [0.480, 0.598]

    References:
      Li et al., `Friendly Sharpness-Aware Minimization <https://arxiv.org/abs/2403.12350>`_, 2024, algorithm 1.
    """
    return sharpness_aware(
        optax.chain(subtract_ema(sigma, decay), scale_to_norm(rho)),
        *_last(reweight, monitor),
        axis_name=axis_name,
        perturb_mask=perturb_mask,
        perturbed_dtype=perturbed_dtype,
        reuse=reuse,
    )


@_alias
def vasso(
    rho: Hyperparameter = 0.1,
    theta: Hyperparameter = 0.9,
    *,
    reweight: optax.GradientTransformation | None = None,
    axis_name: AxisName | None = None,
    perturb_mask: PyTree | None = None,
    monitor: bool = False,
    perturbed_dtype: jax.typing.DTypeLike | None = None,
    reuse: bool | jax.typing.DTypeLike = False,
) -> optax.GradientTransformationExtraArgs:
    """Perturb along a moving average of the gradient: VaSSO.

    ::

        d_t = (1 - theta) * d_{t-1} + theta * g_t,    eps = rho * d_t / ||d_t||,    h = grad L(w + eps),    update = h

    ``theta = 1`` is :func:`sam`.

    Args:
      rho: radius of the perturbation in the unit of the weights (SANER's paper: 0.1); a number, a schedule or a traced
        value.
      theta: weight of the new gradient, in (0, 1] (VaSSO's code: 0.9; SANER's: 0.2); likewise.
      reweight: descent stage put last; ``downweight(0.5)`` is SANER on this method, ``restore_downweighted()`` SGD-D.
      axis_name: mapped axis whose members perturb separately (m-SAM); None for one perturbation of the batch.
      perturb_mask: leaves that are perturbed; None for all.
      monitor: whether :func:`observe_gradients` stands before the reweighting; see ``state.monitored``.
      perturbed_dtype: dtype of the params that ``grad_fn`` receives; None for their own.
      reuse: whether updates may leave ``grad_fn`` out, at the cost of one gradient; see :func:`sharpness_aware`.

    Returns:
      An Optax transformation from the gradient at the weights to the gradient to descend, to stand first in a chain.

    Raises:
      ValueError: rho is a negative Python number, or theta one outside (0, 1].
      TypeError, ValueError: a mistake in the call of ``update``, as in :func:`sharpness_aware`.

    Example:
      >>> tx = saner_jax.vasso(rho=0.1, theta=0.2)
      >>> w = jnp.array([1.0, -1.0])
      >>> grad_fn = jax.grad(lambda w: jnp.sum(jnp.sin(w)))
      >>> updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      >>> print(updates.tolist())
      [0.480, 0.598]

    References:
      Li and Giannakis, `Enhancing Sharpness-Aware Optimization Through Variance Suppression
      <https://arxiv.org/abs/2309.15639>`_, 2023.
    """
    return sharpness_aware(
        optax.chain(follow_ema(theta), scale_to_norm(rho)),
        *_last(reweight, monitor),
        axis_name=axis_name,
        perturb_mask=perturb_mask,
        perturbed_dtype=perturbed_dtype,
        reuse=reuse,
    )


@_alias
def saner(
    rho: Hyperparameter = 0.1,
    alpha: Hyperparameter = 0.5,
    *,
    axis_name: AxisName | None = None,
    perturb_mask: PyTree | None = None,
    monitor: bool = False,
    perturbed_dtype: jax.typing.DTypeLike | None = None,
    reuse: bool | jax.typing.DTypeLike = False,
) -> optax.GradientTransformationExtraArgs:
    """Damp what noisy labels leave in SAM's gradient: SANER.

    ::

        eps = rho * g / ||g||,    h = grad L(w + eps),    r = h / g
        update = (1 - alpha) * h  where 0 < r < 1,  h elsewhere

    ``alpha = 0`` is :func:`sam`; ``sam(rho, reweight=downweight(alpha))`` is the same composition, and ``reweight=``
    puts SANER on every other method.

    Args:
      rho: radius of the perturbation in the unit of the weights (SANER's paper: 0.1); a number, a schedule or a traced
        value.
      alpha: how much of a down-weighted element is removed, dimensionless (paper: 0.5, after a linear ramp from 0 over
        the first quarter of training: :func:`alpha_ramp`); negative values magnify; likewise.
      axis_name: mapped axis whose members perturb separately (m-SAM); None for one perturbation of the batch.
      perturb_mask: leaves that are perturbed; None for all.
      monitor: whether :func:`observe_gradients` stands before the reweighting; see ``state.monitored``.
      perturbed_dtype: dtype of the params that ``grad_fn`` receives; None for their own.
      reuse: whether updates may leave ``grad_fn`` out, at the cost of one gradient; see :func:`sharpness_aware`.

    Returns:
      An Optax transformation from the gradient at the weights to the gradient to descend, to stand first in a chain.

    Raises:
      ValueError: rho is a negative Python number.
      TypeError, ValueError: a mistake in the call of ``update``, as in :func:`sharpness_aware`.

    Example:
      >>> tx = saner_jax.saner(rho=0.1, alpha=0.5)
      >>> w = jnp.array([1.0, -1.0])
      >>> grad_fn = jax.grad(lambda w: jnp.sum(jnp.sin(w)))
      >>> updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      >>> print(updates.tolist())
      [0.240, 0.598]

    References:
      Luong et al., `Understanding SAM's Robustness to Noisy Labels through Gradient Down-weighting
      <https://arxiv.org/abs/2411.17132>`_, 2026.

    .. note::
      The released code's ``alpha`` is ``1 - alpha`` of the paper; here alpha is the paper's.
    """
    return sharpness_aware(
        scale_to_norm(rho),
        *_last(downweight(alpha), monitor),
        axis_name=axis_name,
        perturb_mask=perturb_mask,
        perturbed_dtype=perturbed_dtype,
        reuse=reuse,
    )


@_alias
def sgd_d(
    rho: Hyperparameter = 0.1,
    *,
    axis_name: AxisName | None = None,
    perturb_mask: PyTree | None = None,
    monitor: bool = False,
    perturbed_dtype: jax.typing.DTypeLike | None = None,
    reuse: bool | jax.typing.DTypeLike = False,
) -> optax.GradientTransformationExtraArgs:
    """Undo SAM's down-weighting and keep the rest of its gradient: SGD-D, an ablation.

    ::

        eps = rho * g / ||g||,    h = grad L(w + eps),    update = g  where 0 < h / g < 1,  h elsewhere

    ``rho = 0`` is the optimizer that follows.

    Args:
      rho: radius of the perturbation in the unit of the weights (SANER's paper: 0.1); a number, a schedule or a traced
        value.
      axis_name: mapped axis whose members perturb separately (m-SAM); None for one perturbation of the batch.
      perturb_mask: leaves that are perturbed; None for all.
      monitor: whether :func:`observe_gradients` stands before the reweighting; see ``state.monitored``.
      perturbed_dtype: dtype of the params that ``grad_fn`` receives; None for their own.
      reuse: whether updates may leave ``grad_fn`` out, at the cost of one gradient; see :func:`sharpness_aware`.

    Returns:
      An Optax transformation from the gradient at the weights to the gradient to descend, to stand first in a chain.

    Raises:
      ValueError: rho is a negative Python number.
      TypeError, ValueError: a mistake in the call of ``update``, as in :func:`sharpness_aware`.

    Example:
      >>> tx = saner_jax.sgd_d(rho=0.1)
      >>> w = jnp.array([1.0, -1.0])
      >>> grad_fn = jax.grad(lambda w: jnp.sum(jnp.sin(w)))
      >>> updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
      >>> print(updates.tolist())
      [0.540, 0.598]

    References:
      Luong et al., `Understanding SAM's Robustness to Noisy Labels through Gradient Down-weighting
      <https://arxiv.org/abs/2411.17132>`_, 2026, figure 2.
    """
    return sharpness_aware(
        scale_to_norm(rho),
        *_last(restore_downweighted(), monitor),
        axis_name=axis_name,
        perturb_mask=perturb_mask,
        perturbed_dtype=perturbed_dtype,
        reuse=reuse,
    )


def _last(reweight: optax.GradientTransformation | None, monitor: bool) -> tuple[optax.GradientTransformation, ...]:
    """Return the stages that end the descent: the observation, if asked for, and the reweighting, if there is one."""
    if reweight is not None and not isinstance(reweight, optax.GradientTransformation):
        raise TypeError(f"reweight must be a descent stage, such as downweight(0.5), got {brief(reweight)}.")
    return (*((observe_gradients(),) if monitor else ()), *(() if reweight is None else (reweight,)))
