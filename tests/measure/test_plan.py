"""The plan, by hand: memory under each ZeRO stage, FLOPs by phase, budget and disk; and the
committed configs."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from rlp.config import ConfigError
from rlp.measure.ledger import PHASES
from rlp.measure.plan import fits
from rlp.measure.plan_memory import (
    BUCKET_ELEMENTS,
    LOGITS_TILE_BYTES,
    activation_bytes,
    cache_bytes,
    checkpoint_bytes,
    gradient_bytes,
    optimizer_bytes,
    shared_cache_bytes,
    weight_bytes,
)
from rlp.measure.plan_text import render_plan
from rlp.measure.plan_work import FormatTokens, positions_per_document
from rlp.model.layout import LAYOUTS
from rlp.model.slot_attention import key_room
from tests import REPOSITORY
from tests.measure.small_plans import SHAPES, flops_of, parts, plan_of, small_run


# 1000 parameters, 4 ranks; bfloat16 at stages 1 to 3, where stage 0 does not exist.
@pytest.mark.parametrize(
    "stage, weights, gradients", [(1, 2000, 6000), (2, 2000, 1500), (3, 500, 1500)]
)
def test_weights_and_gradients_of_each_stage_in_bfloat16(
    stage: int, weights: int, gradients: int
) -> None:
    assert weight_bytes(1000, 2, stage, 4) == weights
    assert gradient_bytes(1000, 2, stage, 4) == gradients


@pytest.mark.parametrize(
    "stage, weights, gradients, master, moments",
    [
        (0, 4000, 4000, 0, 8000),
        (1, 4000, 4000, 1000, 2000),
        (2, 4000, 1000, 1000, 2000),
        (3, 1000, 1000, 1000, 2000),
    ],
)
def test_state_of_each_stage_in_float32(
    stage: int, weights: int, gradients: int, master: int, moments: int
) -> None:
    assert weight_bytes(1000, 4, stage, 4) == weights
    assert gradient_bytes(1000, 4, stage, 4) == gradients
    assert optimizer_bytes(1000, stage, 4, ema=False) == {
        "master weights": master,
        "two moments": moments,
        "EMA of the weights": 0,
    }


def test_sizes_that_do_not_divide_are_rounded_up() -> None:
    assert optimizer_bytes(1001, 1, 3, ema=True) == {
        "master weights": 1335,
        "two moments": 2670,
        "EMA of the weights": 1335,
    }


# A context of 9 tokens and a branch of 1 + 6 + 1. An instruction of 4 makes the context 13.
@pytest.mark.parametrize(
    "layout, overrides, instruction, tokens, queries",
    [
        ("repeated", [], 0, 3 * 17, 3 * 7),
        (
            "repeated",
            ["objective.lm_weight=0.1", "optim.micro_batch_size=2"],
            0,
            2 * (3 + 1) * 17,
            2 * (3 * 7 + 9 + 2),
        ),
        ("repeated", ["optim.thoughts_per_forward=2"], 4, 2 * 21, 2 * 7),
        # A document cut before its target, once, and three thoughts.
        ("tree", [], 0, 9 + 3 * 8, 3 * 7),
        ("tree", [], 4, 13 + 3 * 8, 3 * 7),
        # The whole document is the trunk of its thoughts; behind an instruction they have another.
        (
            "tree",
            ["objective.lm_weight=0.1", "optim.micro_batch_size=2"],
            0,
            2 * (10 + 3 * 8),
            2 * (3 * 7 + 9 + 2),
        ),
        ("tree", ["objective.lm_weight=0.1"], 4, 10 + 13 + 3 * 8, 3 * 7 + 9 + 2),
        (
            "tree",
            ["optim.thoughts_per_forward=2", "position.per_document=2"],
            0,
            9 + 2 * 2 * 8,
            2 * 2 * 7,
        ),
        ("tree", ["optim.thoughts_per_forward=5", "target.horizon=2"], 0, 8 + 3 * 9, 3 * 8),
    ],
)
def test_one_forward_by_hand(
    tmp_path: Path, layout: str, overrides: list[str], instruction: int, tokens: int, queries: int
) -> None:
    found = parts(
        small_run(tmp_path, *overrides), layout, format_tokens=FormatTokens(instruction=instruction)
    )
    assert found["activations"] == tokens * 2 * 300
    assert found["LM head and logits tile"] == queries * 5 * 6 + 7 * 5 * 2 + LOGITS_TILE_BYTES


@pytest.mark.parametrize("layout", LAYOUTS)
def test_documents_alone_are_one_row_each_in_both_layouts(tmp_path: Path, layout: str) -> None:
    config = small_run(
        tmp_path,
        "objective.policy_weight=0",
        "objective.lm_weight=1",
        "baseline.kind=none",
        "optim.micro_batch_size=2",
    )
    assert parts(config, layout)["activations"] == 2 * 10 * 2 * 300
    assert flops_of(config, layout)["lm"] == 3 * 4 * (10 * 200 + 55 * 64 + 9 * 70)


def test_activations_by_hand() -> None:
    """10 tokens x 2 bytes: 300 numbers each; or (2 layers + 3 copies of the norm) x width 5 + the
    largest layer's 140."""
    assert activation_bytes(SHAPES, 10, 2, checkpointing=False) == 10 * 2 * 300
    assert activation_bytes(SHAPES, 10, 2, checkpointing=True) == 10 * 2 * (5 * 5 + 140)


def test_cache_by_hand() -> None:
    """3 rows: 16 tokens of 32 numbers in 2 bytes, and 50 numbers of state in 4."""
    assert cache_bytes(SHAPES, 3, 16, 2) == 3 * (16 * 32 * 2 + 50 * 4)


@pytest.mark.parametrize("tokens, room", [(1, 16), (16, 16), (17, 32), (192, 192), (193, 384)])
def test_shared_cache_by_hand(tokens: int, room: int) -> None:
    """2 documents of 10 tokens and 5 slots, each with the room that its longest needs."""
    assert shared_cache_bytes(SHAPES, 2, 10, 5, tokens, 2) == (2 * 16 + 5 * room) * 32 * 2
    assert key_room(2049) == 2064


# Four slots at least; three places for documents and two more for each time that the slots are
# filled by one document's thoughts, and no more than there are documents.
@pytest.mark.parametrize(
    "overrides, slots, documents",
    [
        ([], 6, 2),
        (["sampling.slots=3"], 4, 2),
        (["optim.batch_size=40", "sampling.slots=3"], 4, 3 * 2 + 2),
        (["position.per_document=2", "sampling.slots=8"], 8, 2),
        (["optim.batch_size=40", "position.per_document=4", "sampling.slots=8"], 8, 3 + 2),
    ],
)
def test_documents_are_held_once_while_their_thoughts_are_sampled(
    tmp_path: Path, overrides: list[str], slots: int, documents: int
) -> None:
    """Room for 16 tokens of each document, which has 9, and of each slot, which has 6; and each
    document is run once."""
    config = small_run(tmp_path, *overrides)
    held = parts(config, "tree")["keys, values and states"]
    assert held == (documents * 16 + slots * 16) * 64
    batch = config.optim.batch_size
    markers = batch * config.position.per_document * 3 * (200 + 10 * 64 + 70)
    assert flops_of(config, "tree")["prefill"] == batch * (9 * 200 + 45 * 64) + markers


@pytest.mark.parametrize(
    "layout, cache, tokens",
    [
        # Two documents a rank, all six thoughts side by side, each 9 + 1 + 5 tokens long, and the
        # two contexts of 9 that are copied into them; where
        # keys are shared, in room for 16 tokens of a document and of a thought.
        ("repeated", 6 * (15 * 64 + 200) + 2 * (9 * 64 + 200), 3 * 17),
        ("tree", (2 * 16 + 6 * 16) * 64, 9 + 3 * 8),
    ],
)
def test_parts_of_a_run_by_hand(tmp_path: Path, layout: str, cache: int, tokens: int) -> None:
    """2 ranks, stage 1, bfloat16, one document per micro-batch."""
    config = small_run(tmp_path, "engine.activation_checkpointing=true")
    assert parts(config, layout) == {
        "weights": 2000,
        "gradients": 6000,
        "master weights": 2000,
        "two moments": 4000,
        "EMA of the weights": 2000,
        "teacher": 2000,
        "starting checkpoint (KL)": 0,
        "communication buckets": 0,
        "gathered weights": 0,
        "keys, values and states": cache,
        "next-token softmax": 6 * 7 * 32,
        "gathered layers": 0,
        "activations": tokens * 2 * 165,
        "LM head and logits tile": 3 * (6 + 1) * 5 * 6 + 7 * 5 * 2 + LOGITS_TILE_BYTES,
    }


def test_vllm_holds_a_copy_of_the_weights_and_keys_for_all_its_slots(tmp_path: Path) -> None:
    """1,000 weights and a head of 5 x 7 of its own in bfloat16; 4 rows of 10 + 1 + 6 tokens, each
    32 numbers, and their states."""
    config = small_run(tmp_path, "sampling.engine=vllm", "sampling.slots=4")
    plan = plan_of(config, shapes=dataclasses.replace(SHAPES, tied=True))
    found = {part.name: part.num_bytes for part in plan.memory if part.when == "sampling"}
    assert found == {
        "weights in vLLM": 2 * (1000 + 35),
        "keys, values and states": 4 * (17 * 64 + 200),
    }


def test_stage_3_shards_the_copies_and_gathers_to_sample(tmp_path: Path) -> None:
    config = small_run(tmp_path, "engine.zero_stage=3", "objective.kl_weight=0.1")
    found = parts(config)
    assert (
        found["weights"],
        found["teacher"],
        found["starting checkpoint (KL)"],
        found["gathered weights"],
    ) == (1000, 1000, 1000, 2000)
    assert [
        parts(small_run(tmp_path, f"engine.zero_stage={stage}"))["communication buckets"]
        for stage in (1, 2, 3)
    ] == [0, 2 * BUCKET_ELEMENTS, 2 * BUCKET_ELEMENTS]
    large = dataclasses.replace(SHAPES, parameters=3 * 10**9)
    synced = plan_of(
        small_run(tmp_path, "engine.zero_stage=3", "engine.generation=synced"), shapes=large
    )
    assert {part.name: part.num_bytes for part in synced.memory}["gathered weights"] == 2 * 10**9


@pytest.mark.parametrize(
    "kind, teacher", [("ema", 2000), ("frozen", 2000), ("self", 0), ("none", 0)]
)
def test_only_a_baseline_with_its_own_weights_holds_a_copy(
    tmp_path: Path, kind: str, teacher: int
) -> None:
    assert parts(small_run(tmp_path, f"baseline.kind={kind}"))["teacher"] == teacher


def test_a_run_that_does_not_think_has_no_ema_to_plan_for(tmp_path: Path) -> None:
    """Whatever its baseline would be: neither the average nor a teacher nor their place in a
    checkpoint."""
    found = parts(
        cpt := small_run(
            tmp_path, "objective.policy_weight=0", "objective.lm_weight=1", "baseline.kind=ema"
        )
    )
    assert (found["EMA of the weights"], found["teacher"]) == (0, 0)
    assert (
        checkpoint_bytes(cpt, 1000) == 12_000
        and checkpoint_bytes(small_run(tmp_path, "baseline.kind=ema"), 1000) == 16_000
    )


@pytest.mark.parametrize("layout", ["repeated", "tree"])
def test_what_a_placebo_scores_ahead_is_planned(tmp_path: Path, layout: str) -> None:
    """A third of a forward and backward pass over the thoughts; of one position a rank, for
    shuffled rewards."""
    plain, foreign, shuffled = (
        flops_of(small_run(tmp_path, f"reward.placebo={placebo}"), layout)
        for placebo in ("none", "foreign_thought", "shuffled_reward")
    )
    assert (plain["score"], foreign["score"]) == (0, plain["train"] / 3)
    assert 0 < shuffled["score"] < foreign["score"]


def test_an_offloaded_optimizer_moves_to_the_host(tmp_path: Path) -> None:
    here, there = (
        plan_of(small_run(tmp_path, f"engine.offload_optimizer={offload}"))
        for offload in ("false", "true")
    )
    assert there.host_bytes == 8000 and here.host_bytes == 0
    assert here.bytes_during("update") - there.bytes_during("update") == 8000


def test_the_peak_is_the_larger_of_sampling_and_update(tmp_path: Path) -> None:
    plan = plan_of(small_run(tmp_path))
    always = sum(part.num_bytes for part in plan.memory if part.when == "always")
    assert (
        plan.bytes_during("sampling") + plan.bytes_during("update")
        == sum(part.num_bytes for part in plan.memory) + always
    )
    assert plan.peak_bytes == max(plan.bytes_during("sampling"), plan.bytes_during("update"))


def test_a_plan_fits_where_six_percent_stay_free(tmp_path: Path) -> None:
    plan = plan_of(small_run(tmp_path))
    assert fits(plan, int(plan.peak_bytes / 0.94) + 1)
    assert not fits(plan, int(plan.peak_bytes / 0.94) - 1)


def test_a_cpu_is_planned_in_float32(tmp_path: Path) -> None:
    assert parts(small_run(tmp_path), device_bytes=None)["weights"] == 4000
    assert plan_of(small_run(tmp_path), 1, None).dtype == "float32"


def test_flops_of_a_step_by_hand(tmp_path: Path) -> None:
    """B 4, G 3, P 10, L 6. Per token 200, per pair 2 * 2 * 16 = 64, per head row 70."""
    flops = flops_of(small_run(tmp_path, "objective.lm_weight=0.1", "position.selector=surprisal"))
    assert tuple(flops) == PHASES
    # Context of 9 tokens, and an open marker in each thought; then 5 tokens see 10 before them.
    assert flops["prefill"] == 4 * (9 * 200 + 45 * 64) + 12 * (200 + 10 * 64 + 70)
    assert flops["decode"] == 12 * (5 * 200 + (50 + 15) * 64 + 5 * 70)
    # Prefix, open marker, 6 tokens, close marker; heads for the 6 tokens and the target.
    assert flops["train"] == 3 * 12 * (17 * 200 + 153 * 64 + 7 * 70)
    assert flops["teacher"] == 4 * (10 * 200 + 55 * 64 + 2 * 70)
    # Nine targets of the LM loss, and the policy's own no-think log-probability of the target and
    # the open marker.
    assert flops["lm"] == 3 * 4 * (10 * 200 + 55 * 64 + (9 + 2) * 70)
    assert flops["score"] == 4 * (10 * 200 + 55 * 64 + 9 * 70)


def test_flops_of_a_step_in_a_tree_by_hand(tmp_path: Path) -> None:
    """As above: each document once, and of each thought only what is its own, with the context
    before it."""
    flops, with_lm = (
        flops_of(small_run(tmp_path), "tree"),
        flops_of(small_run(tmp_path, "objective.lm_weight=0.1"), "tree"),
    )
    repeats = flops_of(small_run(tmp_path, "objective.lm_weight=0.1"))
    # 9 tokens of context; then the open marker of every thought.
    assert flops["prefill"] == 4 * (9 * 200 + 45 * 64) + 12 * (200 + 10 * 64 + 70)
    branches = 12 * (8 * 200 + (8 * 9 + 36) * 64 + 7 * 70)
    assert flops["train"] == 3 * (4 * (9 * 200 + 45 * 64) + branches)
    # The pass of the LM loss is the trunk.
    assert with_lm["train"] == 3 * branches
    assert all(with_lm[phase] == repeats[phase] for phase in ("decode", "teacher", "lm"))


def test_groups_in_slices_are_scored_ahead_and_run_their_context_in_each(tmp_path: Path) -> None:
    """Three thoughts in slices of two: two forwards without gradient, two with it."""
    slices = "optim.thoughts_per_forward=2"
    for layout, trunks in (("repeated", 0), ("tree", 4 * (9 * 200 + 45 * 64))):
        whole, sliced = (
            flops_of(small_run(tmp_path), layout),
            flops_of(small_run(tmp_path, slices), layout),
        )
        assert sliced["score"] == whole["train"] / 3 + trunks and whole["score"] == 0
        assert sliced["train"] == whole["train"] + 3 * trunks
        more = flops_of(small_run(tmp_path, slices, "optim.updates_per_rollout=2"), layout)
        assert (more["train"], more["score"]) == (2 * sliced["train"], sliced["score"])


# Of a context of 9 and branches of 8 tokens, one document with its three thoughts takes 3 * 17
# positions in rows, 9 + 3 * 8 in a tree, with two of them 34 and 25.
@pytest.mark.parametrize(
    "layout, limit, tokens, thoughts",
    [
        ("repeated", 1000, 2 * 3 * 17, 3),
        ("repeated", 60, 60, 3),
        ("repeated", 50, 50, 2),
        ("tree", 40, 40, 3),
        ("tree", 32, 32, 2),
    ],
)
def test_a_micro_batch_of_tokens_bounds_what_is_kept_for_the_backward_pass(
    tmp_path: Path, layout: str, limit: int, tokens: int, thoughts: int
) -> None:
    """Two documents a rank: never more than asked, nor than all that the rank has. FLOPs are those
    of groups in slices where the longest document needs them, and of whole groups else."""
    config = small_run(tmp_path, f"optim.tokens_per_micro_batch={limit}")
    found = parts(config, layout)
    assert found["activations"] == tokens * 2 * 300
    queries = min(limit, 2 * thoughts * 7)
    assert found["LM head and logits tile"] == queries * 5 * 6 + 7 * 5 * 2 + LOGITS_TILE_BYTES
    sliced = small_run(tmp_path, f"optim.thoughts_per_forward={thoughts}")
    assert flops_of(config, layout) == flops_of(sliced, layout)


@pytest.mark.parametrize("layout, needed", [("repeated", 17), ("tree", 9 + 8)])
def test_a_micro_batch_that_holds_no_thought_is_refused_at_the_start(
    tmp_path: Path, layout: str, needed: int
) -> None:
    """With what to write, which is then planned."""
    small = small_run(tmp_path, f"optim.tokens_per_micro_batch={needed - 1}")
    with pytest.raises(ConfigError, match=f"Write optim.tokens_per_micro_batch={needed} or more"):
        plan_of(small, layout=layout)
    plan_of(small_run(tmp_path, f"optim.tokens_per_micro_batch={needed}"), layout=layout)


def test_a_placebo_of_documents_by_their_lengths_scores_all_thoughts_ahead(tmp_path: Path) -> None:
    """Of documents in their order the last position of each of the two ranks, of four."""
    shuffled = "reward.placebo=shuffled_reward"
    in_order = flops_of(small_run(tmp_path, shuffled))
    by_length = flops_of(small_run(tmp_path, shuffled, "optim.tokens_per_micro_batch=1000"))
    assert in_order["score"] == in_order["train"] / 3 * 2 / 4
    assert by_length["score"] == by_length["train"] / 3


@pytest.mark.parametrize(
    "given, named",
    [
        ([], "optim.tokens_per_micro_batch=17"),
        (["optim.tokens_per_micro_batch=100"], "optim.tokens_per_micro_batch=17"),
        (["optim.thoughts_per_forward=3"], "optim.thoughts_per_forward=1"),
    ],
)
def test_what_does_not_fit_is_told_how_to_cut_groups(
    tmp_path: Path, given: list[str], named: str
) -> None:
    """One thought of a group at a time, in the key that the config has, which bears no other."""
    plan = plan_of(small_run(tmp_path, *given), device_bytes=1)
    assert named in [setting for setting, _ in plan.relief]


def test_all_positions_of_a_document(tmp_path: Path) -> None:
    """Of ten tokens, those at 3 to 8 have three before them and two to predict."""
    assert (
        positions_per_document(
            small_run(
                tmp_path,
                "position.per_document=all",
                "position.min_prefix_tokens=3",
                "target.horizon=2",
            )
        )
        == 6
    )
    with pytest.raises(ConfigError, match="has 9 positions, got 12"):
        positions_per_document(small_run(tmp_path, "position.per_document=12"))


def test_the_first_limit_of_the_budget_ends_the_run(tmp_path: Path) -> None:
    """A step reads 40 document tokens and at most 72 thought tokens."""
    step = sum(flops_of(small_run(tmp_path)).values())
    assert plan_of(small_run(tmp_path)).steps == 7
    assert plan_of(small_run(tmp_path, "budget.tokens=121")).steps == 4
    assert plan_of(small_run(tmp_path, f"budget.flops={2.5 * step}")).steps == 3
    assert plan_of(small_run(tmp_path)).step_paper_flops == 72 + 40
    assert (
        plan_of(
            small_run(tmp_path, "budget.steps=null", f"budget.paper_flops={2.5 * (72 + 40)}")
        ).steps
        == 3
    )


def test_seconds_alone_are_planned_without_a_number_of_steps(tmp_path: Path) -> None:
    """What a step takes is not known before the run; what is known of a step is told."""
    plan = plan_of(small_run(tmp_path, "budget.steps=null", "budget.seconds=3600"))
    text = render_plan(plan)
    assert (
        plan.steps is None
        and "3,600" in text
        and "as the seconds allow" in text
        and "of the run" not in text
    )
    both = render_plan(plan_of(small_run(tmp_path, "budget.seconds=3600")))
    assert re.search(r"steps, at most +7\n", both) and "FLOPs of the run" in both


def test_disk_is_measured_where_the_run_folder_will_be(tmp_path: Path) -> None:
    config = small_run(tmp_path, "checkpoint.keep=2")
    plan = plan_of(config)
    assert (plan.checkpoint_bytes, plan.disk_bytes) == (16_000, 48_000)
    assert plan.disk_free_bytes > 0
    assert checkpoint_bytes(small_run(tmp_path, "baseline.kind=frozen"), 1000) == 12_000


def test_the_rendered_plan_says_what_does_not_fit(tmp_path: Path) -> None:
    plan = plan_of(small_run(tmp_path), device_bytes=10**6)
    text = render_plan(dataclasses.replace(plan, disk_free_bytes=1))
    assert "DOES NOT FIT in 0.00 GB" in text and "NOT ENOUGH DISK" in text
    assert "DOES NOT FIT" not in render_plan(plan_of(small_run(tmp_path)))
    assert text.isascii()


# Both look up only, and neither pulls in DeepSpeed or a tracker by itself.
@pytest.mark.parametrize(
    "module, above",
    [
        ("ledger", {"process.ranks", "model.shapes", "sampling.rollout"}),
        ("plan_work", {"config", "model.shapes", "sampling.schedule"}),
        (
            "plan_memory",
            {
                "config",
                "model.shapes",
                "model.slot_attention",
                "sampling.schedule",
                "measure.plan_work",
            },
        ),
    ],
)
def test_the_arithmetic_imports_only_what_is_above_it(module: str, above: set[str]) -> None:
    tree = ast.parse((REPOSITORY / "rlp" / "measure" / f"{module}.py").read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert {name.removeprefix("rlp.") for name in names if name.startswith("rlp")} == above
    assert not any(name.startswith(("deepspeed", "wandb")) for name in names)
