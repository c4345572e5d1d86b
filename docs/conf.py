"""The site: `make docs` writes it to site/, to be opened from the disk; it loads nothing else."""

import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from config_page import config_keys

project = "rlp"
author = "The rlp-pretraining developers"
copyright = f"2026, {author}. Apache License 2.0"

extensions = ["myst_parser"]
html_theme = "furo"
html_title = "rlp"
html_show_sphinx = False
html_copy_source = False

myst_heading_anchors = 4
"""Headings down to this level can be linked to, by the names that they have in a repository."""

myst_enable_extensions = ["deflist"]
myst_links_external_new_tab = False

UP = f"{os.pardir}/"
KEYS = "<!-- every key, from rlp/config.py -->"
README = "<!-- the README -->"


def complete(app, page: str, source: list[str]) -> None:
    """What a page has on the site alone: its place holds a comment.

    Files of the repository that are no pages of the site are copied beside it.
    """
    text = source[0].replace(KEYS, config_keys()).replace(README, readme())
    source[0] = re.sub(r"(?<!!)(\[[^]]*\])\((\.\./[^)#]+)\)", r"\1(path:\2)", text)


def readme() -> str:
    """The README without its title, its links as seen from here."""
    _, _, text = (Path(__file__).parents[1] / "README.md").read_text().partition("\n")
    text = re.sub(r"\]\((?![a-z]+:)([^)]+)\)", rf"]({UP}\1)", text)
    return text.replace(f"]({UP}docs/", "](")


def setup(app) -> None:
    app.connect("source-read", complete)
