"""The page in a real browser, from file://: keys, decisions that outlive a reload, and the file that is saved."""

import csv
import dataclasses
import shutil
import time

import pytest

from examples.noisy_images.labels import decisions
from examples.noisy_images.suspects import page
from tests.noisy_images.suspects.rankings import HOSTILE, ranking

selenium = pytest.importorskip("selenium", reason="selenium is not installed")

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Chromium and its driver are not installed")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage")  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--window-size=1280,800"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Opened:
    """A page that is open, as a person sees it."""

    def __init__(self, browser, path, downloads):
        self.browser, self.path, self.downloads = browser, path, downloads
        command = {"behavior": "allow", "downloadPath": str(downloads)}
        browser.execute_cdp_cmd("Browser.setDownloadBehavior", command)
        browser.get(path.as_uri())
        self.wait(lambda: self.rows())

    def wait(self, condition):
        return WebDriverWait(self.browser, 20).until(lambda _: condition())

    def one(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def rows(self):
        # At once: they are made anew whenever something changes.
        script = "return [...document.querySelectorAll('.row')].map((row) => row.innerText)"
        return [text.split("\n") for text in self.browser.execute_script(script)]

    def press(self, *keys):
        for key in keys:
            self.browser.switch_to.active_element.send_keys(key)

    def text(self, selector):
        return self.one(selector).text

    def selected(self):
        return self.one("#list").get_attribute("aria-activedescendant")

    def badges(self, count):
        script = "return [...document.querySelectorAll('.row .badge')].map((badge) => badge.textContent)"
        return self.browser.execute_script(script)[:count]

    def saved(self):
        path = self.downloads / "decisions.csv"
        path.unlink(missing_ok=True)
        self.press("s")
        self.wait(path.is_file)
        time.sleep(0.1)
        return path

    def load(self, path):
        self.one("#file").send_keys(str(path))

    def complaints(self):
        return [entry["message"] for entry in self.browser.get_log("browser")]


@pytest.fixture
def opened(browser, tmp_path, request):
    result = ranking(**getattr(request, "param", {"class_names": ("cat", "dog", "fish")}))
    there = Opened(browser, page.write(result, tmp_path / "suspects"), tmp_path)
    there.ranking = result
    yield there
    browser.execute_script("localStorage.clear()")
    assert there.complaints() == []


def test_keys_decide_and_decisions_outlive_a_reload_and_are_saved(opened):
    result = opened.ranking
    first = result.order[:5].tolist()
    assert opened.text("#summary").startswith(f"300 samples, about {result.estimate.wrong} wrong labels")
    opened.press("r", "k", "d")
    opened.press("l", Keys.HOME, Keys.ENTER)
    assert opened.selected() == "row-4" and opened.text("#progress") == "4 decided"
    opened.press("d", "u")
    names = result.class_names
    # The fourth is relabelled to the first class, or kept where that is its own.
    fourth = "✓ keep" if result.train.labels[first[3]] == 0 else f"→ {names[0]}"
    expected = [f"→ {names[result.suggested[first[0]]]}", "✓ keep", "✕ drop", fourth, ""]
    assert opened.badges(5) == expected

    opened.browser.refresh()
    opened.wait(lambda: opened.text("#progress") == "4 decided")
    assert opened.badges(5) == expected

    read = decisions.read(opened.saved())
    kinds = ["relabel", "keep", "drop", "keep" if "keep" in fourth else "relabel"]
    assert [one.decision for one in read] == kinds
    applied = decisions.apply(read, result.ids, result.fingerprints, result.train.labels, names)
    assert sorted(applied.decisions) == sorted(first[:4]) and not applied.kept[first[2]]
    assert applied.labels[first[0]] == result.suggested[first[0]] and applied.labels[first[3]] == 0
    assert (applied.labels != result.train.labels).sum() == 2 - ("keep" in fourth)


def test_a_file_is_loaded_whole_or_not_at_all(opened, tmp_path):
    opened.press("k")
    result, first = opened.ranking, opened.ranking.order[0]
    names = result.class_names
    good = [
        decisions.Decision(result.ids[i], result.fingerprints[i], names[result.train.labels[i]], "drop")
        for i in result.order[:3]
    ]
    decisions.write(good, tmp_path / "mine.csv")
    opened.load(tmp_path / "mine.csv")
    opened.wait(lambda: "Loaded 3 decisions" in opened.text("#message"))
    assert opened.badges(4) == ["✕ drop"] * 3 + [""]
    opened.press("u")
    assert opened.badges(4) == ["✓ keep", "", "", ""]
    text = (tmp_path / "mine.csv").read_text()
    for content, message in (
        (text[:-5], "middle of a line"),
        (text.replace(result.fingerprints[first], "0" * 16), "is another"),
        (text.replace("drop", "delete"), "unknown decision delete"),
        (text.replace("id,", "name,"), "no column id"),
        (text + "elsewhere.png,0,cat,keep,\n", "elsewhere.png, which is not in this data"),
        (text + text.splitlines()[1].replace("drop", "keep") + "\n", "decides twice"),
    ):
        (tmp_path / "bad.csv").write_text(content)
        opened.load(tmp_path / "bad.csv")
        opened.wait(lambda message=message: message in opened.text("#message"))
        assert "Nothing has changed" in opened.text("#message")
        assert opened.badges(4) == ["✓ keep", "", "", ""]


def test_another_order_has_the_same_decisions_and_other_data_has_none(opened, tmp_path):
    opened.press("r")
    result, first = opened.ranking, opened.ranking.order[0]
    reversed_order = dataclasses.replace(result, order=result.order[::-1])
    again = Opened(opened.browser, page.write(reversed_order, tmp_path / "b"), tmp_path)
    assert again.text("#progress") == "1 decided"
    again.press(Keys.END)
    assert again.badges(100)[-1].startswith("→") and result.ids[first] in again.text("#name")
    elsewhere = page.write(ranking(seed=7, class_names=("cat", "dog", "fish")), tmp_path / "c")
    other = Opened(opened.browser, elsewhere, tmp_path)
    assert other.text("#progress") == "0 decided"


def test_filters(opened):
    result = opened.ranking
    opened.one("#filters summary").click()
    Select(opened.one("#given")).select_by_value("1")
    Select(opened.one("#suggested")).select_by_value("0")
    chosen = [i for i in result.order if result.train.labels[i] == 1 and result.suggested[i] == 0]
    assert opened.text("#shown") == f"· {len(chosen)} of 300" and 0 < len(chosen) < 100
    assert opened.rows()[0][2] == result.ids[chosen[0]]
    opened.one("#clear").click()
    assert opened.text("#shown") == "· all 300"
    opened.one("#only").click()
    assert opened.text("#shown") == f"· {result.estimate.wrong} of 300"
    opened.one("#clear").click()
    opened.one("#list").click()
    opened.press(Keys.HOME, "d", "d")
    Select(opened.one("#state")).select_by_value("drop")
    assert opened.text("#shown") == "· 2 of 300"
    Select(opened.one("#state")).select_by_value("relabel")
    assert "No sample passes the filters" in opened.text("#space")


@pytest.mark.parametrize(
    "opened",
    [{"samples": 60, "ids": tuple(f"{name} {i}" for i in range(10) for name in HOSTILE),
      "texts": tuple(f"{name} {i}" for i in range(10) for name in HOSTILE)}],
    indirect=True,
)  # fmt: skip
def test_no_name_runs(opened):
    result = opened.ranking
    opened.press(*"rkdrkdrkd")
    assert opened.browser.title == "Suspicious labels"
    assert not opened.browser.find_elements(By.CSS_SELECTOR, "main img, main script, main b")
    i = result.order[9]
    assert opened.one("#name").get_attribute("textContent") == result.ids[i]
    assert opened.one("#text").get_attribute("textContent") == result.train.texts[i]
    read = decisions.read(opened.saved())
    applied = decisions.apply(read, result.ids, result.fingerprints, result.train.labels, result.class_names)
    assert len(applied.decisions) == 9
    # And the other way.
    opened.press("u")
    opened.load(opened.downloads / "decisions.csv")
    opened.wait(lambda: "Loaded 9 decisions" in opened.text("#message"))


@pytest.mark.parametrize("opened", [{"samples": 2000, "class_names": ("a", "b")}], indirect=True)
def test_far_rows_are_drawn_when_they_come_into_sight(opened):
    result = opened.ranking
    assert len(opened.rows()) < 40
    opened.press(Keys.END)
    opened.wait(lambda: opened.selected() == "row-1999")
    assert opened.rows()[-1][0] == "#2,000" and len(opened.rows()) < 40
    assert opened.text("#name") == result.ids[result.order[-1]]
    pixels = result.train.images[result.order[-1], ..., 0]
    script = """
        const canvas = document.querySelector("#picture canvas"), side = canvas.width / 8;
        const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.width).data;
        const middle = (cell) => Math.floor((cell + 0.5) * side);
        const at = (i) => middle(Math.floor(i / 8)) * canvas.width + middle(i % 8);
        return [...Array(64).keys()].map((i) => pixels[4 * at(i)]);
    """
    opened.wait(lambda: opened.browser.execute_script(script) == pixels.ravel().tolist())


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_screen(opened, width):
    metrics = {"width": width, "height": 740, "deviceScaleFactor": 2, "mobile": width < 500}
    opened.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    opened.one("#filters summary").click()
    assert opened.browser.execute_script("return document.documentElement.scrollWidth") <= width
    opened.one("#filters summary").click()
    # Every control has a name, and is large enough for a finger.
    for control in opened.browser.find_elements(By.CSS_SELECTOR, "button, select, input"):
        if control.is_displayed():
            assert control.accessible_name
            assert control.size["height"] >= 30 or control.get_attribute("type") in ("checkbox", "range")
    for button in ("#keep", "#drop", "#undo", "#relabel"):
        rectangle = opened.one(button).rect
        assert 0 <= rectangle["x"] and rectangle["x"] + rectangle["width"] <= width
    opened.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_page_without_its_folder_says_so(browser, tmp_path):
    path = page.write(ranking(class_names=("a", "b")), tmp_path / "suspects")
    shutil.rmtree(path.parent / "pages")
    there = Opened(browser, path, tmp_path)
    there.wait(lambda: "folder “pages” is not beside this page" in there.text("#message"))
    there.press("k")
    with open(there.saved(), newline="") as file:
        assert len(list(csv.reader(file))) == 2
    there.complaints()
