"""Methods by name: each is one entry, a composition of the library's stages in front of the same optimizer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import saner_jax

from ..config import Config
from ..errors import UserError, unknown_name


class Hyperparameters(NamedTuple):
    """What the methods are made of: numbers or schedules of the step."""

    rho: optax.ScalarOrSchedule
    alpha: optax.ScalarOrSchedule
    gsam_alpha: float
    asam_eta: float
    asam_mask: Callable[[Any], Any] | None
    fsam_sigma: float
    fsam_decay: float
    vasso_theta: float
    seed: int | jax.Array


Stage = Callable[..., optax.GradientTransformation]

_BASES: dict[str, Stage] = {
    "sam": lambda p, **options: saner_jax.sam(p.rho, **options),
    "asam": lambda p, **options: saner_jax.asam(p.rho, p.asam_eta, adaptive_mask=p.asam_mask, **options),
    "gsam": lambda p, **options: saner_jax.gsam(p.rho, p.gsam_alpha, **options),
    "fsam": lambda p, **options: saner_jax.fsam(p.rho, p.fsam_sigma, p.fsam_decay, **options),
    "vasso": lambda p, **options: saner_jax.vasso(p.rho, p.vasso_theta, **options),
}


def _on_top(base: Stage) -> Stage:
    return lambda p, **options: base(p, reweight=saner_jax.downweight(p.alpha), **options)


def _on_sam(reweight: Callable[[Hyperparameters], optax.GradientTransformation]) -> Stage:
    return lambda p, **options: saner_jax.sam(p.rho, reweight=reweight(p), **options)


def scale_to_norm_of(stage: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Keep a gradient's direction and give it the global norm that a stage would leave it: a control for its size."""
    stage = optax.with_extra_args_support(stage)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        other, state = stage.update(updates, state, params, **extra_args)
        norm = optax.tree.norm(updates)
        factor = jnp.where(norm > 0, optax.tree.norm(other) / norm, 1.0)
        return optax.tree.scale(factor, updates), state

    return optax.GradientTransformationExtraArgs(stage.init, update)


# A method of your own is one more entry: hyperparameters -> an Optax transformation that stands first in the chain.
METHODS: dict[str, Stage] = {
    "sgd": lambda p, **options: optax.identity(),
    **_BASES,
    "saner": lambda p, **options: saner_jax.saner(p.rho, p.alpha, **options),
    **{f"{name}+saner": _on_top(base) for name, base in _BASES.items() if name != "sam"},
    # Ablations: the down-weighting undone, or other elements in place of those with 0 < r < 1.
    "sgd_d": lambda p, **options: saner_jax.sgd_d(p.rho, **options),
    "saner_turned": _on_sam(lambda p: saner_jax.downweight(p.alpha, where=saner_jax.is_turned)),
    "saner_grown": _on_sam(lambda p: saner_jax.downweight(p.alpha, where=saner_jax.is_grown)),
    "saner_last_layer": _on_sam(lambda p: saner_jax.downweight(p.alpha, mask=_last_layer)),
    "saner_random": _on_sam(lambda p: saner_jax.downweight_random(p.alpha, seed=p.seed)),
    "saner_norm": _on_sam(lambda p: scale_to_norm_of(saner_jax.downweight(p.alpha))),
}
SUMMARIES = {
    "sgd": "SGD with momentum",
    "sam": "sharpness-aware minimization",
    "asam": "adaptive SAM",
    "gsam": "surrogate-gap SAM",
    "fsam": "friendly SAM",
    "vasso": "variance-suppressed SAM",
    "saner": "SANER on SAM",
    "asam+saner": "SANER on ASAM",
    "gsam+saner": "SANER on GSAM",
    "fsam+saner": "SANER on FSAM",
    "vasso+saner": "SANER on VaSSO",
    "sgd_d": "SAM with the down-weighting undone (ablation)",
    "saner_turned": "SANER on the elements that the perturbation turned, r < 0 (ablation)",
    "saner_grown": "SANER on the elements that the perturbation made grow, r > 1 (ablation)",
    "saner_last_layer": "SANER on the last layer alone (ablation)",
    "saner_random": "SANER on as many elements of each leaf, at random (control)",
    "saner_norm": "SAM, its gradient scaled to the norm of SANER's (control)",
}


def learning_rate(config: Config, steps_per_epoch: int) -> optax.Schedule:
    """Return the learning rate as a function of the step."""
    total = config.training.epochs * steps_per_epoch
    match config.optimizer.learning_rate_schedule:
        case "constant":
            return optax.constant_schedule(config.optimizer.learning_rate)
        case "cosine":
            return optax.cosine_decay_schedule(config.optimizer.learning_rate, total)
        case _:
            # Never before the first epoch is over, however few there are.
            epochs = (max(round(drop * config.training.epochs), 1) for drop in config.optimizer.learning_rate_drops)
            return optax.piecewise_constant_schedule(
                config.optimizer.learning_rate, {e * steps_per_epoch: 0.1 for e in epochs}
            )


def hyperparameters(
    config: Config, steps_per_epoch: int, num_classes: int, seed: int | jax.Array = 0
) -> Hyperparameters:
    """Resolve the configuration's numbers and schedules; ``seed`` is that of methods that draw."""
    if config.optimizer.rho is not None:
        rho = config.optimizer.rho
    elif config.optimizer.method.startswith("asam"):
        rho = 1.0 if num_classes == 100 else 0.5
    else:
        rho = 0.1
    if config.optimizer.rho_min is not None:
        schedule = learning_rate(config, steps_per_epoch)
        rho = saner_jax.rho_from_learning_rate(
            schedule, 0.0, config.optimizer.learning_rate, config.optimizer.rho_min, rho
        )

    ramp_epochs = round(config.alpha_ramp_epochs)
    alpha: optax.ScalarOrSchedule = config.optimizer.alpha
    if ramp_epochs:
        tread = steps_per_epoch if config.optimizer.alpha_ramp_by == "epoch" else None
        alpha = saner_jax.alpha_ramp(config.optimizer.alpha, ramp_epochs * steps_per_epoch, steps_per_epoch=tread)

    return Hyperparameters(
        rho=rho,
        alpha=alpha,
        gsam_alpha=config.optimizer.gsam_alpha,
        asam_eta=config.optimizer.asam_eta,
        asam_mask=_all_but_biases if config.optimizer.asam_leaves == "weights" else None,
        fsam_sigma=config.optimizer.fsam_sigma,
        fsam_decay=config.optimizer.fsam_decay,
        vasso_theta=config.optimizer.vasso_theta,
        seed=seed,
    )


def create(
    config: Config, steps_per_epoch: int, num_classes: int, seed: int | jax.Array = 0
) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer: the method's stage, weight decay, heavy-ball momentum, learning rate.

    ``seed`` enters the optimizer's state in ``init`` and nothing else, so ``update`` is the same function for all.
    """
    if config.optimizer.method not in METHODS:
        raise unknown_name("method", config.optimizer.method, METHODS)
    reuse = {"reuse": True} if config.optimizer.every > 1 else {}
    try:
        stage = METHODS[config.optimizer.method](
            hyperparameters(config, steps_per_epoch, num_classes, seed), monitor=True, **reuse
        )
    except ValueError as error:
        # The library's own checks of its hyperparameters.
        raise UserError(str(error)) from error
    return optax.chain(
        stage,
        optax.add_decayed_weights(config.optimizer.weight_decay),
        optax.trace(config.optimizer.momentum),
        optax.scale_by_learning_rate(learning_rate(config, steps_per_epoch)),
    )


def monitored(opt_state: optax.OptState) -> saner_jax.Monitored | None:
    """Return what the method's stage observed in the last step; None for a method of one pass."""
    stage_state = opt_state[0]
    return stage_state.monitored if isinstance(stage_state, saner_jax.SharpnessAwareState) else None


def _all_but_biases(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: "bias" not in jax.tree_util.keystr(path), params)


def _last_layer(params: Any) -> Any:
    """Select the leaves of the layer that makes the logits, which every network here calls ``classifier``."""

    def is_of_last_layer(path: tuple[Any, ...], _: Any) -> bool:
        return jax.tree_util.keystr(path, simple=True, separator="/").split("/")[0] == "classifier"

    selected = jax.tree_util.tree_map_with_path(is_of_last_layer, params)
    if not any(jax.tree.leaves(selected)):
        raise UserError("saner_last_layer acts on the layer named 'classifier': name the model's last layer so.")
    return selected
