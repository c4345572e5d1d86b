"""`rlp probe`: what it says about a model, a base or a checkpoint, and what it refuses."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from pyarrow import parquet

import rlp.measure.probe
from rlp.cli import main
from rlp.measure.frozen import measure_model
from rlp.measure.panel import PanelThoughts
from rlp.model.setup import PanelSetup
from rlp.world.problems import plain_documents, split_questions
from tests import REPOSITORY
from tests.measure.probing import CLOSE, settings
from tests.tiny_models import WORDS, word_tokenizer
from tests.training import read_lines, write_corpus


@pytest.fixture
def said(monkeypatch, capsys):
    """Runs `rlp probe` in this process: exit code, what it printed, and its error."""
    monkeypatch.setattr(rlp.measure.probe, "stop_ranks", lambda: None)

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            code = main(["probe", *map(str, arguments)])
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return run


def test_the_command_on_a_random_model_finds_no_signal(said, model_folder, tmp_path):
    """It says so and what helps, shows three thoughts, and writes every row, token, text and number
    once."""
    out = tmp_path / "out"
    generator = np.random.default_rng(0)
    documents = generator.integers(5, len(WORDS), size=(40, 8))
    forty = write_corpus(
        tmp_path / "forty.jsonl", [" ".join(WORDS[i] for i in words) for words in documents]
    )
    command = (
        model_folder,
        forty,
        "--out",
        out,
        "thought.max_thought_tokens=4",
        "evaluation.panel_positions=40",
    )
    code, printed, error = said(*command)
    assert (code, error) == (0, "")
    assert (
        "NO SIGNAL" in printed
        and "warm start" in printed
        and "gain over an empty thought" in printed
    )
    summary, rows = (
        json.loads((out / "probe.json").read_text()),
        parquet.read_table(out / "rows.parquet").to_pylist(),
    )
    assert len(rows) == summary["means"]["panel_positions"] == 40
    gains = np.array([row["thought_logprob_nats"] for row in rows])
    gains -= np.array([[row["no_think_logprob_nats"]] for row in rows])
    for name, gain in (("best", gains.max()), ("worst", gains.min())):
        assert f"The {name} thought: {gain:+.3f} nats against no thought" in printed
    assert [printed.count(f"\n  {part:<9}|") for part in ("text", "thought", "target")] == [3, 3, 3]
    assert summary["settings"]["thought"]["max_thought_tokens"] == 4
    assert np.mean([row["gain_over_shuffled_nats"] for row in rows]) == pytest.approx(
        summary["means"]["gain_over_shuffled_nats"]
    )
    texts, tokenizer = [line["text"] for line in read_lines(forty)], word_tokenizer()
    for row in rows:
        tokens = tokenizer.encode(texts[row["document"]])
        assert row["prefix_tokens"] + row["target_tokens"] == tokens[: row["position"] + 1]
        words = texts[row["document"]].split()[: row["position"] + 1]
        assert f"{row['prefix_tail']} {row['target']}".split() == words
        assert row["thoughts"] == [tokenizer.decode(thought) for thought in row["thought_tokens"]]
        assert [
            thought[-1] == CLOSE or cut
            for thought, cut in zip(row["thought_tokens"], row["thought_truncated"])
        ] == [True] * 4
        assert row["reasoned_logprob_nats"] == pytest.approx(np.mean(row["thought_logprob_nats"]))
    assert (out / "probe.png").read_bytes()[:4] == b"\x89PNG"
    content = {path: path.read_bytes() for path in out.iterdir()}
    code, _, error = said(*command)
    assert code == 2 and "never written over" in error
    assert {path: path.read_bytes() for path in out.iterdir()} == content


def test_the_command_on_the_base_of_the_heading_world_finds_signal(said, tmp_path):
    """Its thoughts are about their own problem: clearly better than those about another one."""
    questions = split_questions(0)["held_out"]
    texts = plain_documents(questions, 1, random.Random("held_out 0"))
    code, printed, _ = said(
        REPOSITORY / "rlp" / "world" / "headings_base",
        write_corpus(tmp_path / "held_out.jsonl", texts),
        "position.selector=marker",
        "position.marker=faces",
        "evaluation.panel_positions=64",
        "data.max_document_tokens=64",
    )
    assert code == 0, printed
    assert "SIGNAL: " in printed and "NO SIGNAL" not in printed and "at most 16 tokens" in printed
    gain, low = (
        float(word)
        for word in printed.split("gain over another document's thoughts")[1].split()[:2]
    )
    assert gain > low > 0.2


@pytest.mark.parametrize(
    "words, code, message",
    [
        (["MODEL", "/nowhere.jsonl"], 3, "no file at '/nowhere.jsonl'"),
        (["/nowhere", "CORPUS"], 2, "there is no file or folder '/nowhere'"),
        (["MODEL", "CORPUS", "thought.group_sise=3"], 2, "Did you mean thought.group_size?"),
        (["MODEL", "CORPUS", "--config", "/nowhere.yaml"], 2, "no config file at /nowhere.yaml"),
        (["MODEL", "CORPUS", "--out", "/nowhere/out"], 2, "there is no folder /nowhere"),
        (["MODEL", "CORPUS", "--start", "/nowhere"], 2, "there is no file or folder '/nowhere'"),
        (["MODEL", "CORPUS", "--strat", "MODEL"], 2, "unrecognized arguments"),
        (["RUN", "CORPUS"], 2, "is a run folder"),
    ],
)
def test_what_can_not_be_probed_is_refused_in_one_line(
    said, model_folder, corpus, tmp_path, words, code, message
):
    (tmp_path / "config.yaml").write_text("run: {dir: runs/x}\n")
    found, printed, error = said(
        *(
            {"MODEL": model_folder, "CORPUS": corpus, "RUN": tmp_path}.get(word, word)
            for word in words
        )
    )
    assert (found, printed) == (code, "")
    assert message in error and (error.count("\n") == 1 or "usage" in error)


def test_a_checkpoint_says_how_it_thinks(model_folder, corpus, tmp_path):
    """Defaults, then the config, then the checkpoint's thought_format.json, then the command
    line."""
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model" / "thought_format.json").write_text(
        json.dumps(
            {
                "open_marker": "<think>",
                "close_marker": ".",
                "temperature": 0.5,
                "max_thought_tokens": 7,
                "instruction_ids": [8, 9],
            }
        )
    )
    (tmp_path / "config.yaml").write_text(
        "data: {train: [x], template: '{body}'}\nbudget: {steps: 1}\nthought: {temperature: 0.9,"
        " open_marker: w1}\n"
    )
    subject = rlp.measure.probe.find_subject(
        str(tmp_path / "model"), str(corpus), tmp_path, ["thought.max_thought_tokens=3"]
    )
    thought = subject.config.thought
    assert (
        thought.open_marker,
        thought.close_marker,
        thought.temperature,
        thought.max_thought_tokens,
    ) == ("<think>", ".", 0.5, 3)
    assert subject.config.data.template == "{body}" and subject.config.data.held_out == [
        str(corpus)
    ]
    assert subject.instruction == (8, 9)


def test_an_instruction_without_a_file_is_thought_after(model_folder, corpus, ranks):
    """Its ids change thoughts and what they lead to, never the prediction without a thought."""
    config = settings(
        f"model.path={model_folder}", f"data.held_out=[{corpus}]", "evaluation.panel_positions=4"
    )
    plain, instructed = (
        measure_model(PanelSetup(config, print), ranks),
        measure_model(PanelSetup(config, print), ranks, instruction=(8, 9, 10)),
    )
    np.testing.assert_allclose(
        plain.columns["no_think_logprob_nats"],
        instructed.columns["no_think_logprob_nats"],
        atol=1e-5,
    )
    assert (
        np.abs(plain.columns["empty_logprob_nats"] - instructed.columns["empty_logprob_nats"]).min()
        > 1e-4
    )


def test_what_a_model_wrote_does_nothing_to_the_terminal():
    """In one line, cut, with escapes, line ends and reversals spelled out."""
    assert rlp.measure.probe._shown("a\nb\tc\x1b[31m\u202e") == "|a\\nb\\tc\\x1b[31m\\u202e|"
    assert rlp.measure.probe._shown("x" * 300 + "end", end=True) == "|..." + "x" * 237 + "end|"
    assert rlp.measure.probe._shown("x" * 300) == "|" + "x" * 240 + "...|"


def test_thoughts_of_a_panel_are_picked_by_position():
    thoughts = PanelThoughts(
        [[np.array([5])], [np.array([6, 7])], [np.array([], dtype=np.int64)]],
        np.array([[False], [True], [True]]),
    )
    picked = thoughts[np.array([2, 1])].on(torch.device("cpu"))
    assert picked.mask.tolist() == [[[False, False]], [[True, True]]]
    assert picked.tokens.tolist() == [[[0, 0]], [[6, 7]]] and picked.truncated.tolist() == [
        [True],
        [True],
    ]
