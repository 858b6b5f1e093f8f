"""The configuration: what cannot be, what survives a file, what differs."""

import dataclasses
import json

import pytest

from examples.noisy_images import config as configuration
from examples.noisy_images.config import PAPER, configure, replace
from examples.noisy_images.errors import UserError
from examples.noisy_images.labels.noise import NoiseOptions

ODD = configure(
    dataset="npz",
    data_dir="here.npz",
    holdout=0.1,
    learning_rate_drops=(0.25,),
    noise_options=NoiseOptions(symmetric_count="bernoulli"),
    rho=0.3,
    scan_epochs=True,
)


def test_the_defaults_are_the_papers_protocol():
    paper = {
        "dataset": "cifar10",
        "model": "resnet18",
        "method": "saner",
        "epochs": 200,
        "batch_size": 128,
        "learning_rate": 0.1,
        "learning_rate_drops": (0.5, 0.75),
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "alpha": 0.5,
        "alpha_ramp_epochs": 50,
        "batch_norm_pass": "unperturbed",
        "holdout": 0.0,
        "evaluate_every": 1,
        "precision": "float32",
    }
    settings = configuration.flat(PAPER) | {"alpha_ramp_epochs": PAPER.alpha_ramp_epochs}
    assert {name: settings[name] for name in paper} == paper


@pytest.mark.parametrize("config", [PAPER, ODD])
def test_a_file_gives_back_what_was_written(tmp_path, config):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(configuration.to_json(config)))
    assert configuration.read(path) == config
    assert configuration.differences(configuration.read(path), config) == []


def test_differences_are_named_with_both_values():
    changed = replace(PAPER, rate=0.2, noise_options=NoiseOptions(instance_count="pdn"))
    assert configuration.differences(changed, PAPER) == [
        "rate: 0.2 here, 0.5 there",
        "instance_count: 'pdn' here, 'exact' there",
    ]


def test_circumstances_make_no_other_run():
    elsewhere = replace(PAPER, data_dir="elsewhere", workers=0, skip_corrupt=True, evaluate_every=5)
    assert elsewhere != PAPER and configuration.differences(elsewhere, PAPER) == []
    assert configuration.run_name(elsewhere) == configuration.run_name(PAPER)


def test_a_setting_is_found_in_whichever_section_it_stands():
    changed = replace(PAPER, rho=0.2, epochs=3, symmetric_count="bernoulli", seed=4, workers=0)
    assert (changed.optimizer.rho, changed.training.epochs, changed.seed) == (0.2, 3, 4)
    assert (changed.labels.noise_options.symmetric_count, changed.circumstances.workers) == ("bernoulli", 0)
    with pytest.raises(TypeError, match="no setting is called rate_of_learning"):
        replace(PAPER, rate_of_learning=0.1)


def test_no_two_settings_share_a_name():
    def names(section):
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            yield from names(value) if dataclasses.is_dataclass(value) else [field.name]

    assert len(list(names(PAPER))) == len(configuration.flat(PAPER))


def test_files_without_sections_are_still_read(tmp_path):
    """As they were written before settings had sections."""
    old = configuration.flat(ODD)
    old["noise_options"] = {name: old.pop(name) for name in configuration.flat(ODD.labels.noise_options)}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert configuration.read(tmp_path / "config.json") == ODD


def test_the_noise_seed_is_the_training_seed_unless_given():
    assert configure(seed=3).noise_seed_used == 3
    assert configure(seed=3, noise_seed=0).noise_seed_used == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": "symetric"}, "unknown value of --noise 'symetric': did you mean 'symmetric'.*choose one of asym"),
        ({"precision": "fp16"}, "--precision 'fp16'.*bfloat16, float32, tf32"),
        ({"companion": "coteaching"}, "did you mean 'co-teaching'"),
        ({"alpha_ramp_by": "epochs"}, "--alpha-ramp-by"),
        ({"asam_leaves": "none"}, "--asam-leaves"),
        ({"batch_norm_pass": "both"}, "--batch-norm-pass"),
        ({"learning_rate_schedule": "linear"}, "--learning-rate-schedule"),
        ({"padding": "valid"}, "--padding"),
        ({"initialisation": "keras"}, "--initialisation"),
        ({"rate": 1.5}, r"--rate must be in \[0, 1\], got 1.5"),
        ({"rate": float("nan")}, "--rate must be"),
        ({"holdout": -0.1}, "--holdout must be"),
        ({"alpha_ramp": 2.0}, "--alpha-ramp must be"),
        ({"forget_rate": 1.1}, "--forget-rate must be"),
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"evaluate_every": 0}, "--evaluate-every must be at least 1"),
        ({"checkpoint_every": -1}, "--checkpoint-every must be at least 1"),
        ({"image_size": -4}, "--image-size must be at least 1"),
        ({"learning_rate": -0.1}, "--learning-rate must be at least 0"),
        ({"learning_rate": float("nan")}, "--learning-rate must be at least 0"),
        ({"rho": -0.1}, "--rho must be at least 0"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"seed": 2**31}, r"--seed must be below 2\*\*31"),
        ({"noise_seed": -1}, "--noise-seed must be at least 0"),
        ({"workers": -1}, "--workers must be at least 0"),
        ({"learning_rate_drops": (0.5, 1.5)}, r"--learning-rate-drops must be in \(0, 1\], got 1.5"),
        ({"fsam_decay": 1.0}, "--fsam-decay must be in"),
        ({"vasso_theta": 0.0}, "--vasso-theta must be in"),
        ({"every": 0}, "--every must be at least 1, got 0"),
        ({"every": 5, "method": "sgd"}, "^--every 5 says when to take a second gradient, and sgd takes none; leave"),
    ],
)
def test_impossible_values_are_named(change, message):
    with pytest.raises(UserError, match=message) as error:
        configuration.check(replace(PAPER, **change))
    assert "\n" not in str(error.value)


def test_possible_values_pass():
    for config in (
        PAPER,
        ODD,
        configure(rate=0, holdout=0),
        configure(rate=1.0, alpha=-0.5, alpha_ramp=0.0, seed=2**31 - 1),
    ):
        configuration.check(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not the folder of a run"),
        ("{", "is not valid JSON"),
        ("[1]", "is not a configuration of this program"),
        ('{"dropuot": 0.1, "rate": 0.2}', "settings that this version does not know: dropuot"),
        ('{"noise_options": {"colour": "red"}}', "settings that this version does not know: colour"),
        ('{"noise_options": {"instance_count": "some"}}', "instance_count"),
        ('{"learning_rate_drops": 3}', "is not a configuration of this program: --learning-rate-drops .* got 3"),
        ('{"training": {"epochs": "many"}}', "--epochs must be of type int, got 'many'"),
        ('{"data": {"augment": 1}}', "--augment must be of type bool, got 1"),
        ('{"optimizer": {"rho": [0.1]}}', r"--rho must be of type float, got \(0.1,\)"),
        ('{"optimizer": 3}', "settings that this version does not know: optimizer"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        configuration.read(tmp_path / "config.json")


def test_a_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not the folder of a run"):
        configuration.read(tmp_path / "file" / "config.json")
