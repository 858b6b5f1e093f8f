"""Figures: what is in them, and that a file is complete or absent."""

import subprocess
import sys
import warnings

import matplotlib.collections
import matplotlib.text
import numpy as np
import pytest
from PIL import Image

from examples.noisy_images.errors import UserError
from examples.noisy_images.measures import plots


def run(seed, epochs=6, every=1, known=True):
    """Return metrics as a run has them: test metrics at every epoch, training ones every few, clean ones if known."""
    rng = np.random.default_rng(seed)
    rows = []
    for epoch in range(1, epochs + 1):
        row = {"epoch": epoch, "running_loss": rng.random(), "test_accuracy": rng.random()}
        if epoch % every == 0:
            row |= {"train_accuracy": rng.random(), "generalization_gap": rng.random()}
            if known:
                row |= {"noisy_accuracy": rng.random(), "gap": rng.random()}
        rows.append(row)
    return rows


def data_lines(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def bands(axes):
    return [item for item in axes.collections if isinstance(item, matplotlib.collections.PolyCollection)]


def test_lines_are_means_and_bands_one_deviation():
    runs = {"SGD": [run(seed) for seed in range(3)], "SANER": [run(seed) for seed in range(3, 6)]}
    figure = plots.curves_figure(runs)
    assert len(figure.axes) == len(plots.FIGURE_1)
    for axes, metric in zip(figure.axes, plots.FIGURE_1, strict=True):
        assert len(bands(axes)) == 2
        for label, band in zip(runs, bands(axes), strict=True):
            values = 100 * np.array([[row[metric] for row in rows] for rows in runs[label]])
            line = data_lines(axes)[label]
            np.testing.assert_array_equal(line.get_xdata(), np.arange(1, 7))
            np.testing.assert_allclose(line.get_ydata(), values.mean(axis=0))
            edges = band.get_paths()[0].vertices
            for epoch, mean, deviation in zip(
                range(1, 7), values.mean(axis=0), values.std(axis=0, ddof=1), strict=True
            ):
                at = edges[edges[:, 0] == epoch, 1]
                np.testing.assert_allclose([at.min(), at.max()], [mean - deviation, mean + deviation])


def test_a_legend_once_and_styles_that_differ_in_grey():
    runs = {f"alpha = {value}": [run(0)] for value in (-0.5, -0.25, 0, 0.25, 0.5)}
    figure = plots.curves_figure(runs, panels=plots.FIGURES_5_TO_7, title="a title")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(runs)
    assert len(figure.legends) == 1 and not any(axes.get_legend() for axes in figure.axes)
    for axes in figure.axes:
        lines = axes.get_lines()
        # The undrawn pattern of dashes is what tells two lines apart without colour.
        assert len({str(line._unscaled_dash_pattern) for line in lines}) == 5
        assert len({line.get_color() for line in lines}) == 5
        assert axes.get_xlabel() == "epoch" and axes.get_ylabel() and axes.get_title(loc="left")


def test_a_label_looks_the_same_in_every_panel():
    runs = {"own data": [run(0, known=False)], "SAM": [run(1)]}
    noisy, test = plots.curves_figure(runs, panels=("noisy_accuracy", "test_accuracy")).axes
    assert list(data_lines(noisy)) == ["SAM"] and list(data_lines(test)) == ["own data", "SAM"]
    assert data_lines(noisy)["SAM"].get_color() == data_lines(test)["SAM"].get_color()


def test_one_seed_has_no_band():
    figure = plots.curves_figure({"SAM": [run(0)]})
    assert not any(bands(axes) for axes in figure.axes)
    assert figure.legends[0].get_title().get_text() == ""


def test_absent_metrics_are_left_out():
    figure = plots.curves_figure({"SAM": [run(0, known=False)]})
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Test accuracy"]
    with pytest.raises(ValueError, match="grown_share, running_downweighted_share, running_cosine"):
        plots.curves_figure({"SAM": [run(0)]}, panels=plots.SHARES)
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.curves_figure({"SAM": [[]], "SGD": []})


def test_metrics_of_some_epochs_and_values_that_are_no_numbers():
    rows = run(0, epochs=7, every=3)
    rows[1]["test_accuracy"] = float("nan")
    rows[2]["test_accuracy"] = None
    noisy, test = plots.curves_figure({"SAM": [rows]}, panels=("noisy_accuracy", "test_accuracy")).axes
    assert data_lines(noisy)["SAM"].get_xdata().tolist() == [3, 6]
    assert data_lines(test)["SAM"].get_xdata().tolist() == [1, 4, 5, 6, 7]


def test_a_mean_is_over_the_same_seeds_at_every_epoch():
    runs = {"SAM": [run(0, epochs=6), run(1, epochs=4), run(2, epochs=6, known=False)]}
    noisy, test = plots.curves_figure(runs, panels=("noisy_accuracy", "test_accuracy")).axes
    for axes in (noisy, test):
        assert data_lines(axes)["SAM"].get_xdata().tolist() == [1, 2, 3, 4]
    expected = 50 * (runs["SAM"][0][0]["noisy_accuracy"] + runs["SAM"][1][0]["noisy_accuracy"])
    assert data_lines(noisy)["SAM"].get_ydata()[0] == pytest.approx(expected)


def test_only_accuracies_and_shares_are_percentages():
    rows = [{"epoch": 1, "running_loss": 0.5, "downweighted_share": 0.4, "running_cosine": 0.7, "own": 3.0}]
    panels = ("running_loss", "downweighted_share", "running_cosine", "own")
    figure = plots.curves_figure({"SANER": [rows]}, panels=panels)
    values = [axes.get_lines()[0].get_ydata()[0] for axes in figure.axes]
    assert values == pytest.approx([0.5, 40, 0.7, 3.0])
    assert ["%" in axes.get_ylabel() for axes in figure.axes] == [False, True, False, False]


def test_files_are_written(tmp_path):
    runs = {"SAM": [run(seed) for seed in range(2)]}
    plots.curves(runs, tmp_path / "curves.png")
    plots.curves(runs, str(tmp_path / "curves.pdf"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.pdf", "curves.png"]
    with Image.open(tmp_path / "curves.png") as image:
        assert round(image.info["dpi"][0]) == 200
    assert (tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(ValueError, match="neither in"):
        plots.curves(runs, tmp_path / "curves.gif")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")
    figure = plots.curves_figure({"SAM": [run(0)]})

    def fail(temporary, **_):
        temporary.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plots.save(figure, path)
    assert [item.name for item in tmp_path.iterdir()] == ["curves.png"] and path.read_bytes() == b"old"


@pytest.mark.parametrize("count", [3, 20, 100, 200])
def test_transition_figure_names_classes_and_numbers_cells(count):
    transition = 0.6 * np.eye(count) + 0.4 * np.roll(np.eye(count), 1, axis=1)
    names = [f"class {index}" for index in range(count)]
    figure = plots.transition_figure(transition, np.full(count, 0.4), names, "symmetric noise")
    heat = figure.axes[0]
    shown = [text.get_text() for text in heat.get_yticklabels()]
    assert shown == (names if count <= 100 else names[::2])
    assert [text.get_text() for text in heat.get_xticklabels()] == shown
    cells = sorted(text.get_text() for text in heat.texts)
    assert cells == (sorted(["60.0", "40.0"] * count) if count <= 20 else [])


def test_no_global_state_and_no_import_before_use():
    code = (
        "import sys, examples.noisy_images.measures.plots as plots, examples.noisy_images.labels.noise; "
        "assert 'matplotlib' not in sys.modules; "
        "plots.curves_figure({'SAM': [[{'epoch': 1, 'gap': 0.5}]]}); "
        "assert 'matplotlib.pyplot' not in sys.modules and 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


AWKWARD = ["Ba$$in", "cost$$low", "$x_1$", "a $ b", "50$ to 60$", r"\$\frac", "{a}$_^$", "bad\udce9name"]


def shown(figure, tmp_path):
    """Save a figure and return its texts as they are drawn."""
    plots.save(figure, tmp_path / "figure.png")
    drawn = []
    for text in figure.findobj(matplotlib.text.Text):
        words, is_math = text._preprocess_math(text.get_text())
        assert not is_math
        drawn.append(words)
    return drawn


def test_names_are_drawn_as_they_are(tmp_path):
    names = [name.replace("\udce9", r"\udce9") for name in AWKWARD]
    runs = {name: [run(0)] for name in AWKWARD}
    count = len(AWKWARD)
    leaves = [{"epoch": 1, "leaves": {name: {"downweighted": 0.5} for name in AWKWARD}}]
    dots = [plots.Dot(name, (80.0, None), (81.0, 0.5)) for name in AWKWARD]
    square = np.eye(count)
    for figure in (
        plots.curves_figure(runs, title="\n".join(AWKWARD)),
        plots.layers_figure({name: [leaves] for name in AWKWARD[:2]} | {AWKWARD[2]: [leaves]}, title=AWKWARD[0]),
        plots.transition_figure(square, np.zeros(count), AWKWARD, AWKWARD[1]),
        plots.dots_figure({AWKWARD[3]: dots}, AWKWARD[4]),
    ):
        drawn = shown(figure, tmp_path)
        assert set(names[:3]) <= set(drawn)
    sheet = plots.contact_sheet_figure([np.zeros((8, 8, 3), np.uint8)], [AWKWARD[0]], AWKWARD[1])
    assert {AWKWARD[0], AWKWARD[1]} <= set(shown(sheet, tmp_path))


def test_a_metric_of_any_name_is_drawn(tmp_path):
    rows = [{"epoch": 1, "cost$$low": 3.0}]
    assert "Cost$$low" in shown(plots.curves_figure({"SAM": [rows]}, panels=["cost$$low"]), tmp_path)


def figure_named(names):
    count = len(names)
    return plots.transition_figure(np.eye(count), np.zeros(count), names, "names")


@pytest.mark.parametrize("ending", ["png", "pdf"])
def test_letters_that_the_usual_font_lacks_come_from_an_installed_one(tmp_path, ending):
    # STIXGeneral, which comes with matplotlib, has this letter; DejaVu Sans has not.
    letter = chr(min(plots._letters(font_path("STIXGeneral")) - plots._letters(font_path("DejaVu Sans"))))
    figure = figure_named([letter + "at", "dog"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.save(figure, tmp_path / f"figure.{ending}")
    families = [label.get_fontfamily() for label in figure.axes[0].get_yticklabels()]
    assert families[0][-1] == "STIXGeneral" and "STIXGeneral" not in families[1]


def font_path(family):
    from matplotlib import font_manager

    return font_manager.findfont(font_manager.FontProperties(family=family))


def test_letters_that_no_font_has_are_said_once(tmp_path):
    plots._say_what_no_font_has.cache_clear()
    figure = figure_named(["三毛猫", "猫 cat"])
    letters = set(map(ord, "三毛猫"))
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning) as notes:
        own = plots._letters
        patch.setattr(plots, "_letters", lambda path: own(path) - letters)
        plots.save(figure, tmp_path / "figure.png")
        plots.save(figure, tmp_path / "again.png")
    assert len(notes) == 1 and "no installed font has 3 of the letters" in str(notes[0].message)


def test_many_images_are_several_sheets(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(plots, "SHEET", 24)
    monkeypatch.setattr(
        plots, "save", lambda figure, path: sizes.append((len(figure.axes), figure.get_figheight(), path))
    )
    count = 2 * plots.SHEET + 3
    images, captions = [np.zeros((8, 8, 1), np.uint8)] * count, [str(i) for i in range(count)]
    paths = plots.contact_sheets(images, captions, "title", tmp_path / "suspects.png")
    assert [path.name for path in paths] == ["suspects.png", "suspects-2.png", "suspects-3.png"]
    assert [axes for axes, _, _ in sizes] == [plots.SHEET, plots.SHEET, 3] and [path for *_, path in sizes] == paths
    assert all(200 * height < 2**16 for _, height, _ in sizes)
    with pytest.raises(UserError, match=f"{count} images are too many for one sheet"):
        plots.contact_sheet_figure(images, captions, "title")


@pytest.mark.parametrize("count", [1, 3, 8, 30])
def test_a_sheet_keeps_its_pictures_and_words_apart(count):
    images = [np.full((16, 16, 3), i, np.uint8) for i in range(count)]
    figure = plots.contact_sheet_figure(images, ["#1 given\n→ suggested"] * count, "a title that says what is seen")
    figure.canvas.draw()
    boxes = [axes.get_images()[0].get_window_extent() for axes in figure.axes if axes.get_images()]
    boxes += [text.get_window_extent() for axes in figure.axes for text in axes.texts]
    boxes.append(figure._suptitle.get_window_extent())
    assert len(boxes) == 2 * count + 1
    for i, box in enumerate(boxes):
        assert not box.count_overlaps(boxes[:i] + boxes[i + 1 :])
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
