"""Every method by its name, and the schedules of the paper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import saner_jax
from examples.noisy_images import models
from examples.noisy_images.config import PAPER, configure, replace
from examples.noisy_images.errors import UserError
from examples.noisy_images.training import methods
from examples.noisy_images.training.step import running_metrics
from examples.noisy_images.training.trainer import Trainer

STEPS = 390
PARAMS = {
    "weight": jnp.array([[1.0, -2.0], [0.5, 4.0]]),
    "bias": jnp.array([0.5, -1.0]),
    "classifier": jnp.array([-1.5, 0.2, 3.0]),
}
TARGET = {
    "weight": jnp.array([[0.0, 1.0], [2.0, -1.0]]),
    "bias": jnp.array([0.3, 2.0]),
    "classifier": jnp.array([1.0, -0.4, -0.5]),
}


def gradient(params):
    """Of a loss that is no quadratic, so that the methods differ in all their numbers."""
    return jax.grad(lambda p: sum(jnp.sum((p[k] - TARGET[k]) ** 4) for k in p) / 50)(params)


def run(tx, steps=3):
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        updates, state = tx.update(gradient(params), state, params, grad_fn=gradient)
        params = optax.apply_updates(params, updates)
    return params, state


def test_every_method_has_a_summary():
    assert methods.METHODS.keys() == methods.SUMMARIES.keys()
    assert len(set(methods.SUMMARIES.values())) == len(methods.METHODS)


@pytest.mark.slow
@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_trains_an_epoch(method, tiny, eager):
    config = configure(
        model="mlp", width=1 / 64, epochs=2, batch_size=8, method=method, learning_rate=0.05, scan_epochs=False
    )
    trainer = Trainer(config, tiny())
    before = trainer.state
    # The types of the state never change, or a second step would compile again.
    images, order = trainer._place(trainer.dataset.train), jnp.arange(24)
    after = jax.eval_shape(trainer._functions.train_step, before, trainer._seed, images, order)
    jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail("types changed"), before, after)
    # That compiled steps do the same is tested in test_training.
    assert list(eager(trainer).train_epoch()) == [1, 2, 3]
    values = running_metrics(trainer.state)
    assert np.isfinite(list(values.values())).all()
    assert ("running_perturbation_norm" in values) == (method != "sgd")
    if method != "sgd":
        assert values["running_perturbation_norm"] > 0 and 0 < values["running_downweighted_share"] < 1
    changed = jax.tree.map(
        lambda a, b: bool((a != b).any()), before.networks[0].params, trainer.state.networks[0].params
    )
    assert all(jax.tree.leaves(changed))


ALIASES = {
    "sgd": lambda: optax.identity(),
    "sam": lambda: saner_jax.sam(0.3),
    "asam": lambda: saner_jax.asam(0.3, 0.01),
    "gsam": lambda: saner_jax.gsam(0.3, 0.7),
    "fsam": lambda: saner_jax.fsam(0.3, 0.8, 0.6),
    "vasso": lambda: saner_jax.vasso(0.3, 0.4),
    "saner": lambda: saner_jax.saner(0.3, 0.9),
    "asam+saner": lambda: saner_jax.asam(0.3, 0.01, reweight=saner_jax.downweight(0.9)),
    "gsam+saner": lambda: saner_jax.gsam(0.3, 0.7, reweight=saner_jax.downweight(0.9)),
    "fsam+saner": lambda: saner_jax.fsam(0.3, 0.8, 0.6, reweight=saner_jax.downweight(0.9)),
    "vasso+saner": lambda: saner_jax.vasso(0.3, 0.4, reweight=saner_jax.downweight(0.9)),
    "sgd_d": lambda: saner_jax.sgd_d(0.3),
    "saner_turned": lambda: saner_jax.sam(0.3, reweight=saner_jax.downweight(0.9, where=saner_jax.is_turned)),
    "saner_grown": lambda: saner_jax.sam(0.3, reweight=saner_jax.downweight(0.9, where=saner_jax.is_grown)),
    "saner_last_layer": lambda: saner_jax.sam(
        0.3, reweight=saner_jax.downweight(0.9, mask={"weight": False, "bias": False, "classifier": True})
    ),
    "saner_random": lambda: saner_jax.sam(0.3, reweight=saner_jax.downweight_random(0.9)),
    "saner_norm": lambda: saner_jax.sam(0.3, reweight=methods.scale_to_norm_of(saner_jax.downweight(0.9))),
}
ODD = configure(
    rho=0.3,
    alpha=0.9,
    alpha_ramp=0.0,
    asam_eta=0.01,
    gsam_alpha=0.7,
    fsam_sigma=0.8,
    fsam_decay=0.6,
    vasso_theta=0.4,
    weight_decay=0.1,
    momentum=0.7,
    learning_rate=0.2,
    learning_rate_schedule="constant",
)


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_setting_arrives_in_its_place(method):
    config = replace(ODD, method=method)
    params, _ = run(methods.create(config, STEPS, 10))
    expected, _ = run(optax.chain(ALIASES[method](), optax.add_decayed_weights(0.1), optax.sgd(0.2, momentum=0.7)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, expected)


def test_weight_decay_comes_after_the_mask_and_reaches_every_parameter():
    # alpha = 1 removes the elements that the mask holds: what is left of them is the decay alone.
    config = replace(ODD, method="saner", alpha=1.0, momentum=0.0, learning_rate=1.0)
    updates, _ = (tx := methods.create(config, STEPS, 10)).update(
        gradient(PARAMS), tx.init(PARAMS), PARAMS, grad_fn=lambda p: jax.tree.map(lambda x: x / 2, gradient(PARAMS))
    )
    jax.tree.map(lambda u, p: np.testing.assert_allclose(u, -0.1 * p, rtol=1e-6), updates, PARAMS)


def test_the_learning_rate_falls_to_a_tenth_at_epochs_100_and_150():
    rate = methods.learning_rate(PAPER, STEPS)
    for epoch, expected in ((0, 0.1), (99, 0.1), (100, 0.01), (149, 0.01), (150, 0.001), (199, 0.001)):
        np.testing.assert_allclose([rate(epoch * STEPS), rate(epoch * STEPS + STEPS - 1)], expected, rtol=1e-5)


@pytest.mark.parametrize("epochs", [1, 2, 3, 5])
def test_the_learning_rate_never_falls_in_the_first_epoch(epochs):
    rate = methods.learning_rate(configure(epochs=epochs), 7)
    np.testing.assert_allclose([rate(0), rate(6)], 0.1)


def test_other_learning_rates():
    cosine = methods.learning_rate(configure(learning_rate_schedule="cosine"), STEPS)
    np.testing.assert_allclose([cosine(0), cosine(100 * STEPS), cosine(200 * STEPS)], [0.1, 0.05, 0], atol=1e-7)
    assert methods.learning_rate(configure(learning_rate_schedule="constant"), STEPS)(10**6) == pytest.approx(0.1)


def test_alpha_rises_over_fifty_of_two_hundred_epochs():
    staircase = methods.hyperparameters(PAPER, STEPS, 10).alpha
    straight = methods.hyperparameters(replace(PAPER, alpha_ramp_by="step"), STEPS, 10).alpha
    for epoch in (0, 1, 24, 49, 50, 199):
        # The released code counts epochs from 1.
        expected = 0.5 * min((epoch + 1) / 50, 1)
        first, last = epoch * STEPS, epoch * STEPS + STEPS - 1
        np.testing.assert_allclose([staircase(first), staircase(last)], expected, rtol=1e-6)
        np.testing.assert_allclose(
            [straight(first), straight(last)], [0.5 * min(s / (50 * STEPS), 1) for s in (first, last)], rtol=1e-6
        )
    assert methods.hyperparameters(replace(PAPER, alpha_ramp=0.0), STEPS, 10).alpha == 0.5


def test_rho_of_each_method():
    def rho(classes, **change):
        return methods.hyperparameters(replace(PAPER, **change), STEPS, classes).rho

    assert [rho(10, method=m) for m in ("saner", "sam", "gsam+saner", "sgd_d")] == [0.1] * 4
    assert [rho(classes, method=m) for classes in (10, 100) for m in ("asam", "asam+saner")] == [0.5, 0.5, 1.0, 1.0]
    assert rho(100, method="asam", rho=0.2) == 0.2
    assert rho(10, rho=0.0) == 0.0


def test_rho_follows_the_learning_rate():
    config = replace(PAPER, method="gsam", rho=0.5, rho_min=0.1, learning_rate_schedule="cosine")
    rho = methods.hyperparameters(config, STEPS, 10).rho
    np.testing.assert_allclose([rho(0), rho(100 * STEPS), rho(200 * STEPS)], [0.5, 0.3, 0.1], rtol=1e-5)


def test_asam_scales_biases_or_not():
    def perturbed(leaves):
        seen = []
        config = replace(ODD, method="asam", asam_leaves=leaves, asam_eta=0.0)
        tx = methods.create(config, STEPS, 10)
        tx.update(gradient(PARAMS), tx.init(PARAMS), PARAMS, grad_fn=lambda p: seen.append(p) or gradient(p))
        return jax.tree.map(lambda a, b: np.asarray(a - b), seen[0], PARAMS)

    g = jax.tree.map(np.asarray, gradient(PARAMS))
    for leaves, bias_scale in (("all", np.abs(PARAMS["bias"])), ("weights", np.ones(2))):
        scale = {**jax.tree.map(np.abs, PARAMS), "bias": bias_scale}
        norm = np.sqrt(sum(np.sum((scale[k] * g[k]) ** 2) for k in g))
        eps = perturbed(leaves)
        for k in g:
            np.testing.assert_allclose(eps[k], 0.3 * scale[k] ** 2 * g[k] / norm, rtol=1e-4, atol=1e-6)


def test_asam_takes_a_models_biases_for_biases(tiny):
    trainer = Trainer(configure(model="small_cnn", width=1 / 32, batch_size=8), tiny())
    paths = jax.tree_util.tree_leaves_with_path(methods._all_but_biases(trainer.state.networks[0].params))
    masked = {jax.tree_util.keystr(path, simple=True, separator="/") for path, scaled in paths if not scaled}
    # Four BatchNorms and the classifier.
    assert len(masked) == 5 and all("/bias" in path for path in masked)


# One model of each class; the others differ in their depth.
CLASSES = {getattr(model.build, "func", model.build): name for name, model in models.MODELS.items()}


@pytest.mark.parametrize("model", CLASSES.values())
def test_the_last_layer_of_every_model_is_found(model):
    build = functools.partial(models.create, model, num_classes=7, image_shape=(8, 8, 3), seed=0, width=1 / 16)
    params = nnx.state(nnx.eval_shape(build), nnx.Param)
    selected = jax.tree.map(lambda p, chosen: p.shape if chosen else None, params, methods._last_layer(params))
    bias, kernel = jax.tree.leaves(selected, is_leaf=lambda x: isinstance(x, tuple))
    # All that makes the logits, and nothing else.
    assert bias == (7,) and len(kernel) == 2 and kernel[1] == 7


def test_a_model_without_a_classifier_is_the_users_error():
    tx = methods.create(replace(ODD, method="saner_last_layer"), STEPS, 10)
    params = {"head": jnp.ones(2)}
    with pytest.raises(UserError, match="'classifier'"):
        tx.update(params, tx.init(params), params, grad_fn=lambda w: w)


def test_the_random_control_draws_by_the_training_seed_and_shares_what_is_compiled(tiny):
    config = configure(model="mlp", width=1 / 64, batch_size=8, method="saner_random")
    trainers = [
        Trainer(replace(config, seed=seed, companion=companion), tiny())
        for seed, companion in ((0, "none"), (0, "none"), (1, "none"), (0, "co-teaching"))
    ]
    seeds = [
        [int(optax.tree.get(network.opt_state, "seed")) for network in trainer.state.networks] for trainer in trainers
    ]
    assert seeds[0] == seeds[1] == seeds[3][:1]
    assert len({*seeds[2], *seeds[3]}) == 3
    assert trainers[0]._functions.train_step is trainers[2]._functions.train_step


def test_the_control_for_size_has_sams_direction_and_saners_norm():
    """At every step of a run, also where alpha rises."""

    def perturbed(params):
        # Elements that shrink, turn and grow.
        g, factors = gradient(params), {"weight": 0.6, "bias": -0.3, "classifier": 1.4}
        return {name: factors[name] * g[name] for name in g}

    config = replace(ODD, alpha_ramp=0.5, epochs=4, momentum=0.0, weight_decay=0.0)
    params = PARAMS
    names = ("sam", "saner", "saner_norm")
    txs = {name: methods.create(replace(config, method=name), 2, 10) for name in names}
    states = {name: tx.init(params) for name, tx in txs.items()}
    for step in range(5):
        updates = {}
        for name, tx in txs.items():
            updates[name], states[name] = tx.update(gradient(params), states[name], params, grad_fn=perturbed)
        flat = {name: np.concatenate([np.ravel(x) for x in jax.tree.leaves(updates[name])]) for name in names}
        norms = {name: np.linalg.norm(values) for name, values in flat.items()}
        assert norms["saner_norm"] == pytest.approx(norms["saner"], rel=1e-5), step
        assert norms["saner_norm"] < 0.99 * norms["sam"]
        np.testing.assert_allclose(flat["saner_norm"] / norms["saner_norm"], flat["sam"] / norms["sam"], rtol=1e-4)
        params = optax.apply_updates(params, updates["saner_norm"])


def test_the_control_for_size_leaves_a_zero_gradient_zero():
    tx = methods.scale_to_norm_of(optax.scale(0.5))
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates))


def test_the_monitored_scalars_are_found():
    for method in methods.METHODS:
        _, state = run(methods.create(replace(ODD, method=method), STEPS, 10), steps=1)
        assert (methods.monitored(state) is None) == (method == "sgd")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "samer"}, "unknown method 'samer': did you mean 'saner'.*choose one of asam, asam"),
        ({"alpha": float("nan")}, "alpha"),
        ({"rho_min": 0.1, "learning_rate": 0.0}, "lr_max"),
    ],
)
def test_impossible_methods_are_the_users_error(change, message):
    with pytest.raises(UserError, match=message):
        methods.create(replace(PAPER, **change), STEPS, 10)
