"""`rlp view`: thoughts as they are, sorted, searched, and nothing that a terminal would obey."""

import re

import pytest

from rlp.cli import main
from tests.measure.report_pages import HOSTILE
from tests.measure.run_folders import make_run, make_thought


def test_view_prints_thoughts_as_they_are(tmp_path, capsys):
    """Markup stays text and escapes stay visible, on a page of their own color too."""
    run = make_run(
        tmp_path / "first",
        thoughts=[
            make_thought(
                1, 0.5, prefix_tail=HOSTILE, thought=HOSTILE, target=HOSTILE, truncated=True
            )
        ],
    )
    assert main(["view", str(run)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and "\x00" not in out and "\u202e" not in out
    unwrapped = " ".join(out.split())
    assert (
        "[bold red]x[/bold red] [/]" in unwrapped
        and ":smile:" in unwrapped
        and "reward +0.5000 nats" in unwrapped
        and "truncated" in unwrapped
    )


def test_view_shows_white_space_and_what_the_thought_changed(tmp_path, capsys):
    """A target of white space is seen, a line end in a thought stays beside its name, and both
    log-probabilities are there."""
    thoughts = [
        make_thought(1, 0.5, target="\n\n", thought="first\nsecond", prefix_tail="one\ntwo"),
        make_thought(1, 1.0, baseline_logprob=-1.25, target=" \t\u00a0", thought=" "),
    ]
    assert main(["view", str(make_run(tmp_path / "first", steps=0, thoughts=thoughts))]) == 0
    first, second, _ = (text.splitlines() for text in capsys.readouterr().out.split("\n\n"))
    assert [line.rstrip() for line in first] == [
        "reward +0.5000 nats  step 1, document 3, position 5, 4 tokens",
        "log p(next) -1.000 with the thought, -1.500 without",
        "  context  one",
        "           two",
        "  thought  first",
        "           second",
        '  next     "\\n\\n"',
    ]
    assert (
        second[0].startswith("reward +1.0000, information gain +0.2500 nats")
        and second[-2].rstrip() == '  thought  " "'
        and second[-1].rstrip() == '  next     " \\t\\xa0"'
    )


def test_view_leaves_out_what_was_not_logged(tmp_path, capsys):
    thought = {
        key: value
        for key, value in make_thought(1, 0.5).items()
        if key not in ("reasoned_logprob", "baseline_logprob", "advantage", "reward")
    }
    assert main(["view", str(make_run(tmp_path / "first", steps=0, thoughts=[thought]))]) == 0
    out = capsys.readouterr().out
    assert "reward not measured" in out and "log p" not in out


def test_view_sorts_searches_and_limits(tmp_path, capsys):
    thoughts = [
        make_thought(1, -0.5),
        make_thought(1, None, thought="thinking unmeasured"),
        make_thought(2, 2.0),
        make_thought(2, 1.0, target=" FOUR apples"),
    ]
    run = str(make_run(tmp_path / "first", thoughts=thoughts))

    def shown(*options):
        assert main(["view", run, *options]) == 0
        return re.findall(r"thinking (\S+)", capsys.readouterr().out)

    assert shown() == ["-0.5", "unmeasured", "2.0", "1.0"]
    assert shown("--sort", "best") == ["2.0", "1.0", "-0.5", "unmeasured"]
    assert shown("--sort", "worst", "--limit", "2") == ["-0.5", "1.0"]
    assert shown("--step", "2") == ["2.0", "1.0"]
    assert shown("--search", "four Apples") == ["1.0"]


@pytest.mark.parametrize("command", ["view", "report"])
def test_a_missing_run_is_one_message_and_exit_code_2(tmp_path, capsys, command):
    (tmp_path / "empty").mkdir()
    for name, message in (("absent", "no run folder at"), ("empty", "has no config.yaml")):
        assert main([command, str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err


def test_a_step_without_logged_thoughts_names_the_nearest(tmp_path, capsys):
    run = make_run(tmp_path / "first", thoughts=[make_thought(10, 0.5), make_thought(20, 0.5)])
    assert main(["view", str(run), "--step", "12"]) == 2
    assert "such as 10, 20" in capsys.readouterr().err
    assert main(["view", str(make_run(tmp_path / "silent"))]) == 2
    assert "logged no thoughts" in capsys.readouterr().err


def test_a_damaged_file_is_one_message_and_exit_code_3(tmp_path, capsys):
    run = make_run(tmp_path / "first")
    (run / "summary.json").write_text("{")
    assert main(["report", str(run)]) == 3
    assert "summary.json is not JSON" in capsys.readouterr().err
