"""Aliases: each is the composition that its documentation names, with the documented defaults."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saner_jax import (
    asam,
    downweight,
    follow_ema,
    fsam,
    gsam,
    restore_downweighted,
    sam,
    saner,
    scale_to_adaptive_norm,
    scale_to_norm,
    sgd_d,
    sharpness_aware,
    subtract_ema,
    subtract_orthogonal,
    vasso,
)

MASK = {"w": True, "b": False}
REWEIGHT = downweight(0.3)

COMPOSITIONS = {
    "sam": (sam(), sharpness_aware(scale_to_norm(0.1))),
    "asam": (asam(), sharpness_aware(scale_to_adaptive_norm(0.5, 0.01))),
    "asam, masked": (
        asam(0.7, 0.1, adaptive_mask=MASK),
        sharpness_aware(scale_to_adaptive_norm(0.7, 0.1, adaptive_mask=MASK)),
    ),
    "gsam": (gsam(), sharpness_aware(scale_to_norm(0.1), subtract_orthogonal(0.4))),
    "fsam": (fsam(), sharpness_aware(optax.chain(subtract_ema(1.0, 0.9), scale_to_norm(0.1)))),
    "fsam, set": (fsam(0.3, 0.5, 0.6), sharpness_aware(optax.chain(subtract_ema(0.5, 0.6), scale_to_norm(0.3)))),
    "vasso": (vasso(), sharpness_aware(optax.chain(follow_ema(0.9), scale_to_norm(0.1)))),
    "saner": (saner(), sharpness_aware(scale_to_norm(0.1), downweight(0.5))),
    "sgd_d": (sgd_d(), sharpness_aware(scale_to_norm(0.1), restore_downweighted())),
    "saner as reweighted sam": (saner(0.2, 0.3), sam(0.2, reweight=REWEIGHT)),
    "asam+saner": (asam(reweight=REWEIGHT), sharpness_aware(scale_to_adaptive_norm(0.5, 0.01), REWEIGHT)),
    "gsam+saner": (
        gsam(reweight=REWEIGHT),
        sharpness_aware(scale_to_norm(0.1), subtract_orthogonal(0.4), REWEIGHT),
    ),
    "fsam+saner": (
        fsam(reweight=REWEIGHT),
        sharpness_aware(optax.chain(subtract_ema(1.0, 0.9), scale_to_norm(0.1)), REWEIGHT),
    ),
    "vasso+sgd_d": (
        vasso(reweight=restore_downweighted()),
        sharpness_aware(optax.chain(follow_ema(0.9), scale_to_norm(0.1)), restore_downweighted()),
    ),
    "keywords": (
        saner(perturb_mask=MASK, monitor=True, perturbed_dtype=jnp.float32),
        sharpness_aware(
            scale_to_norm(0.1), downweight(0.5), perturb_mask=MASK, monitor=True, perturbed_dtype=jnp.float32
        ),
    ),
}

WRAPPER = {"axis_name": None, "perturb_mask": None, "monitor": False}
DEFAULTS = {
    sam: {"rho": 0.1, "reweight": None},
    asam: {"rho": 0.5, "eta": 0.01, "adaptive_mask": None, "reweight": None},
    gsam: {"rho": 0.1, "alpha": 0.4, "reweight": None},
    fsam: {"rho": 0.1, "sigma": 1.0, "decay": 0.9, "reweight": None},
    vasso: {"rho": 0.1, "theta": 0.9, "reweight": None},
    saner: {"rho": 0.1, "alpha": 0.5},
    sgd_d: {"rho": 0.1},
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_alias_is_its_composition(name):
    """Bit for bit, update and state, over three steps."""
    params = {"w": jnp.array([0.3, -1.2, 2.0]), "b": jnp.array(0.4)}

    def grad_fn(w):
        return jax.tree.map(lambda x: jnp.cos(3 * x) + w["b"], w)

    outcomes = []
    for tx in COMPOSITIONS[name]:
        state = tx.init(params)
        for step in range(3):
            moved = jax.tree.map(lambda p, step=step: p + 0.2 * step, params)
            updates, state = tx.update(grad_fn(moved), state, moved, grad_fn=grad_fn)
        outcomes.append((updates, state))
    chex.assert_trees_all_equal(*outcomes)


@pytest.mark.parametrize("alias", DEFAULTS)
def test_defaults(alias):
    parameters = inspect.signature(alias).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    expected = DEFAULTS[alias] | WRAPPER
    assert list(defaults)[: len(expected)] == list(expected)
    assert {name: defaults[name] for name in expected} == expected
    assert defaults["perturbed_dtype"] is None


def test_reweight_comes_last():
    """The mask of SANER on GSAM compares GSAM's final gradient with g."""
    g, h = np.array([1.0, 1.0], np.float32), np.array([2.0, 0.5], np.float32)
    final = h - 0.4 * (g - g @ h / (h @ h) * h)
    tx = gsam(alpha=0.4, reweight=downweight(1.0))
    params = jnp.zeros(2)
    updates, _ = tx.update(jnp.asarray(g), tx.init(params), params, grad_fn=lambda w: jnp.asarray(h))
    ratio = final / g
    np.testing.assert_allclose(updates, np.where((ratio > 0) & (ratio < 1), 0, final), rtol=1e-6)
    assert (ratio > 1).any()
