"""One attack for each promise of `docs/threat_model.md`: what a stranger wrote runs nothing, reads
nothing else, and hides nothing."""

import ast
import functools
import hashlib
import json
import math
import operator
import os
import pickle
import re
import time
from contextlib import suppress
from pathlib import Path

import markdown_it
import numpy as np
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save

import train as program
from rlp.cli import main as rlp_command
from rlp.compare.answers import same_answer
from rlp.compare.tasks import Benchmark, load_benchmarks, load_tasks
from rlp.config import (
    BudgetConfig,
    Config,
    ConfigError,
    DataConfig,
    EngineConfig,
    ModelConfig,
    RunConfig,
    load_config,
    without_secrets,
)
from rlp.data.errors import DataError
from rlp.data.sources import open_rows
from rlp.learn.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from rlp.learn.export import known_ids, model_card, read_thought_format
from rlp.measure.decomposition import Decomposition
from rlp.measure.probe import draw, find_subject
from rlp.measure.report import write_report
from rlp.measure.report_runs import without_seed
from rlp.model.loading import load_policy
from rlp.model.tokenizer import open_tokenizer
from rlp.process.console import visible_text
from rlp.process.environment import environment
from rlp.process.schemas import STATE, Fields
from rlp.trainer import Run
from tests import REPOSITORY
from tests.data.reading import GOOD, Reader, write
from tests.fuzzing.checkpoints import GOOD_SHARD, good_meta, resuming
from tests.measure.run_folders import make_run, make_thought
from tests.source_files import PROGRAM
from tests.tiny_models import tiny_policy, word_tokenizer
from tests.training import TINY

pytestmark = pytest.mark.usefixtures("unpacked")


TOKEN = "hf_" + "aBcD1234" * 4
"""What an access token of the Hub looks like."""

BASE = {
    "run": {"dir": "runs/x"},
    "model": {"path": "somewhere"},
    "data": {"train": ["x.jsonl"]},
    "budget": {"steps": 1},
}


# --- Models.


class Attack:
    """A model folder with something in it that, were it run, would leave a mark."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark = folder / "model", folder / "mark"
        tiny_policy().lm.save_pretrained(self.folder)
        word_tokenizer().save_pretrained(self.folder)

    def change(self, name: str, **values: object) -> None:
        path = self.folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def write_code(self) -> None:
        (self.folder / "evil.py").write_text(
            f"open({str(self.mark)!r}, 'w').close()\nfrom transformers import *\nclass"
            " C(Qwen3Config): pass\nclass M(Qwen3ForCausalLM): pass\nclass"
            " T(PreTrainedTokenizerFast): pass\n"
        )

    def write_pickle(self, name: str) -> None:
        mark = self.mark

        class Payload:
            def __reduce__(self) -> tuple:
                return os.system, (f"touch {mark}",)

        (self.folder / name).write_bytes(pickle.dumps(Payload()))

    def load(self) -> None:
        config = Config(
            run=RunConfig(dir="x"),
            model=ModelConfig(path=str(self.folder)),
            data=DataConfig(train=["x"]),
            budget=BudgetConfig(steps=1),
            engine=EngineConfig(layout="repeated"),
        )
        load_policy(config, *open_tokenizer(config), torch.float32, torch.device("cpu"))


@pytest.fixture
def attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Attack:
    monkeypatch.setattr(
        "builtins.input", lambda prompt="": "y"
    )  # transformers asks, and somebody may say yes
    return Attack(tmp_path)


def test_code_in_a_model_folder_is_not_run(attack: Attack):
    """With a known architecture its own code is left alone; with an unknown one the model is
    refused."""
    attack.write_code()
    attack.change(
        "config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    )
    attack.change("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    attack.load()
    attack.change("config.json", model_type="evil")
    with pytest.raises(ConfigError, match="contains custom code"):
        attack.load()
    assert not attack.mark.exists()


def test_a_model_of_pickles_is_refused_unopened(attack: Attack):
    """In the place of safetensors, and named by an index of safetensors."""
    (attack.folder / "model.safetensors").unlink()
    attack.write_pickle("pytorch_model.bin")
    with pytest.raises(
        ConfigError, match="could not be loaded: Error no file named model.safetensors"
    ):
        attack.load()
    (attack.folder / "model.safetensors.index.json").write_text(
        json.dumps(
            {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "pytorch_model.bin"}}
        )
    )
    with pytest.raises(
        ConfigError,
        match="names 'pytorch_model.bin'; expected safetensors files in the same folder",
    ):
        attack.load()
    assert not attack.mark.exists()


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.json", b"[1]"),
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "qwen3", "hidden_size": "x"}'),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"["),
        ("model.safetensors", b"\xff" * 99),
        ("model.safetensors", b""),
        ("model.safetensors.index.json", b"[]"),
    ],
)
def test_a_damaged_model_folder_is_one_message(attack: Attack, name: str, content: bytes):
    if name == "model.safetensors.index.json":
        (attack.folder / "model.safetensors").unlink()
    (attack.folder / name).write_bytes(content)
    with pytest.raises(
        ConfigError,
        match=r"model\.(path|tokenizer): .*Write a folder that holds a Hugging Face model",
    ):
        attack.load()


@pytest.mark.parametrize("path", PROGRAM, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_load_says_that_remote_code_is_off(path: Path):
    """Where nothing is said, transformers asks on the terminal whether to run it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("from_pretrained", "from_config")
            and path.parent == REPOSITORY / "rlp"
        ):
            assert any(
                word.arg == "trust_remote_code" and ast.unparse(word.value) == "False"
                for word in node.keywords
            ), f"{path}, line {node.lineno}"


# --- Checkpoints and thought formats.


def forged(
    folder: Path,
    meta: object,
    shard: bytes = GOOD_SHARD,
    name: str = "shard_00000-00000.safetensors",
) -> Path:
    """A checkpoint whose checksums agree, as a forger would make it."""
    path = folder / "step_3"
    path.mkdir(exist_ok=True)
    (path / name).write_bytes(shard)
    (path / "meta.json").write_text(json.dumps(meta))
    (path / "COMPLETE").write_text(hashlib.sha256((path / "meta.json").read_bytes()).hexdigest())
    return path


def test_the_forger_can_write_a_good_checkpoint(tmp_path: Path):
    """So that the refusals below are for what is wrong in them."""
    assert isinstance(open_checkpoint(forged(tmp_path, good_meta(GOOD_SHARD))), Checkpoint)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "shard_00000-00000.safetensors/../../secret.safetensors",
        "..",
        "pytorch_model.bin",
        "shard_00000-00000.safetensors\n",
    ],
)
def test_a_checkpoint_names_no_file_but_its_own_shards(tmp_path: Path, name: str):
    """Its files would be opened, and their size and checksum told."""
    (tmp_path / "secret.safetensors").write_bytes(GOOD_SHARD)
    meta = good_meta(GOOD_SHARD)
    meta["shards"] = {name: meta["shards"].popitem()[1]}
    with pytest.raises(CheckpointError, match="which is no shard of the checkpoint"):
        open_checkpoint(forged(tmp_path, meta))


def changed(place: str, value: object) -> tuple[Run, dict, bytes]:
    """The run of the fuzzers, and its checkpoint's meta with one place changed."""
    run, meta, shard = resuming()
    meta = json.loads(json.dumps(meta))
    *way, last = place.split("/")
    holder = functools.reduce(operator.getitem, way, meta)
    holder[last] = value(holder[last]) if callable(value) else value
    return run, meta, shard


SHARD = "shards/shard_00000-00000.safetensors"
FORGERIES = {
    "step": [-1, 2**32, 2**63, 10**300, True, 1.0, "1", None],
    "state": [[], None],
    "state/config": [{}, [], {"run": 1}, {"run": {}}],
    "state/config/model": ["x", None],
    "state/data": [{}, []],
    "state/data/cursors": [[], [-1], [2**60], ["0"], [1.5], {}, [0, 0]],
    "state/data/given": [-1, "x", 2**60],
    "state/data/bad": [{"a": "b"}, [], {"a": -1}],
    "state/data/files": [[], [["x"]], [1], [["a", "b", "c"]], [[1, 2]]],
    "state/ledger": [{}, []],
    "state/ledger/phases": [{}, {"train": 1}],
    "state/ledger/steps": [-1, 1e9, "3"],
    "state/ledger/phases/train": [
        {},
        lambda phase: phase | {"other": 1.0},
        lambda phase: phase | {"flops": "1"},
        lambda phase: phase | {"seconds": math.inf},
        lambda phase: phase | {"flops": math.nan},
    ],
    "state/seconds": ["1", math.nan, -math.inf, -1, [], 10**300],
    "state/guard": [{}, []],
    "state/guard/norms": [["x"], {}, [math.nan], [-1.0], 3],
    "state/guard/in_a_row": [-1, 1.5],
    "state/start_logprob": [["x"], {}, [math.inf], 1],
    "state/watch": [{}, []],
    "state/watch/first": [["x"], [None], {}],
    "state/watch/collapsed": [1, "no"],
    "state/watch/streaks": [[], {"harm": "x"}],
    "state/dtype": [1, "x" * 10**5, "torch.float8"],
    "state/inputs": [1, {}, [], {"x": 1}],
    "state/changes": [1, [1], [{}], [{"step": -1, "key": "x", "from": 1, "to": 2}]],
    "shapes": [{}, [], {"x": [1]}, {"x": [2**62, 2**62]}, {"x": [-1]}],
    f"{SHARD}/fragments": [
        {},
        [],
        lambda held: held | dict.fromkeys(list(held)[:1], 1),
        lambda held: held | dict.fromkeys(list(held)[:1], 2**63),
    ],
    f"{SHARD}/adam_step": [-1, 2**40, "1"],
    f"{SHARD}/sha256": ["x", "\ud800", 1],
    f"{SHARD}/size": [0, -1, "1", 2**70],
}
"""What a forger may write in a place of the meta of a run's checkpoint."""


@pytest.mark.parametrize("place", FORGERIES)
def test_a_forged_checkpoint_is_refused_in_a_sentence(tmp_path: Path, place: str):
    """By whoever opens it, or by the resume that sets what it holds."""
    for value in FORGERIES[place]:
        run, meta, shard = changed(place, value)
        with pytest.raises((CheckpointError, ConfigError, DataError)) as refused:
            run._load(open_checkpoint(forged(tmp_path, meta, shard)))
        assert 20 < len(str(refused.value)) < 1000 and "'." not in str(refused.value), (
            place,
            value,
        )


def test_the_forger_can_write_a_checkpoint_that_resumes(tmp_path: Path):
    run, meta, shard = resuming()
    run._load(open_checkpoint(forged(tmp_path, meta, shard)))
    assert run.step == 1


def test_every_part_of_a_checkpoint_has_a_schema(tmp_path: Path):
    """So that a part that a later version adds is given one: `rlp/process/schemas.py`."""
    state = resuming()[1]["state"]
    assert set(state) == set(STATE.optional)
    for part, form in STATE.optional.items():
        assert not isinstance(form, Fields) or set(state[part]) == set(
            form.required | form.optional
        ), part


def test_pieces_that_overlap_hide_no_gap(tmp_path: Path):
    """Two pieces of three values in a tensor of six, the second one value too early."""
    shard = save({"master/w": torch.ones(3)})
    meta = good_meta(shard)
    entry = meta["shards"].popitem()[1]
    names = ["shard_00000-00000.safetensors", "shard_00001-00000.safetensors"]
    for start, complaint in ((3, None), (2, "has 5 of the 6"), (0, "has 3 of the 6")):
        meta["shards"] = {
            name: entry | {"fragments": {"w": begin}} for name, begin in zip(names, (0, start))
        }
        path = forged(tmp_path, meta, shard)
        (path / names[1]).write_bytes(shard)
        if complaint is None:
            assert open_checkpoint(path).read("master", "w", 0, 6).tolist() == [1.0] * 6
            continue
        with pytest.raises(CheckpointError):
            open_checkpoint(path).read("master", "w", 0, 6)


@pytest.mark.parametrize("command", [["export", "--out", "exported"], ["probe", "data.jsonl"]])
def test_a_checkpoint_without_a_config_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    command: list[str],
):
    monkeypatch.chdir(tmp_path)
    path = forged(tmp_path, good_meta(GOOD_SHARD))
    assert rlp_command([command[0], str(path), *command[1:]]) == 2
    assert "holds no config of a run" in capsys.readouterr().err


DAMAGES = {
    "config.yaml": [
        b"[]",
        b"run: 3",
        b"run: {seed: '(a+)+$'}\nmodel: [1]",
        b"1: {2: 3}",
        b"\xff",
        b"run: {dir: " + b"[" * 300,
        b"- run",
    ],
    "environment.json": [
        b"[]",
        b"{}",
        b'{"devices": "cpu"}',
        b'{"devices": [1], "cpu": 1, "cores": 1, "world_size": 1}',
        b"NaN",
        b"[" * 100_000,
        b"\xff\xfe",
    ],
    "summary.json": [
        b"[]",
        b"1e400",
        b'{"before": [], "after": 1}',
        b'{"before": {"gain_over_start_nats": "x"}}',
        b'{"after": {"gain_over_start_nats": 1e400}}',
        b'{"steps": -1}',
        b'{"seconds": "1"}',
        b'{"match": {"by": "flops"}}',
    ],
    "ledger.json": [
        b"[]",
        b'{"phases": []}',
        b'{"phases": {"train": {}}}',
        b'{"phases": {"train": 1}, "flops": NaN}',
        b'{"flops": "1e9"}',
        b'{"flops": 1' + b"0" * 4000 + b"}",
        b'{"input_tokens": 1.5}',
    ],
    "metrics.jsonl": [
        b"{}",
        b'{"step": "1"}',
        b'{"step": 1, "reward/mean": "x"}',
        b'{"step": 1, "reward/mean": 1e400}',
        b'{"step": 1e3}',
        b'{"step": 1, "reward/mean": [1]}',
        b'{"step": 18446744073709551616}',
        b"[1]",
        b"\xff",
    ],
    "timing.jsonl": [
        b'{"step": 1, "perf/step_s": null}',
        b'{"step": 1, "perf/step_s": {}}',
        b'{"step": true}',
    ],
    "thoughts.jsonl": [
        b'{"step": 1}',
        (
            b'{"step": 1, "document": 1, "position": 1, "prefix_tail": 1, "thought": 1, "target":'
            b' 1, "thought_tokens": 1, "truncated": false}'
        ),
        b"null",
        b"[" * 100_000,
        b'{"step": 1, "document": 1, "position": 1, "prefix_tail": "", "thought": "'
        + b"x" * 10_000_000
        + b'", "target": "", "thought_tokens": 1, "truncated": false}',
    ],
    "evaluation.jsonl": [
        b'{"step": 0, "gain_over_start_nats": "x"}',
        b'{"step": -1}',
        b'{"gain_over_start_nats": 1}',
        b'{"step": 0, "gain_over_start_nats": Infinity}',
    ],
    "config_changes.jsonl": [
        b'{"step": 1}',
        b'{"step": 1, "key": 2, "from": 1, "to": 2}',
        b'{"step": 1, "key": "x", "from": 1e400, "to": 2}',
    ],
    "alarms.jsonl": [b'{"step": 1}', b'{"step": 1, "text": 1}', b'{"text": "x"}'],
    "post_training.jsonl": [
        b'{"stage": {}}',
        b'{"stage": "sft", "accuracy_with_thought": "x"}',
        b"3",
    ],
    "journal.jsonl": [
        b'{"step": 1}',
        (
            b'{"step": 1, "applied": 1, "documents": "0000000000000000", "numbers": {}, "tokens":'
            b' 1, "flops": "0x1p+1"}'
        ),
        (
            b'{"step": 1, "applied": true, "documents": "0000000000000000", "numbers": {"lm/loss":'
            b' "0x1p+9999"}, "tokens": 1, "flops": "0x1p+1"}'
        ),
        (
            b'{"step": 1, "applied": true, "documents": "0000000000000000", "numbers": [],'
            b' "tokens": 1, "flops": "0x1p+1"}'
        ),
    ],
}
"""What a crafted run folder may hold in the place of a file, or of a line of it."""


@pytest.mark.parametrize("name", DAMAGES)
def test_a_crafted_run_folder_is_refused_in_a_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture, name: str
):
    """The file is named, by the report and by the command that reads it alone."""
    commands = {
        "thoughts.jsonl": ["view"],
        "journal.jsonl": ["audit"],
        "ledger.json": ["report", "match"],
    }.get(name, ["report"])
    for content in DAMAGES[name]:
        run = make_run(tmp_path / f"run{len(list(tmp_path.iterdir()))}", steps=1)
        good = (
            (run / name).read_bytes()
            if (run / name).exists() and name.endswith("l") and name != "config.yaml"
            else b""
        )
        (run / name).write_bytes(good + content + b"\n")
        for command in commands:
            more = {
                "audit": [str(run)],
                "match": ["--arm", "cpt", "--out", str(tmp_path / "arm.yaml")],
            }.get(command, [])
            assert rlp_command([command, str(run), *more]) in (2, 3), content[:80]
            said = capfd.readouterr().err
            assert (
                name in said
                and said.startswith("rlp: ")
                and said.count("\n") == 1
                and len(said) < 1000
            )
    assert not (tmp_path / "arm.yaml").exists()


def test_steps_out_of_order_and_doubled_names_are_no_harm(tmp_path: Path):
    """Of a name that comes twice the last value counts, as everywhere in JSON."""
    run = make_run(tmp_path / "run", steps=2)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 1, "step": 9, "reward/mean": 1.0}\n{"step": 4, "reward/mean": 2.0}\n{"step":'
            " 4}\n"
        )
    write_report([run], tmp_path / "page.html")
    assert "at step 4" not in (tmp_path / "page.html").read_text()


def test_a_seed_is_no_pattern():
    """It is a stranger's text where their config says so."""
    assert without_seed(Path("a/rlp_seed3"), "(a+)+$") == Path("a/rlp_seed3") and without_seed(
        Path("a/rlp_seed3"), 3
    ) == Path("a/rlp")


def test_halves_of_characters_in_a_run_folder_are_spelled_out(tmp_path: Path):
    """Everywhere on the page, not in thoughts alone."""
    run = make_run(tmp_path / "run", steps=0)
    (run / "environment.json").write_text(
        json.dumps(environment(["cpu"]) | {"command": "a\ud800b\u202e", "platform": "\x1b[2J"})
    )
    (run / "alarms.jsonl").write_text(json.dumps({"step": 1, "text": "\udfff\x07"}) + "\n")
    write_report([run], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert harmless(page) and r"a\ud800b\u202e" in page and r"\udfff\x07" in page


@pytest.mark.parametrize(
    "marker",
    [
        "\U0001f600",
        "\u00e9",
        '"',
        "\\",
        "a: b",
        "#",
        "{x}",
        "[1]",
        "'",
        "!!python/name:os.system",
        "&a",
        "*a",
        "null",
        "1e5",
        "  ",
    ],
)
def test_a_marker_of_a_thought_format_arrives_as_it_is(tmp_path: Path, marker: str):
    """`rlp probe` takes a folder's markers as settings, which are YAML."""
    (tmp_path / "thought_format.json").write_text(
        json.dumps({"open_marker": marker, "close_marker": f"</{marker}>", "temperature": 0.5})
    )
    thought = find_subject(str(tmp_path), "x.jsonl", None, []).config.thought
    assert (thought.open_marker, thought.close_marker, thought.temperature) == (
        marker,
        f"</{marker}>",
        0.5,
    )


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"open_marker": 1},
        {"temperature": "hot"},
        {"max_thought_tokens": 1.5},
        {"max_thought_tokens": True},
        {"instruction_ids": [-1]},
        {"instruction_ids": "abc"},
        {"open_marker_ids": [2**40]},
        {"temperature": math.inf},
        {"temperature": 10**400},
        {"temperature": -1},
        {"max_thought_tokens": 2**70},
        {"open_marker": "x" * 10**7},
        {"horizon": None},
    ],
)
def test_a_thought_format_of_other_types_is_refused(tmp_path: Path, content: object):
    (tmp_path / "thought_format.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="is no thought format: .*Export the checkpoint again"):
        read_thought_format(tmp_path / "thought_format.json")


def test_an_instruction_beyond_the_vocabulary_is_refused():
    """Its ids index the embedding; beyond it lies other memory."""
    assert known_ids([5, 47], word_tokenizer()) == (5, 47)
    with pytest.raises(
        ConfigError, match="instruction_ids holds 48, and the tokenizer of the folder ends at 47"
    ):
        known_ids([5, 48], word_tokenizer())


# --- Configs.


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch {}']",
        "!!python/object/new:os.system ['touch {}']",
        "!!python/name:os.system",
        "!!python/module:os",
    ],
)
def test_a_config_runs_no_code(tmp_path: Path, tag: str):
    """In a value, in place of the file, and on the command line."""
    mark = tmp_path / "mark"
    path = write(tmp_path / "config.yaml", json.dumps(BASE).encode())
    for text in (f"run: {{dir: {tag.format(mark)}}}\n", tag.format(mark)):
        with pytest.raises(ConfigError, match="is not a YAML config"):
            load_config(write(tmp_path / "evil.yaml", text.encode()))
    with pytest.raises(ConfigError, match="has no YAML value"):
        load_config(path, [f"run.dir={tag.format(mark)}"])
    assert not mark.exists()


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:PLANTED}",
        "${oc.env:PLANTED,x}",
        "a ${oc.decode:${oc.env:PLANTED}} b",
        "\\${oc.env:PLANTED}",
        "${run.seed}",
    ],
)
def test_a_config_reads_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str):
    """What it says goes into the run folder and the report; interpolation could put a secret
    there."""
    monkeypatch.setenv("PLANTED", "a planted value")
    for source in ({"model": {"path": value}}, {"data": {"train": [value]}}, {value: 1}):
        path = write(tmp_path / "config.yaml", json.dumps(BASE | source).encode())
        with pytest.raises(ConfigError, match="interpolation is not read here") as refused:
            load_config(path)
        assert "a planted value" not in str(refused.value)
    path = write(tmp_path / "config.yaml", json.dumps(BASE).encode())
    with pytest.raises(ConfigError, match="interpolation is not read here"):
        load_config(path, [f"model.path={value}"])


def test_a_report_reads_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run folder may be a stranger's, and the page made from it goes back to them."""
    monkeypatch.setenv("PLANTED", "a planted value")
    run = make_run(tmp_path / "run", steps=0)
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace("path: tiny", "path: ${oc.env:PLANTED}")
    )
    assert rlp_command(["report", str(run)]) == 3
    assert not (run / "report.html").exists()


def test_a_config_made_to_exhaust_the_machine_is_refused_at_once(tmp_path: Path):
    """Nine lines that stand for ten to the ninth values; brackets that end the C library's stack,
    and the process; two megabytes."""
    lines = [
        "a0: &a0 [x, x, x, x, x, x, x, x, x, x]",
        *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)),
    ]
    start = time.process_time()
    for text in ("\n".join(lines), "[" * 100_000, "- " * 100_000, "x: " + "y" * 2**21):
        with pytest.raises(ConfigError, match="is not a YAML config"):
            load_config(write(tmp_path / "config.yaml", text.encode()))
    with pytest.raises(ConfigError, match="has no YAML value: nested more than 100 levels deep"):
        load_config(
            write(tmp_path / "config.yaml", json.dumps(BASE).encode()),
            ["data.train=" + "[" * 100_000],
        )
    assert time.process_time() - start < 20


@pytest.mark.parametrize(
    "name", ["a\0b", "a\nb", "a\x1b[31mb", "a\rb", "a\u202eb", "\ud800", "a\x7f"]
)
def test_a_run_folder_has_a_name_that_can_be_printed(name: str):
    """A NUL, a line end, an escape, a reversal of the writing direction, half of a character."""
    with pytest.raises(ConfigError):
        load_config(BASE | {"run": {"dir": name}})


@pytest.mark.parametrize(
    "key", ["run.resume", "model.path", "model.tokenizer", "thought.instruction_file"]
)
def test_no_path_holds_a_nul(key: str):
    section, _, name = key.partition(".")
    with pytest.raises(ConfigError, match="holds a NUL"):
        load_config(BASE | {section: BASE.get(section, {}) | {name: "a\0b"}})


# --- Benchmarks.

PAYLOADS = [
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{% endfor %}",
    "{{ question | attr('x') }}",
    "{{ question.__class__ }}",
    "{# x #}",
    "{{question}} {{ 7 * 7 }}",
    "{{ lipsum.__globals__['os'].popen('touch MARK').read() }}",
    "{{",
    "{{ question or cycler() }}",
]
"""In Jinja, which lm-evaluation-harness fills templates with, the first and the seventh run a
command."""


@pytest.mark.parametrize("key", ["prompt", "reference"])
@pytest.mark.parametrize("template", PAYLOADS)
def test_a_benchmark_holds_no_template_but_fields(tmp_path: Path, key: str, template: str):
    path = write(
        tmp_path / "b.yaml",
        json.dumps(
            {
                "benchmarks": {
                    "a": {"data": "x.jsonl", key: template.replace("MARK", str(tmp_path / "mark"))}
                }
            }
        ).encode(),
    )
    with pytest.raises(ConfigError, match=rf"benchmarks\.a: {key} is text with {{{{field}}}}"):
        load_benchmarks(path)


def test_what_a_row_of_a_benchmark_holds_is_text_and_no_template(tmp_path: Path):
    """In the question, in the answer and in the examples shown before it: lm_eval gets finished
    text."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra eval)")
    mark = tmp_path / "mark"
    attack = PAYLOADS[0].replace("MARK", str(mark))
    rows = [
        {"question": attack, "answer": attack, "prompt": "{{answer}}"},
        {"question": "{{answer}}", "answer": "[" * 5000 + "]", "prompt": 1},
    ]
    path = write(tmp_path / "x.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    benchmark = Benchmark(
        data=str(path),
        examples=str(path),
        shots=1,
        prompt="{{prompt or question}} {{question}} }}",
        reference="{{ answer }}",
    )
    (task,) = load_tasks({"a": benchmark})["a"]
    task.build_all_requests()
    prompts = [instance.args[0] for instance in task.instances]
    assert (
        prompts[0].endswith(f"{{{{answer}}}} {attack} }}}}")
        and prompts[1].endswith("1 {{answer}} }}")
        and prompts[1].count(attack) == 2
    )
    assert [task.doc_to_target(instance.doc) for instance in task.instances] == [
        attack,
        "[" * 5000 + "]",
    ]
    assert not mark.exists()


@pytest.mark.parametrize(
    "row, complaint",
    [
        ({"question": None}, "no such field"),
        ({"other": 1}, "no such field"),
        ({"question": ["x"]}, "a list"),
        ({"question": {"a": 1}}, "a dict"),
    ],
)
def test_a_row_without_a_question_is_said_with_its_line(tmp_path: Path, row: dict, complaint: str):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra eval)")
    path = write(
        tmp_path / "x.jsonl", b'{"question": "q", "answer": 1}\n\n' + json.dumps(row).encode()
    )
    with pytest.raises(DataError, match=rf"x\.jsonl:3: no text \({{{{question}}}}: {complaint}"):
        load_tasks({"a": Benchmark(data=str(path))})


def test_a_task_is_a_name_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A task file of lm_eval may name Python functions, which would be loaded. Its index is that of
    one folder here: the whole takes half a minute."""
    tasks = pytest.importorskip(
        "lm_eval.tasks", reason="lm-evaluation-harness is not installed (extra eval)"
    )
    folder = Path(tasks.__file__).parent / "gsm8k"
    monkeypatch.setattr(
        tasks,
        "TaskManager",
        lambda include_defaults, make=tasks.TaskManager: make(
            include_defaults=False, include_path=folder
        ),
    )
    assert tasks.TaskManager(include_defaults=True).all_tasks
    (tmp_path / "evil.py").write_text(
        f"open({str(tmp_path / 'mark')!r}, 'w').close()\ndef f(doc): return ''\n"
    )
    task = write(
        tmp_path / "evil.yaml",
        b"task: evil\ndataset_path: json\ndoc_to_text: !function evil.f\ndoc_to_target:"
        b" ''\ntest_split: test\n",
    )
    for name in (str(task), str(tmp_path), "evil", "evil.yaml"):
        with pytest.raises(ConfigError, match="lm_eval has no task"):
            load_tasks({"a": Benchmark(task=name)})
    with pytest.raises(ConfigError, match="is not a YAML config"):
        load_benchmarks(task.rename(tmp_path / "b.yaml"))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "name",
    [
        "",
        "@x",
        "json",
        "text@x",
        "..",
        "../x",
        "/etc",
        "{tmp}",
        "hf://datasets/x/y",
        "http://example.org/x",
        "a/b/c",
        "buckets/x",
        "x\n",
        "-",
        "zip://a::b",
        "evil.py",
        "a/evil.py",
    ],
)
def test_a_hub_name_is_no_path(tmp_path: Path, name: str):
    """`datasets` takes a folder, an address or the name of one of its readers in the same place."""
    write(tmp_path / "x.jsonl", GOOD)
    name = name.format(tmp=tmp_path) if "{" in name else name
    with pytest.raises(DataError, match="is no name of a Hub data set"):
        open_rows([f"hub:{name}"], DataConfig(train=["x"]), "train", "data.train")


def test_no_answer_and_no_reference_is_run(tmp_path: Path):
    """Symbolic mathematics reads text by evaluating it, where it lets it."""
    pytest.importorskip("math_verify", reason="math-verify is not installed (extra eval)")
    mark = tmp_path / "mark"
    attack = f"__import__('os').system('touch {mark}')"
    for text in (
        attack,
        f"${attack}$",
        f"\\boxed{{{attack}}}",
        f"#### {attack}",
        f"\\boxed{{\\text{{{attack}}}}}",
        f"1 + {attack}",
        f"x = {attack}",
    ):
        for answer, reference in ((text, "18"), ("18", text), (text + "1", text)):
            with suppress(Exception):
                same_answer(answer, reference)
    assert not mark.exists()


# --- Secrets.


@pytest.mark.parametrize(
    "secret",
    [
        TOKEN,
        "ghp_" + "a1B2" * 9,
        "sk-proj-" + "x9" * 20,
        "AKIA" + "A1B2C3D4" * 2,
        "https://me:hunter2@example.org/data.jsonl",
        "eyJhbGciOiJIUzI1NiJ9abc.eyJzdWIi.abc",
    ],
)
def test_a_config_with_a_secret_is_refused_without_repeating_it(tmp_path: Path, secret: str):
    path = write(
        tmp_path / "config.yaml", json.dumps(BASE | {"data": {"train": [secret]}}).encode()
    )
    for overrides, source in (
        ([], path),
        ([f"model.path={secret}"], write(tmp_path / "good.yaml", json.dumps(BASE).encode())),
    ):
        with pytest.raises(
            ConfigError, match="holds an access token or a password.*HF_TOKEN"
        ) as refused:
            load_config(source, overrides)
        assert secret not in str(refused.value) and "hunter2" not in str(refused.value)


def test_ordinary_text_is_no_secret():
    """Paths of caches hold long hexadecimal names; models have long names."""
    for text in (
        "models--Qwen--Qwen3/snapshots/" + "0a1b2c3d" * 5,
        "Qwen/Qwen3-1.7B-Base",
        "https://example.org:8080/x.jsonl",
        "sk-learn",
        "task-with-a-long-name-of-many-words",
        "{question}\n{answer}",
    ):
        assert without_secrets(text) == text


def test_the_search_for_secrets_takes_time_in_proportion_to_a_text():
    """Beginnings of a token, one after another, each of which may go on to the end of the text."""
    start = time.process_time()
    for beginning in ("eyJ-", "eyJ", "hf_", "sk-", "://a:", "AKIA"):
        without_secrets(beginning * (2**18 // len(beginning)))
    assert time.process_time() - start < 10


def test_no_secret_reaches_the_run_folder_or_the_console(
    tmp_path, model_folder, corpus, ranks, monkeypatch, capfd
):
    """Planted in the environment and on the command line; looked for in every file of a finished
    run, and in all that was printed."""
    planted = {
        "HF_TOKEN": TOKEN,
        "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
        "DATABASE_PASSWORD": "correct horse",
    }
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        "sys.argv",
        ["train.py", "tiny.yaml", f"--token={TOKEN}", f"--key={planted['WANDB_API_KEY']}"],
    )
    monkeypatch.setattr(program, "stop_ranks", lambda: None)
    (tmp_path / "tiny.yaml").write_text(
        f"model: {{path: {model_folder}}}\ndata: {{train: [{corpus}], held_out: [{corpus}]}}\nrun:"
        f" {{dir: {tmp_path / 'run'}}}\n"
    )
    assert (
        program.main(
            [
                str(tmp_path / "tiny.yaml"),
                *(f"{key}={value}" for key, value in TINY.items()),
                "budget.steps=1",
                "evaluation.panel_positions=2",
            ]
        )
        == program.DONE
    )
    printed = "".join(capfd.readouterr())
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert (
        len(files) > 12
        and json.loads((tmp_path / "run" / "environment.json").read_text())["command"].count(
            "[secret]"
        )
        == 2
    )
    for value in planted.values():
        assert value not in printed
        assert not [path for path in files if value.encode() in path.read_bytes()]


def test_the_environment_is_not_recorded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_VARIABLE", "its own value")
    assert "its own value" not in json.dumps(environment(["cpu"]))


# --- What is shown.

ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m\u202e"


def harmless(text: str) -> bool:
    return not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)


def test_what_data_holds_does_nothing_to_the_terminal(
    tmp_path, model_folder, ranks, monkeypatch, capfd
):
    """In warnings about bad rows, in the error that stops a run, in the example of a dry run, in
    the name of a file."""
    monkeypatch.setattr(program, "stop_ranks", lambda: None)
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
    assert program.main([*arguments, "data.max_bad_fraction=0"]) == program.BAD_DATA
    assert program.main([*arguments, "data.max_bad_fraction=1", "--dry-run"]) == program.DONE
    assert program.main([*arguments, "data.max_bad_fraction=1", "budget.steps=1"]) == program.DONE
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


# --- Data.


def test_a_parquet_file_can_not_say_how_it_is_to_be_read(tmp_path: Path):
    """`datasets` reads the type of a column from the file, and would open the path or the address
    that an image column holds."""
    image = {"info": {"features": {"text": {"_type": "Image"}}}}
    table = pyarrow.table({"text": ["w1 w2"]}).replace_schema_metadata(
        {"huggingface": json.dumps(image)}
    )
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert Reader([tmp_path / "x.parquet"]).tokens(1) == [[7, 8]]


def test_a_hub_data_set_can_not_say_how_it_is_to_be_read(monkeypatch: pytest.MonkeyPatch):
    """A column of images would have the path or the address opened that it holds."""
    import datasets

    features = datasets.Features({"text": datasets.Image()})
    rows = datasets.Dataset.from_list(
        [{"text": {"path": "/nowhere/x.png", "bytes": None}}], features=features
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: rows)
    with pytest.raises(FileNotFoundError):
        rows[0]
    assert open_rows(["hub:somebody/data"], DataConfig(train=["x"]), "train", "data.train").read(
        0
    ) == {"text": {"path": "/nowhere/x.png", "bytes": None}}


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


# --- The page.


def test_every_promise_names_a_test_that_exists():
    """`docs/threat_model.md` says who is attacked where; each row has a test, and each test is
    there."""
    page = (REPOSITORY / "docs" / "threat_model.md").read_text()
    written = {
        name
        for path in (REPOSITORY / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    promises = [
        line
        for line in page.splitlines()
        if line.startswith("| ") and not line.startswith("| promise")
    ]
    assert len(promises) >= 20
    for line in promises:
        named = re.findall(r"`(test_\w+)`", line)
        assert named and set(named) <= written, line
