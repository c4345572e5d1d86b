"""The experiment with a real model, with a tiny one in its place: what its documents hold, that a
stage which is done is not done again, and that its page says what its results say."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlp.config import load_config
from rlp.measure.results_file import read_results
from tests import REPOSITORY
from tests.experiments.scripts import script

HERE = REPOSITORY / "experiments" / "smollm2"
documents, layout, panels, prepare, report, run = (
    script("smollm2", f"{name}.py")
    for name in ("documents", "layout", "panels", "prepare", "report", "run")
)

# Documents


@pytest.mark.parametrize(
    "expression, taken",
    [
        ("4+6+8", ["4+6=10", "10+8=18"]),
        ("100-18+20", ["100-18=82", "82+20=102"]),
        ("2+3*4", ["3*4=12", "2+12=14"]),
        ("(2+3)*4", ["2+3=5", "5*4=20"]),
        ("3/4*24", ["24/4=6", "6*3=18"]),
        ("1/2*300", ["300/2=150"]),
        ("5", []),
        ("7/2", None),
        ("3-5+9", None),  # below 0 on the way
        ("1.5+2", None),
        ("2+", None),
        ("(2+3", None),
        ("2/0", None),
    ],
)
def test_the_steps_of_an_expression(expression, taken):
    assert documents.steps(expression) == taken


@pytest.mark.parametrize("expression", ["4+6+8", "(30*2)-35", "8+96/4", "5*6*7"])
def test_a_slip_is_one_wrong_step_and_a_wrong_result(expression):
    """Every step but one is right, and goes on with what the one before it has said."""
    right = documents.steps(expression)
    slipped = documents.with_slip(expression, Random(0)).split()
    told = [step.partition("=") for step in slipped]
    wrong = [said for said, _, result in told if documents.steps(said) != [f"{said}={result}"]]
    assert len(wrong) == 1 and len(slipped) == len(right)
    assert told[-1][2] != right[-1].partition("=")[2]
    assert documents.with_slip("five", Random(0)) == ""


def test_the_loss_after_a_slip_is_on_the_result_alone():
    line = only("It costs $4 + $6 + $8 = $<<4+6+8=18>>18 in all.")
    rows = documents._three_times(line, ("<", ">"), list)
    read = ["".join(row["tokens"][slice(*row["loss_spans"][0])]) for row in rows]
    assert read[:2] == ["It costs $4 + $6 + $8 = 18 in all.\n", line.with_thought("<", ">")]
    assert read[2] == "18" and rows[2]["text"].endswith(">18 in all.\n")


def only(answer: str) -> documents.Line:
    (line,) = documents.read_lines(answer)
    return line


def test_a_line_with_several_steps_gets_a_thought():
    line = only("It costs $4 + $6 + $8 = $<<4+6+8=18>>18 in all.\n#### 18")
    assert line.plain == "It costs $4 + $6 + $8 = 18 in all.\n"
    assert line.with_thought("<think>", "</think>") == (
        "It costs $4 + $6 + $8 = <think>4+6=10 10+8=18</think>18 in all.\n"
    )


@pytest.mark.parametrize(
    "answer, plain",
    [
        ("He has 3+4 = <<3+4=7>>7 cats", "He has 3+4=7 cats\n"),  # one step
        ("Of 2 + 3 + 4 = <<2+3+4=9>>9", "Of 2 + 3 + 4=9\n"),  # one digit
        ("18 it is: 4+6+8 = <<4+6+8=18>>18", "18 it is: 4+6+8=18\n"),  # it is there already
        ("Half of a dozen and 6 = <<6+4+6=16>>16", "Half of a dozen and 6=16\n"),  # no 4 there
        ("2+3+9 = <<2+3+9=15>>15", "2+3+9=15\n"),  # wrong
        ("x = 5", "x=5\n"),
    ],
)
def test_other_lines_have_no_position(answer, plain):
    line = only(answer)
    assert (line.plain, line.thought) == (plain, "")


def test_no_problem_has_lines_in_two_parts():
    """The share of each part, and test problems are held out."""
    parts = [documents.part_of("train", number) for number in range(1000)]
    counts = {part: parts.count(part) for part in set(parts)}
    assert counts == {"warm": 500, "train": 350, "held_out": 150}
    assert documents.part_of("test", 1) == "held_out"


# Stages


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = ["<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_ = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(vocabulary)}, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token="<|im_end|>")


def tiny_llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            dtype="float32",
        )
    )


TINY = layout.Scale(
    seeds=1,
    arms=("rlp", "shuffled_reward"),
    gate_positions=36,
    gate_thoughts=2,
    early_positions=4,
    arm_positions=4,
    text_positions=4,
    warm=("budget.steps=2",),
    calibrate=("budget.steps=2",),
    rlp=("budget.steps=2",),
)
OVERRIDES = (
    *("data.max_document_tokens=64", "thought.max_thought_tokens=3", "thought.group_size=2"),
    *("optim.batch_size=2", "optim.learning_rate=1e-3"),
)


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gsm8k")
    for split, count in (("train", 20), ("test", 40)):
        rows = []
        for number in range(count):
            a, b, c = number + 1, number + 2, 30
            said = f"{a} + {b} + {c} = <<{a}+{b}+{c}={a + b + c}>>{a + b + c} in all.\nSo it is."
            rows.append(json.dumps({"question": "How many?", "answer": said}) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture(scope="module")
def command(gsm8k, tmp_path_factory):
    """The whole experiment in a folder of its own, or some stages of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "read_gguf", lambda source: (tiny_llama(), tokenizer()))
        patch.setitem(run.SCALES, "cpu", TINY)
        patch.chdir(REPOSITORY)
        source = tmp_path_factory.mktemp("package") / "tiny.gguf"
        source.write_bytes(b"GGUF")

        def call(out: Path, *arguments: str) -> int:
            overrides = [word for one in OVERRIDES for word in ("--override", one)]
            where = ["--out", str(out), "--gsm8k", str(gsm8k), "--source", str(source)]
            return run.main([*arguments, *where, *overrides])

        yield call


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "run"
    assert command(out, "--anyway") == 0
    return out


@pytest.mark.slow
def test_every_arm_is_read_on_every_panel(finished):
    results = read_results(finished / "results.jsonl", layout.LAYOUT)
    arms = results.where(stage=layout.TRAINED)
    assert arms.values("arm") == ["base", *TINY.arms]
    for arm in arms.values("arm"):
        read = {(line["panel"], line["temperature"]) for line in arms.where(arm=arm).lines}
        assert read == {("results", 1), ("results", 0.3), ("solutions", 1), ("other_text", 1)}
    for line in arms.where(arm="shuffled_reward").lines:
        assert line["steps"] == 2 and line["flops"] > 0 and line["seconds"] > 0


@pytest.mark.slow
def test_a_finished_experiment_does_nothing_again(finished, command):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert command(finished, "--anyway") == 0
    after = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    changed = {path.name for path in after if after[path] != before.get(path)}
    assert changed <= {"costs.jsonl", "match.yaml"}


@pytest.mark.slow
def test_arms_without_thoughts_spend_what_rlp_does(finished, command, monkeypatch):
    """In many small steps; the rounds of mixed SFT with all that they throw away."""
    monkeypatch.setitem(run.SCALES, "cpu", replace(TINY, rlp=("budget.steps=40",)))
    monkeypatch.setattr(run, "LM_STEPS", ("optim.batch_size=1",))
    arms = ("cpt", "cpt_replay", "mixed_sft")
    shutil.copytree(finished, out := finished.parent / "longer")
    shutil.rmtree(out / "arms")
    lines = [one for one in (out / "results.jsonl").open() if json.loads(one)["arm"] == "base"]
    (out / "results.jsonl").write_text("".join(lines))
    assert command(out, "arms", "--anyway", "--arms", "rlp", *arms) == 0
    results = read_results(out / "results.jsonl", layout.LAYOUT).where(temperature=1.0)
    spent = {arm: results.by_seed(arm, "flops")[0] for arm in ("rlp", *arms)}
    assert spent == {arm: pytest.approx(spent["rlp"], rel=0.01) for arm in spent}


def test_documents_are_made_once(command, tmp_path):
    assert command(tmp_path, "prepare", "documents") == 0
    made = {path: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    assert {path.stem for path in made} == {*documents.FILES, "documents"}
    held_out = (tmp_path / "data" / "held_out.jsonl").read_text().splitlines()
    assert (
        len(held_out) >= 40 and json.loads(held_out[-1])["text"] == "40 + 41 + 30 = 111 in all.\n"
    )
    stages = [json.loads(one)["stage"] for one in (tmp_path / "costs.jsonl").open()]
    assert stages == ["prepare", "documents"]
    assert command(tmp_path, "documents") == 0
    assert {path: path.read_bytes() for path in (tmp_path / "data").iterdir()} == made


def test_a_stage_that_lacks_the_one_before_says_so(command, tmp_path, capsys):
    assert command(tmp_path / "empty", "warm") == 2
    assert "model, which is not there: run all stages" in capsys.readouterr().err


def test_the_folder_of_another_machine_goes_on_with_a_message(tmp_path, capsys):
    (tmp_path / "machines.json").write_text('["a PDP-11, 1 cores, torch 0.1"]')
    here = run.tell_machine(tmp_path)
    said = capsys.readouterr().out
    assert "begun on another machine (a PDP-11" in said and "goes on here" in said
    assert json.loads((tmp_path / "machines.json").read_text())[1:] == [here]
    assert run.tell_machine(tmp_path) == here and capsys.readouterr().out == ""


# The gate, and what is told


def line(arm="rlp", seed=0, temperature=1.0, **more) -> dict:
    figures = dict.fromkeys((*layout.LAYOUT.figures, *layout.LAYOUT.others), 0.5)
    identity = {"arm": arm, "seed": seed, "stage": layout.TRAINED, "panel": "results"}
    return figures | identity | {"temperature": temperature, "machine": "here"} | more


@pytest.mark.parametrize(
    "gain, best, documents, passes, said",
    [
        (0.1, 0.2, 30, True, "The gate passes: thoughts gain +0.500 nats a token"),
        (-0.1, 0.2, 30, False, "The gate fails"),
        (0.1, -0.1, 30, False, "The gate fails"),
        (0.1, 0.2, 29, False, "No verdict: the panel holds 29 documents, and one needs 30."),
    ],
)
def test_the_gate(gain, best, documents, passes, said):
    """Both lower ends have to be above 0, on as many documents as a verdict needs."""
    found = panels.gate_in_words(line(gain_low=gain, best_of_g_low=best, documents=documents))
    assert found[0] == passes and said in found[1]


def results_of(path: Path, lines: list[dict]):
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return read_results(path, layout.LAYOUT)


def test_arms_that_are_missing_are_named_and_the_others_told(tmp_path):
    """Six seeds allow one comparison; the start counts as the same number for every seed."""
    lines = [line("base", gain_over_start=0.2)]
    lines += [line("rlp", seed, gain_over_start=0.5 + seed / 100) for seed in range(6)]
    said = report.claim(results_of(tmp_path / "results.jsonl", lines))
    assert "At T 1: RLP is above the start (exact paired test, 6 seeds, Holm over 1 arm)." in said
    assert "Missing: shuffled_reward (all 6 seeds); mixed_sft (all 6 seeds)" in said


def test_nothing_is_claimed_without_arms(tmp_path):
    assert report.claim(results_of(tmp_path / "none", [])).startswith("No arm has run")


# What is published


def test_the_pages_say_what_the_results_say():
    tables = report.make_tables(
        read_results(report.RESULTS, layout.LAYOUT), report.read_costs(report.COSTS)
    )
    for page in report.PAGES:
        assert report.filled(page, tables) == page.read_text()


def test_a_result_that_changes_changes_the_readme():
    """The check above can fail."""
    found = read_results(report.RESULTS, layout.LAYOUT)
    changed = [one | {"gain": one["gain"] + 0.1} for one in found.lines]
    tables = report.make_tables(replace(found, lines=tuple(changed)), [])
    assert report.filled(report.README, tables) != report.README.read_text()


@pytest.mark.parametrize("scale", layout.SCALES.values(), ids=layout.SCALES)
def test_every_scale_is_of_configs_that_can_be_read(scale):
    for stage in ("warm", "calibrate", "rlp"):
        load_config(REPOSITORY / "configs" / f"smollm2_{stage}.yaml", list(getattr(scale, stage)))
    assert set(scale.arms) <= set(layout.ARMS) <= set(layout.WORDS) and scale.seeds >= 6
