"""Links lead somewhere, blocks run, and the pages say of every key what it means."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlp.config import known_keys, load_config
from tests.docs.pages import (
    PAGES,
    REPOSITORY,
    RUN,
    SHOWN,
    Block,
    anchors_of,
    blocks_of,
    broken_links,
    links_of,
    read_blocks,
)
from tests.docs.reader import run_shell

sys.path.insert(0, str(REPOSITORY / "docs"))

from config_page import config_keys, sections

SLOW = {
    "docs/comparing.md",
    "docs/install.md",
    "docs/pipeline.md",
    "docs/python_api.md",
    "docs/run_folder.md",
    "docs/scale.md",
    "docs/warm_start.md",
}
"""Their blocks are further runs of the commands that the README has."""

RUNNABLE = [page for page in PAGES if any(block.is_run for block in blocks_of(page))]


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_says_why_not(page):
    """A block of no language, or of one that nobody has decided about, is neither."""
    for block in blocks_of(page):
        assert block.language in (*RUN, *SHOWN), f"{block}: language {block.language!r}"
        assert not (block.language in SHOWN and block.reason), f"{block} is not run anyway"


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if page in SLOW else ()) for page in RUNNABLE],
)
def test_the_blocks_of_a_page_run(page, scratch, commands, monkeypatch):
    """In their order, in one folder: each finds what those before it left."""
    monkeypatch.chdir(scratch)
    monkeypatch.syspath_prepend(str(scratch))
    for block in blocks_of(page):
        if block.is_run:
            run_block(block, scratch, commands)


def run_block(block: Block, folder: Path, environment: dict[str, str]) -> None:
    """Run a block; an AssertionError with what it printed where it fails."""
    if block.file:
        (folder / block.file).write_text(block.text)
    elif block.language == "yaml":
        check_settings(block, folder)
    else:
        text = block.instead or block.text
        if block.language == "python" and not block.instead:
            (folder / "block.py").write_text(block.text)
            text = "python block.py"
        done = run_shell(text, folder, environment)
        assert done.returncode == 0, f"{block} ended with {done.returncode}:\n{done.stdout}"


def check_settings(block: Block, folder: Path) -> None:
    """Settings are read in the place that they have in a config."""
    config = yaml.safe_load((folder / "configs" / "quickstart.yaml").read_text())
    for section, values in yaml.safe_load(block.text).items():
        config[section] = config.get(section, {}) | values
    load_config(config)


def test_the_readme_has_no_block_that_is_left_out():
    """Every one is run, as it stands or as a command that says why."""
    left_out = [block for block in blocks_of("README.md") if not block.is_run]
    assert [block for block in left_out if block.language in RUN] == []


def test_a_part_of_ones_own_takes_less_than_25_lines():
    """Each of the four ways in."""
    blocks = [block for block in blocks_of("docs/extending.md") if block.language == "python"]
    assert len(blocks) >= 4
    assert all(len(block.text.splitlines()) < 25 for block in blocks)


def test_a_mark_belongs_to_the_block_right_after_it():
    text = (
        "<!-- not run: it needs a GPU -->\n```sh\na\n```\n\n```sh\nb\n```\n"
        "<!-- run as true: it takes hours -->\n```sh\nc\n```\n"
        "<!-- not run: it needs the Hub -->\n```sh\nd\n```\n<!-- a word -->\n```sh\ne\n```\n"
    )
    gpu, plain, replaced, hub, remarked = read_blocks("page.md", text)
    assert (gpu.is_run, gpu.reason) == (False, "it needs a GPU")
    assert plain.is_run and not plain.reason and plain.line == 6
    assert (replaced.is_run, replaced.instead, replaced.reason) == (True, "true", "it takes hours")
    assert (hub.is_run, hub.reason) == (False, "it needs the Hub")
    assert remarked.is_run and not remarked.reason


def test_a_link_in_code_is_none_and_an_anchor_is_a_heading():
    text = "# A `b` (c)\n[x](y.md#a-b-c) `[no](z.md)`\n```sh\n# no heading\n[no](w.md)\n```\n"
    assert links_of(text) == ["y.md#a-b-c"]
    assert anchors_of(text) == {"a-b-c"}


def test_every_key_of_a_config_is_explained():
    """The page is made of the docstrings, so a key without one has no entry worth reading."""
    keys = {f"{name}.{key.name}": key for name, (_, keys) in sections().items() for key in keys}
    assert set(keys) == {key for key in known_keys() if "." in key}
    assert [name for name, key in keys.items() if not key.meaning] == []
    page = config_keys()
    assert "`thought.group_size` (int, default `16`)" in page
    assert "`objective.policy_weight` (float, default `1.0`)" in page
    assert "`thought.add_markers` (bool, default `false`)" in page
    assert "`run.dir` (str, has to be given)" in page


def test_every_page_is_in_the_index_of_the_site():
    index = next(
        block.text for block in blocks_of("docs/index.md") if block.language == "{toctree}"
    )
    listed = {f"docs/{line}.md" for line in index.splitlines() if line and line[0] != ":"}
    assert listed == {page for page in PAGES if page.startswith("docs/")} - {"docs/index.md"}


@pytest.mark.slow
def test_the_site_is_built_and_asks_nothing_of_the_network(tmp_path):
    """Every warning of the generator is an error; no page loads what lies elsewhere."""
    pytest.importorskip("sphinx")
    pytest.importorskip("furo")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html"]
    subprocess.run([*command, str(REPOSITORY / "docs"), str(tmp_path)], check=True)
    for page in tmp_path.rglob("*.html"):
        text = page.read_text()
        assert 'src="http' not in text and 'src="//' not in text, page
        assert 'rel="stylesheet" href="http' not in text, page
