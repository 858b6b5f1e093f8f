"""Sphinx: ``python -m sphinx -W -b html docs docs/_build/html`` from the repository's root."""

import posixpath
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs" / "extensions"))

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

import saner_jax

project = "saner_jax"
author = "The saner_jax authors"
copyright = author
version = release = saner_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "api_coverage",  # docs/extensions
]
exclude_patterns = ["_build"]
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(jax|jaxlib|optax|numpy|typing|collections|chex)\..*")]

html_theme = "furo"
html_title = f"saner_jax {version}"
html_copy_source = False
html_show_copyright = False

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_use_rtype = False
napoleon_custom_sections = ["References"]

# Pages that include a file of the repository, by its path from the root.
PAGES = {
    "benchmarks/README.md": "benchmarks",
    "benchmarks/RESULTS.md": "benchmark_results",
    "examples/noisy_images/paper/RESULTS.md": "results",
    "examples/theory/README.md": "theory",
}
INCLUDED = {page: path for path, page in PAGES.items()}


def resolve(app: Sphinx, env: BuildEnvironment, node: nodes.Element, content: nodes.Node) -> nodes.Node | None:
    """Lead the links of an included file to the page of their target; name a file that has no page."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(INCLUDED.get(node["refdoc"], "")), node["reftarget"]))
    if page := PAGES.get(path):
        return make_refnode(app.builder, node["refdoc"], page, None, content)
    if node["refdoc"] in INCLUDED and (ROOT / path).exists():
        return nodes.literal(path, path)
    return None


def setup(app: Sphinx) -> None:
    app.connect("missing-reference", resolve)
