"""The program as a user meets it: launchers, messages, exit codes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlp import train as program
from rlp.process.exit_codes import BAD_CONFIG, BAD_DATA, DONE
from tests import REPOSITORY
from tests.tiny_models import architecture, word_tokenizer
from tests.training import TINY, rank_environment

GSM8K = REPOSITORY.parent / "shared" / "data" / "gsm8k" / "train.jsonl"


@pytest.fixture(autouse=True)
def keep_the_process_group(monkeypatch, ranks) -> None:
    """The tests of a session share one process group; a program of its own would leave it at the
    end."""
    monkeypatch.setattr("rlp.process.ranks.stop_ranks", lambda: None)


@pytest.fixture
def arguments(tmp_path, model_folder, corpus) -> list[str]:
    """Command-line arguments of a tiny run in tmp_path/run."""
    (tmp_path / "tiny.yaml").write_text(
        f"model: {{path: {model_folder}}}\ndata: {{train: "
        f"[{corpus}]}}\nrun: {{dir: {tmp_path / 'run'}}}\n"
    )
    return [str(tmp_path / "tiny.yaml"), *(f"{key}={value}" for key, value in TINY.items())]


ALONE = ["--master_port", "29581"]


@pytest.mark.parametrize(
    "command",
    [
        ["deepspeed", "--num_accelerators", "2", *ALONE, "train.py"],
        pytest.param(
            ["deepspeed", "--num_accelerators", "2", *ALONE, "--module", "rlp.train"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["torchrun", "--nproc_per_node", "2", *ALONE, "-m", "rlp.train"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["train.py", "module", "torchrun"],
)
def test_a_launcher_runs_two_ranks_under_zero_3(arguments, tmp_path, command):
    """`deepspeed train.py CONFIG a.b=c`, and the same program as a module of the package: the
    launcher's own argument is accepted, and both ranks finish."""
    launcher = str(Path(sys.executable).with_name(command[0]))
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in rank_environment(0, 1, 0).keys() - os.environ.keys()
    }
    result = subprocess.run(
        [
            launcher,
            *command[1:],
            *arguments,
            "engine.zero_stage=3",
        ],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3


MISTAKES = {
    "an unknown key": (
        ["thought.group_sise=8"],
        BAD_CONFIG,
        "Did you mean thought.group_size?",
    ),
    "an impossible value": (
        ["thought.group_size=1"],
        BAD_CONFIG,
        "thought.group_size must be at least 2",
    ),
    "bfloat16 at stage 0": (
        ["engine.dtype=bfloat16", "engine.zero_stage=0"],
        BAD_CONFIG,
        "write engine.zero_stage=1",
    ),
    "top-p": (["thought.top_p=0.9"], BAD_CONFIG, "write thought.top_p=1.0"),
    "no such model": (["model.path=/nowhere/model"], BAD_CONFIG, "/nowhere/model"),
    "no such data": (
        ["data.train=[/nowhere/*.jsonl]"],
        BAD_DATA,
        "no file at '/nowhere/*.jsonl'",
    ),
    "a field that no document has": (
        ["data.template='{body}'"],
        BAD_DATA,
        "no field 'body'; the row has text",
    ),
    "a marker that the tokenizer can not write": (
        ["thought.open_marker=think-here"],
        BAD_CONFIG,
        "thought.open_marker: the tokenizer can not write",
    ),
    "a position marker that is in no document": (
        ["position.selector=marker", "position.marker=w41 w41 w41 w41"],
        BAD_DATA,
        (
            "position.marker 'w41 w41 w41 w41' does not "
            "occur; searched: token ids [47, 47, 47, 47], "
            "|w41|w41|w41|w41|"
        ),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_clear_message_and_its_exit_code(arguments, tmp_path, capsys, name):
    """Where, what came, what was expected, what to write; and no run folder is left behind."""
    overrides, code, message = MISTAKES[name]
    assert program.main([*arguments, *overrides]) == code
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and message in output.err
    assert "Traceback" not in output.err
    assert not (tmp_path / "run").exists()
    assert program.main([*arguments, *overrides, "--dry-run"]) == code
    assert capsys.readouterr().err == output.err


def without_a_weight(folder: Path, model: Path) -> Path:
    """The model with one tensor taken out."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


REFUSED_AT_START = {
    "a folder that exists": (
        ["run.dir=TMP/old"],
        BAD_CONFIG,
        "exists and is never written over",
    ),
    "a folder below a file": (
        ["run.dir=TMP/tiny.yaml/run"],
        BAD_CONFIG,
        "can not be created: [Errno 20] Not a directory",
    ),
    "a model that lacks a weight": (
        ["model.path=LACKING"],
        BAD_CONFIG,
        "lacks 1 weights that the architecture has, such as model.norm.weight",
    ),
    "a layout that the attention can not run": (
        ["engine.layout=tree", "model.attention=flash_attention_2"],
        BAD_CONFIG,
        "engine.layout",
    ),
    "no run to match": (
        ["match.ledger=TMP/none.json", "budget.flops=1e9"],
        BAD_CONFIG,
        "match.ledger: TMP/none.json can not be read",
    ),
    "no ledger of the data": (
        ["data.ledger=TMP/none.json"],
        BAD_CONFIG,
        "data.ledger: TMP/none.json can not be read",
    ),
    "held-out documents without a position": (
        ["data.held_out=[TMP/short.jsonl]"],
        BAD_DATA,
        "short.jsonl",
    ),
    "a time to save by that is past": (
        ["checkpoint.save_by=2001-01-01T00:00"],
        BAD_CONFIG,
        "checkpoint.save_by 2001-01-01T00:00 is past",
    ),
    "no checkpoint": (["run.resume=TMP/none"], BAD_CONFIG, "is no complete checkpoint"),
    "a run of other settings": (
        ["run.dir=TMP/old", "run.resume=auto", "optim.beta2=0.5"],
        BAD_CONFIG,
        "optim.beta2 was 0.95, is 0.5",
    ),
    "a checkpoint of another dtype": (
        ["run.resume=TMP/old/checkpoints/step_1", "engine.dtype=bfloat16", "engine.zero_stage=1"],
        BAD_CONFIG,
        "engine.dtype",
    ),
    "a checkpoint of another model": (
        ["run.resume=TMP/old/checkpoints/step_1", "model.path=LARGER"],
        BAD_CONFIG,
        "model.path",
    ),
    "markers added to a run without": (
        [
            "run.dir=TMP/old",
            "run.resume=auto",
            "thought.open_marker='<pad> w1'",
            "thought.add_markers=true",
        ],
        BAD_CONFIG,
        "thought.add_markers was False, is True",
    ),
}


def test_the_dry_run_refuses_what_the_run_refuses(arguments, tmp_path, model_folder, capsys):
    """With the same message and exit code, and it leaves every file as it is."""
    lacking, larger = without_a_weight(tmp_path / "lacking", model_folder), tmp_path / "larger"
    AutoModelForCausalLM.from_config(architecture("llama")).save_pretrained(larger)
    word_tokenizer().save_pretrained(larger)
    (tmp_path / "short.jsonl").write_text('{"text": "w1"}\n' * 4)
    assert program.main([*arguments, f"run.dir={tmp_path / 'old'}", "budget.steps=1"]) == DONE
    shutil.rmtree(tmp_path / "old" / "export")
    (tmp_path / "old" / "summary.json").unlink()
    capsys.readouterr()

    def files() -> dict[Path, bytes]:
        return {
            path: path.read_bytes()
            for path in tmp_path.rglob("*")
            if path.is_file() and path.suffix != ".log"
        }

    paths = {"TMP": tmp_path, "LACKING": lacking, "LARGER": larger}
    for name, (overrides, code, message) in REFUSED_AT_START.items():
        words = [
            re.sub("TMP|LACKING|LARGER", lambda match: str(paths[match[0]]), word)
            for word in overrides
        ]
        before = files()
        assert program.main([*arguments, *words, "--dry-run"]) == code, name
        said = capsys.readouterr().err
        assert files() == before, name
        assert program.main([*arguments, *words]) == code, name
        assert re.sub(r"it is 20\S+", "it is now", capsys.readouterr().err) == re.sub(
            r"it is 20\S+", "it is now", said
        ), name
        assert message.replace("TMP", str(tmp_path)) in said, name


def test_the_dry_run_says_what_a_resumed_run_would_do(arguments, tmp_path, capsys):
    """From which checkpoint it continues; that it begins again; that it is complete. A damaged
    checkpoint stays where it is."""
    run = [*arguments, "run.resume=auto", "budget.steps=2", "checkpoint.every_n_steps=1"]

    def dry() -> str:
        assert program.main([*run, "--dry-run"]) == DONE
        return capsys.readouterr().out

    assert "weights: loaded and checked" in dry() and not (tmp_path / "run").exists()
    assert program.main(run) == DONE
    assert "is complete: the run would do nothing" in dry()
    (tmp_path / "run" / "summary.json").unlink()
    assert f"the run continues from {tmp_path}/run/checkpoints/step_2 at step 2" in dry()
    (tmp_path / "run" / "checkpoints" / "step_2" / "COMPLETE").write_text("x")
    said = dry()
    assert "The run sets it aside" in said and "step_1 at step 1" in said
    assert (tmp_path / "run" / "checkpoints" / "step_2").exists()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert "the run begins again at step 0" in dry()


def test_the_dry_run_says_that_large_weights_are_left_out(arguments, capsys, monkeypatch):
    """What only they show is then seen when the run starts."""
    monkeypatch.setattr("rlp.run.checks.CHECKED_PARAMETERS", 1000)
    assert program.main([*arguments, "--dry-run"]) == DONE
    assert "weights: not loaded" in capsys.readouterr().out


def test_a_vocabulary_larger_than_the_embedding_is_refused(
    arguments, tmp_path, model_folder, capsys
):
    """Token ids beyond the embedding would be read as garbage or crash a GPU."""
    from transformers import AutoTokenizer

    larger = AutoTokenizer.from_pretrained(model_folder)
    larger.add_tokens(["w99"])
    larger.save_pretrained(tmp_path / "larger")
    assert program.main([*arguments, f"model.tokenizer={tmp_path / 'larger'}"]) == BAD_CONFIG
    assert "49 tokens, but the embedding" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_dry_run_shows_an_example_and_the_costs_and_writes_nothing(arguments, tmp_path, capsys):
    """Config, one rendered document with its token boundaries, memory, FLOPs, tokens and disk."""
    assert (
        program.main([*arguments, "--dry-run", "--machine", "8x80", "optim.batch_size=8"]) == DONE
    )
    output = capsys.readouterr().out
    for part in (
        "group_size: 4",
        "|<think>| ... |</think>| ->",
        "Memory per device",
        "(8 ranks",
        "FLOPs per step",
        "one checkpoint",
    ):
        assert part in output, part
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"GSM8K is not at {GSM8K}")
def test_real_text_trains(tmp_path, capsys):
    """Two steps of `configs/gsm8k_tiny.yaml` on GSM8K, from a BPE tokenizer made here."""
    model = tmp_path / "model"
    subprocess.run(
        [
            sys.executable,
            "experiments/gsm8k_tiny/make_model.py",
            "--data",
            str(GSM8K),
            "--out",
            str(model),
        ],
        cwd=REPOSITORY,
        check=True,
    )
    code = program.main(
        [
            str(REPOSITORY / "configs" / "gsm8k_tiny.yaml"),
            f"run.dir={tmp_path / 'run'}",
            f"model.path={model}",
            f"data.train=[{GSM8K}]",
            f"data.held_out=[{GSM8K}]",
            "budget.steps=2",
            "optim.batch_size=4",
            "evaluation.panel_positions=8",
            "logging.every_n_steps=1",
        ]
    )
    assert code == DONE
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 2 and lines[0]["lm/loss"] > 5
    thought = json.loads((tmp_path / "run" / "thoughts.jsonl").read_text().splitlines()[0])
    assert thought["target"] and thought["prefix_tail"]


def test_a_run_without_held_out_documents_says_so(arguments, tmp_path, capsys):
    """In the plan, as it starts, at its end, in its summary and on its page."""
    assert program.main([*arguments, "--dry-run"]) == DONE
    assert "no held-out panel: data.held_out names no file" in capsys.readouterr().out
    assert program.main([*arguments, "budget.steps=1"]) == DONE
    start, _, end = capsys.readouterr().out.partition("step 1")
    assert (
        "no held-out panel" in start
        and "No verdict: nothing was measured on held-out documents" in end
    )
    said = json.loads((tmp_path / "run" / "summary.json").read_text())["verdict"]
    assert len(said) == 1 and said[0] in (tmp_path / "run" / "report.html").read_text()
