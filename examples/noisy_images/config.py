"""The resolved configuration of a run: sections of settings, written beside its results, and protocols by name.

What a run *is* stands in `data`, `labels`, `network`, `optimizer`, `training` and `seed`; where it finds its files, how
it is carried out and what is looked at on the way are its `circumstances`. Two runs that differ in their circumstances
alone are the same run, step for step.

No two settings share a name, so that each is one option of the command line, and `replace(config, rho=0.2)` finds its
section by itself.
"""

import dataclasses
import functools
import json
import math
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from . import files
from .errors import UserError, unknown_name


class Range(NamedTuple):
    """The values that a number may have: from `low` to `high`, an end included unless it is said to be open."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.open_low else self.low <= value) and (
            value < self.high if self.open_high else value <= self.high
        )

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{'above' if self.open_low else 'at least'} {self.low:g}"
        return f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"


Share = Annotated[float, Range(0, 1)]
NotNegative = Annotated[float, Range(0)]
Whole = Annotated[int, Range(0)]
Count = Annotated[int, Range(1)]


Kind = Literal["none", "symmetric", "asymmetric", "instance", "real"]
Precision = Literal["float32", "tf32", "bfloat16"]
PRECISIONS = typing.get_args(Precision)


@dataclasses.dataclass(frozen=True)
class NoiseOptions:
    """Choose between the readings of a noise that the literature uses; the defaults are the released SANER code's.

    Attributes:
        symmetric_count: "exact" relabels exactly `int(rate * N)` samples, "bernoulli" each with probability `rate`.
        asymmetric_count: The same choice for asymmetric noise.
        asymmetric_targets: Where a label goes. "released": the CIFAR-10 pairs (with dog to cat) where the data set has
            those classes, the next class circularly elsewhere. "pairs": the same pairs, required. "one_way_pairs":
            without dog to cat. "next_class": circular over all classes. "next_in_superclass": circular inside each
            superclass, in order of class index.
        asymmetric_picks: "all" draws the samples over all classes, so that those of classes without a target keep their
            labels and the actual rate is lower than the nominal one; "affected" draws within the classes that have a
            target, so that the rate is that of those classes.
        instance_count: "exact" relabels exactly `int(rate * N)` samples; "pdn" draws a flip probability for each sample
            from a normal around `rate`, standard deviation 0.1, truncated to [0, 1] (Xia et al., 2020).
    """

    symmetric_count: Literal["exact", "bernoulli"] = "exact"
    asymmetric_count: Literal["exact", "bernoulli"] = "exact"
    asymmetric_targets: Literal["released", "pairs", "one_way_pairs", "next_class", "next_in_superclass"] = "released"
    asymmetric_picks: Literal["all", "affected"] = "all"
    instance_count: Literal["exact", "pdn"] = "exact"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            known = field.type.__args__
            if getattr(self, field.name) not in known:
                raise unknown_name(f"value of {field.name}", str(getattr(self, field.name)), known)


@dataclasses.dataclass(frozen=True)
class Data:
    """Which samples are trained on and tested on."""

    dataset: str = "cifar10"
    """Data set; `list` shows all."""
    image_size: Count | None = None
    """Side in pixels of streamed images (224 if not given)."""
    largest_side: Count | None = None
    """Side in pixels to which larger images of one's own are scaled in memory; 224 if not given."""
    test_share: Annotated[float, Range(0, 1, open_high=True)] = 0.2
    """Share of one's own samples to test on where they have no test set; 0 trains on all."""
    subset: Count | None = None
    """Number of training images, class-stratified, cut before the noise is drawn; all if not given."""
    test_subset: Count | None = None
    """Number of test images, class-stratified, for small machines; all if not given."""
    holdout: Share = 0.0
    """Share of the noisy training set held out to choose an epoch by."""
    folds: Annotated[int, Range(2)] | None = None
    """Number of folds of the noisy training set, class-stratified, one of which is left out; none if not given."""
    fold: Whole = 0
    """Fold that is left out, counted from 0."""
    data_seed: Whole = 0
    """Seed of the subsets, of the held-out split, of the folds and of a test split where the source has none."""
    augment: bool = True
    """Random crop and flip, as the data set has them."""
    crop_padding: Whole | None = None
    """Black border of the random crop in pixels; the data set's own if not given."""
    flip: bool | None = None
    """Random horizontal flip; the data set's own habit if not given."""


@dataclasses.dataclass(frozen=True)
class Labels:
    """What is done to the training labels."""

    noise: Kind = "symmetric"
    """Kind of label noise."""
    rate: Share = 0.5
    """Nominal share of training labels to change, in [0, 1]."""
    noise_seed: Whole | None = None
    """Seed of the noise draw; the training seed if not given."""
    noise_options: NoiseOptions = dataclasses.field(default_factory=NoiseOptions)
    """Readings of the noises; the defaults are the released SANER code's."""
    label_set: str | None = None
    """Which of the human labels' sets; worse_label on CIFAR-10 and noisy_label on CIFAR-100 if not given."""


@dataclasses.dataclass(frozen=True)
class Network:
    """The network and how it is computed."""

    model: str = "resnet18"
    """Network; `list` shows all; auto takes one that suits the data."""
    width: Annotated[float, Range(0, open_low=True)] = 1.0
    """Factor on the number of channels."""
    padding: Literal["torch", "same"] = "torch"
    """Padding of strided convolutions: torch (one on every side) or same."""
    initialisation: Literal["torch", "flax"] = "torch"
    """Initial weights: torch (the released code's) or flax."""
    batch_norm_momentum: Share = 0.9
    """Weight of the past in the running statistics."""
    batch_norm_epsilon: NotNegative = 1e-5
    """Added to the variance."""
    batch_norm_groups: Count = 1
    """Equal parts of a batch with BatchNorm statistics of their own: as many as devices for statistics per device."""
    dropout: Annotated[float, Range(0, 1, open_high=True)] = 0.0
    """Dropout rate."""
    # Not a faster one, because SANER compares two close gradients. Of the mask's bits along a run on CIFAR-10, 99.99 to
    # 100 % are in float32 what they are in float64, 95 to 98 % in TF32 (emulated), 86 to 93 % in bfloat16; the update
    # is off by at most 0.2 %, by 3 to 9 % and by 6 to 17 %. Accuracies of three short runs differ by less than their
    # spread (benchmarks/README.md, precision).
    precision: Precision = "float32"
    """Compute precision; parameters, perturbation and statistics stay float32."""
    convolution: Literal["auto", "xla"] = "auto"
    """Convolutions: auto (on CPUs the faster of XLA's two, with gradients that suit it) or xla (XLA's default)."""


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The method, and the SGD behind it."""

    method: str = "saner"
    """Optimization method; `list` shows all."""
    rho: NotNegative | None = None
    """Radius of the perturbation; 0.1 if not given, for ASAM 0.5 (1.0 with 100 classes)."""
    rho_min: NotNegative | None = None
    """If given, rho follows the learning rate linearly, from rho at its start down to this at 0."""
    alpha: float = 0.5
    """SANER's down-weighting, once its ramp is over."""
    alpha_ramp: Share = 0.25
    """Share of the epochs over which alpha rises linearly from 0; 0 for a constant alpha."""
    alpha_ramp_by: Literal["epoch", "step"] = "epoch"
    """Whether alpha rises once an epoch, as in the released code, or every step."""
    gsam_alpha: float = 0.4
    """Share of the orthogonal part that GSAM subtracts."""
    asam_eta: NotNegative = 0.0
    """ASAM's offset of |w|; 0 in SANER's code, 0.01 in ASAM's own."""
    asam_leaves: Literal["all", "weights"] = "all"
    """Parameters that ASAM scales by their size: all (SANER's code) or weights (ASAM's own: not biases)."""
    fsam_sigma: float = 1.0
    """Share of the average that FSAM subtracts."""
    fsam_decay: Annotated[float, Range(0, 1, open_high=True)] = 0.9
    """Weight of the past in FSAM's average."""
    vasso_theta: Annotated[float, Range(0, 1, open_low=True)] = 0.2
    """Weight of the new gradient in VaSSO's average; 0.2 in SANER's code, 0.9 in VaSSO's own."""
    learning_rate: NotNegative = 0.1
    """Initial learning rate."""
    learning_rate_schedule: Literal["step", "cosine", "constant"] = "step"
    """How it falls."""
    learning_rate_drops: tuple[Annotated[float, Range(0, 1, open_low=True)], ...] = (0.5, 0.75)
    """Shares of the epochs after which the step schedule falls to a tenth."""
    momentum: NotNegative = 0.9
    """Heavy-ball momentum."""
    weight_decay: NotNegative = 5e-4
    """Coupled L2 weight decay on every parameter, added after the method's gradient."""


@dataclasses.dataclass(frozen=True)
class Training:
    """How long, and on what batches."""

    epochs: Count | None = 200
    """Passes over the training set; the last short batch is dropped. If not given, as many as suit the data."""
    batch_size: Count = 128
    """Samples a step, on all devices together."""
    accumulate: Count = 1
    """Micro-batches that a step takes one after the other, for batches larger than memory."""
    rematerialise: bool = False
    """Compute what stands inside a network's blocks again in the backward pass: less memory, more time."""
    batch_norm_pass: Literal["unperturbed", "perturbed"] = "unperturbed"
    """Pass whose batch statistics enter BatchNorm's running ones: unperturbed (at w) or perturbed (at w + eps)."""
    companion: Literal["none", "bootstrapping", "co-teaching"] = "none"
    """Noise-robust companion."""
    forget_rate: Share = 0.2
    """Share of each batch that Co-teaching leaves out at the end of its ramp."""
    forget_ramp_epochs: Whole = 10
    """Length of Co-teaching's ramp in epochs."""


@dataclasses.dataclass(frozen=True)
class Circumstances:
    """Where a run finds its files, how it is carried out and what is looked at on the way."""

    data_dir: str | None = None
    """Folder or file of the data; the data set's own default if not given."""
    validation_dir: str | None = None
    """Mini-WebVision only: ImageNet's validation folder, to test on instead of WebVision's own."""
    human_labels: str | None = None
    """Published file of human labels, for `real` noise."""
    decisions: str | None = None
    """File of decisions about given labels, as the review page of `suspects` saves it; applied before all else."""
    skip_corrupt: bool = False
    """Leave out images that cannot be decoded instead of stopping."""
    workers: Whole = 2
    """Processes that decode streamed images; 0 decodes in the training process."""
    evaluate_every: Count = 1
    """Epochs between evaluations on the whole training set (the test set is evaluated every epoch)."""
    checkpoint_every: Count = 1
    """Epochs between checkpoints; the last epoch always has one."""
    sample_history: bool = True
    """Keep loss, predicted label and margin of every training sample at every evaluation on the training set."""
    analyse_batches: Whole = 0
    """Batches whose gradients are analysed after every epoch: ratio of the two, alignment with label noise."""
    sharpness_samples: Whole = 0
    """Training samples at whose loss the largest eigenvalue of the Hessian is measured at every such evaluation."""
    scan_epochs: bool | None = None
    """Whole epochs in one compiled call, which nothing stops, or single steps; if not given, on CPUs up to 8 steps."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run is and how it is carried out; the defaults are the paper's protocol."""

    data: Data = Data()
    labels: Labels = Labels()
    network: Network = Network()
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    seed: Annotated[int, Range(0)] = 0
    """Training seed: initial weights, order, augmentation, dropout and, unless noise_seed is given, the noise."""
    circumstances: Circumstances = Circumstances()

    @property
    def noise_seed_used(self) -> int:
        """Seed of the noise draw."""
        return self.seed if self.labels.noise_seed is None else self.labels.noise_seed

    @property
    def alpha_ramp_epochs(self) -> float:
        """Length of the alpha ramp in epochs."""
        return self.optimizer.alpha_ramp * (self.training.epochs or 0)


def replace(config: Any, **settings: Any) -> Any:
    """Return a configuration, or a section of one, with some settings changed, whichever section they stand in.

    >>> replace(Config(), rho=0.2, epochs=3).optimizer.rho
    0.2

    Raises:
      TypeError: There is no such setting.
    """
    changed = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in settings:
            changed[field.name] = settings.pop(field.name)
        elif dataclasses.is_dataclass(value):
            inside = {name: settings.pop(name) for name in settings.keys() & _names(value)}
            if inside:
                changed[field.name] = replace(value, **inside)
    if settings:
        raise TypeError(f"no setting is called {', '.join(sorted(settings))}.")
    return dataclasses.replace(config, **changed)


def _names(section: Any) -> set[str]:
    fields = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    return set(fields).union(*(_names(value) for value in fields.values() if dataclasses.is_dataclass(value)))


def flat(config: Any) -> dict[str, Any]:
    """Return all settings of a configuration, or of a section, by name."""
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        settings |= flat(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return settings


def configure(**settings: Any) -> Config:
    """Return the paper's protocol with some settings changed."""
    return replace(Config(), **settings)


@dataclasses.dataclass(frozen=True)
class Whereabouts:
    """Where a run finds its files now, if elsewhere than when it was started."""

    data_dir: Path | None = None
    """Folder or file of the data."""
    validation_dir: Path | None = None
    """Mini-WebVision only: ImageNet's validation folder."""
    human_labels: Path | None = None
    """Published file of human labels."""
    decisions: Path | None = None
    """File of decisions about given labels."""
    workers: int | None = None
    """Processes that decode streamed images; 0 decodes in the training process."""

    @classmethod
    def found_in(cls, config: Config) -> "Whereabouts":
        """Return where a configuration finds its files: now, for a run that was started with the same one."""
        return cls(**{field.name: getattr(config.circumstances, field.name) for field in dataclasses.fields(cls)})

    def of(self, config: Config) -> Config:
        """Return a configuration with these in place of its own, its paths absolute."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        circumstances = dataclasses.replace(config.circumstances, **given)
        paths = {
            name: getattr(circumstances, name) for name in ("data_dir", "validation_dir", "human_labels", "decisions")
        }
        absolute = {name: str(Path(path).expanduser().absolute()) for name, path in paths.items() if path is not None}
        return dataclasses.replace(config, circumstances=dataclasses.replace(circumstances, **absolute))


AS_STARTED = Whereabouts()


# The paper's protocol for ResNet-18 on CIFAR-10.
PAPER = Config()
# The protocol of the default comparison: the same for every method, so that only the method differs. The network is
# large for 1,348 images and trains long enough to memorize every wrong label, the regime that the methods differ in.
DIGITS = configure(
    dataset="digits",
    model="mlp",
    initialisation="flax",
    rate=0.5,
    rho=0.4,
    epochs=100,
    batch_size=64,
    learning_rate=0.02,
    weight_decay=0.0,
    scan_epochs=False,
    checkpoint_every=1000,
)
# The protocol of one's own data, whose labels are taken as they are: network and epochs follow from the data
# (`training.own`), so that minutes are enough on two CPU cores.
OWN = configure(
    dataset="folder",
    largest_side=32,
    noise="none",
    model="auto",
    initialisation="flax",
    epochs=None,
    batch_size=64,
    learning_rate=0.02,
    learning_rate_schedule="cosine",
    rho=0.2,
)
PROTOCOLS = {"paper": PAPER, "digits": DIGITS, "own": OWN}
Protocol = Literal["auto", "paper", "digits", "own"]
# The protocol of a data set where none is asked for; of all others, the paper's.
USUAL_PROTOCOLS = {"digits": "digits", "folder": "own", "npz": "own"}


# --- what can be --------------------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Raise if a value cannot be; names of data sets, models and methods are checked where they are looked up."""
    _check_section(config)
    if not 0 <= config.data.fold < (config.data.folds or 1):
        raise UserError(f"--fold must be at least 0 and below --folds, got {config.data.fold} of {config.data.folds}.")
    accumulate, groups, batch_size = (
        config.training.accumulate,
        config.network.batch_norm_groups,
        config.training.batch_size,
    )
    if batch_size % (accumulate * groups):
        raise UserError(
            f"--batch-size {batch_size} is not a multiple of {accumulate * groups}, --accumulate ({accumulate}) times "
            f"--batch-norm-groups ({groups}): choose one that is."
        )
    if config.circumstances.sharpness_samples and config.network.precision != "float32":
        raise UserError(
            f"--sharpness-samples needs float32, a rounded Hessian has other eigenvalues, got --precision "
            f"{config.network.precision}: measure the checkpoint with `sharpness`, or leave one of them out."
        )
    # The second network of Co-teaching is initialised from the upper half of the 32-bit seeds.
    if config.seed >= 2**31:
        raise UserError(f"--seed must be below 2**31, got {config.seed}.")


def _check_section(section: Any) -> None:
    for name, hint in _hints(type(section)).items():
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            _check_section(value)
        else:
            _check_value("--" + name.replace("_", "-"), value, hint)


@functools.cache
def _hints(section: type) -> dict[str, Any]:
    return typing.get_type_hints(section, include_extras=True)


def _check_value(option: str, value: Any, hint: Any) -> None:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is not None:
            _check_value(option, value, next(a for a in arguments if a is not type(None)))
    elif origin is Literal:
        if value not in arguments:
            raise unknown_name(f"value of {option}", str(value), arguments)
    elif origin is Annotated:
        _check_value(option, value, arguments[0])
        for allowed in arguments[1:]:
            if isinstance(allowed, Range) and value not in allowed:
                raise UserError(f"{option} must be {allowed}, got {value}.")
    elif origin is tuple:
        if not isinstance(value, tuple):
            raise UserError(f"{option} must be several values, got {value!r}.")
        for one in value:
            _check_value(option, one, arguments[0])
    elif not (type(value) is hint or (hint is float and type(value) is int)):
        raise UserError(f"{option} must be of type {hint.__name__}, got {value!r}.")


# --- files --------------------------------------------------------------------------------------------------------


def to_json(config: Config) -> dict[str, Any]:
    """Return the configuration as JSON values."""
    # Once through text, so that tuples are lists here as they are in a file.
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(values: dict[str, Any], where: str) -> Config:
    """Return the configuration that was written to ``where``, also by versions whose settings had no sections."""
    if not isinstance(values, dict):
        raise UserError(f"{where} is not a configuration of this program.")
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in _flattened(values)}
    if unknown := sorted(settings.keys() - flat(PAPER).keys()):
        raise UserError(f"{where} holds settings that this version does not know: {', '.join(unknown)}.")
    config = configure(**settings)
    try:
        check(config)
    except UserError as error:
        raise UserError(f"{where} is not a configuration of this program: {error}") from error
    return config


def _flattened(values: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        pair
        for name, value in values.items()
        for pair in (_flattened(value) if isinstance(value, dict) else [(name, value)])
    ]


def read(path: Path) -> Config:
    """Read a configuration that a run wrote."""
    try:
        return from_json(files.read_json(path), str(path))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist: {path.parent} is not the folder of a run.") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); restore it or start the run again.") from error


# --- which run ----------------------------------------------------------------------------------------------------


def without_circumstances(config: Config) -> Config:
    """Return what a run is, however it is carried out."""
    return dataclasses.replace(config, circumstances=Circumstances())


def differences(ours: Config, theirs: Config) -> list[str]:
    """Say which settings of two runs differ, each as `name: ours, theirs`; circumstances do not count."""
    here, there = flat(without_circumstances(ours)), flat(without_circumstances(theirs))
    names = here.keys() - _left_to_the_data(ours) - _left_to_the_data(theirs)
    return [
        f"{name}: {here[name]!r} here, {there[name]!r} there"
        for name in here
        if name in names and here[name] != there[name]
    ]


def _left_to_the_data(config: Config) -> set[str]:
    left = {"model"} if config.network.model == "auto" else set()
    left |= {"epochs"} if config.training.epochs is None else set()
    return left | {"batch_size"} if left else left


def check_same_run(config: Config, folder: Path) -> None:
    """Raise if the folder holds a run of another configuration."""
    if not (folder / "config.json").exists():
        return
    if different := differences(config, read(folder / "config.json")):
        raise UserError(
            f"{folder} already holds a run of another configuration ({'; '.join(different)}): choose another --name."
        )


def run_name(config: Config) -> str:
    """Return the name of a run's folder: what it trains on what, and every setting that is not the paper's.

    >>> run_name(configure(noise="none", epochs=30, augment=False))
    'cifar10-none-saner-resnet18-no_augment-epochs=30-seed0'
    """
    noise = config.labels.noise
    labels = noise if noise in ("none", "real") else f"{noise}{config.labels.rate:g}"
    named = {"dataset", "noise", "rate", "method", "model", "seed"}
    settings, usual = flat(without_circumstances(config)), flat(PAPER)
    changed = [_named(name, value) for name, value in settings.items() if name not in named and value != usual[name]]
    return "-".join(
        [config.data.dataset, labels, config.optimizer.method, config.network.model, *changed, f"seed{config.seed}"]
    )


def _named(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else f"no_{name}"
    return f"{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
