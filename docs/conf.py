"""Sphinx configuration: uv run --group docs sphinx-build -W -b html docs docs/_build"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import deltalens

project = "deltalens"
author = "the deltalens authors"
copyright = "the deltalens authors, Apache-2.0"
version = release = deltalens.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "package_tables"]
exclude_patterns = ["_build", "_ext"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
default_role = "code"
smartquotes = False

html_theme = "furo"
html_title = "deltalens"
html_static_path = ["_static"]
html_css_files = ["style.css"]
suppress_warnings = ["myst.header"]  # included cards begin at their own heading level
