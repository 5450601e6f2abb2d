"""The site of the documentation: `make docs` builds it, and every warning is an error."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://github.com/pgtoolset/pgtoolset/blob/main/"

project = "pgtoolset"
author = "The pgtoolset developers"
project_copyright = author
version = release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
nitpicky = False

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "smartquotes"]

# A single backtick in a docstring is code, as in the pages.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True

html_theme = "furo"
html_title = "pgtoolset"
html_copy_source = False
html_theme_options = {
    "source_repository": "https://github.com/pgtoolset/pgtoolset/",
    "source_branch": "main",
    "source_directory": "docs/",
}

#: A link out of this folder, which the site does not contain.
_OUTSIDE = re.compile(r"\]\(\.\./([^)\s]+)\)")

#: A link to another page, of which the lists make the order of the site.
_PAGE = re.compile(r"\]\(([\w/-]+)\.md\)")


def _read(app: Any, name: str, source: list[str]) -> None:
    """Turn what GitHub shows into what Sphinx needs: lists of pages into the tree of the site."""
    text = source[0]
    if "/" not in name:
        text = _OUTSIDE.sub(rf"]({REPOSITORY}\1)", text)
    if name.endswith("index"):
        for part in re.split(r"^## ", text, flags=re.MULTILINE):
            pages = "\n".join(dict.fromkeys(_PAGE.findall(part)))
            caption = f":caption: {part.partition(chr(10))[0]}\n" if name == "index" else ""
            if pages:
                text += f"\n```{{toctree}}\n:hidden:\n{caption}\n{pages}\n```\n"
    source[0] = text


def setup(app: Any) -> None:
    """Register what the site needs beside its extensions."""
    app.connect("source-read", _read)
