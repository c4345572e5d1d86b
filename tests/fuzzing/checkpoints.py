"""Checkpoints whose checksums agree, as a forger would have it: opened, and resumed from."""

import atexit
import functools
import hashlib
import io
import json
import shutil
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors.torch import save

from rlp.config import load_config
from rlp.learn.checkpoint import FORMAT, open_checkpoint
from rlp.process.ranks import start_ranks
from rlp.run.budget import fraction_spent, is_spent
from rlp.run.saved import load
from rlp.run.saved import save as save_run
from rlp.run.state import OpenRun
from rlp.trainer import begin_step, take_step
from tests.fuzzing.ingredients import TOKENIZER, damaged, mutated, raw_json
from tests.tiny_models import tiny_policy
from tests.training import open_run, tiny_config, write_corpus


def good_meta(shard: bytes) -> dict:
    entry = {
        "size": len(shard),
        "sha256": hashlib.sha256(shard).hexdigest(),
        "fragments": {"w": 0},
        "adam_step": 1,
    }
    return {
        "format": FORMAT,
        "step": 3,
        "shards": {"shard_00000-00000.safetensors": entry},
        "shapes": {"w": [4]},
        "state": {},
    }


GOOD_SHARD = save({"master/w": torch.arange(4.0), "exp_avg/w": torch.zeros(4)})


def with_header(shard: bytes, header: bytes, told: int | None = None) -> bytes:
    """A safetensors file with another header, and perhaps another length of it than it has."""
    size = int.from_bytes(shard[:8], "little")
    return (
        (len(header) if told is None else told).to_bytes(8, "little") + header + shard[8 + size :]
    )


def mutated_shards(shard: bytes) -> st.SearchStrategy[bytes]:
    header = json.loads(shard[8 : 8 + int.from_bytes(shard[:8], "little")])
    lengths = st.sampled_from([None, None, None, 0, 1, 8, 2**20, 2**40, 2**63, 2**64 - 1])
    return st.one_of(
        st.just(shard),
        damaged(shard),
        st.tuples(mutated(header), lengths).map(
            lambda made: with_header(shard, raw_json(made[0]), made[1])
        ),
    )


def forge(
    folder: Path, meta: bytes, shard: bytes, name: str = "shard_00000-00000.safetensors"
) -> Path:
    path = folder / "step_3"
    path.mkdir(exist_ok=True)
    (path / name).write_bytes(shard)
    (path / "meta.json").write_bytes(meta)
    (path / "COMPLETE").write_text(hashlib.sha256(meta).hexdigest())
    return path


def signed(meta: object, shard: bytes, name: str = "shard_00000-00000.safetensors") -> object:
    """The meta with size and checksum of the shard, where it still has a place for them."""
    entry = meta
    for key in ("shards", name):
        entry = entry.get(key) if isinstance(entry, dict) else None
    if isinstance(entry, dict):
        for key, value in (("size", len(shard)), ("sha256", hashlib.sha256(shard).hexdigest())):
            entry[key] = value if key in entry else entry.get(key)
    return meta


def read_checkpoint(folder: Path, case: tuple[bytes, object]) -> None:
    """A small one: opened, and every value asked for."""
    shard, meta = case
    checkpoint = open_checkpoint(forge(folder, raw_json(signed(meta, shard)), shard))
    assert 0 <= checkpoint.adam_step < 2**32 and 0 <= checkpoint.step < 2**32
    for kind in ("master", "exp_avg"):
        assert checkpoint.read(kind, "w", 1, 2).shape == (2,)


SMALL_META = good_meta(GOOD_SHARD)
checkpoint_cases = st.tuples(
    mutated_shards(GOOD_SHARD), st.one_of(st.just(SMALL_META), mutated(SMALL_META))
)


@functools.cache
def resuming() -> tuple[OpenRun, dict, bytes]:
    """A tiny run that has made a step, and its checkpoint: the meta, and its shard."""
    home = Path(tempfile.mkdtemp(prefix="rlp_fuzz_"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    tiny_policy().lm.save_pretrained(home / "model")
    TOKENIZER.save_pretrained(home / "model")
    corpus = write_corpus(
        home / "train.jsonl",
        [" ".join(f"w{(7 * i + j) % 40}" for j in range(8)) for i in range(12)],
    )
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        run = open_run(tiny_config(home / "run", home / "model", corpus), start_ranks())
        take_step(run)
        assert save_run(run)
    path = home / "run" / "checkpoints" / "step_1"
    return (
        run,
        json.loads((path / "meta.json").read_bytes()),
        (path / "shard_00000-00000.safetensors").read_bytes(),
    )


def read_resume(folder: Path, case: tuple[bytes, object]) -> None:
    """The checkpoint of a run, whole: what a resume sets, then what the next step asks of it."""
    run, shard, meta = resuming()[0], *case
    path = forge(folder, raw_json(signed(meta, shard)), shard)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        checkpoint = open_checkpoint(path)
        load(run, checkpoint)
        load_config(checkpoint.config)
        step, parts, stream = run.state.step, run.parts, run.opened.setup.stream
        spent = fraction_spent(run.config.budget, step, parts.ledger)
        assert (
            spent >= 0
            and begin_step(run, spent).learning_rate >= 0
            and is_spent(run.config.budget, step, parts.ledger) in (True, False)
        )
        stream.next_documents(2)
        (
            parts.guard.largest_norm(),
            run.watch.see(
                {"thought/tokens_mean": 3.0, "thought/truncated_frac": 1.0, "reward/mean": -1.0},
                has_baseline=True,
            ),
            parts.ledger.mean_step(),
        )
        json.dumps(
            [
                parts.ledger.state(),
                parts.guard.state(),
                run.watch.state(),
                stream.state(),
                parts.ledger.to_json(),
            ],
            allow_nan=False,
        )


def resume_metas() -> st.SearchStrategy[object]:
    """The meta as it is; changes of the whole, which mostly meet the config or a shape; and of the
    rest of the state alone."""
    meta = resuming()[1]
    state, config = (
        {name: part for name, part in meta["state"].items() if name != "config"},
        {"config": meta["state"]["config"]},
    )
    parts = [
        mutated(state, most).map(lambda tree: meta | {"state": tree | config}) for most in (1, 1, 2)
    ]
    return st.one_of(
        st.just(meta),
        *parts,
        mutated(meta),
        mutated(config).map(lambda tree: meta | {"state": state | tree}),
    )


resume_cases = st.deferred(
    lambda: st.tuples(
        st.one_of(*[st.just(resuming()[2])] * 3, mutated_shards(resuming()[2])), resume_metas()
    )
)
