"""Two processes give the run that one gives."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlp.learn.checkpoint import open_checkpoint
from tests.training import assert_same_run, curve, launch, read_lines
from tests.whole.masked import write_masked
from tests.whole.two_ranks import JOBS, WATCHDOG_S

SETTINGS = {
    name: {key: value for key, value in settings.items() if value != "CORPUS"}
    for name, settings in JOBS.items()
}


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory, model_folder, corpus, ranks) -> Path:
    """Every job of `two_ranks.py`, run once on two ranks; `one_rank` is a run on one, for it to
    continue."""
    from rlp.process.exit_codes import DONE
    from tests.training import tiny_config, train

    folder = tmp_path_factory.mktemp("two_ranks")
    write_masked(folder / "masked.jsonl", 12)
    assert (
        train(
            tiny_config(
                folder / "one_rank",
                model_folder,
                corpus,
                budget__steps=4,
                checkpoint__every_n_steps=2,
                checkpoint__keep=3,
            ),
            ranks,
        )
        == DONE
    )
    launch(
        [
            "-m",
            "tests.whole.two_ranks",
            str(folder),
            str(model_folder),
            str(corpus),
        ],
        world_size=2,
        port=29571,
    )
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "stage0",
        "stage1",
        "stage2",
        "stage3",
        "stage3_synced",
        "stage3_markers",
        "shuffled",
        "foreign",
        "stage1_by_length",
        "stage2_by_length",
        "stage3_by_length",
    ],
)
def test_two_ranks_take_the_steps_of_one(two_ranks, trained, name):
    """Same documents, same positions, same thoughts, one gradient: in float32 the curves agree."""
    assert_same_run(trained("alone", **SETTINGS[name]), two_ranks / name, 1e-4)


def test_two_ranks_take_the_loss_on_the_tokens_of_one(two_ranks, trained):
    """Documents of which 1 to 5 tokens have a loss: the divisor is those of both ranks."""
    file = f"[{two_ranks / 'masked.jsonl'}]"
    alone, shared = trained("alone", **SETTINGS["masked"] | {"data__train": file}), two_ranks
    for one, other in zip(*(read_lines(of / "metrics.jsonl") for of in (alone, shared / "masked"))):
        for name in ("lm/loss", "optim/grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-5)


def test_the_thoughts_told_are_those_of_both_ranks(two_ranks, trained):
    """The best and the worst of the step, however its documents are shared out."""
    alone, shared = (
        read_lines(folder / "thoughts.jsonl")
        for folder in (trained("alone", **SETTINGS["shuffled"]), two_ranks / "shuffled")
    )
    told = ("step", "document", "position", "thought")
    assert [[line[name] for name in told] for line in shared] == [
        [line[name] for name in told] for line in alone
    ]


def test_bfloat16_runs_on_two_ranks(two_ranks):
    """Float32 masters and EMA under bfloat16 compute: finite, and every step applied."""
    lines = read_lines(two_ranks / "stage1_bf16" / "metrics.jsonl")
    assert len(lines) == 3
    assert lines[-1]["optim/skipped"] == 0
    assert lines[-1]["teacher/distance"] > 0


@pytest.mark.parametrize("name", ["stage0", "stage1_bf16", "stage2", "stage3"])
def test_the_export_of_two_ranks_is_their_master_weights(two_ranks, name):
    """Put together from both ranks' shards, in float32."""
    checkpoint = open_checkpoint(two_ranks / name / "checkpoints" / "step_3")
    for parameter, value in load_file(two_ranks / name / "export" / "model.safetensors").items():
        assert torch.equal(value.flatten(), checkpoint.read("master", parameter, 0, value.numel()))


def test_a_checkpoint_of_two_ranks_continues_on_one(two_ranks, trained):
    """Stage 1 on two ranks, then one rank: the curve goes on."""
    settings = SETTINGS["stage1"] | {"run__resume": two_ranks / "stage1" / "checkpoints" / "step_2"}
    torch.testing.assert_close(
        torch.tensor(curve(trained("alone", **settings))),
        torch.tensor(curve(two_ranks / "stage1"))[2:],
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_checkpoint_of_one_rank_continues_on_two(two_ranks):
    """Stage 1 on one rank, then stage 2 on two."""
    torch.testing.assert_close(
        torch.tensor(curve(two_ranks / "resumed")),
        torch.tensor(curve(two_ranks / "one_rank"))[2:],
        rtol=1e-4,
        atol=1e-4,
    )


def test_the_panel_is_the_same_on_two_ranks(two_ranks, trained, corpus):
    """Panel documents are shared out, thought about and put together again."""
    alone = trained("alone", **SETTINGS["stage3"], data__held_out=f"[{corpus}]")
    for name, value in json.loads((alone / "summary.json").read_text())["after"].items():
        assert json.loads((two_ranks / "stage3" / "summary.json").read_text())["after"][
            name
        ] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def test_the_ledger_counts_the_work_of_all_ranks(two_ranks, trained):
    """FLOPs and tokens do not depend on how the work is shared out."""
    alone = json.loads((trained("alone") / "ledger.json").read_text())
    shared = json.loads((two_ranks / "stage2" / "ledger.json").read_text())
    assert shared["flops"] == pytest.approx(alone["flops"])
    assert shared["input_tokens"] == alone["input_tokens"]


def test_no_collective_of_a_run_gives_up_before_the_watchdog(two_ranks):
    """In every process group that these runs have made, under all stages."""
    for rank in range(2):
        waits = json.loads((two_ranks / f"waits_{rank}.json").read_text())
        assert len(waits) > 1 and min(waits) > WATCHDOG_S
