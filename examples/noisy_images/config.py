"""The resolved configuration of a run: one flat record, written beside its results."""

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from examples.noisy_images.errors import UserError, unknown_name
from examples.noisy_images.noise import KINDS, NoiseOptions


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run depends on, and nothing else; the defaults are the paper's protocol."""

    # Data
    dataset: str = "cifar10"
    """Data set; `list` shows all."""
    data_dir: str | None = None
    """Folder or file of the data; the data set's own default if not given."""
    validation_dir: str | None = None
    """Mini-WebVision only: ImageNet's validation folder, to test on instead of WebVision's own."""
    image_size: int | None = None
    """Side in pixels of streamed images (224 if not given)."""
    subset: int | None = None
    """Number of training images, class-stratified, cut before the noise is drawn; all if not given."""
    test_subset: int | None = None
    """Number of test images, class-stratified, for small machines; all if not given."""
    holdout: float = 0.0
    """Share of the noisy training set held out to choose an epoch by."""
    folds: int | None = None
    """Number of folds of the noisy training set, class-stratified, one of which is left out; none if not given."""
    fold: int = 0
    """Fold that is left out, counted from 0."""
    data_seed: int = 0
    """Seed of the subsets, of the held-out split, of the folds and of a test split where the source has none."""
    augment: bool = True
    """Random crop and flip, as the data set has them."""
    crop_padding: int | None = None
    """Black border of the random crop in pixels; the data set's own if not given."""
    flip: bool | None = None
    """Random horizontal flip; the data set's own habit if not given."""
    skip_corrupt: bool = False
    """Leave out images that cannot be decoded instead of stopping."""
    workers: int = 2
    """Processes that decode streamed images; 0 decodes in the training process."""

    # Label noise
    noise: str = "symmetric"
    """none, symmetric, asymmetric, instance or real."""
    rate: float = 0.5
    """Nominal share of training labels to change, in [0, 1]."""
    noise_seed: int | None = None
    """Seed of the noise draw; the training seed if not given."""
    noise_options: NoiseOptions = dataclasses.field(default_factory=NoiseOptions)
    """Readings of the noises; the defaults are the released SANER code's."""
    human_labels: str | None = None
    """Published file of human labels, for `real` noise."""
    label_set: str | None = None
    """Which of its label sets; worse_label on CIFAR-10 and noisy_label on CIFAR-100 if not given."""

    # Model
    model: str = "resnet18"
    """Network; `list` shows all."""
    width: float = 1.0
    """Factor on the number of channels."""
    padding: str = "torch"
    """Padding of strided convolutions: torch (one on every side) or same."""
    initialisation: str = "torch"
    """Initial weights: torch (the released code's) or flax."""
    batch_norm_momentum: float = 0.9
    """Weight of the past in the running statistics."""
    batch_norm_epsilon: float = 1e-5
    """Added to the variance."""
    batch_norm_groups: int = 1
    """Equal parts of a batch with BatchNorm statistics of their own: as many as devices for statistics per device."""
    dropout: float = 0.0
    """Dropout rate."""
    # Not a faster one, because SANER compares two close gradients. Of the mask's bits along a run on CIFAR-10, 99.99 to
    # 100 % are in float32 what they are in float64, 95 to 98 % in TF32 (emulated), 86 to 93 % in bfloat16; the update
    # is off by at most 0.2 %, by 3 to 9 % and by 6 to 17 %. Accuracies of three short runs differ by less than their
    # spread (benchmarks/README.md, precision).
    precision: str = "float32"
    """Compute precision: float32, tf32 or bfloat16; parameters, perturbation and statistics stay float32."""
    convolution: str = "auto"
    """Kernel gradients of convolutions: auto (on CPUs matrix products where they pay) or xla (XLA's own everywhere)."""

    # Method
    method: str = "saner"
    """Optimization method; `list` shows all."""
    rho: float | None = None
    """Radius of the perturbation; 0.1 if not given, for ASAM 0.5 (1.0 with 100 classes)."""
    rho_min: float | None = None
    """If given, rho follows the learning rate linearly, from rho at its start down to this at 0."""
    alpha: float = 0.5
    """SANER's down-weighting, once its ramp is over."""
    alpha_ramp: float = 0.25
    """Share of the epochs over which alpha rises linearly from 0; 0 for a constant alpha."""
    alpha_ramp_by: str = "epoch"
    """Whether alpha rises once an epoch, as in the released code, or every step."""
    gsam_alpha: float = 0.4
    """Share of the orthogonal part that GSAM subtracts."""
    asam_eta: float = 0.0
    """ASAM's offset of |w|; 0 in SANER's code, 0.01 in ASAM's own."""
    asam_leaves: str = "all"
    """Parameters that ASAM scales by their size: all (SANER's code) or weights (ASAM's own: not biases)."""
    fsam_sigma: float = 1.0
    """Share of the average that FSAM subtracts."""
    fsam_decay: float = 0.9
    """Weight of the past in FSAM's average."""
    vasso_theta: float = 0.2
    """Weight of the new gradient in VaSSO's average; 0.2 in SANER's code, 0.9 in VaSSO's own."""
    batch_norm_pass: str = "unperturbed"
    """Pass whose batch statistics enter BatchNorm's running ones: unperturbed (at w) or perturbed (at w + eps)."""
    companion: str = "none"
    """Noise-robust companion: none, bootstrapping or co-teaching."""
    forget_rate: float = 0.2
    """Share of each batch that Co-teaching leaves out at the end of its ramp."""
    forget_ramp_epochs: int = 10
    """Length of Co-teaching's ramp in epochs."""

    # Optimization
    epochs: int = 200
    """Passes over the training set; the last short batch is dropped."""
    batch_size: int = 128
    """Samples a step, on all devices together."""
    accumulate: int = 1
    """Micro-batches that a step takes one after the other, for batches larger than memory."""
    rematerialise: bool = False
    """Compute what stands inside a network's blocks again in the backward pass: less memory, more time."""
    learning_rate: float = 0.1
    """Initial learning rate."""
    learning_rate_schedule: str = "step"
    """step, cosine or constant."""
    learning_rate_drops: tuple[float, ...] = (0.5, 0.75)
    """Shares of the epochs after which the step schedule falls to a tenth."""
    momentum: float = 0.9
    """Heavy-ball momentum."""
    weight_decay: float = 5e-4
    """Coupled L2 weight decay on every parameter, added after the method's gradient."""

    # Run
    seed: int = 0
    """Training seed: initial weights, order, augmentation, dropout and, unless noise_seed is given, the noise."""
    evaluate_every: int = 1
    """Epochs between evaluations on the whole training set (the test set is evaluated every epoch)."""
    checkpoint_every: int = 1
    """Epochs between checkpoints; the last epoch always has one."""
    sample_history: bool = True
    """Keep loss and predicted label of every training sample at every evaluation on the training set."""
    analyse_batches: int = 0
    """Batches whose gradients are analysed after every epoch: ratio of the two, alignment with label noise."""
    scan_epochs: bool | None = None
    """Run a whole epoch in one compiled call; if not given, on accelerators only."""

    @property
    def noise_seed_used(self) -> int:
        """Seed of the noise draw."""
        return self.seed if self.noise_seed is None else self.noise_seed

    @property
    def alpha_ramp_epochs(self) -> float:
        """Length of the alpha ramp in epochs."""
        return self.alpha_ramp * self.epochs


# The paper's protocol for ResNet-18 on CIFAR-10.
PAPER = Config()

# Where a run finds its files, how it is carried out and what is looked at on the way: runs that differ in these alone
# train alike, step for step.
CIRCUMSTANCES = (
    "data_dir",
    "validation_dir",
    "human_labels",
    "skip_corrupt",
    "workers",
    "evaluate_every",
    "checkpoint_every",
    "analyse_batches",
    "scan_epochs",
    "sample_history",
)

CHOICES = {
    "noise": KINDS,
    "padding": ("torch", "same"),
    "initialisation": ("torch", "flax"),
    "precision": ("float32", "tf32", "bfloat16"),
    "convolution": ("auto", "xla"),
    "alpha_ramp_by": ("epoch", "step"),
    "asam_leaves": ("all", "weights"),
    "batch_norm_pass": ("unperturbed", "perturbed"),
    "companion": ("none", "bootstrapping", "co-teaching"),
    "learning_rate_schedule": ("step", "cosine", "constant"),
}
_SHARES = ("rate", "holdout", "alpha_ramp", "forget_rate")
_AT_LEAST_ONE = (
    *("epochs", "batch_size", "accumulate", "batch_norm_groups", "evaluate_every", "checkpoint_every", "image_size"),
)
_NOT_NEGATIVE = (
    "learning_rate",
    "momentum",
    "weight_decay",
    "rho",
    "rho_min",
    "asam_eta",
    "workers",
    "forget_ramp_epochs",
    "seed",
    "data_seed",
    "noise_seed",
    "analyse_batches",
)


def check(config: Config) -> None:
    """Raise if a value cannot be; names of data sets, models and methods are checked where they are looked up."""
    for field, known in CHOICES.items():
        if getattr(config, field) not in known:
            raise unknown_name(f"value of {_option(field)}", str(getattr(config, field)), known)
    for field in _SHARES:
        if not 0 <= (value := getattr(config, field)) <= 1:
            raise UserError(f"{_option(field)} must be in [0, 1], got {value}.")
    for field in _AT_LEAST_ONE:
        if (value := getattr(config, field)) is not None and value < 1:
            raise UserError(f"{_option(field)} must be at least 1, got {value}.")
    for field in _NOT_NEGATIVE:
        value = getattr(config, field)
        if value is not None and not value >= 0:
            raise UserError(f"{_option(field)} must be at least 0, got {value}.")
    if config.folds is not None and config.folds < 2:
        raise UserError(f"--folds must be at least 2, got {config.folds}.")
    if not 0 <= config.fold < (config.folds or 1):
        raise UserError(f"--fold must be at least 0 and below --folds, got {config.fold} of {config.folds}.")
    parts = config.accumulate * config.batch_norm_groups
    if config.batch_size % parts:
        raise UserError(
            f"--batch-size {config.batch_size} is not a multiple of {parts}, --accumulate ({config.accumulate}) times "
            f"--batch-norm-groups ({config.batch_norm_groups}): choose one that is."
        )
    # The second network of Co-teaching is initialised from the upper half of the 32-bit seeds.
    if config.seed >= 2**31:
        raise UserError(f"--seed must be below 2**31, got {config.seed}.")
    if any(not 0 < drop <= 1 for drop in config.learning_rate_drops):
        raise UserError(f"--learning-rate-drops must be shares of the epochs, got {config.learning_rate_drops}.")
    if not 0 <= config.fsam_decay < 1:
        raise UserError(f"--fsam-decay must be in [0, 1), got {config.fsam_decay}.")
    if not 0 < config.vasso_theta <= 1:
        raise UserError(f"--vasso-theta must be in (0, 1], got {config.vasso_theta}.")


def to_json(config: Config) -> dict[str, Any]:
    """Return the configuration as JSON values."""
    # Once through text, so that tuples are lists here as they are in a file.
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(values: dict[str, Any], where: str) -> Config:
    """Return the configuration that was written to ``where``."""
    known = {field.name for field in dataclasses.fields(Config)}
    if not isinstance(values, dict):
        raise UserError(f"{where} is not a configuration of this program.")
    if unknown := sorted(set(values) - known):
        raise UserError(f"{where} holds settings that this version does not know: {', '.join(unknown)}.")
    values = dict(values)
    try:
        values["noise_options"] = NoiseOptions(**values.get("noise_options", {}))
        values["learning_rate_drops"] = tuple(values.get("learning_rate_drops", PAPER.learning_rate_drops))
    except TypeError as error:
        raise UserError(f"{where} is not a configuration of this program: {error}.") from error
    return Config(**values)


def read(path: Path) -> Config:
    """Read a configuration that a run wrote."""
    try:
        return from_json(json.loads(path.read_text()), str(path))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist: {path.parent} is not the folder of a run.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}); restore it or start the run again.") from error


def differences(ours: Config, theirs: Config, ignoring: Collection[str] = ()) -> list[str]:
    """Say which settings differ, each as `name: ours, theirs`."""
    return [
        f"{field.name}: {getattr(ours, field.name)!r} here, {getattr(theirs, field.name)!r} there"
        for field in dataclasses.fields(Config)
        if field.name not in ignoring and getattr(ours, field.name) != getattr(theirs, field.name)
    ]


def check_same_run(config: Config, folder: Path, ignoring: Collection[str] = ()) -> None:
    """Raise if the folder holds a run of another configuration."""
    if not (folder / "config.json").exists():
        return
    if different := differences(config, read(folder / "config.json"), ignoring):
        raise UserError(
            f"{folder} already holds a run of another configuration ({'; '.join(different)}): choose another --name."
        )


def run_name(config: Config) -> str:
    """Return the name of a run's folder: what it trains on what, and every setting that is not the paper's.

    >>> run_name(Config(noise="none", epochs=30, augment=False))
    'cifar10-none-saner-resnet18-no_augment-epochs=30-seed0'
    """
    labels = config.noise if config.noise in ("none", "real") else f"{config.noise}{config.rate:g}"
    named = {"dataset", "noise", "rate", "method", "model", "seed", *CIRCUMSTANCES}
    others = {field.name: getattr(config, field.name) for field in dataclasses.fields(Config)}
    others |= dataclasses.asdict(others.pop("noise_options"))
    usual = vars(PAPER) | dataclasses.asdict(PAPER.noise_options)
    changed = [_named(name, value) for name, value in others.items() if name not in named and value != usual[name]]
    return "-".join([config.dataset, labels, config.method, config.model, *changed, f"seed{config.seed}"])


def _named(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else f"no_{name}"
    return f"{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"


def _option(field: str) -> str:
    return "--" + field.replace("_", "-")
