"""Mistakes raise ValueError or TypeError with one sentence that names the argument and says what to do."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import saner_jax

PARAMS = {"w": jnp.array([[0.5, -1.0], [2.0, 0.25]]), "b": jnp.array([1.0, -1.0])}
ALIASES = [
    saner_jax.sam,
    saner_jax.asam,
    saner_jax.gsam,
    saner_jax.fsam,
    saner_jax.vasso,
    saner_jax.saner,
    saner_jax.sgd_d,
]


def cosine(tree):
    return jax.tree.map(jnp.cos, tree)


def raises(kind, *words):
    """Expect one sentence with all of ``words``."""

    class Sentence:
        def __enter__(self):
            self.context = pytest.raises(kind)
            self.info = self.context.__enter__()
            return self.info

        def __exit__(self, *exception):
            caught = self.context.__exit__(*exception)
            message = str(self.info.value)
            for word in words:
                assert word in message
            assert message.endswith(".")
            assert not re.search(r"\.\s+[A-Z]|\n", message), message
            return caught

    return Sentence()


def update(tx, grads=None, params=PARAMS, grad_fn=cosine, **extra_args):
    return tx.update(cosine(PARAMS) if grads is None else grads, tx.init(PARAMS), params, grad_fn=grad_fn, **extra_args)


# -- the call of update ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alias", ALIASES)
def test_no_grad_fn(alias):
    tx = alias()
    with raises(TypeError, "grad_fn is missing", "grad_fn=grad_fn"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    with raises(TypeError, "grad_fn is missing", "grad_fn=grad_fn"):
        optax.chain(tx, optax.sgd(0.1)).update(PARAMS, optax.chain(tx, optax.sgd(0.1)).init(PARAMS), PARAMS)


def test_grad_fn_that_is_no_function():
    with raises(TypeError, "grad_fn", "function of params"):
        update(saner_jax.saner(), grad_fn=PARAMS)


@pytest.mark.parametrize("alias", ALIASES)
def test_no_params(alias):
    with raises(ValueError, "params are missing", "pass them to update"):
        update(alias(), params=None)


def test_grad_fn_returns_another_structure():
    with raises(ValueError, "grad_fn", "structure"):
        update(saner_jax.saner(), grad_fn=lambda w: {"w": w["w"]})
    with raises(ValueError, "grad_fn", "structure"):
        update(saner_jax.saner(), grad_fn=lambda w: None)


def test_grad_fn_returns_other_shapes():
    with raises(ValueError, "grad_fn", "shape", "['b']", "(2,)", "(3,)"):
        update(saner_jax.saner(), grad_fn=lambda w: {**cosine(w), "b": jnp.ones(3)})


def test_grad_fn_returns_another_dtype():
    with raises(TypeError, "grad_fn", "dtype", "['b']", "bfloat16", "float32"):
        update(saner_jax.saner(), grad_fn=lambda w: {**cosine(w), "b": w["b"].astype(jnp.bfloat16)})
    with raises(TypeError, "grad_fn", "floating-point", "int32"):
        update(saner_jax.saner(perturbed_dtype=jnp.float32), grad_fn=lambda w: {**cosine(w), "b": jnp.array([1, 2])})


@pytest.mark.parametrize("params", [PARAMS, PARAMS["w"], tuple(PARAMS.values())])
def test_grad_fn_returns_a_pair(params):
    def loss(w):
        return optax.tree.sum(jax.tree.map(jnp.sin, w))

    tx = saner_jax.saner()
    with raises(TypeError, "grad_fn returned a pair", "jax.grad"):
        tx.update(cosine(params), tx.init(params), params, grad_fn=jax.value_and_grad(loss))


def test_gradient_of_other_parameters():
    with raises(ValueError, "the gradient", "structure of params"):
        update(saner_jax.saner(), grads={"w": PARAMS["w"]})
    with raises(ValueError, "the gradient", "shapes of params"):
        update(saner_jax.saner(), grads={**PARAMS, "b": jnp.ones(3)})


@pytest.mark.parametrize("leaf", [jnp.array([1, 2]), np.array([True]), jnp.array([1j]), 3])
def test_parameters_that_are_not_real_floats(leaf):
    with raises(TypeError, "params", "floating-point", "['count']", "out of params"):
        saner_jax.saner().init({"w": jnp.ones(2), "count": leaf})


def test_masked_around_the_whole():
    tx = optax.masked(saner_jax.saner(), {"w": True, "b": False})
    with raises(ValueError, "params", "MaskedNode", "perturb_mask"):
        tx.init(PARAMS)
    with raises(ValueError, "params", "MaskedNode", "perturb_mask"):
        optax.partition({"a": saner_jax.saner(), "z": optax.sgd(0.1)}, {"w": "a", "b": "z"}).init(PARAMS)


# -- hyperparameters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [*ALIASES, saner_jax.scale_to_norm, saner_jax.scale_to_adaptive_norm])
@pytest.mark.parametrize("rho", [-0.1, -1, np.float32(-0.1), np.nan, np.inf])
def test_negative_rho(function, rho):
    with raises(ValueError, "rho", "at least 0", str(rho)):
        function(rho=rho)


@pytest.mark.parametrize("function", [saner_jax.fsam, saner_jax.subtract_ema])
@pytest.mark.parametrize("decay", [-0.1, 1, 1.5, np.nan])
def test_decay_outside_its_interval(function, decay):
    with raises(ValueError, "decay", "at least 0 and below 1", str(decay)):
        function(decay=decay)


@pytest.mark.parametrize("function", [saner_jax.vasso, saner_jax.follow_ema])
@pytest.mark.parametrize("theta", [0, -0.1, 1.5, np.nan])
def test_theta_outside_its_interval(function, theta):
    with raises(ValueError, "theta", "above 0 and at most 1", str(theta)):
        function(theta=theta)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda x: saner_jax.saner(alpha=x), "alpha"),
        (lambda x: saner_jax.gsam(alpha=x), "alpha"),
        (lambda x: saner_jax.downweight(x), "alpha"),
        (lambda x: saner_jax.downweight_random(x), "alpha"),
        (lambda x: saner_jax.fsam(sigma=x), "sigma"),
        (lambda x: saner_jax.asam(eta=x), "eta"),
        (lambda x: saner_jax.sam(rho=x), "rho"),
    ],
)
def test_hyperparameter_of_another_kind(make, name):
    with raises(ValueError, name, "number", "nan"):
        make(float("nan"))
    for value in ("0.1", None, [0.1]):
        with raises(TypeError, name, "number, a schedule or an array", repr(value)):
            make(value)
    tx = saner_jax.sharpness_aware(saner_jax.scale_to_norm(jnp.ones(2)))
    with raises(ValueError, "rho", "scalar", "(2,)"):
        tx.init(PARAMS)


def test_negative_eta():
    with raises(ValueError, "eta", "at least 0"):
        saner_jax.asam(eta=-0.01)


def test_schedules():
    with raises(ValueError, "steps", "positive", "0"):
        saner_jax.alpha_ramp(0.5, steps=0)
    with raises(ValueError, "steps_per_epoch", "positive", "-1"):
        saner_jax.alpha_ramp(0.5, steps=10, steps_per_epoch=-1)
    with raises(ValueError, "alpha", "finite"):
        saner_jax.alpha_ramp(float("inf"), steps=10)
    for steps in (None, "10", lambda step: 10, [10]):
        with raises(TypeError, "steps", "number"):
            saner_jax.alpha_ramp(0.5, steps)
    for alpha in (None, "0.5", lambda step: 0.5, optax.constant_schedule(0.5)):
        with raises(TypeError, "alpha", "number"):
            saner_jax.alpha_ramp(alpha, 10)
    with raises(ValueError, "steps", "positive"):
        saner_jax.alpha_ramp(0.5, np.nan)
    with raises(TypeError, "steps_per_epoch", "number"):
        saner_jax.alpha_ramp(0.5, 10, steps_per_epoch="5")
    for position in range(1, 5):
        arguments = [lambda step: 0.1, 0.0, 0.1, 0.01, 0.1]
        arguments[position] = "0.1"
        with raises(TypeError, ("lr_min", "lr_max", "rho_min", "rho_max")[position - 1], "number"):
            saner_jax.rho_from_learning_rate(*arguments)
    with raises(TypeError, "learning_rate", "schedule", "constant rho"):
        saner_jax.rho_from_learning_rate(0.1, 0.0, 0.1, 0.01, 0.1)
    with raises(ValueError, "lr_max", "exceed lr_min"):
        saner_jax.rho_from_learning_rate(lambda step: 0.1, 0.1, 0.1, 0.01, 0.1)
    with raises(ValueError, "rho_min", "at least 0"):
        saner_jax.rho_from_learning_rate(lambda step: 0.1, 0.0, 0.1, -0.01, 0.1)


# -- stages and masks --------------------------------------------------------------------------------------------------


def test_stages_that_are_none():
    with raises(TypeError, "ascent must be an Optax transformation"):
        saner_jax.sharpness_aware(0.1)
    with raises(TypeError, "descent stage 1 must be an Optax transformation"):
        saner_jax.sharpness_aware(saner_jax.scale_to_norm(0.1), saner_jax.downweight(0.5), 0.5)
    with raises(TypeError, "reweight must be a descent stage", "downweight(0.5)"):
        saner_jax.sam(reweight=0.5)


@pytest.mark.parametrize(
    "stage",
    [
        saner_jax.downweight(0.5),
        saner_jax.downweight_random(0.5),
        saner_jax.restore_downweighted(),
        saner_jax.subtract_orthogonal(0.5),
    ],
)
def test_descent_stage_outside_the_wrapper(stage):
    with raises(ValueError, "unperturbed_grads", "sharpness_aware"):
        stage.update(PARAMS, stage.init(PARAMS))


def test_group_of_elements_that_is_no_function():
    with raises(TypeError, "where", "function of h and g", "is_turned", "'grown'"):
        saner_jax.downweight(0.5, where="grown")


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_outside_its_interval(seed):
    with raises(ValueError, "seed", "at least 0", str(seed)):
        saner_jax.downweight_random(0.5, seed=seed)


@pytest.mark.parametrize("seed", [0.5, True, jnp.ones(())])
def test_seed_that_is_no_integer(seed):
    with raises(TypeError, "seed", "integer", repr(seed)):
        saner_jax.downweight_random(0.5, seed=seed)


def test_seed_that_is_no_number():
    for seed in ("1", None, [1, 2], jnp.arange(2)):
        with raises(TypeError, "seed", "integer"):
            saner_jax.downweight_random(0.5, seed=seed)


def test_adaptive_stage_without_params():
    stage = saner_jax.scale_to_adaptive_norm(0.5)
    with raises(ValueError, "scale_to_adaptive_norm", "pass params to update"):
        stage.update(PARAMS, stage.init(PARAMS))


def test_ascent_stage_that_changes_the_tree():
    tx = saner_jax.sharpness_aware(optax.stateless(lambda updates, params: updates["w"]))
    with raises(ValueError, "ascent stage", "structure of params"):
        update(tx)


@pytest.mark.parametrize(
    ("argument", "make"),
    [
        ("perturb_mask", lambda mask: saner_jax.sam(perturb_mask=mask)),
        ("adaptive_mask", lambda mask: saner_jax.asam(adaptive_mask=mask)),
        ("mask", lambda mask: saner_jax.sam(reweight=saner_jax.downweight(0.5, mask=mask))),
        ("mask", lambda mask: saner_jax.sam(reweight=saner_jax.downweight_random(0.5, mask=mask))),
        ("mask", lambda mask: saner_jax.sam(reweight=saner_jax.restore_downweighted(mask=mask))),
    ],
)
def test_masks(argument, make):
    for mask in ({"w": True}, {"w": True, "b": {"c": True}}, [True, False], lambda params: {"v": True}):
        with raises(ValueError, argument, "structure of params"):
            update(make(mask))
    for mask in ({"w": 1, "b": True}, {"w": jnp.array(True), "b": True}, lambda params: params):
        with raises(TypeError, argument, "bools"):
            update(make(mask))


LAYERS = {f"layer{i}": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)} for i in range(60)}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda tree: {k: v for k, v in tree.items() if k != "layer31"}, ["['layer31']", "missing"]),
        (lambda tree: {**tree, "layer5": {"kernel": tree["layer5"]["kernel"]}}, ["['layer5']['bias']", "missing"]),
        (lambda tree: {**tree, "extra": jnp.ones(2)}, ["['extra']", "not in it"]),
        (lambda tree: {**tree, "layer7": jnp.ones(2)}, ["['layer7']", "an array", "a dict"]),
        (lambda tree: {**tree, "layer7": None}, ["['layer7']", "a NoneType", "a dict"]),
        (lambda tree: list(tree.values()), ["(the tree itself)", "a list", "a dict"]),
    ],
)
def test_the_first_difference_of_large_trees_is_named(spoil, words):
    """In what grad_fn and stages return, and in the gradient; never a printed tree."""
    tx = saner_jax.saner()
    state, h = tx.init(LAYERS), spoil(cosine(LAYERS))
    stage = optax.stateless(lambda updates, params: h)
    descent = saner_jax.sam(reweight=stage)
    with raises(ValueError, "the gradient that grad_fn returns", "structure", *words) as info:
        tx.update(LAYERS, state, LAYERS, grad_fn=lambda w: h)
    assert len(str(info.value)) < 250
    with raises(ValueError, "the gradient must have the structure of params", *words):
        tx.update(h, state, LAYERS, grad_fn=cosine)
    with raises(ValueError, "what descent stage 0 returns", "structure", *words):
        descent.update(LAYERS, descent.init(LAYERS), LAYERS, grad_fn=cosine)


def test_what_a_stage_returns():
    for index, made in ((0, lambda u: u[None]), (1, lambda u: u[:, :1]), (1, lambda u: u[..., 0])):
        bad = optax.stateless(lambda updates, params, made=made: {**updates, "w": made(updates["w"])})
        stages = [optax.identity(), bad] if index else [bad, optax.identity()]
        with raises(ValueError, f"what descent stage {index} returns", "shape", "['w']", "(2, 2)"):
            update(saner_jax.sharpness_aware(saner_jax.scale_to_norm(0.1), *stages, monitor=True))
        with raises(ValueError, "what the ascent stage returns", "shape", "['w']", "(2, 2)"):
            update(saner_jax.sharpness_aware(bad))
    for leaf, words in (
        (jnp.arange(2), "int32"),
        ("b", "a str"),
        (jnp.cos, "a PjitFunction"),
        (jnp.ones(2) > 0, "bool"),
    ):
        bad = optax.stateless(lambda updates, params, leaf=leaf: {**updates, "b": leaf})
        with raises(TypeError, "floating-point", "['b']", words):
            update(saner_jax.sam(reweight=optax.chain(optax.scale(2.0), bad)))


@pytest.mark.parametrize(
    ("where", "kind", "words"),
    [
        (lambda h, g: h - g, TypeError, ["bools", "float32"]),
        (lambda h, g: True, ValueError, ["shape", "()"]),
        (lambda h, g: (h < g).ravel()[:1], ValueError, ["shape", "(1,)"]),
        (lambda h, g: None, ValueError, ["structure", "a NoneType"]),
        (lambda h, g: (h < g, h > g), ValueError, ["structure", "a tuple"]),
        (lambda h, g: (h < g).astype(int), TypeError, ["bools", "int32"]),
        (lambda h, g: "all", TypeError, ["bools", "a str"]),
    ],
)
def test_what_where_returns(where, kind, words):
    for stage in (
        saner_jax.downweight(0.5, where=where),
        optax.chain(saner_jax.downweight(0.5, mask={"w": False, "b": True}, where=where)),
    ):
        with raises(kind, "what where returns", *words):
            update(saner_jax.sam(reweight=stage))


@pytest.mark.parametrize("leaf", [jax.nn.relu, "relu", "float32", object(), jax.random.key(0), jnp.cos, [None, "x"]])
def test_leaves_that_are_no_arrays(leaf):
    with raises(TypeError, "params", "floating-point", "['layer']", "out of params"):
        saner_jax.saner().init({"layer": leaf, "w": jnp.ones(2)})


def test_states_of_other_methods():
    state = saner_jax.sam().init(PARAMS)
    foreign = [saner_jax.sam().init(PARAMS), saner_jax.gsam().init(PARAMS), saner_jax.saner(monitor=True).init(PARAMS)]
    foreign += [optax.adam(0.1).init(PARAMS), None, {}, (state,)]
    for state in foreign:
        with pytest.raises((TypeError, ValueError), match="the state") as info:
            saner_jax.saner().update(PARAMS, state, PARAMS, grad_fn=cosine)
        assert len(str(info.value)) < 250
    for make in (saner_jax.scale_to_adaptive_norm, saner_jax.scale_to_norm):
        other = saner_jax.downweight(0.5).init(PARAMS)
        with raises(TypeError, "the state given to", "DownweightState"):
            make(0.5).update(PARAMS, other, PARAMS)
    with raises(TypeError, "follow_ema", "SubtractEmaState"):
        saner_jax.follow_ema().update(PARAMS, saner_jax.subtract_ema().init(PARAMS), PARAMS)


METHOD = saner_jax.asam(0.1)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: saner_jax.gsam(reweight=METHOD), "descent stage 1"),
        (lambda: saner_jax.sharpness_aware(METHOD), "ascent"),
        (lambda: saner_jax.sharpness_aware(optax.chain(optax.clip(1.0), METHOD)), "ascent"),
        (
            lambda: saner_jax.sam(monitor=True, reweight=optax.chain(METHOD, saner_jax.downweight(0.5))),
            "descent stage 1",
        ),
        (lambda: saner_jax.sam(reweight=optax.named_chain(("a", optax.identity()), ("b", METHOD))), "descent stage 0"),
    ],
)
def test_methods_in_place_of_stages(make, name):
    with raises(ValueError, name, "second gradient itself", "stages such as"):
        make().init(PARAMS)


@pytest.mark.parametrize("jit", [False, True])
def test_two_methods_in_one_chain(jit):
    for chain in (
        optax.chain(saner_jax.sam(), saner_jax.saner(), optax.sgd(0.1)),
        optax.named_chain(("a", saner_jax.fsam()), ("b", saner_jax.gsam())),
    ):
        step = functools.partial(chain.update, grad_fn=cosine)
        with raises(ValueError, "first in a chain", "only once"):
            (jax.jit(step) if jit else step)(PARAMS, chain.init(PARAMS), PARAMS)


def test_two_methods_at_the_same_point_are_no_chain():
    """Nor is one method whose gradient happens to be what it returned before."""
    first, second = saner_jax.sam(), saner_jax.saner()
    grads = cosine(PARAMS)
    first.update(grads, first.init(PARAMS), PARAMS, grad_fn=cosine)
    second.update(grads, second.init(PARAMS), PARAMS, grad_fn=cosine)

    def same(w):
        return grads

    for _ in range(2):
        first.update(grads, first.init(PARAMS), PARAMS, grad_fn=same)


@pytest.mark.parametrize("alias", ALIASES)
def test_an_optimizer_in_place_of_hyperparameters(alias):
    """The call of other libraries, ``sam(optimizer, rho=...)``."""
    for call in (lambda: alias(optax.sgd(0.1), rho=0.05), lambda: alias(optax.adam(0.1))):
        with raises(TypeError, "hyperparameters, not an optimizer", "optax.chain", alias.__name__):
            call()


@pytest.mark.parametrize("value", [None, "0.1", [0.1], 1j, {"rho": 0.1}])
def test_schedules_that_return_no_number(value):
    for name, tx in {
        "rho": saner_jax.saner(rho=lambda step: value),
        "alpha": saner_jax.saner(alpha=lambda step: value),
        "theta": saner_jax.vasso(theta=lambda step: value),
        "eta": saner_jax.asam(eta=lambda step: value),
    }.items():
        with raises(TypeError, name, "its schedule returned"):
            tx.init(PARAMS)


@pytest.mark.parametrize("dtype", ["foo", "int32", jnp.int8, bool, "complex64", object, 3])
def test_perturbed_dtype_that_is_no_float(dtype):
    with raises(TypeError, "perturbed_dtype", "floating-point"):
        saner_jax.saner(perturbed_dtype=dtype)


@pytest.mark.parametrize("reuse", ["foo", "int32", jnp.int8, bool, "complex64", object, 3, 1, None])
def test_reuse_that_is_neither_a_bool_nor_a_float(reuse):
    with raises(TypeError, "reuse", "floating-point"):
        saner_jax.saner(reuse=reuse)


@pytest.mark.parametrize("reuse", [False, True])
def test_state_of_a_method_built_otherwise(reuse):
    state = saner_jax.saner(reuse=not reuse).init(PARAMS)
    words = ("without reuse", "with it") if reuse else ("with reuse", "without it")
    with raises(ValueError, *words, "init"):
        saner_jax.saner(reuse=reuse).update(cosine(PARAMS), state, PARAMS, grad_fn=cosine)


def test_two_methods_in_a_chain_without_a_second_gradient():
    tx = optax.chain(saner_jax.sam(reuse=True), saner_jax.saner(reuse=True))
    with raises(ValueError, "first in a chain"):
        tx.update(cosine(PARAMS), tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("axis_name", [0, 1, True, ("groups", 0), ["groups"]])
def test_axis_names_that_jax_would_take_for_positions(axis_name):
    with raises(TypeError, "axis_name", "name of a mapped axis"):
        saner_jax.saner(axis_name=axis_name)


def test_sentences_stay_short_whatever_is_passed():
    huge = {f"key{i}": jnp.ones((100, 100)) for i in range(200)}
    for call in (
        lambda: saner_jax.sam(rho=huge),
        lambda: saner_jax.sam(reweight=huge),
        lambda: saner_jax.sharpness_aware(huge),
        lambda: saner_jax.downweight(0.5, where=huge),
        lambda: saner_jax.downweight_random(0.5, seed=huge),
        lambda: saner_jax.alpha_ramp(huge, 10),
        lambda: saner_jax.rho_from_learning_rate(huge, 0.0, 0.1, 0.0, 0.1),
        lambda: update(saner_jax.sam(perturb_mask=huge)),
        lambda: saner_jax.value_and_grads(huge),
    ):
        with pytest.raises(TypeError) as info:
            call()
        assert len(str(info.value)) < 300 and "\n" not in str(info.value)


# -- axes --------------------------------------------------------------------------------------------------------------


def test_axis_name_that_is_not_bound():
    with raises(ValueError, "axis_name='data'", "not bound", "jax.vmap"):
        update(saner_jax.saner(axis_name="data"))


@pytest.mark.parametrize("which", ["g", "h"])
def test_gradient_that_does_not_vary_over_the_axis(which):
    """Inside shard_map such a gradient was already summed over the devices, without notice."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    tx = saner_jax.saner(axis_name="data")

    def step(x):
        def per_device(tree):
            return jax.tree.map(lambda leaf: jnp.cos(leaf) * x[0], tree)

        summed = jax.lax.psum(per_device(PARAMS), "data")
        grads = summed if which == "g" else per_device(PARAMS)
        grad_fn = per_device if which == "g" else lambda w: summed
        return tx.update(grads, tx.init(PARAMS), PARAMS, grad_fn=grad_fn)[0]

    what = "the gradient does not vary" if which == "g" else "grad_fn returns does not vary"
    with raises(ValueError, what, "axis_name='data'", "jax.lax.pcast"):
        jax.eval_shape(jax.shard_map(step, mesh=mesh, in_specs=P("data"), out_specs=P()), jnp.ones(2))


# -- not mistakes ------------------------------------------------------------------------------------------------------


def test_what_is_right_raises_nothing():
    update(saner_jax.saner(rho=0, alpha=-0.5))
    update(saner_jax.saner(rho=0.0, alpha=2.0))
    update(saner_jax.vasso(theta=1))
    update(saner_jax.fsam(decay=0, sigma=-1))
    update(saner_jax.asam(eta=0))
    update(saner_jax.sam(), grads=jax.tree.map(jnp.zeros_like, PARAMS))
    update(saner_jax.sam(perturb_mask=True))
    update(saner_jax.sam(perturb_mask=np.bool_(False)))
    jax.eval_shape(functools.partial(saner_jax.scale_to_norm(jnp.array(-1.0)).init), PARAMS)  # arrays pass unseen


# -- analysis ----------------------------------------------------------------------------------------------------------

MASK = jax.tree.map(lambda p: p > 0, PARAMS)


@pytest.mark.parametrize("function", [saner_jax.analysis.ratio_shares, saner_jax.analysis.downweighted])
def test_pairs_of_gradients_that_are_none(function):
    with raises(ValueError, "h must have the structure of g"):
        function(PARAMS, {"w": PARAMS["w"]})
    with raises(ValueError, "h must have the shapes of g", "['b']"):
        function(PARAMS, {**PARAMS, "b": jnp.ones(3)})
    with raises(TypeError, "g must be floating-point", "['b']", "int32"):
        function({**PARAMS, "b": jnp.array([1, 2])}, PARAMS)


def test_alignment_of_what_does_not_fit():
    alignment = saner_jax.analysis.alignment
    with raises(ValueError, "reference must have the shapes of grads", "['b']"):
        alignment(PARAMS, MASK, {**PARAMS, "b": jnp.ones(3)})
    with raises(ValueError, "mask must have the structure of grads"):
        alignment(PARAMS, {"w": MASK["w"]}, PARAMS)
    with raises(ValueError, "mask must have the shapes of grads", "['b']"):
        alignment(PARAMS, {**MASK, "b": jnp.array(True)}, PARAMS)
    with raises(TypeError, "mask must hold arrays of bools", "float32"):
        alignment(PARAMS, PARAMS, PARAMS)
    with raises(TypeError, "mask must hold arrays of bools", "float32"):
        saner_jax.analysis.random_like(jax.random.key(0), PARAMS)
