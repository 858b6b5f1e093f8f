"""Sphinx: ``python -m sphinx -W -b html docs docs/_build/html`` from the repository's root."""

import posixpath
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import saner_jax

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs" / "extensions"))

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
nitpick_ignore_regex = [("py:.*", r"(jax|optax)\..*")]

highlight_language = "text"

html_theme = "furo"
html_theme_options = {
    "light_css_variables": {"--code-font-size": "75%"},
    "dark_css_variables": {"--code-font-size": "75%"},
}
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_title = f"saner_jax {version}"
html_show_copyright = False
html_show_sourcelink = False

myst_heading_anchors = 3

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


def lead_on(app: Sphinx, doctree: nodes.document) -> None:
    """Lead the links of an included file to the page of their target; where a file has no page, name it."""
    included = INCLUDED.get(app.env.docname)
    for node in list(doctree.findall(pending_xref)) if included else []:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(included), node["reftarget"]))
        if page := PAGES.get(path):
            node.attributes |= {"refdomain": "doc", "reftarget": page, "reftargetid": None}
        elif (ROOT / path).exists():
            node.replace_self(nodes.literal(path, path))


def from_the_package(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element) -> Any:
    """Find what the docstrings of a public module name by its name in the package."""
    if not node.get("py:module", "").startswith("saner_jax."):
        return None
    node["py:module"] = "saner_jax"
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], node["reftarget"], node, content)


def setup(app: Sphinx) -> None:
    app.connect("doctree-read", lead_on)
    app.connect("missing-reference", from_the_package)
