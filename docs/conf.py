"""The site: `make docs` writes it to site/, to be opened from the disk; it loads nothing else."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from config_page import config_keys

project = "rlp"
author = "The rlp-pretraining developers"
copyright = f"2026, {author}. Apache License 2.0"

extensions = ["myst_parser"]
exclude_patterns = ["conf.py"]
html_theme = "furo"
html_title = "rlp"
html_show_sphinx = False
html_copy_source = False

myst_heading_anchors = 4
"""Headings down to this level can be linked to, by the names that they have in a repository."""

myst_enable_extensions = ["deflist"]
myst_links_external_new_tab = False

KEYS = "<!-- every key, from rlp/config.py -->"


def write_keys(app, page: str, source: list[str]) -> None:
    """The keys stand in `rlp/config.py` alone; the page has the place where they go."""
    source[0] = source[0].replace(KEYS, config_keys())


def setup(app) -> None:
    app.connect("source-read", write_keys)
