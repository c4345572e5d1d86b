"""Seconds of a step before it is run: by hand on machines that do a round number of things in a
second, against the arithmetic of the real ones, and against what a real run calls."""

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlp.config import Config, ConfigError, load_config
from rlp.measure import machines
from rlp.measure.decode_steps import decoding, exponential_lengths, steps_with_refill
from rlp.measure.ledger import Ledger
from rlp.measure.machines import KINDS, Speed, machine_named
from rlp.measure.plan import Plan, plan_run
from rlp.measure.plan_text import render_plan
from rlp.measure.plan_time import BESIDE_LAYERS, OPERATORS
from rlp.measure.speed_here import measure_speed
from rlp.model.loading import choose_layout
from rlp.model.shapes import model_shapes
from rlp.process.files import disk_bytes_per_s
from rlp.process.ranks import Ranks
from rlp.train import parse
from rlp.trainer import Trainer, take_step
from tests import REPOSITORY
from tests.measure.small_plans import EIGHTY_GB, SHAPES, plan_of, published, small_run
from tests.training import open_run, tiny_config

SLOW = Speed(
    name="a slow machine",
    flops=1000.0,
    bytes_per_s=100.0,
    launch_s=0.0,
    graphed_s=None,
    link_bytes_per_s=10.0,
    disk_bytes_per_s=50.0,
    runs_ahead=False,
    rests_on=("nothing",),
)


def seconds(plan: Plan) -> dict[str, float]:
    return {phase.phase: phase.seconds for phase in plan.time.phases}


def timed(folder: Path, *overrides: str, speed: Speed = SLOW, **options: object) -> Plan:
    config = small_run(folder, *overrides)
    return plan_of(config, layout=options.pop("layout", "tree"), speed=speed, **options)


# Machines


@pytest.mark.parametrize(
    "name, devices, memory", [("8xH100", 8, 80), ("16xh200", 16, 141), ("1xA100", 1, 80)]
)
def test_a_machine_is_known_by_its_devices(name: str, devices: int, memory: int) -> None:
    found = machine_named(name)
    assert (found.devices, found.memory_bytes) == (devices, memory * 10**9)
    kind = KINDS[name.partition("x")[2].upper()]
    assert found.speed.flops == machines.REACHED["products"] * kind.flops
    several = devices > machines.DEVICES_PER_NODE
    assert found.speed.link_bytes_per_s == (
        kind.network_bytes_per_s if several else kind.link_bytes_per_s
    )


def test_memory_alone_is_a_machine_without_seconds(tmp_path: Path) -> None:
    found = machine_named("8x80")
    assert (found.devices, found.memory_bytes, found.speed) == (8, EIGHTY_GB, None)
    assert "Seconds" not in render_plan(plan_of(small_run(tmp_path), speed=found.speed))


@pytest.mark.parametrize("name", ["8xH99", "H100", "0xH100", "8 x H100", "8x", "8x0", "-1xH100"])
def test_an_unknown_machine_is_refused_with_those_that_are_known(name: str) -> None:
    with pytest.raises(ConfigError, match="A100, H100, H200, such as 8xH100, or COUNTxGIGABYTES"):
        machine_named(name)


# Decoding


def test_slots_that_are_free_take_the_next_thought() -> None:
    """Two slots: 5 then 2, beside 3 then 4; with a look every four tokens 8 + 4 beside 4 + 4."""
    lengths = np.array([5, 3, 4, 2])
    assert steps_with_refill(lengths, 2, 1) == 7
    assert steps_with_refill(lengths, 2, 4) == 12
    assert steps_with_refill(lengths, 9, 1) == 5


def test_the_worst_case_is_every_thought_at_its_budget() -> None:
    found = decoding(1000, 128, 2048, None, world_size=8, look_every=8)
    assert (found.steps, found.straggling) == (8 * 2048, 1.0)
    assert decoding(10, 4, 5, None, world_size=1, look_every=8).steps == 3 * 8


def test_lengths_with_a_mean() -> None:
    """They have it, and no thought is longer than its budget or empty."""
    for mean in (1, 40, 512, 2000, 2048):
        lengths = exponential_lengths(4096, mean, 2048)
        assert lengths.mean() == pytest.approx(mean, rel=0.01)
        assert lengths.min() >= 1 and lengths.max() <= 2048


def test_refill_saves_what_blocks_wait_for() -> None:
    """1,024 thoughts of 512 tokens in the mean in 128 slots: no fewer steps than tokens a slot, no
    more than these and one whole thought; blocks of 128 take 8 times nearly the budget. The slowest
    of eight ranks waits for its own last thoughts alone."""
    found = decoding(1024, 128, 2048, 512, world_size=8, look_every=8)
    least = 1024 * 512 / 128
    assert least <= found.steps_of_a_rank <= found.steps <= least + 2048
    assert 1 <= found.straggling < 1.2
    alone = decoding(1024, 128, 2048, 512, world_size=1, look_every=8)
    assert alone.straggling == 1


def test_many_thoughts_are_followed_in_part() -> None:
    """A hundred thousand on a rank: the bulk is tokens over slots."""
    found = decoding(100_000, 64, 100, 30, world_size=1, look_every=1)
    assert found.steps == pytest.approx(100_000 * 30 / 64, rel=0.03)


# A step by hand: B 4, P 10, G 3, L 6 on two ranks; per token 200 FLOPs, per pair 64, per head 70


def test_a_step_by_hand(tmp_path: Path) -> None:
    plan = timed(tmp_path)
    flops, found = plan.phase_flops, seconds(plan)
    for phase in ("prefill", "teacher"):
        assert found[phase] == pytest.approx(flops[phase] / 2 / 1000)
    # Six slots a rank decode six tokens each, all at once: the FLOPs of decoding are slower than
    # reading what is held. Six words of each: 12 passes over 6 x 7 float32 numbers.
    assert found["decode"] == pytest.approx(max(6 * held(), flops["decode"] / 2 / 1000))
    assert found["draw"] == pytest.approx(6 * 12 * 6 * 7 * 4 / 100)


def held() -> float:
    """Seconds to read, for a token of each slot: 100 + 5 x 7 weights, two documents of 9 tokens
    once, and 3 tokens of each of six thoughts, which are half through; keys of 32 numbers; of two
    bytes all. And states of 50 float32 numbers, read and written."""
    return (135 * 2 + (2 * 9 + 6 * 3) * 32 * 2 + 6 * 50 * 4 * 2) / 100


def test_the_update_by_hand(tmp_path: Path) -> None:
    """Half of the FLOPs on each rank, and 24 passes over half of 1,000 float32 numbers; ranks send
    half of twice that to each other under stage 1: float32 gradients, bfloat16 weights."""
    plan = timed(tmp_path)
    optimizer, sent = 24 * 4 * 500 / 100, (4000 + 2000) / 2 / 10
    expected = plan.phase_flops["train"] / 2 / 1000 + optimizer + sent
    assert seconds(plan)["train"] == pytest.approx(expected)
    again = timed(tmp_path, "engine.activation_checkpointing=true")
    assert seconds(again)["train"] - seconds(plan)["train"] == pytest.approx(
        plan.phase_flops["train"] / 2 / 1000 / 3
    )


# Two micro-batches of one document a rank; 1,000 bfloat16 numbers, half of which a rank lacks.
@pytest.mark.parametrize(
    "stage, num_bytes",
    [
        (1, 4000 + 2000),
        (2, 2 * 2000 + 2000),
        (3, 2 * 2000 + 2 * 2 * 2000),
    ],
)
def test_what_ranks_send_each_other(tmp_path: Path, stage: int, num_bytes: int) -> None:
    """Stage 1 sums gradients once, 2 and 3 in each micro-batch; 3 gathers the weights in each, for
    forward and backward."""
    near = dataclasses.replace(SLOW, link_bytes_per_s=None)
    far, here = (
        seconds(timed(tmp_path, f"engine.zero_stage={stage}", speed=speed))["train"]
        for speed in (SLOW, near)
    )
    assert far - here == pytest.approx(num_bytes / 2 / 10)


def test_operators_cost_what_they_cost(tmp_path: Path) -> None:
    """On a CPU beside the arithmetic, on a GPU in its place where they take longer, and in a graph
    their kernels beside the reading."""
    calls = 2 * OPERATORS["decode"] + BESIDE_LAYERS
    cpu = dataclasses.replace(SLOW, launch_s=1.0)
    more = seconds(timed(tmp_path, speed=cpu))["decode"] - seconds(timed(tmp_path))["decode"]
    assert more == pytest.approx(6 * calls)

    gpu = dataclasses.replace(SLOW, launch_s=1e3, graphed_s=1.0, runs_ahead=True)
    eager = seconds(timed(tmp_path, "sampling.graph=off", speed=gpu))["decode"]
    assert eager == pytest.approx(8 * calls * 1e3)  # a look every 8 tokens
    graph, cheap = (
        seconds(timed(tmp_path, speed=dataclasses.replace(gpu, graphed_s=cost)))["decode"]
        for cost in (1.0, 0.0)
    )
    assert graph - cheap == pytest.approx(8 * calls)
    rows = seconds(timed(tmp_path, speed=gpu, layout="repeated"))["decode"]
    assert rows == pytest.approx(8 * calls * 1e3)


def test_vllm_reads_the_context_of_each_thought(tmp_path: Path) -> None:
    """In graphs of its own: weights and states as in `held`, and in each slot that is busy 9 tokens
    of context and 3 of its own; six thoughts of six tokens in eight steps keep 4.5 slots busy."""
    gpu = dataclasses.replace(SLOW, flops=1e9, launch_s=1e3, graphed_s=0.0, runs_ahead=True)
    vllm = timed(tmp_path, "sampling.engine=vllm", "sampling.graph=off", speed=gpu)
    read = 135 * 2 + 4.5 * (12 * 32 * 2 + 50 * 4 * 2)
    assert seconds(vllm)["decode"] == pytest.approx(8 * read / 100)


def test_a_save_is_spread_over_the_steps_between_two(tmp_path: Path) -> None:
    """16 bytes a parameter; nothing where the disk is not known."""
    assert seconds(timed(tmp_path, "checkpoint.every_n_steps=8"))["save"] == 16_000 / 50 / 8
    assert "save" not in seconds(timed(tmp_path, "checkpoint.every_n_steps=0"))
    unknown = dataclasses.replace(SLOW, disk_bytes_per_s=None)
    assert "save" not in seconds(timed(tmp_path, speed=unknown))
    assert timed(tmp_path).time.export.seconds == 4000 / 50


def test_shorter_thoughts_take_less(tmp_path: Path) -> None:
    longest, shorter = (timed(tmp_path, mean_thought_tokens=mean) for mean in (None, 2))
    before, after = seconds(longest), seconds(shorter)
    assert all(after[phase] < before[phase] for phase in ("decode", "train"))
    assert after["prefill"] == before["prefill"] and after["teacher"] == before["teacher"]
    assert "worst case" in longest.time.lengths and "2 tokens in the mean" in shorter.time.lengths


@pytest.mark.parametrize("mean", [0.5, 7])
def test_a_mean_that_no_thoughts_have_is_refused(tmp_path: Path, mean: float) -> None:
    with pytest.raises(ConfigError, match="1 to thought.max_thought_tokens=6"):
        timed(tmp_path, mean_thought_tokens=mean)


def test_a_run_that_does_not_think_samples_nothing(tmp_path: Path) -> None:
    plan = timed(
        tmp_path, "objective.policy_weight=0", "objective.lm_weight=1", "baseline.kind=none"
    )
    assert set(seconds(plan)) == {"train", "save"}
    assert seconds(plan)["train"] > plan.phase_flops["lm"] / 2 / 1000


def test_the_panel_is_planned_where_there_is_one(tmp_path: Path) -> None:
    """Before and after seven steps, and after the third and the sixth."""
    assert timed(tmp_path).time.evaluation is None
    panel = ("data.held_out=[h.jsonl]", "evaluation.panel_positions=4")
    plan = timed(tmp_path, *panel, "evaluation.every_n_steps=3")
    assert plan.evaluations == 4 and plan.time.evaluation.seconds > 0
    larger = timed(tmp_path, "data.held_out=[h.jsonl]", "evaluation.panel_positions=64")
    assert larger.time.evaluation.seconds > 4 * plan.time.evaluation.seconds
    hours = plan.time.run_seconds(7, 4)
    once = 4 * plan.time.evaluation.seconds + plan.time.export.seconds
    assert hours == pytest.approx(7 * plan.time.step_seconds + once)


# The page


def test_every_figure_says_what_it_rests_on(tmp_path: Path) -> None:
    plan = timed(tmp_path, "data.held_out=[h.jsonl]")
    text = render_plan(plan)
    page = text[text.index("Seconds per step on a slow machine") :]
    for phase in (*plan.time.phases, plan.time.evaluation, plan.time.export):
        line = next(line for line in page.splitlines() if line.startswith(f"  {phase.phase} "))
        assert line.split()[2:], line
    assert "worst case" in page and "  nothing" in page and "device hours" in page
    assert max(map(len, page.splitlines())) <= 100 and text.isascii()


def test_seconds_alone_become_steps_where_their_length_is_planned(tmp_path: Path) -> None:
    plan = timed(tmp_path, "budget.steps=null", "budget.seconds=1e6")
    assert f"about {1e6 // plan.time.step_seconds:,.0f}" in render_plan(plan)


@pytest.mark.parametrize("option", [["--machine", "8xH100"], ["--mean-thought-tokens", "9"]])
def test_what_plans_starts_no_run(option: list[str], capsys) -> None:
    with pytest.raises(SystemExit):
        parse(["run.yaml", *option], "rlp train")
    assert f"Write --dry-run {option[0]} 9" in capsys.readouterr().err.replace("8xH100", "9")
    assert parse(["run.yaml", "--dry-run", *option], "rlp train").dry_run


# This machine


def test_the_speed_of_this_machine_is_measured_in_a_moment(tmp_path: Path) -> None:
    """In a second or two of a processor's time, and the page says what was measured; nothing stays
    on the disk. The widest model's product is cut to a few rows."""
    wide = dataclasses.replace(SHAPES, width=8192)
    began = time.process_time()
    speed = measure_speed(wide, torch.float32, torch.device("cpu"), tmp_path / "runs" / "absent")
    assert time.process_time() - began < 5
    assert not speed.runs_ahead and list(tmp_path.iterdir()) == []
    assert all(
        number > 0
        for number in (speed.flops, speed.bytes_per_s, speed.launch_s, speed.disk_bytes_per_s)
    )
    assert "measured here in" in speed.rests_on[0] and "4 x 8192 x 32768" in speed.rests_on[0]


def test_a_disk_that_takes_nothing_is_not_measured() -> None:
    assert disk_bytes_per_s(Path("/proc/absent"), 1) is None


def test_a_dry_run_measures_and_another_machine_is_not(
    tmp_path, model_folder, corpus, ranks, monkeypatch
) -> None:
    asked = []

    def measured(shapes: object, dtype: torch.dtype, device: torch.device, folder: Path) -> Speed:
        asked.append((dtype, device.type, folder))
        return SLOW

    monkeypatch.setattr("rlp.run.checks.measure_speed", measured)
    config = tiny_config(tmp_path / "run", model_folder, corpus, optim__batch_size=8)
    trainer = Trainer(config, ranks=ranks)
    assert "2 tokens in the mean" in trainer.plan("8xH100", 2) and not asked
    assert "Seconds per step on a slow machine (every thought at its budget" in trainer.plan()
    assert asked == [(torch.float32, "cpu", tmp_path / "run")]


# Against the arithmetic of real machines


def qwen3(*overrides: str, mean: float | None = None, machine: str = "8xH100") -> Plan:
    config = load_config(REPOSITORY / "configs" / "qwen3_1p7b_paper.yaml", overrides)
    asked, architecture = machine_named(machine), published("qwen3_1p7b")
    return plan_run(
        config,
        model_shapes(architecture),
        asked.devices,
        asked.memory_bytes,
        layout=choose_layout(config, architecture)[0],
        speed=asked.speed,
        mean_thought_tokens=mean,
    )


def test_qwen3_on_eight_h100_takes_what_arithmetic_says() -> None:
    """1,024 thoughts a GPU in 128 slots. Eager, 28 layers of 80 operators of 10 us are 22.4 ms a
    token: 8 x 2,048 of them are 367 s where each thought goes to its budget, or blocks wait for
    those that do; with refill and a mean of 512 tokens 1024 x 512 / 128 = 4,096 and a last thought.
    The update is 6 FLOPs for each of 1.4 billion weights in the body and 0.3 in the head and each
    of 16.8 million tokens, and a third more for activations: 29 s at the peak of eight H100."""
    blocks = seconds(qwen3("sampling.graph=off"))
    refilled = seconds(qwen3("sampling.graph=off", mean=512))
    assert blocks["decode"] == pytest.approx(8 * 2048 * 28 * 80 * 10e-6, rel=0.1)
    token = 28 * 80 * 10e-6
    assert 4096 * token <= refilled["decode"] <= (4096 + 2048) * token * 1.1
    products = 6 * (1.4e9 + 0.3e9) * 512 * 16 * 2048 * 4 / 3 / 8 / 989e12
    assert products / 0.35 <= blocks["train"] <= 1.5 * products / 0.35
    assert sum(refilled[phase] for phase in ("prefill", "teacher", "draw")) < 5


def test_a_graph_and_more_slots_and_machines_help() -> None:
    eager, graph, faster = (
        seconds(qwen3(f"sampling.graph={graph}", mean=512, machine=machine))
        for graph, machine in (("off", "8xH100"), ("on", "8xH100"), ("on", "8xH200"))
    )
    assert faster["decode"] < graph["decode"] < eager["decode"]
    assert seconds(qwen3(machine="16xH100"))["train"] < seconds(qwen3())["train"]


# Against what a run calls


class Operators(TorchDispatchMode):
    """Counts those that compute, by the phase that runs."""

    VIEWS = {
        "_reshape_alias",
        "_unsafe_view",
        "alias",
        "as_strided",
        "detach",
        "expand",
        "permute",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
        "transpose",
        "unbind",
        "unsqueeze",
        "view",
    }

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.counts = "", Counter()

    def __torch_dispatch__(self, operator, kinds, arguments=(), named=None):
        if operator.overloadpacket.__name__ not in self.VIEWS:
            self.counts[self.phase] += 1
        return operator(*arguments, **(named or {}))


def operators_of_a_step(config: Config, ranks: Ranks, monkeypatch) -> Counter:
    """Of the second step."""
    counted, plain = Operators(), Ledger.time

    @contextmanager
    def during(self: Ledger, *phases: str) -> Iterator[None]:
        outer, counted.phase = counted.phase, phases[0]
        with plain(self, *phases):
            yield
        counted.phase = outer

    run = open_run(config, ranks)
    take_step(run)
    monkeypatch.setattr(Ledger, "time", during)
    with counted:
        take_step(run)
    run.log.close()
    return counted.counts


def test_a_run_calls_about_as_many_operators_as_are_planned(
    tmp_path, model_folder, corpus, ranks, monkeypatch
) -> None:
    """Phase by phase within a factor of two: a model of 2 layers, a marker and 5 tokens decoded in
    turn behind one forward of all documents, and two micro-batches."""
    config = tiny_config(tmp_path / "run", model_folder, corpus, budget__steps=9)
    counts = operators_of_a_step(config, ranks, monkeypatch)

    def of(operators: str, passes: float) -> float:
        return passes * (2 * OPERATORS[operators] + BESIDE_LAYERS)

    planned = {
        "prefill": of("read", 1),
        "decode": of("decode", 6),
        "teacher": of("read", 2),
        "train": of("train", 2) + 2 * OPERATORS["optimizer"],
    }
    for phase, number in planned.items():
        assert 0.5 <= counts[phase] / number <= 2, (phase, counts[phase], number)
