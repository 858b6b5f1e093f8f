"""The page holds what the ranking says, in files that are whole, and nothing of it is markup."""

import base64
import dataclasses
import hashlib
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from examples.noisy_images import data
from examples.noisy_images.errors import UserError
from examples.noisy_images.suspects import page
from examples.noisy_images.suspects import ranking as ranking_module
from tests.noisy_images.suspects.rankings import HOSTILE, ranking


def content(path):
    html = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL).group(1))


def scripts(path):
    """The pages of samples, in their order."""
    start = content(path)["pages"]
    found = sorted((path.parent / "pages").iterdir())
    assert all(str(script.relative_to(path.parent)).startswith(start) for script in found)
    pages = []
    for number, script in enumerate(found):
        head, text = f"suspectsPage({number}, ", script.read_text()
        assert text.startswith(head) and text.endswith(");\n") and text.isascii()
        pages.append(json.loads(text[len(head) : -3]))
    return pages


def array(text, dtype):
    return np.frombuffer(base64.b64decode(text), dtype)


def thumbnails(one, columns=page.COLUMNS):
    """The pictures of a page of samples."""
    with Image.open(io.BytesIO(base64.b64decode(one["sheet"].split(",")[1]))) as sheet:
        sizes = array(one["sizes"], np.uint8).reshape(-1, 2)
        columns = min(columns, sheet.width // one["tile"])
        for place, (width, height) in enumerate(sizes.tolist()):
            left, top = place % columns * one["tile"], place // columns * one["tile"]
            yield sheet.crop((left, top, left + width, top + height))


def test_the_page_holds_the_ranking_in_its_order(tmp_path):
    result = ranking(samples=600)
    there = content(page.write(result, tmp_path))
    order = result.order
    assert there["ids"] == [result.ids[i] for i in order]
    assert there["fingerprints"] == [result.fingerprints[i] for i in order]
    assert there["classes"] == list(HOSTILE) and there["suspects"] == result.estimate.wrong > 0
    np.testing.assert_array_equal(array(there["given"], np.int32), result.train.labels[order])
    np.testing.assert_array_equal(array(there["suggested"], np.int32), result.suggested[order])
    np.testing.assert_allclose(array(there["suspicion"], np.float32), result.suspicion["mean_loss"][order], rtol=1e-6)
    np.testing.assert_allclose(array(there["values"], np.float32), result.values["mean_loss"][order], rtol=1e-6)
    pages = scripts(tmp_path / "index.html")
    assert [len(array(one["curves"], np.uint8)) // 12 for one in pages] == [256, 256, 88]
    levels = np.concatenate([array(one["curves"], np.uint8).reshape(-1, 12) for one in pages])
    losses = result.curves.losses[:, order].T
    top = there["curves"]["top"]
    assert (losses > top).mean() < 0.01
    np.testing.assert_allclose(levels / 255 * top, np.minimum(losses, top), atol=top / 500)
    shown = [np.asarray(image) for one in pages for image in thumbnails(one)]
    np.testing.assert_array_equal(shown, result.train.images[order, ..., 0])


def test_long_curves_are_averaged(tmp_path):
    result = ranking(samples=5, epochs=200)
    there = content(page.write(result, tmp_path))
    epochs = there["curves"]["epochs"]
    assert len(epochs) == page.CURVE_POINTS and epochs[-1] == 200 and epochs == sorted(epochs)
    levels = array(scripts(tmp_path / "index.html")[0]["curves"], np.uint8).reshape(5, -1)
    last = result.curves.losses[196:, result.order].mean(axis=0)
    np.testing.assert_allclose(levels[:, -1] / 255 * there["curves"]["top"], last, atol=0.01)


def test_no_name_is_markup(tmp_path):
    ids = tuple(f"{HOSTILE[i % 6]} {i}" for i in range(30))
    result = ranking(30, ids=ids, texts=ids, images=np.zeros((30, 4), np.float32))
    path = page.write(result, tmp_path)
    html = path.read_text(encoding="utf-8")
    assert sorted(content(path)["ids"]) == sorted(ids)
    assert scripts(path)[0]["texts"] == [ids[i] for i in result.order]
    # The elements are those of the template: the data's and the program's.
    assert html.count("<script") == 2 and html.count("</script>") == 2 and "owned'" not in html.split('id="data"')[0]
    data_element = re.search(r'id="data">(.*?)</script>', html, re.DOTALL).group(1)
    assert not set("<>&") & set(data_element) and data_element.isascii() and "\n" not in data_element
    program = re.search(r"<script>(.*?)</script>", html, re.DOTALL).group(1)
    policy = re.search(r"Content-Security-Policy\" content=\"(.*?)\"", html).group(1)
    assert base64.b64encode(hashlib.sha256(program.encode()).digest()).decode() in policy
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
    # The program makes no markup of text, and nothing comes from elsewhere.
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", program)
    assert re.findall(r"https?://[^\"'\s]*", html) == ["http://www.w3.org/2000/svg"]


def test_images_of_any_size_are_shown_as_a_whole(tmp_path):
    sizes = [(500, 300), (300, 500), (1, 700), (20, 20), (64, 64), (2000, 3)]
    for number, size in enumerate(sizes):
        mode = ("RGB", "L", "RGBA", "P", "CMYK", "RGB")[number]
        picture = Image.new("RGB", size, (40 * number, 200, 10))
        picture = picture.quantize() if mode == "P" else picture.convert(mode)
        picture.save(tmp_path / f"{number}.{'jpg' if mode == 'CMYK' else 'png'}")
    paths = tuple(str(path) for path in sorted(tmp_path.iterdir()))
    result = ranking(6, images=data.ImageFiles(paths))
    path = page.write(result, tmp_path / "out")
    (one,) = scripts(path)
    assert one["tile"] == page.LARGE and "jpeg" in one["sheet"][:20]
    for image, i in zip(thumbnails(one), result.order, strict=True):
        width, height = sizes[i]
        scale = min(1, page.LARGE / max(width, height))
        assert image.size == (max(1, round(scale * width)), max(1, round(scale * height)))
        grey = i == 1
        middle = np.asarray(image.convert("RGB"))[image.height // 2, image.width // 2].astype(int)
        assert grey or np.abs(middle - [40 * i, 200, 10]).max() < 12


@pytest.mark.parametrize("streamed", [False, True])
def test_photographs_are_upright_on_the_page_and_on_the_contact_sheet(tmp_path, streamed):
    """Whichever way the camera was held: the left half of every scene is white."""
    scene = Image.new("L", (32, 16))
    scene.paste(255, (0, 0, 16, 16))
    # What a camera stores for each orientation, so that turning it back gives the scene.
    stored = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    for name in ("a", "b"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        for number, (orientation, turn) in enumerate(stored.items()):
            exif = Image.Exif()
            exif[0x0112] = orientation
            image = scene if turn is None else scene.transpose(turn)
            image.convert("RGB").save(tmp_path / "tree" / name / f"{number}.png", exif=exif)
    size = 16 if streamed else None
    train = data.load("folder", data_dir=tmp_path / "tree", image_size=size, test_share=0.0).train
    assert train.streamed == streamed
    result = ranking(samples=8, class_names=("a", "b"), images=train.images)
    (one,) = scripts(page.write(result, tmp_path / "page"))
    on_page = [np.asarray(image.convert("L")) for image in thumbnails(one)]
    on_sheet = [page_image[..., 0] for page_image in (ranking_module._image(result.train, i) for i in range(8))]
    assert len(on_page) == 8 and all(image.shape == (16, 32) for image in on_page)
    for image in on_page + on_sheet:
        width = image.shape[1]
        assert image[:, : width // 4].min() > 200 and image[:, -width // 4 :].max() < 50


def test_later_pages_have_smaller_photographs(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "LARGE_PAGES", 1)
    images = np.broadcast_to(np.uint8(7), (300, 100, 50, 3))
    path = page.write(ranking(300, images=images), tmp_path)
    first, second = scripts(path)
    assert {image.size for image in thumbnails(first)} == {(50, 100)}
    assert {image.size for image in thumbnails(second)} == {(32, 64)}


@pytest.mark.parametrize(
    "options",
    [
        {"samples": 1},
        {"samples": 2, "class_names": ("one",)},
        {"samples": 257, "images": np.zeros((257, 3), np.float32)},
        {"samples": 3, "rate": 0},
        {"samples": 3, "epochs": 1},
        {"samples": 500, "class_names": tuple(f"class {i}" for i in range(10_000))},
    ],
    ids=["one sample", "one class", "features", "none wrong", "one epoch", "many classes"],
)
def test_small_and_large_data(tmp_path, options):
    result = ranking(**options)
    path = page.write(result, tmp_path)
    there = content(path)
    assert len(there["ids"]) == options["samples"] and there["classes"] == list(result.class_names)
    assert there["kind"] == ("none" if result.train.images.ndim == 2 else "images")
    assert there["suspects"] == result.is_suspect.sum()
    assert len(scripts(path)) == -(-options["samples"] // page.PAGE)


@pytest.mark.parametrize(
    ("class_names", "message"),
    [(("a", "a"), "two classes have the name 'a'"), (("a", "\udcff"), r"'\\udcff' is no text that can be written")],
)
def test_names_that_cannot_be_told_apart_or_written(tmp_path, class_names, message):
    with pytest.raises(UserError, match=message):
        page.write(ranking(4, class_names=class_names), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_older_page_stays_whole_until_it_is_replaced(tmp_path, monkeypatch):
    path = page.write(ranking(600), tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    other = ranking(300, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(page, "_sheet", lambda split, chosen, side: 1 / (len(chosen) == 256) and {})
        with pytest.raises(ZeroDivisionError):
            page.write(other, tmp_path)
    assert all(file.read_bytes() == content for file, content in before.items())
    page.write(other, tmp_path)
    assert len(scripts(path)) == 2 and len(content(path)["ids"]) == 300


def test_the_key_is_that_of_samples_contents_and_given_labels(tmp_path):
    result = ranking(50)
    key = content(page.write(result, tmp_path))["key"]
    # Another score, other suggestions: the decisions about the same labels are still there.
    order = dataclasses.replace(result, order=result.order[::-1], suggested=np.zeros(50, int))
    assert content(page.write(order, tmp_path))["key"] == key
    labels = result.train.labels.copy()
    labels[0] = (labels[0] + 1) % 6
    for changed in (
        dataclasses.replace(result, train=dataclasses.replace(result.train, labels=labels)),
        dataclasses.replace(result, ids=("x", *result.ids[1:])),
        dataclasses.replace(result, fingerprints=("x", *result.fingerprints[1:])),
        dataclasses.replace(result, class_names=("x", *result.class_names[1:])),
    ):
        assert content(page.write(changed, tmp_path))["key"] != key
