"""Promises of `docs/threat_model.md` about what a stranger wrote, where it is shown: in a terminal,
on a page, in a figure."""

import json
from pathlib import Path

import markdown_it
import numpy as np
import pytest

from rlp import train as program
from rlp.cli import main as rlp_command
from rlp.config import load_config
from rlp.learn.export import model_card
from rlp.measure.decomposition import Decomposition
from rlp.measure.probe import draw
from rlp.measure.report import write_report
from rlp.process.console import visible_text
from rlp.process.environment import environment
from rlp.process.exit_codes import BAD_DATA, DONE
from tests.data.reading import GOOD, write
from tests.measure.run_folders import make_run, make_thought
from tests.training import TINY
from tests.whole.strangers import BASE, ESCAPES, harmless

pytestmark = pytest.mark.usefixtures("unpacked")


def test_what_data_holds_does_nothing_to_the_terminal(
    tmp_path, model_folder, ranks, monkeypatch, capfd
):
    """In warnings about bad rows, in the error that stops a run, in the example of a dry run, in
    the name of a file."""
    monkeypatch.setattr("rlp.process.ranks.stop_ranks", lambda: None)
    path = write(
        tmp_path / f"x{ESCAPES}.jsonl", json.dumps({ESCAPES: 1}).encode() + b"\n" + GOOD * 9
    )
    base = write(
        tmp_path / "base.yaml",
        json.dumps(
            {
                "model": {"path": str(model_folder)},
                "data": {"train": [str(path)]},
                "run": {"dir": str(tmp_path / "run")},
            }
        ).encode(),
    )
    arguments = [
        str(base),
        *(f"{key}={value}" for key, value in TINY.items()),
        "data.shuffle=false",
    ]
    assert program.main([*arguments, "data.max_bad_fraction=0"]) == BAD_DATA
    assert program.main([*arguments, "data.max_bad_fraction=1", "--dry-run"]) == DONE
    assert program.main([*arguments, "data.max_bad_fraction=1", "budget.steps=1"]) == DONE
    printed = "".join(capfd.readouterr())
    assert (
        harmless(printed)
        and r"no field 'text'; the row has \x1b[2J" in printed
        and "skipped" in printed
    )


def test_what_a_run_folder_holds_does_nothing_to_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture
):
    """A thought, a damaged line, the name of a folder."""
    run = make_run(tmp_path / "run", steps=0, thoughts=[make_thought(1, 0.5, thought=ESCAPES)])
    assert rlp_command(["view", str(run)]) == 0
    with open(run / "thoughts.jsonl", "ab") as file:
        file.write(ESCAPES.encode() + b"\n{}\n")
    assert rlp_command(["view", str(run)]) == 3
    assert rlp_command(["view", str(tmp_path / ESCAPES)]) == 2
    assert harmless("".join(capfd.readouterr()))


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "a\n\n# Approved by everybody\n[x](http://evil)",
        "a`](http://evil)`",
        "``` x",
        "` `",
        "---\nlicense: mit",
        "a\x1b[2J\u202e",
        "\t",
        "|a|",
    ],
)
def test_a_model_card_holds_names_as_code(text: str):
    """A run's name, the path of its model and the markers are Markdown nowhere, and the front
    matter stays ours."""
    config = load_config(
        BASE
        | {
            "model": {"path": text},
            "thought": {"open_marker": text, "close_marker": f"</{text}>"},
        }
    )
    card = model_card(config, None, None, 3, None)
    assert card.split("\n---\n", 1)[
        0
    ] == "---\nlibrary_name: transformers\ntags: [rlp]" and harmless(card)
    tokens = markdown_it.MarkdownIt().parse(card.split("\n---\n", 1)[1])
    assert [token.type for token in tokens] == ["heading_open", "inline", "heading_close"] + 2 * [
        "paragraph_open",
        "inline",
        "paragraph_close",
    ]
    inner = [child for token in tokens for child in token.children or ()]
    assert {child.type for child in inner} <= {"text", "code_inline", "softbreak"}
    codes = [child.content for child in inner if child.type == "code_inline"]
    assert [codes[1], codes[3], codes[4]] == [
        visible_text(name).replace("\n", "\\n").replace("\t", "\\t")
        for name in (text, text, f"</{text}>")
    ]


@pytest.mark.parametrize("name", ["$\\frac{", "$x_{$", "a$b$c", "$" + "{" * 200 + "$"])
def test_names_in_a_figure_are_no_mathematics(tmp_path: Path, name: str):
    """matplotlib sets what stands between dollar signs."""
    gains = np.array([0.5, -0.5])
    found = Decomposition(
        None,
        None,
        {"gain_over_no_think_nats": gains, "gain_over_shuffled_nats": gains},
        None,
        {"gain_over_no_think_nats": 0.0, "gain_over_shuffled_nats": 0.0},
        {},
    )
    draw(found, True, tmp_path / "x.png", title=name)
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_a_report_escapes_what_a_stranger_wrote(tmp_path: Path):
    """In the name of the run, its config and its environment, besides thoughts
    (`test_report.py`)."""
    run = make_run(tmp_path / "run", steps=0)
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace("path: tiny", "path: <script>alert(1)</script>")
    )
    (run / "environment.json").write_text(
        json.dumps(
            environment(["<img src=x>"])
            | {
                "command": "<img src=x onerror=alert(2)>",
                "packages": {"<b>": "<i>"},
            }
        )
    )
    write_report([run], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and "<img src=x" not in page and "<i>" not in page
