"""The benchmark of the loader of streamed images."""

import json

import pytest

from benchmarks import loader


def test_it_measures_every_number_of_workers(tmp_path, capsys):
    output = tmp_path / "loader.json"
    options = "--workers 0 1 --images 12 --batch-size 4 --image-size 32 --rounds 1"
    loader.main([*options.split(), "--output", str(output)])
    results = json.loads(output.read_text())
    assert set(results["workers"]) == {"0", "1"}
    assert all(measured["images_per_s"]["median"] > 0 for measured in results["workers"].values())
    printed = capsys.readouterr().out
    assert "| 1 | " in printed and "12 JPEGs of 500x375" in printed


def test_a_pass_delivers_all_batches_but_the_short_one(tmp_path):
    split = loader.photographs(tmp_path, 11)
    assert {split.images[i].shape for i in range(11)} == {(375, 500, 3)}
    assert min(loader.pass_over(split, 0, 4, 32, epoch=0)) > 0


def test_what_a_device_takes():
    """Twelve FLOPs for each multiplication of a forward pass: two passes of three, two FLOPs each."""
    args = loader.parse("--device-tflops 21.6 --workers 0 --images 8 --batch-size 2 --rounds 1".split())
    results = loader.measure(args, loader.timing.Budget())
    assert results["device"]["images_per_s"] == pytest.approx(21.6e12 / (12 * 1.8e9))


@pytest.mark.parametrize("options", ["--workers -1", "--images 10 --batch-size 8"])
def test_wrong_options_are_refused(options, capsys):
    with pytest.raises(SystemExit):
        loader.parse(options.split())
    assert "must be at least 0" in (text := capsys.readouterr().err) or "less than two batches" in text
