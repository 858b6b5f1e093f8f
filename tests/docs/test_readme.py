"""What the README promises of its own form, here and on a package index."""

import inspect
import pathlib
import re
import tomllib

import pytest

import saner_jax

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]


def links(text):
    """Return the targets of links and images."""
    return re.findall(r"\]\(([^)\s]+)\)", text)


def test_commands_stand_at_its_head():
    top = README[:600]
    assert 'pip install -e ".[examples]" && python -m examples.noisy_images\n' in top
    assert 'pip install -e ".[test]" && python -m pytest\n' in top


def test_it_is_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_pages_are_about_the_product(path):
    text = path.read_text(encoding="utf-8")
    for word in ("/work", "shared/", "TODO", "helper agent"):
        assert word not in text


def test_relative_links_lead_to_files():
    for target in links(README):
        assert "://" in target or (ROOT / target).is_file(), target


def test_a_package_index_shows_no_link_that_leads_nowhere():
    """There, relative links have nothing to be relative to: what the build makes of the README has none."""
    hook = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]["hooks"]
    (fragment,) = hook["fancy-pypi-readme"]["fragments"]
    text = (ROOT / fragment["path"]).read_text(encoding="utf-8")
    for substitution in hook["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(substitution["pattern"], substitution["replacement"], text)
    assert all(target.startswith("https://") for target in links(text))
    assert len(links(text)) >= 1
    assert "Recipes (`docs/recipes/index.md`)" in text
    assert "figure.png" not in text


def test_table_of_methods_names_every_alias_with_its_defaults():
    for alias in ("sam", "asam", "gsam", "fsam", "vasso", "saner", "sgd_d"):
        call = re.search(rf"^\| `{alias}\((.*?)\)`", README, re.M)[1]
        named = dict(part.split("=") for part in call.split(", "))
        defaults = {key: p.default for key, p in inspect.signature(getattr(saner_jax, alias)).parameters.items()}
        assert named == {key: str(value) for key, value in defaults.items() if isinstance(value, float)}
