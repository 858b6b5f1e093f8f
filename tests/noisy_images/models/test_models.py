"""Networks: parameter counts, conventions, the trainer's split and merge, and parity with PyTorch."""

import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.noisy_images import models
from examples.noisy_images.errors import UserError
from examples.noisy_images.models import layers
from tests.noisy_images.models.torch_parity import formula

CIFAR = (32, 32, 3)
TINY = {"image_shape": (8, 8, 1), "width": 0.25}
STORED = pathlib.Path(__file__).parent / "torch_parity" / "stored.npz"


def create(name, *, num_classes=10, image_shape=CIFAR, seed=0, **options):
    return models.create(name, num_classes=num_classes, image_shape=image_shape, seed=seed, **options)


def abstract(name, **options):
    """Return the network with shapes in place of arrays."""
    return nnx.eval_shape(lambda: create(name, **options))


@functools.partial(jax.jit, static_argnums=(0, 4))
def _apply(graphdef, state, x, key, train):
    model = nnx.merge(graphdef, state, copy=True)
    logits = model(x, train=train, rngs=None if key is None else nnx.Rngs(dropout=key))
    return logits, nnx.state(model, nnx.BatchStat)


def apply(model, x, *, train, key=None):
    """Return logits and the statistics after the pass; the model itself is left as it was."""
    return _apply(*nnx.split(model), x, key, train)


def types(state):
    return {path: (leaf.shape, leaf.dtype) for path, leaf in leaves(state).items()}


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def size(state):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))


def leaves(state):
    """Return (dotted path, array or shape) of every variable."""
    flat, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
    return {".".join(str(key.key) for key in path): leaf for path, leaf in flat}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ten", "hundred", "sides"),
    [
        ("linear", 3073 * 10, None, None),
        ("mlp", 3073 * 512 + 513 * 512 + 513 * 10, None, None),
        ("small_cnn", 9 * (96 + 2048 + 8192 + 32768) + 2 * (32 + 64 + 128 + 256) + 257 * 10, None, (32, 4)),
        ("resnet18", 11_173_962, 11_220_132, (32, 4)),
        ("resnet34", 21_282_122, 21_328_292, (32, 4)),
        ("resnet18_imagenet", 11_689_512 - 513 * 990, None, (112, 7)),  # torchvision's resnet18 has 1000 classes
        ("densenet121", 6_956_298, 7_048_548, (32, 4)),
        ("wrn_40_2", 2_243_546, 2_255_156, (32, 8)),
        ("wrn_28_10", 36_479_194, 36_536_884, (32, 8)),
    ],
)
def test_counts_shapes_and_dtypes_of_every_entry(name, ten, hundred, sides):
    """The papers' parameter counts, the sides that the first and the last convolution hand on, and all dtypes."""
    image_shape = (224, 224, 3) if name == "resnet18_imagenet" else CIFAR
    # JAX's own convolutions, which stand in the traced program by their name.
    model = abstract(name, image_shape=image_shape, dropout=0.1, dtype="bfloat16", convolution="xla")
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    assert size(params) == ten
    if hundred:
        classifier = leaves(params)["classifier.kernel"]
        assert size(params) + 90 * (classifier.shape[0] + 1) == hundred
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((params, stats)))

    def call(params, stats, x, key):
        model = nnx.merge(graphdef, params, stats, copy=True)
        logits = model(x, train=True, rngs=nnx.Rngs(dropout=key))
        return logits, nnx.state(model, nnx.BatchStat)

    x = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    jaxpr, (logits, after) = jax.make_jaxpr(call, return_shape=True)(params, stats, x, jax.random.key(0))
    assert (logits.shape, logits.dtype) == ((2, 10), jnp.float32)
    assert types(after) == types(stats)
    convolutions = [eqn.outvars[0].aval for eqn in jaxpr.eqns if eqn.primitive.name == "conv_general_dilated"]
    assert all(out.dtype == jnp.bfloat16 for out in convolutions)
    if sides:
        assert (convolutions[0].shape[1], convolutions[-1].shape[1]) == sides


def test_every_entry_is_tested():
    (mark,) = (m for m in test_counts_shapes_and_dtypes_of_every_entry.pytestmark if m.name == "parametrize")
    assert {name for name, *_ in mark.args[1]} == set(models.MODELS)


def test_number_of_classes_changes_the_classifier_alone():
    ten, hundred = (leaves(nnx.state(abstract("resnet18", num_classes=n), nnx.Param)) for n in (10, 100))
    assert {path for path in ten if ten[path].shape != hundred[path].shape} == {"classifier.kernel", "classifier.bias"}
    assert size(hundred) == 11_220_132


def test_width_scales_channels():
    for width, channels in ((0.25, 16), (1.5, 96), (2.0, 128)):
        parameters = leaves(nnx.state(abstract("resnet18", width=width), nnx.Param))
        assert parameters["conv.kernel"].shape == (3, 3, 3, channels)
        assert parameters["classifier.kernel"].shape == (8 * channels, 10)


def step_of(graphdef):
    """Return the trainer's pattern: the loss's gradient, and the statistics of the pass, inside one jitted call."""

    @jax.jit
    def step(params, stats, x, labels, key):
        def loss(params):
            model = nnx.merge(graphdef, params, stats, copy=True)
            logits = model(x, train=True, rngs=nnx.Rngs(dropout=key))
            new_stats = nnx.state(model, nnx.BatchStat)
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
            return -jnp.mean(picked), new_stats

        (value, new_stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, jax.tree.map(lambda w, g: w - 0.1 * g, params, grads), new_stats

    return step


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", {"dtype": "bfloat16", **TINY}),
        ("mlp", {"dropout": 0.2, "dtype": "bfloat16", **TINY}),
        ("small_cnn", TINY),
    ],
)
def test_training_step_with_split_and_merge(name, options):
    model = create(name, **options)
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    step = step_of(graphdef)
    x = normal(16, *options["image_shape"])
    labels = jnp.arange(16) % 10
    losses = []
    for i in range(8):
        before = (jax.tree.structure((params, stats)), [leaf.dtype for leaf in jax.tree.leaves((params, stats))])
        loss, params, stats = step(params, stats, x, labels, jax.random.key(i))
        after = (jax.tree.structure((params, stats)), [leaf.dtype for leaf in jax.tree.leaves((params, stats))])
        assert before == after
        losses.append(float(loss))
    assert step._cache_size() == 1
    assert losses[-1] < losses[0]
    # The module that was split is untouched, and equal networks of other seeds share the compiled step.
    assert all(np.all(mean == 0) for path, mean in leaves(nnx.state(model, nnx.BatchStat)).items() if "mean" in path)
    assert nnx.split(create(name, seed=1, **options), nnx.Param, nnx.BatchStat)[0] == graphdef


def test_statistics_move_only_in_training_mode():
    model = create("small_cnn", batch_norm_momentum=0.75, **TINY)
    x = normal(4, 8, 8, 1)
    before = leaves(nnx.state(model, nnx.BatchStat))
    evaluated, same = apply(model, x, train=False)
    jax.tree.map(np.testing.assert_array_equal, before, leaves(same))

    trained, after = apply(model, x, train=True)
    after = leaves(after)
    assert not np.allclose(evaluated, trained)
    y = np.asarray(model.convs[0](x))
    np.testing.assert_allclose(after["norms.0.mean"], 0.25 * y.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(after["norms.0.var"], 0.75 + 0.25 * y.var((0, 1, 2)), rtol=1e-4)


def test_running_statistics_move_without_a_search_through_the_trace(monkeypatch):
    asked = []
    norm = layers.BatchNorm(2, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(norm)

    def step(state, x):
        owner = next(kind for kind in type(x).__mro__ if "sharding" in vars(kind))
        # Where JAX would search all that was traced, for the message of the error that it raises.
        monkeypatch.setattr(owner, "sharding", property(lambda _: asked.append(1)))
        norm = nnx.merge(graphdef, state, copy=True)
        norm(x, train=True)
        monkeypatch.undo()
        return nnx.state(norm, nnx.BatchStat)

    x = jnp.arange(8.0).reshape(4, 2)
    moved = jax.jit(step)(state, x)
    assert not asked
    np.testing.assert_allclose(moved["mean"][...], 0.01 * x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(moved["var"][...], 0.99 + 0.01 * x.var(0), rtol=1e-6)
    norm.mean[0] = 3.0
    assert norm.mean[...].tolist() == [3.0, 0.0] and isinstance(norm.mean, nnx.BatchStat)


def test_batch_norm_epsilon():
    model = create("small_cnn", batch_norm_epsilon=3.0, **TINY)
    assert float(model.norms[0](jnp.ones((1, 1, 1, 8)), train=False)[0, 0, 0, 0]) == pytest.approx(0.5)


def test_bfloat16_computes_close_to_float32_and_keeps_statistics_in_float32():
    x = normal(4, 8, 8, 1)
    full, half = create("small_cnn", **TINY), create("small_cnn", dtype="bfloat16", **TINY)
    assert half.convs[0](x).dtype == half.norms[0](half.convs[0](x), train=False).dtype == jnp.bfloat16
    (expected, _), (logits, stats) = apply(full, x, train=True), apply(half, x, train=True)
    assert logits.dtype == jnp.float32
    assert not np.array_equal(expected, logits)
    np.testing.assert_allclose(logits, expected, atol=0.05 * float(jnp.abs(expected).max()))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((stats, nnx.state(half, nnx.Param))))


def test_padding():
    x = normal(2, 8, 8, 1)
    torch, same = (create("small_cnn", padding=padding, **TINY) for padding in ("torch", "same"))
    np.testing.assert_array_equal(torch.convs[0](x), same.convs[0](x))  # stride 1: the same padding
    # With stride 2 on even sides SAME pads only the bottom and the right, and so sees what "torch" sees of the image
    # shifted by one to the top left.
    y = torch.convs[0](x)
    shifted = jnp.pad(y[:, 1:, 1:], ((0, 0), (0, 1), (0, 1), (0, 0)))
    ours, theirs = torch.convs[1](y), same.convs[1](y)
    assert ours.shape == theirs.shape == (2, 4, 4, 16)
    assert not np.allclose(ours, theirs, atol=1e-3)
    np.testing.assert_allclose(torch.convs[1](shifted)[:, 1:, 1:], theirs[:, 1:, 1:], atol=1e-5)


def test_torch_initialisation():
    resnet = leaves(nnx.state(create("resnet18", width=0.5)))
    assert resnet["blocks.2.conv1.kernel"].shape == (3, 3, 32, 64)
    assert np.std(resnet["blocks.2.conv1.kernel"]) == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.03)  # fan-out
    np.testing.assert_array_equal(resnet["norm.scale"], 1)
    assert 0.8 / 16 < np.abs(resnet["classifier.bias"]).max() <= 1 / 16  # fan-in 256
    # Every parameter has a key of its own.
    assert abs(np.corrcoef(*(np.ravel(resnet[f"blocks.{i}.conv1.kernel"]) for i in (0, 1)))[0, 1]) < 0.05

    wide = leaves(nnx.state(create("wrn_40_2", width=0.5)))
    assert wide["blocks.6.conv1.kernel"].shape == (3, 3, 16, 32)
    assert np.std(wide["blocks.6.conv1.kernel"]) == pytest.approx(math.sqrt(2 / (9 * 16)), rel=0.03)  # fan-in
    scales = np.concatenate([scale for path, scale in wide.items() if path.endswith("scale")])
    assert scales.min() >= 0 and scales.max() < 1
    assert scales.mean() == pytest.approx(0.5, abs=0.05) and scales.std() == pytest.approx(math.sqrt(1 / 12), rel=0.1)
    assert all(np.all(bias == 0) for path, bias in wide.items() if "norm" in path and path.endswith("bias"))

    mlp = leaves(nnx.state(create("mlp", image_shape=(8, 8, 1))))
    for path, bound in (("hidden1", 1 / 8), ("hidden2", 1 / math.sqrt(512)), ("classifier", 1 / math.sqrt(512))):
        for kind in ("kernel", "bias"):
            values = np.asarray(mlp[f"{path}.{kind}"])
            assert 0.7 * bound < np.abs(values).max() <= bound
        assert np.std(mlp[f"{path}.kernel"]) == pytest.approx(bound / math.sqrt(3), rel=0.03)


def test_densenet_torch_initialisation_is_pytorchs_default():
    assert models.MODELS["densenet121"].torch_initialisation is layers.TORCH_DEFAULT
    kernel = layers.TORCH_DEFAULT.convolution(jax.random.key(0), (3, 3, 128, 32), jnp.float32)
    bound = 1 / math.sqrt(9 * 128)
    assert 0.999 * bound < np.abs(kernel).max() <= bound
    assert np.std(kernel) == pytest.approx(bound / math.sqrt(3), rel=0.01)


def test_flax_initialisation():
    mlp = leaves(jax.jit(lambda: nnx.state(create("mlp", initialisation="flax", **TINY)))())
    for layer, fan_in in (("hidden1", 64), ("hidden2", 128)):
        assert np.std(mlp[f"{layer}.kernel"]) == pytest.approx(1 / math.sqrt(fan_in), rel=0.05)
        np.testing.assert_array_equal(mlp[f"{layer}.bias"], 0)


def test_seed_decides_the_parameters():
    one, again, other = (leaves(nnx.state(create("mlp", image_shape=(8, 8, 1), seed=s))) for s in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    jitted = leaves(jax.jit(lambda: nnx.state(create("mlp", image_shape=(8, 8, 1), seed=3)))())
    jax.tree.map(np.testing.assert_array_equal, one, jitted)
    assert not np.array_equal(one["hidden1.kernel"], other["hidden1.kernel"])


def test_dropout_follows_its_key():
    model = create("mlp", dropout=0.5, **TINY)
    x = normal(4, 8, 8, 1)
    one, again, other = (apply(model, x, train=True, key=jax.random.key(key))[0] for key in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(apply(model, x, train=False)[0], apply(create("mlp", **TINY), x, train=False)[0])
    with pytest.raises(ValueError, match="rngs"):
        model(x, train=True)


def test_errors_name_what_exists():
    with pytest.raises(UserError, match=r"unknown model 'resnet_18': did you mean 'resnet18'.*densenet121.*wrn_40_2"):
        create("resnet_18")
    for options in (
        {"padding": "valid"},
        {"initialisation": "he"},
        {"dtype": "float16"},
        {"width": 0.0},
        {"width": float("nan")},
        {"width": 1e-6},
        {"dropout": 1.0},
        {"batch_norm_momentum": 1.5},
        {"batch_norm_epsilon": 0.0},
    ):
        with pytest.raises(UserError, match=str(next(iter(options.values())))):
            create("small_cnn", **options)
    with pytest.raises(UserError, match="4x4 are too small"):
        create("densenet121", image_shape=(4, 4, 3))


def torch_name(path):
    """Return PyTorch's name of a variable: the modules are named alike, their tensors are not."""
    module, _, kind = path.rpartition(".")
    names = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    return f"{module}.{names[kind]}"


def torch_layout(array):
    """Reorder HWIO to OIHW, (in, out) to (out, in)."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def flax_layout(array):
    """Reorder OIHW to HWIO, (out, in) to (in, out)."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def with_formula_weights(name):
    """Return graphdef, parameters and statistics of a network whose every variable comes from the formula."""
    graphdef, state = nnx.split(abstract(name))

    def value(path, leaf):
        shape = (leaf.shape[3], leaf.shape[2], *leaf.shape[:2]) if len(leaf.shape) == 4 else leaf.shape[::-1]
        return jnp.asarray(flax_layout(formula.tensor(torch_name(path), shape)))

    values = [value(path, leaf) for path, leaf in leaves(state).items()]
    model = nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), values))
    return nnx.split(model, nnx.Param, nnx.BatchStat)


def by_torch_name(state):
    return {torch_name(path): np.asarray(leaf) for path, leaf in leaves(state).items()}


def agree(actual, expected, tolerance, largest=None):
    """Assert that the largest difference is within a tolerance, relative to the largest entry."""
    assert np.abs(actual - expected).max() <= tolerance * (np.abs(expected).max() if largest is None else largest)


@pytest.mark.parametrize("name", ["resnet18", "wrn_40_2"])
def test_parity_with_pytorch(name):
    """Outputs, statistics and gradients are those of PyTorch, which computed them in float64 from the same weights."""
    stored = {key.removeprefix(f"{name}/"): value for key, value in np.load(STORED).items() if key.startswith(name)}
    graphdef, params, stats = with_formula_weights(name)
    # Without optimisation XLA compiles these in half the time.
    jit = functools.partial(jax.jit, static_argnames="train", compiler_options={"xla_backend_optimization_level": 0})

    def loss_of(params, images, labels, train):
        model = nnx.merge(graphdef, params, stats, copy=True)
        logits = model(images, train=train)
        loss = -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1))
        return loss, (logits, nnx.state(model, nnx.BatchStat))

    images, labels = formula.images("images", 4, 32), formula.labels(4)
    _, (evaluated, _) = jit(loss_of)(params, images, labels, train=False)
    loss, (logits, moved) = jit(loss_of)(params, images, labels, train=True)
    agree(evaluated, stored["evaluation_logits"], 1e-4)
    agree(logits, stored["training_logits"], 1e-4)
    assert float(loss) == pytest.approx(float(stored["loss"]), rel=1e-4)

    moved = by_torch_name(moved)
    block, side = {"resnet18": ("blocks.7.norm2", 4), "wrn_40_2": ("blocks.17.norm2", 8)}[name]
    agree(moved[f"{block}.running_mean"], stored["running_mean"], 1e-4)
    # PyTorch's running variance takes in n / (n - 1) times the variance that Flax's takes in.
    n = 4 * side**2
    kept = 0.9 * formula.tensor(f"{block}.running_var", stored["running_var"].shape)
    agree(kept + (moved[f"{block}.running_var"] - kept) * n / (n - 1), stored["running_var"], 1e-4)

    images, labels = formula.images(str(stored["gradient_images"]), 2, 16), formula.labels(2)
    gradients, _ = jit(jax.grad(loss_of, has_aux=True))(params, images, labels, train=True)
    gradients = by_torch_name(gradients)
    assert set(gradients) == set(stored["gradient_names"])
    norms = np.array([np.linalg.norm(gradients[key]) for key in stored["gradient_names"]])
    np.testing.assert_allclose(norms, stored["gradient_norms"], rtol=1e-4)
    sampled = [key.removeprefix("gradient/") for key in stored if key.startswith("gradient/")]
    assert len(sampled) == 10
    for key in sampled:
        values = torch_layout(gradients[key]).reshape(-1)
        values = values[formula.sample_positions(key, values.size)]
        agree(values, stored[f"gradient/{key}"], 1e-4, largest=stored[f"gradient_max/{key}"])
