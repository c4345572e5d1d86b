"""Which traces are kept: every reason by hand, the files, and what TRL makes of them."""

import json

import pytest

from rlp.cli import main
from rlp.config import ConfigError
from rlp.post.language import language_reward
from rlp.post.traces import Trace, TraceRule, filter_traces, judged, kept_traces, read_traces
from rlp.process.faults import COMMAND_POINTS

DOM = "\u0434\u043e\u043c"
MIXED = f"a {DOM} b {DOM} c"  # 3 Latin letters, 6 Cyrillic ones, 4 switches


def trace(thought, *, prompt="p", right=True, cut=False):
    return Trace(prompt, f"<think>{thought}</think> 4", thought, right, cut)


LATIN = TraceRule(script="latin")


@pytest.mark.parametrize(
    "rule, given, reasons",
    [
        (LATIN, trace("two and two"), []),
        (LATIN, trace("2 + 2 = 4"), []),  # no letter of another script
        (LATIN, trace(""), []),
        (LATIN, trace("two", right=False), ["wrong"]),
        (TraceRule(only_right=False), trace("two", right=False), []),
        (LATIN, trace(MIXED), ["language", "switches"]),
        (LATIN, trace(DOM), ["language"]),
        (TraceRule(), trace(DOM), []),  # one script, whichever
        (TraceRule(), trace(MIXED), ["language", "switches"]),
        (TraceRule(least_share=2 / 3), trace(MIXED), ["switches"]),
        (TraceRule(least_share=0.67), trace(MIXED), ["language", "switches"]),
        (TraceRule(least_share=0, most_switches=4), trace(MIXED), []),
        (TraceRule(least_share=0, most_switches=3), trace(MIXED), ["switches"]),
        (TraceRule(least_share=0, most_switches=None), trace(MIXED), []),
        (TraceRule(script="cyrillic"), trace("two"), ["language"]),
        (TraceRule(most_characters=3), trace("four"), ["long"]),
        (TraceRule(most_characters=4), trace("four"), []),
        (TraceRule(), trace("four", cut=True), ["cut"]),
        (TraceRule(vocabulary={"two", "and"}, most_outside=0.25), trace("two and two x"), []),
        (
            TraceRule(vocabulary={"two", "and"}, most_outside=0.24),
            trace("two and two x"),
            ["vocabulary"],
        ),
        (TraceRule(classifier=lambda text: "de", language="de"), trace("zwei"), []),
        (TraceRule(classifier=lambda text: "de", language="en"), trace("zwei"), ["classifier"]),
        (
            TraceRule(script="latin", most_characters=2),
            trace(MIXED, right=False, cut=True),
            ["wrong", "language", "switches", "long", "cut"],
        ),
    ],
)
def test_each_reason_to_drop_a_trace(rule, given, reasons):
    ((_, found, _),) = judged([given], rule)
    assert found == reasons


def test_a_trace_is_kept_once_and_only_what_is_kept_counts():
    """Whatever its case and spacing; with another prompt it is another trace."""
    traces = [
        trace("two and", right=False),
        trace("two and"),
        trace("Two  and"),
        trace("\uff54\uff57\uff4f and"),
        trace("two and", prompt="q"),
    ]
    assert [reasons for _, reasons, _ in judged(traces, LATIN)] == [
        ["wrong"],
        [],
        ["duplicate"],
        ["duplicate"],
        [],
    ]
    assert [one["prompt"] for one in kept_traces(traces, LATIN)] == ["p", "q"]


def rollouts(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [
    {"prompt": "2+2 <think>", "text": "two</think> 4", "right": True},
    {"prompt": "2+2 <think>", "text": f"{DOM} ab</think> 4", "answer": "4", "expected": "4"},
    {"prompt": "2+2 <think>", "text": "two</think> 5", "answer": "5", "expected": "4"},
    {"prompt": "2+2", "completion": "<think>three</think> 4", "right": 1.0},
    {"prompt": "2+3", "text": "<think>five", "right": 0, "truncated": True},
]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_of_rollouts_becomes_kept_and_dropped(tmp_path, capsys):
    source, out = rollouts(tmp_path / "rollouts.jsonl", ROWS), tmp_path / "out"
    before = source.read_bytes()
    assert main(["traces", str(source), "--out", str(out), "--script", "latin"]) == 0
    assert capsys.readouterr().out == (
        f"{out}: 2 of 5 traces kept, 3 dropped (language 1, wrong 2, cut 1; one may have several"
        " reasons)\n"
    )
    assert lines(out / "kept.jsonl") == [
        {"prompt": "2+2 <think>", "completion": "two</think> 4"},
        {"prompt": "2+2", "completion": "<think>three</think> 4"},
    ]
    dropped = lines(out / "dropped.jsonl")
    assert [(one["line"], one["right"], one["reasons"]) for one in dropped] == [
        (2, True, ["language"]),
        (3, False, ["wrong"]),
        (5, False, ["wrong", "cut"]),
    ]
    assert dropped[0]["measured"] == {"share": 0.4, "switches": 1, "characters": 6}
    told = json.loads((out / "traces.json").read_text())
    assert (told["read"], told["kept"]) == (5, 2) and told["rule"]["script"] == "latin"
    assert source.read_bytes() == before

    assert main(["traces", str(source), "--out", str(out)]) == 2
    assert "exists and is never written over" in capsys.readouterr().err


def test_the_thoughts_of_a_run_are_traces(tmp_path):
    """Between the run's own markers, with the target; right where they gained, or predicted."""
    run = tmp_path / "run"
    run.mkdir()
    config = "run: {dir: r}\nmodel: {path: m}\ndata: {train: [d]}\nbudget: {steps: 1}\n"
    (run / "config.yaml").write_text(f"{config}thought: {{open_marker: <t>, close_marker: </t>}}\n")
    common = {"step": 1, "prefix_tail": "2 + 2 =", "target": " 4", "truncated": False}
    rows = [
        common | {"thought": " two", "gain": 0.5, "reward": 1.5},
        common | {"thought": " ten", "gain": -0.5, "reward": 0.5},
        common | {"thought": " too", "gain": -0.5, "prediction": " 4"},
        common | {"thought": " six", "gain": 0.5, "truncated": True},
    ]
    rollouts(run / "thoughts.jsonl", rows)
    counts = filter_traces(run, tmp_path / "out", LATIN)
    assert (counts.read, counts.kept, counts.dropped) == (4, 2, {"wrong": 1, "cut": 1})
    assert lines(tmp_path / "out" / "kept.jsonl") == [
        {"prompt": "2 + 2 =", "completion": "<t> two</t> 4"},
        {"prompt": "2 + 2 =", "completion": "<t> too</t> 4"},
    ]


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "is empty: there is no trace in it"),
        ("\n \n", "is empty: there is no trace in it"),
        ('{"prompt": "p", "text": "t"}\n', "line 1: nothing says whether it is right"),
        ('{"prompt": "p", "text": 4, "right": true}\n', "line 1: text must be a text, got 4"),
        ('{"text": "t", "right": 1}\n{"prompt": "p", "text": "t", "right": 1}\n', "line 2: has a"),
        ('{"text": "t", "right": 1}\n{"text"', "line 2 is not JSON"),
        ("[]\n", "line 1 is no object"),
    ],
)
def test_a_bad_file_is_refused_by_its_line_and_leaves_nothing(tmp_path, content, words):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(ConfigError) as refused:
        filter_traces(tmp_path / "bad.jsonl", tmp_path / "out", LATIN)
    assert words in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


@pytest.mark.parametrize(
    "options, words",
    [
        (["--script", "klingon"], "--script must be a script"),
        (["--least-share", "95"], "--least-share is a fraction"),
        (["--language", "de"], "--language goes with --classifier"),
        (["--classifier", "nothing"], "must be package.module:function"),
    ],
)
def test_a_bad_rule_is_one_message(tmp_path, capsys, options, words):
    source = rollouts(tmp_path / "rollouts.jsonl", ROWS)
    assert main(["traces", str(source), "--out", str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert main(["traces", str(tmp_path / "no.jsonl"), "--out", str(tmp_path / "out")]) == 2
    assert "there is no" in capsys.readouterr().err


def test_a_classifier_that_names_no_language_is_refused():
    rule = TraceRule(classifier=lambda text: None, language="de")
    with pytest.raises(ConfigError, match="--classifier gave None"):
        list(judged([trace("zwei")], rule))


def test_a_disk_that_fills_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    source = rollouts(tmp_path / "rollouts.jsonl", ROWS)
    points = [point for point in COMMAND_POINTS if point.startswith("traces.")]
    for full in points:

        def fault(point, first=None, full=full):
            if point == full:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr("rlp.process.files.fault", fault)
        with pytest.raises(OSError, match="No space left"):
            filter_traces(source, tmp_path / "out", LATIN, with_pairs=True)
        assert [path.name for path in tmp_path.iterdir()] == ["rollouts.jsonl"]
    assert len(points) == 5


PAIRED = [
    {"prompt": "2+2", "text": "four", "right": True},
    {"prompt": "2+2", "text": "5", "right": False},
    {"prompt": "2+3", "text": "five", "right": True},  # none wrong
    {"prompt": "2+2", "text": " 5 ", "right": False},  # there already
    {"prompt": "2+4", "text": "seven", "right": False},  # none right
    {"prompt": "2+2", "text": "vier", "right": True},
    {"prompt": "2+2", "text": DOM, "right": False, "truncated": True},
    {"prompt": "2+2", "text": "six", "right": False},
    {"prompt": "2+5", "text": "7", "right": False},  # judged twice, and right at last
    {"prompt": "2+5", "text": "7", "right": True},
    {"prompt": "2+6", "text": DOM, "right": True},  # neither kept nor wrong
]


def test_every_wrong_trace_is_set_against_a_kept_one_of_its_prompt(tmp_path, capsys):
    """Whatever else is held against it, and once; kept ones take turns. Nothing is lost: what is in
    no pair is counted, and stands where it stood."""
    source, out = rollouts(tmp_path / "rollouts.jsonl", PAIRED), tmp_path / "out"
    options = ["--out", str(out), "--script", "latin", "--pairs"]
    assert main(["traces", str(source), *options]) == 0
    assert lines(out / "pairs.jsonl") == [
        {"prompt": "2+2", "chosen": chosen, "rejected": rejected, "reasons": why, "lines": numbers}
        for chosen, rejected, why, numbers in (
            ("four", "5", ["wrong"], [1, 2]),
            ("vier", DOM, ["wrong", "language", "cut"], [6, 7]),
            ("four", "six", ["wrong"], [1, 8]),
        )
    ]
    assert capsys.readouterr().out.endswith(
        "; 3 pairs; prompts without a wrong trace 3, without a kept one 1; wrong traces that were"
        " there already 2\n"
    )
    told = json.loads((out / "traces.json").read_text())
    assert told["pairs"] == {"pairs": 3, "without_wrong": 3, "without_right": 1, "same": 2}
    assert len(lines(out / "kept.jsonl")) + len(lines(out / "dropped.jsonl")) == len(PAIRED)


@pytest.mark.parametrize(
    "rows, options, words",
    [
        (PAIRED[2:3], [], "1 of its prompts have no wrong trace, and 0 wrong ones only"),
        (PAIRED[4:5], [], "0 of its prompts have no wrong trace, and 1 wrong ones only"),
        ([{"text": "t", "right": 1}], [], "--pairs needs prompts"),
        (PAIRED, ["--wrong-too"], "leave out --wrong-too"),
    ],
)
def test_traces_that_give_no_pair_are_one_message(tmp_path, capsys, rows, options, words):
    source = rollouts(tmp_path / "rollouts.jsonl", rows)
    assert main(["traces", str(source), "--out", str(tmp_path / "out"), "--pairs", *options]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["rollouts.jsonl"]


def test_a_run_gives_pairs_where_it_told_what_the_model_said(tmp_path):
    """A wrong thought stands with the prediction behind it; without one nobody knows what the model
    would have written, and the target is not that."""
    run = tmp_path / "run"
    run.mkdir()
    config = "run: {dir: r}\nmodel: {path: m}\ndata: {train: [d]}\nbudget: {steps: 1}\n"
    (run / "config.yaml").write_text(config)
    common = {"step": 1, "prefix_tail": "2 + 2 =", "target": " 4", "gain": 0.1}
    rows = [
        common | {"thought": " two", "prediction": " 4"},
        common | {"thought": " ten", "prediction": " 9"},
    ]
    rollouts(run / "thoughts.jsonl", rows)
    filter_traces(run, tmp_path / "out", LATIN, with_pairs=True)
    (pair,) = lines(tmp_path / "out" / "pairs.jsonl")
    assert (pair["chosen"], pair["rejected"]) == (
        "<think> two</think> 4",
        "<think> ten</think> 9",
    )

    rollouts(run / "thoughts.jsonl", [common | {"thought": " ten", "gain": -1.0}])
    with pytest.raises(ConfigError, match="line 1 has a thought that did not gain, and nothing"):
        filter_traces(run, tmp_path / "other", LATIN, with_pairs=True)
    assert not (tmp_path / "other").exists()


def test_traces_are_read_one_at_a_time(tmp_path):
    """What comes later can not even be read."""
    source = rollouts(tmp_path / "rollouts.jsonl", [ROWS[0], []])
    traces = read_traces(source)
    assert next(traces).thought == "two"
    with pytest.raises(ConfigError, match="line 2 is no object"):
        next(traces)


def test_the_reward_of_a_completion_is_the_share_in_its_thought():
    reward = language_reward("latin", weight=2.0)
    texts = [f"ab {DOM} c</think> {DOM}", f"<think>ab</think> {DOM}", "42</think> x", DOM]
    assert reward(completions=texts, prompts=None) == [1.0, 2.0, 2.0, 0.0]
    chat = [[{"role": "assistant", "content": f"<think>{DOM}a</think> ok"}]]
    assert reward(completions=chat) == [0.5]
    decoded = language_reward("latin", decode=lambda ids: {1: f"ab</think> {DOM}"}[ids[0]])
    assert decoded(completions=[f"ab {DOM}"], completion_ids=[[1]]) == [1.0]
    with pytest.raises(ConfigError, match="script must be a script"):
        language_reward("klingon")


@pytest.mark.slow
def test_trl_reads_what_is_kept_and_adds_up_the_reward(tmp_path, model_folder):
    """One step of SFT on kept.jsonl as it is, and one of GRPO with the share beside a reward."""
    import trl
    from datasets import load_dataset
    from transformers import AutoTokenizer

    rows = [
        {"prompt": "w1 w2 <think>", "text": f"w{i} </think> w4", "right": True} for i in range(8)
    ]
    filter_traces(rollouts(tmp_path / "rollouts.jsonl", rows), tmp_path / "out", LATIN)
    data = load_dataset(
        "json",
        data_files=str(tmp_path / "out" / "kept.jsonl"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    common = {
        "output_dir": str(tmp_path / "unused"),
        "max_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    sft = trl.SFTConfig(**common, per_device_train_batch_size=8)
    trainer = trl.SFTTrainer(model=str(model_folder), args=sft, train_dataset=data)
    assert len(trainer.train_dataset) == 8 and trainer.train().training_loss > 0

    decode = AutoTokenizer.from_pretrained(model_folder).decode
    grpo = trl.GRPOConfig(
        **common, per_device_train_batch_size=4, num_generations=4, max_completion_length=4
    )
    trainer = trl.GRPOTrainer(
        model=str(model_folder),
        reward_funcs=[lambda completions, **_: [0.25] * len(completions)]
        + [language_reward("latin", weight=0.5, decode=decode)],
        args=grpo,
        train_dataset=data.select_columns(["prompt"]),
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["rewards/script_share/mean"] == 0.5  # the tiny model writes Latin words alone
    assert logged["reward"] == 0.75
