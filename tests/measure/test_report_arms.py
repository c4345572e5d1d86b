"""Arms beside each other: how runs are grouped, their intervals, and the verdict in words."""

import re
from pathlib import Path

import pytest

from rlp.measure.figures import GREY
from rlp.measure.report_plots import arm_curve
from rlp.measure.report_runs import arms_of, read_run, without_seed
from rlp.measure.verdict import verdict
from rlp.process.json_files import read_json, write_json
from rlp.process.run_folder import RunFolder
from rlp.process.run_logs import append_json_line
from tests.measure.report_pages import Tags, page_of
from tests.measure.run_folders import PANEL, make_run


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
        # Six seeds, all above; and six of both signs, whose own intervals leave 0 out.
        (
            [panel_line(0.0)] * 6,
            [panel_line(0.5), panel_line(0.3)] * 3,
            [
                "+0.400 nats (95 % t interval over 6 seeds +0.285 to +0.515)",
                "training raised it",
                "Thoughts help",
            ],
        ),
        (
            [panel_line(0.0)] * 6,
            [panel_line(0.5), panel_line(-0.4)] * 3,
            ["No effect: ", "training did not clearly change it", "No effect of thoughts"],
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
        ([panel_line(0.5)] * 5, "the exact test takes 6 seeds, and these are 5 (no p below 0.062)"),
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
