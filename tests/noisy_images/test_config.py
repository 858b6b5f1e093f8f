"""The configuration: what cannot be, what survives a file, what differs."""

import dataclasses
import json

import pytest

from examples.noisy_images import config as configuration
from examples.noisy_images.config import PAPER, Config
from examples.noisy_images.errors import UserError
from examples.noisy_images.labels.noise import NoiseOptions

ODD = Config(
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
    assert {name: getattr(PAPER, name) for name in paper} == paper


@pytest.mark.parametrize("config", [PAPER, ODD])
def test_a_file_gives_back_what_was_written(tmp_path, config):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(configuration.to_json(config)))
    assert configuration.read(path) == config
    assert configuration.differences(configuration.read(path), config) == []


def test_differences_are_named_with_both_values():
    changed = dataclasses.replace(PAPER, rate=0.2, noise_options=NoiseOptions(instance_count="pdn"))
    rate, options = sorted(configuration.differences(changed, PAPER), reverse=True)
    assert rate == "rate: 0.2 here, 0.5 there"
    assert options.startswith("noise_options: ") and "pdn" in options


def test_the_noise_seed_is_the_training_seed_unless_given():
    assert Config(seed=3).noise_seed_used == 3
    assert Config(seed=3, noise_seed=0).noise_seed_used == 0


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
        ({"learning_rate_drops": (0.5, 1.5)}, "--learning-rate-drops must be shares"),
        ({"fsam_decay": 1.0}, "--fsam-decay must be in"),
        ({"vasso_theta": 0.0}, "--vasso-theta must be in"),
    ],
)
def test_impossible_values_are_named(change, message):
    with pytest.raises(UserError, match=message) as error:
        configuration.check(dataclasses.replace(PAPER, **change))
    assert "\n" not in str(error.value)


def test_possible_values_pass():
    for config in (PAPER, ODD, Config(rate=0, holdout=0), Config(rate=1.0, alpha=-0.5, alpha_ramp=0.0, seed=2**31 - 1)):
        configuration.check(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not the folder of a run"),
        ("{", "is not valid JSON"),
        ("[1]", "is not a configuration of this program"),
        ('{"dropuot": 0.1, "rate": 0.2}', "settings that this version does not know: dropuot"),
        ('{"noise_options": {"colour": "red"}}', "is not a configuration of this program: .*colour"),
        ('{"noise_options": {"instance_count": "some"}}', "instance_count"),
        ('{"learning_rate_drops": 3}', "is not a configuration of this program"),
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
