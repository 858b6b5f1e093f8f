"""A run that is gone on with, measured or ranked later: its data may lie elsewhere, and must still be its data."""

import multiprocessing
import shutil

import numpy as np
import pytest

from examples.noisy_images import cli, files
from examples.noisy_images import config as configuration
from examples.noisy_images.config import Whereabouts, configure, replace
from examples.noisy_images.errors import UserError
from examples.noisy_images.suspects import cross_validation
from examples.noisy_images.training import run

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def config(npz, tmp_path):
    path = shutil.copy(npz(), tmp_path / "data.npz")
    return configure(
        **{"dataset": "npz", "data_dir": str(path), "noise": "none", "model": "mlp", "width": 1 / 64},
        **{"method": "sgd", "batch_size": 8, "epochs": 2},
    )


def change(path, **arrays):
    with np.load(path) as archive:
        kept = {name: archive[name] for name in archive.files}
    np.savez(path, **{name: arrays.get(name, lambda x: x)(values) for name, values in kept.items()})


def one_pixel(images):
    images = images.copy()
    images[5, 2, 3, 0] ^= 1
    return images


def one_label(labels):
    return np.where(np.arange(len(labels)) == 3, (labels + 1) % 3, labels)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"images": one_pixel}, r"1 sample is changed \(5\) in the train set"),
        ({"labels": one_label}, r"1 sample is labelled otherwise \(3\) in the train set"),
        ({"test_images": one_pixel}, r"1 sample is changed \(5\) in the test set"),
        ({name: lambda x: x[:-1] for name in ("images", "labels", "clean_labels")}, r"1 sample is gone \(23\)"),
        ({name: lambda x: x[::-1] for name in ("images", "labels", "clean_labels")}, r"samples are changed"),
    ],
)
def test_data_that_has_changed_is_refused_by_all_that_read_it_again(config, tmp_path, arrays, said):
    folder = tmp_path / "run"
    run.train(config, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    change(tmp_path / "data.npz", **arrays)
    for again in (run.resume, run.evaluate, run.restored, lambda folder: cross_validation.out_of_sample(folder, 3)):
        with pytest.raises(UserError, match=rf"the data is not that of the run: .*{said}") as error:
            again(folder)
        assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_data_that_has_moved_is_found_where_it_is_said_to_be(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A relative path is found from everywhere.
    run.train(replace(config, data_dir="data.npz"), tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    measured = run.evaluate(tmp_path / "run")
    shutil.move(tmp_path / "data.npz", tmp_path / "moved.npz")
    with pytest.raises(UserError, match=r"data\.npz' does not exist"):
        run.evaluate(tmp_path / "run")
    moved = Whereabouts(data_dir=tmp_path / "moved.npz", workers=0)
    assert run.evaluate(tmp_path / "run", whereabouts=moved) == measured
    # Once gone on with there, it is looked for there.
    run.resume(tmp_path / "run", whereabouts=moved)
    assert configuration.read(tmp_path / "run" / "config.json").circumstances.workers == 0
    assert run.evaluate(tmp_path / "run") == measured


def moved_after_an_interruption(config, folder, tmp_path):
    """Cut a run off before its summary, and move its data; return where the data is now."""
    (folder / "summary.json").unlink()
    return str(shutil.move(tmp_path / "data.npz", tmp_path / "moved.npz"))


def test_what_is_cut_off_goes_on_where_the_same_command_finds_its_files(config, tmp_path):
    summary = run.run_one(config, tmp_path / "run")
    there = moved_after_an_interruption(config, tmp_path / "run", tmp_path)
    again = run.run_one(replace(config, data_dir=there), tmp_path / "run")
    assert again["last_test_accuracy"] == summary["last_test_accuracy"]
    assert configuration.read(tmp_path / "run" / "config.json").circumstances.data_dir == there


def test_folds_go_on_where_the_data_is_now(config, tmp_path):
    run.train(config, tmp_path / "run")
    before = cross_validation.out_of_sample(tmp_path / "run", 3)
    there = moved_after_an_interruption(config, tmp_path / "run" / "cross-validation-3" / "fold-1", tmp_path)
    after = cross_validation.out_of_sample(tmp_path / "run", 3, Whereabouts(data_dir=there))
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("name", ["caf\udce9", "a\\b"])
def test_a_folder_that_checkpoints_cannot_lie_in_is_refused_before_the_work(config, tmp_path, name):
    with pytest.raises(UserError, match="checkpoints cannot be kept in the folder") as error:
        run.train(config, tmp_path / name / "run")
    assert str(error.value).encode() and list(tmp_path.iterdir()) == [tmp_path / "data.npz"]
    run.train(config, tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / name)
    for again in (run.resume, run.evaluate):
        with pytest.raises(UserError, match="checkpoints cannot be kept in the folder"):
            again(tmp_path / name)


def test_another_data_set_in_the_same_place_is_refused_where_it_is_said_to_be(config, npz, tmp_path):
    run.train(config, tmp_path / "run")
    other = Whereabouts(data_dir=npz(train=30))
    with pytest.raises(UserError, match="6 samples are new"):
        run.resume(tmp_path / "run", whereabouts=other)


def test_a_run_of_an_earlier_version_kept_no_record_of_its_samples(config, tmp_path):
    run.train(config, tmp_path / "run")
    measured = run.evaluate(tmp_path / "run")
    (tmp_path / "run" / "data.json").unlink()
    assert run.evaluate(tmp_path / "run") == measured
    (tmp_path / "run" / "data.json").write_text("{")
    with pytest.raises(UserError, match=r"data.json is not valid JSON"):
        run.evaluate(tmp_path / "run")


@pytest.mark.parametrize("section, setting", [("training", "epochs"), ("network", "model")])
def test_what_was_left_to_the_data_is_decided_by_it_again(config, tmp_path, section, setting):
    folder = tmp_path / "run"
    run.train(config, folder)
    values = files.read_json(folder / "config.json")
    values[section][setting] = None if setting == "epochs" else "auto"
    files.write_json(folder / "config.json", values)
    with pytest.raises(UserError, match=r"belongs to another configuration \((epochs|batch_size): .* here"):
        run.resume(folder)


@pytest.mark.parametrize("kept", [(), (1,), (2,), (2, 1), ("x", 2)])
def test_a_run_whose_records_lack_epochs_is_neither_gone_on_with_nor_summed_up(config, tmp_path, kept):
    folder = tmp_path / "run"
    run.train(config, folder)
    lines = dict(enumerate((folder / "metrics.jsonl").read_text().splitlines(keepends=True), start=1)) | {"x": "?\n"}
    (folder / "metrics.jsonl").write_text("".join(lines[line] for line in kept))
    (folder / "summary.json").unlink()
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl (holds \d of the 2 epochs|is damaged)"):
        run.resume(folder)
    assert (folder / "metrics.jsonl").read_bytes() == before and not (folder / "summary.json").exists()


def _hold(folder, held, release):
    with files.locked(folder):
        held.set()
        release.wait(60)


def test_two_processes_do_not_work_in_one_folder_and_a_dead_one_holds_nothing(config, tmp_path):
    folder = tmp_path / "run"
    run.train(config, folder)
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(folder, held, release))
    process.start()
    assert held.wait(60)
    try:
        with pytest.raises(UserError, match=r"another process is training in .*run: wait until it ends"):
            run.resume(folder)
        # Looking at it changes nothing.
        run.evaluate(folder)
    finally:
        process.kill()
        process.join()
    run.resume(folder)


def test_several_seeds_go_on_by_the_same_command(config, tmp_path, monkeypatch, capsys):
    options = ["train", "--protocol", "paper", "--dataset", "npz", "--data-dir", config.circumstances.data_dir]
    options += "--noise none --model mlp --width 0.02 --method sgd --batch-size 8 --epochs 2 --seeds 1 2".split()
    options += ["--name", "x", "--out", str(tmp_path)]
    trained = []
    complete = run.train_to_the_end

    def interrupted_once(trainer, *arguments):
        trained.append(trainer.config.seed)
        if trained == [1, 2]:
            raise KeyboardInterrupt
        return complete(trainer, *arguments)

    monkeypatch.setattr(run, "train_to_the_end", interrupted_once)
    with pytest.raises(SystemExit):
        cli.main(options)
    cli.main(options)
    assert trained == [1, 2, 2]
    assert all((tmp_path / f"x-seed{seed}" / "summary.json").exists() for seed in (1, 2))
