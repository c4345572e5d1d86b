"""Promises of `docs/threat_model.md` about checkpoints, run folders and thought formats that a
stranger made: read whole, or refused in a sentence."""

import functools
import hashlib
import json
import math
import operator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from rlp.cli import main as rlp_command
from rlp.config import ConfigError
from rlp.data.errors import DataError
from rlp.learn.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from rlp.learn.export import known_ids, read_thought_format
from rlp.measure.probe import find_subject
from rlp.measure.report import write_report
from rlp.measure.report_runs import without_seed
from rlp.process.environment import environment
from rlp.process.schemas import STATE, Fields
from rlp.run.saved import load
from rlp.run.state import OpenRun
from tests.fuzzing.checkpoints import GOOD_SHARD, good_meta, resuming
from tests.measure.run_folders import make_run
from tests.tiny_models import word_tokenizer
from tests.whole.strangers import harmless

pytestmark = pytest.mark.usefixtures("unpacked")


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


def changed(place: str, value: object) -> tuple[OpenRun, dict, bytes]:
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
            load(run, open_checkpoint(forged(tmp_path, meta, shard)))
        assert 20 < len(str(refused.value)) < 1000 and "'." not in str(refused.value), (
            place,
            value,
        )


def test_the_forger_can_write_a_checkpoint_that_resumes(tmp_path: Path):
    run, meta, shard = resuming()
    load(run, open_checkpoint(forged(tmp_path, meta, shard)))
    assert run.state.step == 1


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
