"""What a run takes from the machine: how threads wait, cores, memory, disk."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.optim.adamw import adamw

from rlp import train
from rlp.config import ConfigError, load_config
from rlp.learn import optimizer as optimizer_module
from rlp.measure import plan as plan_module
from rlp.measure.plan import plan_run
from rlp.measure.plan_text import render_plan
from rlp.model.loading import choose_dtype
from rlp.model.shapes import model_shapes
from rlp.process import machine
from rlp.process import ranks as distributed
from rlp.process.ranks import start_ranks
from rlp.run import checks
from rlp.run.saved import save
from rlp.trainer import take_step
from tests import REPOSITORY
from tests.tiny_models import architecture, tiny_policy
from tests.training import open_run, tiny_config, write_corpus

PROGRAMS = [
    path
    for path in (
        REPOSITORY / "train.py",
        *sorted((REPOSITORY / "kernels").glob("*.py")),
        *sorted((REPOSITORY / "experiments").rglob("*.py")),
    )
    if path.name == "train.py" or "__main__" in path.read_text()
]
"""Whatever can be started."""

WHAT_TORCH_FINDS = """
import os, runpy, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch finds", os.environ.get("OMP_WAIT_POLICY"))
            os._exit(0)

sys.meta_path.insert(0, Watch())
if sys.argv[1].endswith(".py"):
    program = sys.argv[1]
    sys.path.insert(0, os.path.dirname(program))
    sys.argv = [program, "--help"]
    runpy.run_path(program, run_name="__main__")
else:
    __import__(sys.argv[1])
"""


def what_torch_finds(program, **environment):
    """What the OpenMP runtime is told where a program loads torch; the program ends there."""
    kept = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", WHAT_TORCH_FINDS, str(program)],
        env=kept | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}"} | environment,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return next(
        (line for line in done.stdout.splitlines() if line.startswith("torch finds")),
        "no torch here",
    )


@pytest.mark.parametrize(
    "program",
    [*PROGRAMS, "rlp.cli", "rlp.trainer"],
    ids=lambda program: str(program).removeprefix(f"{REPOSITORY}/"),
)
def test_waiting_threads_sleep_in_every_program(program):
    """The policy is read when torch loads, so it is set before, whatever is imported first."""
    assert what_torch_finds(program) in ("torch finds passive", "no torch here")


def test_the_users_own_policy_stays():
    assert what_torch_finds("rlp.trainer", OMP_WAIT_POLICY="active") == "torch finds active"


def test_the_trainer_loads_torch():
    """Else the tests above would say nothing."""
    assert what_torch_finds("rlp.trainer") == "torch finds passive"


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_an_update_goes_piece_by_piece_and_changes_no_bit(monkeypatch, ema_decay):
    """AdamW as torch has it, on a tensor of three pieces, the last one short; no tensor of the
    whole size is made beside the state."""
    monkeypatch.setattr(optimizer_module, "PIECE_ELEMENTS", 100 // torch.get_num_threads())
    pieces = []
    monkeypatch.setattr(
        optimizer_module,
        "adamw",
        lambda weights, *rest, **options: (
            pieces.append(weights[0].numel()) or adamw(weights, *rest, **options)
        ),
    )
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(12, 21, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer, reference = (
        optimizer_module.AdamWithEMA([{"params": [ours]}], ema_decay=ema_decay, **options),
        torch.optim.AdamW([theirs], **options),
    )

    average = start.double()
    for _ in range(3):
        ours.grad = theirs.grad = torch.randn(12, 21, generator=generator)
        optimizer.step()
        reference.step()
        average = average.lerp(theirs.detach().double(), 0.1)

    assert torch.equal(ours, theirs) and max(pieces) <= 100 and sum(pieces) == 3 * 252
    assert all(
        torch.equal(optimizer.state[ours][name], reference.state[theirs][name])
        for name in ("step", "exp_avg", "exp_avg_sq")
    )
    if ema_decay is None:
        assert "lag" not in optimizer.state[ours]
    else:
        torch.testing.assert_close(
            (ours.detach() - optimizer.state[ours]["lag"]).double(), average, rtol=1e-5, atol=1e-6
        )


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """What the kernel tells of control groups, written by the test: file name -> content."""
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "OF_THIS_PROCESS", tmp_path / "of_this_process")

    def write(groups, **files):
        (tmp_path / "of_this_process").write_text(groups)
        for name, content in files.items():
            path = tmp_path / "cgroup" / name.replace("__", "/").replace("_DOT_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    return write


def test_a_container_is_asked_for_its_limits_and_not_the_machine(kernel):
    """Version 2: the tightest of the nested groups counts, and cached files can be dropped."""
    kernel(
        "0::/job/step\n",
        job__cpu_DOT_max="150000 100000\n",
        job__step__cpu_DOT_max="max 100000\n",
        job__memory_DOT_max="3000000000\n",
        job__memory_DOT_current="2500000000\n",
        job__memory_DOT_stat="anon 5\ninactive_file 400000000\n",
        job__step__memory_DOT_max="max\n",
    )
    assert machine.available_memory_bytes() == 900_000_000
    assert machine.usable_cores() == min(2, len(os.sched_getaffinity(0)))


@pytest.mark.parametrize(
    "environment, threads",
    [
        ({}, 6),
        ({"LOCAL_WORLD_SIZE": "4"}, 1),
        ({"LOCAL_SIZE": "2"}, 3),
        ({"LOCAL_SIZE": "2", "OMP_NUM_THREADS": "5"}, None),
    ],
)
def test_ranks_share_the_cores_of_their_machine(monkeypatch, environment, threads):
    """torchrun gives each rank one thread and DeepSpeed gives each all cores; what the user says of
    threads stays."""
    asked = []
    monkeypatch.setattr(distributed, "usable_cores", lambda: 6)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    distributed.share_cores()
    assert asked == ([] if threads is None else [threads])


def test_the_older_control_groups_are_read_too(kernel):
    """Version 1, seen from within: the process's own path is not there, and the root is its
    group."""
    kernel(
        "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n",
        memory__memory_DOT_limit_in_bytes="2000000000\n",
        memory__memory_DOT_usage_in_bytes="500000000\n",
        memory__memory_DOT_stat="total_inactive_file 0\n",
        cpu__cpu_DOT_cfs_quota_us="100000\n",
        cpu__cpu_DOT_cfs_period_us="100000\n",
    )
    assert machine.available_memory_bytes() == 1_500_000_000 and machine.usable_cores() == 1


def test_without_limits_the_machine_counts(kernel):
    kernel(
        "4:memory:/\n0::/\n",
        memory__memory_DOT_limit_in_bytes="9223372036854771712\n",
        memory__memory_DOT_usage_in_bytes="5\n",
        cpu_DOT_max="max 100000\n",
    )
    assert machine.usable_cores() == len(os.sched_getaffinity(0))
    assert 0 < machine.available_memory_bytes() < 2**50


def test_a_plan_for_another_machine_starts_no_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(
            [
                str(REPOSITORY / "configs" / "quickstart.yaml"),
                f"run.dir={tmp_path / 'run'}",
                "--machine",
                "8x80",
            ]
        )
    assert (
        ended.value.code == 2
        and "Write --dry-run --machine 8x80" in capsys.readouterr().err
        and not (tmp_path / "run").exists()
    )


@pytest.mark.parametrize(
    "flags, isa, width, stage, chosen",
    [
        ("fma avx2 avx512f", None, 2048, 1, torch.float32),
        ("avx512f avx512_bf16", None, 2048, 1, torch.bfloat16),
        ("avx512_bf16 amx_bf16", None, 576, 2, torch.bfloat16),
        ("avx512_bf16", None, 255, 1, torch.float32),
        ("avx512_bf16", None, 64, 1, torch.float32),
        ("avx512_bf16", None, 2048, 0, torch.float32),
        ("avx512_bf16", "AVX512_CORE", 2048, 1, torch.float32),
        ("avx512_bf16", "AVX512_CORE_BF16", 2048, 1, torch.bfloat16),
    ],
)
def test_auto_takes_bfloat16_where_the_cpu_multiplies_it_and_the_model_gains(
    tmp_path, monkeypatch, flags, isa, width, stage, chosen
):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n\n")
    monkeypatch.setattr(machine, "PROCESSORS", tmp_path / "cpuinfo")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if isa:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    config = load_config(
        {
            "run": {"dir": "unused"},
            "model": {"path": "unused"},
            "data": {"train": ["unused"]},
            "budget": {"steps": 1},
            "engine": {"zero_stage": stage},
        }
    )
    assert choose_dtype(config, torch.device("cpu"), width)[0] == chosen
    explicit = replace(config, engine=replace(config.engine, dtype="float32"))
    assert choose_dtype(explicit, torch.device("cpu"), width) == (
        torch.float32,
        "as engine.dtype says",
    )


@pytest.mark.parametrize("began", [torch.float32, torch.bfloat16])
def test_a_run_goes_on_in_the_dtype_that_it_began_in(trained_in, began, monkeypatch, capsys):
    """Though `auto` would choose the other one on the machine that it comes to."""
    first = trained_in(began, steps=1)
    other = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}[began]
    monkeypatch.setattr(checks, "choose_dtype", lambda *ignored: (other, "another machine"))
    run = trained_in(None, steps=2, resume="auto")
    assert (first.dtype, run.dtype, run.state.step) == (began, began, 1)
    assert f"{str(began).removeprefix('torch.')}: so the run began" in capsys.readouterr().out


@pytest.fixture(scope="module")
def ranks():
    return start_ranks()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(
        tmp_path_factory.mktemp("corpus") / "train.jsonl",
        ["w1 w2 w3 w4 w5 w6 w7 w8", "w3 w9 w2 w8 w1 w7"],
    )


@pytest.fixture
def trained_in(tmp_path, model_folder, corpus, ranks, monkeypatch):
    """A run with `engine.dtype: auto` that comes to a dtype, its steps made and saved; None leaves
    the choice as it is."""

    def begin(dtype, *, steps, resume="never"):
        if dtype is not None:
            monkeypatch.setattr(checks, "choose_dtype", lambda *ignored: (dtype, "first machine"))
        config = tiny_config(
            tmp_path / "run",
            model_folder,
            corpus,
            engine__dtype="auto",
            engine__zero_stage=1,
            budget__steps=steps,
            run__resume=resume,
        )
        run = open_run(config, ranks)
        while run.state.step < steps and resume == "never":
            take_step(run)
        if resume == "never":
            save(run)
        run.log.close()
        return run

    return begin


def test_the_head_is_widened_once_for_all_tokens_of_a_rollout(monkeypatch):
    """In bfloat16 on a CPU; and not kept when the sampling is over, for the weights move."""
    policy = tiny_policy().to(torch.bfloat16)
    hidden = torch.ones(2, policy.head.shape[1], dtype=torch.bfloat16)
    with policy.sampling():
        first = policy._head_in(torch.float32)
        assert policy._head_in(torch.float32) is first and torch.equal(first, policy.head.float())
        inside = policy._logits(hidden)
    with torch.no_grad():
        policy.head.mul_(2)
        assert policy._head_in(torch.float32) is not first
        torch.testing.assert_close(policy._logits(hidden), 2 * inside)


def small_config(tmp_path, *overrides):
    return load_config(
        {
            "run": {"dir": str(tmp_path / "run")},
            "model": {"path": "unused"},
            "data": {"train": ["unused"], "held_out": ["unused"], "max_document_tokens": 32},
            "budget": {"steps": 1},
            "engine": {"dtype": "float32"},
        },
        list(overrides),
    )


@pytest.mark.parametrize(
    "overrides, what",
    [
        (["optim.batch_size=2000000000"], "a step has 32,000,000,000 thoughts of 2,048 tokens"),
        (
            ["evaluation.thoughts_per_position=1000000000"],
            "the held-out panel has 256,000,000,000 thoughts",
        ),
        (
            [
                "objective.policy_weight=0",
                "objective.lm_weight=1",
                "optim.batch_size=2000000000",
                "data.max_document_tokens=100000",
            ],
            "a step has 0 thoughts",
        ),
    ],
)
def test_a_step_that_no_memory_holds_is_refused_in_a_sentence(tmp_path, overrides, what):
    """Its tokens alone: before a document is read."""
    with pytest.raises(
        ConfigError, match=f"{what}.*for their tokens alone, and this machine has .*Write a smaller"
    ):
        checks.refuse_sizes(small_config(tmp_path, *overrides), 1)
    checks.refuse_sizes(small_config(tmp_path), 1)


def test_a_number_that_counts_nothing_on_earth_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"optim.batch_size must be at most 2,147,483,648.*got 10000000000"
    ):
        small_config(tmp_path, "optim.batch_size=10000000000")
    assert small_config(tmp_path, "budget.tokens=10000000000").budget.tokens == 10**10


def test_a_cpu_plan_says_what_to_write_where_memory_is_short(tmp_path, monkeypatch):
    """What changes nothing but speed comes first, and each setting leads to a smaller peak than the
    one before."""
    config = small_config(
        tmp_path, "optim.micro_batch_size=4", "optim.batch_size=8", "thought.max_thought_tokens=64"
    )
    shapes = model_shapes(architecture("qwen3"))
    monkeypatch.setattr(plan_module, "available_memory_bytes", lambda: 0)
    monkeypatch.setattr("rlp.measure.plan_memory.PROCESS_BYTES", 10**12)
    plan = plan_run(config, shapes, 1, layout="tree")
    settings, peaks = zip(*plan.relief)
    assert settings[0] == "optim.micro_batch_size=1" and settings[-1] == "baseline.kind=self"
    assert list(peaks) == sorted(peaks, reverse=True) and peaks[0] < plan.peak_bytes
    told = render_plan(plan)
    assert "DOES NOT FIT in the" in told and told.index("micro_batch_size=1") < told.index(
        "baseline.kind=self"
    )
    assert any(
        line.startswith("WARNING: that may be more memory")
        for line in checks.announce(plan, tmp_path / "run")
    )

    monkeypatch.setattr(plan_module, "available_memory_bytes", lambda: 10**14)
    plan = plan_run(config, shapes, 1, layout="tree")
    assert plan.relief == () and "fits in the" in render_plan(plan)


def test_disk_is_planned_and_a_run_that_could_leave_nothing_is_refused(tmp_path):
    """A checkpoint of 16 bytes a parameter, two kept and one being written; an export of 4."""
    plan = plan_run(
        small_config(tmp_path),
        replace(model_shapes(architecture("qwen3")), parameters=10**6),
        1,
        layout="tree",
    )
    assert (plan.checkpoint_bytes, plan.export_bytes, plan.disk_bytes) == (
        16_000_000,
        4_000_000,
        48_000_000,
    )
    with pytest.raises(
        ConfigError,
        match=(
            "with 19 MB for this run, and it needs 20 MB: 16 MB for a checkpoint and 4 MB for the"
            " export"
        ),
    ):
        checks.announce(replace(plan, disk_free_bytes=19_000_000), tmp_path / "run")
    tight = checks.announce(replace(plan, disk_free_bytes=47_000_000), tmp_path / "run")
    assert (
        "48 MB of disk, where 47 MB are free" in tight[0] and "more disk than there is" in tight[-1]
    )
    assert len(checks.announce(replace(plan, disk_free_bytes=48_000_000), tmp_path / "run")) == 1
