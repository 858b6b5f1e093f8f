"""Label noise: counts, distributions, what is excluded, and the audit.

The chi-square bounds are the 1 - 1e-6 quantiles by the Wilson-Hilferty approximation: a correct noise would fail such a
test with probability one in a million over seeds, and the seeds here are fixed.
"""

import json
import statistics

import numpy as np
import pytest

from examples.noisy_images import files
from examples.noisy_images.errors import UserError
from examples.noisy_images.labels import noise
from examples.noisy_images.labels.noise import NoiseOptions, audit, corrupt

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
RAW = {"mean": (0.0,), "std": (1 / 255,)}
FALSE_ALARM = 1e-6


def balanced(per_class, num_classes=10):
    return np.random.default_rng(0).permutation(np.repeat(np.arange(num_classes, dtype=np.int32), per_class))


def pictures(count, seed=0, size=8):
    """Return images of varied brightness and colour, uint8, as photographs have and white noise has not."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(120, 50, (count, 1, 1, 3)) + np.kron(rng.normal(0, 40, (count, 2, 2, 3)), np.ones((1, 4, 4, 1)))
    return np.clip(coarse + rng.normal(0, 15, (count, size, size, 3)), 0, 255).astype(np.uint8)


def chi_square_bound(degrees):
    z = statistics.NormalDist().inv_cdf(1 - FALSE_ALARM)
    return degrees * (1 - 2 / (9 * degrees) + z * (2 / (9 * degrees)) ** 0.5) ** 3


def chi_square(observed, expected):
    """Return the statistic over the cells that can occur; nothing may be in the others."""
    possible = expected > 0
    assert not observed[~possible].any()
    return ((observed - expected)[possible] ** 2 / expected[possible]).sum()


def names(count):
    return tuple(f"class {index}" for index in range(count))


# ---- counts and distributions


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.29, 0.5, 1.0])
def test_symmetric_changes_an_exact_count(rate):
    labels = balanced(97)
    noisy = corrupt(labels, kind="symmetric", rate=rate, num_classes=10, seed=1)
    assert (noisy != labels).sum() == int(rate * len(labels))
    assert noisy.dtype == np.int32 and noisy.min() >= 0 and noisy.max() < 10


def test_symmetric_targets_are_uniform_over_the_other_classes():
    labels = balanced(4000)
    noisy = corrupt(labels, kind="symmetric", rate=1.0, num_classes=10, seed=2)
    counts = audit(noisy, labels, CIFAR10, 1.0, "symmetric").counts
    expected = np.full((10, 10), 4000 / 9) * (1 - np.eye(10))
    assert chi_square(counts, expected) < chi_square_bound(10 * 8)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_bernoulli_transitions_meet_their_expectation(kind):
    labels = balanced(4000)
    options = NoiseOptions(symmetric_count="bernoulli", asymmetric_count="bernoulli")
    noisy = corrupt(labels, kind=kind, rate=0.4, num_classes=10, seed=3, class_names=CIFAR10, options=options)
    counts = audit(noisy, labels, CIFAR10, 0.4, kind).counts
    if kind == "symmetric":
        expected = 4000 * (np.full((10, 10), 0.4 / 9) * (1 - np.eye(10)) + 0.6 * np.eye(10))
        degrees = 10 * 9
    else:
        expected = 4000 * np.eye(10)
        for source, target in noise.RELEASED_PAIRS.items():
            row, column = CIFAR10.index(source), CIFAR10.index(target)
            expected[row, row], expected[row, column] = 4000 * 0.6, 4000 * 0.4
        degrees = len(noise.RELEASED_PAIRS)
    assert chi_square(counts, expected) < chi_square_bound(degrees)
    assert (noisy != labels).sum() != int(0.4 * len(labels))


def test_a_lower_rate_relabels_a_subset():
    labels = balanced(100)
    low, high = (corrupt(labels, kind="symmetric", rate=rate, num_classes=10, seed=0) for rate in (0.25, 0.5))
    assert np.array_equal(low[low != labels], high[low != labels])


def test_asymmetric_as_released_reaches_half_of_the_nominal_rate():
    labels = balanced(5000)
    noisy = corrupt(labels, kind="asymmetric", rate=0.25, num_classes=10, seed=0, class_names=CIFAR10)
    report = audit(noisy, labels, CIFAR10, 0.25, "asymmetric")
    # Hypergeometric with standard deviation 48 of 50,000: five of them.
    assert abs(report.actual_rate - 0.125) < 0.005
    changed = {
        (CIFAR10[row], CIFAR10[column]) for row, column in zip(*np.nonzero(report.counts), strict=True) if row != column
    }
    assert changed == set(noise.RELEASED_PAIRS.items())


def test_asymmetric_of_the_literature_goes_one_way_at_the_rate_of_the_affected_classes():
    labels = balanced(1000)
    options = NoiseOptions(asymmetric_targets="one_way_pairs", asymmetric_picks="affected")
    noisy = corrupt(labels, kind="asymmetric", rate=0.4, num_classes=10, seed=0, class_names=CIFAR10, options=options)
    report = audit(noisy, labels, CIFAR10, 0.4, "asymmetric")
    affected = [CIFAR10.index(name) for name in noise.ONE_WAY_PAIRS]
    assert report.count == int(0.4 * 4 * 1000)
    assert np.abs(report.rate_per_class[affected] - 0.4).max() < 0.08
    assert report.rate_per_class[CIFAR10.index("dog")] == 0


def test_pairs_go_by_name_and_not_by_position():
    shuffled = tuple(np.random.default_rng(5).permutation(CIFAR10))
    labels = balanced(50)
    noisy = corrupt(labels, kind="asymmetric", rate=1.0, num_classes=10, seed=0, class_names=shuffled)
    for index, name in enumerate(shuffled):
        assert {shuffled[label] for label in noisy[labels == index]} == {noise.RELEASED_PAIRS.get(name, name)}


def test_asymmetric_goes_to_the_next_class_elsewhere():
    labels = balanced(20, 7)
    noisy = corrupt(labels, kind="asymmetric", rate=0.5, num_classes=7, seed=0, class_names=names(7))
    changed = noisy != labels
    assert changed.sum() == 70
    assert np.array_equal(noisy[changed], (labels[changed] + 1) % 7)


def test_asymmetric_stays_in_the_superclass():
    superclasses = np.array([0, 1, 0, 1, 0, 2])
    options = NoiseOptions(asymmetric_targets="next_in_superclass")
    labels = balanced(10, 6)
    noisy = corrupt(
        labels, kind="asymmetric", rate=1.0, num_classes=6, seed=0, superclasses=superclasses, options=options
    )
    assert np.array_equal(noisy, np.array([2, 3, 4, 1, 0, 5])[labels])


def test_instance_changes_an_exact_count_and_never_to_the_true_class():
    labels = balanced(60)
    noisy = corrupt(labels, kind="instance", rate=1.0, num_classes=10, seed=0, images=pictures(600), mean=MEAN, std=STD)
    assert (noisy != labels).all()
    noisy = corrupt(
        labels, kind="instance", rate=0.37, num_classes=10, seed=0, images=pictures(600), mean=MEAN, std=STD
    )
    assert (noisy != labels).sum() == 222


def test_instance_targets_are_drawn_from_the_softmax():
    # A standard deviation ten times as large gives scores of order one, so that the softmax has more than one target.
    image = pictures(1)
    labels = np.full(20000, 4, np.int32)
    images = np.repeat(image, len(labels), axis=0)
    scale = {"mean": MEAN, "std": np.multiply(STD, 10)}
    noisy = corrupt(labels, kind="instance", rate=1.0, num_classes=10, seed=0, images=images, **scale)
    weights = noise._Streams(0, "instance")(noise._TARGETS, 4).standard_normal((8 * 8 * 3, 10))
    scores = ((image.astype(np.float64) / 255 - MEAN) / scale["std"]).reshape(-1) @ weights
    scores[4] = -np.inf
    softmax = np.exp(scores - scores.max())
    softmax /= softmax.sum()
    # Rare classes are put together, as the chi-square test asks for five or more expected in a cell.
    common = softmax * len(labels) >= 5
    observed, expected = np.bincount(noisy, minlength=10).astype(float), softmax * len(labels)
    assert observed[4] == 0 and 3 <= common.sum()
    observed = np.append(observed[common], observed[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    assert ((observed - expected) ** 2 / np.maximum(expected, 1)).sum() < chi_square_bound(common.sum())


def test_pdn_probabilities_and_rate():
    for rate in (0.1, 0.5):
        values = noise._truncated_normal(rate, 0.1, 200_000, np.random.default_rng(0))
        assert values.min() >= 0 and values.max() <= 1
        # The moments of a normal truncated at zero (the other end is five deviations away or more).
        normal = statistics.NormalDist()
        low = -rate / 0.1
        ratio = normal.pdf(low) / (1 - normal.cdf(low))
        assert abs(values.mean() - (rate + 0.1 * ratio)) < 1.2e-3
        assert abs(values.std() - 0.1 * (1 + low * ratio - ratio**2) ** 0.5) < 1e-3
    labels = balanced(400)
    common = {"kind": "instance", "num_classes": 10, "images": pictures(4000), "mean": MEAN, "std": STD}
    options = NoiseOptions(instance_count="pdn")
    flipped = corrupt(labels, rate=0.5, seed=0, options=options, **common) != labels
    # Binomial with standard deviation 0.0079: five of them; and not the exact count.
    assert abs(flipped.mean() - 0.5) < 0.04 and flipped.sum() != 2000
    assert np.array_equal(corrupt(labels, rate=0.0, seed=0, options=options, **common), labels)


# ---- the dependence of instance noise on its input


def instance(labels, images, seed=0, mean=MEAN, std=STD, num_classes=10):
    return corrupt(
        labels, kind="instance", rate=1.0, num_classes=num_classes, seed=seed, images=images, mean=mean, std=std
    )


def test_identical_images_of_a_class_share_their_few_targets():
    labels = balanced(100)
    same = np.repeat(pictures(1), len(labels), axis=0)
    alike = audit(instance(labels, same), labels, CIFAR10, 1.0, "instance").effective_targets_per_class
    varied = audit(instance(labels, pictures(1000)), labels, CIFAR10, 1.0, "instance").effective_targets_per_class
    uniform = corrupt(labels, kind="symmetric", rate=1.0, num_classes=10, seed=0)
    uniform = audit(uniform, labels, CIFAR10, 1.0, "symmetric").effective_targets_per_class
    assert alike.mean() < 2 < 4 < varied.mean() < uniform.mean()
    assert uniform.min() > 8


def test_the_target_follows_the_image_and_not_the_position():
    # The same ten pictures again and again, in another order: the repeats of a picture mostly agree on its target.
    rng = np.random.default_rng(1)
    which = rng.integers(0, 10, 1000)
    noisy = instance(np.zeros(1000, np.int32), pictures(10)[which])
    agreement = [np.bincount(noisy[which == index]).max() / (which == index).sum() for index in range(10)]
    assert np.mean(agreement) > 0.75  # Targets drawn without a look at the image would agree to about 0.2.
    assert len(np.unique(noisy)) > 2


def test_permuting_the_pixels_changes_targets():
    labels, images = balanced(50), pictures(500)
    order = np.random.default_rng(2).permutation(8 * 8 * 3)
    permuted = images.reshape(500, -1)[:, order].reshape(images.shape)
    assert (instance(labels, images) != instance(labels, permuted)).mean() > 0.5


def test_every_true_class_has_a_matrix_of_its_own():
    images = pictures(300)
    noisy = [instance(np.full(300, label, np.int32), images) for label in (0, 1)]
    assert (noisy[0] != noisy[1]).mean() > 0.5


def test_raw_pixels_collapse_to_few_targets():
    labels, images = balanced(300), pictures(3000)
    normalised = audit(instance(labels, images), labels, CIFAR10, 1.0, "instance").effective_targets_per_class.mean()
    raw = audit(instance(labels, images, **RAW), labels, CIFAR10, 1.0, "instance").effective_targets_per_class.mean()
    assert raw < 4.5 < 6 < normalised


def test_chunks_do_not_matter(monkeypatch):
    labels, images = balanced(30), pictures(300)
    whole = instance(labels, images)
    monkeypatch.setattr(noise, "_CHUNK_BYTES", 8 * 8 * 8 * 3 * 7)
    assert np.array_equal(instance(labels, images), whole)


# ---- every kind


def common_arguments(labels):
    return {
        "rate": 0.5,
        "num_classes": 10,
        "images": pictures(len(labels)),
        "mean": MEAN,
        "std": STD,
        "class_names": CIFAR10,
        "human_labels": (labels + 1) % 10,
    }


@pytest.mark.parametrize("kind", noise.KINDS)
def test_deterministic_and_the_input_is_left_alone(kind):
    labels = balanced(40)
    before, arguments = labels.copy(), common_arguments(labels)
    images = arguments["images"].copy()
    first = corrupt(labels, kind=kind, seed=3, **arguments)
    np.random.seed(0)  # The global state plays no part.
    second = corrupt(labels, kind=kind, seed=3, **arguments)
    assert np.array_equal(first, second)
    assert np.array_equal(labels, before) and np.array_equal(images, arguments["images"])
    assert not np.shares_memory(first, labels) and not np.shares_memory(first, arguments["human_labels"])
    other = corrupt(labels, kind=kind, seed=4, **arguments)
    assert np.array_equal(first, other) == (kind in ("none", "real"))
    assert (first != labels).any() == (kind != "none")


def test_kinds_pick_different_samples_at_one_seed():
    labels = balanced(100)
    arguments = common_arguments(labels)
    picked = [corrupt(labels, kind=kind, seed=0, **arguments) != labels for kind in ("symmetric", "instance")]
    assert abs(np.mean(picked[0] == picked[1]) - 0.5) < 0.1


def test_real_takes_the_human_labels():
    labels = balanced(10)
    human = np.roll(labels, 1).astype(np.int64)
    noisy = corrupt(labels, kind="real", rate=0.5, num_classes=10, seed=0, human_labels=human)
    assert np.array_equal(noisy, human) and noisy.dtype == np.int32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "symetric"}, "did you mean 'symmetric'"),
        ({"kind": "dependent"}, "instance"),
        ({"rate": 1.5}, r"1\.5.*outside \[0, 1\]"),
        ({"rate": -0.1}, "outside"),
        ({"rate": float("nan")}, "outside"),
        ({"seed": -1}, "seed is -1"),
        ({"num_classes": 5}, "5 classes allow 0 to 4"),
        ({"kind": "instance", "images": None}, "needs the images"),
        ({"kind": "instance", "images": pictures(99)}, "99 images for 100 labels"),
        ({"kind": "instance", "images": np.zeros((100, 8, 8, 3))}, "in memory as one uint8 array"),
        ({"kind": "instance", "mean": (0.5, 0.5)}, "3 channels"),
        ({"kind": "asymmetric", "class_names": None}, "needs the names"),
        ({"kind": "asymmetric", "class_names": CIFAR10[:4]}, "4 class names for 10"),
        (
            {
                "kind": "asymmetric",
                "class_names": ("zebra", *CIFAR10[1:]),
                "options": NoiseOptions(asymmetric_targets="pairs"),
            },
            "airplane is not in this data set",
        ),
        (
            {"kind": "asymmetric", "options": NoiseOptions(asymmetric_targets="next_in_superclass")},
            "needs superclasses",
        ),
        ({"kind": "real", "human_labels": None}, "needs human labels"),
        ({"kind": "real", "human_labels": np.zeros(99, np.int64)}, "99 human labels for 100"),
        ({"kind": "real", "human_labels": np.full(100, 10)}, "human labels go from 10 to 10"),
    ],
)
def test_bad_input_is_one_sentence(changes, message):
    labels = balanced(10)
    arguments = {"kind": "symmetric", "seed": 0, **common_arguments(labels), **changes}
    with pytest.raises(UserError, match=message) as error:
        corrupt(labels, **arguments)
    assert "\n" not in str(error.value)


def test_one_class_has_no_other():
    with pytest.raises(UserError, match="two classes"):
        corrupt(np.zeros(10, np.int32), kind="symmetric", rate=0.5, num_classes=1, seed=0)


def test_an_unknown_variant_is_named():
    with pytest.raises(UserError, match="unknown value of instance_count 'pnd': did you mean 'pdn'"):
        NoiseOptions(instance_count="pnd")


# ---- audit


def test_audit_counts():
    clean = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    given = np.array([0, 1, 2, 2, 1, 1, 0, 2])
    report = audit(given, clean, ("a", "b", "c", "d"), 0.5, "symmetric")
    assert (report.count, report.size, report.actual_rate, report.nominal_rate) == (4, 8, 0.5, 0.5)
    assert report.counts.tolist() == [[1, 1, 2, 0], [0, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert report.transition[0].tolist() == [0.25, 0.25, 0.5, 0]
    np.testing.assert_array_equal(report.rate_per_class, [0.75, 0, 0.5, np.nan])
    assert report.targets_per_class.tolist() == [2, 0, 1, 0]
    np.testing.assert_allclose(report.effective_targets_per_class, [3 / 2 ** (2 / 3), 0, 1, 0])
    assert report.summary() == "symmetric noise: nominal rate 50.00 %, actual rate 50.00 % (4 of 8 labels)"
    assert "nominal" not in audit(given, clean, ("a", "b", "c", "d"), None, "real").summary()


def test_audit_refuses_what_it_cannot_compare():
    with pytest.raises(UserError, match="unknown"):
        audit(np.zeros(3, int), None, names(2), 0.5, "symmetric")
    with pytest.raises(UserError, match="3 are given and 2 are true"):
        audit(np.zeros(3, int), np.zeros(2, int), names(2), 0.5, "symmetric")


@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_audit_is_saved_whole(num_classes, tmp_path):
    labels = balanced(20, num_classes)
    noisy = corrupt(labels, kind="symmetric", rate=0.5, num_classes=num_classes, seed=0)
    report = audit(noisy, labels, names(num_classes), 0.5, "symmetric")
    report.save(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["noise.json", "noise.png"]
    stored = json.loads((tmp_path / "run" / "noise.json").read_text())
    assert stored["counts"] == report.counts.tolist() and stored["actual_rate"] == report.actual_rate
    assert stored["class_names"] == list(names(num_classes))
    rows = report.table().splitlines()
    assert rows[0] == report.summary()
    assert len(rows) < 26 and max(map(len, rows)) <= 130


def test_audit_of_a_missing_class_is_valid_json(tmp_path):
    audit(np.array([0, 1]), np.array([0, 0]), names(3), None, "real").save(tmp_path)
    stored = json.loads((tmp_path / "noise.json").read_text(), parse_constant=pytest.fail)
    assert stored["rate_per_class"] == [0.5, None, None] and stored["nominal_rate"] is None


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        audit(np.array([0, 1]), np.array([0, 0]), names(2), None, "real").save(tmp_path)
    assert not list(tmp_path.iterdir())
