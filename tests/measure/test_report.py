"""Pages and lists about runs: they hold what the folder holds, and what a model wrote does nothing
there."""

import re

import numpy as np
import pytest

from rlp.cli import main
from rlp.config import ConfigError
from rlp.measure.figures import Curve, draw_curves, neighbour_mean
from rlp.measure.metrics import METRICS
from rlp.measure.report import write_report
from rlp.measure.report_tables import hours_and_minutes
from rlp.process.console import visible_text
from rlp.process.run_logs import append_json_line
from tests.measure.report_pages import HOSTILE, Tags, page_of
from tests.measure.run_folders import make_run, make_thought


def test_a_report_holds_the_numbers_of_the_run(tmp_path, undrawn):
    thoughts = [make_thought(1, -0.5), make_thought(30, 1.5)]
    text = Tags(
        page_of(make_run(tmp_path / "first", thoughts=thoughts), out=tmp_path / "page.html")
    ).text
    for said in (
        "RLP: first",
        "finished, 30 steps",
        "-0.5000",
        "+0.7500",
        "+1.2500",
        "1,234",
        "2.5e+12",
        "+1.500 nats",
        "thinking -0.5",
        "group_size: 16",
    ):
        assert said in text


def test_a_report_needs_nothing_from_outside(tmp_path):
    """Pictures travel as data; nothing is linked, loaded or run."""
    tags = Tags(page_of(make_run(tmp_path / "first"), out=tmp_path / "page.html"))
    sources = [value for name, value in tags.attributes if name in ("src", "href")]
    assert sources and all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert not {"script", "link", "iframe", "object", "form"} & set(tags.tags)


def test_hostile_text_does_nothing_in_a_report(tmp_path):
    thoughts = [
        make_thought(1, 0.5, prefix_tail=HOSTILE, thought=HOSTILE, target=HOSTILE),
        make_thought(1, 0.1, thought="\ud800"),
    ]
    run = make_run(tmp_path / "<b>run $x_{", steps=1, thoughts=thoughts)
    page = page_of(run, out=tmp_path / "page.html")
    tags = Tags(page)
    assert not {"script", "bold"} & set(tags.tags) and not [
        name for name, _ in tags.attributes if name.startswith("on")
    ]
    assert "<b>run" not in page and "<b>run $x_{" in tags.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", page)
    assert (
        "{{ 7 * 7 }}" in tags.text and r"\x1b[31mred\x1b[0m" in tags.text and r"\u202e" in tags.text
    )


def test_an_unfinished_run_has_a_report(tmp_path, undrawn):
    """A torn line at the end, no summary and no ledger; and a run that was killed before its first
    step."""
    run = make_run(tmp_path / "killed", finished=False)
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 31, "rew')
    text = Tags(page_of(run, out=tmp_path / "page.html")).text
    assert (
        "unfinished, at step 30" in text
        and "step 30" in text
        and "+0.7500" in text
        and "No ledger yet" in text
    )
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    text = Tags(page_of(bare, out=tmp_path / "bare.html")).text
    assert (
        "No step has been taken yet" in text
        and "No evaluation yet" in text
        and "No thoughts were logged" in text
    )


def test_several_runs_share_one_page(tmp_path, undrawn):
    """Two of them have the same name, and are told apart by their paths."""
    runs = [
        make_run(tmp_path / "a" / "run"),
        make_run(tmp_path / "b" / "run", steps=10, finished=False),
    ]
    text = Tags(page_of(*runs, out=tmp_path / "page.html")).text
    assert "RLP: 2 arms" in text and str(runs[0]) in text and str(runs[1]) in text
    assert "finished, 30 steps" in text and "unfinished, at step 10" in text


def test_main_curves_of_several_runs_are_drawn_over_each_axis(tmp_path, undrawn):
    """Steps, tokens, FLOPs and seconds, one of them shown at a time without a script; of one run
    over its steps."""
    runs = [make_run(tmp_path / name, 2) for name in ("first", "second")]
    axes = ("step", "input tokens", "FLOPs", "seconds of training")
    for paths, shown in ((runs, axes), (runs[:1], axes[:1])):
        page = page_of(*paths, out=tmp_path / "page.html")
        assert [page.count(f'alt="Gain on held-out positions over {axis}"') for axis in axes] == [
            axis in shown for axis in axes
        ]
        assert page.count('type="radio"') == len(shown) and page.count(" checked>") == 1


def test_alarms_and_post_training_are_told_and_escaped(tmp_path):
    """Twelve alarms, of which ten are shown; a stage whose name is hostile; the mean over two
    seeds."""
    runs = [make_run(tmp_path / f"rlp_seed{seed}", 0, seed=seed) for seed in (1, 2)]
    for step in range(12):
        append_json_line(
            runs[0] / "alarms.jsonl", {"step": step, "text": f"{HOSTILE} alarm {step}"}
        )
    for run, accuracy in zip(runs, (0.5, 0.75)):
        append_json_line(
            run / "post_training.jsonl",
            {
                "stage": "sft",
                "accuracy_with_thought": accuracy,
                "accuracy_without_thought": 0.25,
                "gain_over_start_nats": 1.0,
            },
        )
        append_json_line(
            run / "post_training.jsonl", {"stage": HOSTILE, "accuracy_with_thought": accuracy - 0.5}
        )
    page = page_of(*runs, out=tmp_path / "page.html")
    tags = Tags(page)
    assert not {"script", "bold"} & set(tags.tags) and not re.search(
        "[\x00-\x08\x0b-\x1f\x7f\u202e]", page
    )
    assert (
        "alarm 9" in tags.text
        and "alarm 10" not in tags.text
        and "2 more, in alarms.jsonl" in " ".join(tags.text.split())
    )
    assert "0.6250.500 to 0.750" in tags.text and "+1.0000" in tags.text


def test_a_run_that_knows_nothing_of_later_files_has_a_page_beside_one_that_does(tmp_path, undrawn):
    """What a folder of another version does not have, config keys included, is left out."""
    old, young = make_run(tmp_path / "old", 2), make_run(tmp_path / "young", 2)
    (old / "timing.jsonl").unlink()
    (old / "config.yaml").write_text(
        "".join(
            line
            for line in (old / "config.yaml").read_text().splitlines(keepends=True)
            if "  arm:" not in line
        )
    )
    (old / "metrics.jsonl").write_text(
        '{"step": 1, "reward/mean": 0.5}\n{"step": 2, "reward/mean": 0.5}\n'
    )
    append_json_line(young / "metrics.jsonl", {"step": 3} | dict.fromkeys(METRICS, 0.5))
    append_json_line(young / "alarms.jsonl", {"step": 3, "text": "loud"})
    text = Tags(page_of(old, young, out=tmp_path / "page.html")).text
    assert "RLP: 2 arms" in text and "loud" in text and "Variety of thoughts" in text
    assert "Distinct bigrams in a group" not in Tags(page_of(old, out=tmp_path / "page.html")).text


def test_nothing_on_a_page_is_wider_than_a_telephone(tmp_path, undrawn):
    """Tables scroll in boxes of their own or fold their cells, and nothing has a least width above
    320 pixels unless that gives way to the window's."""
    page = page_of(
        make_run(tmp_path / "first", thoughts=[make_thought(1, 0.5)]),
        make_run(tmp_path / "second"),
        out=tmp_path / "page.html",
    )
    page += page_of(tmp_path / "first", out=tmp_path / "other.html")
    style = re.sub(
        r"min\(100%, \d+px\)|max-width: \d+px",
        "",
        "".join(re.findall(r"<style>(.*?)</style>", page, re.S)),
    )
    assert [
        width for width in re.findall(r"(?:width|minmax)\D{0,3}(\d+)px", style) if int(width) > 320
    ] == []
    assert (
        page.count("<table")
        == page.count('<div class="wide"><table') + page.count('<table class="facts"')
        > 5
    )
    assert ".wide { overflow-x: auto; }" in page and re.search(
        r"\.facts \{[^}]*table-layout: fixed", page
    )


@pytest.mark.parametrize(
    "values",
    [
        (0.5, 0.9),
        (123456.5, 123457.0),
        (1e-9, 2e-9),
        (-0.000123, 0.000125),
        (0.70001, 0.70002),
        (99999.25, 99999.75),
    ],
)
def test_labels_beside_a_curve_are_inside_the_figure_and_say_the_whole_number(values, monkeypatch):
    """Wide ones too; and no `1e-5+7e-1` above the axes, where nobody sees it."""
    figures = []
    monkeypatch.setattr(
        "rlp.measure.figures._data_url", lambda figure: figures.append(figure) or ""
    )
    curve = Curve(np.array([0.0, 1.0]), np.array([values]), "black", "-", True)
    draw_curves([curve], [], unit="", x_label="step", size=(4.4, 2.6))
    axes, renderer = figures[0].axes[0], figures[0].canvas.get_renderer()
    figures[0].canvas.draw()
    inside = [
        label
        for label in axes.yaxis.get_ticklabels()
        if label.get_text() and axes.get_ylim()[0] <= label.get_position()[1] <= axes.get_ylim()[1]
    ]
    assert len(inside) >= 2 and all(label.get_window_extent(renderer).x0 >= 0 for label in inside)
    assert axes.yaxis.get_major_formatter().get_offset() == ""


def test_a_report_of_the_same_runs_is_the_same_file(tmp_path):
    run = make_run(tmp_path / "first", steps=2, thoughts=[make_thought(1, 0.5)])
    assert page_of(run, out=tmp_path / "one.html") == page_of(run, out=tmp_path / "two.html")


def test_no_thought_is_both_most_and_least_helpful(tmp_path):
    thoughts = [make_thought(1, reward) for reward in (0.25, -0.25, 0.5)] + [
        make_thought(1, None, thought="unmeasured")
    ]
    page = page_of(
        make_run(tmp_path / "first", steps=0, thoughts=thoughts), out=tmp_path / "page.html"
    )
    assert [page.count(f"thinking {reward}") for reward in (0.25, -0.25, 0.5)] == [1, 1, 1]
    best, worst = page.index("Most helpful"), page.index("Least helpful")
    assert (
        best
        < page.index("thinking 0.5")
        < page.index("thinking 0.25")
        < worst
        < page.index("thinking -0.25")
    )
    assert "unmeasured" not in page


def test_the_thick_curve_is_the_mean_of_neighbours():
    """Forty values reach one neighbour; at the ends there are fewer."""
    values = np.arange(40.0) ** 2
    expected = [values[max(0, i - 1) : i + 2].mean() for i in range(40)]
    np.testing.assert_allclose(neighbour_mean(values), expected)


def test_durations_read_as_people_say_them():
    assert [hours_and_minutes(seconds) for seconds in (None, 3.24, 59.94, 61, 3599, 5400)] == [
        "-",
        "3.2 s",
        "59.9 s",
        "1 min 01 s",
        "1 h 00 min",
        "1 h 30 min",
    ]


def test_control_characters_are_spelled_out_and_the_rest_is_kept():
    assert (
        visible_text("a\tb\nc \x1b[1m\r\u200b\u202e\ud800 caf\u00e9")
        == "a\tb\nc \\x1b[1m\\r\\u200b\\u202e\\ud800 caf\u00e9"
    )


def test_report_writes_into_the_run_and_over_reports_only(tmp_path, capsys):
    run = make_run(tmp_path / "first", steps=0)
    mine = tmp_path / "mine.html"
    mine.write_text("<p>my own page</p>")
    assert main(["report", str(run)]) == 0 and (run / "report.html").exists()
    assert main(["report", str(run)]) == 0
    assert main(["report", str(run), "--out", str(mine)]) == 2
    assert "is no report" in capsys.readouterr().err and mine.read_text() == "<p>my own page</p>"
    other = tmp_path / "other.html"
    assert (
        main(["report", str(run), "--out", str(other)]) == 0
        and main(["report", str(run), "--out", str(other)]) == 0
    )


def test_a_report_on_several_runs_needs_a_place(tmp_path, capsys):
    runs = [str(make_run(tmp_path / name, steps=0)) for name in ("first", "second")]
    assert main(["report", *runs]) == 2
    assert "Write --out FILE" in capsys.readouterr().err
    assert main(["report", *runs, "--out", str(tmp_path / "absent" / "page.html")]) == 2
    assert main(["report", *runs, "--out", str(tmp_path)]) == 2
    assert main(["report", *runs, "--out", str(tmp_path / "page.html")]) == 0


def test_write_report_refuses_what_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match="no run folder"):
        write_report([tmp_path / "absent"], tmp_path / "page.html")
    with pytest.raises(ValueError, match="at least one run folder"):
        write_report([], tmp_path / "page.html")
