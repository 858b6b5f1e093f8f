"""The paper's presets: every published number is one cell, runs are shared, parts are disjoint; carrying them out."""

import csv
import dataclasses
import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest

from examples.noisy_images import cli, data, files, models
from examples.noisy_images import config as configuration
from examples.noisy_images.config import PAPER, Circumstances, replace, run_name
from examples.noisy_images.errors import Interrupted, UserError
from examples.noisy_images.paper import presets, runs
from examples.noisy_images.paper.presets import ALL, FULL, Scale, Selection
from examples.noisy_images.paper.runs import State, under
from examples.noisy_images.training import epochs, methods, preparation, run, timing

HERE = presets.CIRCUMSTANCES


def rows():
    text = presets.PUBLISHED.read_text().splitlines()
    return list(csv.DictReader(line for line in text if not line.startswith("#")))


def names_of(preset, *arguments):
    return {run_name(cell.config) for cell in presets.cells(preset, *arguments)}


# --- the published numbers ----------------------------------------------------------------------------------------


def test_the_published_table_is_whole():
    assert len(rows()) == 142
    assert "arXiv:2411.17132" in presets.PUBLISHED.read_text()
    headlines = [
        row["test_accuracy_percent"]
        for row in rows()
        if (row["table"], row["noise"], row["rate_percent"]) == ("1", "symmetric", "50")
    ]
    assert [float(number) for number in headlines] == [88.82, 90.60, 61.17, 66.34]
    # The text around Table 5 has 72.57 and 70.86 in place of two numbers of the table.
    numbers = {float(row["test_accuracy_percent"]) for row in rows()}
    assert {72.1, 71.19} <= numbers and not {72.57, 70.86} & numbers


def is_cell_of(config, row):
    """Whether a configuration is what a row of the published table says, told field by field."""
    noise = {"dependent": "instance"}.get(row["noise"], row["noise"])
    model = {"wrn40_2": "wrn_40_2", "wrn28_10": "wrn_28_10"}.get(row["model"], row["model"])
    if row["dataset"] == "mini_webvision":
        noise, model = "none", "resnet18_imagenet"
    kind, _, number = row["setting"].partition("=")
    rho = float(number) if kind == "rho" else 0.1
    return (
        (config.data.dataset, config.labels.noise, config.network.model) == (row["dataset"], noise, model)
        and (noise in ("none", "real") or config.labels.rate == pytest.approx(float(row["rate_percent"]) / 100))
        and config.optimizer.method == row["method"]
        and (0.1 if config.optimizer.rho is None else config.optimizer.rho) == rho
        and config.training.companion == ("none" if kind in ("", "rho", "plain") else kind)
        and (config.network.width, config.data.subset, config.data.test_subset, config.data.augment)
        == (1.0, None, None, True)
    )


def test_every_published_number_is_that_of_one_cell():
    cells = [(name, cell) for name in presets.TABLES for cell in presets.cells(name)]
    assert len(cells) == len(rows())
    for row in rows():
        fitting = [cell for name, cell in cells if name == f"table{row['table']}" and is_cell_of(cell.config, row)]
        assert len(fitting) == 1, row
        assert fitting[0].published.mean == float(row["test_accuracy_percent"])
        assert fitting[0].published.std == (float(row["std"]) if row["std"] else None)


def test_every_name_exists():
    for name in presets.NAMES:
        for cell in presets.cells(name):
            configuration.check(cell.config)
            assert cell.config.optimizer.method in methods.METHODS and cell.config.network.model in models.MODELS
            assert cell.config.data.dataset in data.names()


# --- runs that presets share --------------------------------------------------------------------------------------


def test_equal_runs_have_one_folder_and_no_others_do():
    scales = (FULL, Scale(epochs=30, subset=2000), Scale(width=0.5), Scale(augment=False, precision="tf32"))
    configs = {
        replace(cell.run(seed), analyse_batches=0)
        for name, scale, seed in itertools.product(presets.NAMES, scales, (0, 1))
        for cell in presets.cells(name, ALL, scale)
    }
    assert len({run_name(config) for config in configs}) == len(configs)


def test_presets_share_runs():
    table1, table5, table7 = (names_of(f"table{n}") for n in (1, 5, 7))
    quarter = Selection(rates=(0.25,))
    plain = {"cifar10-symmetric0.25-sam-resnet18-seed0", "cifar10-symmetric0.25-saner-resnet18-seed0"}
    assert names_of("table5", Selection(settings=("rho=0.10",), dataset=("cifar10",))) == plain
    assert plain < table1 and plain < table7 and plain < names_of("figure1") and plain < names_of("figure3")
    assert names_of("table7", Selection(settings=("plain",))) <= table1
    assert len(table1 & table5) == 4 and len(table1 & table7) == 8
    assert names_of("figure5") < names_of("table4") and names_of("figure6") < names_of("figure4")
    assert names_of("figure7") < names_of("table3") and names_of("figure1") - plain < names_of("figure2", quarter)
    # A run of a figure is told the published number of the table that has it.
    assert [cell.published for cell in presets.cells("figure1")] == [None, (93.05, 0.17), (94.08, 0.11)]


def test_what_a_preset_analyses_is_analysed_in_every_preset_that_shares_the_run(tmp_path):
    of = {}
    for name in presets.NAMES:
        for cell in presets.cells(name):
            assert of.setdefault(run_name(cell.config), cell.config) == cell.config
    for name in ("figure2", "ablations"):
        assert {of[other].circumstances.analyse_batches for other in names_of(name)} == {8}
    assert {
        cell.config.circumstances.analyse_batches for name in ("table2", "table4") for cell in presets.cells(name)
    } == {0}
    # No more than there are, or than asked for.
    small = presets.cells("figure2", ALL, Scale(subset=600))[0].config
    full = of["cifar10-symmetric0.5-sam-resnet18-seed0"]
    assert tuple(under(HERE, config).circumstances.analyse_batches for config in (small, full)) == (
        4,
        8,
    )
    assert under(Circumstances(analyse_batches=1), small).circumstances.analyse_batches == 1


def test_protocols_of_other_data_sets():
    for cell in presets.cells("table2"):
        config = cell.config
        if config.data.dataset == "tiny_imagenet":
            assert (config.training.epochs, config.optimizer.learning_rate_drops, config.labels.rate) == (
                100,
                (0.4, 0.8),
                0.25,
            )
        else:
            drops = [config.training.epochs * drop for drop in config.optimizer.learning_rate_drops]
            assert (config.training.epochs, drops, config.optimizer.alpha_ramp, config.labels.noise) == (
                120,
                [60, 90],
                0,
                "none",
            )


def test_figures():
    alphas = [
        (cell.config.optimizer.method, cell.config.optimizer.alpha, cell.setting) for cell in presets.cells("figure3")
    ]
    assert alphas == [
        ("saner", -0.5, "alpha=-0.5"),
        ("saner", -0.25, "alpha=-0.25"),
        ("sam", 0.5, "alpha=0"),
        ("saner", 0.25, "alpha=0.25"),
        ("saner", 0.5, "alpha=0.5"),
    ]
    four = [cell.config for cell in presets.cells("figure4", Selection(methods=("saner",)))]
    assert [(c.network.width, c.data.subset) for c in four] == [
        *((1, None), (1.5, None), (2, None)),
        *((1, 5000), (1, 12500), (1, 25000)),
    ]
    small = [c.config for c in presets.cells("figure4", Selection(methods=("sgd",)), Scale(subset=2000, width=0.5))]
    assert [(c.network.width, c.data.subset) for c in small] == [
        (0.5, 2000),
        (0.75, 2000),
        (1, 2000),
        *((0.5, n) for n in (200, 500, 1000)),
    ]
    # Drawn on other data and at other rates than the paper's.
    other = presets.cells("figure1", Selection(dataset=("digits", "cifar100"), rates=(0.1, 0.5)))
    assert [(c.config.data.dataset, c.config.labels.rate, c.config.optimizer.method) for c in other] == list(
        itertools.product(("digits", "cifar100"), (0.1, 0.5), ("sgd", "sam", "saner"))
    )
    assert {cell.published for cell in other if cell.config.data.dataset == "digits"} == {None}


# --- parts and scales ---------------------------------------------------------------------------------------------


def test_titles_say_what_is_shrunken():
    assert presets.described("table1") == "Table 1: four kinds of label noise"
    scale = Scale(
        epochs=30, model="small_cnn", width=0.5, subset=2000, test_subset=1000, augment=False, precision="tf32"
    )
    assert presets.described("table6", ALL, scale) == (
        "Table 6: without label noise (shrunken: 30 epochs, small_cnn, width times 0.5, 2,000 training images, "
        "1,000 test images, no augmentation, tf32)"
    )
    # What the paper does is not shrunken; what shrinks one of the cells is.
    assert "shrunken" not in presets.described("table1", ALL, Scale(epochs=200, width=1.0, model="resnet18"))
    assert presets.described("table2", ALL, Scale(epochs=100)).endswith("(shrunken: 100 epochs)")
    for option, value in dataclasses.asdict(scale).items():
        assert "shrunken" in presets.described("figure2", ALL, Scale(**{option: value})), option


@pytest.mark.parametrize(
    ("selection", "count"),
    [
        (Selection(), 28),
        (Selection(dataset=("cifar10",)), 14),
        (Selection(rates=(0.5,)), 12),
        (Selection(noises=("real",)), 4),
        (Selection(noises=("symmetric", "instance"), rates=(0.25,), methods=("saner",), dataset=("cifar100",)), 2),
    ],
)
def test_a_part_of_a_preset(selection, count):
    assert len(presets.cells("table1", selection)) == count


@pytest.mark.parametrize(
    ("name", "selection", "scale", "message"),
    [
        ("table8", ALL, FULL, "unknown preset 'table8': did you mean 'table"),
        ("table1", Selection(dataset=("digits",)), FULL, "unknown value of --dataset 'digits'.*cifar10, cifar100"),
        ("table1", Selection(rates=(0.2,)), FULL, r"unknown value of --rates '0.2'.*0.25, 0.5"),
        ("table1", Selection(methods=("sgd",)), FULL, "unknown value of --methods 'sgd'.*sam, saner"),
        ("table5", Selection(settings=("rho=0.1",)), FULL, "unknown value of --settings 'rho=0.1': did you mean"),
        ("table3", ALL, Scale(model="small_cnn"), r"several cells of table3 are one run \(cifar100-.*--models"),
        ("figure4", Selection(dataset=("npz",)), FULL, "shares of the training set of 'npz' need --subset"),
    ],
)
def test_impossible_presets(name, selection, scale, message):
    with pytest.raises(UserError, match=message):
        presets.cells(name, selection, scale)


def test_a_network_in_place_of_the_papers():
    cells = presets.cells("table3", Selection(models=("resnet34",)), Scale(model="small_cnn"))
    assert {cell.config.network.model for cell in cells} == {"small_cnn"} and len(cells) == 6


@pytest.mark.parametrize("name", presets.NAMES)
def test_shards_are_disjoint_complete_and_balanced(name):
    configs = runs.runs(presets.cells(name), (0, 1, 2))
    for count in (1, 2, 3, 7, len(configs) + 1):
        parts = [runs.part_of(configs, f"{index}/{count}") for index in range(1, count + 1)]
        assert sorted(run_name(c) for part in parts for c in part) == sorted(map(run_name, configs))
        costs = [sum(map(runs._relative_cost, part)) for part in parts]
        assert max(costs) - min(costs) <= max(map(runs._relative_cost, configs)) * (1 + 1e-9)
    assert runs.part_of(configs, "1/1") == configs


@pytest.mark.parametrize("shard", ["0/2", "3/2", "2", "1/0", "a/b", "-1/2", "1/2/3"])
def test_impossible_shards(shard):
    with pytest.raises(UserError, match=f"--shard must be i/n .* got '{shard}'"):
        runs.part_of([PAPER], shard)


def test_seeds_come_whole():
    configs = runs.runs(presets.cells("figure1"), (3, 1))
    assert [(c.seed, c.optimizer.method) for c in configs] == list(itertools.product((3, 1), ("sgd", "sam", "saner")))
    with pytest.raises(UserError, match="--seeds must be different numbers"):
        runs.runs(presets.cells("figure1"), (1, 1))


def test_files_of_human_labels(tmp_path):
    real = [
        presets.cells("table1", Selection(noises=("real",), dataset=(name,)))[0].config
        for name in ("cifar10", "cifar100")
    ]
    in_folder = [under(Circumstances(human_labels=str(tmp_path)), config) for config in real]
    assert [c.circumstances.human_labels for c in in_folder] == [
        str(tmp_path / f"CIFAR-{n}_human.pt") for n in (10, 100)
    ]
    assert under(Circumstances(human_labels=str(tmp_path / "a.pt")), real[0]).circumstances.human_labels == str(
        tmp_path / "a.pt"
    )
    assert under(Circumstances(human_labels=str(tmp_path)), PAPER).circumstances.human_labels is None
    with pytest.raises(UserError, match="real noise needs --human-labels"):
        under(HERE, real[0])


# --- carrying out -------------------------------------------------------------------------------------------------

PART = Selection(dataset=("npz",), seeds=(0, 4))
TINY = Scale(epochs=2, model="mlp", width=1 / 64)


@pytest.fixture
def done(monkeypatch, tmp_path):
    """Runs that are carried out at once: their folders are complete, and their configurations are collected."""
    made = []

    def at_once(config, folder):
        made.append(config)
        complete(config, folder)

    monkeypatch.setattr(run, "run_one", at_once)
    return made


def complete(config, folder):
    files.write_json(folder / "config.json", configuration.to_json(config))
    files.write_json(folder / "summary.json", {})


def cut_off(config, folder, epochs):
    files.write_json(folder / "config.json", configuration.to_json(config))
    files.write_json_lines(folder / "metrics.jsonl", [{"epoch": epoch + 1} for epoch in range(epochs)])


def test_what_is_missing_is_run_and_what_is_complete_is_left(done, capsys, tmp_path):
    first, second, *others = (under(HERE, config) for config in runs.runs(presets.cells("figure1", PART, TINY), (0, 4)))
    complete(first, tmp_path / run_name(first))
    cut_off(second, tmp_path / run_name(second), 1)
    assert [runs.state(c, tmp_path / run_name(c)) for c in (first, second, others[0])] == list(State)
    runs.carry_out("figure1", PART, TINY, HERE, tmp_path, estimate=False, dry_run=True)
    assert done == []
    text = capsys.readouterr().out
    assert "(shrunken: 2 epochs, mlp, width times 0.015625)" in text
    assert "6 runs in" in text and "1 complete, 1 cut off, 4 missing" in text
    assert len(re.findall(r"^  (complete|cut off|missing) +npz-symmetric0.25", text, re.MULTILINE)) == 6
    runs.carry_out("figure1", PART, TINY, HERE, tmp_path, estimate=False)
    assert done == [second, *others]
    # Run again, and elsewhere: the same runs, wherever the data is.
    runs.carry_out("figure1", PART, TINY, Circumstances(data_dir="elsewhere", evaluate_every=5), tmp_path)
    assert len(done) == 5


def test_processes_with_parts_of_a_preset_do_it_all(done, tmp_path):
    for index in (2, 1, 3):
        runs.carry_out("figure3", PART, TINY, HERE, tmp_path, shard=f"{index}/3", estimate=False)
    assert sorted(map(run_name, done)) == sorted(map(run_name, runs.runs(presets.cells("figure3", PART, TINY), (0, 4))))


def test_a_run_of_another_configuration_is_found_before_anything_is_trained(done, tmp_path):
    config = presets.cells("figure1", PART, TINY)[1].run(4)
    complete(replace(config, weight_decay=0.0), tmp_path / run_name(config))
    with pytest.raises(UserError, match=r"already holds a run of another configuration \(weight_decay"):
        runs.carry_out("figure1", PART, TINY, HERE, tmp_path, estimate=False)
    with pytest.raises(UserError, match="--epochs must be at least 1, got 0"):
        runs.carry_out("figure1", PART, Scale(epochs=0), HERE, tmp_path)
    assert done == []


def test_a_run_that_fails_does_not_stop_the_others(done, monkeypatch, capsys, tmp_path):
    at_once = run.run_one

    def diverges(config, folder):
        if config.optimizer.method == "sam":
            raise UserError(f"the loss became non-finite from seed {config.seed}.")
        at_once(config, folder)

    monkeypatch.setattr(run, "run_one", diverges)
    with pytest.raises(SystemExit) as exit:
        options = "--dataset npz --seeds 0 4 --epochs 2 --model mlp --width 0.015625 --no-estimate"
        cli.main(["paper", "figure1", *options.split(), "--out", str(tmp_path)])
    assert exit.value.code == 2
    assert [(c.optimizer.method, c.seed) for c in done] == [("sgd", 0), ("saner", 0), ("sgd", 4), ("saner", 4)]
    error = capsys.readouterr().err
    assert error.startswith("error: 2 of 6 runs did not end: npz-symmetric0.25-sam-mlp")
    assert "from seed 0" in error and "from seed 4" in error


@pytest.mark.parametrize("error", [epochs.Interrupted("runs/x", 7), KeyboardInterrupt()])
def test_an_interruption_ends_the_preset_and_says_how_to_go_on(error, monkeypatch, tmp_path):
    begun = []

    def stopped(config, folder):
        begun.append(config)
        raise error

    monkeypatch.setattr(run, "run_one", stopped)
    monkeypatch.setattr("sys.argv", ["__main__.py", "paper", "figure1", "--out", "a b"])
    with pytest.raises(Interrupted, match=r"go on with the same command: python -m .* paper figure1 --out 'a b'$"):
        runs.carry_out("figure1", PART, TINY, HERE, tmp_path, estimate=False)
    assert len(begun) == 1


def test_how_long_it_takes(monkeypatch, capsys, done, tmp_path):
    timed = []

    def seconds(prepared):
        timed.append(prepared.config)
        return {"sgd": 100.0}.get(prepared.config.optimizer.method, 210.0)

    monkeypatch.setattr(timing, "seconds_per_epoch", seconds)
    monkeypatch.setattr(preparation, "prepare", lambda config: SimpleNamespace(config=config))
    configs = [under(HERE, config) for config in runs.runs(presets.cells("figure1", PART, TINY), (0, 4))]
    cut_off(configs[1], tmp_path / run_name(configs[1]), 1)
    complete(configs[2], tmp_path / run_name(configs[2]))
    runs.carry_out("figure1", PART, TINY, HERE, tmp_path, dry_run=True)
    # Once for each kind; SGD twice two epochs, SAM once one and once two, SANER once two.
    assert [c.optimizer.method for c in timed] == ["sgd", "sam"]
    assert f"about {timing.duration(4 * 100 + 5 * 210)} on this device, estimated" in capsys.readouterr().out
    # A companion and another network are kinds of their own.
    timed.clear()
    selection = Selection(dataset=("cifar10",), rates=(0.25,), seeds=(0,))
    runs.carry_out("table7", selection, FULL, HERE, tmp_path, dry_run=True)
    runs.carry_out("figure7", Selection(seeds=(0,)), FULL, HERE, tmp_path, dry_run=True)
    assert len(timed) == 3 + 4 * 2
    # So is every distance between second gradients, which says how many passes a step has.
    timed.clear()
    capsys.readouterr()
    runs.carry_out("every", Selection(seeds=(0,)), FULL, HERE, tmp_path, dry_run=True)
    assert [(c.optimizer.method, c.optimizer.every) for c in timed] == [
        ("sgd", 1), ("sam", 1), ("sam", 2), ("sam", 5), ("sam", 10)
    ]  # fmt: skip
    printed = capsys.readouterr().out
    for passes in ("one pass", "two passes", "1.5 passes", "1.2 passes", "1.1 passes"):
        assert f"digits, mlp, {passes} a step" in printed


@pytest.mark.parametrize(("every", "steps"), [(1, 3.0), (2, (3 + 1) / 2), (5, (3 + 4) / 5), (30, (3 + 29) / 30)])
def test_steps_with_and_without_a_second_gradient_are_timed_apart(every, steps, monkeypatch):
    """The first of each kind, which is compiled, does not count; an epoch has its share of both."""

    class Fake:
        state, steps_per_epoch, step, now = None, 10, 0, 0.0

        def train_epoch(self):
            for _ in range(self.steps_per_epoch):
                is_compiled = self.step < min(every, 2)
                self.now += 1000 if is_compiled else 3 if self.step % every == 0 else 1
                self.step += 1
                yield self.step

        def evaluate(self, split):
            pass

    class Split(list):
        def take(self, positions):
            return self

    fake = Fake()
    monkeypatch.setattr(timing, "Trainer", lambda config, dataset: fake)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: fake.now)
    config = replace(configuration.DIGITS, every=every)
    prepared = SimpleNamespace(config=config, dataset=SimpleNamespace(train=Split([0]), test=()))
    assert timing.seconds_per_epoch(prepared) == pytest.approx(10 * steps)


# --- keeping to a time --------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that only runs when told to, and runs that take their estimate, or some multiple of it."""

    class Fake:
        now, factor = 1000.0, 1.0

        def monotonic(self):
            return self.now

    fake = Fake()
    monkeypatch.setattr(runs, "time", fake)
    seconds = {"sgd": 100.0}
    monkeypatch.setattr(preparation, "prepare", lambda config: config)
    monkeypatch.setattr(timing, "seconds_per_epoch", lambda config: seconds.get(config.optimizer.method, 200.0))
    begun = []

    def take(config, folder):
        begun.append(config)
        fake.now += fake.factor * config.training.epochs * seconds.get(config.optimizer.method, 200.0)

    monkeypatch.setattr(run, "run_one", take)
    fake.begun = begun
    return fake


TEN = Scale(epochs=10)
HUMAN = Circumstances(human_labels="labels")


def told(configs):
    return [(c.labels.noise, c.seed, c.optimizer.method) for c in configs]


def test_those_first_that_tell_most():
    scale = Scale(precision="tf32", epochs=10)
    configs = runs.runs(presets.cells("table1", ALL, scale), (0, 1))
    ordered = runs.by_value(configs, scale)
    assert sorted(map(run_name, ordered)) == sorted(map(run_name, configs))
    assert told(ordered[:8]) == [
        (noise, seed, method) for seed in (0, 1) for noise in ("symmetric", "real") for method in ("saner", "sam")
    ]
    assert {(c.data.dataset, c.labels.rate) for c in ordered[:2]} == {("cifar10", 0.5)}
    # The rest in the preset's order, whole seeds.
    rest = ordered[8:]
    assert rest == [c for c in configs if c in rest]
    headline = runs.runs(presets.cells("headline", ALL, scale), (0, 1, 2))
    assert runs.by_value(headline[::-1], scale) == headline


def test_as_many_whole_runs_as_fit_the_time(clock, capsys, tmp_path):
    # SANER and SAM take 2,000 s each and a tenth for what is not counted, SGD half: 4,300 s are enough for two of them,
    # not for a third, and not for an SGD.
    runs.carry_out("headline", ALL, TEN, HUMAN, tmp_path, minutes=4300 / 60)
    assert told(clock.begun) == [("symmetric", 0, "saner"), ("symmetric", 0, "sam")]
    text = capsys.readouterr().out
    first = f"[3/18] {run_name(presets.cells('headline', ALL, TEN)[2].run(0))} does not fit: 18 min of 5 min"
    assert first in text and "16 runs left for another time" in text


def test_what_is_too_long_is_passed_over_for_what_fits(clock, capsys, tmp_path):
    runs.carry_out("headline", Selection(seeds=(0,)), TEN, HUMAN, tmp_path, minutes=1200 / 60)
    assert told(clock.begun) == [("symmetric", 0, "sgd")]
    # Nothing is begun that cannot end.
    assert clock.now <= 1000 + 1200
    assert capsys.readouterr().out.count("does not fit") == 5


def test_estimates_are_corrected_by_the_runs_that_ended(clock, capsys, tmp_path):
    clock.factor = 1.5
    # By the first estimates three of 2,000 s would fit; by what the first took, two.
    runs.carry_out("headline", Selection(methods=("saner", "sam")), TEN, HUMAN, tmp_path, minutes=7000 / 60)
    assert len(clock.begun) == 2 and clock.now <= 1000 + 7000


def test_a_plan_without_running(clock, capsys, tmp_path):
    runs.carry_out("headline", Selection(seeds=(0,)), TEN, HUMAN, tmp_path, minutes=5500 / 60, dry_run=True)
    assert clock.begun == []
    names = [run_name(cell.run(0)) for cell in presets.cells("headline", ALL, TEN)[:3]]
    assert f"3 of 6 runs fit 91.6667 minutes: {', '.join(names)}" in capsys.readouterr().out


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan"), float("inf")])
def test_times_that_cannot_be(minutes, tmp_path):
    with pytest.raises(UserError, match="--minutes must be a positive number"):
        runs.carry_out("figure1", PART, TINY, HERE, tmp_path, minutes=minutes)


def test_a_time_needs_an_estimate(done, tmp_path):
    with pytest.raises(UserError, match="--minutes needs the estimate"):
        runs.carry_out("figure1", PART, TINY, HERE, tmp_path, minutes=5.0, estimate=False)
    assert done == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.123, "0.12 s"), (59, "59 s"), (61, "1 min"), (3599, "1 h 0 min"), (90_000, "25 h 0 min")]
)
def test_durations(seconds, text):
    assert timing.duration(seconds) == text


@pytest.mark.slow
def test_a_preset_from_end_to_end(npz, tmp_path, capsys, monkeypatch):
    """Train a part of a shrunken figure on data of one's own, lose the end of a run, and make the report."""
    monkeypatch.setattr(run, "_optional", lambda write: None)
    options = "figure1 --dataset npz --methods sgd --epochs 2 --model mlp --width 0.015625 --seeds 0 1"
    options = [*options.split(), "--out", str(tmp_path)]
    data_dir = ["--data-dir", str(npz(train=256, wrong=0)), "--analyse-batches", "1"]
    cli.main(["paper", *options, *data_dir])
    assert re.search(r"about \d.* on this device, estimated from a few steps", capsys.readouterr().out)
    folders = sorted(tmp_path.iterdir())
    assert [path.name for path in folders] == [
        f"npz-symmetric0.25-sgd-mlp-width=0.015625-epochs=2-seed{seed}" for seed in (0, 1)
    ]
    ends = [(path / "summary.json").read_text() for path in folders]
    (folders[1] / "summary.json").unlink()
    cli.main(["paper", *options, *data_dir, "--no-estimate"])
    assert "1 complete, 1 cut off, 0 missing" in capsys.readouterr().out
    assert [(path / "summary.json").read_text() for path in folders] == ends
    cli.main(["report", *options])
    report = (tmp_path / "reports" / "figure1-npz-sgd-2_epochs-mlp-width_times_0.015625.md").read_text()
    assert report.startswith(
        "# Figure 1: memorization and test accuracy (shrunken: 2 epochs, mlp, width times 0.015625)\n"
    )
    histories = [files.read_json_lines(path / "metrics.jsonl") for path in folders]
    best = [100 * max(record["test_accuracy"] for record in history) for history in histories]
    aligned = [history[-1]["alignment_noisy"] for history in histories]
    assert f" {np.mean(aligned):.3f} ± {np.std(aligned, ddof=1):.3f} |" in report
    assert f"| SGD |  | {np.mean(best):.2f} ± {np.std(best, ddof=1):.2f} | 2 |" in report


def test_a_protocol_without_augmentation_stays_without_at_every_scale():
    for scale in (Scale(), Scale(epochs=2), Scale(augment=False)):
        assert not any(cell.config.data.augment for cell in presets.cells("memorization", scale=scale))
    assert all(cell.config.data.augment for cell in presets.cells("headline"))
    assert not any(cell.config.data.augment for cell in presets.cells("headline", scale=Scale(augment=False)))
