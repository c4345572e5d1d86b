"""Pages and lists about runs: they hold what the folder holds, and what a model wrote does nothing
there."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from rlp.cli import main
from rlp.config import ConfigError
from rlp.measure.figures import GREY, Curve, draw_curves, neighbour_mean
from rlp.measure.metrics import METRICS
from rlp.measure.report import write_report
from rlp.measure.report_plots import arm_curve
from rlp.measure.report_runs import arms_of, read_run, without_seed
from rlp.measure.report_tables import hours_and_minutes
from rlp.measure.verdict import verdict
from rlp.process.console import visible_text
from rlp.process.json_files import read_json, write_json
from rlp.process.run_folder import RunFolder
from rlp.process.run_logs import append_json_line
from tests.measure.run_folders import PANEL, make_run, make_thought

HOSTILE = (
    "<script>alert(1)</script> <img src=x onerror=alert(2)> [bold red]x[/bold red] [/] {{ 7 * 7 }}"
    " \x1b[31mred\x1b[0m \x1b]0;title\x07 \u202e \x00 :smile:"
)


def page_of(*paths, out):
    write_report(list(paths), out)
    return out.read_text()


@pytest.fixture
def undrawn(monkeypatch):
    """Curves are not drawn, which takes most of the time of a page: for tests that read its
    words."""
    monkeypatch.setattr(
        "rlp.measure.report_plots.draw_curves",
        lambda *curves, **options: "data:image/svg+xml;base64,",
    )


class Tags(HTMLParser):
    """Every tag of a page, its attributes, and the text outside style."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


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


@pytest.mark.parametrize(
    "path, seed, arm",
    [
        ("runs/rlp_seed3", 3, "runs/rlp"),
        ("runs/rlp-s3", 3, "runs/rlp"),
        ("runs/rlp.seed-03", 3, "runs/rlp"),
        ("runs/rlp/3", 3, "runs/rlp"),
        ("runs/rlp/s3", 3, "runs/rlp"),
        ("runs/rlp_seed3", 4, "runs/rlp_seed3"),
        ("runs/qwen-3", 3, "runs/qwen-3"),
        ("runs/steps3", 3, "runs/steps3"),
        ("runs/rlp_seed13", 3, "runs/rlp_seed13"),
        ("runs/rlp", None, "runs/rlp"),
    ],
)
def test_an_arm_is_the_path_without_the_seed(path, seed, arm):
    """Only the run's own seed is left out, and only where it is marked as one."""
    assert str(without_seed(Path(path), seed)) == arm


def arms_in(*paths):
    return arms_of([read_run(RunFolder(path), path.name) for path in paths])


def test_runs_are_grouped_by_arm(tmp_path):
    """By folder name, in the order of the first run; `run.arm` is stronger than the folder."""
    paths = [
        make_run(tmp_path / "cpt", 1),
        make_run(tmp_path / "rlp_seed1", 1, seed=1),
        make_run(tmp_path / "other", 1, arm="cold start"),
        make_run(tmp_path / "rlp_seed2", 1, seed=2),
        make_run(tmp_path / "rlp_seed3", 1, seed=3, arm="cold start"),
    ]
    assert [(arm.label, [run.label for run in arm.runs]) for arm in arms_in(*paths)] == [
        ("cpt", ["cpt"]),
        ("rlp", ["rlp_seed1", "rlp_seed2"]),
        ("cold start", ["other", "rlp_seed3"]),
    ]


def test_an_arm_is_shown_by_its_mean_and_its_spread(tmp_path, undrawn):
    """Gains of 0.5 and 1.0; the arm of one run has no spread. Settings that differ are said, and
    the ledger is a mean."""
    paths = [
        make_run(tmp_path / "rlp_seed1", 2, seed=1, after=0.5),
        make_run(tmp_path / "rlp_seed2", 2, seed=2, after=1.0),
        make_run(tmp_path / "wide", 2, after=0.25),
    ]
    config = tmp_path / "wide" / "config.yaml"
    config.write_text(config.read_text().replace("group_size: 16", "group_size: 32"))
    rows = [
        "".join(Tags(row).text.split())
        for row in re.findall(
            r"<tr.*?</tr>", page_of(*paths, out=tmp_path / "page.html"), flags=re.DOTALL
        )
    ]
    assert any(row.startswith("rlp+0.7500+0.5000to+1.0000") for row in rows) and any(
        row.startswith("wide+0.2500") and "to" not in row for row in rows
    )
    assert "thought.group_size1632" in rows and any(
        row.startswith("rlp5,0025,001to5,002") for row in rows
    )
    assert not any("run.seed" in row for row in rows)


def test_a_curve_of_an_arm_stands_where_its_runs_do_on_average(tmp_path):
    """One of the runs is shorter, and slower: the curve ends with it, and its seconds are the mean
    of both. A run without a clock has no place on that axis."""
    arm = arms_in(make_run(tmp_path / "rlp_seed0", 4), make_run(tmp_path / "rlp_seed1", 3, seed=1))[
        0
    ]
    for axis, places in (
        ("step", [1, 2, 3]),
        ("tokens", [10, 20, 30]),
        ("flops", [1e9, 2e9, 3e9]),
        ("seconds", [1, 2, 3]),
    ):
        x, values = arm_curve(arm, "reward/mean", axis)
        assert x.tolist() == places and values.tolist() == [[0.1, 0.2, 0.3]] * 2
    (tmp_path / "rlp_seed1" / "timing.jsonl").unlink()
    older = arms_in(tmp_path / "rlp_seed0", tmp_path / "rlp_seed1")[0]
    assert (
        arm_curve(older, "reward/mean", "seconds")[0].size == 0
        and arm_curve(older, "reward/mean", "step")[0].size == 3
    )
    assert arm_curve(arm, "lm/loss", "step")[0].size == 0


def test_the_gain_is_decomposed_with_its_intervals(tmp_path, undrawn):
    """As the probe writes it; the picture is there only where the controls were measured."""
    run = make_run(tmp_path / "first", 2, finished=False)
    assert "The gain, decomposed" not in page_of(run, out=tmp_path / "page.html")
    append_json_line(
        run / "evaluation.jsonl",
        {
            "step": 2,
            **PANEL,
            "gain_over_empty_nats": 0.5,
            "gain_over_shuffled_nats": 1.5,
            "document_loss_nats": 2.25,
            "gain_over_shuffled_nats_low": 1.25,
            "gain_over_shuffled_nats_high": 1.75,
        },
    )
    page = page_of(run, out=tmp_path / "page.html")
    text = Tags(page).text
    for said in (
        "Gain over an empty thought",
        "+0.5000",
        "Gain over a shuffled thought",
        "+1.5000+1.2500 to +1.7500",
        "2.2500",
        "The gain, decomposed",
    ):
        assert said in text
    assert 'alt="gain over each prediction"' in page


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


BOUNDS = {
    "gain_over_start_nats_low": -0.6,
    "gain_over_start_nats_high": -0.4,
    "gain_over_empty_nats": -0.1,
    "gain_over_empty_nats_low": -0.2,
    "gain_over_empty_nats_high": 0.0,
}


def test_what_two_arms_began_with_has_its_interval_on_every_row(tmp_path, monkeypatch, undrawn):
    """Both have the same panel before them, also where one arm has measured a gain that the other
    has not."""
    for name in ("first", "second"):
        run = make_run(tmp_path / name)
        before = (
            PANEL
            | BOUNDS
            | (
                {"gain_over_ema_nats_low": -0.7, "gain_over_ema_nats_high": -0.3}
                if name == "first"
                else {}
            )
        )
        before = (
            before
            if name == "first"
            else {key: value for key, value in before.items() if "ema" not in key}
        )
        write_json(
            run / "summary.json",
            {"before": before, "after": before, "steps": 30, "seconds": 3.0, "flops": 2.5e12},
            point="end.torn_summary",
        )
    drawn = []
    monkeypatch.setattr(
        "rlp.measure.report_plots.draw_intervals",
        lambda rows, series, **options: drawn.append(dict(series)) or "data:,",
    )
    text = Tags(page_of(tmp_path / "first", tmp_path / "second", out=tmp_path / "page.html")).text
    shown = {label: (interval.low, interval.high) for label, interval in drawn[0][GREY].items()}
    assert (
        shown["Gain over the start"] == (-0.6, -0.4)
        and shown["Gain over the EMA"] == (-0.7, -0.3)
        and shown["Gain over an empty thought"] == (-0.2, 0.0)
    )
    assert "-0.6000 to -0.4000" in text.split("before, all runs")[1].split("first")[0]


def test_an_arm_that_is_not_matched_says_so_where_it_is_finished(tmp_path, undrawn):
    run = make_run(tmp_path / "first")
    for ratio, words in (
        (
            0.9543,
            "NOT MATCHED: flops 0.954 of the other run's, allowed 0.99 to 1.01: no comparison",
        ),
        (1.0069, "matched: flops 1.007"),
    ):
        summary = read_json(run / "summary.json") | {"match": {"by": "flops", "ratio": ratio}}
        write_json(run / "summary.json", summary, point="end.torn_summary")
        page = page_of(run, make_run(tmp_path / f"with_{ratio}"), out=tmp_path / "page.html")
        assert f"finished, 30 steps; {words}" in Tags(page).text


def test_work_without_a_time_of_its_own_is_not_said_to_take_none(tmp_path, undrawn):
    run = make_run(tmp_path / "first")
    ledger = read_json(run / "ledger.json")
    ledger["phases"] |= {
        "lm": ledger["phases"]["decode"] | {"seconds": 0.0},
        "score": dict.fromkeys(ledger["phases"]["decode"], 0),
    }
    write_json(run / "ledger.json", ledger, point="end.torn_ledger")
    rows = re.findall(
        r"<tr><td>(\w+)</td>.*<td class=\"n\">(.*?)</td></tr>",
        page_of(run, out=tmp_path / "page.html"),
    )
    assert (
        dict(rows)["decode"] == "3.0 s"
        and dict(rows)["lm"] == "-"
        and dict(rows)["score"] == "0.0 s"
    )


def panel_line(gain, own=-1.0, *, positions=64, **changes):
    """An evaluation: gain over the start with an interval of 0.1 on either side; `own` is the
    log-probability without a thought, that of the start -1."""
    means = {
        "gain_over_start_nats": gain,
        "gain_over_no_think_nats": gain - own - 1.0,
        "start_logprob_nats": -1.0,
        "no_think_logprob_nats": own,
    }
    ends = {
        f"{name}_{end}": mean + side
        for name, mean in means.items()
        for end, side in (("low", -0.1), ("high", 0.1))
    }
    return means | ends | {"panel_positions": positions} | changes


@pytest.mark.parametrize(
    "before, after, said",
    [
        (
            [panel_line(0.0)],
            [panel_line(0.5)],
            [
                (
                    "better than the starting model did without one: +0.500 nats (95 % interval"
                    " +0.400 to +0.600); before training it was +0.000, so training raised it"
                ),
                "Thoughts help",
                (
                    "No self-harm seen: without a thought it predicts about as the start did"
                    " (+0.000 nats)"
                ),
            ],
        ),
        (
            [panel_line(0.0)],
            [panel_line(0.05)],
            ["No effect: ", "training did not clearly change it", "No effect of thoughts"],
        ),
        (
            [panel_line(0.5)],
            [panel_line(-0.5)],
            [
                "worse than by the starting model without one",
                "training lowered it",
                "Thoughts harm",
            ],
        ),
        (
            [panel_line(0.0)],
            [panel_line(0.05, own=-2.0)],
            [
                "No effect: ",
                "Thoughts help",
                "SELF-HARM: without a thought it predicts 1.000 nats worse than the start did",
            ],
        ),
        (
            [panel_line(0.0)] * 2,
            [panel_line(0.5), panel_line(0.3)],
            ["+0.400 nats (95 % interval +0.200 to +0.600)"],
        ),
        ([{}], [panel_line(0.5)], ["+0.500 nats (95 % interval +0.400 to +0.600)."]),
    ],
)
def test_a_verdict_says_in_words_what_the_intervals_allow(before, after, said):
    sentences = verdict(before, after)
    assert len(sentences) == 2 and all(words in " ".join(sentences) for words in said)


@pytest.mark.parametrize(
    "after, said",
    [
        ([{}], "nothing was measured"),
        ([panel_line(0.5, positions=29)], "has 29 documents"),
        ([panel_line(0.5, panel_documents=7)], "has 7 documents"),
        ([PANEL], "no interval"),
        ([panel_line(0.5), panel_line(0.5, panel_documents=7)], "has 7 documents"),
    ],
)
def test_there_is_no_verdict_on_too_little(after, said):
    sentences = verdict([{}], after)
    assert len(sentences) == 1 and sentences[0].startswith("No verdict") and said in sentences[0]


def test_a_page_begins_with_the_verdict(tmp_path, undrawn):
    text = Tags(
        page_of(make_run(tmp_path / "first", steps=0, finished=False), out=tmp_path / "page.html")
    ).text
    assert (
        text.index("In words")
        < text.index("No verdict: nothing was measured")
        < text.index("Before and after")
    )


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
